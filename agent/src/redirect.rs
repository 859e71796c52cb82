//! Making the kernel agree with what is wanted.

pub(crate) mod ebpf;

use crate::{config::Failure, rules::Entry};
use agent_ebpf::Counters;
use std::{
    fmt, fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

/// Everything that shall be steered, whole: a mode makes it so and removes whatever else of ours it finds.
#[derive(Clone, Debug, Default)]
pub(crate) struct Desired {
    /// The proxy's cgroup, when it exists now.
    pub(crate) proxy: Option<Cgroup>,
    /// The services.
    pub(crate) services: Vec<Service>,
}

/// One service that shall be steered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Service {
    /// Never zero, never used for another service while this one is enabled.
    pub(crate) id: u32,
    /// At most [`agent_ebpf::NAME_LEN`] - 1 bytes.
    pub(crate) name: String,
    pub(crate) failure: Failure,
    pub(crate) proxy_port: u16,
    pub(crate) entries: Vec<Entry>,
    /// Where its processes are now; none for a unit that does not run.
    pub(crate) scopes: Vec<Cgroup>,
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
    /// The cgroup that is at a directory now.
    pub(crate) fn open(dir: &Path) -> io::Result<Self> {
        // The inode number of a cgroup's directory is its id (kernfs, 64-bit hosts).
        Ok(Self { dir: dir.to_owned(), id: fs::metadata(dir)?.ino() })
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

/// What the kernel says is there.
#[derive(Clone, Debug, Default)]
pub(crate) struct Status {
    /// Ids of the cgroups to which the proxy's side is attached.
    pub(crate) proxies: Vec<u64>,
    /// What is known of each service.
    pub(crate) services: Vec<ServiceStatus>,
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
