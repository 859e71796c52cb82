//! Services and policies in the maps, as far as this process wrote them.

use super::{Desired, Error, Service, maps::Maps};
use crate::rules::Entry;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Written {
    /// By their ids, without their cgroups, and the number of each one's policy.
    services: HashMap<u32, (Service, u32)>,
    /// Policies by their numbers; services with the same one share it.
    policies: HashMap<u32, Arc<[Entry]>>,
    /// Where virtual addresses lead, once that was written.
    virtual_addresses: Option<BTreeMap<IpAddr, SocketAddr>>,
    /// Whether nothing else is in the maps.
    pruned: bool,
}

impl Written {
    /// Writes a service, and its policy unless another service has it too. True where it was not written before.
    pub(super) fn write(&mut self, maps: &mut Maps, service: &Service) -> Result<bool, Error> {
        let policy = Service { scopes: Vec::new(), ..service.clone() };
        if self.services.get(&service.id).is_some_and(|(written, _)| *written == policy) {
            return Ok(false);
        }
        let known = self.policies.iter().find(|(_, entries)| **entries == service.entries);
        let number = match known {
            Some((&number, _)) => number,
            None => {
                let number = maps.next_policy()?;
                maps.write_policy(number, &service.entries).inspect_err(|_| {
                    // The number is given again, and must not bring with it what was written of this one.
                    let _the_first_error_tells_more = maps.remove_policy(number, &service.entries);
                })?;
                self.policies.insert(number, Arc::clone(&service.entries));
                number
            }
        };
        maps.write_service(service, number)?;
        self.services.insert(service.id, (policy, number));
        Ok(true)
    }

    /// Services of which an entry, or a policy's, is not there as it was written. They are written anew.
    pub(super) fn forget_what_differs(&mut self, maps: &Maps) -> Vec<String> {
        let changed: BTreeSet<u32> = self
            .policies
            .iter()
            .filter(|(number, entries)| !maps.has_policy(**number, entries))
            .map(|(number, _)| *number)
            .collect();
        self.policies.retain(|number, _| !changed.contains(number));
        let differs =
            |(service, policy): &(Service, u32)| changed.contains(policy) || !maps.says(service, *policy);
        let differing: Vec<(u32, String)> = self
            .services
            .iter()
            .filter(|(_, written)| differs(written))
            .map(|(id, (service, _))| (*id, service.name.clone()))
            .collect();
        differing.iter().for_each(|(id, _)| _ = self.services.remove(id));
        // Entries of a policy that was forgotten are found as what no service points at.
        self.pruned &= differing.is_empty();
        differing.into_iter().map(|(_, name)| name).collect()
    }

    /// Makes virtual addresses lead where they shall. True where they did not, as far as this process knows.
    pub(super) fn write_virtual(
        &mut self,
        maps: &mut Maps,
        wanted: &BTreeMap<IpAddr, SocketAddr>,
    ) -> Result<bool, Error> {
        let is_new = self.virtual_addresses.as_ref() != Some(wanted);
        if is_new {
            maps.set_virtual(wanted)?;
            self.virtual_addresses = Some(wanted.clone());
        }
        Ok(is_new)
    }

    /// Removes what is no longer desired from the maps: the first time whatever is in them.
    pub(super) fn prune(&mut self, maps: &mut Maps, desired: &Desired) -> Result<(), Error> {
        let ids: BTreeSet<u32> = desired.services.iter().map(|service| service.id).collect();
        let gone: Vec<u32> = self.services.keys().copied().filter(|id| !ids.contains(id)).collect();
        for id in gone {
            maps.remove_service(id)?;
            self.services.remove(&id);
        }
        let used: BTreeSet<u32> = self.services.values().map(|(_, policy)| *policy).collect();
        let unused: Vec<u32> =
            self.policies.keys().copied().filter(|policy| !used.contains(policy)).collect();
        for policy in unused {
            let entries = self.policies.remove(&policy);
            maps.remove_policy(policy, entries.as_deref().unwrap_or_default())?;
        }
        if !self.pruned {
            maps.prune(&ids)?;
            self.pruned = true;
        }
        Ok(())
    }
}
