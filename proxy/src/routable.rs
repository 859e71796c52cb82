//! What is routed here, for those who steer: each virtual host, the addresses that stand for it, and where it is. Pure.

use crate::{
    model::{Cluster, VirtualHost},
    names::Name,
    resolve::Addresses,
    snapshot::Snapshot,
};
use serde::Serialize;
use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

/// Of the document's form; what reads it refuses another one.
const VERSION: u32 = 1;

#[derive(Debug, Serialize)]
struct Document<'a> {
    version: u32,
    services: Vec<Service<'a>>,
}

#[derive(Debug, Serialize)]
struct Service<'a> {
    /// The virtual host's.
    name: &'a str,
    /// Those that are names.
    domains: Vec<Domain<'a>>,
    ports: &'a [u16],
    /// Those of its domains that are addresses, and what the others resolve to.
    addresses: BTreeSet<IpAddr>,
    endpoints: BTreeSet<SocketAddr>,
}

#[derive(Debug, Serialize)]
struct Domain<'a> {
    name: &'a str,
    #[serde(rename = "virtual")]
    virtual_addresses: Vec<IpAddr>,
    /// Where it is listened on.
    #[serde(skip_serializing_if = "Option::is_none")]
    loopback: Option<Ipv4Addr>,
}

/// The document, as JSON, of a snapshot, the names that are listened on, and what names resolve to.
pub(crate) fn document(
    snapshot: &Snapshot,
    listened: &[Name],
    resolved: &Addresses,
) -> serde_json::Result<Vec<u8>> {
    let config = &snapshot.config;
    let clusters: HashMap<&str, &Cluster> =
        config.clusters.iter().map(|cluster| (cluster.name.as_str(), cluster)).collect();
    let loopback: HashMap<&str, Ipv4Addr> =
        listened.iter().map(|name| (name.name.as_str(), name.address)).collect();
    let domain = |name| Domain {
        name,
        virtual_addresses: snapshot
            .addresses
            .of(name)
            .map(|address| vec![address.ipv4().into(), address.ipv6().into()])
            .unwrap_or_default(),
        loopback: loopback.get(name).copied(),
    };
    let services = config.virtual_hosts.iter().map(|host: &VirtualHost| {
        let resolved = host.names().filter_map(|name| resolved.get(name)).flatten().copied();
        let cluster = clusters.get(host.cluster.as_str());
        Service {
            name: &host.name,
            domains: host.names().map(domain).collect(),
            ports: &host.ports,
            addresses: host.addresses().chain(resolved).collect(),
            endpoints: cluster.map(|cluster| cluster.endpoints.iter().copied().collect()).unwrap_or_default(),
        }
    });
    serde_json::to_vec(&Document { version: VERSION, services: services.collect() })
}

/// The entity tag of a body (RFC 9110 §8.8.3): FNV-1a of its bytes.
pub(crate) fn entity_tag(body: &[u8]) -> String {
    let hash = body.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    format!("\"{hash:016x}\"")
}

/// Whether an `If-None-Match` names a tag (RFC 9110 §13.1.2, which compares weakly).
pub(crate) fn is_known(if_none_match: &str, tag: &str) -> bool {
    let mut tags = if_none_match.split(',').map(str::trim);
    tags.any(|known| known == "*" || known.strip_prefix("W/").unwrap_or(known) == tag)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::{Config, Listen},
        names::{self, VirtualAddresses},
        observe::Metrics,
    };
    use std::time::Duration;

    fn config() -> Config {
        let host = |name: &str, domains: &[&str], ports: &[u16]| VirtualHost {
            name: name.into(),
            domains: domains.iter().map(|domain| (*domain).to_owned()).collect(),
            cluster: "c".into(),
            ports: ports.to_vec(),
        };
        Config {
            listen: Listen { port: 15001, workers: 1 },
            admin: "127.0.0.1:15000".parse().unwrap(),
            origins: "/nonexistent".into(),
            dns: None,
            resolve_domains: true,
            drain_timeout: Duration::from_secs(1),
            virtual_hosts: vec![
                host("catalog", &["catalog.internal", "10.77.0.10"], &[8080]),
                host("mail", &["mail"], &[]),
            ],
            clusters: vec![Cluster {
                name: "c".into(),
                connect_timeout: Duration::from_secs(1),
                endpoints: vec!["10.77.0.3:8080".parse().unwrap(), "10.77.0.2:8080".parse().unwrap()],
            }],
        }
    }

    #[test]
    fn every_service_is_told_with_all_that_stands_for_it() {
        let config = config();
        let listened = names::loopback(&config.virtual_hosts);
        let snapshot = Snapshot::new(config, &VirtualAddresses::default(), &Metrics::default());
        let addresses = ["10.0.0.9", "10.77.0.10", "fd00::9"].map(|ip| ip.parse::<IpAddr>().unwrap());
        let resolved = Addresses::from([("catalog.internal".to_owned(), addresses.to_vec())]);
        let document: serde_json::Value =
            serde_json::from_slice(&document(&snapshot, &listened, &resolved).unwrap()).unwrap();
        let virtual_of = |name: &str| {
            let address = snapshot.addresses.of(name).unwrap();
            serde_json::json!([address.ipv4(), address.ipv6()])
        };
        let expected = serde_json::json!({
            "version": 1,
            "services": [
                {
                    "name": "catalog",
                    "domains": [{
                        "name": "catalog.internal",
                        "virtual": virtual_of("catalog.internal"),
                        "loopback": listened[0].address,
                    }],
                    "ports": [8080],
                    "addresses": ["10.0.0.9", "10.77.0.10", "fd00::9"],
                    "endpoints": ["10.77.0.2:8080", "10.77.0.3:8080"],
                },
                {
                    "name": "mail",
                    "domains": [{ "name": "mail", "virtual": virtual_of("mail") }],
                    "ports": [],
                    "addresses": [],
                    "endpoints": ["10.77.0.2:8080", "10.77.0.3:8080"],
                },
            ],
        });
        assert_eq!(document, expected);
    }

    #[test]
    fn a_tag_is_known_alone_in_a_list_weakly_and_as_any() {
        let tag = entity_tag(b"body");
        assert_ne!(tag, entity_tag(b"bodx"));
        for known in [tag.clone(), format!("\"x\", {tag}"), format!("W/{tag}"), "*".to_owned()] {
            assert!(is_known(&known, &tag), "{known}");
        }
        for unknown in ["", "\"x\"", tag.trim_matches('"')] {
            assert!(!is_known(unknown, &tag), "{unknown}");
        }
    }

    #[test]
    fn a_tag_is_known_only_where_it_stands() {
        let tag = entity_tag(b"body");
        let list = format!("\"x\", W/{tag}, *");
        fuzz::damaged!(
            [list.as_bytes(), tag.as_bytes()],
            [",", "W/", "*", "\"", tag.as_str()],
            |input: &[u8]| {
                let header = String::from_utf8_lossy(input);
                assert!(!is_known(&header, &tag) || header.contains(&tag) || header.contains('*'));
                assert!(is_known(&format!("{header},{tag}"), &tag));
            }
        );
    }
}
