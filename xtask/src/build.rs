//! Cargo, for everything here.

use anyhow::{Context as _, ensure};
use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

/// What tests, demo and benches run: the profile's name, which is its folder's too.
pub(crate) const PROFILE: &str = "fast";

const AGENT: &str = "mesh-redirect";

/// The root of the workspace.
pub(crate) fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// Where cargo puts the binaries of a profile.
pub(crate) fn binaries(profile: &str) -> PathBuf {
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from);
    workspace().join(target).join(profile)
}

/// A call of the Cargo that runs this.
pub(crate) fn cargo(args: &[&str]) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(workspace());
    command
}

/// Builds every binary in the profile that tests, demo and benches run; `features` are what tests need besides.
pub(crate) fn everything(features: &[&str]) -> anyhow::Result<PathBuf> {
    run(cargo(&[&["build", "--workspace", "--locked", "--profile", PROFILE], features].concat()))?;
    Ok(binaries(PROFILE))
}

/// Builds the agent with another version of its ABI too, for the tests that go from one to the other: cargo keeps what it
/// compiled of both, and puts the one that is built last where binaries are found.
pub(crate) fn changed_abi() -> anyhow::Result<()> {
    let features = ["--features", "agent/changed-abi,agent/fault-points"];
    run(cargo(&[&["build", "--workspace", "--locked", "--profile", PROFILE], &features[..]].concat()))?;
    let (from, to) = (binaries(PROFILE), binaries(PROFILE).join("changed-abi"));
    fs::create_dir_all(&to).with_context(|| format!("make {}", to.display()))?;
    let copy = to.join(AGENT);
    // By another name first: a test that was left running may have it open.
    let next = to.join("next");
    fs::copy(from.join(AGENT), &next)
        .and_then(|_| fs::rename(&next, &copy))
        .with_context(|| format!("copy {AGENT} to {}", copy.display()))
}

/// Runs a command to its end; what it says goes to the terminal.
pub(crate) fn run(mut command: Command) -> anyhow::Result<()> {
    let status = command.status().with_context(|| format!("start {command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}

/// Does a part of a task under a heading, and tells how long it took.
pub(crate) fn step<T>(title: &str, part: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    println!("── {title}");
    let begun = Instant::now();
    let done = part()?;
    println!("   {title}: {:.1} s", begun.elapsed().as_secs_f64());
    Ok(done)
}

/// Fails where the caller is not root, whom namespaces and eBPF need.
pub(crate) fn require_root(task: &str) -> anyhow::Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "{task} needs root, for network namespaces, cgroups and eBPF: run it as root, with cargo in PATH"
    );
    Ok(())
}
