//! What requests are routed by: immutable, and replaced whole.

use crate::{cluster::Cluster, model, observe::Metrics, route};
use arc_swap::ArcSwap;
use std::{collections::HashMap, sync::Arc};

/// One configuration's routes and clusters.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) routes: route::Table,
}

impl Snapshot {
    pub(crate) fn new(config: &model::Config, metrics: &Metrics) -> Self {
        let cluster = |cluster: &model::Cluster| Arc::new(Cluster::new(cluster, metrics));
        let clusters: HashMap<&str, Arc<Cluster>> =
            config.clusters.iter().map(|model| (model.name.as_str(), cluster(model))).collect();
        Self { routes: route::Table::new(&config.virtual_hosts, &clusters) }
    }
}

/// The snapshot that holds now, shared by all workers. A request that began under another one keeps it.
pub(crate) type Current = ArcSwap<Snapshot>;
