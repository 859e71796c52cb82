//! Whether the proxy is ready, asked again and again: for modes in which the kernel does not see for itself.

use crate::{config::Proxy, sockets, workload::Workloads};
use std::{
    collections::BTreeSet,
    io::{self, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    thread,
    time::Duration,
};

/// How long the proxy may take to say that it is ready.
const PATIENCE: Duration = Duration::from_millis(300);
/// How an answer of success begins, in any version of HTTP/1.
const SUCCESS: [&[u8]; 2] = [b"HTTP/1.1 200", b"HTTP/1.0 200"];

/// How often it is asked.
const ROUND: Duration = Duration::from_millis(250);

/// Tells for IPv4 and IPv6 whether the proxy takes connections, until nobody wants to know.
pub(crate) fn proxy(proxy: &Proxy, mut workloads: Workloads, mut tell: impl FnMut([bool; 2]) -> bool) {
    while tell(is_ready(proxy, &mut workloads)) {
        thread::sleep(ROUND);
    }
}

/// For IPv4 and IPv6. The proxy is ready when it says so, and the sockets that listen on its port were made in its cgroup.
pub(crate) fn is_ready(proxy: &Proxy, workloads: &mut Workloads) -> [bool; 2] {
    let Some(cgroup) = workloads.cgroup(&proxy.scope) else { return [false; 2] };
    let listens = listening(proxy.port, &cgroup.ids()).unwrap_or_default();
    if listens == [false; 2] || !says_ready(proxy.admin).unwrap_or(false) { [false; 2] } else { listens }
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

fn says_ready(admin: SocketAddr) -> io::Result<bool> {
    let mut stream = TcpStream::connect_timeout(&admin, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream
        .write_all(format!("GET /ready HTTP/1.1\r\nhost: {admin}\r\nconnection: close\r\n\r\n").as_bytes())?;
    let mut start = [0; SUCCESS[0].len()];
    stream.read_exact(&mut start)?;
    Ok(SUCCESS.contains(&&start[..]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn answered(with: &'static [u8]) -> bool {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let admin = listener.local_addr().unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 512];
            let len = stream.read(&mut request).unwrap();
            assert!(request[..len].starts_with(b"GET /ready HTTP/1.1\r\n"));
            stream.write_all(with).unwrap();
        });
        let ready = says_ready(admin).unwrap_or(false);
        server.join().unwrap();
        ready
    }

    #[test]
    fn only_a_success_is_ready() {
        assert!(answered(b"HTTP/1.1 200 OK\r\n\r\n"));
        assert!(answered(b"HTTP/1.0 200 OK\r\n\r\n"));
        assert!(!answered(b"HTTP/1.1 503 Service Unavailable\r\n\r\n"));
        assert!(!answered(b"HTTP/1.1"));
        assert!(!answered(b""));
    }
}
