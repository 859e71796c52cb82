//! The world of one scenario.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::thread::sleep;
use std::time::Duration;

use tempfile::TempDir;

use crate::cgroup::{self, Cgroup};
use crate::host;
use crate::netns::Namespace;
use crate::process::Program;
use crate::sweep;

/// How connections are steered. Every scenario runs once for each mode, so that the modes cannot drift apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Connect hooks at the service's cgroup.
    Ebpf,
    /// A table of nf_tables.
    Nftables,
    /// Names in a hosts file.
    Hosts,
}

/// Where in the sandbox a program runs: a network namespace and a cgroup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Next to the proxy, in the cgroup that agent.yaml knows as the service `shop`.
    Shop,
    /// Next to the proxy, in the cgroup that agent.yaml knows as the service `stock`.
    Stock,
    /// Next to the proxy, in a cgroup for a service that only some scenarios know: `cart`.
    Cart,
    /// Next to the service, in the proxy's cgroup.
    Proxy,
    /// Next to the service, in a cgroup that no configuration names.
    Outside,
    /// Where a booted machine has its cgroups.
    Machine,
    /// On the other end of the wire.
    Peer,
}

impl Mode {
    /// Those that the kernel carries out.
    pub const IN_KERNEL: [Self; 2] = [Self::Ebpf, Self::Nftables];

    /// Whether it counts what it steers, and steers connections to addresses: a hosts file does neither.
    pub fn is_in_kernel(self) -> bool {
        self != Self::Hosts
    }

    /// As agent.yaml writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ebpf => "ebpf",
            Self::Nftables => "nftables",
            Self::Hosts => "hosts",
        }
    }
}

impl Place {
    pub(crate) fn cgroup(self) -> &'static str {
        match self {
            Self::Shop => "shop",
            Self::Stock => "stock",
            Self::Cart => "cart",
            Self::Proxy => "proxy",
            Self::Outside => "outside",
            Self::Machine => "machine",
            Self::Peer => "peer",
        }
    }
}

/// The world of one scenario, which bears the scenario's name. Fields are dropped in order: what runs, then what it
/// ran in.
#[derive(Debug)]
pub struct Sandbox {
    /// How connections are steered here.
    pub mode: Mode,
    cgroup: Cgroup,
    pins: Pins,
    here: Namespace,
    peer: Namespace,
    folder: TempDir,
}

impl Sandbox {
    /// A world with nothing running in it.
    pub fn new(scenario: &str, mode: Mode) -> Self {
        static PREPARED: Once = Once::new();
        PREPARED.call_once(|| {
            host::require();
            sweep::sweep();
        });
        let name = sweep::name(&format!("{}-{scenario}", mode.name()));
        let here = Namespace::create(name.clone());
        let peer = Namespace::create(format!("{name}.peer"));
        here.join(&peer);
        let pins = Pins(Path::new(host::BPFFS).join(&name));
        let cgroup = Cgroup::create(&name);
        let folder = folder();
        fs::write(folder.path().join("hosts"), "127.0.0.1 localhost\n").expect("write a hosts file");
        Self { mode, cgroup, pins, here, peer, folder }
    }

    /// A program of the machine's, to be started in `place`.
    pub fn program(&self, place: Place, program: impl AsRef<Path>) -> Program<'_> {
        let namespace = if place == Place::Peer { &self.peer } else { &self.here };
        Program::new(namespace, &self.cgroup.below(place.cgroup()), program.as_ref())
    }

    /// The tests' own program, to be started in `place`.
    pub fn peer(&self, place: Place) -> Program<'_> {
        self.program(place, host::binary("peer"))
    }

    /// The same, next to the proxy, in a cgroup of another name.
    pub fn peer_in(&self, cgroup: &str) -> Program<'_> {
        self.program_in(cgroup, host::binary("peer"))
    }

    /// A program of the machine's, likewise.
    pub fn program_in(&self, cgroup: &str, program: impl AsRef<Path>) -> Program<'_> {
        Program::new(&self.here, &self.cgroup.below(cgroup), program.as_ref())
    }

    /// A program of the machine's that looks names up in the sandbox's hosts file, and then as a resolv.conf of its own
    /// says.
    pub fn resolving(&self, place: Place, resolver: &str, program: &str) -> Program<'_> {
        self.resolving_with(place, resolver, "timeout:2 attempts:2", program)
    }

    /// With other options (resolv.conf(5)).
    pub fn resolving_with(&self, place: Place, resolver: &str, options: &str, program: &str) -> Program<'_> {
        let file = self.path(&format!("resolv.conf-{resolver}-{options}"));
        fs::write(&file, format!("nameserver {resolver}\noptions {options}\n")).expect("write resolv.conf");
        let shell =
            r#"mount --bind "$0" /etc/resolv.conf && mount --bind "$1" /etc/hosts && shift && exec "$@""#;
        let files = [file, self.hosts()].map(|file| file.display().to_string());
        self.program(place, "unshare").args(["--mount", "sh", "-c", shell]).args(files).arg(program)
    }

    /// A program that finds itself on a host with systemd: one whose units are all loaded, and run in cgroups of their names
    /// in this sandbox. What is written for them goes to a folder of the sandbox's, `units`, and what is below /var/lib to
    /// `var`.
    pub fn with_systemd(&self, place: Place, program: impl AsRef<Path>) -> Program<'_> {
        let folders = ["bin", "units", "var"].map(|name| self.path(name));
        let [bin, ..] = &folders;
        if !bin.exists() {
            folders.iter().for_each(|folder| fs::create_dir(folder).expect("make a folder"));
            let systemctl = bin.join("systemctl");
            fs::write(&systemctl, SYSTEMCTL.replace("CGROUP", &cgroup::name(self.cgroup.path())))
                .expect("write a systemctl");
            fs::set_permissions(&systemctl, Permissions::from_mode(0o755)).expect("make it a program");
        }
        let folders = folders.map(|folder| folder.display().to_string());
        let shell = self.program(place, "unshare").args(["--mount", "sh", "-ec", WITH_SYSTEMD]).args(folders);
        shell.arg(&program.as_ref().display().to_string())
    }

    /// Connects, or does whatever else, where the service and the proxy are.
    pub fn enter<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> T {
        self.here.enter(inside)
    }

    /// Waits until the kernel knows what became of the proxy: connect hooks see it at each connection, a table is told by
    /// the daemon.
    pub fn settle(&self) {
        if self.mode != Mode::Ebpf {
            sleep(Duration::from_secs(1));
        }
    }

    /// Where the network namespace of service and proxy is.
    pub fn network(&self) -> PathBuf {
        self.here.path()
    }

    /// A file or folder of this scenario's own.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Where the agent pins what must outlive it.
    pub fn pins(&self) -> &Path {
        &self.pins.0
    }

    /// The hosts file that the agent may edit.
    pub fn hosts(&self) -> PathBuf {
        self.path("hosts")
    }

    /// What no other sandbox has in the names of its services.
    pub fn mark(&self) -> String {
        format!("{}-{}", self.mode.name(), std::process::id())
    }

    /// The name of a place's cgroup, as agent.yaml writes it.
    pub fn cgroup(&self, place: Place) -> String {
        cgroup::name(&self.cgroup.below(place.cgroup()))
    }

    /// The name of another cgroup, as agent.yaml writes it.
    pub fn cgroup_at(&self, cgroup: &str) -> String {
        cgroup::name(&self.cgroup.below(cgroup))
    }

    /// Every cgroup of this sandbox.
    pub(crate) fn cgroups(&self) -> Vec<PathBuf> {
        self.cgroup.subtree()
    }
}

/// What it is asked here.
const SYSTEMCTL: &str = r#"#!/bin/sh
[ "$1" = show ] || exit 0
while [ "$1" != -- ]; do shift; done
shift
for unit; do printf 'LoadState=loaded\nControlGroup=CGROUP/%s\n\n' "${unit%.service}"; done
"#;

const WITH_SYSTEMD: &str = r#"
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/system
mount --bind "$1" /etc/systemd/system
mount --bind "$2" /var/lib
PATH="$0:$PATH"
shift 2
exec "$@"
"#;

/// The unprivileged proxy reads its configuration and its own program from here.
fn folder() -> TempDir {
    let folder = sweep::temporary_folder().expect("make a temporary folder");
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755))
        .expect("open the temporary folder to all");
    folder
}

/// A folder on bpffs, which the agent makes and the guard removes.
#[derive(Debug)]
struct Pins(PathBuf);

impl Drop for Pins {
    fn drop(&mut self) {
        if self.0.exists() {
            fs::remove_dir_all(&self.0)
                .unwrap_or_else(|error| eprintln!("remove {}: {error}", self.0.display()));
        }
    }
}
