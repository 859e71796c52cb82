//! DNS by datagram: queries go to the port of the proxy's that stands for the resolver, and answers come from the resolver.

use crate::{context, events, kernel::Kernel, maps};
use agent_ebpf::{
    Counter, DNS_PORT, RESOLVER_PORTS, ResolverKey,
    decide::{self, Attempt, Decision, Destination, Transport},
};
use aya_ebpf::programs::SockAddrContext;

/// The hooks' answer: go on, with whatever address the context now holds.
const PROCEED: i32 = 1;

/// A datagram of a socket that is not connected, to an IPv4 address.
#[inline(always)]
pub fn sendmsg4(ctx: &SockAddrContext) -> i32 {
    if let Some(target) = query(ctx, &context::attempt4(ctx)) {
        context::set_address4(ctx, &target);
    }
    PROCEED
}

/// A datagram of a socket that is not connected, to an IPv6 address; IPv4-mapped ones come to [`sendmsg4`].
#[inline(always)]
pub fn sendmsg6(ctx: &SockAddrContext) -> i32 {
    if let Some(target) = query(ctx, &context::attempt6(ctx)) {
        context::set_address6(ctx, &target);
    }
    PROCEED
}

#[inline(always)]
fn query(ctx: &SockAddrContext, attempt: &Attempt) -> Option<Destination> {
    let id = maps::scope();
    // Known here, so that the compiler leaves out what is for streams.
    let attempt = Attempt { transport: Transport::Udp, ..*attempt };
    let Decision::Query { dns_port } = decide::connect(&Kernel::new(ctx, id), &attempt) else { return None };
    let (counter, target) = outcome(&attempt.destination, dns_port);
    events::decided(id, &attempt, counter);
    target
}

/// As what a query counts, and the port of the proxy's that stands for its resolver; with all of them taken by others it
/// goes its way.
#[inline(always)]
pub fn outcome(resolver: &Destination, dns_port: u16) -> (Counter, Option<Destination>) {
    let family = resolver.family;
    let mut tries = 0;
    while tries < RESOLVER_PORTS {
        let port = decide::resolver_port(resolver, dns_port, tries);
        if maps::stands_for(&ResolverKey { family, port }, &resolver.addr) {
            return (Counter::Queries, Some(Destination::loopback(family, port)));
        }
        tries += 1;
    }
    (Counter::Errors, None)
}

/// The sender of a datagram from an IPv4 address, as the application sees it.
#[inline(always)]
pub fn recvmsg4(ctx: &SockAddrContext) -> i32 {
    if let Some(resolver) = resolver(&context::destination4(ctx)) {
        context::set_address4(ctx, &resolver);
    }
    PROCEED
}

/// The sender of a datagram from an IPv6 or IPv4-mapped address, as the application sees it.
#[inline(always)]
pub fn recvmsg6(ctx: &SockAddrContext) -> i32 {
    if let Some(resolver) = resolver(&context::destination6(ctx)) {
        context::set_address6(ctx, &resolver);
    }
    PROCEED
}

/// The resolver that a port of the proxy's stands for.
#[inline(always)]
pub fn resolver(peer: &Destination) -> Option<Destination> {
    if *peer != Destination::loopback(peer.family, peer.port) {
        return None;
    }
    let addr = *maps::resolver(&ResolverKey { family: peer.family, port: peer.port })?;
    Some(Destination { family: peer.family, port: DNS_PORT, addr })
}
