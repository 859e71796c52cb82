//! What the proxy can route, as it says itself (`GET /routable`): where its services are, and the virtual addresses that
//! it gives to their names. Kept on disk for whoever has to know it while the proxy is away.

use crate::{config::Ports, durable};
use agent_ebpf::decide::Destination;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fmt, fs, io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
};

/// Version of the form.
const VERSION: u32 = 1;
/// Destinations of all services together: more than the kernel has room for in the end.
const MAX_DESTINATIONS: usize = 2 * agent_ebpf::MAX_RULES as usize;
/// What it is kept in, below the directory of the state.
const FILE: &str = "routable.json";

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Routable {
    version: u32,
    services: Vec<Service>,
}

/// A virtual host of the proxy's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Service {
    name: String,
    domains: Vec<Domain>,
    /// Where it is listened on for its names, at their loopback addresses.
    ports: Vec<u16>,
    /// Where its names lead without the proxy.
    addresses: Vec<IpAddr>,
    /// Where its instances are.
    endpoints: Vec<SocketAddr>,
}

/// A host name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Domain {
    name: String,
    #[serde(rename = "virtual")]
    virtual_addresses: Vec<IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    loopback: Option<Ipv4Addr>,
}

/// A name that the proxy listens for at an address of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Name {
    pub(crate) name: String,
    pub(crate) address: Ipv4Addr,
    pub(crate) ports: Vec<u16>,
}

impl Name {
    /// What may stand in a file that root wrote and everybody trusts.
    fn is_sound(&self) -> bool {
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-._".contains(c);
        let name = !self.name.is_empty() && self.name.len() <= 253 && self.name.chars().all(allowed);
        name && self.name != "localhost" && self.address.octets()[..2] == [127, 66]
    }
}

/// A place where a service is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place<'r> {
    pub(crate) service: &'r str,
    pub(crate) net: IpNet,
    pub(crate) ports: Ports,
    kind: PlaceKind<'r>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PlaceKind<'r> {
    /// Where its names lead without the proxy.
    Address,
    /// The virtual address of a name.
    Virtual(&'r str),
    Endpoint,
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = self.net.addr();
        match self.kind {
            PlaceKind::Address => write!(f, "address {address} of {}", self.service),
            PlaceKind::Virtual(name) => write!(f, "virtual address of {name}"),
            PlaceKind::Endpoint => {
                write!(f, "endpoint {} of {}", SocketAddr::new(address, self.ports.first), self.service)
            }
        }
    }
}

impl Default for Routable {
    fn default() -> Self {
        Self { version: VERSION, services: Vec::new() }
    }
}

impl Routable {
    /// As the proxy wrote it.
    pub(crate) fn parse(json: &[u8]) -> io::Result<Self> {
        let routable: Self = serde_json::from_slice(json)?;
        let destinations = routable.all().count();
        match routable.version {
            VERSION if destinations > MAX_DESTINATIONS => Err(io::Error::other(format!(
                "it tells {destinations} destinations; the limit is {MAX_DESTINATIONS}"
            ))),
            VERSION => Ok(routable),
            other => Err(io::Error::other(format!(
                "it tells what it routes in version {other}; expected {VERSION}: agent and proxy are of different releases"
            ))),
        }
    }

    /// Where a service is; nowhere for one that the proxy does not know.
    pub(crate) fn of<'r>(&'r self, service: &str) -> impl Iterator<Item = Place<'r>> {
        self.services.iter().filter(move |known| known.name == service).flat_map(Service::places)
    }

    /// Where all services are.
    pub(crate) fn all(&self) -> impl Iterator<Item = Place<'_>> {
        self.services.iter().flat_map(Service::places)
    }

    /// Each virtual address, and an endpoint of its name: of the same family, or an IPv4 one for an IPv6 socket, which can
    /// reach both. What the proxy has no right to name is left out: addresses of others', and this host itself.
    pub(crate) fn virtual_addresses(&self) -> BTreeMap<IpAddr, SocketAddr> {
        let of = |service: &Service| {
            let addresses = service.domains.iter().flat_map(|domain| &domain.virtual_addresses);
            let addresses = addresses.filter(|address| is_virtual(**address));
            let endpoint = |address: &IpAddr| {
                let mut endpoints = service.endpoints.iter().filter(|to| !destination(to.ip()).is_local());
                let same = endpoints.clone().find(|to| to.is_ipv4() == address.is_ipv4());
                Some((*address, *same.or_else(|| endpoints.next().filter(|_| address.is_ipv6()))?))
            };
            addresses.filter_map(endpoint).collect::<Vec<_>>()
        };
        self.services.iter().flat_map(of).collect()
    }

    /// The virtual addresses of a name, in lower case.
    pub(crate) fn addresses_of(&self, name: &str) -> Vec<IpAddr> {
        let domains = self.services.iter().flat_map(|service| &service.domains);
        let of_name = domains.filter(|domain| domain.name == name);
        of_name.flat_map(|domain| domain.virtual_addresses.iter().copied()).collect()
    }

    /// The names that the proxy listens for; all of them have to be sound.
    pub(crate) fn names(&self) -> io::Result<Vec<Name>> {
        let of = |service: &Service| {
            let name = |domain: &Domain| {
                let (name, ports) = (domain.name.clone(), service.ports.clone());
                Some(Name { name, address: domain.loopback?, ports })
            };
            service.domains.iter().filter_map(name).collect::<Vec<_>>()
        };
        let names: Vec<Name> = self.services.iter().flat_map(of).collect();
        match names.iter().find(|name| !name.is_sound()) {
            Some(name) => Err(io::Error::other(format!(
                "`{}` at {} is no name for a hosts file",
                name.name.escape_debug(),
                name.address
            ))),
            None => Ok(names),
        }
    }

    /// What was kept last; nothing where nothing was.
    pub(crate) fn load(state: &Path) -> Self {
        durable::read(&state.join(FILE)).and_then(|json| Self::parse(&json)).unwrap_or_default()
    }

    /// Keeps it.
    pub(crate) fn save(&self, state: &Path) -> io::Result<()> {
        fs::create_dir_all(state)?;
        durable::replace(&state.join(FILE), &serde_json::to_vec(self)?, "routable")
    }

    /// Removes what was kept.
    pub(crate) fn remove(state: &Path) -> io::Result<bool> {
        durable::remove(&state.join(FILE), "routable")
    }
}

impl Service {
    fn places(&self) -> impl Iterator<Item = Place<'_>> {
        const ANY_PORT: Ports = Ports { first: 0, last: u16::MAX };
        let place =
            |address: IpAddr, ports, kind| Place { service: &self.name, net: address.into(), ports, kind };
        let addresses = self.addresses.iter().map(move |to| place(*to, ANY_PORT, PlaceKind::Address));
        let of_domain = move |domain| {
            let Domain { name, virtual_addresses, .. }: &Domain = domain;
            virtual_addresses.iter().map(move |to| place(*to, ANY_PORT, PlaceKind::Virtual(name)))
        };
        let endpoint = move |to: &SocketAddr| {
            place(to.ip(), Ports { first: to.port(), last: to.port() }, PlaceKind::Endpoint)
        };
        addresses.chain(self.domains.iter().flat_map(of_domain)).chain(self.endpoints.iter().map(endpoint))
    }
}

fn is_virtual(address: IpAddr) -> bool {
    destination(address).is_virtual()
}

fn destination(address: IpAddr) -> Destination {
    match address {
        IpAddr::V4(address) => Destination::from_ipv4(address.octets(), 0),
        IpAddr::V6(address) => Destination::from_ipv6(address.octets(), 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = r#"{"version": 1, "services": [{"name": "catalog",
        "domains": [{"name": "catalog.internal", "virtual": ["241.3.7.9", "fdb2:6c1e:9d04::3:709", "10.0.0.1"]}],
        "ports": [8080], "addresses": ["10.77.0.10"], "endpoints": ["10.77.0.2:8080", "10.77.0.3:8080"], "more": 1}]}"#;

    #[test]
    fn a_service_is_at_its_addresses_at_any_port_and_at_its_endpoints() {
        let routable = Routable::parse(SAID.as_bytes()).unwrap();
        let shown = |place: Place<'_>| format!("{} {}: {place}", place.net, place.ports);
        let found: Vec<String> = routable.of("catalog").map(shown).collect();
        for expected in [
            "10.77.0.10/32 0-65535: address 10.77.0.10 of catalog",
            "241.3.7.9/32 0-65535: virtual address of catalog.internal",
            "10.77.0.3/32 8080: endpoint 10.77.0.3:8080 of catalog",
        ] {
            assert!(found.iter().any(|found| found == expected), "{expected}: {found:?}");
        }
        assert_eq!(routable.of("other").count(), 0);
        assert_eq!(routable.all().count(), found.len());
    }

    #[test]
    fn only_virtual_addresses_lead_anywhere_and_never_to_this_host() {
        let routable = Routable::parse(SAID.as_bytes()).unwrap();
        let found: Vec<String> =
            routable.virtual_addresses().iter().map(|(from, to)| format!("{from} {to}")).collect();
        assert_eq!(found, ["241.3.7.9 10.77.0.2:8080", "fdb2:6c1e:9d04::3:709 10.77.0.2:8080"]);
        let local = Routable::parse(SAID.replace("10.77.0.", "127.0.0.").as_bytes()).unwrap();
        assert!(local.virtual_addresses().is_empty());
    }

    #[test]
    fn a_name_that_could_do_harm_in_a_hosts_file_is_refused() {
        let name =
            |name: &str, address: [u8; 4]| Name { name: name.into(), address: address.into(), ports: vec![] };
        assert!(name("catalog.internal", [127, 66, 1, 1]).is_sound());
        for bad in ["", "a b", "a\nb", "a#b", "Catalog", "localhost", &"x".repeat(254)] {
            assert!(!name(bad, [127, 66, 1, 1]).is_sound(), "{bad}");
        }
        assert!(!name("catalog", [10, 0, 0, 1]).is_sound() && !name("catalog", [127, 0, 0, 1]).is_sound());
    }

    #[test]
    fn names_that_the_proxy_listens_for_are_read_and_others_left_out() {
        let listened = |json: &str| Routable::parse(json.as_bytes()).and_then(|routable| routable.names());
        let document = |version: u32, address: &str| {
            format!(
                r#"{{"version":{version},"services":[{{"name":"catalog","domains":[
                    {{"name":"catalog","virtual":["241.3.7.9"],"loopback":"{address}"}},
                    {{"name":"quiet","virtual":["241.3.7.10"]}}
                ],"ports":[8080],"addresses":[],"endpoints":["10.77.0.2:8080"]}}]}}"#
            )
        };
        let names = listened(&document(1, "127.66.1.2")).unwrap();
        let catalog = Name { name: "catalog".into(), address: [127, 66, 1, 2].into(), ports: vec![8080] };
        assert_eq!(names, [catalog]);
        for wrong in [document(2, "127.66.1.2"), document(1, "10.0.0.1"), "[]".to_owned()] {
            listened(&wrong).unwrap_err();
        }
    }

    #[test]
    fn what_is_kept_is_found_again_and_what_is_broken_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Routable::load(dir.path()), Routable::default());
        let routable = Routable::parse(SAID.as_bytes()).unwrap();
        routable.save(dir.path()).unwrap();
        assert_eq!(Routable::load(dir.path()), routable);
        fs::write(dir.path().join(FILE), "{").unwrap();
        assert_eq!(Routable::load(dir.path()), Routable::default());
        Routable::remove(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        Routable::parse(br#"{"version": 2, "services": []}"#).unwrap_err();
    }

    #[test]
    fn whatever_the_proxy_says_is_bounded_leads_to_no_local_address_and_is_kept_as_it_is() {
        let listened = SAID.replace("\"virtual\"", "\"loopback\": \"127.66.1.2\", \"virtual\"");
        let seeds = [SAID, &listened].map(str::as_bytes);
        let words = [
            "\"",
            ":",
            ",",
            "{",
            "}",
            "[",
            "]",
            "null",
            "127.0.0.1",
            "169.254.0.1",
            "::1",
            "0.0.0.0",
            "241.1.1.1",
            "[fd00::1]:80",
            "::ffff:127.0.0.1",
            "[::ffff:10.0.0.1%1]:80",
            "localhost",
            "\\n",
            "\\u0007",
            "\"domains\":",
            "\"endpoints\":",
        ];
        fuzz::damaged!(seeds, words, |input: &[u8]| {
            let Ok(routable) = Routable::parse(input) else { return };
            assert!(routable.all().count() <= MAX_DESTINATIONS);
            for (from, to) in routable.virtual_addresses() {
                assert!(is_virtual(from) && !destination(to.ip()).is_local(), "{from} {to}");
                assert!(from.is_ipv6() || to.is_ipv4(), "{from} {to}");
            }
            if let Ok(names) = routable.names() {
                let line = |name: &Name| format!("{}\t{}", name.address, name.name);
                assert!(
                    names
                        .iter()
                        .map(line)
                        .all(|line| line.split_whitespace().count() == 2 && !line.contains('#'))
                );
            }
            assert_eq!(Routable::parse(&serde_json::to_vec(&routable).unwrap()).unwrap(), routable);
        });
    }
}
