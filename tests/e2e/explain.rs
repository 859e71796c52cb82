//! What `explain` says of a destination, while it holds.

use std::fs;
use std::time::Duration;

use serde::Deserialize;
use tests::{
    Agent, Finished, INSTANCES, Mesh, ORIGIN, ORIGIN_V6, Place, RESOLVERS, Sandbox, Upstream, binary,
    eventually,
};

scenarios![
    a_decision_follows_what_holds_now,
    a_rule_is_told_with_the_line_it_is_written_at,
    all_ports_are_told_where_none_is_asked_about,
    each_address_of_a_name_is_told_with_who_says_so,
];
scenarios![only hosts: a_name_is_told_by_the_line_of_the_hosts_file];

const SOON: Duration = Duration::from_secs(5);

#[derive(Debug, Deserialize)]
struct Explanations {
    version: u32,
    service: String,
    now: Now,
    explained: Vec<Explained>,
}

#[derive(Debug, Deserialize)]
struct Now {
    mode: String,
    daemon: bool,
    enabled: bool,
    observed: bool,
    proxy: Families,
    dns: Families,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
struct Families {
    ipv4: bool,
    ipv6: bool,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
struct Explained {
    destination: String,
    ports: Option<String>,
    name: Option<String>,
    from: Option<String>,
    proto: String,
    decision: String,
    steered: bool,
    because: String,
    rule: Option<String>,
    file: Option<String>,
    line: Option<usize>,
}

fn a_decision_follows_what_holds_now(sandbox: &Sandbox) {
    let closed = format!("  cart: {{ cgroup: {}, failure: closed }}\n", sandbox.cgroup(Place::Cart));
    let mesh = Mesh::start(sandbox, &closed);
    let to = format!("{ORIGIN}:8080");
    let said = explain(sandbox, "shop", &[&to]);
    assert_eq!((said.version, said.service.as_str(), said.now.enabled), (1, "shop", false));
    assert_eq!((said.now.mode.as_str(), said.now.daemon), (sandbox.mode.name(), true));
    assert_eq!((said.now.proxy, said.now.dns), (BOTH, BOTH));
    assert_eq!(said.explained[0].decision, "steered", "as if it were enabled");
    let text = Agent::command(sandbox, &["explain", "shop", &to]);
    assert!(text.ok().contains("shop is not enabled") && text.ok().contains("built in"), "{text:?}");

    mesh.agent.enable_all(&["shop".to_owned(), "cart".to_owned()]);
    Agent::command(sandbox, &["enable", "--observe", "stock"]).ok();
    for (service, expected) in [("shop", "steered"), ("cart", "steered"), ("stock", "observed")] {
        let Explanations { now, explained, .. } = explain(sandbox, service, &[&to]);
        assert_eq!((now.enabled, now.observed), (true, service == "stock"));
        assert_eq!((explained[0].decision.as_str(), explained[0].steered), (expected, true), "{service}");
    }
    mesh.proxy.sigkill();
    for (service, expected) in [("shop", "passed_proxy_absent"), ("cart", "refused"), ("stock", "observed")] {
        let explained = &explain(sandbox, service, &[&to]).explained[0];
        assert_eq!((explained.decision.as_str(), explained.steered), (expected, true), "{explained:?}");
    }
    mesh.agent.stop();
    let Explanations { now, explained, .. } = explain(sandbox, "cart", &[&to]);
    assert_eq!((now.daemon, now.enabled, explained[0].decision.as_str()), (false, true, "refused"));
}

const BOTH: Families = Families { ipv4: true, ipv6: true };

fn a_rule_is_told_with_the_line_it_is_written_at(sandbox: &Sandbox) {
    let settings = "  cart: { capture: { include: [10.77.0.10/32] } }
capture:
  base: all
  dns: true
  exclude:
    - 10.77.0.2
    - service: catalog
      ports: [8080]
";
    let yaml = Agent::yaml(sandbox, settings);
    let line = |text: &str| yaml.lines().position(|line| line.contains(text)).expect("such a line") + 1;
    let mesh = Mesh::start(sandbox, settings);
    eventually("the proxy's services are known", SOON, || sandbox.path("state/routable.json").exists());
    let cases = [
        ("shop", "10.88.0.1:80", "steered", "base all", Some(line("base: all"))),
        ("shop", "10.77.0.2:80", "passed_by_rule", "exclude 10.77.0.2/32", Some(line("- 10.77.0.2"))),
        (
            "shop",
            "10.77.0.3:8080",
            "passed_by_rule",
            "exclude service catalog ports 8080 (endpoint 10.77.0.3:8080 of catalog)",
            Some(line("- service: catalog")),
        ),
        ("shop", "8.8.8.8:53", "steered", "dns (queries)", Some(line("dns: true"))),
        ("cart", "10.77.0.10:80", "steered", "include 10.77.0.10/32", Some(line("  cart:"))),
        ("cart", "10.77.0.11:80", "passed_by_rule", "base listed", Some(line("  cart:"))),
        ("cart", "10.77.0.2:80", "passed_by_rule", "base listed", Some(line("  cart:"))),
    ];
    for (service, to, decision, rule, line) in cases {
        let explained = &explain(sandbox, service, &[to]).explained[0];
        assert_eq!((explained.destination.as_str(), explained.proto.as_str()), (to, "tcp"));
        let said = (explained.decision.as_str(), explained.rule.as_deref(), explained.line);
        assert_eq!(said, (decision, Some(rule), line), "{explained:?}");
        assert_eq!(explained.file, Some(sandbox.path("agent.yaml").display().to_string()));
    }
    let place = format!("{}:{}", sandbox.path("agent.yaml").display(), line("- 10.77.0.2"));
    let text = Agent::command(sandbox, &["explain", "shop", "10.77.0.2:80"]);
    assert!(text.ok().contains(&place), "{text:?}");

    let queries = explain(sandbox, "shop", &["--proto", "udp", "8.8.8.8:53", "10.77.0.2:53", "8.8.8.8:123"]);
    let decisions: Vec<&str> =
        queries.explained.iter().map(|explained| explained.decision.as_str()).collect();
    assert_eq!(decisions, ["query", "ignored", "ignored"]);
    let local = &explain(sandbox, "shop", &["127.0.0.1:80"]).explained[0];
    assert_eq!((local.decision.as_str(), &local.rule, local.line), ("passed_by_rule", &None, None));
    drop(mesh);
}

fn all_ports_are_told_where_none_is_asked_about(sandbox: &Sandbox) {
    let _mesh = Mesh::start(sandbox, "capture: { exclude: [{ ports: [22, 8000-8999] }] }\n");
    let ports = |to: &str| -> Vec<(String, String)> {
        let explained = explain(sandbox, "shop", &[to]).explained.into_iter();
        explained.map(|explained| (explained.ports.unwrap_or_default(), explained.decision)).collect()
    };
    let expected = [
        ("1-21", "steered"),
        ("22", "passed_by_rule"),
        ("23-7999", "steered"),
        ("8000-8999", "passed_by_rule"),
        ("9000-65535", "steered"),
    ];
    let expected = expected.map(|(ports, decision)| (ports.to_owned(), decision.to_owned()));
    assert_eq!(ports(ORIGIN), expected);
    assert_eq!(ports(ORIGIN_V6), expected);
    assert_eq!(ports("127.0.0.1"), [("1-65535".to_owned(), "passed_by_rule".to_owned())]);
}

fn each_address_of_a_name_is_told_with_who_says_so(sandbox: &Sandbox) {
    let settings =
        format!("  cart: {{ capture: {{ dns: false }} }}\ncapture: {{ dns: true, exclude: [{ORIGIN}] }}\n");
    let mesh = Mesh::enabled(sandbox, &settings);
    let _resolver = Upstream::resolver(sandbox, Place::Peer, "resolver", &[RESOLVERS[0]]);
    let answers = |service: &str, name: &str| -> Vec<(String, String, String)> {
        let said = by_name(sandbox, service, name).explained.into_iter();
        said.map(|said| (said.from.unwrap_or_default(), said.destination, said.decision)).collect()
    };
    let of_resolver = ("the resolver".to_owned(), format!("{ORIGIN}:8080"), "passed_by_rule".to_owned());
    let routed = answers("shop", "catalog:8080");
    assert_eq!(routed.len(), 3, "{routed:?}");
    for (answer, family) in routed.iter().zip(["241.", "[fdb2:"]) {
        assert!(answer.0 == "the proxy's DNS" && answer.1.starts_with(family), "{answer:?}");
        assert_eq!(answer.2, "steered");
    }
    assert_eq!(routed[2], of_resolver);
    assert_eq!(answers("cart", "catalog:8080"), [of_resolver]);
    let known = by_name(sandbox, "shop", "other.test:80");
    assert!(known.explained.iter().all(|said| said.name.as_deref() == Some("other.test")), "{known:?}");
    let absent = answers("shop", "absent.test:80");
    assert_eq!((absent.len(), absent[0].2.as_str()), (1, "unresolved"), "{absent:?}");

    // The one file that every resolver reads first.
    fs::write(sandbox.hosts(), format!("127.0.0.1 localhost\n{} catalog\n", INSTANCES[0])).expect("a file");
    let by_file = format!("{}:2", sandbox.hosts().display());
    let expected = (by_file, format!("{}:8080", INSTANCES[0]), "steered".to_owned());
    assert_eq!(answers("shop", "catalog:8080"), [expected]);
    drop(mesh);
}

fn a_name_is_told_by_the_line_of_the_hosts_file(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    eventually("the name is in the file", SOON, || {
        fs::read_to_string(sandbox.hosts()).is_ok_and(|text| text.contains("\tcatalog"))
    });
    let Explanations { now, explained, .. } = by_name(sandbox, "shop", "catalog:8080");
    assert_eq!((now.mode.as_str(), explained.len()), ("hosts", 1), "{explained:?}");
    assert_eq!((explained[0].decision.as_str(), explained[0].steered), ("steered", true));
    assert!(explained[0].destination.starts_with("127.66."), "{explained:?}");
    assert_eq!(explained[0].from, Some(format!("{}:3", sandbox.hosts().display())));
    let address = &explain(sandbox, "shop", &[&format!("{ORIGIN}:8080")]).explained[0];
    assert_eq!((address.decision.as_str(), address.steered), ("ignored", false));
    let other = &by_name(sandbox, "shop", "other.test:80").explained[0];
    assert_eq!((other.decision.as_str(), other.from.as_deref()), ("ignored", Some("the resolver")));
    mesh.agent.disable("shop");
    let left = &by_name(sandbox, "shop", "catalog:8080").explained[0];
    assert_eq!((left.decision.as_str(), left.destination.as_str()), ("ignored", "10.77.0.10:8080"));
}

#[track_caller]
fn explain(sandbox: &Sandbox, service: &str, arguments: &[&str]) -> Explanations {
    parsed(&Agent::command(sandbox, &[&["explain", "--json", service], arguments].concat()))
}

/// Where the sandbox's resolver is the system's.
#[track_caller]
fn by_name(sandbox: &Sandbox, service: &str, name: &str) -> Explanations {
    let program = binary("mesh-redirect").display().to_string();
    let config = sandbox.path("agent.yaml").display().to_string();
    let command = ["--config", &config, "explain", "--json", service, name];
    parsed(&sandbox.resolving(Place::Outside, RESOLVERS[0], &program).args(command).run())
}

#[track_caller]
fn parsed(finished: &Finished) -> Explanations {
    serde_json::from_str(finished.ok()).unwrap_or_else(|error| panic!("{error}: {finished:?}"))
}
