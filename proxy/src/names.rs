//! Addresses that stand for names: a service is told by the address it is reached at, also where its protocol carries no
//! name.
//!
//! Every name has a *virtual* address, which nothing listens at and no network routes: whoever is told it (by DNS) and
//! connects is steered here, and the address says which name was meant. A name that shall be listened on by itself also
//! has a loopback address: whoever maps names to those (a hosts file) steers without any help of the kernel.

use crate::model::VirtualHost;
use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

/// A name that is listened on by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Name {
    /// A domain of a virtual host.
    pub(crate) name: String,
    /// In 127.66.0.0/16.
    pub(crate) address: Ipv4Addr,
    /// Where it is listened on.
    pub(crate) ports: Vec<u16>,
}

/// Gives every domain that is listened on by itself an address, the same one whenever it can be: by a hash of the
/// name, or the next free one.
pub(crate) fn loopback(virtual_hosts: &[VirtualHost]) -> Vec<Name> {
    let mut domains: Vec<(&str, &[u16])> = Vec::new();
    for host in virtual_hosts.iter().filter(|host| !host.ports.is_empty()) {
        domains.extend(host.names().map(|name| (name, &host.ports[..])));
    }
    domains.sort_unstable();
    let mut taken = BTreeMap::new();
    for (domain, ports) in domains {
        let free = first_free(domain, 16, |number| taken.contains_key(&number));
        taken.extend(free.map(|number| (number, (domain, ports))));
    }
    let name = |(number, (domain, ports)): (u32, (&str, &[u16]))| {
        let address = Ipv4Addr::from_bits(Ipv4Addr::new(127, 66, 0, 0).to_bits() | number);
        Name { name: domain.to_owned(), address, ports: ports.to_vec() }
    };
    taken.into_iter().map(name).collect()
}

/// The virtual address of a name, in both families: one number of 24 bits, below 241.0.0.0/8, which is reserved and
/// routed nowhere, and below a unique local prefix (RFC 4193) drawn once for this program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct VirtualAddress(u32);

const BITS: u32 = 24;
const IPV4: Ipv4Addr = Ipv4Addr::new(241, 0, 0, 0);
const IPV6: Ipv6Addr = Ipv6Addr::new(0xfdb2, 0x6c1e, 0x9d04, 0, 0, 0, 0, 0);

impl VirtualAddress {
    /// In 241.0.0.0/8.
    pub(crate) fn ipv4(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(IPV4.to_bits() | self.0)
    }

    /// In fdb2:6c1e:9d04::/48.
    pub(crate) fn ipv6(self) -> Ipv6Addr {
        Ipv6Addr::from_bits(IPV6.to_bits() | u128::from(self.0))
    }

    fn at(ip: IpAddr) -> Option<Self> {
        let number = match ip.to_canonical() {
            IpAddr::V4(ip) => u128::from(ip.to_bits().checked_sub(IPV4.to_bits())?),
            IpAddr::V6(ip) => ip.to_bits().checked_sub(IPV6.to_bits())?,
        };
        u32::try_from(number).ok().filter(|number| *number < 1 << BITS).map(Self)
    }
}

/// Whether an address is in one of the blocks of virtual addresses; such a one leads nowhere but here.
pub(crate) fn is_virtual(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => ip.octets()[0] == IPV4.octets()[0],
        IpAddr::V6(ip) => ip.segments()[..3] == IPV6.segments()[..3],
    }
}

/// Which name has which virtual address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct VirtualAddresses {
    by_name: HashMap<Arc<str>, VirtualAddress>,
    by_address: HashMap<VirtualAddress, Arc<str>>,
}

impl VirtualAddresses {
    /// For every domain, by a hash of the name, or the next free one. Those that had one before keep it, since clients
    /// have been told.
    pub(crate) fn assign(virtual_hosts: &[VirtualHost], previous: &Self) -> Self {
        let mut names: Vec<&str> = virtual_hosts.iter().flat_map(VirtualHost::names).collect();
        names.sort_unstable();
        let mut assigned = Self::default();
        let (known, new): (Vec<&str>, Vec<&str>) =
            names.into_iter().partition(|name| previous.of(name).is_some());
        for name in known {
            assigned.insert(name, previous.of(name));
        }
        for name in new {
            let is_taken = |number| assigned.by_address.contains_key(&VirtualAddress(number));
            assigned.insert(name, first_free(name, BITS, is_taken).map(VirtualAddress));
        }
        assigned
    }

    fn insert(&mut self, name: &str, address: Option<VirtualAddress>) {
        let Some(address) = address else { return };
        let name: Arc<str> = name.into();
        self.by_name.insert(Arc::clone(&name), address);
        self.by_address.insert(address, name);
    }

    /// A name's address. Names are lower case, without the root's final dot.
    pub(crate) fn of(&self, name: &str) -> Option<VirtualAddress> {
        self.by_name.get(name).copied()
    }

    /// The name that has an address.
    pub(crate) fn name_at(&self, ip: IpAddr) -> Option<&Arc<str>> {
        self.by_address.get(&VirtualAddress::at(ip)?)
    }
}

/// The first number from a name's hash on that is not taken. The first and the last address of a network are left out:
/// some software refuses them.
fn first_free(name: &str, bits: u32, is_taken: impl Fn(u32) -> bool) -> Option<u32> {
    let first = hash(name, bits);
    let mut numbers = (0..1 << bits).map(|step| (first + step) & ((1 << bits) - 1));
    numbers.find(|number| !matches!(number & 0xff, 0 | 0xff) && !is_taken(*number))
}

/// FNV-1a (Fowler, Noll, Vo), folded: the same on every machine and for ever.
fn hash(name: &str, bits: u32) -> u32 {
    let hash =
        name.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    (hash >> bits) ^ (hash & ((1 << bits) - 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn host(domains: &[&str], ports: &[u16]) -> VirtualHost {
        let domains = domains.iter().map(|domain| (*domain).to_owned()).collect();
        VirtualHost { name: "v".into(), domains, cluster: "c".into(), ports: ports.to_vec() }
    }

    fn assign(domains: &[&str], previous: &VirtualAddresses) -> VirtualAddresses {
        VirtualAddresses::assign(&[host(domains, &[])], previous)
    }

    /// Two names of the same hash, found by trying.
    fn colliding() -> [String; 2] {
        let mut seen = HashMap::new();
        (0..)
            .find_map(|number| {
                let name = format!("n{number}");
                seen.insert(hash(&name, BITS), name.clone()).map(|other| [other, name])
            })
            .unwrap()
    }

    #[test]
    fn a_name_keeps_its_loopback_address_whatever_other_names_there_are() {
        let alone = loopback(&[host(&["catalog"], &[80])]);
        let others: Vec<String> = (0..200).map(|number| format!("other-{number}")).collect();
        let others: Vec<&str> = others.iter().map(String::as_str).collect();
        let among = loopback(&[host(&others, &[80]), host(&["catalog"], &[80])]);
        assert_eq!(among.iter().find(|name| name.name == "catalog"), alone.first());
        let mut addresses: Vec<Ipv4Addr> = among.iter().map(|name| name.address).collect();
        addresses.dedup();
        assert_eq!(addresses.len(), 201);
        assert!(addresses.iter().all(|address| address.octets()[..2] == [127, 66]));
    }

    #[test]
    fn addresses_and_hosts_without_ports_get_no_loopback_address() {
        assert!(loopback(&[host(&["catalog"], &[]), host(&["10.0.0.1"], &[80])]).is_empty());
    }

    #[test]
    fn every_name_and_no_address_gets_a_virtual_address_in_both_families() {
        let assigned = assign(&["catalog", "10.0.0.1"], &VirtualAddresses::default());
        let address = assigned.of("catalog").unwrap();
        assert_eq!(address, VirtualAddress(hash("catalog", BITS)));
        let [_, a, b, c] = address.ipv4().octets();
        assert_eq!(address.ipv4(), Ipv4Addr::new(241, a, b, c));
        assert_eq!(
            address.ipv6(),
            format!("fdb2:6c1e:9d04::{a:x}:{:x}", u16::from_be_bytes([b, c])).parse::<Ipv6Addr>().unwrap()
        );
        for ip in [address.ipv4().into(), address.ipv6().into(), address.ipv4().to_ipv6_mapped().into()] {
            assert_eq!(assigned.name_at(ip).map(|name| &**name), Some("catalog"), "{ip}");
        }
        assert_eq!(assigned.of("10.0.0.1"), None);
    }

    #[test]
    fn names_of_one_hash_get_two_addresses_and_keep_them_over_every_reload() {
        let [one, other] = colliding();
        let (one, other) = (one.as_str(), other.as_str());
        let both = assign(&[one, other], &VirtualAddresses::default());
        assert_ne!(both.of(one), both.of(other));
        // Whichever came first: the one that is new has to give way, also where it would sort first.
        for (first, second) in [(one, other), (other, one)] {
            let alone = assign(&[first], &VirtualAddresses::default());
            let joined = assign(&[first, second], &alone);
            assert_eq!(joined.of(first), alone.of(first));
            assert_ne!(joined.of(second), joined.of(first));
            let left = assign(&[second], &joined);
            assert_eq!(left.of(second), joined.of(second));
            assert_eq!(left.of(first), None);
        }
    }

    #[test]
    fn no_address_is_the_first_or_last_of_its_network_and_none_is_given_twice() {
        let names: Vec<String> = (0..20_000).map(|number| format!("service-{number}.internal")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let assigned = assign(&names, &VirtualAddresses::default());
        let distinct: BTreeSet<Ipv4Addr> =
            names.iter().filter_map(|name| assigned.of(name)).map(VirtualAddress::ipv4).collect();
        assert_eq!(distinct.len(), names.len());
        assert!(distinct.iter().all(|ip| ip.octets()[0] == 241 && !matches!(ip.octets()[3], 0 | 255)));
    }

    #[test]
    fn the_blocks_are_known_as_virtual_and_their_neighbours_are_not() {
        for ip in
            ["241.0.0.0", "241.255.255.255", "::ffff:241.1.2.3", "fdb2:6c1e:9d04::1", "fdb2:6c1e:9d04:1::"]
        {
            assert!(is_virtual(ip.parse().unwrap()), "{ip}");
        }
        for ip in ["240.255.255.255", "242.0.0.0", "fdb2:6c1e:9d05::1", "fdb2:6c1e:9d03::1", "127.66.0.1"] {
            assert!(!is_virtual(ip.parse().unwrap()), "{ip}");
        }
        for ip in ["240.255.255.255", "242.0.0.0", "fdb2:6c1e:9d04::100:0", "fdb2:6c1e:9d04:1::1", "::"] {
            assert_eq!(VirtualAddress::at(ip.parse().unwrap()), None, "{ip}");
        }
    }

    #[test]
    fn every_set_of_names_has_distinct_addresses_that_lead_back_to_them() {
        let [one, other] = colliding();
        let seed = format!("catalog catalog.internal mail 10.0.0.1 ::1 {one} {other}");
        fuzz::damaged!(
            [seed.as_bytes()],
            [" ", ".", "catalog", "127.0.0.1", &one, &other],
            |input: &[u8]| {
                let text = String::from_utf8_lossy(input);
                let names: BTreeSet<&str> = text.split(' ').filter(|name| !name.is_empty()).collect();
                let names: Vec<&str> = names.into_iter().collect();
                let (before, after) = names.split_at(names.len() / 2);
                let previous = assign(before, &VirtualAddresses::default());
                let assigned = assign(&[before, after].concat(), &previous);
                for name in names.iter().filter(|name| name.parse::<IpAddr>().is_err()) {
                    let address = assigned.of(name).unwrap();
                    for ip in [IpAddr::from(address.ipv4()), address.ipv6().into()] {
                        assert!(
                            is_virtual(ip) && assigned.name_at(ip).is_some_and(|found| **found == **name),
                            "{name} {ip}"
                        );
                    }
                    assert!(previous.of(name).is_none_or(|before| before == address));
                }
                let listened = loopback(&[host(&names, &[80])]);
                let distinct: BTreeSet<Ipv4Addr> = listened.iter().map(|name| name.address).collect();
                assert!(distinct.len() == listened.len() && distinct.iter().all(Ipv4Addr::is_loopback));
            }
        );
    }
}
