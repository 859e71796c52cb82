//! What becomes of a connection, and why.

use crate::{
    config::{Config, check_name},
    ready,
    reason::Reason,
    routable::Routable,
};
use serde::Serialize;
use std::net::SocketAddr;

/// What policy does with each destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Explanations {
    pub(crate) explained: Vec<Explained>,
}

/// What policy does with one destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Explained {
    pub(crate) destination: SocketAddr,
    #[serde(flatten)]
    pub(crate) reason: Reason,
}

/// What the policy of a service does with connections to destinations.
pub(crate) fn explain(
    config: &Config,
    service: &str,
    destinations: &[SocketAddr],
) -> anyhow::Result<Explanations> {
    check_name(service).map_err(anyhow::Error::msg)?;
    let policy = config.policy(service);
    let routable = if policy.follows_routable() { known_routable(config) } else { Routable::default() };
    let explain =
        |&destination| Explained { destination, reason: Reason::of(config, &routable, service, destination) };
    Ok(Explanations { explained: destinations.iter().map(explain).collect() })
}

/// As the proxy says now, or as it was last known.
fn known_routable(config: &Config) -> Routable {
    match ready::routable(config.proxy.admin, None) {
        Ok(Some((routable, _))) => routable,
        _ => Routable::load(&config.paths.state),
    }
}
