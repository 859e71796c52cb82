//! What the proxy says at its admin address: whether it is ready (`GET /ready`, as Envoy has it too), and what it routes
//! (`GET /routable`).

use crate::routable::{Name, Routable};
use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

/// How long the proxy may take to say it, whole: it must not hold up who asks by saying it slowly.
const PATIENCE: Duration = Duration::from_millis(300);
/// Bytes of an answer: what ten thousand services with ten endpoints each take.
const MAX_ANSWER: u64 = 16 << 20;
/// How an answer of success begins, in any version of HTTP/1.
const SUCCESS: [&[u8]; 2] = [b"HTTP/1.1 200", b"HTTP/1.0 200"];
/// And how one that says that nothing has changed (RFC 9110 §15.4.5).
const NOT_MODIFIED: &[u8] = b"HTTP/1.1 304";

/// Bytes of an answer that is one word.
const MAX_WORD: u64 = 4 << 10;

/// Asks it.
pub(crate) fn says_ready(admin: SocketAddr) -> bool {
    get(admin, "/ready", "", MAX_WORD).is_ok_and(|answer| answer.is_modified)
}

/// What it can route, and by which tag it knows that; none where it is still what it gave the tag for.
pub(crate) fn routable(admin: SocketAddr, known: Option<&str>) -> io::Result<Option<(Routable, String)>> {
    let condition = known.map(|tag| format!("if-none-match: {tag}\r\n")).unwrap_or_default();
    let Answer { head, body, is_modified } = get(admin, "/routable", &condition, MAX_ANSWER)?;
    if !is_modified {
        return Ok(None);
    }
    Ok(Some((Routable::parse(&body)?, tag(&head))))
}

fn tag(head: &str) -> String {
    let tag = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("etag").then(|| value.trim())
    });
    // It is sent back in a head of ours, which it must not end (RFC 9110 §8.8.3 for what it is made of).
    tag.filter(|tag| tag.bytes().all(|byte| byte.is_ascii_graphic())).unwrap_or_default().to_owned()
}

/// Asks for the names that it listens for.
pub(crate) fn names(admin: SocketAddr) -> io::Result<Vec<Name>> {
    let said = routable(admin, None)?;
    said.map(|(routable, _)| routable.names()).transpose().map(Option::unwrap_or_default)
}

/// A success.
struct Answer {
    head: String,
    body: Vec<u8>,
    is_modified: bool,
}

fn get(admin: SocketAddr, path: &str, condition: &str, limit: u64) -> io::Result<Answer> {
    let deadline = Instant::now() + PATIENCE;
    let mut stream = TcpStream::connect_timeout(&admin, PATIENCE)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: {admin}\r\n{condition}connection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    parse(read_until(&mut stream, deadline, limit)?)
}

fn parse(mut answer: Vec<u8>) -> io::Result<Answer> {
    let is_modified = !answer.starts_with(NOT_MODIFIED);
    let success = !is_modified || SUCCESS.iter().any(|success| answer.starts_with(success));
    let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n").filter(|_| success);
    let end = end.ok_or_else(|| io::Error::other("it does not answer with success"))?;
    let body = answer.split_off(end + 4);
    Ok(Answer { head: String::from_utf8_lossy(&answer).into_owned(), body, is_modified })
}

/// Everything up to the end, or an error where it does not come in time or is longer than it may be.
fn read_until(stream: &mut TcpStream, deadline: Instant, limit: u64) -> io::Result<Vec<u8>> {
    let mut answer = Vec::new();
    let mut chunk = vec![0; 64 << 10];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Zero would mean for ever.
        stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        match stream.read(&mut chunk)? {
            0 => return Ok(answer),
            _ if left.is_zero() => return Err(io::ErrorKind::TimedOut.into()),
            len if answer.len() as u64 + len as u64 > limit => {
                return Err(io::Error::other(format!("its answer is longer than {limit} bytes")));
            }
            len => answer.extend(&chunk[..len]),
        }
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
    fn an_answer_that_dribbles_is_not_waited_for() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let admin = listener.local_addr().unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            while stream.write_all(b"H").is_ok() {
                thread::sleep(Duration::from_millis(20));
            }
        });
        let begun = Instant::now();
        assert!(!says_ready(admin));
        assert!(begun.elapsed() < 5 * PATIENCE);
    }

    #[test]
    fn only_a_success_is_ready() {
        assert!(answered(b"HTTP/1.1 200 OK\r\n\r\n"));
        assert!(answered(b"HTTP/1.0 200 OK\r\n\r\n"));
        assert!(!answered(b"HTTP/1.1 503 Service Unavailable\r\n\r\n"));
        assert!(!answered(b"HTTP/1.1 304 Not Modified\r\n\r\n"));
        assert!(!answered(b"HTTP/1.1"));
        assert!(!answered(b""));
    }

    #[test]
    fn an_answer_is_cut_where_its_head_ends_and_its_tag_ends_no_head_of_ours() {
        let seeds: [&[u8]; 3] = [
            b"HTTP/1.1 200 OK\r\netag: \"00af\"\r\ncontent-length: 2\r\n\r\n{}",
            b"HTTP/1.0 200 OK\r\n\r\n",
            b"HTTP/1.1 304 Not Modified\r\nETag: W/\"1\"\r\n\r\n",
        ];
        let words =
            ["HTTP/1.1 200", "HTTP/1.1 304", "\r\n\r\n", "\r", "etag:", "ETAG", ":", "\"", "x: y\r\n"];
        fuzz::damaged!(seeds, words, |input: &[u8]| {
            let Ok(Answer { head, body, is_modified }) = parse(input.to_vec()) else { return };
            assert!(input.ends_with(&body) && input.starts_with(b"HTTP/1."));
            assert_eq!(is_modified, !input.starts_with(NOT_MODIFIED));
            assert_eq!(head.find("\r\n\r\n"), Some(head.len() - 4));
            assert!(tag(&head).bytes().all(|byte| byte.is_ascii_graphic()));
        });
    }
}
