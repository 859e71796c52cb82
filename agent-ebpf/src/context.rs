//! All raw access to what the kernel hands to a program.
//!
//! Context fields are written with `write_volatile`: LLVM otherwise merges two adjacent 32-bit stores into one of 64
//! bits, which the verifier refuses ("invalid bpf_context access size=8").

use agent_ebpf::{
    AF_INET, AF_INET6, Handshake,
    decide::{Attempt, Destination},
};
use aya_ebpf::{
    EbpfContext as _,
    bindings::{bpf_sock, bpf_sock_addr, bpf_sock_ops, bpf_sockopt},
    helpers::generated::bpf_get_netns_cookie,
    programs::{SockAddrContext, SockOpsContext, SockoptContext},
};
use core::ptr::{read_volatile, write_volatile};

const SOCK_STREAM: u32 = 1;
const IPPROTO_TCP: u32 = 6;
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
    let address = ctx.sock_addr;
    // SAFETY: fields of the context and of the socket it holds; the verifier checks offsets and sizes.
    let (kind, protocol, bound) = unsafe {
        ((*address).type_, (*address).protocol, read_volatile(&raw const (*client(ctx)).bound_dev_if))
    };
    let tcp = kind == SOCK_STREAM && (protocol == IPPROTO_TCP || protocol == IPPROTO_MPTCP);
    Attempt { destination, tcp, bound_to_device: bound != 0 }
}

/// The client's socket.
#[inline(always)]
pub fn client(ctx: &SockAddrContext) -> *mut bpf_sock {
    // SAFETY: a field of the context; never null in these hooks.
    unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk }
}

#[inline(always)]
fn destination4(ctx: &SockAddrContext) -> Destination {
    // SAFETY: fields of the context.
    let (addr, port) = unsafe { ((*ctx.sock_addr).user_ip4, (*ctx.sock_addr).user_port) };
    Destination::from_ipv4(addr.to_ne_bytes(), u16::from_be(port as u16))
}

#[inline(always)]
fn destination6(ctx: &SockAddrContext) -> Destination {
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

/// The connection of a socket operation, seen from its client: the local end is the client's.
#[inline(always)]
pub fn handshake_of_client(ctx: &SockOpsContext, family: u16) -> Handshake {
    let ((client, client_port), (proxy, proxy_port)) = ends(ctx, family);
    handshake(ctx, family, (client, client_port), (proxy, proxy_port))
}

/// The connection of a socket operation, seen from the proxy: the local end is the proxy's.
///
/// A proxy that listens on `[::]` gets IPv4 connections on IPv6 sockets.
#[inline(always)]
pub fn handshake_of_proxy(ctx: &SockOpsContext) -> Handshake {
    let ops: *mut bpf_sock_ops = ctx.ops;
    // SAFETY: fields of the context.
    let mapped = unsafe {
        read_volatile(&raw const (*ops).local_ip6[0]) == 0
            && read_volatile(&raw const (*ops).local_ip6[1]) == 0
            && read_volatile(&raw const (*ops).local_ip6[2]) == 0xffff_u32.to_be()
    };
    let family = if ctx.family() == u32::from(AF_INET6) && !mapped { AF_INET6 } else { AF_INET };
    let (proxy, client) = ends(ctx, family);
    handshake(ctx, family, client, proxy)
}

type End = ([u8; 16], u16);

/// Local and remote end.
#[inline(always)]
fn ends(ctx: &SockOpsContext, family: u16) -> (End, End) {
    let ops: *mut bpf_sock_ops = ctx.ops;
    // SAFETY: fields of the context; remote_port is in network order, local_port in the host's.
    unsafe {
        let local_port = (*ops).local_port as u16;
        let remote_port = u32::from_be((*ops).remote_port) as u16;
        let (local, remote) = if family == AF_INET {
            ([(*ops).local_ip4, 0, 0, 0], [(*ops).remote_ip4, 0, 0, 0])
        } else {
            (words(&raw const (*ops).local_ip6), words(&raw const (*ops).remote_ip6))
        };
        ((bytes(local), local_port), (bytes(remote), remote_port))
    }
}

#[inline(always)]
fn handshake(ctx: &SockOpsContext, family: u16, client: End, proxy: End) -> Handshake {
    let netns = if crate::maps::netns_cookies() {
        // SAFETY: the loader sets the constant only where this program type has the helper.
        unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }
    } else {
        0
    };
    Handshake {
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

/// The socket, level and name of a `getsockopt`.
#[inline(always)]
pub fn option(ctx: &SockoptContext) -> (*mut bpf_sock, i32, i32) {
    // SAFETY: fields of the context.
    unsafe { ((*ctx.sockopt).__bindgen_anon_1.sk, (*ctx.sockopt).level, (*ctx.sockopt).optname) }
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
