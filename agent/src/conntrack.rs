//! What connections were before their addresses were translated: asked of connection tracking
//! (linux/netfilter/nfnetlink_conntrack.h). Needs CAP_NET_ADMIN.

use crate::netlink::{self, Attributes, Netlink, attribute, attributes, nested};
use std::{
    io,
    net::{IpAddr, SocketAddr},
};

/// How packets of a connection are addressed, in one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tuple {
    pub(crate) source: SocketAddr,
    pub(crate) destination: SocketAddr,
}

const NFNL_SUBSYS_CTNETLINK: u16 = 1;
const IPCTNL_MSG_CT_GET: u16 = 1;
/// Length of `struct nfgenmsg`, after a message's header.
const GENERIC: usize = 4;

const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
/// Attributes of a source address and of a destination.
const CTA_IP_V4: [u16; 2] = [1, 2];
const CTA_IP_V6: [u16; 2] = [3, 4];
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;

/// How the packets that are answered with those of `reply` were addressed when they were sent; none where there is no
/// such connection.
pub(crate) fn original(netlink: &Netlink, protocol: u8, reply: &Tuple) -> io::Result<Option<Tuple>> {
    let Some(answer) = netlink.ask(&request(CTA_TUPLE_REPLY, protocol, reply))? else { return Ok(None) };
    match tuple_of(&answer, CTA_TUPLE_ORIG) {
        Some(tuple) => Ok(Some(tuple)),
        None => Err(io::Error::other("connection tracking's answer cannot be read")),
    }
}

/// How the packets are addressed that answer those of `original`; none where there is no such connection.
pub(crate) fn reply(netlink: &Netlink, protocol: u8, original: &Tuple) -> io::Result<Option<Tuple>> {
    let Some(answer) = netlink.ask(&request(CTA_TUPLE_ORIG, protocol, original))? else { return Ok(None) };
    match tuple_of(&answer, CTA_TUPLE_REPLY) {
        Some(tuple) => Ok(Some(tuple)),
        None => Err(io::Error::other("connection tracking's answer cannot be read")),
    }
}

fn request(kind: u16, protocol: u8, known: &Tuple) -> Vec<u8> {
    let family = if known.source.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let body = [vec![family as u8, 0, 0, 0], tuple(kind, protocol, known)].concat();
    netlink::message(NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET, libc::NLM_F_REQUEST, &body)
}

fn tuple(kind: u16, protocol: u8, Tuple { source, destination }: &Tuple) -> Vec<u8> {
    let port = |kind, end: &SocketAddr| attribute(kind, &end.port().to_be_bytes());
    let addresses = [address(0, source.ip()), address(1, destination.ip())];
    let ports = [port(CTA_PROTO_SRC_PORT, source), port(CTA_PROTO_DST_PORT, destination)];
    let protocol = [&[attribute(CTA_PROTO_NUM, &[protocol])], &ports[..]].concat();
    nested(kind, &[nested(CTA_TUPLE_IP, &addresses), nested(CTA_TUPLE_PROTO, &protocol)])
}

/// Of the source (0) or the destination (1).
fn address(end: usize, address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => attribute(CTA_IP_V4[end], &address.octets()),
        IpAddr::V6(address) => attribute(CTA_IP_V6[end], &address.octets()),
    }
}

fn tuple_of(answer: &[u8], kind: u16) -> Option<Tuple> {
    let tuple = attributes(attributes(answer.get(GENERIC..)?).get(&kind)?);
    let (addresses, ports) =
        (attributes(tuple.get(&CTA_TUPLE_IP)?), attributes(tuple.get(&CTA_TUPLE_PROTO)?));
    let end = |end: usize, port| {
        let port = ports.get(&port)?.as_slice().try_into().ok()?;
        Some(SocketAddr::new(address_of(&addresses, end)?, u16::from_be_bytes(port)))
    };
    Some(Tuple { source: end(0, CTA_PROTO_SRC_PORT)?, destination: end(1, CTA_PROTO_DST_PORT)? })
}

fn address_of(addresses: &Attributes, end: usize) -> Option<IpAddr> {
    let v4 = || Some(IpAddr::from(<[u8; 4]>::try_from(addresses.get(&CTA_IP_V4[end])?.as_slice()).ok()?));
    let v6 = || Some(IpAddr::from(<[u8; 16]>::try_from(addresses.get(&CTA_IP_V6[end])?.as_slice()).ok()?));
    v4().or_else(v6)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::Messages;

    fn of(source: &str, destination: &str) -> Tuple {
        Tuple { source: source.parse().unwrap(), destination: destination.parse().unwrap() }
    }

    #[test]
    fn a_request_names_the_reply_as_the_kernel_writes_tuples() {
        let request = request(CTA_TUPLE_REPLY, 17, &of("127.0.0.1:15053", "10.77.0.1:43210"));
        let message = Messages(&request).next().unwrap();
        assert_eq!((message.kind, message.body[0]), (0x0101, 2));
        let expected = [
            &[2, 0, 0, 0, 52, 0, 2, 0x80, 20, 0, 1, 0x80][..],
            &[8, 0, 1, 0, 127, 0, 0, 1, 8, 0, 2, 0, 10, 77, 0, 1],
            &[28, 0, 2, 0x80, 5, 0, 1, 0, 17, 0, 0, 0],
            &[6, 0, 2, 0, 0x3a, 0xcd, 0, 0, 6, 0, 3, 0, 0xa8, 0xca, 0, 0],
        ];
        #[cfg(target_endian = "little")]
        assert_eq!(message.body, expected.concat());
    }

    #[test]
    fn origins_of_both_families_are_read_and_broken_ones_are_none() {
        for original in [of("10.77.0.1:43210", "10.77.0.10:53"), of("[fd77::1]:43210", "[fd77::10]:53")] {
            let reply = tuple(CTA_TUPLE_REPLY, 17, &of("127.0.0.1:15053", "10.77.0.1:43210"));
            let answer = [vec![2, 0, 0, 0], tuple(CTA_TUPLE_ORIG, 17, &original), reply].concat();
            assert_eq!(tuple_of(&answer, CTA_TUPLE_ORIG), Some(original));
            let whole = GENERIC + tuple(CTA_TUPLE_ORIG, 17, &original).len();
            for end in 0..whole {
                assert_eq!(tuple_of(&answer[..end], CTA_TUPLE_ORIG), None, "{end}");
            }
            for at in 0..whole {
                let mut broken = answer.clone();
                broken[at] = !broken[at];
                let _never_panics = tuple_of(&broken, CTA_TUPLE_ORIG);
            }
        }
    }

    #[test]
    fn an_origin_is_read_as_it_was_written_or_not_at_all() {
        let [v4, v6] = [of("10.77.0.1:43210", "10.77.0.10:53"), of("[fd77::1]:43210", "[fd77::10]:53")];
        let answer = |tuple: &Tuple| [vec![2, 0, 0, 0], self::tuple(CTA_TUPLE_ORIG, 17, tuple)].concat();
        let [v4, v6] = [answer(&v4), answer(&v6)];
        fuzz::damaged!(
            [&v4[..], &v6],
            ["\x08\0\x01\0", "\x14\0\x03\0", "\x06\0\x02\0", "\x05\0"],
            |input: &[u8]| {
                let Some(found) = tuple_of(input, CTA_TUPLE_ORIG) else { return };
                assert_eq!(tuple_of(&answer(&found), CTA_TUPLE_ORIG), Some(found));
            }
        );
    }
}
