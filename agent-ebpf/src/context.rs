//! All raw access to what the kernel hands to a program.
//!
//! Context fields are written with `write_volatile`: LLVM otherwise merges two adjacent 32-bit stores into one of 64
//! bits, which the verifier refuses ("invalid bpf_context access size=8").

use agent_ebpf::{
    AF_INET, AF_INET6, Ends, IPPROTO_TCP, IPPROTO_UDP,
    decide::{Attempt, Destination, Transport},
};
use aya_ebpf::{
    EbpfContext,
    bindings::{bpf_sock, bpf_sock_addr, bpf_sockopt},
    helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie},
    programs::{SockAddrContext, SockOpsContext, SockoptContext},
};
use core::ptr::{read_volatile, write_volatile};

const SOCK_STREAM: u32 = 1;
const SOCK_DGRAM: u32 = 2;
const IPPROTO_MPTCP: u32 = 262;

/// The connection attempt of a `connect4` hook.
#[inline(always)]
pub fn attempt4(ctx: &SockAddrContext) -> Attempt {
    attempt(ctx, destination4(ctx))
}

/// The connection attempt of a `connect6` hook.
#[inline(always)]
pub fn attempt6(ctx: &SockAddrContext) -> Attempt {
    attempt(ctx, destination6(ctx))
}

#[inline(always)]
fn attempt(ctx: &SockAddrContext, destination: Destination) -> Attempt {
    // SAFETY: a field of the socket that the context holds; the verifier checks offset and size.
    let bound = unsafe { read_volatile(&raw const (*client(ctx)).bound_dev_if) };
    Attempt { destination, transport: transport(ctx), bound_to_device: bound != 0 }
}

/// What the socket of the hook speaks.
#[inline(always)]
pub fn transport(ctx: &SockAddrContext) -> Transport {
    let address = ctx.sock_addr;
    // SAFETY: fields of the context.
    match unsafe { ((*address).type_, (*address).protocol) } {
        (SOCK_STREAM, IPPROTO_TCP | IPPROTO_MPTCP) => Transport::Tcp,
        (SOCK_DGRAM, IPPROTO_UDP) => Transport::Udp,
        _ => Transport::Other,
    }
}

/// What no other socket of this boot has or had.
#[inline(always)]
pub fn cookie(ctx: &impl EbpfContext) -> u64 {
    // SAFETY: the contexts of connect, getpeername and socket operations all have a socket.
    unsafe { bpf_get_socket_cookie(ctx.as_ptr()) }
}

#[inline(always)]
fn client(ctx: &SockAddrContext) -> *mut bpf_sock {
    // SAFETY: a field of the context; never null in these hooks.
    unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk }
}

/// The address of an IPv4 hook.
#[inline(always)]
pub fn destination4(ctx: &SockAddrContext) -> Destination {
    // SAFETY: fields of the context.
    let (addr, port) = unsafe { ((*ctx.sock_addr).user_ip4, (*ctx.sock_addr).user_port) };
    Destination::from_ipv4(addr.to_ne_bytes(), u16::from_be(port as u16))
}

/// The address of an IPv6 hook, IPv4 where it is IPv4-mapped.
#[inline(always)]
pub fn destination6(ctx: &SockAddrContext) -> Destination {
    // SAFETY: fields of the context, read one word at a time as the verifier wants it.
    let (words, port) = unsafe { (words(&raw const (*ctx.sock_addr).user_ip6), (*ctx.sock_addr).user_port) };
    Destination::from_ipv6(bytes(words), u16::from_be(port as u16))
}

/// Writes the address of an IPv4 hook.
#[inline(always)]
pub fn set_address4(ctx: &SockAddrContext, destination: &Destination) {
    let address: *mut bpf_sock_addr = ctx.sock_addr;
    let [a, b, c, d, ..] = destination.addr;
    // SAFETY: fields of the context that these hooks may write.
    unsafe {
        write_volatile(&raw mut (*address).user_ip4, u32::from_ne_bytes([a, b, c, d]));
        write_volatile(&raw mut (*address).user_port, u32::from(destination.port.to_be()));
    }
}

/// Writes the address of an IPv6 hook, IPv4 as IPv4-mapped.
#[inline(always)]
pub fn set_address6(ctx: &SockAddrContext, destination: &Destination) {
    let address: *mut bpf_sock_addr = ctx.sock_addr;
    let a = &destination.addr;
    let word = |i: usize| u32::from_ne_bytes([a[i], a[i + 1], a[i + 2], a[i + 3]]);
    let words = if destination.family == AF_INET {
        [0, 0, 0xffff_u32.to_be(), word(0)]
    } else {
        [word(0), word(4), word(8), word(12)]
    };
    // SAFETY: fields of the context that these hooks may write.
    unsafe {
        write_volatile(&raw mut (*address).user_ip6[0], words[0]);
        write_volatile(&raw mut (*address).user_ip6[1], words[1]);
        write_volatile(&raw mut (*address).user_ip6[2], words[2]);
        write_volatile(&raw mut (*address).user_ip6[3], words[3]);
        write_volatile(&raw mut (*address).user_port, u32::from(destination.port.to_be()));
    }
}

/// The socket of a socket operation; none while it is only a request.
#[inline(always)]
pub fn socket(ctx: &SockOpsContext) -> Option<*mut bpf_sock> {
    // SAFETY: a field of the context, null unless the socket is a full one.
    let sk = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    if sk.is_null() { None } else { Some(sk) }
}

/// The connection of a socket operation whose local end is the client's.
#[inline(always)]
pub fn ends_at_client(ctx: &SockOpsContext, family: u16) -> Ends {
    let (client, proxy) = if family == AF_INET { ends4(ctx) } else { ends6(ctx) };
    ends(ctx, family, client, proxy)
}

/// The connection of a socket operation whose local end is the proxy's.
#[inline(always)]
pub fn ends_at_proxy(ctx: &SockOpsContext) -> Ends {
    if ctx.family() == u32::from(AF_INET6) {
        let (proxy, client) = ends6(ctx);
        if !is_mapped(&proxy.0) {
            return ends(ctx, AF_INET6, client, proxy);
        }
    }
    let (proxy, client) = ends4(ctx);
    ends(ctx, AF_INET, client, proxy)
}

/// The connection whose local end is the socket that is asked about, which is the proxy's.
#[inline(always)]
pub fn ends_of_asked(ctx: &SockoptContext) -> Ends {
    let sk: *mut bpf_sock = asked(ctx);
    // SAFETY: fields of the socket; src_port is in the host's order, dst_port in network order.
    let (local_port, remote_port, family) =
        unsafe { ((*sk).src_port as u16, u16::from_be((*sk).dst_port), (*sk).family) };
    if family == u32::from(AF_INET6) {
        // SAFETY: as above.
        let (local, remote) =
            unsafe { (bytes(words(&raw const (*sk).src_ip6)), bytes(words(&raw const (*sk).dst_ip6))) };
        if !is_mapped(&local) {
            return ends(ctx, AF_INET6, (remote, remote_port), (local, local_port));
        }
    }
    // SAFETY: as above.
    let (local, remote) = unsafe { (ipv4((*sk).src_ip4), ipv4((*sk).dst_ip4)) };
    ends(ctx, AF_INET, (remote, remote_port), (local, local_port))
}

type End = ([u8; 16], u16);

/// Local and remote end, as IPv4.
#[inline(always)]
fn ends4(ctx: &SockOpsContext) -> (End, End) {
    let (local_port, remote_port) = ports(ctx);
    // SAFETY: fields of the context.
    let (local, remote) = unsafe { ((*ctx.ops).local_ip4, (*ctx.ops).remote_ip4) };
    ((ipv4(local), local_port), (ipv4(remote), remote_port))
}

/// Local and remote end, as IPv6.
#[inline(always)]
fn ends6(ctx: &SockOpsContext) -> (End, End) {
    let (local_port, remote_port) = ports(ctx);
    // SAFETY: fields of the context.
    let (local, remote) =
        unsafe { (words(&raw const (*ctx.ops).local_ip6), words(&raw const (*ctx.ops).remote_ip6)) };
    ((bytes(local), local_port), (bytes(remote), remote_port))
}

/// Local and remote port.
#[inline(always)]
fn ports(ctx: &SockOpsContext) -> (u16, u16) {
    // SAFETY: fields of the context; remote_port is in network order, local_port in the host's.
    unsafe { ((*ctx.ops).local_port as u16, u32::from_be((*ctx.ops).remote_port) as u16) }
}

/// A proxy that listens on `[::]` gets IPv4 connections on IPv6 sockets.
#[inline(always)]
fn is_mapped(addr: &[u8; 16]) -> bool {
    matches!(addr, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, ..])
}

#[inline(always)]
fn ipv4(addr: u32) -> [u8; 16] {
    bytes([addr, 0, 0, 0])
}

#[inline(always)]
fn ends(ctx: &impl EbpfContext, family: u16, client: End, proxy: End) -> Ends {
    let netns = if crate::maps::netns_cookies() {
        // SAFETY: the loader sets the constant only where every program type here has the helper.
        unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }
    } else {
        0
    };
    Ends {
        netns,
        client: client.0,
        proxy: proxy.0,
        client_port: client.1,
        proxy_port: proxy.1,
        family: u32::from(family),
    }
}

/// Writes the answer to a `getsockopt` and makes it a success; false when the caller's buffer is too small for it.
#[inline(always)]
pub fn answer<T>(ctx: &SockoptContext, value: &T) -> bool {
    let sockopt: *mut bpf_sockopt = ctx.sockopt;
    // SAFETY: the verifier makes sure that nothing is written unless it lies before the end of the buffer.
    unsafe {
        let to = (*sockopt).__bindgen_anon_2.optval.cast::<T>();
        if to.add(1) > (*sockopt).__bindgen_anon_3.optval_end.cast::<T>() {
            return false;
        }
        core::ptr::copy_nonoverlapping(
            core::ptr::from_ref(value).cast::<u8>(),
            to.cast::<u8>(),
            size_of::<T>(),
        );
        write_volatile(&raw mut (*sockopt).optlen, size_of::<T>() as i32);
        write_volatile(&raw mut (*sockopt).retval, 0);
    }
    true
}

/// The level and name of a `getsockopt`.
#[inline(always)]
pub fn option(ctx: &SockoptContext) -> (i32, i32) {
    // SAFETY: fields of the context.
    unsafe { ((*ctx.sockopt).level, (*ctx.sockopt).optname) }
}

/// The port of the socket that a `getsockopt` asks about, and its family.
#[inline(always)]
pub fn port_of_asked(ctx: &SockoptContext) -> (u16, u16) {
    let sk = asked(ctx);
    // SAFETY: fields of the socket; src_port is in the host's order.
    unsafe { ((*sk).src_port as u16, (*sk).family as u16) }
}

/// The socket that a `getsockopt` asks about.
#[inline(always)]
pub fn asked(ctx: &SockoptContext) -> *mut bpf_sock {
    // SAFETY: a field of the context; never null.
    unsafe { (*ctx.sockopt).__bindgen_anon_1.sk }
}

/// # Safety
/// `from` points at a field of a context.
#[inline(always)]
unsafe fn words(from: *const [u32; 4]) -> [u32; 4] {
    let from = from.cast::<u32>();
    // SAFETY: as promised by the caller.
    unsafe {
        [
            read_volatile(from),
            read_volatile(from.add(1)),
            read_volatile(from.add(2)),
            read_volatile(from.add(3)),
        ]
    }
}

#[inline(always)]
fn bytes([a, b, c, d]: [u32; 4]) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[0..4].copy_from_slice(&a.to_ne_bytes());
    bytes[4..8].copy_from_slice(&b.to_ne_bytes());
    bytes[8..12].copy_from_slice(&c.to_ne_bytes());
    bytes[12..16].copy_from_slice(&d.to_ne_bytes());
    bytes
}
