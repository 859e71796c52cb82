//! Finds what building and testing need, and installs what is missing, as far as this machine lets it.

use crate::{build, ebpf_toolchain};
use anyhow::{Context as _, bail, ensure};
use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    thread,
};

/// Root file systems with systemd, for tests to boot, by the name of their release of Debian. The number goes up with every
/// change of what is in them.
pub(crate) const SYSTEMD_ROOTS: &str = "/var/cache/mesh-redirect/systemd-roots-3";
/// With systemd 247, 252 and 257.
const RELEASES: [&str; 3] = ["bullseye", "bookworm", "trixie"];

/// What shall be possible afterwards; each includes the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum For {
    /// Compiling everything.
    Build,
    /// The demo and the benches.
    Demo,
    /// All tests.
    Tests,
}

/// Commands that are called, with Debian's packages that have them.
const TOOLS: &[(For, &str, &str)] = &[
    (For::Build, "cc", "gcc libc6-dev"),
    (For::Build, "pkg-config", "pkg-config"),
    (For::Build, "/usr/include/libnftnl/set.h", "libnftnl-dev"),
    (For::Build, "/usr/include/libmnl/libmnl.h", "libmnl-dev"),
    (For::Demo, "ip", "iproute2"),
    (For::Demo, "curl", "curl"),
    (For::Demo, "setpriv", "util-linux"),
    (For::Demo, "bpftool", "bpftool"),
    (For::Demo, "nft", "nftables"),
    (For::Tests, "iptables-legacy", "iptables"),
    (For::Tests, "python3", "python3"),
    (For::Tests, "dig", "bind9-dnsutils"),
    (For::Tests, "node", "nodejs"),
    (For::Tests, "readelf", "binutils"),
    (For::Tests, "dnsmasq", "dnsmasq-base"),
    (For::Tests, "hey", "hey"),
    (For::Tests, "javac", "openjdk-17-jdk-headless"),
    (For::Tests, "musl-gcc", "musl-tools"),
    (For::Tests, "mmdebstrap", "mmdebstrap"),
    (For::Tests, "eatmydata", "eatmydata"),
    (For::Tests, "systemd-nspawn", "systemd-container"),
    (For::Tests, "runc", "runc"),
    (For::Tests, "patchelf", "patchelf"),
    (For::Tests, "groff", "groff"),
];

/// Debian's compiler with the sources of `core`, and what bpf-linker is built with.
const COMPILER: &str = "rustc-web cargo-web rust-web-src";
const LLVM: &str = "llvm-22-dev libpolly-22-dev libzstd-dev zlib1g-dev";
const LLVM_BIN: &str = "/usr/lib/llvm-22/bin";
const BPF_LINKER: &str = "0.13.0";

/// Makes what is wanted possible.
///
/// # Errors
/// Says what is missing where it cannot be installed here.
pub(crate) fn ensure(purpose: For) -> anyhow::Result<()> {
    let packages: Vec<&str> = TOOLS
        .iter()
        .filter(|(least, tool, _)| *least <= purpose && find(tool).is_none())
        .map(|(_, _, packages)| *packages)
        .collect();
    apt_install(&packages.join(" "))?;
    ebpf_toolchain()?;
    if purpose == For::Tests {
        rust_components()?;
        systemd_roots()?;
    }
    Ok(())
}

fn ebpf_toolchain() -> anyhow::Result<()> {
    let Err(missing) = ebpf_toolchain::find() else { return Ok(()) };
    println!("   the eBPF toolchain is not complete; installing it takes one to three minutes");
    // Also when rustup's nightly has the sources: it may be newer than the LLVM that the linker is built with.
    apt_install(COMPILER)?;
    if missing.linker {
        apt_install(LLVM)?;
        install_linker()?;
    }
    ebpf_toolchain::find().map(drop).context("after everything was installed")
}

fn install_linker() -> anyhow::Result<()> {
    println!("   compiling bpf-linker {BPF_LINKER} against Debian's LLVM");
    let options = ["--no-default-features", "--features", "llvm-22"];
    let mut cargo = build::cargo(&["install", "bpf-linker", "--version", BPF_LINKER, "--locked", "--quiet"]);
    let path = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths([PathBuf::from(LLVM_BIN)].into_iter().chain(env::split_paths(&path)))?;
    cargo.args(options).env("PATH", path).env_remove("CARGO_TARGET_DIR");
    build::run(cargo)
}

fn rust_components() -> anyhow::Result<()> {
    for component in ["rustfmt", "clippy"] {
        let command = if component == "rustfmt" { "fmt" } else { component };
        if quietly(build::cargo(&[command, "--version"])).is_ok() {
            continue;
        }
        println!("   adding {component}");
        let mut rustup = Command::new("rustup");
        rustup.args(["component", "add", component]).current_dir(build::workspace());
        quietly(rustup).with_context(|| {
            format!("`cargo {command}` is missing, and only rustup can add it: install Rust with rustup")
        })?;
    }
    Ok(())
}

/// All at once: each waits for the network most of the time.
fn systemd_roots() -> anyhow::Result<()> {
    thread::scope(|scope| {
        let making = RELEASES.map(|release| scope.spawn(|| systemd_root(release)));
        let made = making.into_iter().map(|making| making.join().unwrap_or_else(|_| bail!("it panicked")));
        made.collect()
    })
}

/// Complete or absent: it is made beside its place and renamed.
fn systemd_root(release: &str) -> anyhow::Result<()> {
    let root = Path::new(SYSTEMD_ROOTS).join(release);
    if root.is_dir() {
        return Ok(());
    }
    println!("   making a root file system with systemd at {}", root.display());
    let unfinished = root.with_extension("unfinished");
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished).with_context(|| format!("remove {}", unfinished.display()))?;
    }
    fs::create_dir_all(SYSTEMD_ROOTS).with_context(|| format!("make {SYSTEMD_ROOTS}"))?;
    let mut mmdebstrap = Command::new("eatmydata");
    mmdebstrap.args(["mmdebstrap", "--quiet", "--variant=minbase"]);
    mmdebstrap.arg("--include=systemd,systemd-sysv,dbus,iproute2,curl,procps,nftables");
    mmdebstrap.arg(release).arg(&unfinished);
    quietly(mmdebstrap)?;
    fs::rename(&unfinished, &root).with_context(|| format!("rename {}", unfinished.display()))
}

fn apt_install(packages: &str) -> anyhow::Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    ensure!(find("apt-get").is_some(), "missing, by the names of Debian's packages: {packages}");
    ensure!(
        nix::unistd::geteuid().is_root(),
        "missing packages: run `apt-get install --no-install-recommends {packages}` as root"
    );
    println!("   installing {packages}");
    let apt_get = |args: &[&str]| {
        let mut apt_get = Command::new("apt-get");
        apt_get.args(["--quiet", "--yes"]).args(args).env("DEBIAN_FRONTEND", "noninteractive");
        quietly(apt_get).map(drop)
    };
    apt_get(&["update"])?;
    let install: Vec<&str> =
        ["install", "--no-install-recommends"].into_iter().chain(packages.split(' ')).collect();
    apt_get(&install)
}

/// Runs a command that says nothing unless it fails.
fn quietly(mut command: Command) -> anyhow::Result<Output> {
    let output = command.output().with_context(|| format!("start {command:?}"))?;
    if !output.status.success() {
        let said = [output.stdout, output.stderr].concat();
        bail!("{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&said).trim_end());
    }
    Ok(output)
}

/// Where a command is; root's are looked for too, which are not in everybody's PATH.
fn find(tool: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let roots = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    env::split_paths(&path).chain(roots).map(|dir| dir.join(tool)).find(|path| path.is_file())
}
