//! Which sockets are at a port, and in which cgroup: asked of the kernel (sock_diag(7)).

use crate::netlink::{Messages, Netlink, attributes};
use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::{
    SockDiagMessage,
    inet::{ExtensionFlags, InetRequest, SocketId, StateFlags},
};
use nix::sys::socket::SockProtocol;
use std::{io, net::IpAddr};

/// A socket, by its own end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Socket {
    pub(crate) address: IpAddr,
    /// Id of the cgroup it was made in; zero where the kernel does not tell (before 5.9).
    pub(crate) cgroup: u64,
}

/// `INET_DIAG_CGROUP_ID` (linux/inet_diag.h).
const CGROUP_ID: u16 = 21;
/// Length of `struct inet_diag_msg`, and where its parts are.
const MESSAGE: usize = 72;
const FAMILY: usize = 0;
const PORT: usize = 4;
const ADDRESS: usize = 8;

/// TCP listeners on a port in this network namespace, of both families.
pub(crate) fn listeners(port: u16) -> io::Result<Vec<Socket>> {
    on_port(port, &StateFlags::LISTEN)
}

/// Whether a connection to a port is open: its end here was not closed by both sides yet.
pub(crate) fn are_connected(port: u16) -> io::Result<bool> {
    let over = StateFlags::LISTEN | StateFlags::TIME_WAIT | StateFlags::CLOSE;
    Ok(!on_port(port, &StateFlags::all().difference(over))?.is_empty())
}

fn on_port(port: u16, states: &StateFlags) -> io::Result<Vec<Socket>> {
    let netlink = Netlink::open(SockProtocol::NetlinkSockDiag)?;
    let mut found = Vec::new();
    for (family, id) in [(libc::AF_INET, SocketId::new_v4()), (libc::AF_INET6, SocketId::new_v6())] {
        netlink.send(&request(family as u8, id, states))?;
        while let Some(answer) = netlink.answer()? {
            for message in Messages(&answer) {
                if let Some(error) = message.error() {
                    return Err(error);
                }
                found.extend(socket(message.body).filter(|(on, _)| *on == port).map(|(_, socket)| socket));
            }
        }
    }
    Ok(found)
}

fn request(family: u8, socket_id: SocketId, states: &StateFlags) -> Vec<u8> {
    let request = InetRequest {
        family,
        protocol: libc::IPPROTO_TCP as u8,
        extensions: ExtensionFlags::empty(),
        states: states.clone(),
        socket_id,
    };
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let payload = NetlinkPayload::from(SockDiagMessage::InetRequest(request));
    let mut message = NetlinkMessage::new(header, payload);
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

/// A socket's port, and the socket.
fn socket(body: &[u8]) -> Option<(u16, Socket)> {
    let address = body.get(ADDRESS..ADDRESS + 16)?;
    let address = match i32::from(*body.get(FAMILY)?) {
        libc::AF_INET => IpAddr::from(<[u8; 4]>::try_from(&address[..4]).ok()?),
        libc::AF_INET6 => IpAddr::from(<[u8; 16]>::try_from(address).ok()?),
        _ => return None,
    };
    let port = u16::from_be_bytes(body.get(PORT..PORT + 2)?.try_into().ok()?);
    let cgroup = attributes(body.get(MESSAGE..)?).remove(&CGROUP_ID);
    let cgroup = cgroup.and_then(|id| id.try_into().ok()).map_or(0, u64::from_ne_bytes);
    Some((port, Socket { address, cgroup }))
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
}
