//! What the table shall hold: pure, from what is desired to chains, sets and counters. It is shown in nft's own words.
//!
//! A new connection is looked up by the cgroups its socket is in, the innermost first, and so comes to its service's
//! chain; there by destination among the ranges of the service's policy; and then the kernel asks whether the proxy is
//! alive, by a set whose elements the daemon renews and the kernel lets expire. Each of the three costs the same
//! however many services and entries there are.

use super::super::{Cgroup, Desired, Service};
use crate::{
    config::{Failure, Ports},
    rules::{self, Range},
};
use agent_ebpf::DNS_PORT;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    net::{IpAddr, SocketAddr},
    path::Path,
};

/// The table, of family inet. It is ours alone.
pub(super) const TABLE: &str = "mesh_redirect";
/// The only chain with a hook.
pub(super) const OUTPUT: &str = "output";
/// Where connections come to their services.
const DISPATCH: &str = "dispatch";
/// The chain, and the beginning of the maps' names, for virtual addresses.
const VIRTUAL: &str = "virtual";
/// Before other destination NAT (-100), so that a service's connections are ours first.
pub(crate) const PRIORITY: i32 = -110;
/// The families for which the proxy is alive, for so long.
pub(super) const ALIVE: &str = "alive";

/// The families for which it serves DNS, likewise.
pub(super) const ALIVE_DNS: &str = "alive_dns";

/// Everything but the elements of [`ALIVE`] and [`ALIVE_DNS`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ruleset {
    pub(super) counters: BTreeSet<String>,
    pub(super) sets: Vec<Set>,
    /// [`OUTPUT`] is the last one; each comes before those that jump to it.
    pub(super) chains: Vec<Chain>,
}

/// A named set or map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Set {
    pub(super) name: String,
    pub(super) content: Content,
}

/// What is in a set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// `ipv4_addr . inet_service` or `ipv6_addr . inet_service`: what a policy steers.
    Destinations(Family, Vec<Range>),
    /// Ids of cgroups, all at one level: to which chain each goes.
    Cgroups(BTreeMap<u64, String>),
    /// User ids: to which chain each goes.
    Users(BTreeMap<u32, String>),
    /// `ipv4_addr : ipv4_addr . inet_service`, or the same in IPv6: where virtual addresses lead that are not steered.
    Virtual(Family, BTreeMap<IpAddr, SocketAddr>),
}

/// A transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transport {
    Tcp,
    Udp,
}

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    V4,
    V6,
}

/// A chain and its rules, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chain {
    pub(super) name: String,
    pub(super) rules: Vec<Rule>,
}

/// Statements that are carried out in order, until one does not match.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) statements: Vec<Statement>,
    pub(super) comment: Option<String>,
}

/// One statement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Statement {
    Of(Transport),
    /// It opens a TCP connection. One that was open before connection tracking was, which is so until the first rule needs
    /// it, is new to it with its next packet, and must not be translated in its midst.
    Opening,
    /// The destination is in a set.
    To(Transport, Family, String),
    /// The destination is at a port.
    Port(Transport, u16),
    /// Jumps where a map says that sockets of a cgroup go, at so many levels below the root.
    ByCgroup(u32, String),
    /// Jumps where a map says that a user's sockets go.
    ByUser(String),
    /// The proxy is alive, as a set says.
    Alive(&'static str),
    Count(String),
    Redirect(u16),
    /// To where a map says that the address leads; matches no other address.
    Translate(Family, String),
    /// With a TCP reset: the application sees ECONNREFUSED.
    Reject,
    Goto(String),
    Return,
    Accept,
}

/// What is counted of a service, and where [`super::counters`] finds it.
pub(super) fn counter(what: &str, service: u32) -> String {
    format!("{what}_{service}")
}

impl Ruleset {
    /// Of everything that is desired, below a cgroup2 mount.
    pub(super) fn new(desired: &Desired, cgroup_root: &Path) -> Self {
        // Never reached. The kernel translates, and so asks any of this, only while there is a rule that could.
        let translate = Rule::from(vec![TCP, Statement::Redirect(1)]);
        let chains = vec![Chain { name: "translation".to_owned(), rules: vec![translate] }];
        let mut ruleset = Self { counters: BTreeSet::new(), sets: Vec::new(), chains };
        if desired.services.iter().any(|service| service.dns_port.is_some()) {
            ruleset.add_virtual(&desired.virtual_addresses);
        }
        let mut policies: Vec<Vec<Range>> = Vec::new();
        for service in &desired.services {
            let ranges = rules::ranges(&service.entries);
            let known = policies.iter().position(|known| *known == ranges);
            let policy = known.unwrap_or_else(|| {
                ruleset.add_policy(policies.len(), &ranges);
                policies.push(ranges.clone());
                policies.len() - 1
            });
            ruleset.add_service(service, policy, &ranges);
        }
        let dispatch = ruleset.add_scopes(desired, cgroup_root);
        ruleset.chains.push(Chain { name: DISPATCH.to_owned(), rules: dispatch });
        ruleset.add_output(desired.services.iter().any(|service| service.dns_port.is_some()));
        ruleset
    }

    /// Where virtual addresses lead that are not steered. All that goes elsewhere is let go.
    fn add_virtual(&mut self, addresses: &BTreeMap<IpAddr, SocketAddr>) {
        let mut rules = Vec::new();
        for family in [Family::V4, Family::V6] {
            // Translation does not lead from the one family to the other.
            let is_of = |address: IpAddr| address.is_ipv4() == (family == Family::V4);
            let of_family = addresses.iter().filter(|(from, to)| is_of(**from) && is_of(to.ip()));
            let name = format!("{VIRTUAL}_{}", family.name());
            rules.push(Rule::from(vec![TCP, Statement::Translate(family, name.clone())]));
            let content = Content::Virtual(family, of_family.map(|(from, to)| (*from, *to)).collect());
            self.sets.push(Set { name, content });
        }
        self.chains.push(Chain { name: VIRTUAL.to_owned(), rules });
    }

    fn add_policy(&mut self, policy: usize, ranges: &[Range]) {
        for family in [Family::V4, Family::V6] {
            let of_family: Vec<Range> = ranges.iter().filter(|range| family.is_of(range)).cloned().collect();
            if !of_family.is_empty() {
                let content = Content::Destinations(family, of_family);
                self.sets.push(Set { name: policy_set(policy, family), content });
            }
        }
    }

    fn add_service(&mut self, service: &Service, policy: usize, ranges: &[Range]) {
        let id = service.id;
        let (steer, count) = (format!("steer_{id}"), |what| Statement::Count(counter(what, id)));
        let (dns, leave) = (service.dns_port, leave(service));
        let without_proxy = match service.failure {
            Failure::Open => vec![count("passed_proxy_absent"), leave.clone()],
            Failure::Closed => vec![TCP, count("refused"), Statement::Reject],
        };
        let steering = if service.observe {
            vec![vec![count("observed"), leave.clone()]]
        } else {
            let steer =
                |set, port| vec![Statement::Alive(set), TCP, count("steered"), Statement::Redirect(port)];
            let is_query = vec![Statement::Port(Transport::Tcp, DNS_PORT)];
            let query = |port| {
                let passed = vec![count("passed_proxy_absent"), leave.clone()];
                [[is_query.clone(), steer(ALIVE_DNS, port)].concat(), [is_query.clone(), passed].concat()]
            };
            let others = [steer(ALIVE, service.proxy_port), without_proxy];
            dns.map(query).into_iter().flatten().chain(others).collect()
        };
        let families = [Family::V4, Family::V6].into_iter();
        let families = families.filter(|family| ranges.iter().any(|range| family.is_of(range)));
        let to_proxy = |family| vec![to_set(Transport::Tcp, policy, family), Statement::Goto(steer.clone())];
        let queries = families.clone().filter_map(|family| self.query(service, policy, family));
        let queries: Vec<Vec<Statement>> = queries.chain([vec![UDP, Statement::Return]]).collect();
        let passed = vec![count("passed_by_rule"), leave];
        let mut rules: Vec<Rule> =
            queries.into_iter().chain(families.map(to_proxy)).chain([passed]).map(Rule::from).collect();
        if let Some(first) = rules.first_mut() {
            first.comment = Some(service.name.clone());
        }
        for what in COUNTERS {
            self.counters.insert(counter(what, id));
        }
        self.chains.push(Chain { name: steer, rules: steering.into_iter().map(Rule::from).collect() });
        self.chains.push(Chain { name: service_chain(service), rules });
    }

    /// What becomes of queries of a family, where the service's are captured. They always fail open.
    fn query(&self, service: &Service, policy: usize, family: Family) -> Option<Vec<Statement>> {
        let port = service.dns_port.filter(|_| !service.observe)?;
        let count = Statement::Count(counter("queries", service.id));
        let to_resolver = to_set(Transport::Udp, policy, family);
        Some(vec![to_resolver, Statement::Alive(ALIVE_DNS), UDP, count, Statement::Redirect(port)])
    }

    /// Maps from cgroups and users to services, and the rules that look them up: the innermost cgroups first.
    fn add_scopes(&mut self, desired: &Desired, cgroup_root: &Path) -> Vec<Rule> {
        let mut levels: BTreeMap<u32, BTreeMap<u64, String>> = BTreeMap::new();
        let mut users: BTreeMap<u32, String> = BTreeMap::new();
        for service in &desired.services {
            // One who is known by the user need not be known by the user's slice too.
            for cgroup in service.scopes.iter().filter(|_| service.users.is_empty()) {
                levels
                    .entry(level(cgroup, cgroup_root))
                    .or_default()
                    .insert(cgroup.id, service_chain(service));
            }
            users.extend(service.users.iter().map(|&user| (user, service_chain(service))));
        }
        let mut rules = Vec::new();
        for (level, cgroups) in levels.into_iter().rev() {
            let name = format!("cgroups_{level}");
            rules.push(Rule::from(vec![Statement::ByCgroup(level, name.clone())]));
            self.sets.push(Set { name, content: Content::Cgroups(cgroups) });
        }
        if !users.is_empty() {
            rules.extend(self.add_proxy(desired, cgroup_root));
            let name = "users".to_owned();
            rules.push(Rule::from(vec![Statement::ByUser(name.clone())]));
            self.sets.push(Set { name, content: Content::Users(users) });
        }
        rules
    }

    /// What the proxy connects to must not come back to it, whoever it runs as.
    fn add_proxy(&mut self, desired: &Desired, cgroup_root: &Path) -> Option<Rule> {
        let proxy = desired.proxy.as_ref()?;
        let name = "proxy".to_owned();
        self.chains.push(Chain { name: name.clone(), rules: vec![Rule::from(vec![Statement::Accept])] });
        let cgroups = BTreeMap::from([(proxy.id, name.clone())]);
        self.sets.push(Set { name: name.clone(), content: Content::Cgroups(cgroups) });
        Some(Rule::from(vec![Statement::ByCgroup(level(proxy, cgroup_root), name)]))
    }

    /// The first rule says whose table it is, and which: by it an `apply` sees that there is nothing to do.
    fn add_output(&mut self, with_dns: bool) {
        let dispatch = Statement::Goto(DISPATCH.to_owned());
        let streams = vec![TCP, Statement::Opening, dispatch.clone()];
        let queries = with_dns.then(|| vec![Statement::Port(Transport::Udp, DNS_PORT), dispatch]);
        let rules = [streams].into_iter().chain(queries).map(Rule::from).collect();
        self.chains.push(Chain { name: OUTPUT.to_owned(), rules });
        let comment = Some(self.fingerprint());
        if let Some(first) = self.chains.last_mut().and_then(|chain| chain.rules.first_mut()) {
            first.comment = comment;
        }
    }

    /// Without the rule's comment that differs with everything.
    pub(super) fn without_fingerprint(mut self) -> Self {
        let first = self.chains.last_mut().and_then(|chain| chain.rules.first_mut());
        if let Some(first) = first {
            first.comment = None;
        }
        self
    }

    /// Differs where anything else does.
    pub(super) fn fingerprint(&self) -> String {
        let mut hasher = DefaultHasher::new();
        for chain in &self.chains {
            // Without the comment that is this fingerprint.
            let is_output = chain.name == OUTPUT;
            chain
                .rules
                .iter()
                .skip(usize::from(is_output))
                .for_each(|rule| rule.to_string().hash(&mut hasher));
        }
        self.sets.iter().for_each(|set| set.to_string().hash(&mut hasher));
        self.counters.hash(&mut hasher);
        format!("mesh-redirect {} {:016x}", env!("CARGO_PKG_VERSION"), hasher.finish())
    }
}

const TCP: Statement = Statement::Of(Transport::Tcp);
const UDP: Statement = Statement::Of(Transport::Udp);

/// What becomes of a connection that is not steered. A virtual address leads nowhere by itself.
fn leave(service: &Service) -> Statement {
    match service.dns_port {
        Some(_) => Statement::Goto(VIRTUAL.to_owned()),
        None => Statement::Return,
    }
}

fn to_set(transport: Transport, policy: usize, family: Family) -> Statement {
    Statement::To(transport, family, policy_set(policy, family))
}

/// How many levels below the root of the hierarchy a cgroup is.
fn level(cgroup: &Cgroup, cgroup_root: &Path) -> u32 {
    cgroup.dir.strip_prefix(cgroup_root).unwrap_or(&cgroup.dir).components().count() as u32
}

/// What is counted of each service.
pub(super) const COUNTERS: [&str; 6] =
    ["steered", "passed_by_rule", "passed_proxy_absent", "refused", "observed", "queries"];

fn policy_set(policy: usize, family: Family) -> String {
    format!("policy_{policy}_{}", family.name())
}

fn service_chain(service: &Service) -> String {
    format!("service_{}", service.id)
}

impl Family {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::V4 => "ipv4",
            Self::V6 => "ipv6",
        }
    }

    fn daddr(self) -> &'static str {
        match self {
            Self::V4 => "ip daddr",
            Self::V6 => "ip6 daddr",
        }
    }

    fn is_of(self, range: &Range) -> bool {
        range.first.is_ipv4() == (self == Self::V4)
    }
}

impl Transport {
    fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

impl From<Vec<Statement>> for Rule {
    fn from(statements: Vec<Statement>) -> Self {
        Self { statements, comment: None }
    }
}

impl fmt::Display for Ruleset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "table inet {TABLE} {{")?;
        self.counters.iter().try_for_each(|name| writeln!(f, "\tcounter {name} {{ }}"))?;
        for set in [ALIVE, ALIVE_DNS] {
            writeln!(f, "\tset {set} {{\n\t\ttype nf_proto\n\t\tflags timeout\n\t}}")?;
        }
        self.sets.iter().try_for_each(|set| set.fmt(f))?;
        self.chains.iter().try_for_each(|chain| chain.fmt(f))?;
        writeln!(f, "}}")
    }
}

impl fmt::Display for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, key, elements) = match &self.content {
            Content::Destinations(family, ranges) => {
                let key = format!("type {}_addr . inet_service\n\t\tflags interval", family.name());
                ("set", key, ranges.iter().flat_map(destinations).collect::<Vec<_>>())
            }
            Content::Cgroups(cgroups) => {
                let elements = cgroups.iter().map(|(id, chain)| format!("{id} : jump {chain}"));
                ("map", "type cgroupsv2 : verdict".to_owned(), elements.collect())
            }
            Content::Users(users) => {
                let elements = users.iter().map(|(id, chain)| format!("{id} : jump {chain}"));
                ("map", "type uid : verdict".to_owned(), elements.collect())
            }
            Content::Virtual(family, addresses) => {
                let elements =
                    addresses.iter().map(|(from, to)| format!("{from} : {} . {}", to.ip(), to.port()));
                let kind = format!("{}_addr", family.name());
                ("map", format!("type {kind} : {kind} . inet_service"), elements.collect())
            }
        };
        writeln!(f, "\t{kind} {} {{\n\t\t{key}\n\t\telements = {{", self.name)?;
        elements.iter().try_for_each(|element| writeln!(f, "\t\t\t{element},"))?;
        writeln!(f, "\t\t}}\n\t}}")
    }
}

/// The elements of a range.
fn destinations(range: &Range) -> impl Iterator<Item = String> {
    let interval = |first: &dyn fmt::Display, last: &dyn fmt::Display| {
        let (first, last) = (first.to_string(), last.to_string());
        if first == last { first } else { format!("{first}-{last}") }
    };
    let addresses = interval(&range.first, &range.last);
    range.ports.iter().map(move |Ports { first, last }| format!("{addresses} . {}", interval(first, last)))
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\tchain {} {{", self.name)?;
        if self.name == OUTPUT {
            writeln!(f, "\t\ttype nat hook output priority {PRIORITY}; policy accept;")?;
        }
        self.rules.iter().try_for_each(|rule| writeln!(f, "\t\t{rule}"))?;
        writeln!(f, "\t}}")
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words: Vec<String> = self.statements.iter().map(ToString::to_string).collect();
        f.write_str(&words.join(" "))?;
        self.comment.as_ref().map_or(Ok(()), |comment| write!(f, " comment \"{comment}\""))
    }
}

impl fmt::Display for Statement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Opening => f.write_str("tcp flags syn / fin,syn,rst,ack"),
            Self::Of(transport) => write!(f, "meta l4proto {}", transport.name()),
            Self::To(transport, family, set) => {
                write!(f, "{} . {} dport @{set}", family.daddr(), transport.name())
            }
            Self::Port(transport, port) => write!(f, "{} dport {port}", transport.name()),
            Self::ByCgroup(level, map) => write!(f, "socket cgroupv2 level {level} vmap @{map}"),
            Self::ByUser(map) => write!(f, "meta skuid vmap @{map}"),
            Self::Alive(set) => write!(f, "meta nfproto @{set}"),
            Self::Count(name) => write!(f, "counter name {name}"),
            Self::Redirect(port) => write!(f, "redirect to :{port}"),
            Self::Translate(family, map) => {
                let family_name = if *family == Family::V4 { "ip" } else { "ip6" };
                write!(f, "dnat {family_name} to {} map @{map}", family.daddr())
            }
            Self::Reject => f.write_str("reject with tcp reset"),
            Self::Goto(chain) => write!(f, "goto {chain}"),
            Self::Return => f.write_str("return"),
            Self::Accept => f.write_str("accept"),
        }
    }
}

/// An address and a port as a concatenated key: each part fills up to four bytes.
pub(super) fn key(address: IpAddr, port: u16) -> Vec<u8> {
    let address = match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    [address, port.to_be_bytes().to_vec(), vec![0, 0]].concat()
}
