//! End-to-end tests: real programs, steered by the real agent through the real proxy, each scenario in a network
//! namespace and a subtree of cgroups of its own.
//!
//! They need root, cgroup2, bpffs, and the programs that `cargo xtask setup` installs.

#![expect(clippy::expect_used, reason = "what a scenario expects fails the test, with a message")]

/// Makes of each scenario one test for every mode that the kernel carries out, for every mode, or for the one that is
/// named.
macro_rules! scenarios {
    (only ebpf: $($scenario:ident),+ $(,)?) => {
        $(
            mod $scenario {
                scenarios!(@test $scenario, ebpf, Ebpf);
            }
        )+
    };
    (only nftables: $($scenario:ident),+ $(,)?) => {
        $(
            mod $scenario {
                scenarios!(@test $scenario, nftables, Nftables);
            }
        )+
    };
    (only hosts: $($scenario:ident),+ $(,)?) => {
        $(
            mod $scenario {
                scenarios!(@test $scenario, hosts, Hosts);
            }
        )+
    };
    (everywhere: $($scenario:ident),+ $(,)?) => {
        $(
            mod $scenario {
                scenarios!(@test $scenario, ebpf, Ebpf);
                scenarios!(@test $scenario, nftables, Nftables);
                scenarios!(@test $scenario, hosts, Hosts);
            }
        )+
    };
    (@test $scenario:ident, $name:ident, $mode:ident) => {
        #[test]
        fn $name() {
            super::$scenario(&tests::Sandbox::new(stringify!($scenario), tests::Mode::$mode));
        }
    };
    ($($scenario:ident),+ $(,)?) => {
        $(
            mod $scenario {
                scenarios!(@test $scenario, ebpf, Ebpf);
                scenarios!(@test $scenario, nftables, Nftables);
            }
        )+
    };
}

mod capture;
mod cleanup;
mod clients;
mod configuration;
mod confined;
mod containers;
mod control;
mod daemon;
mod differential;
mod dns;
mod enable;
mod exec;
mod existing;
mod explain;
mod families;
mod faults;
mod foreign;
mod harness;
mod hosts;
mod json;
mod listener;
mod liveness;
mod maps;
mod metrics;
mod model;
mod names;
mod nftables;
mod origins;
mod paths;
mod reference;
mod reload;
mod routable;
mod scope;
mod status;
mod systemd;
mod tunnel;
mod undo;
mod upgrades;
mod watch;
