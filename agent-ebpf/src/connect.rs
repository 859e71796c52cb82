//! The connect hooks: decide, remember the origin, rewrite.

use crate::{context, datagram, events, kernel::Kernel, maps};
use agent_ebpf::{
    Counter, Origin,
    decide::{self, Attempt, Decision, Destination},
};
use aya_ebpf::{
    helpers::{bpf_get_current_pid_tgid, bpf_get_current_uid_gid, generated::bpf_get_current_cgroup_id},
    programs::SockAddrContext,
};

/// The hook's answer: go on, with whatever address the context now holds.
const PROCEED: i32 = 1;

/// `connect` of an IPv4 socket.
#[inline(always)]
pub fn connect4(ctx: &SockAddrContext) -> i32 {
    if let Some(target) = target(ctx, &context::attempt4(ctx)) {
        context::set_address4(ctx, &target);
    }
    PROCEED
}

/// `connect` of an IPv6 socket, to an IPv6 or an IPv4-mapped address.
#[inline(always)]
pub fn connect6(ctx: &SockAddrContext) -> i32 {
    if let Some(target) = target(ctx, &context::attempt6(ctx)) {
        context::set_address6(ctx, &target);
    }
    PROCEED
}

/// Where the connection shall go instead, if elsewhere.
#[inline(always)]
fn target(ctx: &SockAddrContext, attempt: &Attempt) -> Option<Destination> {
    let id = maps::scope();
    let (counter, target) = outcome(ctx, attempt, id)?;
    events::decided(id, attempt, counter);
    target
}

/// As what it counts, and where it shall go instead; nothing where it is not a question for policy. All that is not
/// steered goes one way, since the verifier follows each.
#[inline(always)]
fn outcome(ctx: &SockAddrContext, attempt: &Attempt, id: u32) -> Option<(Counter, Option<Destination>)> {
    let kernel = Kernel::new(ctx, id);
    let family = attempt.destination.family;
    let mut decision = decide::connect(&kernel, attempt);
    let mut forgotten = false;
    if let Decision::Steer { proxy_port } = decision {
        if remember(ctx, &attempt.destination, id) {
            return Some((Counter::Steered, Some(Destination::loopback(family, proxy_port))));
        }
        decision = decide::without_proxy(kernel.service?, attempt);
        forgotten = true;
    }
    let counter = match decision {
        Decision::Query { dns_port } => return Some(datagram::outcome(&attempt.destination, dns_port)),
        Decision::Ignore | Decision::Steer { .. } => return None,
        _ if forgotten => Counter::Errors,
        Decision::Refuse => Counter::Refused,
        Decision::PassByRule => Counter::PassedByRule,
        Decision::Observe => Counter::Observed,
        Decision::PassProxyAbsent => Counter::PassedProxyAbsent,
    };
    forget(ctx);
    let target = match decision {
        Decision::Refuse => Some(Destination::loopback(family, REFUSING_PORT)),
        _ => direct(&attempt.destination),
    };
    Some((counter, target))
}

/// Nothing can listen on port zero, so a connect to it is refused as by any closed port. A hook's own refusal would be
/// EPERM before Linux 5.18, which no application expects.
const REFUSING_PORT: u16 = 0;

/// A virtual address leads nowhere: what is not steered goes to an endpoint of the name that has it, or is refused, so that
/// the application tries another address at once.
#[inline(always)]
fn direct(destination: &Destination) -> Option<Destination> {
    if !destination.is_virtual() {
        return None;
    }
    Some(maps::endpoint(destination).unwrap_or(Destination::loopback(destination.family, REFUSING_PORT)))
}

#[inline(always)]
fn remember(ctx: &SockAddrContext, destination: &Destination, service: u32) -> bool {
    let origin = Origin {
        addr: destination.addr,
        family: destination.family,
        port: destination.port,
        service,
        uid: bpf_get_current_uid_gid() as u32,
        pid: (bpf_get_current_pid_tgid() >> 32) as u32,
        // SAFETY: takes nothing and returns a number.
        cgroup: unsafe { bpf_get_current_cgroup_id() },
    };
    maps::set_origin(context::cookie(ctx), &origin)
}

/// A socket may connect again after a failure, elsewhere: what it carried then is no longer true.
#[inline(always)]
fn forget(ctx: &SockAddrContext) {
    maps::clear_origin(context::cookie(ctx));
}
