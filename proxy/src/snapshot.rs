//! What requests are routed by: immutable, and replaced whole.

use crate::{cluster::Cluster, model, names::VirtualAddresses, observe::Metrics, route};
use arc_swap::ArcSwap;
use std::{collections::HashMap, sync::Arc};

/// One configuration's routes and clusters.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) routes: route::Table,
    pub(crate) addresses: VirtualAddresses,
    /// What all of this was made of.
    pub(crate) config: model::Config,
}

impl Snapshot {
    /// Names that had a virtual address before keep it.
    pub(crate) fn new(config: model::Config, previous: &VirtualAddresses, metrics: &Metrics) -> Self {
        let cluster = |cluster: &model::Cluster| Arc::new(Cluster::new(cluster, metrics));
        let clusters: HashMap<&str, Arc<Cluster>> =
            config.clusters.iter().map(|model| (model.name.as_str(), cluster(model))).collect();
        let routes = route::Table::new(&config.virtual_hosts, &clusters);
        let addresses = VirtualAddresses::assign(&config.virtual_hosts, previous);
        Self { routes, addresses, config }
    }
}

/// The snapshot that holds now, shared by all workers. A request that began under another one keeps it.
pub(crate) type Current = ArcSwap<Snapshot>;
