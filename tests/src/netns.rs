//! Network namespaces, and the little network every scenario lives in.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;

use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns};

use crate::host::tool;

/// The address an application knows, with a server of its own behind it.
pub const ORIGIN: &str = "10.77.0.10";
/// The same, in IPv6.
pub const ORIGIN_V6: &str = "fd77::10";
/// The two instances that the proxy knows.
pub const INSTANCES: [&str; 2] = ["10.77.0.2", "10.77.0.3"];

/// Where the other end's resolvers are.
pub const RESOLVERS: [&str; 3] = ["10.77.0.53", "10.77.0.54", "fd77::53"];

/// `ip netns add` prepares /run/netns for itself, which two of them must not do at once.
static ADDING: Mutex<()> = Mutex::new(());

/// A named network namespace, removed when dropped.
#[derive(Debug)]
pub(crate) struct Namespace {
    name: String,
}

impl Namespace {
    /// A namespace with nothing but loopback.
    pub(crate) fn create(name: String) -> Self {
        let _one = ADDING.lock().unwrap_or_else(PoisonError::into_inner);
        tool("ip", &["netns", "add", &name]);
        let namespace = Self { name };
        namespace.ip(&["link", "set", "lo", "up"]);
        namespace
    }

    /// Where it is mounted.
    pub(crate) fn path(&self) -> PathBuf {
        path(&self.name)
    }

    /// Joins the two by a veth pair: 10.77.0.1 and fd77::1 here; instances and origin there.
    pub(crate) fn join(&self, peer: &Self) {
        self.ip(&["link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", &peer.name]);
        self.address("10.77.0.1/24", "fd77::1/64");
        for host in [2, 3, 10, 53, 54] {
            peer.address(&format!("10.77.0.{host}/24"), &format!("fd77::{host}/64"));
        }
        self.ip(&["link", "set", "eth0", "up"]);
        peer.ip(&["link", "set", "eth0", "up"]);
        // Most hosts have a default route; what is virtual would take it. It leads to the other end, and no further.
        self.ip(&["route", "add", "241.0.0.0/8", "via", ORIGIN]);
        self.ip(&["route", "add", "fdb2:6c1e:9d04::/48", "via", ORIGIN_V6]);
    }

    /// Without duplicate address detection, an IPv6 address is usable at once.
    fn address(&self, v4: &str, v6: &str) {
        self.ip(&["address", "add", v4, "dev", "eth0"]);
        self.ip(&["address", "add", v6, "dev", "eth0", "nodad"]);
    }

    fn ip(&self, args: &[&str]) {
        tool("ip", &[&["-n", &self.name], args].concat());
    }

    /// Does something inside: on a thread of its own, since a thread is what belongs to a namespace. What it spawns
    /// stays inside. (`ip netns exec` would also mount a new /sys, and hide the cgroups.)
    pub(crate) fn enter<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> T {
        let file = File::open(self.path()).expect("open the network namespace");
        thread::scope(|scope| {
            let visit = scope.spawn(|| {
                setns(file, CloneFlags::CLONE_NEWNET).expect("enter the network namespace");
                inside()
            });
            visit.join().expect("what was done inside the network namespace")
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        remove(&self.name);
    }
}

/// What `ip netns delete` does.
pub(crate) fn remove(name: &str) {
    let path = path(name);
    let unmounted = umount2(&path, MntFlags::MNT_DETACH).map_err(io::Error::from);
    if let Err(error) = unmounted.and_then(|()| fs::remove_file(&path)) {
        eprintln!("cannot remove the network namespace {name}: {error}");
    }
}

fn path(name: &str) -> PathBuf {
    Path::new("/run/netns").join(name)
}
