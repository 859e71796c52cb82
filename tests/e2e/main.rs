//! End-to-end tests: real programs, steered by the real agent through the real proxy, each scenario in a network
//! namespace and a subtree of cgroups of its own.
//!
//! They need root, cgroup2, bpffs, and the programs that `cargo xtask setup` installs.

#![expect(clippy::expect_used, reason = "what a scenario expects fails the test, with a message")]

/// Makes of each scenario one test for every mode of steering.
macro_rules! scenarios {
    ($($scenario:ident),+ $(,)?) => {
        mod ebpf {
            $(
                #[test]
                fn $scenario() {
                    let sandbox = tests::Sandbox::new(stringify!($scenario), tests::Mode::Ebpf);
                    super::$scenario(&sandbox);
                }
            )+
        }
    };
}

mod capture;
mod clients;
mod configuration;
mod control;
mod daemon;
mod exec;
mod families;
mod harness;
mod listener;
mod liveness;
mod systemd;
mod tunnel;
mod undo;
