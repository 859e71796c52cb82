//! What the agent measures of itself, as Prometheus scrapes it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use tests::{Agent, Counters, Mesh, Place, Sandbox, answers, cgroup_path, eventually, http};

scenarios![everywhere:
    what_is_scraped_agrees_with_the_status,
    nobody_listens_unless_an_address_is_given,
];
scenarios![a_repair_is_counted, a_metrics_address_serves_whoever_asks_well,];

const ADDRESS: &str = "127.0.0.1:15002";
const SOON: Duration = Duration::from_secs(10);

fn what_is_scraped_agrees_with_the_status(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, &format!("metrics: {ADDRESS}\n"));
    Agent::command(sandbox, &["enable", "stock", "--observe"]).ok();
    Agent::command(sandbox, &["enable", "nobody"]).failed_with(1);
    answers(sandbox).are_balanced();

    let mode = sandbox.mode.name();
    let scraped = Metrics::scrape(sandbox);
    assert_eq!(scraped.value("mode_info", &[("mode", mode)]), 1.0);
    assert_eq!(scraped.value("build_info", &[("version", env!("CARGO_PKG_VERSION"))]), 1.0);
    for (state, count) in [("enabled", 1.0), ("observed", 1.0), ("commands", 0.0)] {
        assert_eq!(scraped.value("services", &[("state", state)]), count, "{state}");
    }
    assert_eq!(scraped.value("cgroups", &[("attached", "true")]), 2.0);
    assert_eq!(scraped.value("proxy_attached", &[]), 1.0);
    assert_eq!(scraped.value("proxy_ready", &[("port", "proxy"), ("family", "ipv4")]), 1.0);
    assert_eq!(scraped.value("errors_total", &[("kind", "request")]), 1.0);
    let changed = scraped.value("applies_total", &[("outcome", "changed")]);
    assert_eq!(
        changed >= 1.0,
        sandbox.mode.is_in_kernel(),
        "the hosts file is changed when the proxy is ready"
    );
    assert!(scraped.value("apply_duration_seconds_count", &[]) >= 1.0);

    let status = mesh.agent.status();
    for service in &status.services {
        let counters = scraped.counters(&service.name);
        assert_eq!(counters, sandbox.mode.is_in_kernel().then_some(service.counters), "{}", service.name);
    }
    for map in &status.maps {
        let labels = [("map", map.name.as_str())];
        assert_eq!(scraped.value("map_capacity", &labels), map.capacity as f64);
        assert_eq!(scraped.find("map_evictions_total", &labels), map.evicted.map(|count| count as f64));
    }
    // A moment later everybody is told something new.
    mesh.proxy.sigkill();
    let is_ready = || Metrics::scrape(sandbox).value("proxy_ready", &[("port", "proxy"), ("family", "ipv4")]);
    eventually("the proxy is not ready", SOON, || is_ready() == 0.0);
    let (socket, address) = (Metrics::scrape(sandbox), Metrics::at_address(sandbox));
    assert_eq!(socket.names(), address.names());
}

fn nobody_listens_unless_an_address_is_given(sandbox: &Sandbox) {
    let _agent = Agent::start(sandbox, "");
    let address: SocketAddr = ADDRESS.parse().expect("an address");
    assert!(sandbox.enter(|| TcpStream::connect(address)).is_err());
}

fn a_repair_is_counted(sandbox: &Sandbox) {
    let _mesh = Mesh::enabled(sandbox, "");
    let repairs = || Metrics::scrape(sandbox).value("repairs_total", &[]);
    assert_eq!(repairs(), 0.0);
    fs::remove_dir(cgroup_path(&sandbox.cgroup(Place::Shop))).expect("remove the shop's cgroup");
    sandbox.peer(Place::Shop).args(["decide", "127.0.0.1:1"]).run().ok();
    eventually("the new cgroup was attached to", SOON, || repairs() >= 1.0);
}

fn a_metrics_address_serves_whoever_asks_well(sandbox: &Sandbox) {
    let agent = Agent::start(sandbox, &format!("metrics: {ADDRESS}\n"));
    let address: SocketAddr = ADDRESS.parse().expect("an address");
    let curl = |user: &str, more: &[&str]| {
        let setpriv =
            sandbox.program(Place::Outside, "setpriv").args(["--reuid", user, "--clear-groups", "--"]);
        let curl = ["curl", "--silent", "--max-time", "10", "--output", "/dev/null"];
        let written = ["--write-out", "%{http_code} %{content_type}"];
        setpriv.args(curl).args(written).args(more).arg(&format!("http://{ADDRESS}/metrics")).run().stdout
    };
    let good = "200 application/openmetrics-text; version=1.0.0; charset=utf-8";
    eventually("it is served", SOON, || curl("65534", &[]) == good);
    assert!(curl("65534", &["--request", "POST", "--data", "x"]).starts_with("405 "));
    let elsewhere = sandbox.enter(|| http::get(address, "agent", "/v1/status")).expect("an answer");
    assert_eq!(elsewhere.status, 404);

    // Those who say nothing, or never listen, keep nobody out.
    let connect = || sandbox.enter(|| TcpStream::connect(address)).expect("connect");
    let mut slow: Vec<TcpStream> = (0..200).map(|_| connect()).collect();
    for stream in slow.iter_mut().skip(100) {
        let _cut_off_meanwhile = stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: a\r\n\r\n");
    }
    assert_eq!(curl("65534", &[]), good);
    drop(slow);
    assert!(agent.status().services.is_empty());
}

/// What was scraped: values by the names of their samples, without prefix, and labels.
#[derive(Debug)]
struct Metrics(BTreeMap<(String, Labels), f64>);

type Labels = BTreeSet<(String, String)>;

impl Metrics {
    #[track_caller]
    fn scrape(sandbox: &Sandbox) -> Self {
        let mut stream = UnixStream::connect(sandbox.path("run/agent.sock")).expect("connect to the agent");
        stream.write_all(http::request("agent", "/metrics").as_bytes()).expect("ask for metrics");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("the metrics");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
        assert!(head.starts_with("HTTP/1.1 200 "), "{answer}");
        Self::parse(body)
    }

    #[track_caller]
    fn at_address(sandbox: &Sandbox) -> Self {
        let address = ADDRESS.parse().expect("an address");
        let answer = sandbox.enter(|| http::get(address, "agent", "/metrics")).expect("the metrics");
        assert_eq!(answer.status, 200, "{}", answer.body);
        Self::parse(&answer.body)
    }

    /// Reads the whole of it, and holds it against the rules of OpenMetrics 1.0.
    #[track_caller]
    fn parse(text: &str) -> Self {
        let (mut types, mut samples) = (BTreeMap::new(), BTreeMap::new());
        let lines = text.strip_suffix("# EOF\n").unwrap_or_else(|| panic!("no end of file in {text}"));
        for line in lines.lines() {
            if let Some(comment) = line.strip_prefix("# ") {
                let mut words = comment.splitn(3, ' ');
                let (keyword, family) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
                let rest = words.next().unwrap_or_default();
                match keyword {
                    "TYPE" => assert_eq!(types.insert(family.to_owned(), rest.to_owned()), None, "{line}"),
                    "HELP" => assert!(rest.ends_with('.') && rest.len() > 1, "{line}"),
                    "UNIT" => assert!(family.ends_with(&format!("_{rest}")), "{line}"),
                    _ => panic!("{line}"),
                }
                continue;
            }
            let (name, labels, value) = sample(line).unwrap_or_else(|| panic!("not a sample: {line}"));
            let family = types
                .iter()
                .find(|(family, kind)| suffixes(kind).contains(&name.strip_prefix(family.as_str())));
            assert!(family.is_some(), "of no family that was told of: {line}");
            let name = name.strip_prefix("mesh_redirect_").unwrap_or_else(|| panic!("no prefix: {line}"));
            assert_eq!(samples.insert((name.to_owned(), labels), value), None, "twice: {line}");
        }
        Self(samples)
    }

    #[track_caller]
    fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.find(name, labels).unwrap_or_else(|| panic!("no {name} {labels:?} in {self:#?}"))
    }

    fn find(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let labels = labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        self.0.get(&(name.to_owned(), labels)).copied()
    }

    fn names(&self) -> BTreeSet<&str> {
        self.0.keys().map(|(name, _)| name.as_str()).collect()
    }

    /// Of a service; none where nothing is counted.
    fn counters(&self, service: &str) -> Option<Counters> {
        let decision = |decision| {
            let labels = [("service", service), ("decision", decision)];
            self.find("decisions_total", &labels).map(|count| count as u64)
        };
        let queries = self.find("dns_queries_total", &[("service", service)])? as u64;
        Some(Counters {
            steered: decision("steered")?,
            passed_by_rule: decision("passed_by_rule")?,
            passed_proxy_absent: decision("passed_proxy_absent")?,
            refused: decision("refused")?,
            errors: decision("errors")?,
            observed: decision("observed")?,
            queries,
        })
    }
}

/// What a sample's name has after the family's.
fn suffixes(kind: &str) -> Vec<Option<&str>> {
    let suffixes: &[&str] = match kind {
        "counter" => &["_total"],
        "gauge" => &[""],
        "info" => &["_info"],
        "histogram" => &["_bucket", "_count", "_sum"],
        _ => &[],
    };
    suffixes.iter().copied().map(Some).collect()
}

/// `NAME{LABEL="VALUE",…} NUMBER`
fn sample(line: &str) -> Option<(String, Labels, f64)> {
    let (series, value) = line.rsplit_once(' ')?;
    let (name, labels) = match series.split_once('{') {
        Some((name, labels)) => (name, labels.strip_suffix('}')?),
        None => (series, ""),
    };
    let is_word = |text: &str| {
        let rest = |c: char| c.is_ascii_alphanumeric() || c == '_';
        text.chars().all(rest) && text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
    };
    let label = |text: &str| {
        let (name, value) = text.split_once('=')?;
        let value = value.strip_prefix('"')?.strip_suffix('"')?;
        is_word(name).then(|| (name.to_owned(), value.to_owned()))
    };
    let labels: Option<Labels> = labels.split(',').filter(|label| !label.is_empty()).map(label).collect();
    is_word(name).then_some((name.to_owned(), labels?, value.parse().ok()?))
}
