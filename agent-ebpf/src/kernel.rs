//! The facts that a decision rests on.

use crate::{liveness, maps};
use agent_ebpf::{RuleKey, Rules, Service, decide::Host};
use aya_ebpf::programs::SockAddrContext;

/// What the kernel answers to a decision's questions.
pub struct Kernel<'a> {
    ctx: &'a SockAddrContext,
    /// The service, where it is still enabled.
    pub service: Option<&'static Service>,
}

impl<'a> Kernel<'a> {
    /// For the socket at hand and a service.
    #[inline(always)]
    pub fn new(ctx: &'a SockAddrContext, service: u32) -> Self {
        Self { ctx, service: maps::service(service) }
    }
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
