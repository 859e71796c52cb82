//! The harness of the end-to-end tests: guards that let a scenario run the real binaries against the real kernel
//! while nothing else on the machine notices.
//!
//! | guard | what it holds |
//! |---|---|
//! | [`Sandbox`] | two network namespaces joined by a veth pair, a subtree of cgroups, a folder on bpffs, a temporary folder |
//! | [`Agent`], [`Proxy`], [`Upstream`] | one running program each, ready when the guard is there |
//! | [`Mesh`] | all three of them, as most scenarios want them |
//! | [`Container`] | a container that a real runtime starts |
//! | [`Machine`] | a whole machine: systemd booted in a container |
//!
//! A guard undoes itself when it is dropped, also after a panic, and then shows the log of what it ran. What a killed
//! run left behind is swept away by the next one. A guard that cannot do its part fails the test on the spot.

#![expect(clippy::expect_used, reason = "what the harness cannot do fails the test, with a message")]

mod agent;
mod binaries;
mod cgroup;
mod container;
mod host;
mod kernel;
mod machine;
mod mesh;
mod netns;
mod process;
mod proxy;
mod sandbox;
mod snapshot;
mod sweep;
mod upstream;
mod wait;

pub mod http;

pub use agent::{Agent, Build, Counters, MapStatus, ServiceStatus, Status};
pub use cgroup::cgroup_path;
pub use container::Container;
pub use host::{binaries, binary, use_binaries};
pub use kernel::Footprint;
pub use machine::{Machine, Release, Root};
pub use mesh::{Answers, Mesh, answers, application, ask, ask_with, slow_request, url};
pub use netns::{INSTANCES, ORIGIN, ORIGIN_V6, RESOLVERS};
pub use process::{Conversation, Finished, Process, Program, Running};
pub use proxy::{CONFIG as PROXY_CONFIG, Metrics, Proxy};
pub use sandbox::{Mode, Place, Sandbox};
pub use snapshot::Snapshot;
pub use upstream::Upstream;
pub use wait::{eventually, wait_for};
