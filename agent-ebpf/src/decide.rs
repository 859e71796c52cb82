//! What to do with a connection: pure, over the few questions it has to ask of the kernel.

use crate::{
    AF_INET, AF_INET6, DNS_PORT, FAILURE_CLOSED, HEARTBEAT_EXPIRY_NS, Listener, PHASE_OBSERVE,
    RESOLVER_PORTS, RuleKey, Rules, Service, VERDICT_PASS, VERDICT_STEER, VIRTUAL_V4, VIRTUAL_V6,
};

/// A connection attempt, or a datagram of a socket that is not connected, as the hooks see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// Where it goes, IPv4-mapped addresses already taken for IPv4.
    pub destination: Destination,
    /// What the socket speaks.
    pub transport: Transport,
    /// Bound to a network interface (`SO_BINDTODEVICE`).
    pub bound_to_device: bool,
}

/// What a socket speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// `SOCK_STREAM` over TCP or MPTCP.
    Tcp,
    /// `SOCK_DGRAM` over UDP.
    Udp,
    /// Anything else.
    Other,
}

/// An address and a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    /// [`AF_INET`] or [`AF_INET6`].
    pub family: u16,
    /// Host order.
    pub port: u16,
    /// Network order; IPv4 in the first four bytes.
    pub addr: [u8; 16],
}

impl Destination {
    /// The destination of an IPv6 `connect`: IPv4 where the address is IPv4-mapped (RFC 4291 §2.5.5.2).
    #[inline(always)]
    pub fn from_ipv6(addr: [u8; 16], port: u16) -> Self {
        match addr {
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d] => Self::from_ipv4([a, b, c, d], port),
            _ => Self { family: AF_INET6, port, addr },
        }
    }

    /// The destination of an IPv4 `connect`.
    #[inline(always)]
    pub fn from_ipv4([a, b, c, d]: [u8; 4], port: u16) -> Self {
        Self { family: AF_INET, port, addr: [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0] }
    }

    /// The proxy's address of a family.
    #[inline(always)]
    pub fn loopback(family: u16, port: u16) -> Self {
        if family == AF_INET {
            Self::from_ipv4([127, 0, 0, 1], port)
        } else {
            Self { family, port, addr: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1] }
        }
    }

    /// Whether it is one of the addresses that the proxy gives to names, and that lead nowhere without it.
    #[inline(always)]
    pub fn is_virtual(&self) -> bool {
        let a = &self.addr;
        if self.family == AF_INET {
            a[0] == VIRTUAL_V4
        } else {
            [a[0], a[1], a[2], a[3], a[4], a[5]] == VIRTUAL_V6
        }
    }

    /// Whether it is an address that no policy can have meant: this host, this link, everybody, or nobody.
    #[inline(always)]
    pub fn is_local(&self) -> bool {
        let a = &self.addr;
        if self.family == AF_INET {
            // 0/8 and 127/8 are this host, 169.254/16 this link (metadata services too), 224/4 and up not unicast.
            let not_unicast = a[0] >= 224 && !self.is_virtual();
            a[0] == 0 || a[0] == 127 || (a[0] == 169 && a[1] == 254) || not_unicast
        } else {
            let loopback_or_unspecified = u128::from_be_bytes(*a) <= 1;
            let link_local = a[0] == 0xfe && a[1] & 0xc0 == 0x80;
            loopback_or_unspecified || link_local || a[0] == 0xff
        }
    }
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Not a question for policy (nothing enabled here, not TCP): leave it alone and do not count it.
    Ignore,
    /// Leave it alone: policy says so.
    PassByRule,
    /// Leave it alone: policy would have it steered, but the service is only observed.
    Observe,
    /// Leave it alone: nobody would answer at the proxy.
    PassProxyAbsent,
    /// Send it to the proxy at this port.
    Steer {
        /// Host order.
        proxy_port: u16,
    },
    /// It goes to a resolver by datagram: send it to the port of the proxy's that stands for this resolver.
    Query {
        /// The first of [`RESOLVER_PORTS`].
        dns_port: u16,
    },
    /// Refuse it: nobody would answer at the proxy and the service fails closed.
    Refuse,
}

/// The questions a decision asks, each only when the ones before have not settled it.
pub trait Host {
    /// The policy of the cgroup the hook is attached to.
    fn service(&self) -> Option<&Service>;
    /// The rules of the most specific CIDR around a destination.
    fn rules(&self, key: &RuleKey) -> Option<&Rules>;
    /// Whether the proxy itself listens, and is alive, for connections of this family.
    fn proxy_listens(&self, family: u16, port: u16) -> bool;
}

/// Decides one connection attempt, or one datagram.
///
/// Of datagrams only DNS is captured, and it always fails open: what a service may reach is decided when it connects.
/// There is one way through, since the verifier follows each.
#[inline(always)]
pub fn connect(host: &impl Host, attempt: &Attempt) -> Decision {
    let is_datagram = attempt.transport == Transport::Udp;
    let is_dns = attempt.destination.port == DNS_PORT;
    if attempt.transport == Transport::Other || (is_datagram && !is_dns) {
        return Decision::Ignore;
    }
    let Some(service) = host.service() else { return Decision::Ignore };
    let is_query = is_dns && service.dns_port != 0;
    if is_datagram && (!is_query || service.phase == PHASE_OBSERVE) {
        return Decision::Ignore;
    }
    if passes(host, service, attempt) {
        return if is_datagram { Decision::Ignore } else { Decision::PassByRule };
    }
    if service.phase == PHASE_OBSERVE {
        return Decision::Observe;
    }
    let proxy_port = if is_query { service.dns_port } else { service.proxy_port };
    match (host.proxy_listens(attempt.destination.family, proxy_port), is_datagram) {
        (true, false) => Decision::Steer { proxy_port },
        (true, true) => Decision::Query { dns_port: proxy_port },
        (false, false) => without_proxy(service, attempt),
        (false, true) => Decision::Ignore,
    }
}

#[inline(always)]
fn passes(host: &impl Host, service: &Service, attempt: &Attempt) -> bool {
    // A socket that is bound to another interface cannot reach the proxy on the loopback one.
    attempt.bound_to_device
        || attempt.destination.is_local()
        || !captured(host, service, &attempt.destination)
}

/// The port that is tried as the one that stands for a resolver, at so many tries before: the same ones for each resolver.
#[inline(always)]
pub fn resolver_port(resolver: &Destination, dns_port: u16, tries: u16) -> u16 {
    let sum =
        resolver.addr.iter().fold(0_u16, |sum, &byte| sum.wrapping_mul(31).wrapping_add(u16::from(byte)));
    dns_port.wrapping_add(sum.wrapping_add(tries) % RESOLVER_PORTS)
}

/// What becomes of a connection that would be steered and cannot be.
#[inline(always)]
pub fn without_proxy(service: &Service, attempt: &Attempt) -> Decision {
    // What a service may reach is decided when it connects, not when it looks names up.
    let is_query = attempt.destination.port == DNS_PORT && service.dns_port != 0;
    if service.failure == FAILURE_CLOSED && !is_query { Decision::Refuse } else { Decision::PassProxyAbsent }
}

#[inline(always)]
fn captured(host: &impl Host, service: &Service, destination: &Destination) -> bool {
    let key = RuleKey { policy: service.policy, family: destination.family as u32, addr: destination.addr };
    host.rules(&key).is_some_and(|rules| verdict(rules, destination.port) == VERDICT_STEER)
}

/// The verdict for a port among the rules of a CIDR.
///
/// The ranges are disjoint, and those that do not count are zero. Without a branch, since the verifier would follow each
/// of them in all that comes after.
#[inline(always)]
pub fn verdict(rules: &Rules, port: u16) -> u32 {
    let port = i32::from(port);
    rules.ranges.iter().fold(VERDICT_PASS, |verdict, range| {
        // Negative where the port is outside.
        let outside = (port - i32::from(range.first)) | (i32::from(range.last) - port);
        verdict | (range.verdict & !(outside >> 31) as u32)
    })
}

/// Whether a listener of the proxy is being served.
#[inline(always)]
pub fn is_alive(listener: &Listener, now_ns: u64) -> bool {
    listener.heartbeat_ns == 0 || now_ns.saturating_sub(listener.heartbeat_ns) < HEARTBEAT_EXPIRY_NS
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{FAILURE_OPEN, NAME_LEN, PHASE_ENFORCE, PortRange, RESERVED};
    use core::cell::Cell;
    use std::net::{Ipv4Addr, Ipv6Addr};

    struct Fake {
        service: Option<Service>,
        rules: Option<Rules>,
        listens: bool,
        asked_proxy: Cell<u32>,
    }

    impl Host for Fake {
        fn service(&self) -> Option<&Service> {
            self.service.as_ref()
        }
        fn rules(&self, key: &RuleKey) -> Option<&Rules> {
            assert_eq!(key.policy, 7);
            self.rules.as_ref()
        }
        fn proxy_listens(&self, _family: u16, port: u16) -> bool {
            assert!([15001, 15053].contains(&port));
            self.asked_proxy.set(self.asked_proxy.get() + 1);
            self.listens
        }
    }

    fn rules(ranges: &[(u16, u16, u32)]) -> Rules {
        let mut rules =
            Rules { len: ranges.len() as u32, ranges: [PortRange { first: 0, last: 0, verdict: 0 }; 16] };
        for (to, &(first, last, verdict)) in rules.ranges.iter_mut().zip(ranges) {
            *to = PortRange { first, last, verdict };
        }
        rules
    }

    fn fake(failure: u8) -> Fake {
        Fake {
            service: Some(Service {
                policy: 7,
                failure,
                phase: PHASE_ENFORCE,
                proxy_port: 15001,
                dns_port: 0,
                reserved: [0; RESERVED],
                name: [0; NAME_LEN],
            }),
            rules: Some(rules(&[(0, 65535, VERDICT_STEER)])),
            listens: true,
            asked_proxy: Cell::new(0),
        }
    }

    fn attempt(destination: Destination) -> Attempt {
        Attempt { destination, transport: Transport::Tcp, bound_to_device: false }
    }

    fn to(addr: &str) -> Attempt {
        attempt(Destination::from_ipv4(addr.parse::<Ipv4Addr>().unwrap().octets(), 80))
    }

    #[test]
    fn a_captured_destination_is_steered() {
        assert_eq!(connect(&fake(FAILURE_OPEN), &to("10.0.0.1")), Decision::Steer { proxy_port: 15001 });
    }

    #[test]
    fn nothing_is_steered_where_nothing_is_enabled() {
        let host = Fake { service: None, ..fake(FAILURE_CLOSED) };
        assert_eq!(connect(&host, &to("10.0.0.1")), Decision::Ignore);
    }

    #[test]
    fn other_protocols_are_ignored() {
        for transport in [Transport::Udp, Transport::Other] {
            assert_eq!(
                connect(&fake(FAILURE_CLOSED), &Attempt { transport, ..to("10.0.0.1") }),
                Decision::Ignore
            );
        }
    }

    fn query(addr: &str, transport: Transport) -> Attempt {
        let destination = Destination::from_ipv4(addr.parse::<Ipv4Addr>().unwrap().octets(), 53);
        Attempt { transport, ..attempt(destination) }
    }

    fn with_dns(host: Fake) -> Fake {
        Fake { service: host.service.map(|service| Service { dns_port: 15053, ..service }), ..host }
    }

    #[test]
    fn queries_are_captured_where_the_service_wants_it_and_always_fail_open() {
        let (udp, tcp) = (query("10.0.0.53", Transport::Udp), query("10.0.0.53", Transport::Tcp));
        let host = with_dns(fake(FAILURE_CLOSED));
        assert_eq!(connect(&host, &udp), Decision::Query { dns_port: 15053 });
        assert_eq!(connect(&host, &tcp), Decision::Steer { proxy_port: 15053 });
        assert_eq!(connect(&host, &query("127.0.0.53", Transport::Udp)), Decision::Ignore);
        assert_eq!(connect(&with_dns(Fake { rules: None, ..fake(FAILURE_CLOSED) }), &udp), Decision::Ignore);
        assert_eq!(
            connect(&with_dns(Fake { listens: false, ..fake(FAILURE_CLOSED) }), &udp),
            Decision::Ignore
        );
        let dead = with_dns(Fake { listens: false, ..fake(FAILURE_CLOSED) });
        assert_eq!(connect(&dead, &tcp), Decision::PassProxyAbsent);
        assert_eq!(connect(&fake(FAILURE_CLOSED), &udp), Decision::Ignore, "without DNS capture");
        assert_eq!(connect(&fake(FAILURE_CLOSED), &tcp), Decision::Steer { proxy_port: 15001 });
    }

    #[test]
    fn a_resolver_has_a_port_of_its_own_after_few_tries() {
        for last in 0..=255 {
            let resolver = Destination::from_ipv4([10, 0, 0, last], 53);
            let mut ports: Vec<u16> = (0..16).map(|tries| resolver_port(&resolver, 15053, tries)).collect();
            ports.sort_unstable();
            assert!(ports.iter().copied().eq(15053..15069), "{ports:?}");
        }
    }

    #[test]
    fn virtual_addresses_are_none_of_the_local_ones() {
        for addr in ["241.0.0.1", "241.255.1.2"] {
            let destination = to(addr).destination;
            assert!(destination.is_virtual() && !destination.is_local(), "{addr}");
        }
        let v6 = |addr: &str| Destination::from_ipv6(addr.parse::<Ipv6Addr>().unwrap().octets(), 80);
        assert!(v6("fdb2:6c1e:9d04::1").is_virtual() && !v6("fdb2:6c1e:9d05::1").is_virtual());
        assert!(!v6("::ffff:240.0.0.1").is_virtual() && v6("::ffff:241.0.0.1").is_virtual());
    }

    #[test]
    fn a_destination_without_rules_passes_also_in_a_closed_service() {
        let host = Fake { rules: None, listens: false, ..fake(FAILURE_CLOSED) };
        assert_eq!(connect(&host, &to("10.0.0.1")), Decision::PassByRule);
        assert_eq!(host.asked_proxy.get(), 0, "the proxy is looked for only when it is needed");
    }

    #[test]
    fn a_socket_bound_to_a_device_passes() {
        let bound = Attempt { bound_to_device: true, ..to("10.0.0.1") };
        assert_eq!(connect(&fake(FAILURE_OPEN), &bound), Decision::PassByRule);
    }

    #[test]
    fn an_observed_service_goes_its_way_whether_the_proxy_is_there_or_not() {
        for listens in [true, false] {
            let mut host = Fake { listens, ..fake(FAILURE_CLOSED) };
            host.service = host.service.map(|service| Service { phase: PHASE_OBSERVE, ..service });
            assert_eq!(connect(&host, &to("10.0.0.1")), Decision::Observe);
            assert_eq!(connect(&host, &to("127.0.0.1")), Decision::PassByRule);
        }
    }

    #[test]
    fn without_a_proxy_the_service_says_what_happens() {
        let open = Fake { listens: false, ..fake(FAILURE_OPEN) };
        assert_eq!(connect(&open, &to("10.0.0.1")), Decision::PassProxyAbsent);
        let closed = Fake { listens: false, ..fake(FAILURE_CLOSED) };
        assert_eq!(connect(&closed, &to("10.0.0.1")), Decision::Refuse);
    }

    #[test]
    fn local_destinations_are_never_steered() {
        for addr in ["127.0.0.1", "127.9.9.9", "0.0.0.0", "169.254.169.254", "224.0.0.1", "255.255.255.255"] {
            assert_eq!(connect(&fake(FAILURE_OPEN), &to(addr)), Decision::PassByRule, "{addr}");
        }
        for addr in
            ["::", "::1", "fe80::1", "febf::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254"]
        {
            let destination = Destination::from_ipv6(addr.parse::<Ipv6Addr>().unwrap().octets(), 80);
            assert_eq!(connect(&fake(FAILURE_OPEN), &attempt(destination)), Decision::PassByRule, "{addr}");
        }
        for addr in ["::2", "fec0::1", "fd00::1", "2001:db8::1", "::ffff:10.0.0.1"] {
            let destination = Destination::from_ipv6(addr.parse::<Ipv6Addr>().unwrap().octets(), 80);
            assert!(!destination.is_local(), "{addr}");
        }
    }

    #[test]
    fn a_mapped_address_is_taken_for_ipv4() {
        let mapped = "::ffff:10.1.2.3".parse::<Ipv6Addr>().unwrap().octets();
        assert_eq!(Destination::from_ipv6(mapped, 80), Destination::from_ipv4([10, 1, 2, 3], 80));
        // IPv4-compatible addresses (RFC 4291 §2.5.5.1) are not the same thing.
        assert_eq!(
            Destination::from_ipv6("::10.1.2.3".parse::<Ipv6Addr>().unwrap().octets(), 80).family,
            AF_INET6
        );
    }

    #[test]
    fn the_range_around_a_port_decides() {
        let rules = rules(&[(0, 79, VERDICT_STEER), (80, 80, VERDICT_PASS), (81, 8000, VERDICT_STEER)]);
        let cases = [(0, VERDICT_STEER), (79, VERDICT_STEER), (80, VERDICT_PASS), (81, VERDICT_STEER)];
        for (port, expected) in cases.into_iter().chain([(8000, VERDICT_STEER), (8001, VERDICT_PASS)]) {
            assert_eq!(verdict(&rules, port), expected, "{port}");
        }
    }

    #[test]
    fn a_listener_that_stopped_its_heartbeat_is_dead_and_one_that_never_had_any_is_alive() {
        let now = 10 * HEARTBEAT_EXPIRY_NS;
        assert!(is_alive(&Listener { heartbeat_ns: 0 }, now));
        assert!(is_alive(&Listener { heartbeat_ns: now - 1 }, now));
        assert!(is_alive(&Listener { heartbeat_ns: now + 5 }, now), "a clock read before the heartbeat's");
        assert!(!is_alive(&Listener { heartbeat_ns: now - HEARTBEAT_EXPIRY_NS }, now));
    }
}
