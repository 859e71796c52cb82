//! The proxy, asked again and again: whether it is ready, for modes in which the kernel does not see for itself, and what
//! it can route.

use crate::{
    config::{Config, Proxy, Scope},
    ready::{self, says_ready},
    redirect::Ready,
    routable::Routable,
    sockets,
    workload::Workloads,
};
use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, SocketAddr},
    thread,
    time::Duration,
};
use tokio::{runtime::Handle, sync::watch::Receiver};

/// How often it is asked.
const ROUND: Duration = Duration::from_millis(250);

/// How often it is asked what it can route.
const ROUTABLE_ROUND: Duration = Duration::from_millis(500);

/// Whom to ask, and for what. It changes with the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    proxy: Proxy,
    /// Whether what the proxy can route makes a difference to anything.
    follows_routable: bool,
}

impl From<&Config> for Target {
    fn from(config: &Config) -> Self {
        Self { proxy: config.proxy.clone(), follows_routable: config.follows_routable() }
    }
}

/// Tells what the proxy can route whenever that has changed, until nobody wants to know; waits while it makes no
/// difference. One that is away can route what it could before; a stranger at its admin address is not asked.
pub(crate) fn routable(
    mut targets: Receiver<Target>,
    runtime: &Handle,
    mut workloads: Workloads,
    mut tell: impl FnMut(Routable) -> bool,
) {
    let mut known: Option<(Routable, String)> = None;
    targets.mark_changed();
    while let Ok(is_another) = targets.has_changed() {
        if is_another {
            let Ok(_) = runtime.block_on(targets.wait_for(|target| target.follows_routable)) else { return };
            // Another proxy gives other tags, and what was told may have been forgotten.
            known = None;
        }
        let proxy = targets.borrow().proxy.clone();
        let admin = proxy.admin;
        let tag = known.as_ref().map(|(_, tag)| tag.as_str()).filter(|tag| !tag.is_empty());
        match is_proxys(&proxy, &mut workloads).then(|| ready::routable(admin, tag)) {
            Some(Ok(Some(said))) if known.as_ref().is_none_or(|(known, _)| *known != said.0) => {
                if !tell(said.0.clone()) {
                    return;
                }
                known = Some(said);
            }
            Some(Err(error)) => tracing::debug!("ask the proxy at {admin} what it can route: {error}"),
            _ => {}
        }
        thread::sleep(ROUTABLE_ROUND);
    }
}

/// What the proxy can route now, if it says so.
pub(crate) fn routable_now(proxy: &Proxy, workloads: &mut Workloads) -> Option<Routable> {
    let said = is_proxys(proxy, workloads).then(|| ready::routable(proxy.admin, None))?;
    said.ok()?.map(|(routable, _)| routable)
}

/// Whether whoever listens at the admin address does so in the proxy's cgroup.
fn is_proxys(proxy: &Proxy, workloads: &mut Workloads) -> bool {
    let Some(cgroup) = workloads.cgroup(&proxy.scope) else { return false };
    let listens = listening(proxy.admin.port(), &cgroup.ids()).unwrap_or([true; 2]);
    listens[usize::from(proxy.admin.is_ipv6())]
}

/// Tells whether the proxy is ready, and which one, until nobody wants to know.
pub(crate) fn proxy(
    targets: &Receiver<Target>,
    mut workloads: Workloads,
    mut tell: impl FnMut(Proxy, Ready) -> bool,
) {
    loop {
        let proxy = targets.borrow().proxy.clone();
        let ready = is_ready(&proxy, &mut workloads);
        if !tell(proxy, ready) {
            return;
        }
        thread::sleep(ROUND);
    }
}

/// The proxy is ready when it says so, and the sockets that listen on its ports were made in its cgroup.
pub(crate) fn is_ready(proxy: &Proxy, workloads: &mut Workloads) -> Ready {
    readiness(proxy, workloads).unwrap_or_default()
}

/// Why a proxy is not ready.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotReady {
    #[error("the proxy does not run ({0})")]
    Absent(Scope),
    #[error("no socket of the proxy's alone listens on port {0} of 127.0.0.1 or ::1")]
    Deaf(u16),
    #[error("the proxy does not say at {0} that it is ready")]
    Silent(SocketAddr),
}

/// As [`is_ready`], or why not.
pub(crate) fn readiness(proxy: &Proxy, workloads: &mut Workloads) -> Result<Ready, NotReady> {
    let cgroup = workloads.cgroup(&proxy.scope).ok_or_else(|| NotReady::Absent(proxy.scope.clone()))?;
    let own = cgroup.ids();
    // A kernel that does not tell whose the listeners are leaves it at what the proxy says.
    let listens = |port| listening(port, &own).unwrap_or([true; 2]);
    let ready = Ready { proxy: listens(proxy.port), dns: listens(proxy.dns_port) };
    if ready.proxy == [false; 2] {
        return Err(NotReady::Deaf(proxy.port));
    }
    let says_so = is_proxys(proxy, workloads) && says_ready(proxy.admin);
    if says_so { Ok(ready) } else { Err(NotReady::Silent(proxy.admin)) }
}

fn listening(port: u16, own: &BTreeSet<u64>) -> io::Result<[bool; 2]> {
    let listeners = sockets::listeners(port)?;
    let at = |v4: bool| {
        // A stranger beside the proxy would get a part of the connections.
        let mut there = listeners.iter().filter(|listener| takes_loopback(listener.address, v4)).peekable();
        there.peek().is_some() && there.all(|listener| listener.cgroup == 0 || own.contains(&listener.cgroup))
    };
    Ok([at(true), at(false)])
}

/// Whether a listener at this address gets connections to 127.0.0.1, or to ::1.
fn takes_loopback(address: IpAddr, v4: bool) -> bool {
    match address {
        IpAddr::V4(address) => v4 && (address.is_loopback() || address.is_unspecified()),
        IpAddr::V6(address) => !v4 && (address.is_loopback() || address.is_unspecified()),
    }
}
