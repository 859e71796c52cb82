//! Loopback addresses for names: a service is told by the address it is reached at, also where its protocol carries no
//! name. Whoever maps the names to these addresses (a hosts file) steers without any help of the kernel.

use crate::model::VirtualHost;
use serde::Serialize;
use std::{collections::BTreeMap, net::Ipv4Addr};

/// A name with an address of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Name {
    /// A domain of a virtual host.
    pub(crate) name: String,
    /// In 127.66.0.0/16.
    pub(crate) address: Ipv4Addr,
    /// Where it is listened on.
    pub(crate) ports: Vec<u16>,
}

/// Gives every domain that is listened on for itself an address, the same one whenever it can be: by a hash of the
/// name, or the next free one.
pub(crate) fn assign(virtual_hosts: &[VirtualHost]) -> Vec<Name> {
    let mut domains: Vec<(&str, &[u16])> = Vec::new();
    for host in virtual_hosts.iter().filter(|host| !host.ports.is_empty()) {
        let names = host.domains.iter().filter(|domain| domain.parse::<Ipv4Addr>().is_err());
        domains.extend(names.map(|domain| (domain.as_str(), &host.ports[..])));
    }
    domains.sort_unstable();
    let mut taken = BTreeMap::new();
    for (domain, ports) in domains {
        let first = hash(domain);
        let free =
            (0..=u16::MAX).map(|step| first.wrapping_add(step)).find(|number| is_free(*number, &taken));
        taken.extend(free.map(|number| (number, (domain, ports))));
    }
    let name = |(number, (domain, ports)): (u16, (&str, &[u16]))| {
        let [high, low] = number.to_be_bytes();
        Name { name: domain.to_owned(), address: Ipv4Addr::new(127, 66, high, low), ports: ports.to_vec() }
    };
    taken.into_iter().map(name).collect()
}

/// The first and the last address of a network are left out: some software refuses them.
fn is_free<T>(number: u16, taken: &BTreeMap<u16, T>) -> bool {
    !matches!(number & 0xff, 0 | 0xff) && !taken.contains_key(&number)
}

/// FNV-1a (Fowler, Noll, Vo), folded to 16 bits: the same on every machine and for ever.
fn hash(name: &str) -> u16 {
    let hash =
        name.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    (hash >> 16) as u16 ^ hash as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(domains: &[&str], ports: &[u16]) -> VirtualHost {
        let domains = domains.iter().map(|domain| (*domain).to_owned()).collect();
        VirtualHost { domains, cluster: "c".into(), ports: ports.to_vec() }
    }

    #[test]
    fn a_name_keeps_its_address_whatever_other_names_there_are() {
        let alone = assign(&[host(&["catalog"], &[80])]);
        let others: Vec<String> = (0..200).map(|number| format!("other-{number}")).collect();
        let others: Vec<&str> = others.iter().map(String::as_str).collect();
        let among = assign(&[host(&others, &[80]), host(&["catalog"], &[80])]);
        assert_eq!(among.iter().find(|name| name.name == "catalog"), alone.first());
        let mut addresses: Vec<Ipv4Addr> = among.iter().map(|name| name.address).collect();
        addresses.dedup();
        assert_eq!(addresses.len(), 201);
        assert!(addresses.iter().all(|address| address.octets()[..2] == [127, 66]));
    }

    #[test]
    fn addresses_and_hosts_without_ports_get_none() {
        assert!(assign(&[host(&["catalog"], &[]), host(&["10.0.0.1"], &[80])]).is_empty());
    }
}
