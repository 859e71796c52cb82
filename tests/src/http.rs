//! The least HTTP/1.1 client: one request on one connection.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// What a server answered.
#[derive(Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The body, as far as it is text.
    pub body: String,
}

/// How long a server may be silent.
const PATIENCE: Duration = Duration::from_secs(10);

/// `GET path` on a connection of its own.
///
/// # Errors
/// When the connection fails or what comes back is not a whole HTTP response.
pub fn get(server: SocketAddr, host: &str, path: &str) -> io::Result<Answer> {
    ask(TcpStream::connect_timeout(&server, PATIENCE)?, host, path)
}

/// `GET path` on a given connection, which the server is asked to close.
///
/// # Errors
/// When the connection fails or what comes back is not a whole HTTP response.
pub fn ask(mut stream: TcpStream, host: &str, path: &str) -> io::Result<Answer> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(request(host, path).as_bytes())?;
    answer(stream)
}

/// The request that [`ask`] sends.
pub fn request(host: &str, path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n")
}

/// Reads the answer to a request that asked to close the connection.
///
/// # Errors
/// When the connection fails or what comes back is not a whole HTTP response.
pub fn answer(mut stream: TcpStream) -> io::Result<Answer> {
    let mut response = String::new();
    stream.read_to_string(&mut response)?;
    parse(&response)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("not HTTP: {response:?}")))
}

fn parse(response: &str) -> Option<Answer> {
    let (head, body) = response.split_once("\r\n\r\n")?;
    let status = head.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()?;
    let lower = head.to_ascii_lowercase();
    let length = lower.split("content-length: ").nth(1).and_then(|rest| rest.lines().next()?.parse().ok());
    (length.is_none_or(|length: usize| length == body.len()))
        .then(|| Answer { status, body: body.to_owned() })
}
