//! Open connections of services: which of them are steered, and which are not though policy says so, since they were made
//! before, or while no proxy was there. Those of this network namespace: no other one's can be seen.

use crate::{
    conntrack::{self, Tuple},
    mode::Mode,
    netlink::Netlink,
    redirect::{Cgroup, Desired, Service},
    rules::{self, Range},
    sockets::{self, Connection},
};
use nix::sys::socket::SockProtocol;
use std::{
    collections::{HashMap, HashSet},
    io,
    net::SocketAddr,
};

/// All that are open, and what tells which are steered.
#[derive(Debug)]
pub(crate) struct Open {
    connections: Vec<Connection>,
    /// What was accepted at one of these is no connection that a service has made, and no policy is for it.
    listened: HashSet<u16>,
    steering: Steering,
}

/// How to know that the other end of a connection is the proxy's.
#[derive(Debug)]
enum Steering {
    /// Its socket was sent to the proxy instead, and the proxy's own end is here too: both ends of each of those.
    Rewritten(HashSet<(SocketAddr, SocketAddr)>),
    /// Connection tracking translates it to a loopback address.
    Translated(Netlink),
}

impl Open {
    /// What is open now; none where steering is by names, which no connection tells. The proxy listens on these ports.
    pub(crate) fn look(mode: Mode, proxy_ports: &[u16]) -> io::Result<Option<Self>> {
        if mode == Mode::Hosts {
            return Ok(None);
        }
        let connections = sockets::connections()?;
        let steering = match mode {
            Mode::Nftables => Steering::Translated(Netlink::open(SockProtocol::NetlinkNetFilter)?),
            Mode::Ebpf | Mode::Hosts => {
                let is_proxys = |end: &&Connection| {
                    end.local.ip().is_loopback() && proxy_ports.contains(&end.local.port())
                };
                let ends = connections.iter().filter(is_proxys).map(|end| (end.remote, end.local));
                Steering::Rewritten(ends.collect())
            }
        };
        Ok(Some(Self { connections, listened: sockets::listened()?, steering }))
    }

    /// Those that policy steers and that are not steered, with their services.
    pub(crate) fn unsteered<'s>(&self, owners: &Owners<'s>) -> io::Result<Vec<(&'s Service, &Connection)>> {
        let mut policies: HashMap<u32, Vec<Range>> = HashMap::new();
        let mut found = Vec::new();
        let is_made = |connection: &Connection| !self.listened.contains(&connection.local.port());
        let made = self.of(owners).filter(|(_, connection)| !connection.is_bound && is_made(connection));
        for (service, connection) in made {
            let ranges = policies.entry(service.id).or_insert_with(|| rules::ranges(&service.entries));
            if !service.observe && is_in(ranges, connection.remote) && !self.is_steered(connection)? {
                found.push((service, connection));
            }
        }
        Ok(found)
    }

    /// Those that are steered, with their services.
    pub(crate) fn steered<'s>(&self, owners: &Owners<'s>) -> io::Result<Vec<(&'s Service, &Connection)>> {
        let mut found = Vec::new();
        for (service, connection) in self.of(owners) {
            if self.is_steered(connection)? {
                found.push((service, connection));
            }
        }
        Ok(found)
    }

    fn of<'s>(&self, owners: &Owners<'s>) -> impl Iterator<Item = (&'s Service, &Connection)> {
        self.connections.iter().filter_map(|connection| Some((owners.of(connection)?, connection)))
    }

    fn is_steered(&self, connection: &Connection) -> io::Result<bool> {
        let Connection { local, remote, .. } = *connection;
        match &self.steering {
            Steering::Rewritten(ends) => Ok(ends.contains(&(local, remote))),
            Steering::Translated(_) if remote.ip().is_loopback() => Ok(false),
            Steering::Translated(netlink) => {
                let original = Tuple { source: local, destination: remote };
                let reply = conntrack::reply(netlink, libc::IPPROTO_TCP as u8, &original)?;
                Ok(reply.is_some_and(|reply| reply.source.ip().is_loopback()))
            }
        }
    }
}

/// Whether a destination is in one of these ranges, which are disjoint and in order.
fn is_in(ranges: &[Range], destination: SocketAddr) -> bool {
    let ip = destination.ip();
    let next = ranges.partition_point(|range| range.last < ip);
    let range = ranges.get(next).filter(|range| range.first <= ip);
    range.is_some_and(|range| {
        range.ports.iter().any(|ports| ports.first <= destination.port() && destination.port() <= ports.last)
    })
}

/// Whose sockets are whose: by the cgroup that they were made in, where the innermost service counts, else by their user.
#[derive(Debug)]
pub(crate) struct Owners<'s> {
    /// None where a cgroup is the proxy's.
    cgroups: HashMap<u64, Option<&'s Service>>,
    users: HashMap<u32, &'s Service>,
}

impl<'s> Owners<'s> {
    /// With a table a service that is a user has no cgroup; with hooks it is the user's slice.
    pub(crate) fn new(desired: &'s Desired, mode: Mode) -> Self {
        let is_user = |service: &Service| mode == Mode::Nftables && !service.users.is_empty();
        let (users, cgroups): (Vec<&Service>, Vec<&Service>) =
            desired.services.iter().partition(|service| is_user(service));
        let of_services = cgroups
            .into_iter()
            .flat_map(|service| service.scopes.iter().map(move |cgroup| (cgroup, Some(service))));
        let mut trees: Vec<(&Cgroup, Option<&Service>)> =
            desired.proxy.iter().map(|cgroup| (cgroup, None)).chain(of_services).collect();
        trees.sort_by_key(|(cgroup, _)| cgroup.dir.components().count());
        let ids = trees.into_iter().flat_map(|(cgroup, of)| cgroup.ids().into_iter().map(move |id| (id, of)));
        let users =
            users.into_iter().flat_map(|service| service.users.iter().map(move |&uid| (uid, service)));
        Self { cgroups: ids.collect(), users: users.collect() }
    }

    fn of(&self, connection: &Connection) -> Option<&'s Service> {
        match self.cgroups.get(&connection.cgroup) {
            Some(owner) => *owner,
            None => self.users.get(&connection.uid).copied(),
        }
    }
}

/// Why connections cannot be closed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ResetError {
    /// Some may have been closed before this.
    #[error("close a connection: {0}{hint}", hint = hint(.0))]
    Refused(io::Error),
    /// There is nobody to ask.
    #[error("talk to the kernel about sockets: {0}")]
    Socket(io::Error),
}

fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP) => {
            "; this kernel was built without CONFIG_INET_DIAG_DESTROY: restart the service instead"
        }
        Some(libc::EPERM) => "; CAP_NET_ADMIN is needed",
        _ => "",
    }
}

/// Closes connections, each only if it is still the same one. Says how many there still were.
pub(crate) fn reset<'c>(connections: impl Iterator<Item = &'c Connection>) -> Result<usize, ResetError> {
    let netlink = Netlink::open(SockProtocol::NetlinkSockDiag).map_err(ResetError::Socket)?;
    let mut closed = 0;
    for connection in connections {
        closed += usize::from(sockets::destroy(&netlink, connection).map_err(ResetError::Refused)?);
    }
    Ok(closed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Ports;

    #[test]
    fn a_destination_is_found_among_ranges_by_address_and_port() {
        let range = |first: &str, last: &str, ports: &[(u16, u16)]| Range {
            first: first.parse().unwrap(),
            last: last.parse().unwrap(),
            ports: ports.iter().map(|&(first, last)| Ports { first, last }).collect(),
        };
        let ranges = [
            range("10.0.0.0", "10.0.0.255", &[(80, 80), (8000, 8999)]),
            range("10.0.2.0", "10.0.2.0", &[(0, 65535)]),
            range("fd00::", "fd00::ffff", &[(443, 443)]),
        ];
        for (destination, expected) in [
            ("10.0.0.0:80", true),
            ("10.0.0.255:8500", true),
            ("10.0.0.7:81", false),
            ("10.0.1.0:80", false),
            ("10.0.2.0:1", true),
            ("10.0.2.1:1", false),
            ("9.255.255.255:80", false),
            ("[fd00::1]:443", true),
            ("[fd00::1]:80", false),
            ("[fe00::1]:443", false),
        ] {
            assert_eq!(is_in(&ranges, destination.parse().unwrap()), expected, "{destination}");
        }
        assert!(!is_in(&[], "10.0.0.0:80".parse().unwrap()));
    }
}
