//! Whether the proxy says that it is ready (`GET /ready` at its admin address, as Envoy has it too).

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

/// How long the proxy may take to say it.
const PATIENCE: Duration = Duration::from_millis(300);
/// How an answer of success begins, in any version of HTTP/1.
const SUCCESS: [&[u8]; 2] = [b"HTTP/1.1 200", b"HTTP/1.0 200"];

/// Asks it.
pub(crate) fn says_ready(admin: SocketAddr) -> bool {
    ask(admin).unwrap_or(false)
}

fn ask(admin: SocketAddr) -> io::Result<bool> {
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
}
