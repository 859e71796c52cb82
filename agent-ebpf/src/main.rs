//! The eBPF programs: entry points, one line each.
//!
//! A program function must not bear its section's name (bpf-linker: "symbol already defined"), hence the prefix, which
//! also tells them from everybody else's in `bpftool prog`.

#![no_std]
#![no_main]
#![expect(unsafe_code, reason = "context access, helpers and map access of eBPF are raw pointers")]
#![expect(missing_docs, reason = "the macros generate entry points and maps that cannot carry docs")]
#![expect(unreachable_pub, reason = "entry points are exported to the loader")]

mod connect;
mod context;
mod datagram;
mod events;
mod kernel;
mod liveness;
mod maps;
mod origin;
mod peer;

use aya_ebpf::{
    macros::{cgroup_sock_addr, cgroup_sockopt, sock_ops},
    programs::{SockAddrContext, SockOpsContext, SockoptContext},
};

/// Linux 5.9 for the storage that two programs share.
#[cgroup_sock_addr(connect4)]
pub fn mr_connect4(ctx: SockAddrContext) -> i32 {
    connect::connect4(&ctx)
}

/// As [`mr_connect4`].
#[cgroup_sock_addr(connect6)]
pub fn mr_connect6(ctx: SockAddrContext) -> i32 {
    connect::connect6(&ctx)
}

/// Linux 5.8.
#[cgroup_sock_addr(getpeername4)]
pub fn mr_peername4(ctx: SockAddrContext) -> i32 {
    peer::getpeername4(&ctx)
}

/// Linux 5.8.
#[cgroup_sock_addr(getpeername6)]
pub fn mr_peername6(ctx: SockAddrContext) -> i32 {
    peer::getpeername6(&ctx)
}

/// Linux 4.18.
#[cgroup_sock_addr(sendmsg4)]
pub fn mr_sendmsg4(ctx: SockAddrContext) -> i32 {
    datagram::sendmsg4(&ctx)
}

/// Linux 4.18.
#[cgroup_sock_addr(sendmsg6)]
pub fn mr_sendmsg6(ctx: SockAddrContext) -> i32 {
    datagram::sendmsg6(&ctx)
}

/// Linux 5.2.
#[cgroup_sock_addr(recvmsg4)]
pub fn mr_recvmsg4(ctx: SockAddrContext) -> i32 {
    datagram::recvmsg4(&ctx)
}

/// Linux 5.2.
#[cgroup_sock_addr(recvmsg6)]
pub fn mr_recvmsg6(ctx: SockAddrContext) -> i32 {
    datagram::recvmsg6(&ctx)
}

/// In a service's cgroup: hands the origin over to the proxy. Linux 5.8 for socket storage in this program type.
#[sock_ops]
pub fn mr_client_ops(ctx: SockOpsContext) -> u32 {
    origin::client_event(&ctx)
}

/// In the proxy's cgroup: takes the origin over, and marks listeners as the proxy's.
#[sock_ops]
pub fn mr_proxy_ops(ctx: SockOpsContext) -> u32 {
    origin::proxy_event(&ctx)
}

/// In the proxy's cgroup only, since it taxes every getsockopt there. Linux 5.3.
#[cgroup_sockopt(getsockopt)]
pub fn mr_getsockopt(ctx: SockoptContext) -> i32 {
    origin::getsockopt(&ctx)
}

/// Kernels let only programs under the GPL call some helpers; none of those is used here, and this is Apache-2.0.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 11] = *b"Apache-2.0\0";

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
