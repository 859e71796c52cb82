//! How things are, as the kernel and the host say when they are asked, and what of it is not as it is wanted.

use super::{Daemon, Error};
use crate::{
    api,
    connections::{Open, Owners},
    lock,
    mode::Mode,
    redirect::{self, Cgroup, Desired, MapUsage, Ready},
    watch::{self, NotReady},
};
use std::collections::BTreeMap;

/// What to do where the daemon itself is about to.
const IS_REPAIRED: &str =
    "the daemon has seen it now and makes it anew within a second; where it comes back, its log says why";

impl Daemon {
    pub(super) fn status(&mut self) -> Result<api::Status, Error> {
        // Nobody attaches meanwhile.
        let held = lock::kernel(&self.config.paths.run)?;
        let desired = self.desired(&self.state.clone(), &held)?;
        let ready = watch::readiness(&self.config.proxy, &mut self.workloads);
        // Before anything is repaired, also by what is asked here.
        let drift = self.drift(&desired, &ready)?;
        // What keeps it from being asked is told as drift.
        let kernel = self.redirect.status(&desired).unwrap_or_default();
        let maps = self.redirect.usage().unwrap_or_default().into_iter().map(api::Map::from).collect();
        drop(held);
        let proxy = api::Proxy {
            port: self.config.proxy.port,
            cgroup: desired.proxy.as_ref().map(|cgroup| self.workloads.path_of(cgroup)),
            attached: desired.proxy.as_ref().is_some_and(|cgroup| kernel.proxies.contains(&cgroup.id)),
        };
        let unsteered = self.count_unsteered(&desired).unwrap_or_else(|error| {
            tracing::warn!("{error}");
            None
        });
        let services = desired.services.iter().zip(self.state.iter()).map(|(service, (name, entry))| {
            let known = kernel.services.iter().find(|known| known.id == service.id);
            let scope = |cgroup: &Cgroup| api::Scope {
                cgroup: self.workloads.path_of(cgroup),
                attached: known.is_some_and(|known| known.cgroups.contains(&cgroup.id)),
            };
            let unsteered = unsteered.as_ref().filter(|_| !entry.observe);
            api::Service {
                name: name.to_owned(),
                enabled: entry.enabled,
                observe: entry.observe,
                mode: self.mode,
                since: entry.since,
                failure: service.failure.to_string(),
                scopes: service.scopes.iter().map(scope).collect(),
                unsteered: unsteered.map(|counts| counts.get(&service.id).copied().unwrap_or_default()),
                counters: known.map(|known| known.counters.into()).unwrap_or_default(),
            }
        });
        let services = services.collect();
        Ok(api::Status {
            mode: self.mode,
            healthy: drift.is_empty(),
            drift,
            proxy,
            services,
            retiring: kernel.retiring,
            maps,
        })
    }

    fn count_unsteered(&self, desired: &Desired) -> Result<Option<BTreeMap<u32, usize>>, Error> {
        let Some(open) = self.open_connections()? else { return Ok(None) };
        let mut counts = BTreeMap::new();
        for (service, _) in open.unsteered(&Owners::new(desired, self.mode)).map_err(Error::Connections)? {
            *counts.entry(service.id).or_default() += 1;
        }
        Ok(Some(counts))
    }

    /// None where connections do not tell whether they are steered.
    pub(super) fn open_connections(&self) -> Result<Option<Open>, Error> {
        let proxy = &self.config.proxy;
        Open::look(self.mode, &[proxy.port, proxy.dns_port]).map_err(Error::Connections)
    }

    fn drift(
        &mut self,
        desired: &Desired,
        ready: &Result<Ready, NotReady>,
    ) -> Result<Vec<api::Drift>, Error> {
        let of_kernel = self.redirect.drift(desired, ready.clone().unwrap_or_default());
        let of_kernel = of_kernel.unwrap_or_else(|error| {
            vec![redirect::Drift {
                service: None,
                finding: format!("it cannot be told what is there: {error}"),
            }]
        });
        let of_files = self.drift_of_files()?;
        self.has_drifted |= !of_kernel.is_empty() || !of_files.is_empty();
        let repaired = of_kernel.into_iter().chain(of_files).map(|redirect::Drift { service, finding }| {
            api::Drift { service, finding, remedy: IS_REPAIRED.to_owned() }
        });
        let refused = self.failure.as_ref().map(|failure| api::Drift {
            service: None,
            finding: format!("what is wanted cannot be had: {failure}"),
            remedy: "it is tried again every second".to_owned(),
        });
        Ok(self.drift_of_proxy(desired, ready).into_iter().chain(refused).chain(repaired).collect())
    }

    /// Nothing is wanted of a proxy while no service is steered.
    fn drift_of_proxy(&self, desired: &Desired, ready: &Result<Ready, NotReady>) -> Option<api::Drift> {
        let mut steered = desired.services.iter().filter(|service| !service.observe).peekable();
        steered.peek()?;
        let drift = |finding: String, remedy: &str| {
            Some(api::Drift { service: None, finding, remedy: remedy.to_owned() })
        };
        match ready {
            Err(error) => drift(
                format!("nothing is steered: {error}"),
                "start it (`systemctl start mesh-proxy`), or correct proxy.… in agent.yaml and reload; until then services fail open or closed as configured",
            ),
            Ok(ready) if !ready.dns.contains(&true) && steered.any(|service| service.dns_port.is_some()) => {
                let port = self.config.proxy.dns_port;
                let finding = format!("queries are not steered: the proxy serves no DNS at port {port}");
                let names = self.mode == Mode::Hosts;
                if names {
                    None
                } else {
                    drift(
                        finding,
                        "set dns.port in proxy.yaml, or proxy.dns_port in agent.yaml, to the same port",
                    )
                }
            }
            Ok(_) => None,
        }
    }

    /// What was written for the starts of units and containers.
    fn drift_of_files(&self) -> Result<Vec<redirect::Drift>, Error> {
        let mut found = Vec::new();
        for drop_in in self.drop_ins() {
            if !drop_in
                .is_written(self.config_file.as_deref())
                .map_err(super::change::drop_in_error("read"))?
            {
                let finding =
                    format!("the step before the start of {} is missing or was edited", drop_in.unit);
                found.push(redirect::Drift { service: Some(drop_in.service), finding });
            }
        }
        let hook = self.hook();
        let is_wanted = self.state.containers().next().is_some() && hook.is_of_use();
        if is_wanted && !hook.is_written().map_err(|cause| Error::Hook { action: "read", cause })? {
            let dir = self.config.paths.hooks.display();
            let finding = format!("the hook at containers' starts in {dir} is missing or was edited");
            found.push(redirect::Drift { service: None, finding });
        }
        Ok(found)
    }
}

impl From<MapUsage> for api::Map {
    fn from(MapUsage { name, entries, capacity, evicted }: MapUsage) -> Self {
        Self { name: name.to_owned(), entries, capacity, evicted }
    }
}

impl From<agent_ebpf::Counters> for api::Counters {
    fn from(counters: agent_ebpf::Counters) -> Self {
        let agent_ebpf::Counters {
            steered,
            passed_by_rule,
            passed_proxy_absent,
            refused,
            errors,
            observed,
            queries,
        } = counters;
        Self { steered, passed_by_rule, passed_proxy_absent, refused, errors, observed, queries }
    }
}
