//! What the proxy says at its admin address: whether it is ready (`GET /ready`, as Envoy has it too), and which names it
//! listens for (`GET /names`).

use serde::Deserialize;
use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    time::Duration,
};

/// How long the proxy may take to say it.
const PATIENCE: Duration = Duration::from_millis(300);
/// Bytes of an answer: what thousands of names take.
const MAX_ANSWER: u64 = 4 << 20;
/// How an answer of success begins, in any version of HTTP/1.
const SUCCESS: [&[u8]; 2] = [b"HTTP/1.1 200", b"HTTP/1.0 200"];

/// Asks it.
pub(crate) fn says_ready(admin: SocketAddr) -> bool {
    get(admin, "/ready").is_ok()
}

/// A name that the proxy routes, and listens for at an address of its own.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Name {
    pub(crate) name: String,
    pub(crate) address: Ipv4Addr,
    pub(crate) ports: Vec<u16>,
}

/// Asks for its names.
pub(crate) fn names(admin: SocketAddr) -> io::Result<Vec<Name>> {
    let names: Vec<Name> = serde_json::from_slice(&get(admin, "/names")?)?;
    match names.iter().find(|name| !name.is_sound()) {
        Some(name) => Err(io::Error::other(format!(
            "`{}` at {} is no name for a hosts file",
            name.name.escape_debug(),
            name.address
        ))),
        None => Ok(names),
    }
}

impl Name {
    /// What may stand in a file that root wrote and everybody trusts.
    fn is_sound(&self) -> bool {
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-._".contains(c);
        let name = !self.name.is_empty() && self.name.len() <= 253 && self.name.chars().all(allowed);
        name && self.name != "localhost" && self.address.octets()[..2] == [127, 66]
    }
}

/// The body of a success.
fn get(admin: SocketAddr, path: &str) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&admin, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream
        .write_all(format!("GET {path} HTTP/1.1\r\nhost: {admin}\r\nconnection: close\r\n\r\n").as_bytes())?;
    let mut answer = Vec::new();
    stream.take(MAX_ANSWER).read_to_end(&mut answer)?;
    let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n");
    match end {
        Some(end) if SUCCESS.iter().any(|success| answer.starts_with(success)) => {
            Ok(answer.split_off(end + 4))
        }
        _ => Err(io::Error::other("it does not answer with success")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{net::TcpListener, thread};

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
        let ready = says_ready(admin);
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

    #[test]
    fn a_name_that_could_do_harm_in_a_hosts_file_is_refused() {
        let name =
            |name: &str, address: [u8; 4]| Name { name: name.into(), address: address.into(), ports: vec![] };
        assert!(name("catalog.internal", [127, 66, 1, 1]).is_sound());
        for bad in ["", "a b", "a\nb", "a#b", "Catalog", "localhost", &"x".repeat(254)] {
            assert!(!name(bad, [127, 66, 1, 1]).is_sound(), "{bad}");
        }
        assert!(!name("catalog", [10, 0, 0, 1]).is_sound() && !name("catalog", [127, 0, 0, 1]).is_sound());
    }
}
