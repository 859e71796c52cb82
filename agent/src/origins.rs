//! Where connections come from, where the kernel does not tell the proxy itself: which service made them, and where they
//! were going before their addresses were translated.
//!
//! Data flows one way. The daemon's mind publishes a [`Snapshot`] whenever it applies something; [`Finder`] answers from
//! the last one and from the kernel, and never waits for the mind.

pub(crate) mod server;

use crate::{
    conntrack::{self, Tuple},
    netlink::Netlink,
    redirect::{Cgroup, Desired},
    sockets::{self, Owner},
};
use nix::sys::socket::SockProtocol;
use serde::Serialize;
use std::{
    collections::{BTreeSet, HashMap},
    io,
    net::SocketAddr,
    path::Path,
    time::Instant,
};
use tokio::sync::watch;

/// Cgroups that are remembered.
const MAX_KNOWN: usize = 1 << 16;
/// Looking through cgroups takes one part in so many of the time, however many new ones appear.
const WALKS: u32 = 10;

/// What is enabled, and where: as the daemon applied it last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Snapshot {
    proxy: Option<Cgroup>,
    services: Vec<Service>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Service {
    name: String,
    cgroups: Vec<Cgroup>,
    users: Vec<u32>,
}

impl From<&Desired> for Snapshot {
    fn from(desired: &Desired) -> Self {
        let services = desired.services.iter().map(|service| Service {
            name: service.name.clone(),
            // As in the table: one who is known by the user is not known by the user's slice.
            cgroups: if service.users.is_empty() { service.scopes.clone() } else { vec![] },
            users: service.users.clone(),
        });
        Self { proxy: desired.proxy.clone(), services: services.collect() }
    }
}

impl Snapshot {
    /// Whether a cgroup is the proxy's, or below it.
    fn is_proxy(&self, dir: &Path) -> bool {
        self.proxy.as_ref().is_some_and(|proxy| dir.starts_with(&proxy.dir))
    }

    fn of_user(&self, uid: u32) -> Option<&str> {
        let service = self.services.iter().rfind(|service| service.users.contains(&uid))?;
        Some(&service.name)
    }

    /// The services of all cgroups that there are.
    fn walk(&self) -> HashMap<u64, String> {
        innermost(self.services.iter().flat_map(Service::trees).collect())
    }
}

impl Service {
    fn trees(&self) -> impl Iterator<Item = Tree> {
        let depth = |cgroup: &Cgroup| cgroup.dir.components().count();
        self.cgroups.iter().map(move |cgroup| Tree {
            depth: depth(cgroup),
            service: self.name.clone(),
            ids: cgroup.ids(),
        })
    }
}

/// A service's cgroup, with all that is below it.
#[derive(Clone, Debug)]
struct Tree {
    depth: usize,
    service: String,
    ids: BTreeSet<u64>,
}

/// Each cgroup's innermost service.
fn innermost(mut trees: Vec<Tree>) -> HashMap<u64, String> {
    trees.sort_by_key(|tree| tree.depth);
    let mut services = HashMap::new();
    for Tree { service, ids, .. } in trees {
        services.extend(ids.into_iter().map(|id| (id, service.clone())));
    }
    services
}

/// A connection, as it is seen from the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Question {
    pub(crate) protocol: Protocol,
    /// Where it comes from.
    pub(crate) client: SocketAddr,
    pub(crate) to: To,
}

/// A protocol above IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Tcp,
    Udp,
}

/// The other end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum To {
    /// Where it was going, which is what its socket knows.
    Destination(SocketAddr),
    /// Where it arrived, which is what connection tracking knows.
    Proxy(SocketAddr),
}

/// Where a connection comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Origin {
    pub(crate) destination: SocketAddr,
    /// None where the socket is in no enabled service, or gone.
    pub(crate) service: Option<String>,
    pub(crate) uid: Option<u32>,
    pub(crate) cgroup: Option<u64>,
}

/// Finds origins. One socket to ask for sockets, and one for connection tracking.
#[derive(Debug)]
pub(crate) struct Finder {
    sockets: Netlink,
    conntrack: Netlink,
    snapshots: watch::Receiver<Snapshot>,
    directory: Directory,
}

impl Finder {
    /// For what the daemon publishes.
    pub(crate) fn open(snapshots: watch::Receiver<Snapshot>) -> io::Result<Self> {
        Ok(Self {
            sockets: Netlink::open(SockProtocol::NetlinkSockDiag)?,
            conntrack: Netlink::open(SockProtocol::NetlinkNetFilter)?,
            snapshots,
            directory: Directory::default(),
        })
    }

    /// Whether a process in this cgroup may ask.
    pub(crate) fn is_proxy(&self, dir: &Path) -> bool {
        self.snapshots.borrow().is_proxy(dir)
    }

    /// The origin of a connection; none where there is no such connection.
    pub(crate) fn find(&mut self, question: &Question) -> io::Result<Option<Origin>> {
        let Some(Tuple { source, destination }) = self.sent(question)? else { return Ok(None) };
        let owner = sockets::owner(&self.sockets, question.protocol.number(), source, destination)?;
        if let (None, To::Destination(_)) = (owner, question.to) {
            return Ok(None);
        }
        let uid = owner.and_then(|Owner { uid, .. }| uid);
        let cgroup = owner.map(|Owner { cgroup, .. }| cgroup).filter(|&id| id != 0);
        Ok(Some(Origin { destination, service: self.service(uid, cgroup), uid, cgroup }))
    }

    /// Its two ends, as its socket sees them. Translation may have changed the client's port too.
    fn sent(&self, Question { protocol, client, to }: &Question) -> io::Result<Option<Tuple>> {
        match *to {
            To::Destination(destination) => Ok(Some(Tuple { source: *client, destination })),
            To::Proxy(proxy) => {
                let reply = Tuple { source: proxy, destination: *client };
                conntrack::original(&self.conntrack, protocol.number(), &reply)
            }
        }
    }

    fn service(&mut self, uid: Option<u32>, cgroup: Option<u64>) -> Option<String> {
        if self.snapshots.has_changed().unwrap_or(false) {
            self.snapshots.mark_unchanged();
            self.directory = Directory::default();
        }
        let snapshot = self.snapshots.borrow();
        let by_cgroup = cgroup.and_then(|id| self.directory.service(id, Instant::now(), || snapshot.walk()));
        by_cgroup.or_else(|| snapshot.of_user(uid?).map(str::to_owned))
    }
}

impl Protocol {
    /// As in a packet's head.
    fn number(self) -> u8 {
        match self {
            Self::Tcp => libc::IPPROTO_TCP as u8,
            Self::Udp => libc::IPPROTO_UDP as u8,
        }
    }
}

/// The services of cgroups that were asked for, or were there when a new one was. The kernel gives an id once only, so what
/// was found of one stays true, also that it is no service's.
#[derive(Debug, Default)]
struct Directory {
    known: HashMap<u64, Option<String>>,
    /// No earlier look through the cgroups.
    next_walk: Option<Instant>,
}

impl Directory {
    /// The service of a cgroup, which is looked for by `walk` if it is new.
    fn service(
        &mut self,
        id: u64,
        now: Instant,
        walk: impl FnOnce() -> HashMap<u64, String>,
    ) -> Option<String> {
        if let Some(known) = self.known.get(&id) {
            return known.clone();
        }
        if self.next_walk.is_some_and(|next| now < next) {
            return None;
        }
        let began = Instant::now();
        let found = walk();
        self.next_walk = Some(now + began.elapsed() * WALKS);
        self.learn(id, found);
        self.known.get(&id).cloned().flatten()
    }

    fn learn(&mut self, asked: u64, found: HashMap<u64, String>) {
        if self.known.len() >= MAX_KNOWN {
            self.known.clear();
        }
        self.known.insert(asked, None);
        self.known.extend(found.into_iter().map(|(id, name)| (id, Some(name))));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, path::PathBuf, time::Duration};

    #[test]
    fn a_cgroup_is_its_innermost_services() {
        let tree = |depth, service: &str, ids: &[u64]| Tree {
            depth,
            service: service.to_owned(),
            ids: ids.iter().copied().collect(),
        };
        let cases = [
            ("nothing is enabled", vec![], vec![]),
            ("one and what is below it", vec![tree(2, "shop", &[10, 11])], vec![(10, "shop"), (11, "shop")]),
            (
                "one in another, whichever comes first",
                vec![tree(3, "cart", &[11, 12]), tree(2, "shop", &[10, 11, 12, 13])],
                vec![(10, "shop"), (11, "cart"), (12, "cart"), (13, "shop")],
            ),
            (
                "three deep",
                vec![tree(1, "all", &[1, 10, 11]), tree(3, "cart", &[11]), tree(2, "shop", &[10, 11])],
                vec![(1, "all"), (10, "shop"), (11, "cart")],
            ),
        ];
        for (what, trees, expected) in cases {
            let expected: HashMap<u64, String> =
                expected.iter().map(|(id, name)| (*id, (*name).to_owned())).collect();
            assert_eq!(innermost(trees), expected, "{what}");
        }
    }

    fn snapshot(services: &[(&str, &[PathBuf], &[u32])]) -> Snapshot {
        let services = services.iter().map(|(name, dirs, users)| Service {
            name: (*name).to_owned(),
            cgroups: dirs.iter().map(|dir| Cgroup::open(dir).unwrap()).collect(),
            users: users.to_vec(),
        });
        Snapshot { proxy: None, services: services.collect() }
    }

    #[test]
    fn ids_are_those_of_the_directories_that_are_there() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        fs::create_dir_all(at("shop/cart/worker")).unwrap();
        fs::create_dir_all(at("stock")).unwrap();
        let services: [(&str, &[PathBuf], &[u32]); 3] =
            [("cart", &[at("shop/cart")], &[]), ("shop", &[at("shop")], &[]), ("other", &[], &[1000])];
        let snapshot = snapshot(&services);
        let found = snapshot.walk();
        let service = |path: &str| found.get(&Cgroup::open(&at(path)).unwrap().id).map(String::as_str);
        let expected = [
            ("shop", Some("shop")),
            ("shop/cart", Some("cart")),
            ("shop/cart/worker", Some("cart")),
            ("stock", None),
        ];
        for (path, expected) in expected {
            assert_eq!(service(path), expected, "{path}");
        }
        assert_eq!((snapshot.of_user(1000), snapshot.of_user(1001)), (Some("other"), None));
    }

    #[test]
    fn the_proxy_is_its_cgroup_and_what_is_below_but_no_neighbour() {
        let proxy = Some(Cgroup { dir: PathBuf::from("/cgroup/proxy"), id: 1 });
        let snapshot = Snapshot { proxy, services: vec![] };
        for (dir, expected) in [
            ("/cgroup/proxy", true),
            ("/cgroup/proxy/a", true),
            ("/cgroup/proxy2", false),
            ("/cgroup", false),
        ] {
            assert_eq!(snapshot.is_proxy(Path::new(dir)), expected, "{dir}");
        }
        assert!(!Snapshot::default().is_proxy(Path::new("/")));
    }

    #[test]
    fn a_new_cgroup_is_looked_for_once_and_not_all_the_time() {
        let mut directory = Directory::default();
        let walk = |ids: &[u64]| ids.iter().map(|id| (*id, "shop".to_owned())).collect::<HashMap<_, _>>();
        let never = || unreachable!("nothing is new");
        let now = Instant::now();
        assert_eq!(directory.service(1, now, || walk(&[1, 2])).as_deref(), Some("shop"));
        assert_eq!(directory.service(2, now, never).as_deref(), Some("shop"));
        directory.next_walk = Some(now + Duration::from_millis(50));
        assert_eq!(directory.service(3, now, never), None);
        let later = now + Duration::from_millis(50);
        assert_eq!(directory.service(3, later, || walk(&[1, 3])).as_deref(), Some("shop"));
        // What was there before is remembered, and what is no service's too.
        assert_eq!(directory.service(2, later, never).as_deref(), Some("shop"));
        directory.next_walk = None;
        assert_eq!(directory.service(4, later, || walk(&[1])), None);
        directory.next_walk = None;
        assert_eq!(directory.service(4, later, never), None);
    }
}
