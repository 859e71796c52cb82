//! What becomes of one connection or datagram, by what policy says and what holds now: pure.
//!
//! What policy says comes from its definition ([`rules::decide`]), what follows from it is what the hooks themselves run
//! ([`agent_ebpf::decide::connect`]).

use super::Now;
use crate::{
    config::{Config, Failure, Policy, Ports},
    mode::Mode,
    reason::Reason,
    routable::Routable,
    rules,
};
use agent_ebpf::{
    AF_INET, DNS_PORT, FAILURE_CLOSED, FAILURE_OPEN, MAX_PORT_RANGES, NAME_LEN, PHASE_ENFORCE, PHASE_OBSERVE,
    PortRange, RESERVED, RuleKey, Rules, Service, VERDICT_STEER,
    decide::{self, Attempt, Decision, Destination, Host, Transport},
};
use serde::Serialize;
use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, SocketAddr},
};

/// What is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Proto {
    #[default]
    Tcp,
    Udp,
}

/// What becomes of it, in the words of the counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    /// It goes to the proxy.
    Steered,
    /// It is a DNS query by datagram, and goes to the proxy.
    Query,
    PassedByRule,
    PassedProxyAbsent,
    Refused,
    /// It would be steered, were the service not only observed.
    Observed,
    /// It is no question for policy, and not counted.
    Ignored,
    /// Nobody knows an address.
    Unresolved,
}

impl From<Decision> for Outcome {
    fn from(decision: Decision) -> Self {
        match decision {
            Decision::Ignore => Self::Ignored,
            Decision::PassByRule => Self::PassedByRule,
            Decision::Observe => Self::Observed,
            Decision::PassProxyAbsent => Self::PassedProxyAbsent,
            Decision::Steer { .. } => Self::Steered,
            Decision::Query { .. } => Self::Query,
            Decision::Refuse => Self::Refused,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Steered => "steered",
            Self::Query => "steered (query)",
            Self::PassedByRule | Self::PassedProxyAbsent => "passes",
            Self::Refused => "refused",
            Self::Observed => "passes (observed)",
            Self::Ignored => "ignored",
            Self::Unresolved => "unresolved",
        })
    }
}

/// All that decides of a service.
#[derive(Debug)]
pub(crate) struct Situation<'a> {
    pub(crate) config: &'a Config,
    pub(crate) service: &'a str,
    /// As the proxy says now, or as it was last known.
    pub(crate) routable: Routable,
    pub(crate) now: Now,
}

impl Situation<'_> {
    pub(super) fn policy(&self) -> &Policy {
        self.config.policy(self.service)
    }

    /// What becomes of it, and why.
    pub(crate) fn decide(&self, destination: SocketAddr, proto: Proto) -> (Outcome, Reason) {
        let reason = Reason::of(self.config, &self.routable, self.service, destination);
        self.weigh(reason, destination, proto)
    }

    /// The same for all ports of an address: neighbouring ones of which the same is said together.
    pub(crate) fn decide_ports(&self, address: IpAddr, proto: Proto) -> Vec<(Ports, Outcome, Reason)> {
        let mut decided: Vec<(Ports, Outcome, Reason)> = Vec::new();
        for (ports, verdict) in rules::decide_ports(self.policy(), &self.routable, address) {
            let said = Reason::new(&self.config.file, &verdict);
            for part in self.parts(ports) {
                let (outcome, reason) = self.weigh(said.clone(), SocketAddr::new(address, part.first), proto);
                match decided.last_mut() {
                    Some((ports, before, why)) if *before == outcome && *why == reason => {
                        ports.last = part.last;
                    }
                    _ => decided.push((part, outcome, reason)),
                }
            }
        }
        decided
    }

    /// What is said of queries, and of ports that the proxy listens on, may be said of no neighbour.
    fn parts(&self, Ports { first, last }: Ports) -> Vec<Ports> {
        let names = self.routable.names().unwrap_or_default();
        let special = names.iter().flat_map(|name| name.ports.iter().copied()).chain([DNS_PORT]);
        let bounds = special.flat_map(|port| [u32::from(port), u32::from(port) + 1]);
        let (first, end) = (u32::from(first), u32::from(last) + 1);
        let inner = bounds.filter(|bound| first < *bound && *bound < end);
        let bounds: Vec<u32> = inner.chain([first, end]).collect::<BTreeSet<u32>>().into_iter().collect();
        bounds.windows(2).map(|pair| Ports { first: pair[0] as u16, last: (pair[1] - 1) as u16 }).collect()
    }

    fn weigh(&self, mut reason: Reason, destination: SocketAddr, proto: Proto) -> (Outcome, Reason) {
        if self.now.mode == Some(Mode::Hosts) {
            return self.by_name(destination, proto);
        }
        let outcome = self.outcome(reason.steered, destination, proto);
        if proto == Proto::Udp && (destination.port() != DNS_PORT || !self.policy().dns.value) {
            reason = self.not_captured(destination.port());
        } else if let Some(but) = self.but(outcome, &reason, destination.port()) {
            reason.because = format!("{}, but {but}", reason.because);
        }
        if matches!(outcome, Outcome::PassedByRule | Outcome::PassedProxyAbsent | Outcome::Observed)
            && let Some(instead) = self.instead(destination.ip())
        {
            reason.because = format!("{}; {instead}", reason.because);
        }
        (outcome, reason)
    }

    fn outcome(&self, is_steered: bool, destination: SocketAddr, proto: Proto) -> Outcome {
        let hook = Hook::new(self, is_steered);
        let transport = match proto {
            Proto::Tcp => Transport::Tcp,
            Proto::Udp => Transport::Udp,
        };
        let destination = match destination.ip().to_canonical() {
            IpAddr::V4(ip) => Destination::from_ipv4(ip.octets(), destination.port()),
            IpAddr::V6(ip) => Destination::from_ipv6(ip.octets(), destination.port()),
        };
        decide::connect(&hook, &Attempt { destination, transport, bound_to_device: false }).into()
    }

    /// Of UDP.
    fn not_captured(&self, port: u16) -> Reason {
        if port != DNS_PORT {
            let because = "of UDP nothing is captured but DNS queries, to port 53".to_owned();
            return Reason { steered: false, because, rule: None, file: None, line: None };
        }
        let line = self.policy().dns.line;
        Reason {
            steered: false,
            because: "DNS queries of this service are not captured".to_owned(),
            rule: Some("dns false".to_owned()),
            file: line.map(|_| self.config.file.clone()),
            line,
        }
    }

    /// Why what policy has steered is not.
    fn but(&self, outcome: Outcome, reason: &Reason, port: u16) -> Option<&'static str> {
        let is_query = port == DNS_PORT && self.policy().dns.value;
        match outcome {
            Outcome::Observed => Some("the service is only observed"),
            Outcome::Ignored if reason.steered && self.now.observed => Some("the service is only observed"),
            Outcome::PassedProxyAbsent | Outcome::Ignored if reason.steered && is_query => {
                Some("the proxy takes no queries now, and they fail open")
            }
            Outcome::PassedProxyAbsent => Some("the proxy is not ready, and the service fails open"),
            Outcome::Refused => Some("the proxy is not ready, and the service fails closed"),
            _ => None,
        }
    }

    /// Where a virtual address leads that is not steered.
    fn instead(&self, address: IpAddr) -> Option<String> {
        let address = address.to_canonical();
        if !self.policy().dns.value || !is_virtual(address) {
            return None;
        }
        Some(match self.routable.virtual_addresses().get(&address) {
            Some(instance) => format!("it goes to {instance}, an instance of the name"),
            None => "no instance of a name is known for this virtual address, which leads nowhere".to_owned(),
        })
    }

    /// Where names alone are steered, the proxy listens at addresses of its own.
    fn by_name(&self, destination: SocketAddr, proto: Proto) -> (Outcome, Reason) {
        let names = self.routable.names().unwrap_or_default();
        let at = names.iter().find(|name| IpAddr::from(name.address) == destination.ip().to_canonical());
        let said = |because: String, rule| Reason { steered: false, because, rule, file: None, line: None };
        let Some(name) = at.filter(|_| proto == Proto::Tcp) else {
            let because = "in mode hosts only names are steered, to the proxy's addresses for them, by TCP";
            return (Outcome::Ignored, said(because.to_owned(), None));
        };
        let ports: Vec<String> = name.ports.iter().map(ToString::to_string).collect();
        let rule = format!("name {} ports {}", name.name, ports.join(", "));
        if !name.ports.contains(&destination.port()) {
            return (Outcome::Ignored, said(format!("the proxy listens for `{rule}` alone"), Some(rule)));
        }
        let reason = Reason {
            steered: true,
            ..said(format!("the proxy listens there for `{}`", name.name), Some(rule))
        };
        if self.now.proxy.any() {
            return (Outcome::Steered, reason);
        }
        (Outcome::Refused, Reason { because: format!("{}, but is not ready", reason.because), ..reason })
    }
}

fn is_virtual(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(ip) => Destination::from_ipv4(ip.octets(), 0).is_virtual(),
        IpAddr::V6(ip) => Destination::from_ipv6(ip.octets(), 0).is_virtual(),
    }
}

/// What the hooks would be told, were the service enabled.
struct Hook<'a> {
    service: Service,
    rules: Option<Rules>,
    now: &'a Now,
}

impl<'a> Hook<'a> {
    fn new(situation: &'a Situation<'_>, is_steered: bool) -> Self {
        let Situation { config, now, .. } = situation;
        let policy = situation.policy();
        let mut ranges = [PortRange { first: 0, last: 0, verdict: 0 }; MAX_PORT_RANGES];
        ranges[0] = PortRange { first: 0, last: u16::MAX, verdict: VERDICT_STEER };
        let service = Service {
            policy: 0,
            failure: if policy.failure == Failure::Closed { FAILURE_CLOSED } else { FAILURE_OPEN },
            phase: if now.observed { PHASE_OBSERVE } else { PHASE_ENFORCE },
            proxy_port: config.proxy.port,
            dns_port: if policy.dns.value { config.proxy.dns_port } else { 0 },
            reserved: [0; RESERVED],
            name: [0; NAME_LEN],
        };
        Self { service, rules: is_steered.then_some(Rules { len: 1, ranges }), now }
    }
}

impl Host for Hook<'_> {
    fn service(&self) -> Option<&Service> {
        Some(&self.service)
    }

    fn rules(&self, _: &RuleKey) -> Option<&Rules> {
        self.rules.as_ref()
    }

    fn proxy_listens(&self, family: u16, port: u16) -> bool {
        let at = if port == self.service.dns_port { self.now.dns } else { self.now.proxy };
        if family == AF_INET { at.ipv4 } else { at.ipv6 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::explain::now::Families;
    use std::path::Path;

    const ROUTABLE: &[u8] =
        br#"{"version": 1, "services": [{"name": "catalog", "ports": [8080], "endpoints": ["10.77.0.2:8080"],
        "domains": [{"name": "catalog", "virtual": ["241.3.7.9"], "loopback": "127.66.1.2"}]},
        {"name": "away", "domains": [{"name": "away", "virtual": ["241.3.7.10"]}]}]}"#;

    fn now(mode: Mode, proxy: bool, dns: bool) -> Now {
        let families = |is_there| Families { ipv4: is_there, ipv6: false };
        Now {
            mode: Some(mode),
            daemon: Some(true),
            enabled: Some(true),
            observed: false,
            proxy: families(proxy),
            dns: families(dns),
        }
    }

    /// What is said of a destination, by what is configured and what holds.
    fn said(text: &str, now: &Now, destination: &str, proto: Proto) -> (Outcome, bool, String) {
        let config = Config::parse(Path::new("agent.yaml"), text).unwrap();
        let (routable, now) = (Routable::parse(ROUTABLE).unwrap(), now.clone());
        let situation = Situation { config: &config, service: "shop", routable, now };
        let (outcome, reason) = situation.decide(destination.parse().unwrap(), proto);
        (outcome, reason.steered, reason.because)
    }

    #[test]
    fn what_holds_now_decides_with_policy() {
        let (there, away) = (now(Mode::Ebpf, true, true), now(Mode::Ebpf, false, false));
        let observed = Now { observed: true, ..there.clone() };
        let no_dns = now(Mode::Ebpf, true, false);
        let (closed, dns) = ("failure: closed\n", "failure: closed\ncapture: { dns: true }\n");
        let (tcp, udp) = (Proto::Tcp, Proto::Udp);
        let cases = [
            ("", &there, "10.0.0.1:80", tcp, Outcome::Steered, "`base all` covers it"),
            ("", &there, "[fd00::1]:80", tcp, Outcome::PassedProxyAbsent, "fails open"),
            ("", &there, "127.0.0.1:80", tcp, Outcome::PassedByRule, "never steered"),
            ("", &away, "10.0.0.1:80", tcp, Outcome::PassedProxyAbsent, "fails open"),
            (closed, &away, "10.0.0.1:80", tcp, Outcome::Refused, "fails closed"),
            (closed, &observed, "10.0.0.1:80", tcp, Outcome::Observed, "only observed"),
            (closed, &there, "10.0.0.1:53", udp, Outcome::Ignored, "are not captured"),
            (dns, &there, "10.0.0.1:80", udp, Outcome::Ignored, "nothing is captured but DNS"),
            (dns, &there, "10.0.0.1:53", udp, Outcome::Query, "`dns (queries)` covers it"),
            (dns, &there, "127.0.0.53:53", udp, Outcome::Ignored, "never steered"),
            (dns, &no_dns, "10.0.0.1:53", udp, Outcome::Ignored, "they fail open"),
            (dns, &no_dns, "10.0.0.1:53", tcp, Outcome::PassedProxyAbsent, "they fail open"),
            (dns, &observed, "10.0.0.1:53", udp, Outcome::Ignored, "only observed"),
            (
                dns,
                &observed,
                "241.3.7.9:80",
                tcp,
                Outcome::Observed,
                "it goes to 10.77.0.2:8080, an instance",
            ),
            (dns, &observed, "241.3.7.10:80", tcp, Outcome::Observed, "leads nowhere"),
        ];
        for (text, now, destination, proto, outcome, because) in cases {
            let said = said(text, now, destination, proto);
            assert!(
                said.0 == outcome && said.2.contains(because),
                "{text:?} {destination} {proto:?}: {said:?}"
            );
        }
    }

    #[test]
    fn where_names_are_steered_the_proxys_addresses_are_and_no_others() {
        let (there, away) = (now(Mode::Hosts, true, false), now(Mode::Hosts, false, false));
        let cases = [
            (&there, "127.66.1.2:8080", Proto::Tcp, Outcome::Steered),
            (&there, "127.66.1.2:8081", Proto::Tcp, Outcome::Ignored),
            (&there, "127.66.1.2:8080", Proto::Udp, Outcome::Ignored),
            (&there, "10.0.0.1:80", Proto::Tcp, Outcome::Ignored),
            (&away, "127.66.1.2:8080", Proto::Tcp, Outcome::Refused),
        ];
        for (now, destination, proto, outcome) in cases {
            let said = said("", now, destination, proto);
            assert_eq!(said.0, outcome, "{destination} {proto:?}: {said:?}");
        }
    }

    #[test]
    fn ports_are_apart_where_something_else_becomes_of_them() {
        let config = Config::parse(
            Path::new("agent.yaml"),
            "failure: closed\ncapture: { include: [10.0.0.0/8], dns: true }\n",
        );
        let config = config.unwrap();
        let ports = |now: Now, address: &str| -> Vec<String> {
            let routable = Routable::parse(ROUTABLE).unwrap();
            let situation = Situation { config: &config, service: "shop", routable, now };
            let decided = situation.decide_ports(address.parse().unwrap(), Proto::Tcp);
            decided.iter().map(|(ports, outcome, _)| format!("{ports} {outcome:?}")).collect()
        };
        assert_eq!(ports(now(Mode::Ebpf, true, true), "10.0.0.1"), ["1-65535 Steered"]);
        assert_eq!(
            ports(now(Mode::Ebpf, false, false), "10.0.0.1"),
            ["1-52 Refused", "53 PassedProxyAbsent", "54-65535 Refused"]
        );
        assert_eq!(
            ports(now(Mode::Hosts, true, false), "127.66.1.2"),
            ["1-8079 Ignored", "8080 Steered", "8081-65535 Ignored"]
        );
    }
}
