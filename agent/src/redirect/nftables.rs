//! Steering with nf_tables, where eBPF cannot be had. Linux 5.10; by cgroup, 5.13.
//!
//! One table of our own, replaced whole in one transaction. The proxy counts as alive while the daemon says so every
//! second: without either of them the kernel forgets it after three, and the rules let connections pass or refuse them.

mod drift;
mod kernel;
mod message;
mod ruleset;

use super::{Cgroup, Desired, Drift, Ready, Service, ServiceStatus, Status};
use crate::{config::Failure, fault, rules, sockets};
use agent_ebpf::Counters;
use kernel::Kernel;
pub(crate) use kernel::NatChain;
pub(crate) use ruleset::PRIORITY;
use ruleset::{COUNTERS, Ruleset, counter};
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
    time::Duration,
};

/// How long the proxy counts as alive after it was last said to be.
const ALIVE: Duration = Duration::from_secs(3);

/// What can go wrong between the agent and the kernel.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// There is no socket to talk over.
    #[error("talk to nf_tables: {0}{hint}", hint = hint(.0))]
    Socket(io::Error),
    /// The kernel refuses a transaction; nothing was changed.
    #[error("nf_tables: {what}: {cause}{hint}", hint = hint(.cause))]
    Refused {
        /// Which part of it.
        what: &'static str,
        /// Why.
        cause: io::Error,
    },
}

fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM) => "; is CAP_NET_ADMIN there?",
        Some(libc::EPROTONOSUPPORT | libc::EAFNOSUPPORT) => "; does this kernel have nf_tables?",
        _ => "",
    }
}

/// The mode, over its table in the network namespace this runs in.
#[derive(Debug)]
pub(crate) struct Nftables {
    cgroup_root: PathBuf,
    /// Where the proxy listens, and where it did while this process lived.
    proxy_ports: BTreeSet<u16>,
    /// Kept open: to close it, the kernel waits until everybody has seen the last transaction.
    kernel: Option<Kernel>,
    /// What was committed last.
    committed: Option<Ruleset>,
    /// Whether somebody else has changed it since.
    is_changed: bool,
}

impl Nftables {
    /// For services below a cgroup2 mount, and a proxy that listens on this port.
    pub(crate) fn new(cgroup_root: PathBuf, proxy_port: u16) -> Self {
        Self {
            cgroup_root,
            proxy_ports: BTreeSet::from([proxy_port]),
            kernel: None,
            committed: None,
            is_changed: false,
        }
    }

    fn kernel(&mut self) -> Result<&Kernel, Error> {
        match self.kernel {
            Some(ref kernel) => Ok(kernel),
            None => Ok(self.kernel.insert(Kernel::open()?)),
        }
    }

    /// Makes the kernel steer what is desired and nothing else: all of it, or nothing is changed. True where something was.
    ///
    /// With nothing desired the table goes, but not before the last connection that was steered: with the last rule that
    /// translates in a network namespace the kernel ends all translation there.
    pub(crate) fn apply(&mut self, desired: &Desired) -> Result<bool, Error> {
        self.proxy_ports.extend(desired.services.iter().map(|service| service.proxy_port));
        let ruleset = Ruleset::new(desired, &self.cgroup_root);
        let committed = self.committed.take();
        let found = self.kernel()?.fingerprint()?;
        let is_needed = !desired.services.is_empty() || found.is_some() && self.are_connected()?;
        if !is_needed {
            return self.remove_table();
        }
        // The fingerprint says nothing of what was changed beside it.
        let found = found.filter(|_| !self.is_changed);
        let kernel = self.kernel()?;
        if found == Some(ruleset.fingerprint()) {
            self.committed = Some(ruleset);
            return Ok(false);
        }
        let known = committed.filter(|known| found == Some(known.fingerprint()));
        let change = known.and_then(|known| message::change(&known, &ruleset));
        match change {
            Some(batch) => kernel.commit(batch)?,
            None => kernel.commit(message::replace(&kernel.present()?, &ruleset))?,
        }
        fault::point("table", "changed");
        self.committed = Some(ruleset);
        self.is_changed = false;
        Ok(true)
    }

    /// Whether a connection is open that may be steered.
    fn are_connected(&self) -> Result<bool, Error> {
        let mut connected = self.proxy_ports.iter().map(|port| sockets::are_connected(*port));
        connected
            .find(|connected| !matches!(connected, Ok(false)))
            .unwrap_or(Ok(false))
            .map_err(Error::Socket)
    }

    /// Whether the table is there, and anything in it.
    pub(crate) fn is_there(&mut self) -> Result<bool, Error> {
        Ok(self.kernel()?.present()? != message::Present::default())
    }

    /// Removes the table. Connections that were steered end, unless something else translates addresses here.
    pub(crate) fn remove(&mut self) -> Result<(), Error> {
        self.remove_table().map(drop)
    }

    /// True where there was one.
    fn remove_table(&mut self) -> Result<bool, Error> {
        let kernel = self.kernel()?;
        let is_there = kernel.present()? != message::Present::default();
        if is_there {
            kernel.commit(message::remove())?;
            fault::point("table", "removed");
        }
        Ok(is_there)
    }

    /// Says for what the proxy is there and well; has to be repeated within three seconds.
    pub(crate) fn keep_alive(&mut self, ready: Ready) -> Result<(), Error> {
        let kernel = self.kernel()?;
        if kernel.fingerprint()?.is_none() {
            return Ok(());
        }
        kernel.commit(message::keep_alive(ready, ALIVE))?;
        fault::point("table", "proxy said to be alive");
        Ok(())
    }

    /// The table, in nft's words.
    pub(crate) fn describe(&self, desired: &Desired) -> String {
        if desired.services.is_empty() {
            return String::new();
        }
        Ruleset::new(desired, &self.cgroup_root).without_fingerprint().to_string()
    }

    /// What the kernel says is there.
    pub(crate) fn status(&mut self, desired: &Desired) -> Result<Status, Error> {
        let ruleset = Ruleset::new(desired, &self.cgroup_root);
        let kernel = self.kernel()?;
        let in_place = kernel.fingerprint()? == Some(ruleset.fingerprint());
        let counters = kernel.counters()?;
        let service = |service: &Service| ServiceStatus {
            id: service.id,
            cgroups: service.scopes.iter().filter(|_| in_place).map(|cgroup| cgroup.id).collect(),
            counters: counters_of(&counters, service.id),
        };
        Ok(Status {
            // Nothing has to be attached to the proxy.
            proxies: desired.proxy.iter().map(|cgroup| cgroup.id).collect(),
            services: desired.services.iter().map(service).collect(),
            retiring: Vec::new(),
        })
    }
}

fn counters_of(counters: &BTreeMap<String, u64>, id: u32) -> Counters {
    let [steered, passed_by_rule, passed_proxy_absent, refused, observed, queries] =
        COUNTERS.map(|what| counters.get(&counter(what, id)).copied().unwrap_or_default());
    Counters { steered, passed_by_rule, passed_proxy_absent, refused, errors: 0, observed, queries }
}

/// Whether the kernel would take the rules of a service that is a cgroup. Nothing is changed.
pub(crate) fn try_rules(cgroup_root: &Path) -> Result<(), Error> {
    let service = Service {
        id: 1,
        name: String::new(),
        failure: Failure::Closed,
        observe: false,
        proxy_port: 1,
        dns_port: Some(1),
        entries: rules::everything().into(),
        scopes: vec![Cgroup { dir: cgroup_root.join("any"), id: 1 }],
        users: vec![1],
    };
    let ruleset = Ruleset::new(&Desired { services: vec![service], ..Desired::default() }, cgroup_root);
    let kernel = Kernel::open()?;
    // In the place of a table of ours that is there: its elements would overlap.
    kernel.check(message::replace(&kernel.present()?, &ruleset))
}

/// Tables of others' that translate addresses of connections from here.
pub(crate) fn other_nat_chains() -> Result<Vec<NatChain>, Error> {
    Kernel::open()?.other_nat_chains()
}
