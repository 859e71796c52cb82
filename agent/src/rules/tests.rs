use super::*;
use crate::config::Config;
use agent_ebpf::{VERDICT_PASS, decide as kernel};
use std::path::Path;

fn policy(text: &str) -> Policy {
    Config::parse(Path::new("agent.yaml"), text).unwrap().defaults
}

/// The proxy routes `catalog`, by name and at an endpoint, and `stock`, where the random world is.
fn routable() -> Routable {
    let json = br#"{"version": 1, "services": [{"name": "catalog",
        "domains": [{"name": "catalog.internal", "virtual": ["241.3.7.9"]}],
        "addresses": ["10.77.0.10"], "endpoints": ["10.77.0.2:8080"]},
        {"name": "stock", "addresses": ["10.0.0.3", "fd00::5"], "endpoints": ["10.0.0.6:7", "[fd00::9]:8"]}]}"#;
    Routable::parse(json).unwrap()
}

/// What the kernel would say of a destination: the rules of the longest prefix, then the range around the port.
fn looked_up(entries: &[Entry], destination: SocketAddr) -> bool {
    let found = entries
        .iter()
        .filter(|entry| entry.net.contains(&destination.ip()))
        .max_by_key(|entry| entry.net.prefix_len());
    found.map_or(VERDICT_PASS, |entry| kernel::verdict(&entry.rules, destination.port())) == VERDICT_STEER
}

fn steers(policy: &Policy, destination: SocketAddr) -> bool {
    decide(policy, &routable(), destination).is_steered()
}

/// What the definition says of a destination, why, and where that is written.
fn said(policy: &Policy, destination: &str) -> String {
    shown(&decide(policy, &routable(), destination.parse().unwrap()))
}

fn shown(verdict: &Verdict<'_>) -> String {
    let kind = match verdict {
        Verdict::Steered(_) => "steered",
        Verdict::Excluded(_) => "excluded",
        Verdict::NotIncluded(_) => "not included",
        Verdict::Local => return "local".to_owned(),
    };
    let rule = verdict.rule().unwrap();
    let line = rule.line().map(|line| format!(" at {line}")).unwrap_or_default();
    format!("{kind}: {rule}{line}")
}

/// What the ranges say of a destination; at most one may be around it.
fn in_ranges(ranges: &[Range], destination: SocketAddr) -> bool {
    let around = |range: &&Range| {
        range.first.is_ipv4() == destination.is_ipv4()
            && (range.first..=range.last).contains(&destination.ip())
    };
    let found: Vec<&Range> = ranges.iter().filter(around).collect();
    assert!(found.len() <= 1, "{destination} is in more than one of {found:?}");
    let ports = |range: &&&Range| {
        range.ports.iter().any(|ports| (ports.first..=ports.last).contains(&destination.port()))
    };
    found.iter().any(|range| ports(&range))
}

#[track_caller]
fn steered(policy: &Policy, destination: &str) -> bool {
    let destination = destination.parse().unwrap();
    let decided = steers(policy, destination);
    assert_eq!(
        looked_up(&compile(policy, &routable()).unwrap(), destination),
        decided,
        "{destination}: compiled and defined differ"
    );
    let ranges = ranges(&compile(policy, &routable()).unwrap());
    assert_eq!(in_ranges(&ranges, destination), decided, "{destination}: {ranges:?}");
    decided
}

#[test]
fn everything_is_included_unless_the_policy_says_otherwise() {
    let policy = policy("");
    assert!(steered(&policy, "10.0.0.1:1"));
    assert!(steered(&policy, "[2001:db8::1]:65535"));
}

#[test]
fn what_the_proxy_can_route_may_be_all_that_is_steered() {
    let policy = policy("capture: { base: routable, exclude: [{ ports: [22] }] }");
    for destination in ["10.77.0.10:80", "10.77.0.2:8080", "241.3.7.9:1"] {
        assert!(steered(&policy, destination), "{destination}");
    }
    for destination in ["10.77.0.10:22", "10.77.0.2:8081", "10.77.0.11:80", "241.3.7.8:1", "[fd00::1]:80"] {
        assert!(!steered(&policy, destination), "{destination}");
    }
}

#[test]
fn a_service_is_captured_wherever_it_is() {
    let policy =
        policy("capture: { include: [10.0.0.0/8], exclude: [{ service: catalog, ports: [8000-8999] }] }");
    assert!(steered(&policy, "10.77.0.10:80") && steered(&policy, "10.77.0.2:80"));
    assert!(!steered(&policy, "10.77.0.10:8080") && !steered(&policy, "10.77.0.2:8080"));
    assert_eq!(
        said(&policy, "10.77.0.2:8080"),
        "excluded: exclude service catalog ports 8000-8999 (endpoint 10.77.0.2:8080 of catalog) at 1"
    );
}

#[test]
fn dns_is_steered_with_what_its_answers_lead_to_unless_excluded() {
    let dns =
        policy("capture: { include: [10.0.0.0/8], exclude: [10.9.0.0/16, { service: catalog }], dns: true }");
    for destination in ["8.8.8.8:53", "[2001:db8::53]:53", "241.9.9.9:443", "[fdb2:6c1e:9d04::9]:443"] {
        assert!(steered(&dns, destination), "{destination}");
    }
    for destination in ["10.9.0.53:53", "8.8.8.8:853", "241.3.7.9:443"] {
        assert!(!steered(&dns, destination), "{destination}");
    }
    assert!(!steered(&policy("capture: { include: [10.0.0.0/8] }"), "8.8.8.8:53"));
}

#[test]
fn an_exclude_wins_against_what_merely_overlaps() {
    let policy = policy("capture: { include: [10.0.0.0/8], exclude: [{ ports: [5432] }, 10.9.0.0/16] }");
    assert!(steered(&policy, "10.1.0.1:80"));
    assert!(!steered(&policy, "10.1.0.1:5432"));
    assert!(!steered(&policy, "10.9.0.1:80"));
    assert!(!steered(&policy, "192.168.0.1:80"));
}

#[test]
fn the_more_specific_wins_and_an_exclude_wins_a_tie() {
    let policy = policy(
        "capture:\n  include: [10.1.0.0/16, 10.2.0.0/16, { cidr: 10.3.0.0/16, ports: [80] }]\n  exclude: [10.0.0.0/8, 10.2.0.0/16, 10.1.1.0/24, { cidr: 10.3.0.0/16, ports: [70-90] }]\n",
    );
    assert!(steered(&policy, "10.1.0.1:80"), "an include within an exclude");
    assert!(!steered(&policy, "10.1.1.1:80"), "an exclude within that include");
    assert!(!steered(&policy, "10.2.0.1:80"), "the same block in both");
    assert!(steered(&policy, "10.3.0.1:80"), "a narrower port range");
    assert!(!steered(&policy, "10.3.0.1:81"));
}

#[test]
fn the_last_port_counts_and_families_are_apart() {
    let policy = policy("capture: { include: [{ cidr: 0.0.0.0/0, ports: [65535, 1] }] }");
    assert!(steered(&policy, "10.0.0.1:65535"));
    assert!(steered(&policy, "10.0.0.1:1"));
    assert!(!steered(&policy, "10.0.0.1:2"));
    assert!(!steered(&policy, "[2001:db8::1]:1"));
}

#[test]
fn ranges_that_touch_are_joined_and_too_many_are_an_error() {
    let touching = policy("capture: { include: [{ ports: [1-10, 11-20, 15-30] }] }");
    assert_eq!(compile(&touching, &routable()).unwrap()[0].rules.len, 1);
    let ports: Vec<String> = (0..17).map(|i| (2 * i + 1).to_string()).collect();
    let scattered =
        policy(&format!("capture: {{ include: [{{ cidr: 10.0.0.0/8, ports: [{}] }}] }}", ports.join(", ")));
    let message = compile(&scattered, &routable()).unwrap_err().to_string();
    assert!(message.starts_with("10.0.0.0/8 needs 17 separate port ranges"), "{message}");
}

#[test]
fn a_verdict_names_the_closest_capture() {
    let policy = policy(
        "capture:\n  include:\n  - 0.0.0.0/0\n  - 10.1.0.0/16\n  exclude:\n  - 10.0.0.0/8\n  - { ports: [22] }\n",
    );
    let cases = [
        ("11.0.0.1:80", "steered: include 0.0.0.0/0 at 3"),
        ("10.1.0.1:80", "steered: include 10.1.0.0/16 at 4"),
        ("10.2.0.1:80", "excluded: exclude 10.0.0.0/8 at 6"),
        ("11.0.0.1:22", "excluded: exclude any address ports 22 at 7"),
        ("[fd00::1]:80", "not included: base listed at 3"),
        ("[::ffff:10.1.0.1]:80", "steered: include 10.1.0.0/16 at 4"),
        ("127.0.0.1:80", "local"),
    ];
    for (destination, expected) in cases {
        assert_eq!(said(&policy, destination), expected, "{destination}");
    }
}

#[test]
fn what_is_built_in_has_no_line_and_what_the_proxy_routes_says_what_it_is() {
    assert_eq!(said(&policy(""), "10.0.0.1:80"), "steered: base all");
    let policy = policy("capture:\n  base: routable\n  dns: true\n");
    let cases = [
        ("10.77.0.10:80", "steered: base routable (address 10.77.0.10 of catalog) at 2"),
        ("10.77.0.2:8080", "steered: base routable (endpoint 10.77.0.2:8080 of catalog) at 2"),
        ("241.3.7.9:80", "steered: base routable (virtual address of catalog.internal) at 2"),
        ("241.3.7.10:80", "steered: dns (virtual addresses) at 3"),
        ("8.8.8.8:53", "steered: dns (queries) at 3"),
        ("8.8.8.8:80", "not included: base routable at 2"),
    ];
    for (destination, expected) in cases {
        assert_eq!(said(&policy, destination), expected, "{destination}");
    }
}

#[test]
fn ports_of_which_the_same_is_said_are_together() {
    let policy = policy("capture: { exclude: [{ ports: [22, 80-89] }, { ports: [85-99] }], dns: true }");
    let at = |address: &str| -> Vec<String> {
        let routable = routable();
        let decided = decide_ports(&policy, &routable, address.parse().unwrap());
        decided.iter().map(|(ports, verdict)| format!("{ports} {}", shown(verdict))).collect()
    };
    let first = "exclude any address ports 22, 80-89 at 1";
    assert_eq!(
        at("10.0.0.1"),
        [
            "1-21 steered: base all".to_owned(),
            format!("22 excluded: {first}"),
            "23-52 steered: base all".to_owned(),
            "53 steered: dns (queries) at 1".to_owned(),
            "54-79 steered: base all".to_owned(),
            format!("80-89 excluded: {first}"),
            "90-99 excluded: exclude any address ports 85-99 at 1".to_owned(),
            "100-65535 steered: base all".to_owned(),
        ]
    );
    assert_eq!(at("::1"), ["1-65535 local"]);
}

#[test]
fn ranges_leave_out_what_is_local_and_join_neighbours() {
    let shown = |text: &str| -> Vec<String> {
        let ranges = ranges(&compile(&policy(text), &routable()).unwrap());
        ranges.iter().map(|range| format!("{}-{}", range.first, range.last)).collect()
    };
    assert_eq!(
        shown(""),
        [
            "1.0.0.0-126.255.255.255",
            "128.0.0.0-169.253.255.255",
            "169.255.0.0-223.255.255.255",
            "241.0.0.0-241.255.255.255",
            "::2-fe7f:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
            "fec0::-feff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
        ]
    );
    assert_eq!(
        shown("capture: { include: [10.0.0.0/9, 10.128.0.0/9, 127.1.0.0/16] }"),
        ["10.0.0.0-10.255.255.255"]
    );
    let local = |address: IpAddr| {
        let destination = match address {
            IpAddr::V4(address) => Destination::from_ipv4(address.octets(), 80),
            IpAddr::V6(address) => Destination::from_ipv6(address.octets(), 80),
        };
        destination.is_local()
    };
    for range in ranges(&compile(&policy(""), &routable()).unwrap()) {
        assert!(!local(range.first) && !local(range.last), "{range:?}");
    }
}

#[test]
fn keys_carry_policy_family_and_prefix() {
    let v4 = compile(&policy("capture: { include: [10.1.0.0/16] }"), &routable()).unwrap();
    let (bits, key) = v4[0].key(9);
    assert_eq!(
        (bits, key.policy, key.family, &key.addr[..4]),
        (64 + 16, 9, u32::from(AF_INET), &[10, 1, 0, 0][..])
    );
    let v6 = compile(&policy("capture: { include: ['fd00::/8'] }"), &routable()).unwrap();
    let (bits, key) = v6[0].key(9);
    assert_eq!((bits, key.family, key.addr[0]), (64 + 8, u32::from(AF_INET6), 0xfd));
}

/// Many small policies over a small world, so that captures meet often; a seed that fails is printed with its policy.
#[test]
fn what_is_compiled_agrees_with_its_definition() {
    for seed in 1..=400 {
        let mut random = Random(seed);
        let policy = Policy {
            failure: Failure::Open,
            base: Written::built_in(
                [Base::All, Base::Routable, Base::Listed, Base::Listed][random.below(4) as usize],
            ),
            dns: Written::built_in(random.below(3) == 0),
            include: (0..random.below(4)).map(|_| random.capture()).collect(),
            exclude: (0..random.below(5)).map(|_| random.capture()).collect(),
        };
        let entries = compile(&policy, &routable()).unwrap();
        let ranges = ranges(&entries);
        for _ in 0..100 {
            let destination = random.destination();
            assert_eq!(
                looked_up(&entries, destination),
                steers(&policy, destination),
                "seed {seed}, {destination}, {policy:?}"
            );
            assert_eq!(
                in_ranges(&ranges, destination),
                steers(&policy, destination),
                "seed {seed}, {destination}, {policy:?}, {ranges:?}"
            );
        }
    }
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

    fn address(&mut self) -> IpAddr {
        let bits = self.below(16) as u32;
        if self.below(3) == 0 {
            IpAddr::V6(Ipv6Addr::from(0xfd00_u128 << 112 | u128::from(bits)))
        } else {
            IpAddr::V4(Ipv4Addr::from(10 << 24 | bits))
        }
    }

    fn capture(&mut self) -> Written<Capture> {
        let destinations = match self.below(6) {
            0 => Destinations::Any,
            1 => Destinations::Service("stock".to_owned()),
            _ => {
                let address = self.address();
                let longest = if address.is_ipv4() { 32 } else { 128 };
                Destinations::Block(IpNet::new_assert(address, longest - self.below(5) as u8).trunc())
            }
        };
        let ports = (0..self.below(3)).map(|_| self.ports()).collect();
        Written::built_in(Capture { destinations, ports })
    }

    fn ports(&mut self) -> Ports {
        let first = 1 + self.below(12) as u16;
        Ports { first, last: first + self.below(6) as u16 }
    }

    fn destination(&mut self) -> SocketAddr {
        let address = self.address();
        SocketAddr::new(address, self.below(20) as u16)
    }
}
