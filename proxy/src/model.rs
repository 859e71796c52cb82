//! What every way of configuring decodes to. Words and ideas are those of xDS v3.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

/// A validated configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Config {
    pub(crate) listen: Listen,
    /// Where metrics and readiness are served.
    pub(crate) admin: SocketAddr,
    /// The socket at which the agent tells what the kernel does not.
    pub(crate) origins: PathBuf,
    /// First of the ports where DNS is served, and the one for TCP; none where it is not.
    pub(crate) dns: Option<u16>,
    /// Whether the addresses of the virtual hosts' domains are looked up.
    pub(crate) resolve_domains: bool,
    /// How long open requests and tunnels get after SIGTERM.
    pub(crate) drain_timeout: Duration,
    pub(crate) virtual_hosts: Vec<VirtualHost>,
    pub(crate) clusters: Vec<Cluster>,
}

impl Config {
    /// TCP ports of this proxy on its own loopback addresses.
    pub(crate) fn own_ports(&self) -> Vec<u16> {
        [self.listen.port, self.admin.port()].into_iter().chain(self.dns).collect()
    }
}

/// The outbound listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listen {
    /// On 127.0.0.1 and ::1.
    pub(crate) port: u16,
    /// Threads.
    pub(crate) workers: usize,
}

/// Host names, and where their requests go (`envoy.config.route.v3.VirtualHost`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VirtualHost {
    pub(crate) name: String,
    /// Lower case, without ports, without the root's final dot.
    pub(crate) domains: Vec<String>,
    /// Name of one of the clusters.
    pub(crate) cluster: String,
    /// Where its names are listened on, each at a loopback address of its own; none unless they shall be.
    pub(crate) ports: Vec<u16>,
}

impl VirtualHost {
    /// Those of its domains that are names.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.domains.iter().map(String::as_str).filter(|domain| domain.parse::<IpAddr>().is_err())
    }

    /// Those of its domains that are addresses.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.domains.iter().filter_map(|domain| domain.parse().ok())
    }
}

/// Instances that serve the same (`envoy.config.cluster.v3.Cluster`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cluster {
    pub(crate) name: String,
    pub(crate) connect_timeout: Duration,
    /// Never empty.
    pub(crate) endpoints: Vec<SocketAddr>,
}
