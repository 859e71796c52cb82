//! What goes over the control socket: HTTP/1.1 with JSON bodies.
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/status` | [`Status`] |
//! | `POST /v1/enable` with [`Change`] | [`Changed`] |
//! | `POST /v1/disable` with [`Change`] | [`Changed`] |
//! | `POST /v1/connections` with [`Connections`] | [`Found`]: open connections, which are closed if so asked |
//! | `POST /v1/reload`, or with [`Reload`] | [`Reloaded`]: the configuration was read anew |
//! | `POST /v1/services/NAME/commands` | [`Joined`]: the calling process is in a steered cgroup of its own now |
//! | `POST /v1/services/NAME/processes` with [`Process`] | [`Joined`]: it and its descendants are in a steered cgroup |
//! | `POST /v1/services/NAME/cgroups`, or with [`Process`] | [`Joined`]: the cgroup of the calling process, or of that one, is steered as the service's now |
//! | `GET /v1/watch?service=NAME…&rate=N` | [`Watched`], one a line, for as long as the caller stays |
//! | `POST /v1/proxy/cgroups` | [`Joined`]: the cgroup of the calling process is the proxy's now |
//!
//! What fails answers 4xx or 5xx with [`Refusal`].

use crate::{mode::Mode, redirect::ebpf::Order};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeSet, net::SocketAddr};

/// The state of everything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Status {
    pub(crate) mode: Mode,
    /// Whether everything is as it is wanted.
    pub(crate) healthy: bool,
    /// What is not.
    pub(crate) drift: Vec<Drift>,
    pub(crate) proxy: Proxy,
    pub(crate) services: Vec<Service>,
    /// Other ABI versions of the programs that are still there for connections which they steered.
    #[serde(default)]
    pub(crate) retiring: Vec<u32>,
    /// How full the kernel's maps are; none where nothing is loaded, or steered without maps.
    pub(crate) maps: Vec<Map>,
}

/// One map of the kernel's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Map {
    pub(crate) name: String,
    pub(crate) entries: u64,
    pub(crate) capacity: u64,
    /// Entries that had to make room for others; absent for a map that refuses instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) evicted: Option<u64>,
}

/// Something that was not as it is wanted when it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Drift {
    /// Whose it is, where it is one service's.
    pub(crate) service: Option<String>,
    pub(crate) finding: String,
    /// What to do.
    pub(crate) remedy: String,
}

/// The proxy's side.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Proxy {
    pub(crate) port: u16,
    /// Absent while the proxy's unit or cgroup does not exist.
    pub(crate) cgroup: Option<String>,
    /// Whether its side is attached there.
    pub(crate) attached: bool,
}

/// One service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Service {
    pub(crate) name: String,
    /// False where only commands run as the service are steered.
    pub(crate) enabled: bool,
    /// Whether what would be steered is only counted.
    pub(crate) observe: bool,
    pub(crate) mode: Mode,
    /// Seconds of the Unix epoch.
    pub(crate) since: u64,
    pub(crate) failure: String,
    /// Where its processes are; none for a unit that does not run.
    pub(crate) scopes: Vec<Scope>,
    /// Open connections that policy steers and that are not steered, since they were made before; none where it cannot be
    /// said: of names, and of what is only observed.
    pub(crate) unsteered: Option<usize>,
    pub(crate) counters: Counters,
}

/// One cgroup of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Scope {
    pub(crate) cgroup: String,
    /// Whether the kernel says that all programs are attached.
    pub(crate) attached: bool,
}

/// What happened to a service's connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Counters {
    pub(crate) steered: u64,
    pub(crate) passed_by_rule: u64,
    pub(crate) passed_proxy_absent: u64,
    pub(crate) refused: u64,
    pub(crate) errors: u64,
    pub(crate) observed: u64,
    pub(crate) queries: u64,
}

/// Services to enable or disable.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Change {
    /// Names and patterns (`pay*`).
    pub(crate) services: Vec<String>,
    /// Whether patterns are for the host's units too, not only for the services of the configuration.
    pub(crate) all_matching: bool,
    /// Whether what would be steered is only counted.
    pub(crate) observe: bool,
    /// Whether nothing shall be done, only told.
    pub(crate) dry_run: bool,
    /// What becomes of connections that are open.
    pub(crate) existing: Existing,
}

/// What becomes of open connections that are not steered as they were, had they been made now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Existing {
    /// They go on as they are
    #[default]
    Keep,
    /// They get time to end by themselves, and are closed then
    Drain,
    /// They are closed at once
    Reset,
}

/// Open connections of services.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Connections {
    pub(crate) services: Vec<String>,
    /// Those that are steered, of services that are disabled; else those that are not and should be, of enabled ones.
    pub(crate) steered: bool,
    /// Whether they shall be closed.
    #[serde(default)]
    pub(crate) reset: bool,
}

/// Open connections that were found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Found {
    pub(crate) existing: Vec<OfService>,
}

/// Those of one service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OfService {
    pub(crate) service: String,
    /// Whether they are steered, as the service's are no longer; else they are not, as the service's are now.
    pub(crate) steered: bool,
    /// How many there were.
    pub(crate) count: usize,
    /// How many of them were closed.
    pub(crate) reset: usize,
    /// How many are still open.
    pub(crate) open: usize,
    /// The first of them, as many as [`MAX_LISTED`].
    pub(crate) connections: Vec<Connection>,
    /// [`MAX_LISTED`].
    pub(crate) listed_at_most: usize,
}

/// Connections of one service that are listed, not only counted.
pub(crate) const MAX_LISTED: usize = 100;

/// A connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Connection {
    pub(crate) local: SocketAddr,
    /// The other end, as the service's socket has it: the proxy's of one that is steered by hooks.
    pub(crate) remote: SocketAddr,
}

/// Services were enabled or disabled, or would be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Changed {
    pub(crate) services: Vec<ChangedService>,
    /// What the user should know: a unit that does not run, a proxy that is not there.
    pub(crate) notes: Vec<String>,
    /// Connections that are open from before; none where they do not tell, and of services that are only observed.
    pub(crate) existing: Option<Vec<OfService>>,
    /// Of a dry run: what would be added (`+`) and removed (`-`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) difference: Option<String>,
    /// Programs of others' that run beside those of the services.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) beside: Vec<Beside>,
}

/// A program of somebody else's at a hook of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Beside {
    pub(crate) service: String,
    /// What the kernel calls it.
    pub(crate) program: u32,
    /// What its maker calls it. To ask for it takes a privilege that the daemon has given up; the command line has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    pub(crate) hook: String,
    /// Where it is attached: the service's, or one above.
    pub(crate) cgroup: String,
    pub(crate) order: Order,
}

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ChangedService {
    pub(crate) service: String,
    /// False where it was so already.
    pub(crate) changed: bool,
}

/// Read the configuration anew.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Reload {
    /// Whether nothing shall be done, only told.
    pub(crate) dry_run: bool,
}

/// The configuration was read anew, or would be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Reloaded {
    /// False of a dry run.
    pub(crate) reloaded: bool,
    /// What was, or would be, added (`+`) and removed (`-`); empty where nothing differs.
    pub(crate) difference: String,
    /// What the user should know.
    pub(crate) notes: Vec<String>,
}

/// A process that shall be steered, with its descendants or with its cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Process {
    pub(crate) pid: u32,
}

/// A process is steered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Joined {
    pub(crate) cgroup: String,
    pub(crate) notes: Vec<String>,
}

/// Whose decisions shall be told, and how many.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Watch {
    /// Every service's, where it is empty.
    pub(crate) services: BTreeSet<String>,
    /// At most so many in a second.
    pub(crate) rate: u32,
}

impl Watch {
    /// How many are told in a second where nobody says.
    pub(crate) const RATE: u32 = 1000;
    /// The highest rate: beyond it a reader does not keep up.
    pub(crate) const MAX_RATE: u32 = 100_000;
}

/// One line of what those see who watch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Watched {
    Decision(Decision),
    /// So many decisions were not told.
    Dropped {
        dropped: u64,
    },
}

/// What was decided of a connection, or of a DNS query.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Decision {
    /// RFC 3339, UTC.
    pub(crate) time: String,
    pub(crate) service: String,
    /// In the initial namespace.
    pub(crate) pid: u32,
    /// Name of the thread that connected, as the kernel knows it: at most 15 bytes.
    pub(crate) command: String,
    pub(crate) uid: u32,
    /// Where it was going.
    pub(crate) destination: SocketAddr,
    pub(crate) transport: Transport,
    pub(crate) decision: Outcome,
    /// What policy says of the destination, and why.
    pub(crate) rule: String,
}

/// What it is a decision on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Transport {
    Tcp,
    Udp,
}

/// What was decided; [`Counters`] count the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    Steered,
    PassedByRule,
    PassedProxyAbsent,
    Refused,
    Error,
    Observed,
    Query,
}

/// Why a request was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Refusal {
    pub(crate) error: String,
    /// Programs of others' because of which it was, as the kernel calls them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) programs: Vec<u32>,
}
