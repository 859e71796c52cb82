//! The agent, and the command line that talks to it.

use std::fs;
use std::path::PathBuf;

use nix::sys::signal::Signal;
use serde::Deserialize;

use crate::host;
use crate::process::{Finished, Process, Program};
use crate::sandbox::{Place, Sandbox};

/// The agent, built with one version of its ABI or another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Build {
    /// As it is.
    Plain,
    /// With the feature `changed-abi`.
    ChangedAbi,
}

impl Build {
    /// Its binary.
    pub fn binary(self) -> PathBuf {
        match self {
            Self::Plain => host::binary("mesh-redirect"),
            Self::ChangedAbi => host::binary("changed-abi/mesh-redirect"),
        }
    }

    /// The other one.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Plain => Self::ChangedAbi,
            Self::ChangedAbi => Self::Plain,
        }
    }
}

/// A running `mesh-redirect run`.
#[derive(Debug)]
pub struct Agent<'s> {
    sandbox: &'s Sandbox,
    process: Process,
}

/// What `status --json` says.
#[derive(Debug, Deserialize)]
pub struct Status {
    /// The enabled services.
    pub services: Vec<ServiceStatus>,
    /// Other versions of the ABI that are still there.
    pub retiring: Vec<u32>,
    /// How full the kernel's maps are.
    pub maps: Vec<MapStatus>,
}

/// One map of the kernel's.
#[derive(Debug, PartialEq, Eq, Deserialize)]
pub struct MapStatus {
    /// As the kernel calls it.
    pub name: String,
    /// How many entries it holds.
    pub entries: u64,
    /// How many it has room for.
    pub capacity: u64,
    /// How many made room for others, where they can.
    pub evicted: Option<u64>,
}

/// One enabled service.
#[derive(Debug, PartialEq, Eq, Deserialize)]
pub struct ServiceStatus {
    /// As agent.yaml calls it.
    pub name: String,
    /// When it was enabled, in seconds since 1970.
    pub since: u64,
    /// What became of its connections.
    pub counters: Counters,
}

/// What became of a service's connections, since it was enabled.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Counters {
    /// Went to the proxy.
    pub steered: u64,
    /// Left alone, since a rule says so.
    pub passed_by_rule: u64,
    /// Left alone, since no proxy was there.
    pub passed_proxy_absent: u64,
    /// Refused, since no proxy was there.
    pub refused: u64,
    /// Went wrong.
    pub errors: u64,
    /// Would have gone to the proxy, were the service not only observed.
    pub observed: u64,
    /// DNS queries that went to the proxy by datagram.
    pub queries: u64,
}

impl<'s> Agent<'s> {
    /// Writes agent.yaml and starts the daemon.
    #[track_caller]
    pub fn start(sandbox: &'s Sandbox, settings: &str) -> Self {
        Self::configure(sandbox, settings);
        Self::restart(sandbox)
    }

    /// Writes agent.yaml, and says where.
    pub fn configure(sandbox: &Sandbox, settings: &str) -> PathBuf {
        let path = config(sandbox);
        fs::write(&path, Self::yaml(sandbox, settings)).expect("write agent.yaml");
        path
    }

    /// What agent.yaml says: the paths, the proxy and the services of the sandbox, and then `settings`. Since the
    /// services come last, settings that are indented add to them.
    pub fn yaml(sandbox: &Sandbox, settings: &str) -> String {
        format!(
            "mode: {mode}
paths:
  run: {run}
  state: {state}
  pins: {pins}
  hosts: {hosts}
  hooks: {hooks}
proxy:
  port: 15001
  cgroup: {proxy}
services:
  shop: {{ cgroup: {shop} }}
  stock: {{ cgroup: {stock} }}
{settings}",
            mode = sandbox.mode.name(),
            run = sandbox.path("run").display(),
            state = sandbox.path("state").display(),
            pins = sandbox.pins().display(),
            hosts = sandbox.hosts().display(),
            hooks = sandbox.path("hooks.d").display(),
            proxy = sandbox.cgroup(Place::Proxy),
            shop = sandbox.cgroup(Place::Shop),
            stock = sandbox.cgroup(Place::Stock),
        )
    }

    /// Starts the daemon with the configuration that is there.
    #[track_caller]
    pub fn restart(sandbox: &'s Sandbox) -> Self {
        Self::restart_as(Build::Plain, sandbox)
    }

    /// The same, of another build.
    #[track_caller]
    pub fn restart_as(build: Build, sandbox: &'s Sandbox) -> Self {
        let run = Self::program_of(build, sandbox, Place::Outside, &["run"]);
        let mut process = run.serve(sandbox.path("agent.log"));
        process.wait_until(|_| Self::command(sandbox, &["status"]).has_status());
        Self { sandbox, process }
    }

    /// A command of `mesh-redirect`, whether or not a daemon runs.
    #[track_caller]
    pub fn command(sandbox: &Sandbox, args: &[&str]) -> Finished {
        Self::program(sandbox, args).run()
    }

    /// The same, to be started by the caller.
    pub fn program<'a>(sandbox: &'a Sandbox, args: &[&str]) -> Program<'a> {
        Self::program_of(Build::Plain, sandbox, Place::Outside, args)
    }

    /// The same, of another build and elsewhere.
    pub fn program_of<'a>(build: Build, sandbox: &'a Sandbox, place: Place, args: &[&str]) -> Program<'a> {
        let config = config(sandbox).display().to_string();
        sandbox.program(place, build.binary()).args(["--config", &config]).args(args)
    }

    /// The arguments with which a container's runtime is to run it.
    pub fn hook(sandbox: &Sandbox) -> [String; 4] {
        let config = config(sandbox).display().to_string();
        ["--config".to_owned(), config, "attach".to_owned(), "--oci".to_owned()]
    }

    /// `enable SERVICE`
    #[track_caller]
    pub fn enable(&self, service: &str) {
        Self::command(self.sandbox, &["enable", service]).ok();
    }

    /// `enable SERVICE…`
    #[track_caller]
    pub fn enable_all(&self, services: &[String]) {
        let services = services.iter().map(String::as_str);
        Self::command(self.sandbox, &["enable"].into_iter().chain(services).collect::<Vec<_>>()).ok();
    }

    /// `disable SERVICE…`
    #[track_caller]
    pub fn disable_all(&self, services: &[String]) {
        let services = services.iter().map(String::as_str);
        Self::command(self.sandbox, &["disable"].into_iter().chain(services).collect::<Vec<_>>()).ok();
    }

    /// `disable SERVICE`
    #[track_caller]
    pub fn disable(&self, service: &str) {
        Self::command(self.sandbox, &["disable", service]).ok();
    }

    /// Writes another agent.yaml and has the daemon read it; says what `reload` did.
    #[track_caller]
    pub fn reload(&self, settings: &str) -> Finished {
        Self::configure(self.sandbox, settings);
        Self::command(self.sandbox, &["reload"])
    }

    /// The signal that stands for it.
    pub fn hang_up(&self) {
        self.process.signal(Signal::SIGHUP);
    }

    /// `status --json`
    #[track_caller]
    pub fn status(&self) -> Status {
        let finished = Self::command(self.sandbox, &["status", "--json"]);
        assert!(finished.has_status(), "{finished:#?}");
        let answer = &finished.stdout;
        serde_json::from_str(answer).unwrap_or_else(|error| panic!("{error} in {answer}"))
    }

    /// The counters of an enabled service.
    #[track_caller]
    pub fn counters(&self, service: &str) -> Counters {
        let status = self.status();
        let found = status.services.iter().find(|found| found.name == service);
        found.unwrap_or_else(|| panic!("{service} is not enabled: {status:?}")).counters
    }

    /// How full a map of the kernel's is.
    #[track_caller]
    pub fn map(&self, name: &str) -> MapStatus {
        let status = self.status();
        let found = status.maps.into_iter().find(|map| map.name == name);
        found.unwrap_or_else(|| panic!("there is no map {name}"))
    }

    /// The daemon's process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// What the daemon logged so far, in this life and those before.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// Stops it as a debugger would.
    pub fn freeze(&self) {
        self.process.signal(Signal::SIGSTOP);
    }

    /// Lets it run on.
    pub fn thaw(&self) {
        self.process.signal(Signal::SIGCONT);
    }

    /// Kills the daemon, which gets no chance to tidy up.
    pub fn sigkill(mut self) {
        self.process.signal(Signal::SIGKILL);
        self.process.ended();
    }

    /// Ends the daemon as systemd would.
    ///
    /// # Panics
    /// When it does not exit with success.
    #[track_caller]
    pub fn stop(mut self) {
        self.process.signal(Signal::SIGTERM);
        let status = self.process.ended();
        assert!(status.success(), "the daemon ended with {status}");
    }
}

/// Where the sandbox's agent.yaml is.
fn config(sandbox: &Sandbox) -> PathBuf {
    sandbox.path("agent.yaml")
}
