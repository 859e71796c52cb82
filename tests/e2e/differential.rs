//! Random policies, connections and datagrams: what the kernel does, and counts, has to be what `explain` says, which is the
//! policy's definition.

use std::collections::BTreeMap;
use std::env;
use std::io::{Write, stderr};
use std::sync::LazyLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Deserialize;
use tests::{Agent, Counters, Place, Proxy, Sandbox, eventually};

scenarios![the_kernel_decides_as_explain_says];

/// In each mode; there are two.
const POLICIES: usize = 60;
const CONNECTIONS: usize = 100;
/// Most to a few resolvers, since no more than sixteen of a family are told apart.
const DATAGRAMS: usize = 10;

/// A service of the proxy's that is in the random world, by addresses and by instances.
const PROXY: &str = "\
admin: 127.0.0.1:15000
dns: { port: 15053 }
virtual_hosts:
  - { name: stock, domains: [stock.test, 10.0.0.3, 10.0.0.12], cluster: stock }
clusters:
  - { name: stock, endpoints: ['10.0.0.6:7', '10.0.0.3:9', '[fd00::9]:8', '[fd00::4]:3'] }
";

const SOON: Duration = Duration::from_secs(5);

/// Every mode gets the same policies and connections. A run can be repeated by its seed.
pub(crate) static SEED: LazyLock<u64> = LazyLock::new(|| {
    let clock = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |time| time.as_nanos() as u64);
    env::var("MESH_REDIRECT_SEED").map_or_else(|_| clock(), |seed| seed.parse().expect("a seed is a number"))
});

fn the_kernel_decides_as_explain_says(sandbox: &Sandbox) {
    // Past the capture of a test's output, so that it is in every log.
    let _ = writeln!(stderr(), "differential test: {}: MESH_REDIRECT_SEED={}", sandbox.mode.name(), *SEED);
    let mut random = Random(*SEED | 1);
    // Every address of the random world is this host's: what is steered is accepted by the proxy, what is not is refused.
    for (family, net) in [("-4", "10.0.0.0/8"), ("-4", "169.254.0.0/16"), ("-6", "fd00::/8")] {
        let add = [family, "route", "add", "local", net, "dev", "lo"];
        sandbox.program(Place::Outside, "ip").args(add).run().ok();
    }
    let services: Vec<String> = (0..POLICIES).map(|number| format!("random{number}")).collect();
    let settings: String = services.iter().map(|name| random.service(sandbox, name)).collect();
    let agent = Agent::start(sandbox, &settings);
    let _proxy = Proxy::start_with(sandbox, PROXY);
    eventually("the daemon knows what is routed", SOON, || sandbox.path("state/routable.json").exists());
    let (observed, enforced): (Vec<String>, Vec<String>) =
        services.iter().cloned().partition(|_| random.below(6) == 0);
    let observe = [&["enable", "--observe"], &*refs(&observed)].concat();
    Agent::command(sandbox, if observed.is_empty() { &["status"] } else { &observe }).ok();
    agent.enable_all(&enforced);

    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    for name in &services {
        let context = format!("seed {}, {name}\n{settings}", *SEED);
        let destinations: Vec<String> = (0..CONNECTIONS).map(|_| random.destination()).collect();
        let connect = [["decide"].as_slice(), &refs(&destinations)].concat();
        let connections = Decided {
            done: sandbox.peer_in(&format!("random/{name}")).args(connect).run().ok().to_owned(),
            explained: explained(sandbox, name, "tcp", &destinations),
        };
        let resolvers: Vec<String> = (0..DATAGRAMS).map(|_| random.resolver()).collect();
        let first_port = (20_000 + seen.values().sum::<usize>() % 40_000).to_string();
        let ask = [["decide-queries", "stock.test", &first_port].as_slice(), &refs(&resolvers)].concat();
        let datagrams = Decided {
            done: sandbox.peer_in(&format!("random/{name}")).args(ask).run().ok().to_owned(),
            explained: explained(sandbox, name, "udp", &resolvers),
        };
        connections.agree(CONNECTIONS, &context);
        datagrams.agree(DATAGRAMS, &context);
        let counted = Counters {
            steered: connections.count("steered"),
            passed_by_rule: connections.count("passed_by_rule"),
            observed: connections.count("observed"),
            queries: datagrams.count("query"),
            ..Counters::default()
        };
        assert_eq!(agent.counters(name), counted, "{context}");
        for Explained { decision, .. } in connections.explained.iter().chain(&datagrams.explained) {
            *seen.entry(decision.clone()).or_default() += 1;
        }
    }
    assert_eq!(seen.values().sum::<usize>(), POLICIES * (CONNECTIONS + DATAGRAMS));
    let kinds = ["ignored", "observed", "passed_by_rule", "query", "steered"];
    assert!(seen.keys().eq(kinds.iter()), "what never happens is not tested: {seen:?}");
}

/// What was done, line by line, and what `explain` said of it.
struct Decided {
    done: String,
    explained: Vec<Explained>,
}

impl Decided {
    #[track_caller]
    fn agree(&self, number: usize, context: &str) {
        assert_eq!((self.done.lines().count(), self.explained.len()), (number, number), "{context}");
        for (done, explained) in self.done.lines().zip(&self.explained) {
            let expected = match explained.decision.as_str() {
                "steered" | "query" => "steered",
                "passed_by_rule" | "observed" | "ignored" => "passed",
                other => panic!("{other} is no decision here: {explained:?}, {context}"),
            };
            assert_eq!(done, expected, "{explained:?}, {context}");
        }
    }

    fn count(&self, decision: &str) -> u64 {
        self.explained.iter().filter(|explained| explained.decision == decision).count() as u64
    }
}

/// What `explain --json` says.
#[derive(Debug, Deserialize)]
struct Explanations {
    explained: Vec<Explained>,
}

/// What it says of a destination.
#[derive(Debug, Deserialize)]
struct Explained {
    decision: String,
    #[expect(dead_code, reason = "shown where kernel and definition differ")]
    destination: String,
    #[expect(dead_code, reason = "shown where kernel and definition differ")]
    because: String,
}

fn explained(sandbox: &Sandbox, service: &str, proto: &str, destinations: &[String]) -> Vec<Explained> {
    let command = [["explain", "--json", "--proto", proto, service].as_slice(), &refs(destinations)].concat();
    let finished = Agent::command(sandbox, &command);
    let Explanations { explained } =
        serde_json::from_str(finished.ok()).expect("what the definition says, as JSON");
    explained
}

fn refs(texts: &[String]) -> Vec<&str> {
    texts.iter().map(String::as_str).collect()
}

/// xorshift64 (Marsaglia 2003): a test needs variety, not secrecy.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) % bound
    }

    /// Its settings.
    fn service(&mut self, sandbox: &Sandbox, name: &str) -> String {
        let cgroup = sandbox.cgroup_at(&format!("random/{name}"));
        let (include, exclude) = (self.captures(1), self.captures(0));
        let base = ["all", "routable", "listed", "listed"][self.below(4) as usize];
        let dns = self.below(3) == 0;
        let capture = format!("base: {base}, dns: {dns}, include: [{include}], exclude: [{exclude}]");
        format!("  {name}: {{ cgroup: {cgroup}, capture: {{ {capture} }} }}\n")
    }

    fn captures(&mut self, at_least: u64) -> String {
        let number = at_least + self.below(6);
        (0..number).map(|_| self.capture()).collect::<Vec<_>>().join(", ")
    }

    fn capture(&mut self) -> String {
        let ports = (0..self.below(4)).map(|_| self.ports()).collect::<Vec<_>>().join(", ");
        match self.below(6) {
            0 if !ports.is_empty() => format!("{{ ports: [{ports}] }}"),
            5 => format!("{{ service: stock, ports: [{ports}] }}"),
            0 | 1 => format!("'{}'", self.net()),
            _ => format!("{{ cidr: '{}', ports: [{ports}] }}", self.net()),
        }
    }

    fn ports(&mut self) -> String {
        let first = 1 + self.below(12);
        format!("{first}-{}", first + self.below(6))
    }

    /// Of few and small nets, so that they meet often.
    fn net(&mut self) -> String {
        match self.below(12) {
            0 => "0.0.0.0/0".to_owned(),
            1 => "::/0".to_owned(),
            2 => "10.0.0.0/8".to_owned(),
            3 => "169.254.0.0/16".to_owned(),
            4..8 => {
                let bits = self.below(5);
                format!("10.0.0.{}/{}", self.below(16) >> bits << bits, 32 - bits)
            }
            _ => {
                let bits = self.below(5);
                format!("fd00::{:x}/{}", self.below(16) >> bits << bits, 128 - bits)
            }
        }
    }

    fn resolver(&mut self) -> String {
        let (host, port) = (self.below(8), if self.below(8) == 0 { 1 + self.below(20) } else { 53 });
        if self.below(2) == 0 { format!("10.0.0.{host}:{port}") } else { format!("[fd00::{host:x}]:{port}") }
    }

    fn destination(&mut self) -> String {
        let (host, port) = (self.below(16), if self.below(10) == 0 { 53 } else { 1 + self.below(20) });
        match self.below(10) {
            0 => format!("169.254.0.{host}:{port}"),
            1 => format!("127.0.0.{}:{port}", host + 1),
            2 => format!("[::ffff:10.0.0.{host}]:{port}"),
            3 => format!("10.1.2.3:{port}"),
            4..7 => format!("[fd00::{host:x}]:{port}"),
            _ => format!("10.0.0.{host}:{port}"),
        }
    }
}
