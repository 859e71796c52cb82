//! The ruleset as netlink messages (linux/netfilter/nf_tables.h), all of them one transaction.

use super::super::Ready;
use super::ruleset::{
    ALIVE, ALIVE_DNS, Chain, Content, Family, OUTPUT, PRIORITY, Rule, Ruleset, Set, Statement, TABLE,
    Transport, key,
};
use crate::sys::nftables::{self as sys, ELEMENTS_IN_A_MESSAGE, Element, Elements, Expression, Value};
use crate::{config::Ports, rules::Range};
use nftnl::{
    Batch, ChainType, Hook, MsgType, Policy, ProtoFamily, Table,
    expr::{Bitwise, Cmp, CmpOp, Meta, RejectionType, Socket, SocketKey, Verdict},
    nftnl_sys::{self as constants, libc},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::CString,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

/// What a transaction replaces: names of what is there.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Present {
    pub(super) chains: BTreeSet<String>,
    pub(super) sets: BTreeSet<String>,
    pub(super) counters: BTreeSet<String>,
}

/// Puts a ruleset in the place of what is there. Counters of services that stay go on, and the proxy stays as alive as
/// it is.
pub(super) fn replace(present: &Present, ruleset: &Ruleset) -> Batch {
    let (mut batch, table) = (Batch::new(), table());
    batch.add(&table, MsgType::Add);
    if !present.chains.is_empty() {
        batch.add(&sys::Rules { table: &table, chain: None }, MsgType::Del);
    }
    let gone = present.sets.iter().filter(|name| ![ALIVE, ALIVE_DNS].contains(&name.as_str())).enumerate();
    for (index, name) in gone {
        let name = text(name);
        batch.add(&named_set(&table, &name, index as u32), MsgType::Del);
    }
    for name in present.chains.iter().filter(|name| *name != OUTPUT) {
        batch.add(&nftnl::Chain::new(text(name), &table), MsgType::Del);
    }
    for name in present.counters.iter().filter(|name| !ruleset.counters.contains(*name)) {
        batch.add(&sys::Counter { table: &table, name: &text(name) }, MsgType::Del);
    }
    for name in &ruleset.counters {
        batch.add(&sys::Counter { table: &table, name: &text(name) }, MsgType::Add);
    }
    // Chains first: maps name them. Maps before rules, which name maps.
    let chains: Vec<(nftnl::Chain<'_>, &Chain)> =
        ruleset.chains.iter().map(|chain| (new_chain(&table, &chain.name), chain)).collect();
    chains.iter().for_each(|(chain, _)| batch.add(chain, MsgType::Add));
    for (index, name) in [ALIVE, ALIVE_DNS].into_iter().enumerate() {
        let name = text(name);
        batch.add(&alive_set(&table, &name, index as u32), MsgType::Add);
    }
    for (index, set) in ruleset.sets.iter().enumerate() {
        add_set(&mut batch, &table, set, index as u32 + 2);
    }
    for (chain, rules) in &chains {
        for rule in &rules.rules {
            batch.add(&new_rule(chain, rule), MsgType::Add);
        }
    }
    batch
}

/// Makes one ruleset of another that is in place, by what differs: beside a thousand services, one more takes no longer
/// than the first. None where sets of destinations differ, which rules hold fast.
pub(super) fn change(from: &Ruleset, to: &Ruleset) -> Option<Batch> {
    let maps = maps_of(from, to)?;
    let (mut batch, table) = (Batch::new(), table());
    let (before, after) = (chains_of(from), chains_of(to));
    for name in to.counters.difference(&from.counters) {
        batch.add(&sys::Counter { table: &table, name: &text(name) }, MsgType::Add);
    }
    let is_new = |chain: &&Chain| before.get(chain.name.as_str()) != Some(chain);
    let changed: Vec<&Chain> = to.chains.iter().filter(is_new).collect();
    for chain in &changed {
        batch.add(&new_chain(&table, &chain.name), MsgType::Add);
    }
    for (index, (name, old, new)) in maps.into_iter().enumerate() {
        let name = text(name);
        let set = named_set(&table, &name, index as u32);
        add_all(&mut batch, &set, &MsgType::Del, &jumps(old.iter().filter(|target| !new.contains(target))));
        add_all(&mut batch, &set, &MsgType::Add, &jumps(new.iter().filter(|target| !old.contains(target))));
    }
    let gone: Vec<&Chain> =
        from.chains.iter().filter(|chain| !after.contains_key(chain.name.as_str())).collect();
    for chain in changed.iter().filter(|chain| before.contains_key(chain.name.as_str())).chain(&gone) {
        batch.add(&sys::Rules { table: &table, chain: Some(&text(&chain.name)) }, MsgType::Del);
    }
    for chain in &changed {
        let message = new_chain(&table, &chain.name);
        chain.rules.iter().for_each(|rule| batch.add(&new_rule(&message, rule), MsgType::Add));
    }
    for chain in gone.iter().rev() {
        batch.add(&new_chain(&table, &chain.name), MsgType::Del);
    }
    for name in from.counters.difference(&to.counters) {
        batch.add(&sys::Counter { table: &table, name: &text(name) }, MsgType::Del);
    }
    Some(batch)
}

/// Where keys of a map lead: the key, and the name of a chain.
type Targets<'r> = BTreeSet<(Vec<u8>, &'r str)>;

/// The maps of two rulesets by their names; none where one has another map or set than the other, or another content of
/// a set.
fn maps_of<'r>(from: &'r Ruleset, to: &'r Ruleset) -> Option<Vec<(&'r str, Targets<'r>, Targets<'r>)>> {
    let pairs = from.sets.iter().zip(&to.sets);
    let same_names = from.sets.len() == to.sets.len() && pairs.clone().all(|(old, new)| old.name == new.name);
    let maps = pairs.map(|(old, new)| match (targets(&old.content), targets(&new.content)) {
        (Some(before), Some(after)) => Some(Some((old.name.as_str(), before, after))),
        _ => (old.content == new.content).then_some(None),
    });
    let maps: Vec<Option<_>> = maps.collect::<Option<_>>().filter(|_| same_names)?;
    Some(maps.into_iter().flatten().collect())
}

fn targets(content: &Content) -> Option<Targets<'_>> {
    match content {
        Content::Destinations(..) | Content::Virtual(..) => None,
        Content::Cgroups(cgroups) => {
            Some(cgroups.iter().map(|(id, chain)| (id.to_ne_bytes().to_vec(), chain.as_str())).collect())
        }
        Content::Users(users) => {
            Some(users.iter().map(|(id, chain)| (id.to_ne_bytes().to_vec(), chain.as_str())).collect())
        }
    }
}

fn jumps<'t>(targets: impl Iterator<Item = &'t (Vec<u8>, &'t str)>) -> Vec<Element> {
    let element = |(key, chain): &(Vec<u8>, &str)| Element {
        key: key.clone(),
        key_end: None,
        data: None,
        jump: Some(text(chain)),
        timeout_ms: None,
    };
    targets.map(element).collect()
}

fn add_all(batch: &mut Batch, set: &sys::Set<'_>, kind: &MsgType, elements: &[Element]) {
    for elements in elements.chunks(ELEMENTS_IN_A_MESSAGE) {
        let message = Elements { set, elements };
        match kind {
            MsgType::Add => batch.add(&message, MsgType::Add),
            MsgType::Del => batch.add(&message, MsgType::Del),
        }
    }
}

fn chains_of(ruleset: &Ruleset) -> BTreeMap<&str, &Chain> {
    ruleset.chains.iter().map(|chain| (chain.name.as_str(), chain)).collect()
}

/// Removes the table, whether it is there or not.
pub(super) fn remove() -> Batch {
    let (mut batch, table) = (Batch::new(), table());
    batch.add(&table, MsgType::Add);
    batch.add(&table, MsgType::Del);
    batch
}

/// Says for what the proxy is alive, for so long from now on.
///
/// Older kernels do not renew the timeout of an element that is there; so each is added, deleted and added again, all
/// at once.
pub(super) fn keep_alive(ready: Ready, timeout: Duration) -> Batch {
    let (mut batch, table) = (Batch::new(), table());
    for (name, ready) in [(ALIVE, ready.proxy), (ALIVE_DNS, ready.dns)] {
        renew(&mut batch, &table, name, ready, timeout);
    }
    batch
}

fn renew(batch: &mut Batch, table: &Table, name: &str, [v4, v6]: [bool; 2], timeout: Duration) {
    let name = text(name);
    let set = alive_set(table, &name, 0);
    let element = |family: Family| Element {
        key: vec![family.number()],
        key_end: None,
        data: None,
        jump: None,
        timeout_ms: Some(timeout.as_millis() as u64),
    };
    let families = [(Family::V4, v4), (Family::V6, v6)];
    let [alive, dead] = [true, false].map(|wanted| {
        let some = families.into_iter().filter(|(_, is_alive)| *is_alive == wanted);
        some.map(|(family, _)| element(family)).collect::<Vec<_>>()
    });
    for elements in [&alive, &dead].into_iter().filter(|elements| !elements.is_empty()) {
        batch.add(&Elements { set: &set, elements }, MsgType::Add);
        batch.add(&Elements { set: &set, elements }, MsgType::Del);
    }
    if !alive.is_empty() {
        batch.add(&Elements { set: &set, elements: &alive }, MsgType::Add);
    }
}

fn table() -> Table {
    Table::new(text(TABLE), ProtoFamily::Inet)
}

/// Names are made of ASCII letters, digits and underscores.
fn text(name: &str) -> CString {
    CString::new(name).unwrap_or_default()
}

fn new_chain<'t>(table: &'t Table, name: &str) -> nftnl::Chain<'t> {
    let mut chain = nftnl::Chain::new(text(name), table);
    if name == OUTPUT {
        chain.set_type(ChainType::Nat);
        chain.set_hook(Hook::Out, PRIORITY);
        chain.set_policy(Policy::Accept);
    }
    chain
}

// How the nft program shows keys: `enum datatypes` of its datatype.h.
const TYPE_NFPROTO: u32 = 2;
const TYPE_IPADDR: u32 = 7;
const TYPE_IP6ADDR: u32 = 8;
const TYPE_INET_SERVICE: u32 = 13;
const TYPE_UID: u32 = 24;
const TYPE_CGROUPV2: u32 = 46;
/// A concatenation's type has six bits for each part.
const TYPE_BITS: u32 = 6;

fn named_set<'a>(table: &'a Table, name: &'a CString, id: u32) -> sys::Set<'a> {
    sys::Set { table, name, flags: 0, key_type: 0, key_len: 1, key_parts: &[], data: None, id }
}

fn alive_set<'a>(table: &'a Table, name: &'a CString, id: u32) -> sys::Set<'a> {
    let flags = libc::NFT_SET_TIMEOUT as u32;
    sys::Set { flags, key_type: TYPE_NFPROTO, ..named_set(table, name, id) }
}

fn add_set(batch: &mut Batch, table: &Table, set: &Set, id: u32) {
    let name = text(&set.name);
    let (interval, map) = ((libc::NFT_SET_INTERVAL | NFT_SET_CONCAT) as u32, libc::NFT_SET_MAP as u32);
    let (flags, key_type, key_len, key_parts): (u32, u32, u32, &[u8]) = match &set.content {
        Content::Destinations(Family::V4, _) => {
            (interval, TYPE_IPADDR << TYPE_BITS | TYPE_INET_SERVICE, 8, &[4, 2])
        }
        Content::Destinations(Family::V6, _) => {
            (interval, TYPE_IP6ADDR << TYPE_BITS | TYPE_INET_SERVICE, 20, &[16, 2])
        }
        Content::Cgroups(_) => (map, TYPE_CGROUPV2, 8, &[]),
        Content::Users(_) => (map, TYPE_UID, 4, &[]),
        Content::Virtual(Family::V4, _) => (map, TYPE_IPADDR, 4, &[]),
        Content::Virtual(Family::V6, _) => (map, TYPE_IP6ADDR, 16, &[]),
    };
    let data = match &set.content {
        Content::Virtual(Family::V4, _) => Some((TYPE_IPADDR << TYPE_BITS | TYPE_INET_SERVICE, 8)),
        Content::Virtual(Family::V6, _) => Some((TYPE_IP6ADDR << TYPE_BITS | TYPE_INET_SERVICE, 20)),
        _ => None,
    };
    let message = sys::Set { table, name: &name, flags, key_type, key_len, key_parts, data, id };
    batch.add(&message, MsgType::Add);
    add_all(batch, &message, &MsgType::Add, &elements(&set.content));
}

/// `NFT_SET_CONCAT`, which Linux 5.6 added.
const NFT_SET_CONCAT: libc::c_int = 0x80;

/// What a set holds.
pub(super) fn elements(content: &Content) -> Vec<Element> {
    let ranges = match content {
        Content::Destinations(_, ranges) => ranges,
        Content::Virtual(_, addresses) => return addresses.iter().map(translation).collect(),
        Content::Cgroups(_) | Content::Users(_) => {
            return jumps(targets(content).unwrap_or_default().iter());
        }
    };
    let element = |range: &Range, ports: &Ports| Element {
        key: key(range.first, ports.first),
        key_end: Some(key(range.last, ports.last)),
        data: None,
        jump: None,
        timeout_ms: None,
    };
    ranges.iter().flat_map(|range| range.ports.iter().map(move |ports| element(range, ports))).collect()
}

/// A virtual address, and where it leads.
fn translation((from, to): (&IpAddr, &SocketAddr)) -> Element {
    // Without the port and what fills it up.
    let mut address = key(*from, 0);
    address.truncate(address.len() - 4);
    Element { key: address, key_end: None, data: Some(key(to.ip(), to.port())), jump: None, timeout_ms: None }
}

fn new_rule<'c>(chain: &'c nftnl::Chain<'_>, rule: &Rule) -> nftnl::Rule<'c> {
    let mut message = nftnl::Rule::new(chain);
    rule.statements.iter().for_each(|statement| add(&mut message, statement));
    if let Some(comment) = &rule.comment {
        let _too_long_is_cut_by_nobody = message.set_comment(text(comment));
    }
    message
}

fn add(rule: &mut nftnl::Rule<'_>, statement: &Statement) {
    match statement {
        Statement::Of(transport) => {
            rule.add_expr(&Meta::L4Proto);
            rule.add_expr(&Cmp::new(CmpOp::Eq, transport.number()));
        }
        Statement::Opening => {
            rule.add_expr(&payload(libc::NFT_PAYLOAD_TRANSPORT_HEADER, 13, 1, libc::NFT_REG_1 as u32));
            rule.add_expr(&Bitwise::new(FIN_SYN_RST_ACK, 0_u8));
            rule.add_expr(&Cmp::new(CmpOp::Eq, SYN));
        }
        Statement::Port(transport, port) => {
            add(rule, &Statement::Of(*transport));
            rule.add_expr(&payload(libc::NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2, libc::NFT_REG_1 as u32));
            rule.add_expr(&Cmp::new(CmpOp::Eq, port.to_be()));
        }
        Statement::Translate(family, map) => {
            of_family(rule, *family);
            let (offset, len, port_register) = family.destination();
            rule.add_expr(&payload(libc::NFT_PAYLOAD_NETWORK_HEADER, offset, len, libc::NFT_REG_1 as u32));
            rule.add_expr(&lookup_value(map));
            rule.add_expr(&translate(*family, port_register));
        }
        Statement::To(transport, family, set) => {
            of_family(rule, *family);
            add(rule, &Statement::Of(*transport));
            let (offset, len, port_register) = family.destination();
            rule.add_expr(&payload(libc::NFT_PAYLOAD_NETWORK_HEADER, offset, len, libc::NFT_REG_1 as u32));
            rule.add_expr(&payload(libc::NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2, port_register));
            rule.add_expr(&lookup(set, false));
        }
        Statement::ByCgroup(level, map) => {
            rule.add_expr(&Socket::new(SocketKey::CgroupV2, *level));
            rule.add_expr(&lookup(map, true));
        }
        Statement::ByUser(map) => {
            rule.add_expr(&Meta::SkUid);
            rule.add_expr(&lookup(map, true));
        }
        Statement::Alive(set) => {
            rule.add_expr(&Meta::NfProto);
            rule.add_expr(&lookup(set, false));
        }
        Statement::Count(name) => rule.add_expr(&count(name)),
        Statement::Redirect(port) => {
            rule.add_expr(&nftnl::expr::Immediate::new(port.to_be(), nftnl::expr::Register::Reg1));
            rule.add_expr(&redirect());
        }
        Statement::Reject => rule.add_expr(&Verdict::Reject(RejectionType::TcpRst)),
        Statement::Goto(chain) => rule.add_expr(&Verdict::Goto { chain: text(chain) }),
        Statement::Return => rule.add_expr(&Verdict::Return),
        Statement::Accept => rule.add_expr(&Verdict::Accept),
    }
}

/// Flags of a TCP header (RFC 9293 §3.1); others may be set too, such as those of ECN.
const FIN_SYN_RST_ACK: u8 = 0x17;
const SYN: u8 = 0x02;

fn of_family(rule: &mut nftnl::Rule<'_>, family: Family) {
    rule.add_expr(&Meta::NfProto);
    rule.add_expr(&Cmp::new(CmpOp::Eq, family.number()));
}

impl Transport {
    /// `IPPROTO_…`
    fn number(self) -> u8 {
        match self {
            Self::Tcp => libc::IPPROTO_TCP as u8,
            Self::Udp => libc::IPPROTO_UDP as u8,
        }
    }
}

impl Family {
    /// `NFPROTO_…`
    fn number(self) -> u8 {
        match self {
            Self::V4 => libc::NFPROTO_IPV4 as u8,
            Self::V6 => libc::NFPROTO_IPV6 as u8,
        }
    }

    /// Where the destination stands in the network header, how many bytes it has, and the register after it.
    fn destination(self) -> (u32, u32, u32) {
        match self {
            Self::V4 => (16, 4, libc::NFT_REG32_01 as u32),
            Self::V6 => (24, 16, libc::NFT_REG_2 as u32),
        }
    }
}

fn payload(base: libc::c_int, offset: u32, len: u32, register: u32) -> Expression {
    let attributes = vec![
        (constants::NFTNL_EXPR_PAYLOAD_DREG, Value::U32(register)),
        (constants::NFTNL_EXPR_PAYLOAD_BASE, Value::U32(base as u32)),
        (constants::NFTNL_EXPR_PAYLOAD_OFFSET, Value::U32(offset)),
        (constants::NFTNL_EXPR_PAYLOAD_LEN, Value::U32(len)),
    ];
    Expression { name: c"payload", attributes }
}

/// Of the first register, in which the value is then.
fn lookup_value(map: &str) -> Expression {
    let register = Value::U32(libc::NFT_REG_1 as u32);
    let mut expression = lookup(map, false);
    expression.attributes.push((constants::NFTNL_EXPR_LOOKUP_DREG, register));
    expression
}

/// To the address in the first register and the port in the one after it.
fn translate(family: Family, port_register: u32) -> Expression {
    const NF_NAT_RANGE_MAP_IPS: u32 = 1;
    const NF_NAT_RANGE_PROTO_SPECIFIED: u32 = 2;
    let attributes = vec![
        (constants::NFTNL_EXPR_NAT_TYPE, Value::U32(libc::NFT_NAT_DNAT as u32)),
        (constants::NFTNL_EXPR_NAT_FAMILY, Value::U32(family.number().into())),
        (constants::NFTNL_EXPR_NAT_REG_ADDR_MIN, Value::U32(libc::NFT_REG_1 as u32)),
        (constants::NFTNL_EXPR_NAT_REG_PROTO_MIN, Value::U32(port_register)),
        (constants::NFTNL_EXPR_NAT_FLAGS, Value::U32(NF_NAT_RANGE_MAP_IPS | NF_NAT_RANGE_PROTO_SPECIFIED)),
    ];
    Expression { name: c"nat", attributes }
}

/// Of the first register; in a map, the element's verdict is carried out.
fn lookup(set: &str, map: bool) -> Expression {
    let mut attributes = vec![
        (constants::NFTNL_EXPR_LOOKUP_SREG, Value::U32(libc::NFT_REG_1 as u32)),
        (constants::NFTNL_EXPR_LOOKUP_SET, Value::Text(text(set))),
    ];
    if map {
        attributes.push((constants::NFTNL_EXPR_LOOKUP_DREG, Value::U32(libc::NFT_REG_VERDICT as u32)));
    }
    Expression { name: c"lookup", attributes }
}

fn count(name: &str) -> Expression {
    const NFT_OBJECT_COUNTER: u32 = 1;
    let attributes = vec![
        (constants::NFTNL_EXPR_OBJREF_IMM_TYPE, Value::U32(NFT_OBJECT_COUNTER)),
        (constants::NFTNL_EXPR_OBJREF_IMM_NAME, Value::Text(text(name))),
    ];
    Expression { name: c"objref", attributes }
}

/// To the port in the first register, of the loopback address.
fn redirect() -> Expression {
    const NF_NAT_RANGE_PROTO_SPECIFIED: u32 = 2;
    let attributes = vec![
        (constants::NFTNL_EXPR_REDIR_REG_PROTO_MIN, Value::U32(libc::NFT_REG_1 as u32)),
        (constants::NFTNL_EXPR_REDIR_FLAGS, Value::U32(NF_NAT_RANGE_PROTO_SPECIFIED)),
    ];
    Expression { name: c"redir", attributes }
}
