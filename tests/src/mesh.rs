//! A small mesh: what most scenarios start with.

use std::collections::BTreeMap;
use std::thread::sleep;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::agent::Agent;
use crate::netns::{INSTANCES, ORIGIN, ORIGIN_V6, RESOLVERS};
use crate::process::Program;
use crate::process::{Finished, Running};
use crate::proxy::Proxy;
use crate::sandbox::{Mode, Place, Sandbox};
use crate::upstream::Upstream;

/// The agent, the proxy, the two instances of `catalog` that the proxy knows, and the server that an application reaches
/// when it is not steered. Nothing is enabled yet.
///
/// Who answered tells which way a request went: the servers are named `a`, `b` and `origin`.
#[derive(Debug)]
pub struct Mesh<'s> {
    /// The daemon.
    pub agent: Agent<'s>,
    /// The data plane.
    pub proxy: Proxy<'s>,
    /// The proxy's two endpoints.
    pub instances: [Upstream; 2],
    /// On 8080 and 8081, in both families.
    pub origin: Upstream,
    /// Where nothing but names can be steered: who knows them when they are not.
    _resolver: Option<Upstream>,
}

impl<'s> Mesh<'s> {
    /// Starts all of it; `settings` are added to agent.yaml.
    #[track_caller]
    pub fn start(sandbox: &'s Sandbox, settings: &str) -> Self {
        let [a, b] = INSTANCES.map(|address| format!("{address}:8080"));
        let origin = [
            format!("{ORIGIN}:8080"),
            format!("{ORIGIN}:8081"),
            format!("[{ORIGIN_V6}]:8080"),
            format!("[{ORIGIN_V6}]:8081"),
        ];
        Self {
            instances: [Upstream::http(sandbox, "a", &[&a]), Upstream::http(sandbox, "b", &[&b])],
            origin: Upstream::http(sandbox, "origin", &origin.each_ref().map(String::as_str)),
            agent: Agent::start(sandbox, settings),
            proxy: Proxy::start(sandbox),
            _resolver: (sandbox.mode == Mode::Hosts)
                .then(|| Upstream::resolver(sandbox, Place::Peer, "resolver", &[RESOLVERS[0]])),
        }
    }

    /// The same, with `shop` enabled.
    #[track_caller]
    pub fn enabled(sandbox: &'s Sandbox, settings: &str) -> Self {
        let mesh = Self::start(sandbox, settings);
        mesh.agent.enable("shop");
        mesh
    }
}

/// A program of the shop's that reaches `catalog` at [`url`], as it would without a mesh.
pub fn application<'s>(sandbox: &'s Sandbox, program: &str) -> Program<'s> {
    at(sandbox, Place::Shop, program)
}

fn at<'s>(sandbox: &'s Sandbox, place: Place, program: &str) -> Program<'s> {
    match sandbox.mode {
        Mode::Hosts => sandbox.resolving(place, RESOLVERS[0], program),
        Mode::Ebpf | Mode::Nftables => sandbox.program(place, program),
    }
}

/// Where an [`application`] finds `catalog`: at its address, or by its name where nothing else can be steered.
pub fn url(sandbox: &Sandbox) -> String {
    let host = if sandbox.mode == Mode::Hosts { "catalog" } else { ORIGIN };
    format!("http://{host}:8080/")
}

/// Who answers the shop's curl, asked six times.
#[track_caller]
pub fn answers(sandbox: &Sandbox) -> Answers {
    (0..6).map(|_| ask(sandbox, Place::Shop, &format!("{ORIGIN}:8080")).ok().to_owned()).collect()
}

/// `curl http://catalog:PORT/` where the name resolves to the given address, unless it is the name that is steered.
#[track_caller]
pub fn ask(sandbox: &Sandbox, place: Place, address: &str) -> Finished {
    ask_with(sandbox, place, address, &[])
}

/// The same, with more arguments.
#[track_caller]
pub fn ask_with(sandbox: &Sandbox, place: Place, address: &str, more: &[&str]) -> Finished {
    let (host, port) = address.rsplit_once(':').expect("ADDRESS:PORT");
    let (resolve, url) = (format!("catalog:{port}:{host}"), format!("http://catalog:{port}"));
    let curl = at(sandbox, place, "curl").args(["--silent", "--show-error", "--max-time", "5"]);
    let resolved = if sandbox.mode == Mode::Hosts { vec![] } else { vec!["--resolve", &resolve] };
    curl.args(resolved).arg(&url).args(more).run()
}

/// A request that is being answered: half of the answer has come, the rest takes a second more.
#[track_caller]
pub fn slow_request(sandbox: &Sandbox) -> Running {
    let options = ["--silent", "--max-time", "5", "--no-buffer", "--header", "Host: catalog"];
    let running =
        sandbox.program(Place::Shop, "curl").args(options).arg(&format!("http://{ORIGIN}:8080/slow")).begin();
    sleep(Duration::from_millis(500));
    running
}

/// How often each server answered. A request without an answer counts as `failed`.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answers(BTreeMap<String, usize>);

impl Answers {
    /// One more.
    pub fn add(&mut self, who: String) {
        *self.0.entry(who).or_default() += 1;
    }

    /// How many there are.
    pub fn total(&self) -> usize {
        self.0.values().sum()
    }

    /// # Panics
    /// Unless each of these answered, and nobody else.
    #[track_caller]
    pub fn are_from(&self, servers: &[&str]) {
        assert!(self.0.keys().eq(servers), "not from {servers:?}: {self:?}");
    }

    /// # Panics
    /// Unless the instances took turns: each of the proxy's two workers goes round on its own.
    #[track_caller]
    pub fn are_balanced(&self) {
        self.are_from(&["a", "b"]);
        assert!(self.0["a"].abs_diff(self.0["b"]) <= 2, "not in turns: {self:?}");
    }
}

impl FromIterator<String> for Answers {
    fn from_iter<I: IntoIterator<Item = String>>(answers: I) -> Self {
        let mut counted = Self::default();
        answers.into_iter().for_each(|who| counted.add(who));
        counted
    }
}
