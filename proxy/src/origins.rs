//! What the kernel does not tell a process without privilege, the agent does: with nftables, which service made a
//! connection, and where a datagram was going.
//!
//! Nothing depends on an answer. The agent gets a moment for it, and after a failure is left alone for a while.

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use std::{
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use tokio::{net::UnixStream, sync::Semaphore, time::timeout};

/// How long an answer may take, with all that it needs.
const TIMEOUT: Duration = Duration::from_millis(200);
/// How long nobody is asked after a failure.
const PAUSE: Duration = Duration::from_secs(1);
/// A connection that waited this long is not used again: the agent closes it soon.
const IDLE_TIMEOUT: Duration = Duration::from_secs(5);
/// Questions of a thread that are asked at once; further ones wait.
const MAX_CONNECTIONS: usize = 8;
/// Bytes of an answer.
const MAX_ANSWER: usize = 4 << 10;

type Sender = SendRequest<Empty<Bytes>>;

/// One for each worker, and one for DNS.
#[derive(Debug)]
pub(crate) struct Origins {
    socket: PathBuf,
    places: Semaphore,
    idle: Mutex<Vec<(Sender, Instant)>>,
    paused_until: Mutex<Option<Instant>>,
}

/// What the agent answers, as far as it matters here.
#[derive(Debug, PartialEq, Eq, Deserialize)]
struct Answer {
    destination: SocketAddr,
    service: Option<String>,
}

impl Origins {
    /// For an agent that answers at this socket, if one does.
    pub(crate) fn at(socket: PathBuf) -> Self {
        let places = Semaphore::new(MAX_CONNECTIONS);
        Self { socket, places, idle: Mutex::default(), paused_until: Mutex::default() }
    }

    /// The service that made a connection, by the two ends that it has here.
    pub(crate) async fn tcp(&self, client: SocketAddr, proxy: SocketAddr) -> Option<String> {
        self.ask("tcp", client, proxy).await?.service
    }

    /// Where a datagram was going that came from `client` to `proxy`.
    pub(crate) async fn udp(&self, client: SocketAddr, proxy: SocketAddr) -> Option<SocketAddr> {
        Some(self.ask("udp", client, proxy).await?.destination)
    }

    async fn ask(&self, protocol: &str, client: SocketAddr, proxy: SocketAddr) -> Option<Answer> {
        if locked(&self.paused_until).is_some_and(|until| Instant::now() < until) {
            return None;
        }
        let asked = timeout(TIMEOUT, self.exchange(&target(protocol, client, proxy))).await;
        asked.unwrap_or_else(|elapsed| Err(elapsed.into())).unwrap_or_else(|error| {
            tracing::debug!(socket = %self.socket.display(), "ask for an origin: {error}");
            *locked(&self.paused_until) = Some(Instant::now() + PAUSE);
            None
        })
    }

    /// None where the agent knows no such connection.
    async fn exchange(&self, target: &str) -> io::Result<Option<Answer>> {
        let _place = self.places.acquire().await.map_err(io::Error::other)?;
        // One that waited may have been closed meanwhile.
        if let Some(sender) = self.waiting()
            && let Ok((status, body)) = self.send(sender, target).await
        {
            return answer(status, &body);
        }
        let (status, body) = self.send(self.connect().await?, target).await?;
        answer(status, &body)
    }

    /// The connection that was used last. Those that waited too long are closed.
    fn waiting(&self) -> Option<Sender> {
        let mut idle = locked(&self.idle);
        idle.retain(|(sender, since)| !sender.is_closed() && since.elapsed() < IDLE_TIMEOUT);
        idle.pop().map(|(sender, _)| sender)
    }

    async fn send(&self, mut sender: Sender, target: &str) -> io::Result<(StatusCode, Bytes)> {
        let request = Request::get(target).header(header::HOST, "mesh-redirect").body(Empty::new());
        let request = request.map_err(io::Error::other)?;
        sender.ready().await.map_err(io::Error::other)?;
        let response = sender.send_request(request).await.map_err(io::Error::other)?;
        let status = response.status();
        let body =
            Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(io::Error::other)?;
        locked(&self.idle).push((sender, Instant::now()));
        Ok((status, body.to_bytes()))
    }

    async fn connect(&self) -> io::Result<Sender> {
        let stream = UnixStream::connect(&self.socket).await?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!("connection to the agent: {error}");
            }
        });
        Ok(sender)
    }
}

/// What a panic left behind is as good as any other: a connection, or a moment.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Without the scope of an address, which no question has a place for.
fn target(protocol: &str, client: SocketAddr, proxy: SocketAddr) -> String {
    let [client, proxy] = [client, proxy].map(|end| SocketAddr::new(end.ip(), end.port()));
    format!("/v1/origins/{protocol}?client={client}&proxy={proxy}")
}

fn answer(status: StatusCode, body: &[u8]) -> io::Result<Option<Answer>> {
    match status {
        StatusCode::OK => Ok(Some(serde_json::from_slice(body)?)),
        StatusCode::NOT_FOUND => Ok(None),
        status => Err(io::Error::other(format!("the agent answers {status}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::{Read as _, Write as _},
        net::{Ipv6Addr, SocketAddrV6},
        os::unix::net::UnixListener,
        thread,
    };
    use tokio::task::LocalSet;

    const CLIENT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 43210);
    const GOOD: &str = r#"{"destination": "10.0.0.7:80", "service": "shop", "uid": 0, "cgroup": 9}"#;

    /// Answers each connection's requests with these, in order, and then says nothing.
    fn with_agent(answers: Vec<Vec<String>>, test: impl AsyncFnOnce(&Origins)) {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("origins.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let agent = thread::spawn(move || {
            for answers in answers {
                let (mut stream, _) = listener.accept().unwrap();
                for answer in answers {
                    let mut request = [0; 1024];
                    let len = stream.read(&mut request).unwrap();
                    let expected =
                        b"GET /v1/origins/tcp?client=127.0.0.1:43210&proxy=127.0.0.1:43210 HTTP/1.1\r\n";
                    assert!(request[..len].starts_with(expected));
                    stream.write_all(answer.as_bytes()).unwrap();
                }
                // Until the other end closes.
                while stream.read(&mut [0; 1024]).is_ok_and(|read| read > 0) {}
            }
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        LocalSet::new().block_on(&runtime, async {
            let origins = Origins::at(socket);
            test(&origins).await;
        });
        drop(runtime);
        agent.join().unwrap();
    }

    fn response(status: &str, body: &str) -> String {
        format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}", body.len())
    }

    #[test]
    fn questions_share_a_connection_and_no_such_connection_is_no_failure() {
        let answers = vec![response("404 Not Found", r#"{"error": "none"}"#), response("200 OK", GOOD)];
        with_agent(vec![answers], async |origins| {
            assert_eq!(origins.tcp(CLIENT, CLIENT).await, None);
            assert_eq!(origins.tcp(CLIENT, CLIENT).await.as_deref(), Some("shop"));
        });
    }

    #[test]
    fn a_connection_that_was_closed_while_it_waited_is_no_failure() {
        let answer = response("200 OK", GOOD);
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("origins.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let agent = thread::spawn(move || {
            for _ in 0..2 {
                let (mut stream, _) = listener.accept().unwrap();
                let _request = stream.read(&mut [0; 1024]).unwrap();
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        LocalSet::new().block_on(&runtime, async {
            let origins = Origins::at(socket);
            for _ in 0..2 {
                assert_eq!(origins.tcp(CLIENT, CLIENT).await.as_deref(), Some("shop"));
            }
        });
        agent.join().unwrap();
    }

    #[test]
    fn after_a_failure_nobody_is_asked_for_a_while() {
        let failures = [
            response("500 Internal Server Error", ""),
            response("200 OK", "nonsense"),
            response("200 OK", &format!("{}{GOOD}", " ".repeat(MAX_ANSWER))),
            "nonsense\r\n\r\n".to_owned(),
        ];
        for failure in failures {
            with_agent(vec![vec![failure.clone()], vec![response("200 OK", GOOD)]], async |origins| {
                assert_eq!(origins.tcp(CLIENT, CLIENT).await, None, "{failure}");
                assert_eq!(origins.tcp(CLIENT, CLIENT).await, None, "{failure}");
                *locked(&origins.paused_until) = None;
                locked(&origins.idle).clear();
                assert_eq!(origins.tcp(CLIENT, CLIENT).await.as_deref(), Some("shop"), "{failure}");
            });
        }
    }

    #[test]
    fn an_agent_that_is_silent_or_absent_delays_nothing_for_long() {
        let began = Instant::now();
        with_agent(vec![vec![]], async |origins| {
            assert_eq!(origins.tcp(CLIENT, CLIENT).await, None);
            assert_eq!(origins.tcp(CLIENT, CLIENT).await, None);
        });
        assert!((TIMEOUT..TIMEOUT * 2).contains(&began.elapsed()), "{:?}", began.elapsed());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let origins = Origins::at("/nonexistent/origins.sock".into());
        assert_eq!(runtime.block_on(origins.tcp(CLIENT, CLIENT)), None);
        assert!(locked(&origins.paused_until).is_some());
    }

    #[test]
    fn a_target_has_no_scope() {
        let scoped = SocketAddrV6::new(Ipv6Addr::LOCALHOST, 1, 0, 7).into();
        let target = target("udp", scoped, scoped);
        assert_eq!(target, "/v1/origins/udp?client=[::1]:1&proxy=[::1]:1");
        target.parse::<http::Uri>().unwrap();
    }
}
