//! A whole machine: systemd booted in a container, on the sandbox's network and below its cgroup.

use std::env;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;

use crate::binaries::bring_libraries;
use crate::cgroup;
use crate::host::binaries;
use crate::process::{Finished, Process};
use crate::sandbox::{Place, Sandbox};
use crate::wait::eventually;

const BOOT: Duration = Duration::from_secs(60);

/// A container with cgroup2 alone, that knows nothing of a systemd outside, and whose root may load eBPF programs and confine
/// itself.
const NSPAWN: [&str; 9] = [
    "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1",
    "systemd-nspawn",
    "--boot",
    "--quiet",
    "--console=pipe",
    "--register=no",
    "--keep-unit",
    "--capability=all",
    "--system-call-filter=bpf landlock_create_ruleset landlock_add_rule landlock_restrict_self",
];

/// A release of Debian, which is to say of systemd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    /// With systemd 247, and with an older C library than the machine's that builds the binaries under test.
    Bullseye,
    /// With systemd 252.
    Bookworm,
    /// With systemd 257.
    Trixie,
}

impl Release {
    fn name(self) -> &'static str {
        match self {
            Self::Bullseye => "bullseye",
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
        }
    }

    /// The version of its systemd.
    pub fn systemd(self) -> u32 {
        match self {
            Self::Bullseye => 247,
            Self::Bookworm => 252,
            Self::Trixie => 257,
        }
    }
}

/// What is mounted on a machine's /: the file system that `cargo xtask setup` made, under a layer in memory that takes
/// every change and is thrown away.
#[derive(Debug)]
pub struct Root {
    layer: PathBuf,
    binaries: PathBuf,
}

impl Root {
    /// A fresh file system of a machine that was never booted.
    ///
    /// # Panics
    /// When `MESH_REDIRECT_SYSTEMD_ROOTS` names no folder with it.
    pub fn fresh(sandbox: &Sandbox, release: Release) -> Self {
        let bases = env::var("MESH_REDIRECT_SYSTEMD_ROOTS").expect(
            "MESH_REDIRECT_SYSTEMD_ROOTS names a folder of root file systems with systemd: cargo xtask setup makes it",
        );
        let base = format!("{bases}/{}", release.name());
        let mut root = Self { layer: sandbox.path("machine"), binaries: binaries().to_owned() };
        fs::create_dir(&root.layer).expect("make a folder to mount on");
        mount(Some("tmpfs"), &root.layer, Some("tmpfs"), MsFlags::empty(), None::<&str>)
            .expect("mount a tmpfs");
        let [upper, work, path] = ["upper", "work", "root"].map(|name| root.layer.join(name));
        for folder in [&upper, &work, &path] {
            fs::create_dir(folder).expect("make a folder in memory");
        }
        let layers = format!("lowerdir={base},upperdir={},workdir={}", upper.display(), work.display());
        mount(Some("overlay"), &path, Some("overlay"), MsFlags::empty(), Some(layers.as_str()))
            .unwrap_or_else(|error| panic!("lay a layer over {base}: {error}"));
        // The container shares the machine's kernel, whose settings are none of its business.
        symlink("/dev/null", root.path().join("etc/systemd/system/systemd-sysctl.service"))
            .expect("mask a unit");
        if release == Release::Bullseye {
            root.binaries = sandbox.path("binaries");
            bring_libraries(&root.path(), &root.binaries);
        }
        root
    }

    /// Binaries of this workspace that run there.
    pub fn binaries(&self) -> &Path {
        &self.binaries
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        self.layer.join("root")
    }

    /// Writes a file.
    pub fn write(&self, file: &str, text: &str) {
        let path = self.path().join(file);
        fs::write(&path, text).unwrap_or_else(|error| panic!("write {}: {error}", path.display()));
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        if let Err(error) = unmount(&self.layer) {
            eprintln!("cannot unmount {}: {error}", self.layer.display());
        }
    }
}

/// Unmounts what [`Root::fresh`] mounts, one on top of the other.
fn unmount(layer: &Path) -> nix::Result<()> {
    umount2(layer, MntFlags::MNT_DETACH)
}

/// Unmounts what a killed test run left mounted in a sandbox's folder, if anything.
pub(crate) fn sweep(folder: &Path) {
    let _ = unmount(&folder.join("machine"));
    forget(&folder.file_name().unwrap_or_default().to_string_lossy());
}

/// A running machine. Its network is the sandbox's; its cgroups lie below the sandbox's; its bpffs is its own.
#[derive(Debug)]
pub struct Machine<'s> {
    sandbox: &'s Sandbox,
    nspawn: Process,
    leader: String,
    root: Root,
}

impl<'s> Machine<'s> {
    /// Boots it, and waits until systemd has started what it starts.
    #[track_caller]
    pub fn boot(sandbox: &'s Sandbox, root: Root) -> Self {
        let mut nspawn = sandbox
            .program(Place::Machine, "env")
            .args(NSPAWN)
            .arg(&format!("--machine={}", hostname(sandbox)))
            .arg(&format!("--directory={}", root.path().display()))
            .arg(&format!("--network-namespace-path={}", sandbox.network().display()))
            .serve(sandbox.path("machine.log"));
        nspawn.wait_until(|nspawn| init(nspawn).is_some());
        let leader = init(&nspawn).expect("the first process of the container");
        let machine = Self { sandbox, nspawn, leader, root };
        eventually("the machine has booted", BOOT, || machine.has_booted());
        // systemd mounts it on a machine, but not in a container.
        machine.run("mount -t bpf bpf /sys/fs/bpf").ok();
        machine
    }

    /// A unit that fails, such as one that a container has no use for, is no reason to wait.
    fn has_booted(&self) -> bool {
        let state = self.run("systemctl is-system-running").stdout;
        ["running", "degraded"].contains(&state.trim())
    }

    /// Runs a shell command as the machine's root.
    #[track_caller]
    pub fn run(&self, command: &str) -> Finished {
        let namespaces = ["--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root"];
        let nsenter = self.sandbox.program(Place::Outside, "nsenter").args(["--target", &self.leader]);
        nsenter.args(namespaces).args(["--", "sh", "-c", command]).run()
    }

    /// Its file system, seen from outside.
    pub fn root(&self) -> &Root {
        &self.root
    }
}

impl Drop for Machine<'_> {
    fn drop(&mut self) {
        self.nspawn.signal(Signal::SIGKILL);
        for path in self.sandbox.cgroups().iter().filter(|path| path.ends_with(Place::Machine.cgroup())) {
            cgroup::remove(path);
        }
        forget(&hostname(self.sandbox));
    }
}

/// nspawn keeps a folder for each container, which it removes unless it is killed.
fn forget(hostname: &str) {
    let _ = fs::remove_dir_all(Path::new("/run/systemd/nspawn/propagate").join(hostname));
}

/// A host name has no underscores and at most 64 characters; the temporary folder's name will do.
fn hostname(sandbox: &Sandbox) -> String {
    sandbox.path("").file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The container's first process is the only child that nspawn keeps; it is up when it has a cgroup of its own.
fn init(nspawn: &Process) -> Option<String> {
    let pid = nspawn.pid();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    let child = children.split_whitespace().next()?.to_owned();
    let cgroups = fs::read_to_string(format!("/proc/{child}/cgroup")).ok()?;
    cgroups.trim_end().ends_with("/init.scope").then_some(child)
}
