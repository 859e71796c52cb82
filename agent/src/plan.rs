//! From what is configured and enabled to what the kernel shall do.

use crate::{
    config::{self, Config, Policy, Scope},
    redirect::{Desired, Service},
    routable::Routable,
    rules::{self, TooManyRanges},
    state::{Entry, State},
    workload::Workloads,
};
use std::{collections::BTreeMap, io, sync::Arc};

/// Why it cannot be said what the kernel shall do.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PlanError {
    /// A service's policy cannot be had.
    #[error("service `{service}`: {cause}")]
    Policy { service: String, cause: TooManyRanges },
    /// Where the services run is not known.
    #[error("find the cgroups of units: {0}")]
    Units(io::Error),
}

/// Policies that were compiled already, for what the proxy can route.
#[derive(Debug, Default)]
pub(crate) struct Compiled {
    routable: Arc<Routable>,
    policies: Vec<(Policy, Arc<[rules::Entry]>)>,
}

impl Compiled {
    /// For what the proxy can route.
    pub(crate) fn new(routable: Arc<Routable>) -> Self {
        Self { routable, policies: Vec::new() }
    }

    /// For what the proxy could route last. What no longer fits a policy, which may have changed, is as good as unknown:
    /// nothing that starts may fail for it.
    pub(crate) fn kept(config: &Config) -> Self {
        let mut compiled = Self::new(Arc::new(Routable::load(&config.paths.state)));
        let policies = config.services.values().map(|service| &service.policy).chain([&config.defaults]);
        for policy in policies.filter(|policy| policy.follows_routable()) {
            if let Err(error) = compiled.get(policy) {
                tracing::warn!("what the proxy could route last is forgotten: {error}");
                return Self::default();
            }
        }
        compiled
    }

    /// What the proxy can route.
    pub(crate) fn routable(&self) -> &Arc<Routable> {
        &self.routable
    }

    /// Compiles every policy that a configuration has for a service.
    pub(crate) fn compile_all(&mut self, config: &Config) -> Result<(), PlanError> {
        for (service, config::Service { policy, .. }) in &config.services {
            self.get(policy).map_err(|cause| PlanError::Policy { service: service.clone(), cause })?;
        }
        Ok(())
    }

    fn get(&mut self, policy: &Policy) -> Result<Arc<[rules::Entry]>, TooManyRanges> {
        if let Some((_, entries)) = self.policies.iter().find(|(known, _)| known == policy) {
            return Ok(Arc::clone(entries));
        }
        let entries: Arc<[rules::Entry]> = rules::compile(policy, &self.routable)?.into();
        self.policies.push((policy.clone(), Arc::clone(&entries)));
        Ok(entries)
    }
}

/// Everything that is enabled, where it is now.
pub(crate) fn everything(
    config: &Config,
    state: &State,
    workloads: &mut Workloads,
    compiled: &mut Compiled,
) -> Result<Desired, PlanError> {
    let mut services = Vec::new();
    let scopes: Vec<Scope> = state.iter().map(|(name, _)| Workloads::scope(config, name)).collect();
    let units = scopes.iter().chain([&config.proxy.scope]).filter_map(Scope::unit);
    workloads.look_up(units).map_err(PlanError::Units)?;
    for ((name, entry), scope) in state.iter().zip(&scopes) {
        let mut service = service(config, name, entry, compiled)?;
        if let (true, Scope::User(user)) = (entry.enabled, scope) {
            service.users.push(*user);
        }
        if entry.enabled {
            service.scopes.extend(workloads.cgroup(scope));
        }
        if entry.container.is_some() {
            service.scopes.extend(workloads.started(&config.paths.run, name));
            // Those that were seen starting may be found without it too.
            service.scopes.sort();
            service.scopes.dedup();
        }
        let commands = entry.commands.iter().map(|path| Scope::Cgroup(path.clone()));
        service.scopes.extend(commands.filter_map(|scope| workloads.cgroup(&scope)));
        services.push(service);
    }
    let with_dns = services.iter().any(|service| service.dns_port.is_some());
    let virtual_addresses = if with_dns { compiled.routable.virtual_addresses() } else { BTreeMap::new() };
    Ok(Desired { proxy: workloads.cgroup(&config.proxy.scope), services, virtual_addresses })
}

/// One service, without its cgroups.
pub(crate) fn service(
    config: &Config,
    name: &str,
    entry: &Entry,
    compiled: &mut Compiled,
) -> Result<Service, PlanError> {
    let policy = config.policy(name);
    let entries =
        compiled.get(policy).map_err(|cause| PlanError::Policy { service: name.to_owned(), cause })?;
    Ok(Service {
        id: entry.id,
        name: name.to_owned(),
        failure: policy.failure,
        observe: entry.observe,
        proxy_port: config.proxy.port,
        dns_port: policy.dns.value.then_some(config.proxy.dns_port),
        entries,
        scopes: Vec::new(),
        users: Vec::new(),
    })
}
