//! Netlink with nf_tables: transactions, and what is there (linux/netfilter/nfnetlink.h, nf_tables.h).

use super::{
    Error,
    message::Present,
    ruleset::{OUTPUT, TABLE},
};
use crate::netlink::{self, Attributes, HEADER, Messages, Netlink, attribute, attributes};
use nftnl::Batch;
use nix::sys::socket::SockProtocol;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

/// Bytes that a transaction and its acknowledgements may take: some ten thousand services.
const BUFFER: usize = 256 << 20;
/// Length of `struct nfgenmsg`, after a message's header.
const GENERIC: usize = 4;

const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFNL_MSG_BATCH_BEGIN: u16 = 16;
/// The first attribute of chains, rules, sets and objects is their table's name.
const NFTA_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_TYPE: u16 = 7;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_HOOK_PRIORITY: u16 = 2;
const NFTA_SET_NAME: u16 = 2;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_USERDATA: u16 = 7;
const NFTA_OBJ_NAME: u16 = 2;
const NFTA_OBJ_DATA: u16 = 4;
const NFTA_COUNTER_PACKETS: u16 = 2;
const NFPROTO_INET: u8 = 1;
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
const NF_INET_LOCAL_OUT: i32 = 3;

/// Families with their names in nft's words, and where the names of tables of iptables' older kind are.
const FAMILIES: [(u8, &str, Option<&str>); 3] = [
    (NFPROTO_IPV4, "ip", Some("/proc/thread-self/net/ip_tables_names")),
    (NFPROTO_IPV6, "ip6", Some("/proc/thread-self/net/ip6_tables_names")),
    (NFPROTO_INET, "inet", None),
];
/// Of every table `nat` of iptables (NF_IP_PRI_NAT_DST).
const LEGACY_PRIORITY: i32 = -100;

/// What there is to talk to.
#[derive(Debug)]
pub(super) struct Kernel {
    netlink: Netlink,
}

impl Kernel {
    pub(super) fn open() -> Result<Self, Error> {
        let netlink = Netlink::open(SockProtocol::NetlinkNetFilter);
        let netlink = netlink.and_then(|netlink| netlink.with_buffers(BUFFER)).map_err(Error::Socket)?;
        Ok(Self { netlink })
    }

    /// Carries out a transaction, whole or not at all.
    pub(super) fn commit(&self, batch: Batch) -> Result<(), Error> {
        self.transact(&batch.finalize().iter().collect::<Vec<_>>().concat())
    }

    /// Whether the kernel would take a transaction; nothing is changed.
    pub(super) fn check(&self, batch: Batch) -> Result<(), Error> {
        let bytes = batch.finalize().iter().collect::<Vec<_>>().concat();
        // The kernel goes back where the end is missing.
        let end = bytes.len().saturating_sub(HEADER + GENERIC);
        self.transact(&bytes[..end])
    }

    fn transact(&self, bytes: &[u8]) -> Result<(), Error> {
        self.netlink.send(bytes).map_err(Error::Socket)?;
        let mut refused = None;
        while let Some(answer) = self.netlink.answer().map_err(Error::Socket)? {
            for message in Messages(&answer) {
                if let Some(cause) = message.error() {
                    let what = about(message.acknowledged().unwrap_or_default());
                    refused.get_or_insert(Error::Refused { what, cause });
                }
            }
        }
        refused.map_or(Ok(()), Err)
    }

    /// The comment of the first rule; none where the table or the rule is not there.
    pub(super) fn fingerprint(&self) -> Result<Option<String>, Error> {
        let rules = self.dump(
            libc::NFT_MSG_GETRULE,
            NFPROTO_INET,
            &[(NFTA_TABLE, TABLE), (NFTA_RULE_CHAIN, OUTPUT)],
        )?;
        let of_ours = |rule: &&Attributes| is_ours(rule) && name(rule, NFTA_RULE_CHAIN) == OUTPUT;
        Ok(rules.iter().find(of_ours).and_then(comment))
    }

    /// What is in the table.
    pub(super) fn present(&self) -> Result<Present, Error> {
        let chains = self.dump(libc::NFT_MSG_GETCHAIN, NFPROTO_INET, &[])?;
        let sets = self.dump(libc::NFT_MSG_GETSET, NFPROTO_INET, &[(NFTA_TABLE, TABLE)])?;
        Ok(Present {
            chains: names(&chains, NFTA_CHAIN_NAME),
            sets: names(&sets, NFTA_SET_NAME),
            counters: self.counters()?.into_keys().collect(),
        })
    }

    /// How many rules there are in each chain.
    pub(super) fn rules(&self) -> Result<BTreeMap<String, usize>, Error> {
        let rules = self.dump(libc::NFT_MSG_GETRULE, NFPROTO_INET, &[(NFTA_TABLE, TABLE)])?;
        let mut found = BTreeMap::new();
        for rule in rules.iter().filter(|rule| is_ours(rule)) {
            *found.entry(name(rule, NFTA_RULE_CHAIN)).or_default() += 1;
        }
        Ok(found)
    }

    /// How many elements there are in a set.
    pub(super) fn elements(&self, set: &str) -> Result<usize, Error> {
        let filter = [(NFTA_TABLE, TABLE), (NFTA_SET_NAME, set)];
        let lists = self.dump(libc::NFT_MSG_GETSETELEM, NFPROTO_INET, &filter)?;
        let elements = lists.iter().filter_map(|list| list.get(&NFTA_SET_ELEM_LIST_ELEMENTS));
        Ok(elements.map(|elements| netlink::count(elements)).sum())
    }

    /// How many packets each counter has seen.
    pub(super) fn counters(&self) -> Result<BTreeMap<String, u64>, Error> {
        let objects = self.dump(libc::NFT_MSG_GETOBJ, NFPROTO_INET, &[(NFTA_TABLE, TABLE)])?;
        Ok(objects.iter().filter(|object| is_ours(object)).filter_map(counter).collect())
    }

    /// Tables of others' that translate addresses of connections from here, those of iptables' older kind by their files.
    pub(super) fn other_nat_chains(&self) -> Result<Vec<NatChain>, Error> {
        let mut found = Vec::new();
        for (number, family, legacy) in FAMILIES {
            let chains = self.dump(libc::NFT_MSG_GETCHAIN, number, &[])?;
            let chains: Vec<&Attributes> = chains.iter().filter(|chain| !is_ours(chain)).collect();
            found.extend(nat_chains(family, &chains));
            let tables = legacy.and_then(|file| fs::read_to_string(file).ok()).unwrap_or_default();
            let is_nat = tables.lines().any(|table| table == "nat");
            found.extend(is_nat.then(|| NatChain {
                family,
                table: "nat of iptables-legacy".to_owned(),
                chains: BTreeSet::new(),
                priority: LEGACY_PRIORITY,
            }));
        }
        Ok(found)
    }

    fn dump(
        &self,
        message: libc::c_int,
        family: u8,
        filter: &[(u16, &str)],
    ) -> Result<Vec<Attributes>, Error> {
        let kind = NFNL_SUBSYS_NFTABLES << 8 | message as u16;
        let flags = libc::NLM_F_REQUEST | libc::NLM_F_DUMP;
        self.netlink.send(&request(kind, flags, family, filter)).map_err(Error::Socket)?;
        let mut found = Vec::new();
        while let Some(answer) = self.netlink.answer().map_err(Error::Socket)? {
            for message in Messages(&answer) {
                if message.is_done() {
                    return Ok(found);
                }
                match message.error() {
                    // No such table.
                    Some(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(Vec::new()),
                    Some(cause) => return Err(Error::Refused { what: "read the table", cause }),
                    None => found.push(attributes(message.body.get(GENERIC..).unwrap_or_default())),
                }
            }
        }
        Ok(found)
    }
}

/// A table with a chain through which connections go that begin here, to be translated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NatChain {
    pub(crate) family: &'static str,
    pub(crate) table: String,
    /// All that are in the table.
    pub(crate) chains: BTreeSet<String>,
    /// Lower ones are asked first, and the first that translates is the last that is asked.
    pub(crate) priority: i32,
}

/// One for each such chain among those of a family.
fn nat_chains(family: &'static str, chains: &[&Attributes]) -> Vec<NatChain> {
    let base = |chain: &&&Attributes| name(chain, NFTA_CHAIN_TYPE) == "nat";
    let nat = chains.iter().filter(base).filter_map(|chain| {
        let hook = attributes(chain.get(&NFTA_CHAIN_HOOK)?);
        let number = |kind| hook.get(&kind)?.as_slice().try_into().ok().map(i32::from_be_bytes);
        let priority =
            number(NFTA_HOOK_PRIORITY).filter(|_| number(NFTA_HOOK_HOOKNUM) == Some(NF_INET_LOCAL_OUT))?;
        let table = name(chain, NFTA_TABLE);
        let beside = chains.iter().filter(|chain| name(chain, NFTA_TABLE) == table);
        let chains = beside.map(|chain| name(chain, NFTA_CHAIN_NAME)).collect();
        Some(NatChain { family, table, chains, priority })
    });
    nat.collect()
}

fn request(kind: u16, flags: libc::c_int, family: u8, filter: &[(u16, &str)]) -> Vec<u8> {
    let mut body = vec![family, 0, 0, 0];
    for (kind, text) in filter {
        body.extend(attribute(*kind, &[text.as_bytes(), &[0]].concat()));
    }
    netlink::message(kind, flags, &body)
}

/// What the message did that is acknowledged.
fn about(acknowledged: u16) -> &'static str {
    match i32::from(acknowledged & 0xff) {
        _ if acknowledged == NFNL_MSG_BATCH_BEGIN => "begin a transaction",
        libc::NFT_MSG_NEWTABLE => "add the table",
        libc::NFT_MSG_NEWCHAIN => "add a chain",
        libc::NFT_MSG_NEWRULE => "add a rule",
        libc::NFT_MSG_NEWSET => "add a set",
        libc::NFT_MSG_NEWSETELEM => "add elements to a set",
        libc::NFT_MSG_NEWOBJ => "add a counter",
        libc::NFT_MSG_GETRULE
        | libc::NFT_MSG_GETCHAIN
        | libc::NFT_MSG_GETSET
        | libc::NFT_MSG_GETSETELEM
        | libc::NFT_MSG_GETOBJ => "read the table",
        _ => "delete what is replaced",
    }
}

fn is_ours(attributes: &Attributes) -> bool {
    name(attributes, NFTA_TABLE) == TABLE
}

/// A counter's name, and how many packets it has seen.
fn counter(object: &Attributes) -> Option<(String, u64)> {
    let data = attributes(object.get(&NFTA_OBJ_DATA)?);
    let packets = data.get(&NFTA_COUNTER_PACKETS)?.as_slice().try_into().ok()?;
    Some((name(object, NFTA_OBJ_NAME), u64::from_be_bytes(packets)))
}

/// A rule's comment: its kind, its length, its text with a NUL.
fn comment(rule: &Attributes) -> Option<String> {
    rule.get(&NFTA_RULE_USERDATA)?.get(2..).map(until_nul)
}

fn names(found: &[Attributes], attribute: u16) -> BTreeSet<String> {
    found.iter().filter(|found| is_ours(found)).map(|found| name(found, attribute)).collect()
}

fn name(attributes: &Attributes, attribute: u16) -> String {
    attributes.get(&attribute).map(|bytes| until_nul(bytes)).unwrap_or_default()
}

fn until_nul(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.split(|&byte| byte == 0).next().unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::nested;

    #[test]
    fn whatever_is_in_the_table_only_what_is_ours_is_read_of_it() {
        let table = attribute(NFTA_TABLE, b"mesh_redirect\0");
        let packets = nested(NFTA_OBJ_DATA, &[attribute(NFTA_COUNTER_PACKETS, &7_u64.to_be_bytes())]);
        let object = [table.clone(), attribute(NFTA_OBJ_NAME, b"shop_steered\0"), packets].concat();
        let rule = [table, attribute(NFTA_RULE_USERDATA, b"\0\x05abcd\0")].concat();
        assert_eq!(counter(&attributes(&object)), Some(("shop_steered".to_owned(), 7)));
        assert_eq!(comment(&attributes(&rule)).as_deref(), Some("abcd"));
        fuzz::damaged!([&object[..], &rule], ["\x0c\0\x02\0", "\0", "mesh_redirect"], |input: &[u8]| {
            let found = attributes(input);
            let said = [counter(&found).map(|(name, _)| name), comment(&found)];
            assert!(said.into_iter().flatten().all(|text| !text.contains('\0')));
            assert!(names(&[found], NFTA_OBJ_NAME).len() <= 1);
        });
    }
}
