//! The daemon gives up what it does not need, for good: whoever finds a hole in it finds little behind. It does so by
//! itself, whether a unit has confined it already or not.
//!
//! All of it is a thread's own, and handed down: the one thread that there is confines itself, and with it every thread
//! and process that comes later. The commands stay as they are: they do their one thing and end.

mod calls;
mod capabilities;
mod files;

use crate::{config::Paths, mode::Mode};
use nix::{errno::Errno, sys::prctl};
use std::{io, path::Path};

/// Why the daemon cannot be confined, though the kernel has all that it takes.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfineError {
    #[error("confine the daemon: renounce new privileges: {0}")]
    NewPrivileges(Errno),
    #[error("confine the daemon: give up capabilities: {0}")]
    Capabilities(#[from] caps::errors::CapsError),
    #[error("confine the daemon: make {path}, in which it may write: {cause}", path = .path.display())]
    Directory { path: std::path::PathBuf, cause: io::Error },
    #[error(
        "confine the daemon: with landlock: {0}; what runs it has to allow that (for a unit, `SystemCallFilter=` of the landlock calls)"
    )]
    Files(#[from] landlock::RulesetError),
    #[error(
        "confine the daemon: with seccomp: {0}; what runs it has to allow that (for a unit, `SystemCallFilter=seccomp`)"
    )]
    Calls(#[from] seccompiler::Error),
}

/// Confines this thread and what it starts. What the kernel lacks is said, and done without.
pub(crate) fn daemon(paths: &Paths, mode: Mode, cgroup_root: &Path) -> Result<(), ConfineError> {
    // Without it only those who are privileged anyway may confine themselves.
    prctl::set_no_new_privs().map_err(ConfineError::NewPrivileges)?;
    files::make(paths, mode)?;
    if !files::confine(&files::areas(paths, mode, cgroup_root))? {
        tracing::warn!(
            "not confined by landlock, which is not to be had here: the daemon may write where root may"
        );
    }
    capabilities::reduce()?;
    if !calls::confine()? {
        tracing::warn!("not confined by seccomp, which is not to be had here");
    }
    Ok(())
}

/// What a daemon is confined by on this kernel, or what is missing.
pub(crate) fn possible() -> Result<String, String> {
    let means = [("landlock", files::are_confinable()), ("seccomp", calls::are_confinable())];
    let missing: Vec<&str> =
        means.into_iter().filter(|(_, is_there)| !is_there).map(|(name, _)| name).collect();
    if missing.is_empty() {
        Ok("the daemon gives up all but what it needs, by capabilities, landlock and seccomp".to_owned())
    } else {
        Err(format!("this kernel has no {}, or none that is switched on", missing.join(" and no ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, path::PathBuf, process::Command, thread};

    fn paths(dir: &Path) -> Paths {
        let below = |name: &str| dir.join(name);
        let paths = Paths {
            run: below("run"),
            state: below("state"),
            pins: below("pins"),
            hosts: below("etc/hosts"),
            hooks: below("hooks.d"),
        };
        for dir in [&paths.run, &paths.state, &below("etc"), &paths.hooks] {
            fs::create_dir_all(dir).unwrap();
        }
        fs::write(&paths.hosts, "127.0.0.1 localhost\n").unwrap();
        paths
    }

    /// Runs something in a thread that is confined as the daemon is; the others stay as they are.
    fn confined<T: Send + 'static>(dir: &Path, mode: Mode, inside: impl FnOnce() -> T + Send + 'static) -> T {
        let paths = paths(dir);
        let root = crate::probe::cgroup2_mount().unwrap_or_else(|_| PathBuf::from("/nonexistent"));
        let inside = move || {
            daemon(&paths, mode, &root).unwrap();
            inside()
        };
        thread::spawn(inside).join().unwrap()
    }

    fn status() -> String {
        fs::read_to_string("/proc/thread-self/status").unwrap()
    }

    #[test]
    fn only_what_is_its_own_can_be_written() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_owned();
        let written = confined(dir.path(), Mode::Ebpf, move || {
            let write = |name: &str| fs::write(root.join(name), "x").is_ok();
            let shell = |script: &str| {
                let status = Command::new("sh").args(["-c", script]).current_dir(&root).status();
                status.unwrap().success()
            };
            (
                ["run/a", "state/a", "hooks.d/a"].map(write),
                ["a", "etc/hosts"].map(write),
                [shell("echo > state/b"), shell("echo > b"), shell("cat etc/hosts > /dev/null")],
            )
        });
        assert_eq!(written, ([true; 3], [false; 2], [true, false, true]));
    }

    #[test]
    fn a_hosts_file_is_written_in_its_mode_alone() {
        for (mode, written) in [(Mode::Hosts, true), (Mode::Nftables, false)] {
            let dir = tempfile::tempdir().unwrap();
            let etc = dir.path().join("etc");
            let outcome = confined(dir.path(), mode, move || {
                let (next, hosts) = (etc.join("hosts.next"), etc.join("hosts"));
                let made = fs::write(&next, "x").and_then(|()| fs::rename(&next, &hosts));
                (made.is_ok(), fs::write(&hosts, "y").is_ok())
            });
            assert_eq!(outcome, (written, written), "{mode}");
        }
    }

    #[test]
    fn nothing_but_what_steering_takes_can_be_asked_of_the_kernel() {
        let dir = tempfile::tempdir().unwrap();
        let refused = confined(dir.path(), Mode::Ebpf, || {
            use nix::{sched::CloneFlags, sys::socket};
            let socket =
                |family, kind| socket::socket(family, kind, socket::SockFlag::empty(), None).map(drop).err();
            let stream = socket::SockType::Stream;
            let wanted =
                [socket::AddressFamily::Unix, socket::AddressFamily::Inet, socket::AddressFamily::Inet6];
            (
                nix::sched::unshare(CloneFlags::CLONE_NEWUSER).err(),
                nix::unistd::chroot("/").err(),
                socket(socket::AddressFamily::Vsock, stream),
                wanted.map(|family| socket(family, stream)),
                // A thread and a process are still to be had.
                thread::spawn(|| ()).join().is_ok(),
                Command::new("true").status().unwrap().success(),
            )
        });
        let eperm = Some(Errno::EPERM);
        assert_eq!(refused, (eperm, eperm, eperm, [None; 3], true, true));
    }

    #[test]
    fn a_confined_thread_and_its_children_have_no_more_than_is_needed() {
        let dir = tempfile::tempdir().unwrap();
        let of_child = || Command::new("cat").arg("/proc/self/status").output().unwrap().stdout;
        let said = confined(dir.path(), Mode::Ebpf, move || {
            [status(), String::from_utf8(of_child()).unwrap(), thread::spawn(status).join().unwrap()]
        });
        for status in said {
            let value = |name: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
                line.trim().to_owned()
            };
            let bits = |name| u64::from_str_radix(&value(name), 16).unwrap();
            let needed = 1 << 39 | 1 << 38 | 1 << 12 | 1 << 1;
            for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
                assert_eq!(bits(set) & !needed, 0, "{set} {status}");
            }
            assert_eq!((value("NoNewPrivs:"), value("Seccomp:")), ("1".to_owned(), "2".to_owned()));
        }
    }
}
