//! How the proxy learns the origin of a connection.
//!
//! The client's port is known only when its SYN is about to leave: from then on the origin stands under the
//! connection's two ends, where the proxy's side finds it. Until the handshake is over the entry is the client's to
//! remove; afterwards it is the proxy's, since a client may close long before the proxy asks.

use crate::{context, maps};
use agent_ebpf::{
    AF_INET, AF_INET6, Counter, DNS_PORT, MESH_REDIRECT_HEARTBEAT, MESH_REDIRECT_ORIGIN,
    MESH_REDIRECT_RESOLVER, NAME_LEN, ORIGIN_OPTION_VERSION, Origin, OriginOption, RESOLVER_OPTION_VERSION,
    ResolverKey, ResolverOption, SO_ORIGINAL_DST, SOL_IP, SOL_IPV6, SOL_MESH_REDIRECT,
};
use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
        BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_SOCK_OPS_TCP_LISTEN_CB, BPF_TCP_CLOSE,
    },
    helpers::generated::bpf_ktime_get_ns,
    programs::{SockOpsContext, SockoptContext},
};

const DONE: u32 = 1;

/// An event of a socket in a service's cgroup.
#[inline(always)]
pub fn client_event(ctx: &SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => set_out(ctx),
        BPF_SOCK_OPS_STATE_CB if ctx.arg(1) == BPF_TCP_CLOSE => client_closes(ctx),
        _ => {}
    }
    DONE
}

/// An event of a socket in the proxy's cgroup.
#[inline(always)]
pub fn proxy_event(ctx: &SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => arrive(ctx),
        BPF_SOCK_OPS_STATE_CB if ctx.arg(1) == BPF_TCP_CLOSE => {
            maps::remove_connection(&context::ends_at_proxy(ctx));
        }
        BPF_SOCK_OPS_TCP_LISTEN_CB => {
            if let Some(sk) = context::socket(ctx) {
                maps::mark_listener(sk, 0);
            }
        }
        _ => {}
    }
    DONE
}

#[inline(always)]
fn set_out(ctx: &SockOpsContext) {
    let Some(origin) = maps::origin(context::cookie(ctx)) else { return };
    if maps::add_connection(&context::ends_at_client(ctx, origin.family), origin) {
        tell_state(ctx);
    } else {
        maps::count(origin.service, Counter::Errors);
    }
}

#[inline(always)]
fn client_closes(ctx: &SockOpsContext) {
    let cookie = context::cookie(ctx);
    let Some(origin) = maps::origin(cookie) else { return };
    let ends = context::ends_at_client(ctx, origin.family);
    maps::clear_origin(cookie);
    if maps::connection(&ends).is_some_and(|connection| connection.accepted == 0) {
        maps::remove_connection(&ends);
    }
}

#[inline(always)]
fn arrive(ctx: &SockOpsContext) {
    if let Some(connection) = maps::connection(&context::ends_at_proxy(ctx)) {
        connection.accepted = 1;
        tell_state(ctx);
    }
}

/// Asks for events when the state changes, so that the entries go with their sockets.
#[inline(always)]
fn tell_state(ctx: &SockOpsContext) {
    let _a_flag_the_kernel_knows = ctx.set_cb_flags(BPF_SOCK_OPS_STATE_CB_FLAG as i32);
}

/// `getsockopt` of the proxy: answers the options of this project and leaves every other one alone.
#[inline(always)]
pub fn getsockopt(ctx: &SockoptContext) -> i32 {
    match context::option(ctx) {
        (SOL_MESH_REDIRECT, MESH_REDIRECT_HEARTBEAT) => {
            // SAFETY: takes nothing and returns a number.
            maps::mark_listener(context::asked(ctx), unsafe { bpf_ktime_get_ns() });
            context::answer(ctx, &());
        }
        (SOL_IP, SO_ORIGINAL_DST) => {
            if let Some(origin) = origin(ctx)
                && origin.family == AF_INET
            {
                context::answer(ctx, &SockaddrIn::of(origin));
            }
        }
        (SOL_IPV6, SO_ORIGINAL_DST) => {
            if let Some(origin) = origin(ctx)
                && origin.family == AF_INET6
            {
                context::answer(ctx, &SockaddrIn6::of(origin));
            }
        }
        (SOL_MESH_REDIRECT, MESH_REDIRECT_RESOLVER) => {
            let (port, family) = context::port_of_asked(ctx);
            if let Some(&addr) = maps::resolver(&ResolverKey { family, port }) {
                let version = RESOLVER_OPTION_VERSION;
                context::answer(ctx, &ResolverOption { version, family, port: DNS_PORT, addr });
            }
        }
        (SOL_MESH_REDIRECT, MESH_REDIRECT_ORIGIN) => {
            if let Some(origin) = origin(ctx) {
                context::answer(ctx, &whole(origin));
            }
        }
        _ => {}
    }
    1
}

/// The origin of an accepted connection.
#[inline(always)]
fn origin(ctx: &SockoptContext) -> Option<&'static Origin> {
    let connection = maps::connection(&context::ends_of_asked(ctx))?;
    (connection.accepted != 0).then_some(&connection.origin)
}

#[inline(always)]
fn whole(origin: &Origin) -> OriginOption {
    OriginOption {
        version: ORIGIN_OPTION_VERSION,
        family: origin.family,
        port: origin.port,
        addr: origin.addr,
        uid: origin.uid,
        pid: origin.pid,
        cgroup: origin.cgroup,
        service: maps::service(origin.service).map_or([0; NAME_LEN], |service| service.name),
    }
}

/// `struct sockaddr_in` (linux/in.h).
#[repr(C)]
struct SockaddrIn {
    family: u16,
    port_be: u16,
    addr: [u8; 4],
    zero: [u8; 8],
}

impl SockaddrIn {
    #[inline(always)]
    fn of(origin: &Origin) -> Self {
        let [a, b, c, d, ..] = origin.addr;
        Self { family: origin.family, port_be: origin.port.to_be(), addr: [a, b, c, d], zero: [0; 8] }
    }
}

/// `struct sockaddr_in6` (linux/in6.h).
#[repr(C)]
struct SockaddrIn6 {
    family: u16,
    port_be: u16,
    flowinfo: u32,
    addr: [u8; 16],
    scope_id: u32,
}

impl SockaddrIn6 {
    #[inline(always)]
    fn of(origin: &Origin) -> Self {
        Self {
            family: origin.family,
            port_be: origin.port.to_be(),
            flowinfo: 0,
            addr: origin.addr,
            scope_id: 0,
        }
    }
}
