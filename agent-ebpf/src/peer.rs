//! `getpeername` of a steered socket shows the peer that the application asked for.

use crate::{context, datagram, maps};
use agent_ebpf::{
    Origin,
    decide::{Destination, Transport},
};
use aya_ebpf::programs::SockAddrContext;

/// These hooks may only change the answer.
const PROCEED: i32 = 1;

/// `getpeername` of an IPv4 socket.
#[inline(always)]
pub fn getpeername4(ctx: &SockAddrContext) -> i32 {
    if let Some(asked) = asked(ctx, &context::destination4(ctx)) {
        context::set_address4(ctx, &asked);
    }
    PROCEED
}

/// `getpeername` of an IPv6 socket.
#[inline(always)]
pub fn getpeername6(ctx: &SockAddrContext) -> i32 {
    if let Some(asked) = asked(ctx, &context::destination6(ctx)) {
        context::set_address6(ctx, &asked);
    }
    PROCEED
}

#[inline(always)]
fn asked(ctx: &SockAddrContext, peer: &Destination) -> Option<Destination> {
    match context::transport(ctx) {
        Transport::Tcp => {
            let Origin { family, port, addr, .. } = *maps::origin(context::cookie(ctx))?;
            Some(Destination { family, port, addr })
        }
        Transport::Udp => datagram::resolver(peer),
        Transport::Other => None,
    }
}
