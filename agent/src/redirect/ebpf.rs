//! Steering with eBPF connect hooks. Linux 5.10.
//!
//! All state is in the kernel, pinned: whoever comes next, a restarted daemon or a command without one, goes on from
//! there. Nothing here remembers what it did but for a cache of the policies it wrote.

mod error;
mod maps;
mod object;
mod pins;

pub(crate) use object::try_load;

pub(crate) use error::Error;
use maps::Maps;
use pins::{Owner, Pins};

use super::{Cgroup, Desired, Service, ServiceStatus, Status};
use agent_ebpf::programs::{self, Program};
use std::{
    collections::{BTreeSet, HashMap},
    os::fd::AsFd as _,
    path::PathBuf,
    thread,
    time::Duration,
};

/// A proxy that was there before the hooks is known to them from its next heartbeat on. Services are steered after
/// that, so that none sees a moment in which the proxy counts as absent.
const TWO_HEARTBEATS: Duration = Duration::from_millis(500);

/// The mode, over its pins.
#[derive(Debug)]
pub(crate) struct Ebpf {
    pins: Pins,
    /// What was written last for each service, so that an `apply` that changes nothing writes nothing.
    written: HashMap<u32, Service>,
    /// Whether the programs that are pinned are those of this binary.
    loaded: bool,
}

impl Ebpf {
    /// Over the pins at a directory on a BPF file system, which need not exist yet.
    pub(crate) fn new(pins: PathBuf) -> Self {
        Self { pins: Pins::new(pins), written: HashMap::new(), loaded: false }
    }

    /// Makes the kernel steer what is desired and nothing else.
    ///
    /// May be repeated, and goes on from wherever an earlier call was killed. Cgroups that vanished meanwhile are not
    /// errors.
    pub(crate) fn apply(&mut self, desired: &Desired) -> Result<(), Error> {
        if desired.services.is_empty() {
            return self.remove();
        }
        if !self.loaded {
            object::load(&self.pins)?;
            self.loaded = true;
        }
        if let Some(cgroup) = &desired.proxy {
            let anew = self.attach(Owner::Proxy, cgroup, &programs::PROXY)?;
            if anew && cgroup.is_populated() {
                thread::sleep(TWO_HEARTBEATS);
            }
        }
        let mut maps = Maps::open(&self.pins)?;
        for service in &desired.services {
            self.steer(&mut maps, service)?;
        }
        self.prune(&mut maps, desired)
    }

    /// Makes the kernel steer one service, whatever else it steers; for a unit that is about to start.
    pub(crate) fn attach_service(&mut self, service: &Service) -> Result<(), Error> {
        object::load_if_absent(&self.pins)?;
        self.steer(&mut Maps::open(&self.pins)?, service)
    }

    /// Makes a cgroup the proxy's; for a proxy that is about to start.
    pub(crate) fn attach_proxy(&mut self, cgroup: &Cgroup) -> Result<(), Error> {
        object::load_if_absent(&self.pins)?;
        self.attach(Owner::Proxy, cgroup, &programs::PROXY).map(drop)
    }

    /// Removes everything of ours, of this version. Connections that were steered live on.
    pub(crate) fn remove(&mut self) -> Result<(), Error> {
        self.written.clear();
        self.loaded = false;
        for scope in self.pins.scopes()? {
            self.pins.remove_scope(scope)?;
        }
        self.pins.remove_all()
    }

    /// What the kernel says is there.
    pub(crate) fn status(&self) -> Result<Status, Error> {
        let mut status = Status::default();
        if !self.pins.exist() {
            return Ok(status);
        }
        let maps = Maps::open(&self.pins)?;
        let scopes = self.pins.scopes()?;
        let attached = |owner: Owner, programs: &[Program]| -> Vec<u64> {
            let of_owner = scopes.iter().filter(|scope| scope.owner == owner);
            of_owner
                .filter(|scope| self.pins.is_attached(**scope, programs))
                .map(|scope| scope.cgroup)
                .collect()
        };
        status.proxies = attached(Owner::Proxy, &programs::PROXY);
        for id in maps.services()? {
            let cgroups = attached(Owner::Service(id), &programs::SERVICE);
            status.services.push(ServiceStatus { id, cgroups, counters: maps.counters(id)? });
        }
        Ok(status)
    }

    fn steer(&mut self, maps: &mut Maps, service: &Service) -> Result<(), Error> {
        let policy = Service { scopes: Vec::new(), ..service.clone() };
        if self.written.get(&service.id) != Some(&policy) {
            maps.write(&policy)?;
            self.written.insert(service.id, policy);
        }
        for cgroup in &service.scopes {
            match self.attach(Owner::Service(service.id), cgroup, &programs::SERVICE) {
                Ok(_) => maps.set_scope(cgroup, service.id)?,
                Err(Error::Gone { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Attaches programs to a cgroup and pins the links, as far as they are not there. True when one was not.
    fn attach(&self, owner: Owner, cgroup: &Cgroup, programs: &[Program]) -> Result<bool, Error> {
        let scope = pins::Scope { owner, cgroup: cgroup.id };
        self.pins.create_scope(scope)?;
        let mut anew = false;
        for &program in programs {
            if self.pins.has_link(scope, program) {
                continue;
            }
            let attached = object::link(&self.pins, program, cgroup)
                .and_then(|link| self.pins.pin_link(scope, program, link.as_fd()));
            if let Err(error) = attached {
                if matches!(error, Error::Gone { .. }) {
                    self.pins.remove_scope(scope)?;
                }
                return Err(error);
            }
            anew = true;
        }
        Ok(anew)
    }

    /// Removes what is no longer desired.
    fn prune(&mut self, maps: &mut Maps, desired: &Desired) -> Result<(), Error> {
        let service_scopes = desired.services.iter().flat_map(|service| {
            service
                .scopes
                .iter()
                .map(|cgroup| pins::Scope { owner: Owner::Service(service.id), cgroup: cgroup.id })
        });
        let proxy_scope =
            desired.proxy.iter().map(|cgroup| pins::Scope { owner: Owner::Proxy, cgroup: cgroup.id });
        let wanted: BTreeSet<pins::Scope> = service_scopes.chain(proxy_scope).collect();
        for scope in self.pins.scopes()? {
            if !wanted.contains(&scope) {
                self.pins.remove_scope(scope)?;
            }
        }
        let ids: BTreeSet<u32> = desired.services.iter().map(|service| service.id).collect();
        self.written.retain(|id, _| ids.contains(id));
        maps.prune(&ids)
    }
}

/// Links and map entries of what is desired.
pub(super) fn describe(desired: &Desired) -> String {
    let links = |cgroup: &Cgroup, programs: &[Program]| -> String {
        programs.iter().map(|program| format!("link {} {cgroup}\n", program.name)).collect()
    };
    if desired.services.is_empty() {
        return String::new();
    }
    let proxy: String = desired.proxy.iter().map(|cgroup| links(cgroup, &programs::PROXY)).collect();
    let service = |service: &Service| {
        let Service { id, name, failure, observe, proxy_port, .. } = service;
        let phase = if *observe { "observe" } else { "enforce" };
        let entry = format!(
            "map MR_SERVICES {id}: {name}, failure {failure}, phase {phase}, proxy port {proxy_port}\n"
        );
        let rules = service.entries.iter().map(|entry| format!("map MR_RULES {id}: {entry}\n"));
        let links = service.scopes.iter().map(|cgroup| links(cgroup, &programs::SERVICE));
        [entry].into_iter().chain(rules).chain(links).collect::<String>()
    };
    [proxy].into_iter().chain(desired.services.iter().map(service)).collect()
}
