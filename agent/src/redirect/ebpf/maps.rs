//! The pinned maps, typed.

#![expect(
    deprecated,
    reason = "the successor of cgroup storage needs Linux 6.2 and answers another question"
)]

use super::{Cgroup, Error, Program, Service, pins::Pins};
use crate::{config::Failure, fault, rules::Entry};
use agent_ebpf::{
    Counters, Endpoint, FAILURE_CLOSED, FAILURE_OPEN, MAX_RULES, MAX_SERVICES, MAX_VIRTUAL, NAME_LEN,
    PHASE_ENFORCE, PHASE_OBSERVE, RESERVED, RuleKey, Rules, VirtualKey, decide::Destination, maps,
    programs::REWRITING,
};
use aya::maps::{
    CgroupStorage, CgroupStorageKey, HashMap, LpmTrie, Map, MapData, MapError, PerCpuHashMap, PerCpuValues,
    lpm_trie::Key,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, SocketAddr},
};

/// Every map but [`Scopes`].
pub(super) struct Maps {
    services: HashMap<MapData, u32, agent_ebpf::Service>,
    rules: LpmTrie<MapData, RuleKey, Rules>,
    counters: PerCpuHashMap<MapData, u32, Counters>,
    virtual_addresses: HashMap<MapData, VirtualKey, Endpoint>,
}

impl Maps {
    pub(super) fn open(pins: &Pins) -> Result<Self, Error> {
        let open = |name| open(pins, name);
        let wrong = |name: &'static str| move |cause| failed("open", name)(cause);
        Ok(Self {
            services: open(maps::SERVICES)?.try_into().map_err(wrong(maps::SERVICES))?,
            rules: open(maps::RULES)?.try_into().map_err(wrong(maps::RULES))?,
            counters: open(maps::COUNTERS)?.try_into().map_err(wrong(maps::COUNTERS))?,
            virtual_addresses: open(maps::VIRTUAL)?.try_into().map_err(wrong(maps::VIRTUAL))?,
        })
    }

    /// Ids of the services that are there.
    pub(super) fn services(&self) -> Result<Vec<u32>, Error> {
        self.services.keys().collect::<Result<_, _>>().map_err(failed("read", maps::SERVICES))
    }

    /// A service's counters, over all CPUs.
    pub(super) fn counters(&self, id: u32) -> Result<Counters, Error> {
        let each = match self.counters.get(&id, 0) {
            Err(MapError::KeyNotFound) => return Ok(Counters::ZERO),
            each => each.map_err(failed("read", maps::COUNTERS))?,
        };
        Ok(each.iter().fold(Counters::ZERO, |sum, one| Counters {
            steered: sum.steered + one.steered,
            passed_by_rule: sum.passed_by_rule + one.passed_by_rule,
            passed_proxy_absent: sum.passed_proxy_absent + one.passed_proxy_absent,
            refused: sum.refused + one.refused,
            errors: sum.errors + one.errors,
            observed: sum.observed + one.observed,
            queries: sum.queries + one.queries,
        }))
    }

    /// Whether a service of this id and name is there.
    pub(super) fn has_service(&self, service: &Service) -> Result<bool, Error> {
        match self.services.get(&service.id, 0) {
            Ok(written) => Ok(written.name == padded(&service.name)),
            Err(MapError::KeyNotFound) => Ok(false),
            Err(error) => Err(failed("read", maps::SERVICES)(error)),
        }
    }

    /// Whether an entry says of a service what [`Maps::write_service`] writes.
    pub(super) fn says(&self, service: &Service, policy: u32) -> bool {
        self.services.get(&service.id, 0).is_ok_and(|written| written == value_of(service, policy))
    }

    /// Whether a policy is there as [`Maps::write_policy`] writes it.
    pub(super) fn has_policy(&self, policy: u32, entries: &[Entry]) -> bool {
        entries.iter().all(|entry| {
            let (bits, key) = entry.key(policy);
            // A look-up may find a wider block's entry where this one's is missing, which then differs.
            self.rules.get(&Key::new(bits, key), 0).is_ok_and(|written| written == entry.rules)
        })
    }

    /// Writes a policy under a number that no service points at.
    pub(super) fn write_policy(&mut self, policy: u32, entries: &[Entry]) -> Result<(), Error> {
        for entry in entries {
            let (bits, key) = entry.key(policy);
            let written = self.rules.insert(&Key::new(bits, key), entry.rules, 0);
            written.map_err(self::written(maps::RULES, MAX_RULES))?;
            fault::point("rules", "one written");
        }
        Ok(())
    }

    /// Writes a service and, with it in one update, which policy it has.
    pub(super) fn write_service(&mut self, service: &Service, policy: u32) -> Result<(), Error> {
        self.start_counters(service.id)?;
        fault::point("counters", "begun");
        let value = value_of(service, policy);
        self.services.insert(service.id, value, 0).map_err(written(maps::SERVICES, MAX_SERVICES))?;
        fault::point("services", "one written");
        Ok(())
    }

    /// Makes virtual addresses lead where they shall, and no others anywhere.
    pub(super) fn set_virtual(&mut self, wanted: &BTreeMap<IpAddr, SocketAddr>) -> Result<(), Error> {
        let wanted: Vec<(VirtualKey, Endpoint)> =
            wanted.iter().map(|(address, endpoint)| (virtual_key(*address), value(*endpoint))).collect();
        for (key, endpoint) in &wanted {
            let written = self.virtual_addresses.insert(key, endpoint, 0);
            written.map_err(self::written(maps::VIRTUAL, MAX_VIRTUAL))?;
            fault::point("virtual addresses", "one written");
        }
        let wanted: BTreeSet<[u8; 16]> = wanted.iter().map(|(key, _)| key.addr).collect();
        let present: Vec<VirtualKey> =
            self.virtual_addresses.keys().collect::<Result<_, _>>().map_err(failed("read", maps::VIRTUAL))?;
        for key in present.iter().filter(|key| !wanted.contains(&key.addr)) {
            absent_is_fine(self.virtual_addresses.remove(key)).map_err(failed("write", maps::VIRTUAL))?;
            fault::point("virtual addresses", "one removed");
        }
        Ok(())
    }

    /// Removes a service and its counters.
    pub(super) fn remove_service(&mut self, id: u32) -> Result<(), Error> {
        absent_is_fine(self.services.remove(&id)).map_err(failed("write", maps::SERVICES))?;
        fault::point("services", "one removed");
        absent_is_fine(self.counters.remove(&id)).map_err(failed("write", maps::COUNTERS))?;
        fault::point("counters", "removed");
        Ok(())
    }

    /// Removes a policy that no service points at any more.
    pub(super) fn remove_policy(&mut self, policy: u32, entries: &[Entry]) -> Result<(), Error> {
        for entry in entries {
            let (bits, key) = entry.key(policy);
            absent_is_fine(self.rules.remove(&Key::new(bits, key))).map_err(failed("write", maps::RULES))?;
            fault::point("rules", "one removed");
        }
        Ok(())
    }

    /// Removes services that are not among these, and rules that no service points at.
    pub(super) fn prune(&mut self, ids: &BTreeSet<u32>) -> Result<(), Error> {
        for id in self.services()? {
            if !ids.contains(&id) {
                self.remove_service(id)?;
            }
        }
        let policies = self.policies()?;
        let keys: Vec<Key<RuleKey>> =
            self.rules.keys().collect::<Result<_, _>>().map_err(failed("read", maps::RULES))?;
        for key in keys {
            let RuleKey { policy, .. } = key.data();
            if !policies.contains(&policy) {
                self.rules.remove(&key).map_err(failed("write", maps::RULES))?;
                fault::point("rules", "one removed");
            }
        }
        Ok(())
    }

    fn start_counters(&mut self, id: u32) -> Result<(), Error> {
        if self.counters.get(&id, 0).is_ok() {
            return Ok(());
        }
        let cpus =
            aya::util::nr_cpus().map_err(|(_, error)| failed("write", maps::COUNTERS)(error.into()))?;
        let zero = PerCpuValues::try_from(vec![Counters::ZERO; cpus])
            .map_err(|error| failed("write", maps::COUNTERS)(error.into()))?;
        self.counters.insert(id, zero, 0).map_err(written(maps::COUNTERS, MAX_SERVICES))
    }

    fn policies(&self) -> Result<BTreeSet<u32>, Error> {
        let policies = self.services.iter().map(|item| item.map(|(_, service)| service.policy));
        policies.collect::<Result<_, _>>().map_err(failed("read", maps::SERVICES))
    }

    /// A number that no service points at.
    pub(super) fn next_policy(&self) -> Result<u32, Error> {
        Ok(self.policies()?.last().map_or(1, |last| last.wrapping_add(1)))
    }
}

/// The map that says whose policy holds where: alike in every version.
pub(super) struct Scopes(CgroupStorage<MapData, u32>);

impl Scopes {
    pub(super) fn open(pins: &Pins) -> Result<Self, Error> {
        open(pins, maps::SCOPES)?.try_into().map(Self).map_err(failed("open", maps::SCOPES))
    }

    /// Whether a cgroup is a service's, to programs that are attached to it.
    pub(super) fn has(&self, cgroup: &Cgroup, id: u32, programs: &[Program]) -> bool {
        deciding(programs).all(|attach_type| {
            let key = CgroupStorageKey::new(cgroup.id, attach_type);
            self.0.get(key, 0).is_ok_and(|written| written == id)
        })
    }

    /// Says whose policy holds in a cgroup to which programs are attached.
    pub(super) fn set(&mut self, cgroup: &Cgroup, id: u32, programs: &[Program]) -> Result<(), Error> {
        for attach_type in deciding(programs) {
            match self.0.insert(CgroupStorageKey::new(cgroup.id, attach_type), id, 0) {
                Err(error) if errno(&error) == Some(libc::ENOENT) => {
                    return Err(Error::Gone { program: "mr_connect4", cgroup: cgroup.clone() });
                }
                result => result.map_err(failed("write", maps::SCOPES))?,
            }
            fault::point("scopes", "one written");
        }
        Ok(())
    }
}

fn open(pins: &Pins, name: &'static str) -> Result<Map, Error> {
    MapData::from_pin(pins.map(name)).and_then(Map::from_map_data).map_err(failed("open", name))
}

fn deciding(programs: &[Program]) -> impl Iterator<Item = u32> {
    let attach_types = programs.iter().map(|program| program.attach_type);
    attach_types.filter(|attach_type| REWRITING.contains(attach_type))
}

fn value_of(service: &Service, policy: u32) -> agent_ebpf::Service {
    agent_ebpf::Service {
        policy,
        failure: match service.failure {
            Failure::Open => FAILURE_OPEN,
            Failure::Closed => FAILURE_CLOSED,
        },
        phase: if service.observe { PHASE_OBSERVE } else { PHASE_ENFORCE },
        proxy_port: service.proxy_port,
        dns_port: service.dns_port.unwrap_or_default(),
        reserved: [0; RESERVED],
        name: padded(&service.name),
    }
}

fn destination(address: SocketAddr) -> Destination {
    match address.ip() {
        IpAddr::V4(ip) => Destination::from_ipv4(ip.octets(), address.port()),
        IpAddr::V6(ip) => Destination::from_ipv6(ip.octets(), address.port()),
    }
}

fn virtual_key(address: IpAddr) -> VirtualKey {
    let Destination { family, addr, .. } = destination((address, 0).into());
    VirtualKey { family: family.into(), addr }
}

fn value(endpoint: SocketAddr) -> Endpoint {
    let Destination { family, port, addr } = destination(endpoint);
    Endpoint { family, port, addr }
}

fn absent_is_fine(removed: Result<(), MapError>) -> Result<(), MapError> {
    match removed {
        Err(error) if errno(&error) == Some(libc::ENOENT) => Ok(()),
        removed => removed,
    }
}

fn padded(name: &str) -> [u8; NAME_LEN] {
    let mut padded = [0; NAME_LEN];
    for (to, from) in padded.iter_mut().take(NAME_LEN - 1).zip(name.bytes()) {
        *to = from;
    }
    padded
}

pub(super) fn failed(action: &'static str, name: &'static str) -> impl Fn(MapError) -> Error {
    move |cause| Error::Map { action, name, cause: Box::new(cause) }
}

fn written(name: &'static str, limit: u32) -> impl Fn(MapError) -> Error {
    move |cause| match errno(&cause) {
        // E2BIG of a hash, ENOSPC of a trie.
        Some(libc::E2BIG | libc::ENOSPC) => Error::Full { name, limit },
        _ => failed("write", name)(cause),
    }
}

fn errno(error: &MapError) -> Option<i32> {
    match error {
        MapError::SyscallError(error) => error.io_error.raw_os_error(),
        MapError::IoError(error) => io::Error::raw_os_error(error),
        _ => None,
    }
}
