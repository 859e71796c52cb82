//! The ruleset as netlink messages (linux/netfilter/nf_tables.h), all of them one transaction.

use super::ruleset::{
    ALIVE, Chain, Content, Family, OUTPUT, PRIORITY, Rule, Ruleset, Set, Statement, TABLE, key,
};
use crate::sys::nftables::{self as sys, ELEMENTS_IN_A_MESSAGE, Element, Elements, Expression, Value};
use nftnl::{
    Batch, ChainType, Hook, MsgType, Policy, ProtoFamily, Table,
    expr::{Cmp, CmpOp, Meta, RejectionType, Socket, SocketKey, Verdict},
    nftnl_sys::{self as constants, libc},
};
use std::{ffi::CString, time::Duration};

/// What a transaction replaces: names of what is there.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Present {
    pub(super) chains: Vec<String>,
    pub(super) sets: Vec<String>,
    pub(super) counters: Vec<String>,
}

/// Puts a ruleset in the place of what is there. Counters of services that stay go on, and the proxy stays as alive as
/// it is.
pub(super) fn replace(present: &Present, ruleset: &Ruleset) -> Batch {
    let (mut batch, table) = (Batch::new(), table());
    batch.add(&table, MsgType::Add);
    if !present.chains.is_empty() {
        batch.add(&sys::AllRules(&table), MsgType::Del);
    }
    let gone = present.sets.iter().filter(|name| *name != ALIVE).enumerate();
    for (index, name) in gone {
        let name = text(name);
        batch.add(&named_set(&table, &name, index as u32), MsgType::Del);
    }
    for name in present.chains.iter().filter(|name| *name != OUTPUT) {
        batch.add(&nftnl::Chain::new(text(name), &table), MsgType::Del);
    }
    for name in present.counters.iter().filter(|name| !ruleset.counters.contains(name)) {
        batch.add(&sys::Counter { table: &table, name: &text(name) }, MsgType::Del);
    }
    for name in &ruleset.counters {
        batch.add(&sys::Counter { table: &table, name: &text(name) }, MsgType::Add);
    }
    // Chains first: maps name them. Maps before rules, which name maps.
    let chains: Vec<(nftnl::Chain<'_>, &Chain)> =
        ruleset.chains.iter().map(|chain| (new_chain(&table, &chain.name), chain)).collect();
    chains.iter().for_each(|(chain, _)| batch.add(chain, MsgType::Add));
    let alive = text(ALIVE);
    batch.add(&alive_set(&table, &alive), MsgType::Add);
    for (index, set) in ruleset.sets.iter().enumerate() {
        add_set(&mut batch, &table, set, index as u32 + 1);
    }
    for (chain, rules) in &chains {
        for rule in &rules.rules {
            batch.add(&new_rule(chain, rule), MsgType::Add);
        }
    }
    batch
}

/// Removes the table, whether it is there or not.
pub(super) fn remove() -> Batch {
    let (mut batch, table) = (Batch::new(), table());
    batch.add(&table, MsgType::Add);
    batch.add(&table, MsgType::Del);
    batch
}

/// Says for which families the proxy is alive, for so long from now on.
///
/// Older kernels do not renew the timeout of an element that is there; so each is added, deleted and added again, all
/// at once.
pub(super) fn keep_alive(alive: &[Family], dead: &[Family], timeout: Duration) -> Batch {
    let (mut batch, table, name) = (Batch::new(), table(), text(ALIVE));
    let set = alive_set(&table, &name);
    let element = |family: &Family| Element {
        key: vec![family.number()],
        key_end: None,
        jump: None,
        timeout_ms: Some(timeout.as_millis() as u64),
    };
    let [alive, dead] = [alive, dead].map(|families| families.iter().map(element).collect::<Vec<_>>());
    for elements in [&alive, &dead].into_iter().filter(|elements| !elements.is_empty()) {
        batch.add(&Elements { set: &set, elements }, MsgType::Add);
        batch.add(&Elements { set: &set, elements }, MsgType::Del);
    }
    if !alive.is_empty() {
        batch.add(&Elements { set: &set, elements: &alive }, MsgType::Add);
    }
    batch
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
    sys::Set { table, name, flags: 0, key_type: 0, key_len: 1, key_parts: &[], id }
}

fn alive_set<'a>(table: &'a Table, name: &'a CString) -> sys::Set<'a> {
    let flags = libc::NFT_SET_TIMEOUT as u32;
    sys::Set { flags, key_type: TYPE_NFPROTO, ..named_set(table, name, 0) }
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
    };
    let message = sys::Set { table, name: &name, flags, key_type, key_len, key_parts, id };
    batch.add(&message, MsgType::Add);
    for elements in elements(&set.content).chunks(ELEMENTS_IN_A_MESSAGE) {
        batch.add(&Elements { set: &message, elements }, MsgType::Add);
    }
}

/// `NFT_SET_CONCAT`, which Linux 5.6 added.
const NFT_SET_CONCAT: libc::c_int = 0x80;

fn elements(content: &Content) -> Vec<Element> {
    let jump = |key: Vec<u8>, chain: &String| Element {
        key,
        key_end: None,
        jump: Some(text(chain)),
        timeout_ms: None,
    };
    match content {
        Content::Destinations(_, ranges) => {
            let element = |range: &crate::rules::Range, ports: &crate::config::Ports| Element {
                key: key(range.first, ports.first),
                key_end: Some(key(range.last, ports.last)),
                jump: None,
                timeout_ms: None,
            };
            let of = |range| ports_of(range).map(move |ports| element(range, ports));
            ranges.iter().flat_map(of).collect()
        }
        Content::Cgroups(cgroups) => {
            cgroups.iter().map(|(id, chain)| jump(id.to_ne_bytes().to_vec(), chain)).collect()
        }
        Content::Users(users) => {
            users.iter().map(|(id, chain)| jump(id.to_ne_bytes().to_vec(), chain)).collect()
        }
    }
}

fn ports_of(range: &crate::rules::Range) -> impl Iterator<Item = &crate::config::Ports> {
    range.ports.iter()
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
        Statement::Tcp => {
            rule.add_expr(&Meta::L4Proto);
            rule.add_expr(&Cmp::new(CmpOp::Eq, TCP));
        }
        Statement::NotTcp => {
            rule.add_expr(&Meta::L4Proto);
            rule.add_expr(&Cmp::new(CmpOp::Neq, TCP));
        }
        Statement::To(family, set) => {
            rule.add_expr(&Meta::NfProto);
            rule.add_expr(&Cmp::new(CmpOp::Eq, family.number()));
            add(rule, &Statement::Tcp);
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
        Statement::Alive => {
            rule.add_expr(&Meta::NfProto);
            rule.add_expr(&lookup(ALIVE, false));
        }
        Statement::Count(name) => rule.add_expr(&count(name)),
        Statement::Redirect(port) => {
            rule.add_expr(&nftnl::expr::Immediate::new(port.to_be(), nftnl::expr::Register::Reg1));
            rule.add_expr(&redirect());
        }
        Statement::Reject => rule.add_expr(&Verdict::Reject(RejectionType::TcpRst)),
        Statement::Goto(chain) => rule.add_expr(&Verdict::Goto { chain: text(chain) }),
        Statement::Return => rule.add_expr(&Verdict::Return),
    }
}

const TCP: u8 = libc::IPPROTO_TCP as u8;

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
