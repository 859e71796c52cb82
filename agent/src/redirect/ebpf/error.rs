//! What can go wrong between the agent and the kernel, each with what was being done and to what.

use super::{Cgroup, Order, Other};
use std::{io, path::PathBuf};

/// See the module.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The object cannot be loaded.
    #[error("load the eBPF programs: {0}{hint}", hint = load_hint(.0))]
    Load(Box<aya::EbpfError>),
    /// The verifier refused a program, or the kernel does not know its type.
    #[error("load the eBPF program {name}: {}", refusal(.cause))]
    Program {
        /// Which.
        name: &'static str,
        /// Why.
        cause: Box<aya::programs::ProgramError>,
    },
    /// A map cannot be opened, read or written.
    #[error("{action} map {name}: {cause}")]
    Map {
        /// "open", "read", "write".
        action: &'static str,
        /// Which.
        name: &'static str,
        /// Why.
        cause: Box<aya::maps::MapError>,
    },
    /// A map has no room.
    #[error(
        "write map {name}: it is full, at its limit of {limit} entries; disable services or write fewer and wider rules"
    )]
    Full {
        /// Which.
        name: &'static str,
        /// How many entries it holds.
        limit: u32,
    },
    /// A program cannot be attached.
    #[error("attach {program} to {cgroup}: {cause}{hint}", hint = attach_hint(.cause))]
    Attach {
        /// Which.
        program: &'static str,
        /// To what.
        cgroup: Cgroup,
        /// Why.
        cause: io::Error,
    },
    /// Another program is in the way.
    #[error(
        "attach {program} to {cgroup}: program {id}, which is not ours, {how}; have it attached so that others may be there too (BPF_F_ALLOW_MULTI, `multi` of bpftool), or set `mode: nftables`",
        id = .by.id, how = how(.by)
    )]
    Held {
        /// Which.
        program: &'static str,
        /// To what.
        cgroup: Cgroup,
        /// The other one.
        by: Other,
    },
    /// A cgroup vanished before everything was attached to it.
    #[error("attach {program} to {cgroup}: the cgroup is gone")]
    Gone {
        /// Which.
        program: &'static str,
        /// To what.
        cgroup: Cgroup,
    },
    /// A pin cannot be made, opened or removed.
    #[error("{action} {path}: {cause}{hint}", path = .path.display(), hint = pin_hint(.cause))]
    Pin {
        /// "create", "open", "remove", "list".
        action: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// Pins of another ABI version are there, and something that no version would have put among them.
    #[error(
        "{path} is nothing that mesh-redirect of ABI version {ours} knows, so it cannot take over from version {version}; remove it if somebody else put it there, else run `mesh-redirect cleanup` of the version that made it",
        path = .path.display(), ours = agent_ebpf::ABI_VERSION
    )]
    Unknown {
        /// What.
        path: PathBuf,
        /// Whose pins they are.
        version: u32,
    },
    /// The programs that are to be attached are those of another ABI version, and one is for nobody knows which hook.
    #[error(
        "attach {path}: mesh-redirect of ABI version {ours} does not know for which hook it is; the daemon is of another version than this command: restart it (`systemctl restart mesh-redirect`)",
        path = .path.display(), ours = agent_ebpf::ABI_VERSION
    )]
    UnknownProgram {
        /// Its pin.
        path: PathBuf,
    },
}

fn load_hint(error: &aya::EbpfError) -> &'static str {
    let text = error.to_string();
    if text.contains("pin") {
        "; is the pin directory on a BPF file system? `mount -t bpf bpf /sys/fs/bpf`"
    } else {
        ""
    }
}

/// The verifier tells every step it took, and at the end what it did not like.
fn refusal(error: &aya::programs::ProgramError) -> String {
    const LAST_LINES: usize = 5;
    let aya::programs::ProgramError::LoadError { io_error, verifier_log } = error else {
        return error.to_string();
    };
    let log = verifier_log.to_string();
    let mut last: Vec<&str> = log.lines().rev().filter(|line| !line.is_empty()).take(LAST_LINES).collect();
    last.reverse();
    let hint = match io_error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => "; are CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON there?",
        _ => "",
    };
    let said = if last.is_empty() { String::new() } else { format!("; the verifier: {}", last.join(" | ")) };
    format!("{io_error}{hint}{said}")
}

fn how(other: &Other) -> String {
    let place = format!("{} of {}", other.hook, other.dir.display());
    match other.order {
        Order::Displaced => {
            format!("is at {place} so that those below take its place: it would not run there any more")
        }
        _ => format!("holds {place} for itself"),
    }
}

fn attach_hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM) => {
            "; another program may hold this hook for itself (`bpftool cgroup show` names it), or CAP_BPF and CAP_NET_ADMIN are missing"
        }
        _ => "",
    }
}

fn pin_hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM) => {
            "; is it on a BPF file system? `mount -t bpf bpf /sys/fs/bpf`, or set paths.pins"
        }
        Some(libc::EACCES) => "; only root can do this",
        _ => "",
    }
}
