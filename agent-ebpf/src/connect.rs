//! The connect hooks: decide, remember the origin, rewrite.

use crate::{context, liveness, maps};
use agent_ebpf::{
    AF_INET, Origin, RuleKey, Rules, Service,
    decide::{self, Attempt, Decision, Destination, Host},
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

struct Kernel<'a> {
    ctx: &'a SockAddrContext,
    service: Option<&'static Service>,
}

impl Host for Kernel<'_> {
    #[inline(always)]
    fn service(&self) -> Option<&Service> {
        self.service
    }

    #[inline(always)]
    fn rules(&self, key: &RuleKey) -> Option<&Rules> {
        maps::rules(key)
    }

    #[inline(always)]
    fn proxy_listens(&self, family: u16, port: u16) -> bool {
        liveness::proxy_listens(self.ctx, family, port)
    }
}

/// Where the connection shall go instead, if elsewhere.
#[inline(always)]
fn target(ctx: &SockAddrContext, attempt: &Attempt) -> Option<Destination> {
    let id = maps::scope();
    let service = maps::service(id);
    let family = attempt.destination.family;
    match decide::connect(&Kernel { ctx, service }, attempt) {
        Decision::Steer { proxy_port } => {
            if remember(ctx, &attempt.destination, id) {
                maps::count(id, |counters| &mut counters.steered);
                return Some(loopback(family, proxy_port));
            }
            maps::count(id, |counters| &mut counters.errors);
            match decide::without_proxy(service?) {
                Decision::Refuse => Some(loopback(family, REFUSING_PORT)),
                _ => None,
            }
        }
        Decision::Refuse => {
            maps::count(id, |counters| &mut counters.refused);
            forget(ctx);
            Some(loopback(family, REFUSING_PORT))
        }
        Decision::PassByRule => {
            maps::count(id, |counters| &mut counters.passed_by_rule);
            forget(ctx);
            None
        }
        Decision::Observe => {
            maps::count(id, |counters| &mut counters.observed);
            forget(ctx);
            None
        }
        Decision::PassProxyAbsent => {
            maps::count(id, |counters| &mut counters.passed_proxy_absent);
            forget(ctx);
            None
        }
        Decision::Ignore => None,
    }
}

/// Nothing can listen on port zero, so a connect to it is refused as by any closed port. A hook's own refusal would be
/// EPERM before Linux 5.18, which no application expects.
const REFUSING_PORT: u16 = 0;

#[inline(always)]
fn loopback(family: u16, port: u16) -> Destination {
    if family == AF_INET {
        Destination::from_ipv4([127, 0, 0, 1], port)
    } else {
        Destination { family, port, addr: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1] }
    }
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
