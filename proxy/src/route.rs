//! From a host name to a cluster.

use crate::{cluster::Cluster, model};
use std::{collections::HashMap, sync::Arc};

/// The domains of all virtual hosts.
#[derive(Debug, Default)]
pub(crate) struct Table {
    domains: HashMap<String, Arc<Cluster>>,
}

impl Table {
    /// Of virtual hosts whose clusters are among these.
    pub(crate) fn new(virtual_hosts: &[model::VirtualHost], clusters: &HashMap<&str, Arc<Cluster>>) -> Self {
        let domains =
            virtual_hosts.iter().filter_map(|host| Some((host, clusters.get(host.cluster.as_str())?)));
        let domains = domains.flat_map(|(host, cluster)| {
            host.domains.iter().map(move |domain| (domain.clone(), Arc::clone(cluster)))
        });
        Self { domains: domains.collect() }
    }

    /// The cluster of a host, as the `Host` header or an authority names it (RFC 9110 §7.2): in any case, with or
    /// without a port, with or without the root's final dot.
    pub(crate) fn find(&self, host: &str) -> Option<&Arc<Cluster>> {
        let name = without_port(host);
        let name = name.strip_suffix('.').unwrap_or(name);
        if let Some(cluster) = self.domains.get(name) {
            return Some(cluster);
        }
        let upper = name.bytes().any(|byte| byte.is_ascii_uppercase());
        if upper { self.domains.get(&name.to_ascii_lowercase()) } else { None }
    }
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::Metrics;
    use std::time::Duration;

    #[test]
    fn a_host_is_found_in_any_case_with_or_without_a_port_and_never_by_a_part_of_it() {
        let cluster = model::Cluster {
            name: "c".into(),
            connect_timeout: Duration::from_secs(1),
            endpoints: vec!["127.0.0.1:1".parse().unwrap()],
        };
        let cluster = Arc::new(Cluster::new(&cluster, &Metrics::default()));
        let host = model::VirtualHost {
            name: "v".into(),
            domains: vec!["shop".into(), "shop.internal".into()],
            cluster: "c".into(),
            ports: vec![],
        };
        let table = Table::new(&[host], &HashMap::from([("c", cluster)]));
        for host in
            ["shop", "SHOP", "shop:80", "shop.internal", "Shop.Internal:8080", "shop.", "shop.internal.:80"]
        {
            assert!(table.find(host).is_some(), "{host}");
        }
        for host in [
            "",
            "sho",
            "shopp",
            "x.shop",
            "shop.internal.evil",
            "shop:80x",
            "[::1]:80",
            ":80",
            "shop..",
            "shop internal",
        ] {
            assert!(table.find(host).is_none(), "{host}");
        }
    }

    #[test]
    fn only_a_domain_finds_its_cluster_whatever_host_is_asked_for() {
        let cluster = model::Cluster {
            name: "c".into(),
            connect_timeout: Duration::from_secs(1),
            endpoints: vec!["127.0.0.1:1".parse().unwrap()],
        };
        let cluster = Arc::new(Cluster::new(&cluster, &Metrics::default()));
        let table = Table { domains: HashMap::from([("shop.internal".to_owned(), cluster)]) };
        let seeds: [&[u8]; 2] = [b"shop.internal", b"Shop.Internal.:8080"];
        fuzz::damaged!(seeds, [":", ".", ":80", "shop", "S", "[", "]"], |input: &[u8]| {
            let host = String::from_utf8_lossy(input);
            if table.find(&host).is_some() {
                let rest = host.to_ascii_lowercase();
                let rest = rest.strip_prefix("shop.internal").unwrap();
                let port = rest.strip_prefix('.').unwrap_or(rest).trim_start_matches(':');
                assert!(port.bytes().all(|byte| byte.is_ascii_digit()), "{host}");
            }
        });
    }
}
