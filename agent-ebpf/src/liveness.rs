//! Whether the proxy is there, asked of the kernel at the moment of each connect.

use crate::maps;
use agent_ebpf::{AF_INET, Listener, decide};
use aya_ebpf::{
    EbpfContext as _,
    bindings::{bpf_sock_tuple, bpf_sock_tuple__bindgen_ty_1},
    bindings::{
        bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 as Ipv4,
        bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 as Ipv6,
    },
    helpers::generated::{bpf_ktime_get_ns, bpf_sk_lookup_tcp, bpf_sk_release},
    programs::SockAddrContext,
};

/// `BPF_F_CURRENT_NETNS`: look in the network namespace of the socket at hand.
const CURRENT_NETNS: u64 = -1_i32 as u32 as u64;

/// Whether a listener of the proxy's is at the loopback address of this family, and alive.
#[inline(always)]
pub fn proxy_listens(ctx: &SockAddrContext, family: u16, port: u16) -> bool {
    let dport = port.to_be();
    let (mut tuple, size) = if family == AF_INET {
        let ipv4 = Ipv4 { saddr: 0, daddr: 0x7f00_0001_u32.to_be(), sport: 0, dport };
        (bpf_sock_tuple__bindgen_ty_1 { ipv4 }, size_of::<Ipv4>())
    } else {
        let ipv6 = Ipv6 { saddr: [0; 4], daddr: [0, 0, 0, 1_u32.to_be()], sport: 0, dport };
        (bpf_sock_tuple__bindgen_ty_1 { ipv6 }, size_of::<Ipv6>())
    };
    // SAFETY: the tuple is as large as the size says; a socket that is found is released.
    unsafe {
        let tuple = (&raw mut tuple).cast::<bpf_sock_tuple>();
        let sk = bpf_sk_lookup_tcp(ctx.as_ptr(), tuple, size as u32, CURRENT_NETNS, 0);
        if sk.is_null() {
            return false;
        }
        let mark: Option<Listener> = maps::listener(sk).copied();
        bpf_sk_release(sk.cast());
        mark.is_some_and(|listener| decide::is_alive(&listener, bpf_ktime_get_ns()))
    }
}
