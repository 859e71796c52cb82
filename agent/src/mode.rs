//! Which way of steering this host gets: a pure choice over what was found of it. Nothing falls back anywhere else.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A way of steering.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Mode {
    /// Connect hooks on the services' cgroups.
    Ebpf,
    /// A table of nf_tables.
    Nftables,
    /// Names in a hosts file.
    Hosts,
}

/// The best first.
pub(crate) const ALL: [Mode; 3] = [Mode::Ebpf, Mode::Nftables, Mode::Hosts];

/// What each mode can and cannot do, in the order of [`ALL`]. The README has the same table.
pub(crate) const CAPABILITIES: [(&str, [&str; ALL.len()]); 14] = [
    ("TCP to names and to addresses, IPv4, IPv6 and IPv4-mapped", ["yes", "yes", "names only, IPv4"]),
    ("static binaries, any language and C library", ["yes", "yes", "where they read the hosts file"]),
    ("a service is", ["a cgroup", "a cgroup or a user", "every process of the host"]),
    ("ports", ["all", "all", "those that the proxy listens on"]),
    ("the proxy is gone", ["known at once", "known within half a second", "known within half a second"]),
    (
        "the daemon is gone",
        [
            "nothing changes",
            "as if the proxy were gone, after 3 s",
            "nothing changes, also when the proxy goes too",
        ],
    ),
    (
        "a unit or a container restarts: steered from its first connection",
        ["yes", "while the daemon runs", "yes"],
    ),
    ("the application sees the peer it asked for", ["yes", "yes", "a loopback address"]),
    ("the proxy knows the service of a connection", ["yes", "yes", "no"]),
    ("connections are counted", ["yes", "yes", "by the proxy alone"]),
    ("other network namespaces than the daemon's", ["yes", "no", "no"]),
    (
        "DNS: queries go to the proxy, which answers for its names",
        ["yes", "yes, where virtual addresses have a route", "no need: the names are in the file"],
    ),
    (
        "services that share an address and a port are told apart",
        ["by HTTP, or by name with DNS", "by HTTP, or by name with DNS", "by name"],
    ),
    ("other UDP", ["no", "no", "no"]),
];

/// What the configuration asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// The best that this host can do.
    Auto,
    /// This one or none.
    Only(Mode),
}

/// What was found of each mode: that it works here, or why not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) ebpf: Result<(), String>,
    pub(crate) nftables: Result<(), String>,
    pub(crate) hosts: Result<(), String>,
    /// Whether the hosts file is a mount, as in a container: it is written in place then.
    pub(crate) hosts_is_mount: bool,
}

/// A mode, and why it is this one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Choice {
    pub(crate) mode: Mode,
    /// One line.
    pub(crate) reason: String,
}

/// No mode is possible, or not the one that is asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}; `mesh-redirect check` says more")]
pub(crate) struct Impossible(String);

impl Facts {
    pub(crate) fn of(&self, mode: Mode) -> &Result<(), String> {
        match mode {
            Mode::Ebpf => &self.ebpf,
            Mode::Nftables => &self.nftables,
            Mode::Hosts => &self.hosts,
        }
    }
}

/// Chooses.
pub(crate) fn choose(wanted: Wanted, facts: &Facts) -> Result<Choice, Impossible> {
    if let Wanted::Only(mode) = wanted {
        return match facts.of(mode) {
            Ok(()) => Ok(Choice { mode, reason: "the configuration asks for it".to_owned() }),
            Err(why) => Err(Impossible(format!("`mode: {mode}` is not possible here: {why}"))),
        };
    }
    let mut refused = Vec::new();
    for mode in ALL {
        match facts.of(mode) {
            Ok(()) if refused.is_empty() => {
                return Ok(Choice { mode, reason: "the best there is, and this host can do it".to_owned() });
            }
            Ok(()) => return Ok(Choice { mode, reason: refused.join("; ") }),
            Err(why) => refused.push(format!("no {mode}: {why}")),
        }
    }
    Err(Impossible(format!("nothing can be steered on this host: {}", refused.join("; "))))
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ebpf => "ebpf",
            Self::Nftables => "nftables",
            Self::Hosts => "hosts",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_readme_has_the_table() {
        let readme = include_str!("../../README.md");
        for (what, [ebpf, nftables, hosts]) in CAPABILITIES {
            let row = format!("| {what} | {ebpf} | {nftables} | {hosts} |");
            assert!(readme.contains(&row), "{row}");
        }
    }

    #[test]
    fn the_best_that_works_is_chosen_and_says_why_the_better_ones_are_not() {
        let (yes, no) = (Ok(()), |why: &str| Err(why.to_owned()));
        let cases = [
            (Wanted::Auto, [yes.clone(), yes.clone(), yes.clone()], Ok((Mode::Ebpf, "this host can do it"))),
            (Wanted::Auto, [yes.clone(), no("x"), no("y")], Ok((Mode::Ebpf, "this host can do it"))),
            (
                Wanted::Auto,
                [no("bpf: EPERM"), yes.clone(), yes.clone()],
                Ok((Mode::Nftables, "no ebpf: bpf: EPERM")),
            ),
            (Wanted::Auto, [no("a"), no("b"), yes.clone()], Ok((Mode::Hosts, "no ebpf: a; no nftables: b"))),
            (Wanted::Auto, [no("a"), no("b"), no("c")], Err("no ebpf: a; no nftables: b; no hosts: c")),
            (
                Wanted::Only(Mode::Nftables),
                [yes.clone(), yes.clone(), yes.clone()],
                Ok((Mode::Nftables, "asks for it")),
            ),
            (
                Wanted::Only(Mode::Hosts),
                [yes.clone(), yes.clone(), yes.clone()],
                Ok((Mode::Hosts, "asks for it")),
            ),
            (
                Wanted::Only(Mode::Ebpf),
                [no("too old"), yes.clone(), yes],
                Err("`mode: ebpf` is not possible here: too old"),
            ),
        ];
        for (wanted, [ebpf, nftables, hosts], expected) in cases {
            let facts = Facts { ebpf, nftables, hosts, hosts_is_mount: false };
            match (choose(wanted, &facts), expected) {
                (Ok(choice), Ok((mode, why))) => {
                    assert_eq!(choice.mode, mode, "{facts:?}");
                    assert!(choice.reason.contains(why), "{choice:?}");
                }
                (Err(error), Err(why)) => assert!(error.to_string().contains(why), "{error}"),
                (got, expected) => panic!("{wanted:?} {facts:?}: {got:?}, expected {expected:?}"),
            }
        }
    }
}
