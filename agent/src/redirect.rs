//! Making the kernel agree with what is wanted.

pub(crate) mod ebpf;
pub(crate) mod hosts;
pub(crate) mod nftables;

use crate::{
    config::{Config, Failure},
    mode::Mode,
    rules::Entry,
};
use agent_ebpf::Counters;
use ebpf::Ebpf;
pub(crate) use ebpf::MapUsage;
use hosts::Hosts;
use nftables::Nftables;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs, io,
    net::{IpAddr, SocketAddr},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

/// A way of steering, over what it keeps in the kernel.
#[derive(Debug)]
pub(crate) enum Redirect {
    Ebpf(Ebpf),
    Nftables(Nftables),
    Hosts(Hosts),
}

/// What went wrong between the agent and the kernel.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// With eBPF.
    #[error(transparent)]
    Ebpf(#[from] ebpf::Error),
    /// With nf_tables.
    #[error(transparent)]
    Nftables(#[from] nftables::Error),
    /// With a hosts file.
    #[error(transparent)]
    Hosts(#[from] hosts::Error),
}

impl Redirect {
    /// One that takes over whatever an earlier one of its mode has left in the kernel.
    pub(crate) fn new(mode: Mode, config: &Config, cgroup_root: &Path) -> Self {
        match mode {
            Mode::Ebpf => Self::Ebpf(Ebpf::new(config.paths.pins.clone(), config.proxy.admin)),
            Mode::Nftables => Self::Nftables(Nftables::new(cgroup_root.to_owned(), config.proxy.port)),
            Mode::Hosts => Self::Hosts(Hosts::new(config.paths.hosts.clone(), config.proxy.admin)),
        }
    }

    /// Makes the kernel steer what is desired and nothing else. May be repeated. True where something was changed.
    pub(crate) fn apply(&mut self, desired: &Desired) -> Result<bool, Error> {
        match self {
            Self::Ebpf(ebpf) => Ok(ebpf.apply(desired)?),
            Self::Nftables(nftables) => Ok(nftables.apply(desired)?),
            Self::Hosts(hosts) => Ok(hosts.apply(desired)?),
        }
    }

    /// Whether a service is attached to a cgroup that is there and not among those that are desired for it.
    pub(crate) fn is_attached_elsewhere(&self, desired: &Desired) -> Result<bool, Error> {
        match self {
            Self::Ebpf(ebpf) => Ok(ebpf.is_attached_elsewhere(desired)?),
            // Here the daemon alone attaches.
            Self::Nftables(_) | Self::Hosts(_) => Ok(false),
        }
    }

    /// Whether anything of this mode's is there, also where nothing is steered by it.
    pub(crate) fn is_there(&mut self) -> Result<bool, Error> {
        match self {
            Self::Ebpf(ebpf) => Ok(ebpf.is_there()),
            Self::Nftables(nftables) => Ok(nftables.is_there()?),
            Self::Hosts(hosts) => Ok(hosts.is_there()?),
        }
    }

    /// Removes everything of this mode's, at once.
    pub(crate) fn remove(&mut self) -> Result<(), Error> {
        match self {
            Self::Ebpf(ebpf) => Ok(ebpf.remove()?),
            Self::Nftables(nftables) => Ok(nftables.remove()?),
            Self::Hosts(hosts) => Ok(hosts.remove()?),
        }
    }

    /// What `apply` makes of what is desired, line by line.
    pub(crate) fn describe(&self, desired: &Desired) -> String {
        match self {
            Self::Ebpf(_) => ebpf::describe(desired),
            Self::Nftables(nftables) => nftables.describe(desired),
            Self::Hosts(hosts) => hosts.describe(desired),
        }
    }

    /// What the kernel says is there of what is desired.
    pub(crate) fn status(&mut self, desired: &Desired) -> Result<Status, Error> {
        match self {
            Self::Ebpf(ebpf) => Ok(ebpf.status()?),
            Self::Nftables(nftables) => Ok(nftables.status(desired)?),
            Self::Hosts(hosts) => Ok(hosts.status(desired)?),
        }
    }

    /// How full the maps in the kernel are, where there are any.
    pub(crate) fn usage(&mut self) -> Result<Vec<MapUsage>, Error> {
        match self {
            Self::Ebpf(ebpf) => Ok(ebpf.usage()?),
            Self::Nftables(_) | Self::Hosts(_) => Ok(Vec::new()),
        }
    }

    /// What of the kernel or of the host is not as it is desired, and not as it was left; `apply` makes it anew afterwards.
    pub(crate) fn drift(&mut self, desired: &Desired, ready: Ready) -> Result<Vec<Drift>, Error> {
        match self {
            Self::Ebpf(ebpf) => Ok(ebpf.drift(desired)?),
            Self::Nftables(nftables) => Ok(nftables.drift(desired)?),
            Self::Hosts(hosts) => Ok(hosts.drift(ready.proxy)?),
        }
    }

    /// Goes on with a proxy that says elsewhere whether it is ready.
    pub(crate) fn set_proxy_admin(&mut self, admin: SocketAddr) {
        match self {
            Self::Ebpf(ebpf) => ebpf.set_proxy_admin(admin),
            Self::Nftables(_) => {}
            Self::Hosts(hosts) => hosts.set_proxy_admin(admin),
        }
    }

    /// Programs of others' at the hooks of services' cgroups, where they have hooks.
    pub(crate) fn others(&self, cgroups: &[Option<Cgroup>]) -> Vec<Vec<ebpf::Other>> {
        let Self::Ebpf(ebpf) = self else { return vec![Vec::new(); cgroups.len()] };
        let (ours, mut hooks) = (ebpf.programs(), ebpf::Hooks::default());
        let mut beside = |cgroup: &Cgroup| ebpf::others_beside(&mut hooks, &cgroup.dir, &ours);
        cgroups.iter().map(|cgroup| cgroup.as_ref().map(&mut beside).unwrap_or_default()).collect()
    }

    /// Says whether the proxy is ready, to modes in which the kernel does not see for itself.
    pub(crate) fn keep_alive(&mut self, ready: Ready) -> Result<(), Error> {
        match self {
            Self::Ebpf(_) => Ok(()),
            Self::Nftables(nftables) => Ok(nftables.keep_alive(ready)?),
            Self::Hosts(hosts) => Ok(hosts.keep_alive(ready.proxy)?),
        }
    }
}

/// Whether the proxy takes connections, and queries, each for IPv4 and for IPv6.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ready {
    pub(crate) proxy: [bool; 2],
    pub(crate) dns: [bool; 2],
}

/// Everything that shall be steered, whole: a mode makes it so and removes whatever else of ours it finds.
#[derive(Clone, Debug, Default)]
pub(crate) struct Desired {
    /// The proxy's cgroup, when it exists now.
    pub(crate) proxy: Option<Cgroup>,
    /// The services.
    pub(crate) services: Vec<Service>,
    /// Where virtual addresses lead when they are not steered; none unless a service's DNS is captured.
    pub(crate) virtual_addresses: BTreeMap<IpAddr, SocketAddr>,
}

/// One service that shall be steered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Service {
    /// Never zero, never used for another service while this one is enabled.
    pub(crate) id: u32,
    /// At most [`agent_ebpf::NAME_LEN`] - 1 bytes.
    pub(crate) name: String,
    pub(crate) failure: Failure,
    /// Whether what would be steered is only counted.
    pub(crate) observe: bool,
    pub(crate) proxy_port: u16,
    /// Where the proxy serves DNS, if the service's queries shall go there.
    pub(crate) dns_port: Option<u16>,
    /// Shared by services of the same policy.
    pub(crate) entries: Arc<[Entry]>,
    /// Where its processes are now; none for a unit that does not run.
    pub(crate) scopes: Vec<Cgroup>,
    /// Whose processes are its processes, whatever cgroup they are in; eBPF knows them by the user's slice alone.
    pub(crate) users: Vec<u32>,
}

/// A cgroup that exists, or did a moment ago.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Cgroup {
    /// Its directory.
    pub(crate) dir: PathBuf,
    /// The kernel's id: another one when a cgroup of the same path is made anew.
    pub(crate) id: u64,
}

impl Cgroup {
    /// Whether it is still there, and no other one in its place.
    pub(crate) fn exists(&self) -> bool {
        Self::open(&self.dir).is_ok_and(|now| now.id == self.id)
    }

    /// The cgroup that is at a directory now.
    pub(crate) fn open(dir: &Path) -> io::Result<Self> {
        // The inode number of a cgroup's directory is its id (kernfs, 64-bit hosts).
        Ok(Self { dir: dir.to_owned(), id: fs::metadata(dir)?.ino() })
    }

    /// Its id and those of all below it.
    pub(crate) fn ids(&self) -> BTreeSet<u64> {
        let mut ids = BTreeSet::from([self.id]);
        let below = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        for dir in below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            ids.extend(Self::open(&dir.path()).map(|cgroup| cgroup.ids()).unwrap_or_default());
        }
        ids
    }

    /// Whether processes are in it or below it.
    pub(crate) fn is_populated(&self) -> bool {
        let events = fs::read_to_string(self.dir.join("cgroup.events"));
        events.is_ok_and(|events| events.lines().any(|line| line == "populated 1"))
    }
}

impl fmt::Display for Cgroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.dir.display().fmt(f)
    }
}

/// Something that is not as it is desired.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Drift {
    /// Whose it is, where it is one service's.
    pub(crate) service: Option<String>,
    /// In words.
    pub(crate) finding: String,
}

impl Drift {
    /// Of one service.
    fn of(service: &str, finding: String) -> Self {
        Self { service: Some(service.to_owned()), finding }
    }

    /// Of all of them.
    fn of_all(finding: String) -> Self {
        Self { service: None, finding }
    }
}

/// What the kernel says is there.
#[derive(Clone, Debug, Default)]
pub(crate) struct Status {
    /// Ids of the cgroups to which the proxy's side is attached.
    pub(crate) proxies: Vec<u64>,
    /// What is known of each service.
    pub(crate) services: Vec<ServiceStatus>,
    /// Other ABI versions whose place was taken, and that are still there for connections which they steered.
    pub(crate) retiring: Vec<u32>,
}

/// What the kernel says of one service.
#[derive(Clone, Debug)]
pub(crate) struct ServiceStatus {
    /// [`Service::id`].
    pub(crate) id: u32,
    /// Ids of the cgroups to which every one of the service's programs is attached.
    pub(crate) cgroups: Vec<u64>,
    /// Sums over all CPUs.
    pub(crate) counters: Counters,
}
