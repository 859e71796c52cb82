//! From what is configured and enabled to what the kernel shall do.

use crate::{
    config::{Config, Scope},
    redirect::{Desired, Service},
    rules::{self, TooManyRanges},
    state::{Entry, State},
    workload::Workloads,
};

/// A service whose policy cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("service `{service}`: {cause}")]
pub(crate) struct PlanError {
    service: String,
    cause: TooManyRanges,
}

/// Everything that is enabled, where it is now.
pub(crate) fn everything(
    config: &Config,
    state: &State,
    workloads: &mut Workloads,
) -> Result<Desired, PlanError> {
    let mut services = Vec::new();
    let scopes: Vec<Scope> = state.iter().map(|(name, _)| Workloads::scope(config, name)).collect();
    workloads.look_up(scopes.iter().filter_map(Scope::unit));
    for (name, entry) in state.iter() {
        let mut service = service(config, name, entry)?;
        if entry.enabled {
            service.scopes.extend(workloads.cgroup(&Workloads::scope(config, name)));
        }
        let commands = entry.commands.iter().map(|path| Scope::Cgroup(path.clone()));
        service.scopes.extend(commands.filter_map(|scope| workloads.cgroup(&scope)));
        services.push(service);
    }
    Ok(Desired { proxy: workloads.cgroup(&config.proxy.scope), services })
}

/// One service, without its cgroups.
pub(crate) fn service(config: &Config, name: &str, entry: &Entry) -> Result<Service, PlanError> {
    let policy = config.policy(name);
    let entries = rules::compile(policy).map_err(|cause| PlanError { service: name.to_owned(), cause })?;
    Ok(Service {
        id: entry.id,
        name: name.to_owned(),
        failure: policy.failure,
        observe: entry.observe,
        proxy_port: config.proxy.port,
        entries,
        scopes: Vec::new(),
        users: Vec::new(),
    })
}
