//! Who else changes where this host's connections go, by the names that they give to their programs, tables and chains, and
//! how they go with ours.

use crate::redirect::{
    ebpf::{Order, Other},
    nftables::{NatChain, PRIORITY},
};
use std::{collections::BTreeSet, fmt};

/// Somebody who does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Owner {
    name: &'static str,
    does: Does,
}

/// What for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Does {
    /// Takes addresses of services for those of their instances, and of published ports for those of containers. It leaves
    /// loopback addresses alone, and what a proxy asks for it translates as it would for the application.
    Translate,
    /// Sends connections to a proxy, as we do.
    Steer,
    /// Neither.
    Neither,
}

const fn translator(name: &'static str) -> Owner {
    Owner { name, does: Does::Translate }
}

const fn mesh(name: &'static str) -> Owner {
    Owner { name, does: Does::Steer }
}

const CALICO: Owner = translator("Calico");
const CILIUM: Owner = translator("Cilium");
const CNI: Owner = translator("a CNI plugin");
const DOCKER: Owner = translator("Docker");
const FIREWALLD: Owner = translator("firewalld");
const KUBE_PROXY: Owner = translator("kube-proxy");
const PODMAN: Owner = translator("podman");
const CONSUL: Owner = mesh("Consul");
const ISTIO: Owner = mesh("Istio");
const KMESH: Owner = mesh("Kmesh");
const KUMA: Owner = mesh("Kuma");
const LINKERD: Owner = mesh("Linkerd");
/// Kuma loads its programs too.
const MERBRIDGE: Owner = mesh("Merbridge");
const SYSTEMD: Owner = Owner { name: "systemd", does: Does::Neither };

/// How names of programs begin, of which the kernel keeps fifteen bytes.
const PROGRAMS: [(&str, Owner); 9] = [
    ("cil_sock", CILIUM),
    // Before 1.12.
    ("sock4_", CILIUM),
    ("sock6_", CILIUM),
    ("calico_", CALICO),
    ("cali_", CALICO),
    ("mb_", MERBRIDGE),
    ("cgroup_connect4", KMESH),
    ("cgroup_connect6", KMESH),
    ("sd_", SYSTEMD),
];

const TABLES: [(&str, Owner); 7] = [
    ("docker-bridges", DOCKER),
    ("firewalld", FIREWALLD),
    ("kube-proxy", KUBE_PROXY),
    ("netavark", PODMAN),
    ("cni_hostport", CNI),
    ("istio-proxy-nat", ISTIO),
    ("istio-ambient-nat", ISTIO),
];

/// In the tables that iptables makes, which many share.
const CHAINS: [(&str, Owner); 10] = [
    ("CILIUM_OUTPUT_nat", CILIUM),
    ("CNI-HOSTPORT-DNAT", CNI),
    ("CONSUL_PROXY_OUTPUT", CONSUL),
    ("DOCKER", DOCKER),
    ("ISTIO_OUTPUT", ISTIO),
    ("KUBE-SERVICES", KUBE_PROXY),
    ("KUMA_MESH_OUTBOUND", KUMA),
    ("NETAVARK-HOSTPORT-DNAT", PODMAN),
    ("PROXY_INIT_OUTPUT", LINKERD),
    ("cali-OUTPUT", CALICO),
];

/// Whose a program of this name is.
fn program_owner(name: &str) -> Option<Owner> {
    PROGRAMS.iter().find(|(start, _)| name.starts_with(start)).map(|(_, owner)| *owner)
}

/// Whose a table is that translates, as far as they can be told.
fn table_owners(table: &NatChain) -> BTreeSet<Owner> {
    let by_table = TABLES.iter().filter(|(name, _)| table.table == *name);
    let by_chain = CHAINS.iter().filter(|(name, _)| table.chains.contains(*name));
    by_table.chain(by_chain).map(|(_, owner)| *owner).collect()
}

/// What there is to say of one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Finding {
    pub(crate) who: String,
    /// How it goes with ours.
    pub(crate) how: &'static str,
    /// Whether all is well so.
    pub(crate) ok: bool,
    /// What can be done where it is not.
    pub(crate) remedy: &'static str,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { who, how, remedy, .. } = self;
        if remedy.is_empty() { write!(f, "{who} {how}") } else { write!(f, "{who} {how}; {remedy}") }
    }
}

/// What a program is, in words.
pub(crate) fn called(id: u32, name: &str) -> String {
    let whose = program_owner(name).map_or_else(String::new, |owner| format!(", of {}", owner.name));
    format!("program {id} is {name}{whose}")
}

/// Whether whoever made a table sends connections to a proxy, as we do.
pub(crate) fn steers(chain: &NatChain) -> bool {
    table_owners(chain).iter().any(|owner| owner.does == Does::Steer)
}

/// Of a program at one of our hooks of a cgroup, with its name where that is known; none of those that change nothing.
pub(crate) fn program(other: &Other, cgroup: &str, name: Option<&str>) -> Option<Finding> {
    let owner = name.and_then(program_owner);
    let (how, ok, remedy) = match (other.order, owner.map(|owner| owner.does)) {
        (_, Some(Does::Neither)) => return None,
        (Order::Alone, _) => (
            "lets no other program beside it: ours are refused below there",
            false,
            "have it attached so that others may be there too (BPF_F_ALLOW_MULTI, `multi` of bpftool), or set `mode: nftables`",
        ),
        (Order::Displaced, _) => (
            "would not run any more where ours are attached, which are refused therefore",
            false,
            "have it attached so that others may be there too (BPF_F_ALLOW_MULTI, `multi` of bpftool), or set `mode: nftables`",
        ),
        (_, Some(Does::Steer)) => (TWICE, false, ONCE),
        (Order::First, _) => (
            "runs before ours, which decide by the address that it leaves",
            false,
            "where it takes a service's address for an instance's, capture the instances",
        ),
        (Order::After, _) => (
            "runs after ours: sees the proxy's address where we steer, and changes the rest as before",
            true,
            "",
        ),
    };
    let id = other.id;
    let program = name.map_or_else(|| format!("program {id}"), |name| format!("program {name} (id {id})"));
    let whose = owner.map_or_else(String::new, |owner| format!("{}: ", owner.name));
    Some(Finding { who: format!("{whose}{program} at {} of {cgroup}", other.hook), how, ok, remedy })
}

/// Of a chain through which this network namespace's connections go.
pub(crate) fn chain(chain: &NatChain) -> Finding {
    let owners = table_owners(chain);
    let (how, ok, remedy) = if steers(chain) {
        (TWICE, false, ONCE)
    } else if chain.priority < PRIORITY {
        (
            "is asked before ours with nftables, and what it translates is not steered",
            false,
            "give it a priority above -110",
        )
    } else {
        ("is asked after ours with nftables, and not of what is steered", true, "")
    };
    let owners: Vec<&str> = owners.into_iter().map(|owner| owner.name).collect();
    let whose = if owners.is_empty() { String::new() } else { format!("{}: ", owners.join(", ")) };
    let NatChain { family, table, priority, .. } = chain;
    Finding { who: format!("{whose}table {family} {table}, priority {priority}"), how, ok, remedy }
}

/// It works, at the price of two proxies; and which connections it means only its rules say, which may be for others than
/// ours: so it is said, and not refused.
const TWICE: &str = "steers too: a connection may go through both proxies, first ours";
const ONCE: &str = "leave ours, or the service, out of the other mesh";

#[cfg(test)]
mod tests {
    use super::*;

    fn other(order: Order) -> Other {
        Other { id: 7, hook: "connect4".to_owned(), dir: "/sys/fs/cgroup".into(), order }
    }

    #[test]
    fn programs_are_known_by_what_the_kernel_keeps_of_their_names() {
        let owners = [
            ("cil_sock4_conne", Some("Cilium")),
            ("sock6_connect", Some("Cilium")),
            ("calico_connect_", Some("Calico")),
            ("cali_ctlb_v4", Some("Calico")),
            ("mb_sock4_connec", Some("Merbridge")),
            ("cgroup_connect4", Some("Kmesh")),
            ("sd_fw_egress", Some("systemd")),
            ("somebody_else", None),
            ("", None),
        ];
        for (name, owner) in owners {
            assert_eq!(program_owner(name).map(|owner| owner.name), owner, "{name}");
        }
    }

    #[test]
    fn a_program_is_fine_after_ours_and_worth_a_word_before_them_or_where_it_steers() {
        let cases = [
            (Order::After, Some("cil_sock4_conne"), Some((true, "after ours"))),
            (Order::After, None, Some((true, "after ours"))),
            (Order::First, Some("calico_connect_"), Some((false, "before ours"))),
            (Order::After, Some("mb_sock4_connec"), Some((false, "both proxies"))),
            (Order::Alone, Some("mb_sock4_connec"), Some((false, "no other program"))),
            (Order::Displaced, None, Some((false, "would not run"))),
            (Order::First, Some("sd_fw_egress"), None),
        ];
        for (order, name, expected) in cases {
            let found = program(&other(order), "/", name);
            let found = found.as_ref().map(|found| (found.ok, found.how));
            match (found, expected) {
                (None, None) => {}
                (Some((ok, how)), Some((expected, words))) => {
                    assert!(ok == expected && how.contains(words), "{order:?} {name:?}: {how}");
                }
                other => panic!("{order:?} {name:?}: {other:?}"),
            }
        }
        let named = program(&other(Order::After), "/", Some("cil_sock4_conne")).unwrap();
        assert_eq!(named.who, "Cilium: program cil_sock4_conne (id 7) at connect4 of /");
    }

    #[test]
    fn tables_are_known_by_their_names_or_by_their_chains() {
        let table = |table: &str, chains: &[&str], priority| NatChain {
            family: "ip",
            table: table.to_owned(),
            chains: chains.iter().map(|&chain| chain.to_owned()).collect(),
            priority,
        };
        let cases = [
            (table("nat", &["OUTPUT", "DOCKER", "KUBE-SERVICES"], -100), "Docker, kube-proxy: ", true),
            (table("docker-bridges", &["nat-OUTPUT"], -100), "Docker: ", true),
            (table("firewalld", &["nat_OUTPUT"], -90), "firewalld: ", true),
            (table("kube-proxy", &["nat-output"], -100), "kube-proxy: ", true),
            (table("nat", &["OUTPUT", "ISTIO_OUTPUT"], -100), "Istio: ", false),
            (table("nat", &["OUTPUT", "PROXY_INIT_OUTPUT"], -100), "Linkerd: ", false),
            (table("mine", &["out"], -100), "table ip mine", true),
            (table("mine", &["out"], -200), "table ip mine", false),
        ];
        for (table, who, ok) in cases {
            let found = chain(&table);
            assert!(found.who.starts_with(who) && found.ok == ok, "{found:?}");
        }
    }
}
