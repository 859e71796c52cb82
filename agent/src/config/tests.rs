use super::*;

fn parse(text: &str) -> Result<Config, String> {
    Config::parse(Path::new("agent.yaml"), text).map_err(|error| error.to_string())
}

fn refused(text: &str) -> String {
    parse(text).expect_err("must be refused")
}

#[test]
fn nothing_written_means_the_defaults() {
    let config = parse("").unwrap();
    let admin = "127.0.0.1:15000".parse().unwrap();
    let proxy =
        Proxy { port: 15001, dns_port: 15053, admin, scope: Scope::Unit("mesh-proxy.service".into()) };
    assert_eq!((config.mode, config.proxy), (Wanted::Auto, proxy));
    let (include, exclude) = ([].into(), [].into());
    let (base, dns) = (Written::built_in(Base::All), Written::built_in(false));
    let policy = Policy { failure: Failure::Open, base, include, exclude, dns };
    assert_eq!(config.defaults, policy);
    assert_eq!(config.paths.pins, Path::new("/sys/fs/bpf/mesh-redirect"));
}

#[test]
fn a_service_inherits_what_it_does_not_say() {
    let config = parse(
        "failure: closed\ncapture:\n  exclude: [10.9.0.0/16]\nservices:\n  a: { cgroup: /a }\n  b: { failure: open, capture: { exclude: [] } }\n",
    )
    .unwrap();
    assert_eq!(config.policy("a").failure, Failure::Closed);
    assert_eq!(config.policy("a").exclude.len(), 1);
    assert_eq!(config.policy("b").failure, Failure::Open);
    assert!(config.policy("b").exclude.is_empty());
    assert_eq!(config.policy("named nowhere"), &config.defaults);
    assert_eq!(config.services["a"].scope, Some(Scope::Cgroup("/a".into())));
}

#[test]
fn a_service_is_a_unit_a_cgroup_a_user_a_users_unit_or_a_container() {
    let config = parse("services:\n  a: { user: root }\n  b: { user: 1000, unit: app.service }\n  c: { container: web-1 }\n  d: { unit: shop.slice }\n").unwrap();
    let scope = |name: &str| config.services[name].scope.clone().unwrap();
    assert_eq!(scope("a"), Scope::User(0));
    assert_eq!(scope("b"), Scope::UserUnit { user: 1000, unit: "app.service".into() });
    assert_eq!(scope("c"), Scope::Container("web-1".into()));
    assert_eq!(scope("d"), Scope::Unit("shop.slice".into()));
}

#[test]
fn captures_are_blocks_ports_or_both() {
    let config = parse("capture:\n  include:\n    - fd00::/8\n    - 10.1.2.3\n    - { cidr: 10.0.0.0/8, ports: [80, 8000-8999] }\n    - ports: [5432]\n").unwrap();
    let block = |text: &str| Destinations::Block(text.parse().unwrap());
    let expected = vec![
        Capture { destinations: block("fd00::/8"), ports: vec![] },
        Capture { destinations: block("10.1.2.3/32"), ports: vec![] },
        Capture {
            destinations: block("10.0.0.0/8"),
            ports: vec![Ports { first: 80, last: 80 }, Ports { first: 8000, last: 8999 }],
        },
        Capture { destinations: Destinations::Any, ports: vec![Ports { first: 5432, last: 5432 }] },
    ];
    let found: Vec<Capture> = config.defaults.include.iter().map(|include| include.value.clone()).collect();
    assert_eq!(found, expected);
}

#[test]
fn the_base_is_all_unless_something_is_listed_or_it_is_said() {
    let base = |text: &str| parse(text).unwrap().defaults.base.value;
    assert_eq!(base(""), Base::All);
    assert_eq!(base("capture: { include: [10.0.0.0/8] }"), Base::Listed);
    assert_eq!(base("capture: { base: all, include: [10.0.0.0/8] }"), Base::All);
    assert_eq!(base("capture: routable"), Base::Routable);
    let config = parse("capture: { base: routable, dns: true }\nservices:\n  a: { capture: listed }\n  b: { capture: { include: [{ service: catalog, ports: [80] }] } }\n  c: { capture: { dns: false } }\n").unwrap();
    let said = |name: &str| (config.policy(name).base.value, config.policy(name).dns.value);
    assert_eq!(said("a"), (Base::Listed, true));
    assert_eq!(config.policy("b").include[0].value.destinations, Destinations::Service("catalog".into()));
    assert_eq!((said("b").0, said("c")), (Base::Listed, (Base::Routable, false)));
    assert!(config.policy("a").follows_routable() && !parse("").unwrap().defaults.follows_routable());
}

#[test]
fn what_is_said_knows_its_line_and_is_the_same_wherever_it_is_said() {
    let config = parse("capture:\n  base: all\n  dns: true\n  exclude:\n    - 10.0.0.0/8\n    - ports: [22]\nservices:\n  a: {}\n  b:\n    capture: routable\n  c:\n    capture:\n      include: [10.0.0.0/8]\n  d: { capture: { base: all, dns: true, exclude: [10.0.0.0/8, { ports: [22] }] } }\n  e: { capture: { exclude: &x [{ ports: [1] }] } }\n  f: { capture: { exclude: *x } }\n").unwrap();
    let lines = |name: &str| {
        let policy = config.policy(name);
        let excludes = policy.exclude.iter().map(|exclude| exclude.line.unwrap()).collect::<Vec<_>>();
        (policy.base.line, policy.dns.line, excludes)
    };
    assert_eq!(lines("a"), (Some(2), Some(3), vec![5, 6]), "inherited");
    assert_eq!(lines("b"), (Some(10), Some(3), vec![5, 6]));
    assert_eq!(lines("c"), (Some(13), Some(3), vec![5, 6]), "a list stands for its base");
    assert_eq!(lines("d"), (Some(14), Some(14), vec![14, 14]));
    assert_eq!((lines("e").2, lines("f").2), (vec![15], vec![15]), "an alias is written where its anchor is");
    assert_eq!(config.policy("a"), config.policy("d"));
    assert_eq!(parse("").unwrap().defaults.base.line, None);
}

/// What is written, where the message points, and what it has to say.
#[test]
fn every_fault_is_named_with_its_place_and_what_was_expected() {
    let cases = [
        ("colour: red\n", "1:1", "unknown field `colour`"),
        ("mode: magic\n", "1:7", "expected one of auto, ebpf, nftables, hosts"),
        ("proxy: { admin: localhost }\n", "1:17", "socket address"),
        ("failure: ajar\n", "1:10", "expected one of open, closed"),
        ("capture:\n  include:\n    - 10.0.0.0/33\n", "3:7", "`10.0.0.0/33` is not a CIDR; expected"),
        ("capture:\n  include: [10.0.0.1/8]\n", "2:13", "has host bits set; expected 10.0.0.0/8"),
        (
            "capture:\n  exclude:\n    - ports: [70000]\n",
            "3:15",
            "`70000` is not a port; expected 1 to 65535",
        ),
        ("capture:\n  exclude:\n    - ports: [0]\n", "3:15", "`0` is not a port"),
        ("capture:\n  exclude:\n    - ports: [90-80]\n", "3:15", "ends before it begins"),
        ("capture:\n  exclude:\n    - port: 80\n", "3:7", "unknown field `port`"),
        ("capture:\n  exclude:\n    - { cidr: 10.0.0.0/8, service: a }\n", "3:7", "expected one of them"),
        ("capture: some\n", "1:1", "expected one of all, routable, listed"),
        ("capture: { base: 7 }\n", "1:18", "expected"),
        ("capture: { dns: maybe }\n", "1:17", "bool"),
        ("proxy: { dns_port: 65530 }\n", "1:20", "16 ports from 65530 on"),
        ("services:\n  a: { cgroup: /a }\n  a: { cgroup: /b }\n", "3:3", "duplicate"),
        ("services:\n  a: { cgroup: /a, unit: a.service }\n", "2:26", "expected one of them"),
        ("services:\n  a: { cgroup: /a, user: 7 }\n", "2:16", "expected one of them"),
        ("services:\n  a: { user: nobody-at-all }\n", "2:14", "no user `nobody-at-all`"),
        ("services:\n  a: { container: a/b }\n", "2:19", "is not a service name"),
        ("services:\n  a: { cgroup: a }\n", "2:16", "expected a path below the cgroup2 mount"),
        ("services:\n  a: { cgroup: / }\n", "2:16", "not its root"),
        ("services:\n  a: { cgroup: /x/../y }\n", "2:16", "is not a cgroup"),
        ("services:\n  a: { unit: payments }\n", "2:14", "expected NAME.service"),
        ("services:\n  a b: { cgroup: /a }\n", "2:3", "is not a service name"),
        ("proxy: { port: http }\n", "1:16", "`http` is not a port"),
        ("proxy: { port: 1-2 }\n", "1:16", "where one is expected"),
        ("paths: { run: here }\n", "1:15", "relative path"),
        ("paths: { pins: /sys/fs/bpf/a.b }\n", "1:16", "without dots"),
        ("services: [a]\n", "1:11", "expected"),
        ("proxy:\n\tport: 1\n", "2:2", "tab"),
    ];
    let wrong: Vec<_> = cases
        .into_iter()
        .map(|(text, place, says)| (text, format!("agent.yaml:{place}: "), says, refused(text)))
        .filter(|(_, place, says, message)| !message.starts_with(place) || !message.contains(says))
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Prose begins with one blank after the mark, configuration with none or with its indentation.
#[test]
fn the_packaged_file_is_the_defaults_and_valid_when_uncommented() {
    let packaged = include_str!("../../../packaging/agent.yaml");
    assert_eq!(parse(packaged).unwrap(), parse("").unwrap());
    let is_prose = |line: &str| line.starts_with("# ") && !line.starts_with("#  ");
    let lines: Vec<&str> = packaged.lines().filter(|line| !is_prose(line)).collect();
    let uncommented: String =
        lines.iter().map(|line| line.trim_start_matches('#').to_owned() + "\n").collect();
    let config = parse(&uncommented).unwrap();
    assert_eq!(config.defaults.exclude.len(), 4);
    assert_eq!(config.policy("payments").failure, Failure::Closed);
    assert_eq!((config.paths, config.proxy), (parse("").unwrap().paths, parse("").unwrap().proxy));
}

#[test]
fn a_named_file_that_is_absent_is_an_error() {
    let error = Config::load(Some(Path::new("/nonexistent/agent.yaml"))).unwrap_err().to_string();
    assert!(error.starts_with("/nonexistent/agent.yaml: "), "{error}");
}

#[test]
fn whatever_is_written_is_refused_at_a_place_or_means_something_sound() {
    const FULL: &str = "mode: auto
paths: { run: /run/mr, state: /var/lib/mr, pins: /sys/fs/bpf/mr, hosts: /etc/hosts, hooks: /h }
proxy: { port: 15001, dns_port: 15053, admin: '127.0.0.1:15000', unit: mesh-proxy.service }
failure: closed
capture: { base: listed, dns: true, include: [fd00::/8, { cidr: 10.0.0.0/8, ports: [80, 8000-8999] }] }
services:
  a: { cgroup: /a/b, failure: open, capture: routable }
  b: { user: 1000, unit: app.service, capture: { exclude: [{ service: legacy }, { ports: [5432] }] } }
  c: { container: web-1 }
";
    let seeds = [FULL, include_str!("../../../packaging/agent.yaml")].map(str::as_bytes);
    let words = [
        ": ",
        "- ",
        "{ ",
        " }",
        "[",
        "]",
        ", ",
        "#",
        "'",
        "\"",
        "&a ",
        "*a",
        "<<: *a",
        "|\n",
        "!!str ",
        "~",
        "include",
        "services",
        "ports",
        "cidr",
        "1-",
        "::/0",
        "10.0.0.1/8",
        "user: root",
        "unit: x.slice",
        "0x10",
        "1e3",
        ".nan",
        "---\n",
        "\t",
    ];
    is_sound(&Config::parse(Path::new("agent.yaml"), FULL).unwrap());
    fuzz::damaged!(seeds, words, |input: &[u8]| {
        let text = String::from_utf8_lossy(input);
        match Config::parse(Path::new("agent.yaml"), &text) {
            Ok(config) => is_sound(&config),
            Err(ConfigError::Invalid { line, column, message, .. }) => {
                let lines = text.split(['\n', '\r']).count() as u64;
                assert!((1..=lines + 1).contains(&line) && column > 0, "{line}:{column}: {message}");
                assert!(!message.is_empty() && !message.contains(char::is_control), "{message:?}");
            }
            Err(error) => panic!("{error}"),
        }
    });
}

fn is_sound(config: &Config) {
    let Paths { run, state, pins, hosts, hooks } = &config.paths;
    assert!([run, state, pins, hosts, hooks].into_iter().all(|path| path.is_absolute()));
    assert!(
        config.proxy.port > 0 && config.proxy.dns_port.checked_add(agent_ebpf::RESOLVER_PORTS - 1).is_some()
    );
    let scopes = config.services.values().filter_map(|service| service.scope.as_ref());
    for scope in scopes.chain([&config.proxy.scope]) {
        match scope {
            Scope::Cgroup(path) => check_cgroup(path).unwrap(),
            Scope::Unit(unit) | Scope::UserUnit { unit, .. } => check_unit(unit).unwrap(),
            Scope::Container(name) => check_name(name).unwrap(),
            Scope::User(_) => {}
        }
    }
    config.services.keys().for_each(|name| check_name(name).unwrap());
    let policies = config.services.values().map(|service| &service.policy).chain([&config.defaults]);
    for capture in policies.flat_map(|policy| policy.include.iter().chain(&*policy.exclude)) {
        assert!(
            capture.value.ports.iter().all(|ports| ports.first > 0 && ports.first <= ports.last),
            "{}",
            capture.value
        );
        if let Destinations::Block(block) = capture.value.destinations {
            assert_eq!(block.addr(), block.network());
        }
    }
}
