//! The socket at which proxies ask for origins: for a process in the proxy's cgroup, or root, and limited in everything.
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/origins/{tcp,udp}?client=ADDRESS:PORT&destination=ADDRESS:PORT` | [`Origin`](super::Origin) |
//! | `GET /v1/origins/{tcp,udp}?client=ADDRESS:PORT&proxy=ADDRESS:PORT` | [`Origin`](super::Origin) |

use super::{Finder, Protocol, Question, Snapshot, To};
use crate::{
    http::{self, json, refuse},
    workload::Workloads,
};
use bytes::Bytes;
use http_body_util::Full;
use hyper::{Method, Request, Response, StatusCode, Uri, body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::{
    convert::Infallible,
    fs::{self, Permissions},
    io,
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{Semaphore, watch},
};

/// Callers at once: as many as a proxy can have workers. Further ones are turned away, and do well to go on without.
const MAX_CONNECTIONS: usize = 1024;
/// Bytes of a request's head.
const MAX_HEAD: usize = 8 << 10;
/// How long a caller may take for a request's head, and be silent between two requests.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// Where the socket is.
pub(crate) fn path(run: &Path) -> PathBuf {
    run.join("origins.sock")
}

/// See the module.
#[derive(Debug)]
pub(crate) struct OriginsServer {
    listener: UnixListener,
    finder: Arc<Mutex<Finder>>,
    workloads: Workloads,
}

impl OriginsServer {
    /// Binds the socket. Everybody may open it: who is answered is decided by the process that calls.
    pub(crate) fn bind(
        path: &Path,
        snapshots: watch::Receiver<Snapshot>,
        workloads: Workloads,
    ) -> io::Result<Self> {
        let finder = Arc::new(Mutex::new(Finder::open(snapshots)?));
        let listener = http::bind(path)?;
        fs::set_permissions(path, Permissions::from_mode(0o666))?;
        Ok(Self { listener, finder, workloads })
    }

    /// Serves until the task is dropped.
    pub(crate) async fn serve(self) {
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let stream = http::accept(async || self.listener.accept().await).await;
            // Strangers take nobody's place.
            if !self.admits(&stream) {
                continue;
            }
            let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
            let finder = Arc::clone(&self.finder);
            tokio::spawn(async move {
                connection(stream, &finder).await;
                drop(place);
            });
        }
    }

    fn admits(&self, stream: &UnixStream) -> bool {
        let Ok(peer) = stream.peer_cred() else { return false };
        let admitted = peer.uid() == 0 || peer.pid().is_some_and(|pid| self.is_proxy(pid));
        if !admitted {
            tracing::debug!(uid = peer.uid(), pid = peer.pid(), "a caller that is no proxy was turned away");
        }
        admitted
    }

    fn is_proxy(&self, pid: i32) -> bool {
        let cgroup = self.workloads.cgroup_of(pid);
        cgroup.is_ok_and(|cgroup| locked(&self.finder).is_proxy(&cgroup.dir))
    }
}

fn locked(finder: &Mutex<Finder>) -> MutexGuard<'_, Finder> {
    finder.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn connection(stream: UnixStream, finder: &Mutex<Finder>) {
    let service = service_fn(async |request| Ok::<_, Infallible>(respond(&request, finder)));
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_buf_size(MAX_HEAD);
    if let Err(error) = builder.serve_connection(TokioIo::new(stream), service).await {
        tracing::debug!("origins socket: {error}");
    }
}

fn respond(request: &Request<Incoming>, finder: &Mutex<Finder>) -> Response<Full<Bytes>> {
    if request.method() != Method::GET {
        return refuse(StatusCode::METHOD_NOT_ALLOWED, "this path does not know this method");
    }
    let question = match question(request.uri()) {
        Ok(question) => question,
        Err((status, error)) => return refuse(status, &error),
    };
    let found = locked(finder).find(&question);
    match found {
        Ok(Some(origin)) => json(StatusCode::OK, &origin),
        Ok(None) => refuse(StatusCode::NOT_FOUND, "there is no such connection"),
        Err(error) => {
            tracing::debug!(?question, "find an origin: {error}");
            refuse(StatusCode::INTERNAL_SERVER_ERROR, &format!("ask the kernel: {error}"))
        }
    }
}

/// What is asked; else what is wrong with it.
fn question(uri: &Uri) -> Result<Question, (StatusCode, String)> {
    let protocol = match uri.path() {
        "/v1/origins/tcp" => Protocol::Tcp,
        "/v1/origins/udp" => Protocol::Udp,
        _ => return Err((StatusCode::NOT_FOUND, "expected /v1/origins/tcp or /v1/origins/udp".to_owned())),
    };
    let ends = ends(uri.query().unwrap_or_default());
    ends.map(|(client, to)| Question { protocol, client, to })
        .map_err(|error| (StatusCode::BAD_REQUEST, error))
}

fn ends(query: &str) -> Result<(SocketAddr, To), String> {
    let (mut client, mut to) = (None, None);
    for (key, value) in form_urlencoded::parse(query.as_bytes()) {
        let repeated = match &*key {
            "client" => client.replace(address(&value)?).is_some(),
            "destination" => to.replace(To::Destination(address(&value)?)).is_some(),
            "proxy" => to.replace(To::Proxy(address(&value)?)).is_some(),
            _ => return Err(format!("unknown parameter `{}`", key.escape_debug())),
        };
        if repeated {
            return Err("expected each parameter once, and either `destination` or `proxy`".to_owned());
        }
    }
    match (client, to) {
        (Some(client), Some(to @ (To::Destination(other) | To::Proxy(other)))) => {
            let same = client.is_ipv4() == other.is_ipv4();
            same.then_some((client, to)).ok_or_else(|| "expected two addresses of one family".to_owned())
        }
        _ => Err("expected `client`, and `destination` or `proxy`".to_owned()),
    }
}

/// Mapped ones as what they are.
fn address(text: &str) -> Result<SocketAddr, String> {
    let address: Result<SocketAddr, _> = text.parse();
    let address = address.map_err(|_| format!("`{}` is not ADDRESS:PORT", text.escape_debug()))?;
    Ok(SocketAddr::new(address.ip().to_canonical(), address.port()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(uri: &str) -> Result<Question, (StatusCode, String)> {
        question(&uri.parse().unwrap())
    }

    #[test]
    fn questions_are_read_percent_encoded_or_not() {
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        let cases = [
            (
                "/v1/origins/tcp?client=10.77.0.1:43210&destination=10.77.0.10:8080",
                Protocol::Tcp,
                "10.77.0.1:43210",
                To::Destination(at("10.77.0.10:8080")),
            ),
            (
                "/v1/origins/udp?proxy=127.0.0.1%3A15053&client=10.77.0.1%3A43210",
                Protocol::Udp,
                "10.77.0.1:43210",
                To::Proxy(at("127.0.0.1:15053")),
            ),
            (
                "/v1/origins/tcp?client=[fd77::1]:1&proxy=%5B::1%5D:2",
                Protocol::Tcp,
                "[fd77::1]:1",
                To::Proxy(at("[::1]:2")),
            ),
            (
                "/v1/origins/tcp?client=[::ffff:10.0.0.1]:1&destination=10.0.0.2:2",
                Protocol::Tcp,
                "10.0.0.1:1",
                To::Destination(at("10.0.0.2:2")),
            ),
        ];
        for (uri, protocol, client, to) in cases {
            assert_eq!(ask(uri), Ok(Question { protocol, client: at(client), to }), "{uri}");
        }
    }

    #[test]
    fn what_is_no_question_is_told_what_was_expected() {
        let cases = [
            ("/", 404, "expected /v1/origins/tcp"),
            ("/v1/origins/sctp?client=1.1.1.1:1&proxy=1.1.1.1:1", 404, "expected /v1/origins/tcp"),
            ("/v1/origins/tcp", 400, "expected `client`"),
            ("/v1/origins/tcp?client=1.1.1.1:1", 400, "`destination` or `proxy`"),
            ("/v1/origins/tcp?client=1.1.1.1:1&client=1.1.1.1:1", 400, "each parameter once"),
            ("/v1/origins/tcp?client=1.1.1.1:1&proxy=1.1.1.1:1&destination=1.1.1.1:1", 400, "either"),
            ("/v1/origins/tcp?client=1.1.1.1:1&proxy=[::1]:1", 400, "one family"),
            ("/v1/origins/tcp?client=localhost:1&proxy=1.1.1.1:1", 400, "not ADDRESS:PORT"),
            ("/v1/origins/tcp?client=1.1.1.1:99999", 400, "not ADDRESS:PORT"),
            ("/v1/origins/tcp?colour=red", 400, "unknown parameter `colour`"),
            ("/v1/origins/tcp?client=%00%FF&&&=%", 400, "not ADDRESS:PORT"),
        ];
        for (uri, status, says) in cases {
            let (got, error) = ask(uri).unwrap_err();
            assert_eq!(got.as_u16(), status, "{uri}");
            assert!(error.contains(says), "{uri}: {error}");
        }
    }

    #[test]
    fn a_question_is_understood_as_it_is_written_or_told_in_one_line_what_was_expected() {
        let seeds = [
            "client=10.77.0.1:43210&destination=10.77.0.10:8080",
            "proxy=127.0.0.1%3A15053&client=%5Bfd77::1%5D%3A1",
        ]
        .map(str::as_bytes);
        let words = [
            "&",
            "=",
            "%",
            "%00",
            "%0a",
            "+",
            "client",
            "proxy",
            "destination",
            "::1",
            "[",
            "]",
            "%25eth0",
            "::ffff:1.2.3.4",
        ];
        fuzz::damaged!(seeds, words, |input: &[u8]| {
            match ends(&String::from_utf8_lossy(input)) {
                Ok((client, to)) => {
                    let (key, other) = match to {
                        To::Destination(other) => ("destination", other),
                        To::Proxy(other) => ("proxy", other),
                    };
                    assert_eq!(client.is_ipv4(), other.is_ipv4());
                    let again = format!("client={client}&{key}={other}").replace('%', "%25");
                    assert_eq!(ends(&again), Ok((client, to)), "{again}");
                }
                Err(error) => assert!(!error.contains(char::is_control), "{error:?}"),
            }
        });
    }
}
