//! What every way of configuring decodes to. Words and ideas are those of xDS v3.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

/// A validated configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Config {
    pub(crate) listen: Listen,
    /// Where metrics and readiness are served.
    pub(crate) admin: SocketAddr,
    /// The socket at which the agent tells what the kernel does not.
    pub(crate) origins: PathBuf,
    /// How long open requests and tunnels get after SIGTERM.
    pub(crate) drain_timeout: Duration,
    pub(crate) virtual_hosts: Vec<VirtualHost>,
    pub(crate) clusters: Vec<Cluster>,
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
    /// Lower case, without ports.
    pub(crate) domains: Vec<String>,
    /// Name of one of the clusters.
    pub(crate) cluster: String,
    /// Where its names are listened on, each at a loopback address of its own; none unless they shall be.
    pub(crate) ports: Vec<u16>,
}

/// Instances that serve the same (`envoy.config.cluster.v3.Cluster`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cluster {
    pub(crate) name: String,
    pub(crate) connect_timeout: Duration,
    /// Never empty.
    pub(crate) endpoints: Vec<SocketAddr>,
}
