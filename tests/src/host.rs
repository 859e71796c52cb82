//! What the tests need of the machine, and where the binaries under test are.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{LazyLock, OnceLock};

use nix::mount::{MsFlags, mount};
use nix::unistd::Uid;

/// The folder in which bpffs is mounted.
pub(crate) const BPFFS: &str = "/sys/fs/bpf";

/// Where programs are looked for: the same on every machine, whatever the caller's environment.
pub(crate) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The mount point of the whole cgroup2 hierarchy. On a hybrid machine it is not /sys/fs/cgroup, and another mount
/// may show a part of it only, so the root decides.
pub(crate) static CGROUP2: LazyLock<PathBuf> = LazyLock::new(|| {
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("read /proc/self/mountinfo");
    let found = mounts.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        (filesystem.starts_with("cgroup2 ") && root == "/").then(|| PathBuf::from(point))
    });
    found.expect("the end-to-end tests need cgroup2: mount -t cgroup2 none /sys/fs/cgroup/unified")
});

/// Fails with what to do about it where the machine lacks what every sandbox needs.
pub(crate) fn require() {
    assert!(Uid::effective().is_root(), "the end-to-end tests need root: namespaces, cgroups, eBPF");
    assert!(CGROUP2.is_dir());
    mount_bpffs();
}

fn mount_bpffs() {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("read /proc/self/mounts");
    if mounts.lines().any(|line| line.split(' ').nth(1) == Some(BPFFS)) {
        return;
    }
    mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), None::<&str>)
        .expect("the end-to-end tests need bpffs: mount -t bpf bpf /sys/fs/bpf");
}

static BINARIES: OnceLock<PathBuf> = OnceLock::new();

/// Says where the binaries are, which the demo and the benches have built elsewhere than they run.
pub fn use_binaries(folder: PathBuf) {
    BINARIES.set(folder).expect("the binaries' folder is not in use yet");
}

/// Where the binaries under test and the tests' own peer are: in `MESH_REDIRECT_BIN_DIR`, else where cargo put this
/// test.
pub fn binaries() -> &'static Path {
    BINARIES.get_or_init(|| env::var_os("MESH_REDIRECT_BIN_DIR").map_or_else(built_here, PathBuf::from))
}

/// A binary of this workspace.
pub fn binary(name: &str) -> PathBuf {
    let path = binaries().join(name);
    assert!(path.is_file(), "{} is missing: cargo build --workspace --profile fast", path.display());
    path
}

/// `target/PROFILE`, seen from `target/PROFILE/deps/e2e-HASH`.
fn built_here() -> PathBuf {
    let test = env::current_exe().expect("the path of this test");
    test.ancestors().nth(2).map(Path::to_path_buf).expect("the test lies in target/PROFILE/deps")
}

/// Runs one of the machine's tools to its end.
///
/// # Panics
/// When it cannot be started or fails.
#[track_caller]
pub(crate) fn tool(program: &str, args: &[&str]) -> String {
    let shown = format!("{program} {}", args.join(" "));
    let output = Command::new(program).args(args).env("PATH", PATH).output();
    let output = output.unwrap_or_else(|error| panic!("{shown}: {error}"));
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{shown}: {}: {complaint}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}
