//! From a written policy to what the kernel looks up: pure.
//!
//! A destination is steered when an include covers it, and every exclude that covers it has a more specific include
//! that covers it too. One capture is more specific than another when it lies wholly within the other and is not the
//! same; captures that merely overlap are not comparable, and then the exclude wins.

use crate::config::{Capture, Policy, Ports};
use agent_ebpf::{AF_INET, AF_INET6, MAX_PORT_RANGES, PortRange, RuleKey, Rules, VERDICT_STEER};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
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

/// A capture of one block and one range.
#[derive(Clone, Copy, Debug)]
struct Block {
    net: IpNet,
    ports: Ports,
    include: bool,
}

impl Block {
    fn is_within(&self, other: &Self) -> bool {
        other.net.contains(&self.net)
            && other.ports.first <= self.ports.first
            && self.ports.last <= other.ports.last
    }

    fn is_more_specific_than(&self, other: &Self) -> bool {
        self.is_within(other) && !other.is_within(self)
    }

    fn has_port(&self, port: u16) -> bool {
        self.ports.first <= port && port <= self.ports.last
    }
}

/// Compiles a policy: one entry for each block it names, which says all about the addresses that no smaller one holds.
pub(crate) fn compile(policy: &Policy) -> Result<Vec<Entry>, TooManyRanges> {
    let blocks = blocks(policy);
    let nets: BTreeSet<IpNet> = blocks.iter().map(|block| block.net).collect();
    nets.into_iter().map(|net| entry(net, &blocks)).collect()
}

/// What a policy says of a destination: the definition that every compiled form has to agree with.
#[cfg_attr(
    not(test),
    expect(dead_code, reason = "the definition that tests hold the compiled forms against")
)]
pub(crate) fn steers(policy: &Policy, destination: SocketAddr) -> bool {
    let covering: Vec<Block> =
        blocks(policy).into_iter().filter(|block| block.net.contains(&destination.ip())).collect();
    wins(covering.iter().filter(|block| block.has_port(destination.port())))
}

fn wins<'a>(covering: impl Iterator<Item = &'a Block>) -> bool {
    let (includes, excludes): (Vec<&Block>, Vec<&Block>) = covering.partition(|block| block.include);
    let outdone = |exclude: &Block| includes.iter().any(|include| include.is_more_specific_than(exclude));
    !includes.is_empty() && excludes.into_iter().all(outdone)
}

fn blocks(policy: &Policy) -> Vec<Block> {
    let captures = |captures: &[Capture], include| {
        captures.iter().flat_map(move |capture| capture_blocks(capture, include)).collect::<Vec<_>>()
    };
    [captures(&policy.include, true), captures(&policy.exclude, false)].concat()
}

fn capture_blocks(capture: &Capture, include: bool) -> Vec<Block> {
    let nets = match capture.cidr {
        Some(net) => vec![net],
        None => vec![Ipv4Net::default().into(), Ipv6Net::default().into()],
    };
    let ports = if capture.ports.is_empty() { &[ANY_PORT][..] } else { &capture.ports };
    nets.into_iter().flat_map(|net| ports.iter().map(move |&ports| Block { net, ports, include })).collect()
}

fn entry(net: IpNet, blocks: &[Block]) -> Result<Entry, TooManyRanges> {
    let covering: Vec<&Block> = blocks.iter().filter(|block| block.net.contains(&net)).collect();
    let steered = steered_ranges(&covering);
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

/// The ports that are steered, as the fewest ranges. Between two bounds of any block's range nothing changes.
fn steered_ranges(covering: &[&Block]) -> Vec<Ports> {
    let firsts = covering.iter().map(|block| u32::from(block.ports.first));
    let ends = covering.iter().map(|block| u32::from(block.ports.last) + 1);
    let bounds: Vec<u32> = firsts.chain(ends).collect::<BTreeSet<u32>>().into_iter().collect();
    let mut ranges: Vec<Ports> = Vec::new();
    for pair in bounds.windows(2) {
        let (first, last) = (pair[0] as u16, (pair[1] - 1) as u16);
        if !wins(covering.iter().copied().filter(|block| block.has_port(first))) {
            continue;
        }
        match ranges.last_mut() {
            Some(range) if u32::from(range.last) + 1 == u32::from(first) => range.last = last,
            _ => ranges.push(Ports { first, last }),
        }
    }
    ranges
}

#[cfg(test)]
mod tests;
