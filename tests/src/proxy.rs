//! The proxy.

use std::fs;
use std::net::SocketAddr;

use nix::sys::signal::Signal;

use crate::host;
use crate::http::{self, Answer};
use crate::process::Process;
use crate::sandbox::{Place, Sandbox};

/// The proxy.yaml of every scenario.
pub const CONFIG: &str = "\
listen:
  port: 15001
  workers: 2
admin: 127.0.0.1:15000
dns: { port: 15053 }
drain_timeout: 10s
virtual_hosts:
  - name: catalog
    domains: [catalog, 10.77.0.10]
    cluster: catalog
    ports: [8080]
clusters:
  - name: catalog
    endpoints: [10.77.0.2:8080, 10.77.0.3:8080]
";

/// A running `mesh-proxy run`, unprivileged, with two workers and one virtual host `catalog` whose cluster has two
/// instances.
#[derive(Debug)]
pub struct Proxy<'s> {
    sandbox: &'s Sandbox,
    process: Process,
}

impl<'s> Proxy<'s> {
    /// Starts it and waits until it is ready. Its program is copied, for the user `nobody` may not reach the original.
    #[track_caller]
    pub fn start(sandbox: &'s Sandbox) -> Self {
        Self::start_with(sandbox, CONFIG)
    }

    /// With another proxy.yaml.
    #[track_caller]
    pub fn start_with(sandbox: &'s Sandbox, yaml: &str) -> Self {
        let (program, config) = (sandbox.path("mesh-proxy"), sandbox.path("proxy.yaml"));
        if !program.exists() {
            // By a process of its own: were it open for writing here, what is just being spawned would have it open too,
            // and a program that is open for writing cannot be started.
            let from = host::binary("mesh-proxy");
            host::tool("cp", &[&from.to_string_lossy(), &program.to_string_lossy()]);
        }
        // The agent of this sandbox, not the machine's.
        let origins = format!("origins: {}\n", sandbox.path("run/origins.sock").display());
        fs::write(&config, yaml.to_owned() + &origins).expect("write proxy.yaml");
        let process = sandbox
            .program(Place::Proxy, "setpriv")
            .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--"])
            .args([&program.to_string_lossy(), "run", "--config", &config.to_string_lossy()])
            .serve(sandbox.path("proxy.log"));
        let mut proxy = Self { sandbox, process };
        proxy.process.wait_until(|_| admin(sandbox, "/ready").is_some_and(|answer| answer.status == 200));
        proxy
    }

    /// What it has counted so far.
    #[track_caller]
    pub fn metrics(&self) -> Metrics {
        Metrics::of(self.sandbox)
    }

    /// Stops it as a debugger would: its sockets stay, nobody serves them.
    pub fn freeze(&self) {
        self.process.signal(Signal::SIGSTOP);
    }

    /// Lets it run on.
    pub fn thaw(&self) {
        self.process.signal(Signal::SIGCONT);
    }

    /// Has it read another proxy.yaml.
    pub fn reload(&self, yaml: &str) {
        fs::write(self.sandbox.path("proxy.yaml"), yaml).expect("write proxy.yaml");
        self.process.signal(Signal::SIGHUP);
    }

    /// Asks it to drain.
    pub fn terminate(&self) {
        self.process.signal(Signal::SIGTERM);
    }

    /// Waits until it has drained.
    ///
    /// # Panics
    /// When it does not exit with success.
    #[track_caller]
    pub fn drained(mut self) {
        let status = self.process.ended();
        assert!(status.success(), "the proxy ended with {status}");
    }

    /// Kills it.
    pub fn sigkill(mut self) {
        self.process.signal(Signal::SIGKILL);
        self.process.ended();
    }
}

fn admin(sandbox: &Sandbox, path: &str) -> Option<Answer> {
    let admin = SocketAddr::from(([127, 0, 0, 1], 15000));
    sandbox.enter(|| http::get(admin, "localhost", path)).ok()
}

/// A Prometheus exposition.
#[derive(Debug)]
pub struct Metrics(String);

impl Metrics {
    /// What the proxy in this sandbox has counted so far.
    ///
    /// # Panics
    /// When it does not say.
    #[track_caller]
    pub fn of(sandbox: &Sandbox) -> Self {
        Self(admin(sandbox, "/metrics").expect("the proxy's metrics").body)
    }

    /// As the proxy wrote them.
    pub fn text(&self) -> &str {
        &self.0
    }

    /// The sum over every series of a metric whose line has all these labels (`kind="steered"`).
    pub fn sum(&self, name: &str, labels: &[&str]) -> f64 {
        let lines = self.0.lines().filter(|line| line.split(['{', ' ']).next() == Some(name));
        let matching = lines.filter(|line| labels.iter().all(|label| line.contains(label)));
        matching.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }
}
