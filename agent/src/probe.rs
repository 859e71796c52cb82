//! Plain facts about this host.

use crate::{
    config::Config,
    mode::{Facts, Mode, Wanted},
    redirect::{ebpf, hosts, nftables},
};
use std::{
    fs, io,
    net::IpAddr,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

/// A host on which nothing can be steered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProbeError {
    /// The list of mounts cannot be read.
    #[error("read /proc/self/mountinfo: {0}")]
    Mounts(io::Error),
    /// Nothing is mounted.
    #[error(
        "no cgroup2 file system is mounted; `mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified` (or /sys/fs/cgroup) makes one"
    )]
    NoCgroup2,
}

/// What each mode of steering finds here.
pub(crate) fn facts(config: &Config) -> Facts {
    facts_of(config, |_| true)
}

/// The same of those modes alone that the configuration leaves to choose from: it takes a while to try one.
pub(crate) fn facts_of_wanted(config: &Config) -> Facts {
    facts_of(config, |mode| [Wanted::Auto, Wanted::Only(mode)].contains(&config.mode))
}

fn facts_of(config: &Config, is_wanted: impl Fn(Mode) -> bool) -> Facts {
    let wanted =
        |mode| if is_wanted(mode) { Ok(()) } else { Err("not tried: another mode is configured".to_owned()) };
    let root = cgroup2_mount().map_err(|error| error.to_string());
    let pins = &config.paths.pins;
    let bpffs = || match is_on_bpffs(pins) {
        true => Ok(()),
        false => Err(format!("{} is on no BPF file system", pins.display())),
    };
    let ebpf = || ebpf::try_load().map_err(|error| error.to_string());
    let nftables = |root: &PathBuf| nftables::try_rules(root).map_err(|error| error.to_string());
    Facts {
        ebpf: wanted(Mode::Ebpf)
            .and_then(|()| root.as_ref().map(drop).map_err(Clone::clone))
            .and_then(|()| bpffs())
            .and_then(|()| ebpf()),
        nftables: wanted(Mode::Nftables)
            .and_then(|()| root.as_ref().map_err(Clone::clone).and_then(nftables)),
        hosts: hosts::try_file(&config.paths.hosts).map_err(|error| error.to_string()),
        hosts_is_mount: is_mount(&config.paths.hosts),
    }
}

fn is_mount(path: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounts.lines().filter_map(mount_point).any(|point| point == path)
}

/// Where the cgroup2 hierarchy is mounted.
pub(crate) fn cgroup2_mount() -> Result<PathBuf, ProbeError> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(ProbeError::Mounts)?;
    let candidates = mounts_of(&mounts, "cgroup2");
    // Some hosts mount a part of the hierarchy too; the root of the whole has inode 1.
    let whole = candidates.iter().find(|dir| fs::metadata(dir).is_ok_and(|metadata| metadata.ino() == 1));
    whole.or(candidates.first()).cloned().ok_or(ProbeError::NoCgroup2)
}

/// The host's resolver, where it has none but on localhost, whose queries no mode captures.
pub(crate) fn resolver_on_localhost() -> Option<IpAddr> {
    only_on_localhost(&fs::read_to_string("/etc/resolv.conf").ok()?)
}

/// Of the text of resolv.conf(5).
fn only_on_localhost(text: &str) -> Option<IpAddr> {
    let server = |line: &str| line.strip_prefix("nameserver")?.trim().parse::<IpAddr>().ok();
    let servers: Vec<IpAddr> = text.lines().filter_map(server).collect();
    servers.first().filter(|_| servers.iter().all(IpAddr::is_loopback)).copied()
}

/// Whether a path, or the nearest directory above it that exists, is on a BPF file system.
pub(crate) fn is_on_bpffs(path: &Path) -> bool {
    let existing = path.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/"));
    nix::sys::statfs::statfs(existing).is_ok_and(|fs| fs.filesystem_type() == nix::sys::statfs::BPF_FS_MAGIC)
}

/// The kernel's version, as it prints it and as numbers.
pub(crate) fn kernel() -> io::Result<(String, (u32, u32))> {
    let release = nix::sys::utsname::uname()?.release().to_string_lossy().into_owned();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|part| part.parse().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    Ok((release, version))
}

/// Names of the capabilities among those that are needed and this process does not have.
pub(crate) fn missing_capabilities() -> io::Result<Vec<&'static str>> {
    let status = fs::read_to_string("/proc/self/status")?;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0);
    Ok(missing(effective))
}

fn missing(effective: u64) -> Vec<&'static str> {
    const SYS_ADMIN: u32 = 21;
    // linux/capability.h; the last two came out of CAP_SYS_ADMIN in 5.8, which still includes them. Without CAP_PERFMON
    // the verifier takes the programs for an unprivileged user's, and refuses them or makes them slow.
    let needed = [("CAP_NET_ADMIN", 12), ("CAP_PERFMON", 38), ("CAP_BPF", 39)];
    let has = |bit: u32| effective & (1 << bit) != 0 || effective & (1 << SYS_ADMIN) != 0;
    needed.into_iter().filter(|&(_, bit)| !has(bit)).map(|(name, _)| name).collect()
}

/// Mount points of a file system's type (proc_pid_mountinfo(5)).
fn mounts_of(mountinfo: &str, kind: &str) -> Vec<PathBuf> {
    let is_of_kind = |line: &&str| {
        let filesystem = line.split_once(" - ").map(|(_, filesystem)| filesystem);
        filesystem.and_then(|filesystem| filesystem.split(' ').next()) == Some(kind)
    };
    mountinfo.lines().filter(is_of_kind).filter_map(mount_point).collect()
}

fn mount_point(line: &str) -> Option<PathBuf> {
    Some(PathBuf::from(unescaped(line.split(' ').nth(4)?)))
}

/// Blanks, tabs, newlines and backslashes of a mount point are written in octal.
fn unescaped(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found_by_type_whatever_optional_fields_they_have() {
        let text = "30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - tmpfs tmpfs ro\n\
                    31 30 0:27 / /sys/fs/cgroup/unified rw shared:10 master:1 - cgroup2 cgroup2 rw,nsdelegate\n\
                    32 30 0:28 / /mnt/a\\040b rw - cgroup2 none rw\n\
                    broken line\n";
        assert_eq!(mounts_of(text, "cgroup2"), [Path::new("/sys/fs/cgroup/unified"), Path::new("/mnt/a b")]);
    }

    #[test]
    fn a_resolver_elsewhere_makes_one_on_localhost_no_matter() {
        let found = |text: &str| only_on_localhost(text).map(|address| address.to_string());
        assert_eq!(found("# x\nnameserver 127.0.0.53\noptions edns0\n").as_deref(), Some("127.0.0.53"));
        assert_eq!(found("nameserver ::1\nnameserver 127.0.0.1\n").as_deref(), Some("::1"));
        assert_eq!(found("nameserver 127.0.0.1\nnameserver 10.0.0.2\n"), None);
        assert_eq!(found("search example.com\n"), None);
    }

    #[test]
    fn sys_admin_stands_for_the_others_that_came_out_of_it() {
        assert_eq!(missing(0), ["CAP_NET_ADMIN", "CAP_PERFMON", "CAP_BPF"]);
        assert_eq!(missing(1 << 12), ["CAP_PERFMON", "CAP_BPF"]);
        assert!(missing(1 << 21).is_empty());
        assert!(missing(1 << 12 | 1 << 38 | 1 << 39).is_empty());
    }

    #[test]
    fn a_mount_point_is_read_as_the_kernel_writes_it_whatever_it_is_called() {
        let escaped = |path: &str| {
            path.replace('\\', "\\134").replace(' ', "\\040").replace('\t', "\\011").replace('\n', "\\012")
        };
        let seeds: [&[u8]; 3] = [b"/sys/fs/cgroup", b"/mnt/a b\tc\nd\\040", b"/ - cgroup2 x"];
        fuzz::damaged!(seeds, ["\\", "\\040", "\\134", "040", " - ", "cgroup2"], |input: &[u8]| {
            let path = String::from_utf8_lossy(input);
            let line = format!("31 30 0:27 / {} rw shared:10 - cgroup2 cgroup2 rw", escaped(&path));
            if !path.contains(['\r', '\n']) || !path.is_empty() {
                assert_eq!(mount_point(&line), Some(PathBuf::from(&*path)));
            }
            let _whatever_it_is = (mounts_of(&path, "cgroup2"), only_on_localhost(&path));
        });
    }
}
