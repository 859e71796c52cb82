//! A cluster and its endpoints, with what is measured of each.

use crate::{
    balance::RoundRobin,
    model,
    observe::{Metrics, UpstreamMetrics},
};
use std::{net::SocketAddr, time::Duration};

/// Instances that serve the same.
#[derive(Debug)]
pub(crate) struct Cluster {
    pub(crate) name: String,
    pub(crate) connect_timeout: Duration,
    pub(crate) upstream: UpstreamMetrics,
    endpoints: Vec<SocketAddr>,
    balance: RoundRobin,
}

impl Cluster {
    pub(crate) fn new(cluster: &model::Cluster, metrics: &Metrics) -> Self {
        Self {
            upstream: metrics.upstream(&cluster.name),
            name: cluster.name.clone(),
            connect_timeout: cluster.connect_timeout,
            endpoints: cluster.endpoints.clone(),
            balance: RoundRobin::default(),
        }
    }

    /// Where a request may go: each endpoint once, in the order in which to try them.
    pub(crate) fn endpoints(&self) -> impl Iterator<Item = SocketAddr> {
        self.balance.order(self.endpoints.len()).filter_map(|index| self.endpoints.get(index).copied())
    }
}
