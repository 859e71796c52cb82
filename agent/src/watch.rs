//! The proxy, asked again and again: whether it is ready, for modes in which the kernel does not see for itself, and what
//! it can route.

use crate::{
    config::Proxy,
    ready::{self, says_ready},
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

/// How often it is asked.
const ROUND: Duration = Duration::from_millis(250);

/// How often it is asked what it can route.
const ROUTABLE_ROUND: Duration = Duration::from_millis(500);

/// Tells what the proxy can route whenever that has changed, until nobody wants to know. One that is away can route what
/// it could before.
pub(crate) fn routable(admin: SocketAddr, mut tell: impl FnMut(Routable) -> bool) {
    let mut known = None;
    loop {
        match ready::routable(admin, known.as_deref()) {
            Ok(Some((routable, tag))) => {
                known = Some(tag);
                if !tell(routable) {
                    return;
                }
            }
            Ok(None) => {}
            Err(error) => tracing::debug!("ask the proxy at {admin} what it can route: {error}"),
        }
        thread::sleep(ROUTABLE_ROUND);
    }
}

/// Tells for IPv4 and IPv6 whether the proxy takes connections, until nobody wants to know.
pub(crate) fn proxy(proxy: &Proxy, mut workloads: Workloads, mut tell: impl FnMut([bool; 2]) -> bool) {
    while tell(is_ready(proxy, &mut workloads)) {
        thread::sleep(ROUND);
    }
}

/// For IPv4 and IPv6. The proxy is ready when it says so, and the sockets that listen on its port were made in its cgroup.
pub(crate) fn is_ready(proxy: &Proxy, workloads: &mut Workloads) -> [bool; 2] {
    let Some(cgroup) = workloads.cgroup(&proxy.scope) else { return [false; 2] };
    // A kernel that does not tell whose the listeners are leaves it at what the proxy says.
    let listens = listening(proxy.port, &cgroup.ids()).unwrap_or([true; 2]);
    if listens == [false; 2] || !says_ready(proxy.admin) { [false; 2] } else { listens }
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
