//! The resolvers that clients ask.

use crate::{names::is_virtual, origin, origins::Origins};
use std::{io, net::SocketAddr};
use tokio::net::UdpSocket;

/// Which resolver a query is for that came to a socket; none where nobody steered it. The hooks tell it by the socket,
/// since each captured resolver has a port of its own; where there are none, the agent tells it by the client.
pub(super) async fn asked(
    socket: &UdpSocket,
    client: SocketAddr,
    origins: &Origins,
) -> io::Result<Option<SocketAddr>> {
    match origin::resolver(socket)? {
        Some(resolver) => Ok(Some(resolver)),
        None => Ok(origins.udp(client, socket.local_addr()?).await),
    }
}

/// Whether a resolver may be asked on a client's behalf. A loopback address would lead back here sooner or later: to this
/// proxy, or to a resolver on this host that asks it.
pub(super) fn is_askable(resolver: SocketAddr) -> bool {
    let ip = resolver.ip().to_canonical();
    let nowhere = ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() || is_virtual(ip);
    !nowhere && resolver.port() != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_resolvers_elsewhere_are_asked() {
        for resolver in ["10.0.0.2:53", "[fd00::2]:53", "169.254.169.253:53"] {
            assert!(is_askable(resolver.parse().unwrap()), "{resolver}");
        }
        for resolver in [
            "127.0.0.53:53",
            "127.0.0.1:15053",
            "[::1]:53",
            "[::ffff:127.0.0.1]:53",
            "0.0.0.0:53",
            "[::]:53",
            "224.0.0.251:5353",
            "241.1.2.3:53",
            "[fdb2:6c1e:9d04::1]:53",
            "10.0.0.2:0",
        ] {
            assert!(!is_askable(resolver.parse().unwrap()), "{resolver}");
        }
    }
}
