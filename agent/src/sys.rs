//! What no crate here wraps, and the only unsafe code of the agent.

pub(crate) mod bpf;
pub(crate) mod io_uring;
pub(crate) mod nftables;
