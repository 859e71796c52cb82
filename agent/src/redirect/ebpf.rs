//! Steering with eBPF connect hooks. Linux 5.10.
//!
//! All state is in the kernel, pinned: whoever comes next, a restarted daemon or a command without one, goes on from
//! there. What is remembered here only spares work.

mod decisions;
mod drift;
mod error;
mod maps;
mod object;
mod others;
mod pins;
mod retire;
mod usage;
mod written;

pub(crate) use object::try_load;
pub(crate) use others::{Hooks, Order, Other, names};

pub(crate) use decisions::{Decisions, monotonic};
pub(crate) use error::Error;
use maps::{Maps, Scopes};
use object::{Loader, Pinned};
use pins::{Owner, Pins};
use retire::Retiring;
use usage::Evicted;
pub(crate) use usage::MapUsage;
use written::Written;

use super::{Cgroup, Desired, Drift, Service, ServiceStatus, Status};
use crate::ready;
use agent_ebpf::programs::{self, Program};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
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
    proxy_admin: SocketAddr,
    /// For the first service, so that it does not have to wait.
    loader: Option<Box<Loader>>,
    /// Whether the programs that are pinned are those of this binary.
    loaded: bool,
    /// Those that were pinned then.
    own: BTreeMap<&'static str, Pinned>,
    /// What this process wrote and attached, so that an `apply` does no more than what changed.
    written: Written,
    /// With which programs.
    attached: BTreeMap<pins::Scope, Vec<Program>>,
    evicted: Evicted,
    retiring: Retiring,
}

impl Ebpf {
    /// Over the pins at a directory on a BPF file system, which need not exist yet; `proxy_admin` is where the proxy says
    /// whether it is ready.
    pub(crate) fn new(pins: PathBuf, proxy_admin: SocketAddr) -> Self {
        Self {
            pins: Pins::new(pins),
            proxy_admin,
            loader: None,
            loaded: false,
            own: BTreeMap::new(),
            written: Written::default(),
            attached: BTreeMap::new(),
            evicted: Evicted::default(),
            retiring: Retiring::default(),
        }
    }

    /// See [`super::Redirect::set_proxy_admin`].
    pub(crate) fn set_proxy_admin(&mut self, admin: SocketAddr) {
        self.proxy_admin = admin;
    }

    /// Makes the kernel steer what is desired and nothing else.
    ///
    /// May be repeated, and goes on from wherever an earlier call was killed. Cgroups that vanished meanwhile are not
    /// errors. Where another version steers, this one takes its place: the other one goes when all else is done. True where
    /// something was changed.
    pub(crate) fn apply(&mut self, desired: &Desired) -> Result<bool, Error> {
        if desired.services.is_empty() {
            self.loader.get_or_insert_with(|| Box::new(object::loader()));
            let was_there = !self.pins.all()?.is_empty();
            return self.remove().map(|()| was_there);
        }
        let others = self.pins.others()?;
        if !self.loaded {
            others.iter().try_for_each(Pins::check)?;
            object::load(&self.pins, self.loader.take().map_or_else(object::loader, |loader| *loader))?;
            self.loaded = true;
            self.own = object::all_pinned(&self.pins);
        }
        let present: BTreeSet<pins::Scope> = self.pins.scopes()?.into_iter().collect();
        self.attached.retain(|scope, _| present.contains(scope));
        let mut maps = Maps::open(&self.pins)?;
        let mut scopes = Scopes::open(&self.pins)?;
        let mut hooks = Hooks::default();
        let mut changed = false;
        if let Some(cgroup) = &desired.proxy {
            let anew = match attach(&self.pins, &mut hooks, Owner::Proxy, cgroup, &programs::PROXY) {
                Err(Error::Gone { .. }) => false,
                attached => attached?,
            };
            let takes_over = others.iter().any(Pins::are_complete);
            // One that is asked whether it is ready sends its heartbeats before it says so.
            if (anew || takes_over) && cgroup.is_populated() && !ready::says_ready(self.proxy_admin) {
                thread::sleep(TWO_HEARTBEATS);
            }
            changed |= anew;
        }
        for service in &desired.services {
            changed |= self.written.write(&mut maps, service)?;
            changed |= self.attach_all(&mut hooks, &mut scopes, service)?;
        }
        changed |= self.written.write_virtual(&mut maps, &desired.virtual_addresses)?;
        changed |= self.detach_others(desired)?;
        self.written.prune(&mut maps, desired)?;
        self.retiring.go_on(&others)?;
        Ok(changed)
    }

    /// Whether a service, or the proxy, is attached to a cgroup that is there and not desired for it.
    pub(crate) fn is_attached_elsewhere(&self, desired: &Desired) -> Result<bool, Error> {
        let wanted = wanted_scopes(desired);
        let owners: BTreeSet<Owner> =
            desired.services.iter().map(|service| Owner::Service(service.id)).collect();
        for pins in self.pins.all()? {
            for scope in pins.scopes()? {
                let is_enabled = scope.owner == Owner::Proxy || owners.contains(&scope.owner);
                if is_enabled && !wanted.contains(&scope) && pins.is_somewhere(scope)? {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// Makes the kernel steer one service, whatever else it steers; for a unit that is about to start.
    pub(crate) fn attach_service(&mut self, service: &Service) -> Result<(), Error> {
        for pins in self.attachable()? {
            if pins.are_ours() {
                let mut maps = Maps::open(&pins)?;
                // What a daemon wrote is left as it is.
                if !maps.has_service(service)? {
                    self.written.write(&mut maps, service)?;
                }
            }
            let (mut hooks, mut scopes) = (Hooks::default(), Scopes::open(&pins)?);
            let programs = pins.known(&programs_of(service))?;
            for cgroup in &service.scopes {
                absent_is_fine(attach_service(&pins, &mut hooks, &mut scopes, service, cgroup, &programs))?;
            }
        }
        Ok(())
    }

    /// Makes a cgroup the proxy's; for a proxy that is about to start.
    pub(crate) fn attach_proxy(&mut self, cgroup: &Cgroup) -> Result<(), Error> {
        for pins in self.attachable()? {
            attach(&pins, &mut Hooks::default(), Owner::Proxy, cgroup, &pins.known(&programs::PROXY)?)?;
        }
        Ok(())
    }

    /// The version that steers, which is another one than this where the daemon is: a new binary is there before its daemon
    /// is. Where a daemon was killed while it took another's place, there are two, and either may be the one that knows the
    /// proxy: then both.
    fn attachable(&self) -> Result<Vec<Pins>, Error> {
        let mut complete = self.pins.all()?;
        complete.retain(Pins::are_complete);
        if complete.is_empty() {
            object::load_if_absent(&self.pins)?;
            complete.push(self.pins.clone());
        }
        complete.sort_by_key(|pins| !pins.are_ours());
        Ok(complete)
    }

    /// Whether anything is pinned, or only its directory is there.
    pub(crate) fn is_there(&self) -> bool {
        self.pins.root().exists()
    }

    /// Removes everything of ours, of every version. Connections that were steered live on.
    pub(crate) fn remove(&mut self) -> Result<(), Error> {
        self.written = Written::default();
        self.attached.clear();
        self.evicted = Evicted::default();
        self.loaded = false;
        self.pins.all()?.iter().try_for_each(retire::remove)?;
        self.pins.remove_root()
    }

    /// What the kernel says is there.
    pub(crate) fn status(&self) -> Result<Status, Error> {
        let retiring = self.pins.others()?.iter().map(Pins::version).collect();
        let mut status = Status { retiring, ..Status::default() };
        // That they are missing is told as drift.
        let Ok(maps) = Maps::open(&self.pins) else { return Ok(status) };
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

    /// How full the maps are; none while there are none.
    pub(crate) fn usage(&mut self) -> Result<Vec<MapUsage>, Error> {
        if self.pins.are_complete() { self.evicted.usage(&self.pins) } else { Ok(Vec::new()) }
    }

    /// What the kernel calls our programs.
    pub(crate) fn programs(&self) -> BTreeSet<u32> {
        object::ids(&self.pins)
    }

    /// True where a cgroup was not attached to.
    fn attach_all(
        &mut self,
        hooks: &mut Hooks,
        scopes: &mut Scopes,
        service: &Service,
    ) -> Result<bool, Error> {
        let (programs, mut anew) = (programs_of(service), false);
        for cgroup in &service.scopes {
            let scope = pins::Scope { owner: Owner::Service(service.id), cgroup: cgroup.id };
            if self.attached.get(&scope) == Some(&programs) {
                continue;
            }
            let attached = attach_service(&self.pins, hooks, scopes, service, cgroup, &programs);
            if service.dns_port.is_none() {
                self.pins.remove_links(scope, &programs::DATAGRAM)?;
            }
            if absent_is_fine(attached)? {
                anew |= self.attached.insert(scope, programs.clone()).as_ref() != Some(&programs);
            }
        }
        Ok(anew)
    }

    /// Detaches from what is no longer desired. True where there was something.
    fn detach_others(&mut self, desired: &Desired) -> Result<bool, Error> {
        let wanted = wanted_scopes(desired);
        let present = self.pins.scopes()?;
        let others: Vec<&pins::Scope> = present.iter().filter(|scope| !wanted.contains(scope)).collect();
        others.iter().try_for_each(|scope| self.pins.remove_scope(**scope))?;
        Ok(!others.is_empty())
    }
}

/// Attaches a service's programs to a cgroup, and says whose they are there.
fn attach_service(
    pins: &Pins,
    hooks: &mut Hooks,
    scopes: &mut Scopes,
    service: &Service,
    cgroup: &Cgroup,
    programs: &[Program],
) -> Result<(), Error> {
    attach(pins, hooks, Owner::Service(service.id), cgroup, programs)?;
    scopes.set(cgroup, service.id, programs)
}

/// Attaches programs to a cgroup and pins the links, as far as they are not there. True when one was not.
fn attach(
    pins: &Pins,
    hooks: &mut Hooks,
    owner: Owner,
    cgroup: &Cgroup,
    programs: &[Program],
) -> Result<bool, Error> {
    let scope = pins::Scope { owner, cgroup: cgroup.id };
    let absent: Vec<Program> =
        programs.iter().copied().filter(|program| !pins.has_link(scope, *program)).collect();
    if let Some((Program { name, .. }, by)) = hooks.in_the_way(&cgroup.dir, &absent) {
        return Err(Error::Held { program: name, cgroup: cgroup.clone(), by });
    }
    pins.create_scope(scope)?;
    let anew = !absent.is_empty();
    for program in absent {
        let attached =
            object::link(pins, program, cgroup).and_then(|link| pins.pin_link(scope, program, link.as_fd()));
        if let Err(error) = attached {
            if matches!(error, Error::Gone { .. }) {
                pins.remove_scope(scope)?;
            }
            return Err(error);
        }
    }
    Ok(anew)
}

/// Whether it was done to a cgroup that is still there.
fn absent_is_fine(attached: Result<(), Error>) -> Result<bool, Error> {
    match attached {
        Err(Error::Gone { .. }) => Ok(false),
        attached => attached.map(|()| true),
    }
}

/// Programs that are not among ours at the hooks of services, as far as they can be asked for.
pub(crate) fn others_beside(hooks: &mut Hooks, cgroup: &Path, ours: &BTreeSet<u32>) -> Vec<Other> {
    let programs = [&programs::DATAGRAM[..], &programs::SERVICE].concat();
    let others = hooks.others(cgroup, &programs, ours);
    others.inspect_err(|error| tracing::debug!("programs of others: {error}")).unwrap_or_default()
}

/// What is attached to a service's cgroups.
fn programs_of(service: &Service) -> Vec<Program> {
    let datagram = if service.dns_port.is_some() { &programs::DATAGRAM[..] } else { &[] };
    [datagram, &programs::SERVICE].concat()
}

fn wanted_scopes(desired: &Desired) -> BTreeSet<pins::Scope> {
    let of_services = desired.services.iter().flat_map(|service| {
        let owner = Owner::Service(service.id);
        service.scopes.iter().map(move |cgroup| pins::Scope { owner, cgroup: cgroup.id })
    });
    let of_proxy = desired.proxy.iter().map(|cgroup| pins::Scope { owner: Owner::Proxy, cgroup: cgroup.id });
    of_services.chain(of_proxy).collect()
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
        let Service { id, name, failure, observe, proxy_port, dns_port, .. } = service;
        let phase = if *observe { "observe" } else { "enforce" };
        let entry = format!(
            "map MR_SERVICES {id}: {name}, failure {failure}, phase {phase}, proxy port {proxy_port}{}\n",
            dns_port.map(|port| format!(", DNS port {port}")).unwrap_or_default(),
        );
        let rules = service.entries.iter().map(|entry| format!("map MR_RULES {id}: {entry}\n"));
        let links = service.scopes.iter().map(|cgroup| links(cgroup, &programs_of(service)));
        [entry].into_iter().chain(rules).chain(links).collect::<String>()
    };
    let virtual_addresses =
        desired.virtual_addresses.iter().map(|(address, to)| format!("map MR_VIRTUAL {address}: {to}\n"));
    [proxy].into_iter().chain(desired.services.iter().map(service)).chain(virtual_addresses).collect()
}
