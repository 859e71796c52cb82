//! From a written policy to what the kernel looks up: pure.
//!
//! A destination is steered when an include covers it, and every exclude that covers it has a more specific include
//! that covers it too. Beside what is written, the base of a policy is an include, and so is what DNS needs: port 53, and
//! the virtual addresses. One capture is more specific than another when it lies wholly within the other and is not the
//! same; captures that merely overlap are not comparable, and then the exclude wins.

use crate::{
    config::{Base, Capture, Destinations, Failure, Policy, Ports, Written},
    routable::{Place, Routable},
};
use agent_ebpf::{
    AF_INET, AF_INET6, DNS_PORT, MAX_PORT_RANGES, PortRange, RuleKey, Rules, VERDICT_STEER,
    decide::Destination,
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

const ANY_PORT: Ports = Ports { first: 0, last: u16::MAX };

/// One entry of the kernel's longest-prefix trie, but for the policy's number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The addresses.
    pub(crate) net: IpNet,
    /// What happens to their ports.
    pub(crate) rules: Rules,
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ports: Vec<String> = self.steered().iter().map(ToString::to_string).collect();
        let ports = if ports.is_empty() { "none".to_owned() } else { ports.join(", ") };
        write!(f, "{} ports {ports}", self.net)
    }
}

impl Entry {
    /// The key under a policy's number, and how many of its bits count.
    pub(crate) fn key(&self, policy: u32) -> (u32, RuleKey) {
        let mut addr = [0; 16];
        let family = match self.net.network() {
            IpAddr::V4(ip) => {
                addr[..4].copy_from_slice(&ip.octets());
                AF_INET
            }
            IpAddr::V6(ip) => {
                addr = ip.octets();
                AF_INET6
            }
        };
        let bits = RuleKey::FIXED_BITS + u32::from(self.net.prefix_len());
        (bits, RuleKey { policy, family: u32::from(family), addr })
    }

    fn steered(&self) -> Vec<Ports> {
        let ranges = self.rules.ranges.iter().take(self.rules.len as usize);
        ranges.map(|range| Ports { first: range.first, last: range.last }).collect()
    }
}

/// A policy that the kernel has no room for.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{net} needs {needed} separate port ranges and the kernel side holds {MAX_PORT_RANGES} for one CIDR; join ranges or widen them"
)]
pub(crate) struct TooManyRanges {
    net: IpNet,
    needed: usize,
}

/// What of a policy covers a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rule<'p> {
    part: Part<'p>,
    /// Where a service of the proxy's is, where it is covered for that.
    place: Option<Place<'p>>,
}

/// A part of a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part<'p> {
    Base(Written<Base>),
    /// For the queries themselves.
    Queries(Written<bool>),
    /// For what their answers lead to.
    VirtualAddresses(Written<bool>),
    Include(&'p Written<Capture>),
    Exclude(&'p Written<Capture>),
}

impl Rule<'_> {
    /// The line of the configuration at which it is written; none where it is built in.
    pub(crate) fn line(&self) -> Option<u64> {
        match self.part {
            Part::Base(base) => base.line,
            Part::Queries(dns) | Part::VirtualAddresses(dns) => dns.line,
            Part::Include(capture) | Part::Exclude(capture) => capture.line,
        }
    }
}

impl fmt::Display for Part<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Base(base) => write!(f, "base {}", base.value),
            Self::Queries(_) | Self::VirtualAddresses(_) => f.write_str("dns"),
            Self::Include(capture) => write!(f, "include {}", capture.value),
            Self::Exclude(capture) => write!(f, "exclude {}", capture.value),
        }
    }
}

impl fmt::Display for Rule<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.part.fmt(f)?;
        match (self.part, self.place) {
            (Part::Queries(_), _) => f.write_str(" (queries)"),
            (Part::VirtualAddresses(_), _) => f.write_str(" (virtual addresses)"),
            (_, Some(place)) => write!(f, " ({place})"),
            (_, None) => Ok(()),
        }
    }
}

/// A rule for one block and one range.
#[derive(Clone, Copy, Debug)]
struct Block<'p> {
    net: IpNet,
    ports: Ports,
    rule: Rule<'p>,
}

impl<'p> Block<'p> {
    fn new(part: Part<'p>, net: IpNet, ports: Ports) -> Self {
        Self { net, ports, rule: Rule { part, place: None } }
    }

    fn at_place(part: Part<'p>, place: Place<'p>) -> Self {
        let Place { net, ports, .. } = place;
        Self { net, ports, rule: Rule { part, place: Some(place) } }
    }

    fn is_include(&self) -> bool {
        !matches!(self.rule.part, Part::Exclude(_))
    }

    fn is_within(&self, other: &Self) -> bool {
        other.net.contains(&self.net)
            && other.ports.first <= self.ports.first
            && self.ports.last <= other.ports.last
    }

    fn is_more_specific_than(&self, other: &Self) -> bool {
        self.is_within(other) && !other.is_within(self)
    }

    /// How many addresses and ports there are in it, as far as that tells which of two around one point is smaller.
    fn size(&self) -> (u8, u16) {
        (self.net.max_prefix_len() - self.net.prefix_len(), self.ports.last - self.ports.first)
    }

    /// The part of it that is at some ports.
    fn at(self, ports: Ports) -> Option<Self> {
        let first = self.ports.first.max(ports.first);
        let last = self.ports.last.min(ports.last);
        (first <= last).then_some(Self { ports: Ports { first, last }, ..self })
    }

    fn has_port(&self, port: u16) -> bool {
        self.ports.first <= port && port <= self.ports.last
    }
}

/// Compiles a policy: one entry for each block it names, which says all about the addresses that no smaller one holds.
pub(crate) fn compile(policy: &Policy, routable: &Routable) -> Result<Vec<Entry>, TooManyRanges> {
    let mut blocks = blocks(policy, routable);
    // A net comes before what lies within it, so that those around one are always the ones that are still open.
    blocks.sort_by_key(|block| (block.net.network(), block.net.prefix_len()));
    let mut open: Vec<Block<'_>> = Vec::new();
    let mut entries = Vec::new();
    for same in blocks.chunk_by(|a, b| a.net == b.net) {
        let Some(&Block { net, .. }) = same.first() else { continue };
        while open.pop_if(|outer| !outer.net.contains(&net)).is_some() {}
        open.extend(same);
        entries.push(entry(net, &open)?);
    }
    Ok(entries)
}

/// A compiled policy that steers all there is.
pub(crate) fn everything() -> Vec<Entry> {
    let (include, exclude) = ([].into(), [].into());
    let (base, dns) = (Written::built_in(Base::All), Written::built_in(false));
    let policy = Policy { failure: Failure::Open, base, include, exclude, dns };
    compile(&policy, &Routable::default()).unwrap_or_default()
}

/// What becomes of a destination, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict<'p> {
    /// An include covers it, this one most closely.
    Steered(Rule<'p>),
    /// An exclude covers it, and no include is more specific.
    Excluded(Rule<'p>),
    /// No include covers it, and this base does not either.
    NotIncluded(Rule<'p>),
    /// It is this host itself, its link, many hosts or none.
    Local,
}

impl<'p> Verdict<'p> {
    /// What says so; none for what no policy can have meant.
    pub(crate) fn rule(&self) -> Option<&Rule<'p>> {
        match self {
            Self::Steered(rule) | Self::Excluded(rule) | Self::NotIncluded(rule) => Some(rule),
            Self::Local => None,
        }
    }

    pub(crate) fn is_steered(&self) -> bool {
        matches!(self, Self::Steered(_))
    }
}

/// What a policy says of a destination: the definition that every compiled form has to agree with.
pub(crate) fn decide<'p>(policy: &'p Policy, routable: &'p Routable, destination: SocketAddr) -> Verdict<'p> {
    let ip = destination.ip().to_canonical();
    if is_local(ip) {
        return Verdict::Local;
    }
    decide_among(policy, &around(policy, routable, ip), destination.port())
}

/// The same of all ports of an address but zero: neighbouring ones of which the same is said together.
pub(crate) fn decide_ports<'p>(
    policy: &'p Policy,
    routable: &'p Routable,
    ip: IpAddr,
) -> Vec<(Ports, Verdict<'p>)> {
    let ip = ip.to_canonical();
    if is_local(ip) {
        return vec![(Ports { first: 1, last: u16::MAX }, Verdict::Local)];
    }
    let around = around(policy, routable, ip);
    let mut decided: Vec<(Ports, Verdict<'_>)> = Vec::new();
    let segments = segments(&around, [1, u32::from(u16::MAX) + 1]);
    for Ports { first, last } in segments.into_iter().filter(|ports| ports.first != 0) {
        let verdict = decide_among(policy, &around, first);
        match decided.last_mut() {
            Some((ports, before)) if *before == verdict => ports.last = last,
            _ => decided.push((Ports { first, last }, verdict)),
        }
    }
    decided
}

/// Whether it is an address that no policy can have meant ([`agent_ebpf::decide::Destination::is_local`]).
pub(crate) fn is_local(ip: IpAddr) -> bool {
    let destination = match ip {
        IpAddr::V4(ip) => Destination::from_ipv4(ip.octets(), 0),
        IpAddr::V6(ip) => Destination::from_ipv6(ip.octets(), 0),
    };
    destination.is_local()
}

fn around<'p>(policy: &'p Policy, routable: &'p Routable, ip: IpAddr) -> Vec<Block<'p>> {
    blocks(policy, routable).into_iter().filter(|block| block.net.contains(&ip)).collect()
}

fn decide_among<'p>(policy: &'p Policy, around: &[Block<'p>], port: u16) -> Verdict<'p> {
    let covering = || around.iter().filter(|block| block.has_port(port));
    let (includes, excludes): (Vec<&Block<'_>>, Vec<&Block<'_>>) =
        covering().partition(|block| block.is_include());
    let closest =
        |blocks: &[&Block<'p>]| blocks.iter().min_by_key(|block| block.size()).map(|block| block.rule);
    match (closest(&includes), wins(covering())) {
        (None, _) => Verdict::NotIncluded(Rule { part: Part::Base(policy.base), place: None }),
        (Some(include), true) => Verdict::Steered(include),
        (Some(include), false) => Verdict::Excluded(closest(&excludes).unwrap_or(include)),
    }
}

fn wins<'a, 'p: 'a>(covering: impl Iterator<Item = &'a Block<'p>>) -> bool {
    let (includes, excludes): (Vec<&Block<'_>>, Vec<&Block<'_>>) =
        covering.partition(|block| block.is_include());
    let outdone = |exclude: &Block<'_>| includes.iter().any(|include| include.is_more_specific_than(exclude));
    !includes.is_empty() && excludes.into_iter().all(outdone)
}

fn blocks<'p>(policy: &'p Policy, routable: &'p Routable) -> Vec<Block<'p>> {
    let base = Part::Base(policy.base);
    let base = match policy.base.value {
        Base::All => anywhere(base, ANY_PORT).to_vec(),
        Base::Routable => routable.all().map(|place| Block::at_place(base, place)).collect(),
        Base::Listed => Vec::new(),
    };
    let dns = if policy.dns.value { dns_blocks(policy.dns) } else { Vec::new() };
    let includes =
        policy.include.iter().flat_map(|include| capture_blocks(Part::Include(include), include, routable));
    let excludes =
        policy.exclude.iter().flat_map(|exclude| capture_blocks(Part::Exclude(exclude), exclude, routable));
    base.into_iter().chain(dns).chain(includes).chain(excludes).collect()
}

/// All addresses of both families.
fn anywhere(part: Part<'_>, ports: Ports) -> [Block<'_>; 2] {
    [Ipv4Net::default().into(), Ipv6Net::default().into()].map(|net| Block::new(part, net, ports))
}

/// Queries, and what their answers lead to.
fn dns_blocks<'p>(dns: Written<bool>) -> Vec<Block<'p>> {
    let virtual_address = |net| Block::new(Part::VirtualAddresses(dns), net, ANY_PORT);
    let virtual_addresses = VIRTUAL.iter().filter_map(|net| net.parse().ok()).map(virtual_address);
    let queries = anywhere(Part::Queries(dns), Ports { first: DNS_PORT, last: DNS_PORT });
    queries.into_iter().chain(virtual_addresses).collect()
}

/// The addresses that the proxy gives to names ([`agent_ebpf::decide::Destination::is_virtual`]).
const VIRTUAL: [&str; 2] = ["241.0.0.0/8", "fdb2:6c1e:9d04::/48"];

fn capture_blocks<'p>(
    part: Part<'p>,
    capture: &'p Written<Capture>,
    routable: &'p Routable,
) -> impl Iterator<Item = Block<'p>> {
    let Capture { destinations, ports } = &capture.value;
    let blocks = match destinations {
        Destinations::Any => anywhere(part, ANY_PORT).to_vec(),
        Destinations::Block(net) => vec![Block::new(part, *net, ANY_PORT)],
        Destinations::Service(name) => routable.of(name).map(|place| Block::at_place(part, place)).collect(),
    };
    let ports = if ports.is_empty() { &[ANY_PORT][..] } else { ports };
    let narrowed = move |block: Block<'p>| ports.iter().filter_map(move |ports| block.at(*ports));
    blocks.into_iter().flat_map(narrowed)
}

fn entry(net: IpNet, covering: &[Block<'_>]) -> Result<Entry, TooManyRanges> {
    let steered = steered_ranges(covering);
    if steered.len() > MAX_PORT_RANGES {
        return Err(TooManyRanges { net, needed: steered.len() });
    }
    let mut rules = Rules {
        len: steered.len() as u32,
        ranges: [PortRange { first: 0, last: 0, verdict: 0 }; MAX_PORT_RANGES],
    };
    for (range, Ports { first, last }) in rules.ranges.iter_mut().zip(steered) {
        *range = PortRange { first, last, verdict: VERDICT_STEER };
    }
    Ok(Entry { net, rules })
}

/// The ports that are steered, as the fewest ranges.
fn steered_ranges(covering: &[Block<'_>]) -> Vec<Ports> {
    let mut ranges: Vec<Ports> = Vec::new();
    for Ports { first, last } in segments(covering, []) {
        if !wins(covering.iter().filter(|block| block.has_port(first))) {
            continue;
        }
        match ranges.last_mut() {
            Some(range) if u32::from(range.last) + 1 == u32::from(first) => range.last = last,
            _ => ranges.push(Ports { first, last }),
        }
    }
    ranges
}

/// Ports between two bounds of any block's range, or others: between them nothing changes. `more` are further bounds.
fn segments<const N: usize>(blocks: &[Block<'_>], more: [u32; N]) -> Vec<Ports> {
    let firsts = blocks.iter().map(|block| u32::from(block.ports.first));
    let ends = blocks.iter().map(|block| u32::from(block.ports.last) + 1);
    let bounds: Vec<u32> = firsts.chain(ends).chain(more).collect::<BTreeSet<u32>>().into_iter().collect();
    bounds.windows(2).map(|pair| Ports { first: pair[0] as u16, last: (pair[1] - 1) as u16 }).collect()
}

/// Destinations that are steered: neighbouring addresses with the same ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    /// The first address.
    pub(crate) first: IpAddr,
    /// The last one, of the same family.
    pub(crate) last: IpAddr,
    /// Disjoint and sorted; never empty.
    pub(crate) ports: Vec<Ports>,
}

/// What no policy can have meant ([`agent_ebpf::decide::Destination::is_local`]), as blocks.
const LOCAL: [&str; 11] = [
    "0.0.0.0/8",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "224.0.0.0/4",
    "240.0.0.0/8",
    "242.0.0.0/7",
    "244.0.0.0/6",
    "248.0.0.0/5",
    "::/127",
    "fe80::/10",
    "ff00::/8",
];

/// All that a compiled policy steers, as disjoint ranges in order, for what cannot look up the longest prefix.
pub(crate) fn ranges(entries: &[Entry]) -> Vec<Range> {
    let local: Vec<IpNet> = LOCAL.iter().filter_map(|net| net.parse().ok()).collect();
    let is_local = |entry: &Entry| local.iter().any(|local| local.contains(&entry.net));
    let written = entries.iter().filter(|entry| !is_local(entry));
    let written = written.map(|entry| Nested { net: entry.net, steered: entry.steered() });
    let mut nets: Vec<Nested> =
        written.chain(local.iter().map(|&net| Nested { net, steered: Vec::new() })).collect();
    // A block comes before what lies within it.
    nets.sort_by_key(|nested| (nested.net.network(), nested.net.prefix_len()));
    let (v4, v6): (Vec<Nested>, Vec<Nested>) =
        nets.into_iter().partition(|nested| nested.net.addr().is_ipv4());
    [v4, v6].iter().flat_map(|nets| disjoint(nets)).collect()
}

/// A block that others may lie within.
struct Nested {
    net: IpNet,
    steered: Vec<Ports>,
}

/// Cuts sorted blocks of one family into ranges for each of which one of them is the innermost.
fn disjoint(nets: &[Nested]) -> Vec<Range> {
    let mut ranges = Vec::new();
    let mut open: Vec<&Nested> = Vec::new();
    // The first address of which nothing was said yet.
    let mut next = 0;
    for inner in nets {
        let first = number(inner.net.network());
        while let Some(ended) = open.pop_if(|outer| number(outer.net.broadcast()) < first) {
            let last = number(ended.net.broadcast());
            add(&mut ranges, ended, next, last);
            next = last + 1;
        }
        if let Some(outer) = open.last().filter(|_| next < first) {
            add(&mut ranges, outer, next, first - 1);
        }
        next = first;
        open.push(inner);
    }
    while let Some(ended) = open.pop() {
        let last = number(ended.net.broadcast());
        add(&mut ranges, ended, next, last);
        // Those around one that ends with the last address of all end there too.
        let Some(after) = last.checked_add(1) else { break };
        next = after;
    }
    ranges
}

/// Adds a range of a block, unless nothing is steered there, or makes the last range longer.
fn add(ranges: &mut Vec<Range>, of: &Nested, first: u128, last: u128) {
    if of.steered.is_empty() || first > last {
        return;
    }
    let address = |number: u128| match of.net {
        IpNet::V4(_) => IpAddr::from(Ipv4Addr::from(number as u32)),
        IpNet::V6(_) => IpAddr::from(Ipv6Addr::from(number)),
    };
    match ranges.last_mut() {
        Some(range) if number(range.last).checked_add(1) == Some(first) && range.ports == of.steered => {
            range.last = address(last);
        }
        _ => ranges.push(Range { first: address(first), last: address(last), ports: of.steered.clone() }),
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(u32::from(address)),
        IpAddr::V6(address) => u128::from(address),
    }
}

#[cfg(test)]
mod tests;
