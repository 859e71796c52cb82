//! Which sockets are at a port, and whose: asked of the kernel (sock_diag(7)).

use crate::netlink::{self, Messages, Netlink, attributes};
use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::{
    SockDiagMessage,
    inet::{ExtensionFlags, InetRequest, SocketId, StateFlags},
};
use nix::sys::socket::SockProtocol;
use std::{
    collections::HashSet,
    io,
    net::{IpAddr, SocketAddr},
};

/// A socket, by its own end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Socket {
    pub(crate) address: IpAddr,
    /// Id of the cgroup it was made in; zero where the kernel does not tell (before 5.9).
    pub(crate) cgroup: u64,
}

/// Whose a socket is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    /// None for a socket that was closed and still has something to send: nobody owns it then.
    pub(crate) uid: Option<u32>,
    /// Id of the cgroup it was made in; zero where the kernel does not tell (before 5.9).
    pub(crate) cgroup: u64,
}

/// A TCP connection whose end here is open: nobody here has closed it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Connection {
    /// IPv4-mapped addresses are IPv4 ones here.
    pub(crate) local: SocketAddr,
    pub(crate) remote: SocketAddr,
    pub(crate) uid: u32,
    /// Id of the cgroup it was made in; zero where the kernel does not tell (before 5.9).
    pub(crate) cgroup: u64,
    /// Whether it is bound to a network interface.
    pub(crate) is_bound: bool,
    /// The kernel's name for it, which no later socket has.
    pub(crate) cookie: u64,
    family: u8,
    /// `struct inet_diag_sockid`, as the kernel wrote it.
    id: [u8; SOCKET_ID],
}

/// `SOCK_DESTROY` (linux/sock_diag.h).
const SOCK_DESTROY: u16 = 21;
/// Length of `struct inet_diag_sockid`, where it is in the message, and where its parts are in it.
const SOCKET_ID: usize = 48;
const ID: usize = 4;
const ID_REMOTE_ADDRESS: usize = 20;
const ID_INTERFACE: usize = 36;
const ID_COOKIE: usize = 40;

/// `INET_DIAG_CGROUP_ID` (linux/inet_diag.h).
const CGROUP_ID: u16 = 21;
/// Length of `struct inet_diag_msg`, and where its parts are.
const MESSAGE: usize = 72;
const FAMILY: usize = 0;
const PORT: usize = 4;
const REMOTE_PORT: usize = 6;
const ADDRESS: usize = 8;
const UID: usize = 64;
const INODE: usize = 68;
/// A socket's cookie, where it is not known (`INET_DIAG_NOCOOKIE`).
const NO_COOKIE: [u8; 8] = [0xff; 8];

/// TCP listeners on a port in this network namespace, of both families.
pub(crate) fn listeners(port: u16) -> io::Result<Vec<Socket>> {
    on_port(port, &StateFlags::LISTEN)
}

/// Ports that somebody listens on.
pub(crate) fn listened() -> io::Result<HashSet<u16>> {
    let ports = dump(&StateFlags::LISTEN, |body| socket(body).map(|(port, _)| port))?;
    Ok(ports.into_iter().collect())
}

/// Whether a connection to a port is open: its end here was not closed by both sides yet.
pub(crate) fn are_connected(port: u16) -> io::Result<bool> {
    let over = StateFlags::LISTEN | StateFlags::TIME_WAIT | StateFlags::CLOSE;
    Ok(!on_port(port, &StateFlags::all().difference(over))?.is_empty())
}

/// All open TCP connections of this network namespace, at both ends where both are here.
pub(crate) fn connections() -> io::Result<Vec<Connection>> {
    dump(&(StateFlags::ESTABLISHED | StateFlags::CLOSE_WAIT), connection)
}

/// Closes a connection with a reset; the process that has it open sees ECONNABORTED. False where it has ended meanwhile: the
/// cookie is asked for too, so that no later socket of the same ends is hit. Linux 4.9 with CONFIG_INET_DIAG_DESTROY, and
/// CAP_NET_ADMIN.
pub(crate) fn destroy(netlink: &Netlink, connection: &Connection) -> io::Result<bool> {
    let head = [connection.family, libc::IPPROTO_TCP as u8, 0, 0, 0xff, 0xff, 0xff, 0xff];
    let body = [&head[..], &connection.id].concat();
    netlink.send(&netlink::message(SOCK_DESTROY, libc::NLM_F_REQUEST | libc::NLM_F_ACK, &body))?;
    let mut destroyed = Ok(true);
    while let Some(answer) = netlink.answer()? {
        for error in Messages(&answer).filter_map(|message| message.error()) {
            let is_gone = error.raw_os_error() == Some(libc::ENOENT);
            destroyed = if is_gone { Ok(false) } else { Err(error) };
        }
    }
    destroyed
}

fn on_port(port: u16, states: &StateFlags) -> io::Result<Vec<Socket>> {
    dump(states, |body| socket(body).filter(|(on, _)| *on == port).map(|(_, socket)| socket))
}

/// TCP sockets of both families.
fn dump<T>(states: &StateFlags, read: impl Fn(&[u8]) -> Option<T>) -> io::Result<Vec<T>> {
    let netlink = Netlink::open(SockProtocol::NetlinkSockDiag)?;
    let mut found = Vec::new();
    for (family, id) in [(libc::AF_INET, SocketId::new_v4()), (libc::AF_INET6, SocketId::new_v6())] {
        netlink.send(&request(family as u8, id, states))?;
        while let Some(answer) = netlink.answer()? {
            for message in Messages(&answer) {
                if let Some(error) = message.error() {
                    return Err(error);
                }
                found.extend(read(message.body));
            }
        }
    }
    Ok(found)
}

/// Whose the socket is that sends from `local` to `remote`; none where there is none, or one that is about to go.
///
/// A TCP socket is found by both its ends. A UDP socket need not be connected: then `local` alone has to be its own.
pub(crate) fn owner(
    netlink: &Netlink,
    protocol: u8,
    local: SocketAddr,
    remote: SocketAddr,
) -> io::Result<Option<Owner>> {
    let answer = netlink.ask(&exact(protocol, local, remote))?;
    Ok(answer.and_then(|body| owner_of(&body, protocol, local, remote)))
}

/// IPv4-mapped sockets are among those of IPv4.
fn exact(protocol: u8, local: SocketAddr, remote: SocketAddr) -> Vec<u8> {
    // The kernel looks a datagram's receiver up by the datagram's ends, so the source is the other one.
    let is_udp = i32::from(protocol) == libc::IPPROTO_UDP;
    let (source, destination) = if is_udp { (remote, local) } else { (local, remote) };
    let (family, id) = match local {
        SocketAddr::V4(_) => (libc::AF_INET, SocketId::new_v4()),
        SocketAddr::V6(_) => (libc::AF_INET6, SocketId::new_v6()),
    };
    let socket_id = SocketId {
        source_port: source.port(),
        destination_port: destination.port(),
        source_address: source.ip(),
        destination_address: destination.ip(),
        cookie: NO_COOKIE,
        ..id
    };
    message(family as u8, protocol, socket_id, &StateFlags::all(), NLM_F_REQUEST)
}

/// The kernel offers a listener where it finds no connection.
fn owner_of(body: &[u8], protocol: u8, local: SocketAddr, remote: SocketAddr) -> Option<Owner> {
    let (port, Socket { cgroup, .. }) = socket(body)?;
    let remote_port = u16::from_be_bytes(body.get(REMOTE_PORT..REMOTE_PORT + 2)?.try_into().ok()?);
    let is_unconnected = i32::from(protocol) == libc::IPPROTO_UDP && remote_port == 0;
    if port != local.port() || remote_port != remote.port() && !is_unconnected {
        return None;
    }
    let number = |at: usize| Some(u32::from_ne_bytes(body.get(at..at + 4)?.try_into().ok()?));
    let (uid, inode) = (number(UID)?, number(INODE)?);
    // What waits for its time to be over has neither a cgroup nor an owner.
    let owner = Owner { uid: (inode != 0).then_some(uid), cgroup };
    (cgroup != 0 || inode != 0).then_some(owner)
}

fn request(family: u8, socket_id: SocketId, states: &StateFlags) -> Vec<u8> {
    message(family, libc::IPPROTO_TCP as u8, socket_id, states, NLM_F_REQUEST | NLM_F_DUMP)
}

fn message(family: u8, protocol: u8, socket_id: SocketId, states: &StateFlags, flags: u16) -> Vec<u8> {
    let request = InetRequest {
        family,
        protocol,
        extensions: ExtensionFlags::empty(),
        states: states.clone(),
        socket_id,
    };
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    let payload = NetlinkPayload::from(SockDiagMessage::InetRequest(request));
    let mut message = NetlinkMessage::new(header, payload);
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

/// A socket's port, and the socket.
fn socket(body: &[u8]) -> Option<(u16, Socket)> {
    let address = address_of(*body.get(FAMILY)?, body.get(ADDRESS..ADDRESS + 16)?)?;
    let port = u16::from_be_bytes(body.get(PORT..PORT + 2)?.try_into().ok()?);
    let cgroup = attributes(body.get(MESSAGE..)?).remove(&CGROUP_ID);
    let cgroup = cgroup.and_then(|id| id.try_into().ok()).map_or(0, u64::from_ne_bytes);
    Some((port, Socket { address, cgroup }))
}

fn address_of(family: u8, bytes: &[u8]) -> Option<IpAddr> {
    match i32::from(family) {
        libc::AF_INET => Some(IpAddr::from(<[u8; 4]>::try_from(bytes.get(..4)?).ok()?)),
        libc::AF_INET6 => Some(IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?)),
        _ => None,
    }
}

fn connection(body: &[u8]) -> Option<Connection> {
    let family = *body.get(FAMILY)?;
    let (port, Socket { address, cgroup }) = socket(body)?;
    let id: [u8; SOCKET_ID] = body.get(ID..ID + SOCKET_ID)?.try_into().ok()?;
    let remote = address_of(family, id.get(ID_REMOTE_ADDRESS..ID_REMOTE_ADDRESS + 16)?)?;
    let remote_port = u16::from_be_bytes(body.get(REMOTE_PORT..REMOTE_PORT + 2)?.try_into().ok()?);
    Some(Connection {
        local: SocketAddr::new(address.to_canonical(), port),
        remote: SocketAddr::new(remote.to_canonical(), remote_port),
        uid: u32::from_ne_bytes(body.get(UID..UID + 4)?.try_into().ok()?),
        cgroup,
        is_bound: id[ID_INTERFACE..ID_COOKIE] != [0; 4],
        // Two numbers of 32 bits, the lower one first.
        cookie: {
            let half = |at: usize| Some(u32::from_ne_bytes(id.get(at..at + 4)?.try_into().ok()?));
            u64::from(half(ID_COOKIE)?) | u64::from(half(ID_COOKIE + 4)?) << 32
        },
        family,
        id,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_of_both_families_are_found_by_their_port() {
        let v4 = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = v4.local_addr().unwrap().port();
        let _v6 = std::net::TcpListener::bind(("::1", port)).unwrap();
        let mut found: Vec<IpAddr> =
            listeners(port).unwrap().into_iter().map(|listener| listener.address).collect();
        found.sort();
        assert!(!are_connected(port).unwrap());
        let _client = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        assert!(are_connected(port).unwrap());
        assert_eq!(found, ["127.0.0.1", "::1"].map(|address| address.parse::<IpAddr>().unwrap()));
    }

    const TCP: u8 = libc::IPPROTO_TCP as u8;
    const UDP: u8 = libc::IPPROTO_UDP as u8;

    fn found(protocol: u8, local: SocketAddr, remote: SocketAddr) -> Option<Owner> {
        let netlink = Netlink::open(SockProtocol::NetlinkSockDiag).unwrap();
        let owner = owner(&netlink, protocol, local, remote).unwrap()?;
        assert_eq!(owner.uid, Some(nix::unistd::geteuid().as_raw()));
        Some(owner)
    }

    #[test]
    fn a_tcp_socket_is_found_by_both_its_ends() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = std::net::TcpListener::bind(address).unwrap();
            let server = listener.local_addr().unwrap();
            let connected = std::net::TcpStream::connect(server).unwrap();
            let client = connected.local_addr().unwrap();
            let (_accepted, _) = listener.accept().unwrap();
            let own = found(TCP, client, server).unwrap();
            assert_eq!(found(TCP, server, client), Some(own));
            // The listener is no connection.
            let elsewhere = SocketAddr::new(server.ip(), 1);
            assert_eq!((found(TCP, client, elsewhere), found(TCP, server, elsewhere)), (None, None));
        }
    }

    #[test]
    fn a_connection_is_closed_alone_and_never_one_that_took_its_place() {
        for address in ["127.0.0.1:0", "[::1]:0", "[::ffff:127.0.0.1]:0"] {
            let listener = std::net::TcpListener::bind(address).unwrap();
            let server = listener.local_addr().unwrap();
            let (first, other) = (
                std::net::TcpStream::connect(server).unwrap(),
                std::net::TcpStream::connect(server).unwrap(),
            );
            let local = |stream: &std::net::TcpStream| {
                let local = stream.local_addr().unwrap();
                SocketAddr::new(local.ip().to_canonical(), local.port())
            };
            let open = || connections().unwrap().into_iter().find(|found| found.local == local(&first));
            let found = open().unwrap();
            assert_eq!(found.remote, SocketAddr::new(server.ip().to_canonical(), server.port()));
            let netlink = Netlink::open(SockProtocol::NetlinkSockDiag).unwrap();
            let mut replaced = found.clone();
            replaced.id[ID_COOKIE] ^= 1;
            assert!(!destroy(&netlink, &replaced).unwrap() && open().is_some());
            assert!(destroy(&netlink, &found).unwrap() && open().is_none());
            assert!(!destroy(&netlink, &found).unwrap());
            assert!(connections().unwrap().iter().any(|found| found.local == local(&other)));
        }
    }

    #[test]
    fn a_mapped_socket_is_found_as_one_of_ipv4() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let server = listener.local_addr().unwrap();
        let client = std::net::TcpStream::connect(("::ffff:127.0.0.1", server.port())).unwrap();
        let local = client.local_addr().unwrap();
        assert!(local.is_ipv6());
        assert!(found(TCP, SocketAddr::new(local.ip().to_canonical(), local.port()), server).is_some());
    }

    #[test]
    fn a_udp_socket_is_found_connected_or_not() {
        let remote = SocketAddr::from(([127, 0, 0, 1], 53));
        for address in ["127.0.0.1:0", "0.0.0.0:0", "[::]:0"] {
            let socket = std::net::UdpSocket::bind(address).unwrap();
            let local = SocketAddr::from(([127, 0, 0, 1], socket.local_addr().unwrap().port()));
            assert!(found(UDP, local, remote).is_some(), "{address}");
        }
        let socket = std::net::UdpSocket::bind("[::1]:0").unwrap();
        socket.connect("[::1]:53").unwrap();
        let local = socket.local_addr().unwrap();
        assert!(found(UDP, local, "[::1]:53".parse().unwrap()).is_some());
        assert_eq!(found(UDP, local, "[::1]:54".parse().unwrap()), None);
    }

    #[test]
    fn broken_answers_are_nobodys() {
        let (local, remote) = ("127.0.0.1:43210".parse().unwrap(), "127.0.0.1:80".parse().unwrap());
        let mut good = vec![0; MESSAGE];
        good[FAMILY] = libc::AF_INET as u8;
        good[PORT..PORT + 4].copy_from_slice(&[0xa8, 0xca, 0, 80]);
        assert_eq!(owner_of(&good, TCP, local, remote), None);
        good[UID..MESSAGE].copy_from_slice(&[1000_u32.to_ne_bytes(), 7_u32.to_ne_bytes()].concat());
        assert_eq!(owner_of(&good, TCP, local, remote), Some(Owner { uid: Some(1000), cgroup: 0 }));
        good.extend(netlink::attribute(CGROUP_ID, &9_u64.to_ne_bytes()));
        assert_eq!(owner_of(&good, TCP, local, remote), Some(Owner { uid: Some(1000), cgroup: 9 }));
        good[INODE..MESSAGE].fill(0);
        assert_eq!(owner_of(&good, TCP, local, remote), Some(Owner { uid: None, cgroup: 9 }));
        for end in 0..good.len() {
            assert_eq!(owner_of(&good[..end], TCP, local, remote), None, "{end}");
        }
    }

    #[test]
    fn whatever_the_kernel_answers_an_owner_is_that_of_the_socket_that_was_asked_for() {
        let (local, remote) = ("127.0.0.1:43210".parse().unwrap(), "127.0.0.1:80".parse().unwrap());
        let mut good = vec![0; MESSAGE];
        good[FAMILY] = libc::AF_INET as u8;
        good[PORT..PORT + 4].copy_from_slice(&[0xa8, 0xca, 0, 80]);
        good[UID..MESSAGE].copy_from_slice(&[1000_u32.to_ne_bytes(), 7_u32.to_ne_bytes()].concat());
        good.extend(netlink::attribute(CGROUP_ID, &9_u64.to_ne_bytes()));
        fuzz::damaged!([&good[..]], ["\x0c\0\x15\0", "\n", "\x02"], |input: &[u8]| {
            let Some((port, socket)) = socket(input) else {
                return assert_eq!(owner_of(input, TCP, local, remote), None);
            };
            let Some(Owner { uid, cgroup }) = owner_of(input, TCP, local, remote) else { return };
            assert!(port == local.port() && cgroup == socket.cgroup && (cgroup != 0 || uid.is_some()));
        });
    }
}
