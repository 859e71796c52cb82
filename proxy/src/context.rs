//! What all connections of a worker share.

use crate::{
    names::{Name, is_virtual},
    observe::Metrics,
    origins::Origins,
    pool::Pool,
    snapshot::Current,
};
use std::{net::SocketAddr, sync::Arc};
use tokio::sync::watch;

/// One for each worker; never crosses threads.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) snapshot: Arc<Current>,
    pub(crate) metrics: Metrics,
    pub(crate) pool: Pool,
    pub(crate) origins: Origins,
    /// Names that are listened on by themselves.
    pub(crate) names: Arc<[Name]>,
    /// Becomes true when this process is to end.
    pub(crate) drain: watch::Receiver<bool>,
    /// Ports of this proxy on its own loopback addresses.
    pub(crate) own_ports: Arc<[u16]>,
}

impl Context {
    /// Whether an address leads back to this proxy, or would if it led anywhere.
    pub(crate) fn is_own(&self, address: SocketAddr) -> bool {
        let ip = address.ip().to_canonical();
        is_virtual(ip)
            || (ip.is_loopback() || ip.is_unspecified()) && self.own_ports.contains(&address.port())
    }

    /// Resolves when this process is to end.
    pub(crate) async fn draining(&self) {
        // The sender outlives every worker; if not, it is time to end too.
        let mut drain = self.drain.clone();
        let _ended = drain.wait_for(|drain| *drain).await;
    }
}
