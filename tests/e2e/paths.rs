//! `check SERVICE`: what really happens on every path, against what policy says.

use std::fs;

use serde::Deserialize;
use tests::{Agent, Finished, Mesh, Mode, Place, Sandbox, Upstream};

scenarios![
    every_path_is_probed_and_goes_where_policy_says,
    without_a_proxy_every_path_fails_as_the_service_asks,
    what_is_observed_or_excluded_passes_on_every_path,
    what_does_not_happen_as_policy_says_fails_the_check,
    a_path_that_the_kernel_has_not_is_told,
    a_resolver_of_this_hosts_keeps_its_port,
    without_a_daemon_the_check_says_so,
];
scenarios![only hosts: where_only_names_are_steered_a_name_is_probed];

#[derive(Debug, Deserialize)]
struct Report {
    version: u32,
    paths: Vec<Tried>,
    agrees: bool,
}

#[derive(Debug, Deserialize)]
struct Tried {
    path: String,
    family: String,
    happened: String,
    detail: String,
    agrees: Option<bool>,
    decision: Option<String>,
    name: Option<String>,
}

const STREAMS: [&str; 4] = ["tcp", "fast_open", "io_uring", "mptcp"];
const DNS_BY_DATAGRAM: [&str; 2] = ["dns_udp", "dns_udp_unconnected"];
const FAMILIES: [&str; 3] = ["ipv4", "ipv6", "mapped"];

impl Report {
    #[track_caller]
    fn of(finished: &Finished) -> Self {
        let report: Self =
            serde_json::from_str(&finished.stdout).unwrap_or_else(|error| panic!("{error}: {finished:?}"));
        assert_eq!(report.version, 1);
        report
    }

    /// What happened on some paths, in every family, and that it is what policy says.
    #[track_caller]
    fn happened(&self, paths: &[&str], expected: &str) {
        for path in paths {
            let found: Vec<&Tried> = self.paths.iter().filter(|tried| tried.path == *path).collect();
            let families: Vec<&str> = found.iter().map(|tried| tried.family.as_str()).collect();
            assert!(FAMILIES.iter().all(|family| families.contains(family)), "{path}: {self:#?}");
            assert_eq!(families.len(), FAMILIES.len(), "{path}: {self:#?}");
            let as_expected = |tried: &&Tried| tried.happened == expected && tried.agrees == Some(true);
            assert!(found.iter().all(as_expected), "{path} {expected}: {found:#?}");
        }
    }
}

fn every_path_is_probed_and_goes_where_policy_says(sandbox: &Sandbox) {
    let settings =
        format!("  cart: {{ cgroup: {}, capture: {{ dns: true }} }}\n", sandbox.cgroup(Place::Cart));
    let mesh = Mesh::start(sandbox, &settings);
    // It need not be enabled.
    let with_dns = check(sandbox, "cart");
    with_dns.happened(&STREAMS, "steered");
    with_dns.happened(&DNS_BY_DATAGRAM, "steered");
    with_dns.happened(&["dns_tcp"], "steered");
    with_dns.happened(&["udp"], "passed");
    assert_eq!(with_dns.paths.len(), 8 * FAMILIES.len());
    mesh.agent.enable("shop");
    let without = check(sandbox, "shop");
    without.happened(&STREAMS, "steered");
    without.happened(&["dns_tcp"], "steered");
    without.happened(&DNS_BY_DATAGRAM, "passed");
    let text = Agent::command(sandbox, &["check", "shop"]);
    assert!(text.ok().contains("shop is enabled") && text.ok().contains("MPTCP, IPv6"), "{text:?}");
    assert_eq!(mesh.agent.counters("shop").errors, 0);
}

fn without_a_proxy_every_path_fails_as_the_service_asks(sandbox: &Sandbox) {
    let settings = format!(
        "  cart: {{ cgroup: {}, failure: closed, capture: {{ dns: true }} }}\n",
        sandbox.cgroup(Place::Cart)
    );
    let mesh = Mesh::start(sandbox, &settings);
    mesh.proxy.sigkill();
    sandbox.settle();
    let open = check(sandbox, "shop");
    open.happened(&STREAMS, "passed");
    open.happened(&DNS_BY_DATAGRAM, "passed");
    let closed = check(sandbox, "cart");
    closed.happened(&STREAMS, "refused");
    closed.happened(&["udp", "dns_tcp"], "passed");
    closed.happened(&DNS_BY_DATAGRAM, "passed");
}

fn what_is_observed_or_excluded_passes_on_every_path(sandbox: &Sandbox) {
    let cart = format!("  cart: {{ cgroup: {}, capture: listed }}\n", sandbox.cgroup(Place::Cart));
    let mesh = Mesh::start(sandbox, &cart);
    Agent::command(sandbox, &["enable", "--observe", "shop"]).ok();
    for (service, decision) in [("shop", "observed"), ("cart", "passed_by_rule")] {
        let report = check(sandbox, service);
        report.happened(&STREAMS, "passed");
        report.happened(&["udp", "dns_tcp"], "passed");
        report.happened(&DNS_BY_DATAGRAM, "passed");
        let streams = report.paths.iter().filter(|tried| STREAMS.contains(&tried.path.as_str()));
        let mut decisions = streams.map(|tried| tried.decision.as_deref());
        assert!(decisions.all(|found| found == Some(decision)), "{report:?}");
    }
    assert_eq!(mesh.agent.counters("shop").steered, 0);
}

/// A packet filter lets no UDP through.
fn what_does_not_happen_as_policy_says_fails_the_check(sandbox: &Sandbox) {
    let _mesh = Mesh::start(sandbox, "");
    let chain = "type filter hook output priority 0; meta l4proto udp drop";
    let table = format!("table inet lossy {{\nchain out {{\n{chain}\n}}\n}}");
    sandbox.program(Place::Outside, "nft").arg(&table).run().ok();
    let finished = Agent::command(sandbox, &["check", "shop", "--json"]);
    finished.failed_with(1);
    let report = Report::of(&finished);
    assert!(!report.agrees);
    report.happened(&STREAMS, "steered");
    for tried in report.paths.iter().filter(|tried| tried.path == "udp") {
        assert_eq!((tried.agrees, tried.happened == "passed"), (Some(false), false), "{tried:?}");
    }
}

fn a_path_that_the_kernel_has_not_is_told(sandbox: &Sandbox) {
    let _mesh = Mesh::start(sandbox, "");
    for (switch, value) in [("net.mptcp.enabled", "0"), ("net.ipv4.tcp_fastopen", "0")] {
        sandbox.enter(|| {
            let path = format!("/proc/sys/{}", switch.replace('.', "/"));
            fs::write(path, value).expect("switch a path off");
        });
    }
    sandbox
        .program(Place::Outside, "ip")
        .args(["address", "flush", "dev", "eth0", "scope", "global"])
        .run()
        .ok();
    sandbox.program(Place::Outside, "ip").args(["address", "add", "10.77.0.1/24", "dev", "eth0"]).run().ok();
    let report = check(sandbox, "shop");
    for (path, switch) in [("mptcp", "net.mptcp.enabled"), ("fast_open", "net.ipv4.tcp_fastopen")] {
        let of_path = |tried: &&Tried| tried.path == path && tried.family == "ipv4";
        let tried = report.paths.iter().find(of_path).expect("the path");
        assert_eq!((tried.happened.as_str(), tried.agrees), ("unavailable", None), "{tried:?}");
        assert!(tried.detail.contains(switch), "{tried:?}");
    }
    let ipv6 = report.paths.iter().filter(|tried| tried.family == "ipv6");
    let told = |tried: &Tried| tried.happened == "not_probed" && tried.detail.contains("no IPv6 address");
    assert!(ipv6.clone().count() == 8 && ipv6.clone().all(told), "{report:#?}");
}

fn a_resolver_of_this_hosts_keeps_its_port(sandbox: &Sandbox) {
    let _mesh = Mesh::start(sandbox, "");
    let _resolver = Upstream::resolver(sandbox, Place::Outside, "local", &["10.77.0.1"]);
    let report = check(sandbox, "shop");
    let dns = report.paths.iter().filter(|tried| tried.path.starts_with("dns") && tried.family != "ipv6");
    let told = |tried: &Tried| tried.happened == "not_probed" && tried.detail.contains("port 53");
    assert!(dns.clone().count() == 6 && dns.clone().all(told), "{report:#?}");
    report.happened(&STREAMS, "steered");
}

fn without_a_daemon_the_check_says_so(sandbox: &Sandbox) {
    Agent::start(sandbox, "").stop();
    let refused = Agent::command(sandbox, &["check", "shop"]);
    let complaint = refused.failed_with(1);
    assert!(complaint.contains("agent.sock") && complaint.contains("mesh-redirect run"), "{complaint}");
}

fn where_only_names_are_steered_a_name_is_probed(sandbox: &Sandbox) {
    assert_eq!(sandbox.mode, Mode::Hosts);
    let mesh = Mesh::start(sandbox, "");
    let report = check(sandbox, "shop");
    let name = &report.paths[0];
    assert_eq!((name.path.as_str(), name.name.as_deref()), ("name", Some("catalog")));
    assert_eq!((name.happened.as_str(), name.agrees), ("steered", Some(true)), "{name:?}");
    report.happened(&STREAMS, "passed");
    let text = Agent::command(sandbox, &["check", "shop"]);
    assert!(text.ok().contains("only names can be steered"), "{text:?}");
    assert_eq!(mesh.instances.iter().map(Upstream::connections).sum::<usize>(), 0, "nothing leaves");
}

#[track_caller]
fn check(sandbox: &Sandbox, service: &str) -> Report {
    let finished = Agent::command(sandbox, &["check", service, "--json"]);
    assert!(finished.succeeded(), "{finished:#?}");
    Report::of(&finished)
}
