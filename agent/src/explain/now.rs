//! What holds on this host now, as far as it can be told: by the daemon, or by what it has left on disk.

use crate::{
    api,
    client::{self, ClientError},
    config::Config,
    mode::{Mode, Wanted},
    probe,
    redirect::Ready,
    state::StateFile,
    watch,
    workload::Workloads,
};
use serde::Serialize;
use std::io;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Now {
    /// How connections are steered; none where that was never chosen, or this user may not know.
    pub(crate) mode: Option<Mode>,
    /// Whether the daemon runs; none where this user may not ask it.
    pub(crate) daemon: Option<bool>,
    /// Whether the service is enabled; none where this user may not know.
    pub(crate) enabled: Option<bool>,
    /// Whether what would be steered is only counted.
    pub(crate) observed: bool,
    /// Whether the proxy takes connections.
    pub(crate) proxy: Families,
    /// Whether it takes DNS queries.
    pub(crate) dns: Families,
}

/// Of each family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Families {
    pub(crate) ipv4: bool,
    pub(crate) ipv6: bool,
}

impl Families {
    pub(crate) fn any(self) -> bool {
        self.ipv4 || self.ipv6
    }
}

impl From<[bool; 2]> for Families {
    fn from([ipv4, ipv6]: [bool; 2]) -> Self {
        Self { ipv4, ipv6 }
    }
}

impl Now {
    /// Asks the daemon, the disk and the proxy about a service.
    pub(crate) fn of(config: &Config, service: &str) -> Self {
        let (status, daemon) = match client::get::<api::Status>(&config.paths.run, "/v1/status") {
            Ok(status) => (Some(status), Some(true)),
            Err(ClientError::Absent { cause, .. }) if cause.kind() != io::ErrorKind::PermissionDenied => {
                (None, Some(false))
            }
            Err(_) => (None, None),
        };
        let state = StateFile::new(&config.paths.state).load().ok();
        let wanted = match config.mode {
            Wanted::Auto => None,
            Wanted::Only(mode) => Some(mode),
        };
        let chosen = state.as_ref().and_then(crate::state::State::mode);
        let mode = status.map(|status| status.mode).or(chosen).or(wanted);
        let ready = ready(config, mode, daemon);
        Self {
            mode,
            daemon,
            enabled: state.as_ref().map(|state| state.is_enabled(service)),
            observed: state.is_some_and(|state| state.get(service).is_some_and(|entry| entry.observe)),
            proxy: ready.proxy.into(),
            dns: ready.dns.into(),
        }
    }
}

/// With nftables only the daemon keeps the proxy alive.
fn ready(config: &Config, mode: Option<Mode>, daemon: Option<bool>) -> Ready {
    if mode == Some(Mode::Nftables) && daemon == Some(false) {
        return Ready::default();
    }
    let workloads = probe::cgroup2_mount().map(Workloads::new);
    workloads.map(|mut workloads| watch::is_ready(&config.proxy, &mut workloads)).unwrap_or_default()
}
