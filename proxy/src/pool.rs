//! Connections to endpoints that wait for their next request. One pool for each worker: no locks.

use bytes::Bytes;
use http::Request;
use http_body_util::{Either, Empty};
use hyper::{
    body::Incoming,
    client::conn::http1::{self, SendRequest},
};
use hyper_util::rt::TokioIo;
use std::{
    cell::RefCell,
    collections::HashMap,
    io,
    net::SocketAddr,
    rc::Rc,
    time::{Duration, Instant},
};
use tokio::{net::TcpStream, time::timeout};

/// A connection that waited this long is closed: servers close theirs after about a minute.
const IDLE_TIMEOUT: Duration = Duration::from_secs(50);
/// Connections that wait, for each endpoint.
const MAX_IDLE: usize = 256;

/// What is sent: a client's body, or none when a request is sent once more.
pub(crate) type Body = Either<Incoming, Empty<Bytes>>;
/// A connection's end to which requests are given.
pub(crate) type Sender = SendRequest<Body>;

/// See the module. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pool {
    idle: Rc<RefCell<HashMap<SocketAddr, Vec<Idle>>>>,
}

#[derive(Debug)]
struct Idle {
    sender: Sender,
    since: Instant,
}

/// A connection in use, which goes back to its pool when it is dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    pool: Pool,
    endpoint: SocketAddr,
    sender: Option<Sender>,
}

impl Pool {
    /// The connection to an endpoint that was used last, and that can take a request now.
    pub(crate) fn take(&self, endpoint: SocketAddr) -> Option<Lease> {
        let mut idle = self.idle.borrow_mut();
        let waiting = idle.get_mut(&endpoint)?;
        waiting.retain(|idle| !idle.sender.is_closed());
        let newest_ready = waiting.iter().rposition(|idle| idle.sender.is_ready())?;
        Some(self.lease(endpoint, waiting.remove(newest_ready).sender))
    }

    /// A new connection to an endpoint.
    pub(crate) async fn connect(&self, endpoint: SocketAddr, connect_timeout: Duration) -> io::Result<Lease> {
        let stream = timeout(connect_timeout, TcpStream::connect(endpoint)).await??;
        stream.set_nodelay(true)?;
        let mut builder = http1::Builder::new();
        builder.preserve_header_case(true);
        let (sender, connection) = builder.handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
        tokio::task::spawn_local(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%endpoint, "upstream connection: {error}");
            }
        });
        Ok(self.lease(endpoint, sender))
    }

    /// Closes connections that waited too long, or that the endpoint closed.
    pub(crate) fn sweep(&self) {
        self.idle.borrow_mut().retain(|_, waiting| {
            waiting.retain(|idle| !idle.sender.is_closed() && idle.since.elapsed() < IDLE_TIMEOUT);
            !waiting.is_empty()
        });
    }

    fn lease(&self, endpoint: SocketAddr, sender: Sender) -> Lease {
        Lease { pool: self.clone(), endpoint, sender: Some(sender) }
    }
}

/// A request that was not answered.
#[derive(Debug)]
pub(crate) struct Unanswered {
    /// The request, when none of it was sent.
    pub(crate) unsent: Option<Request<Body>>,
    pub(crate) error: hyper::Error,
}

impl Lease {
    /// Sends a request and waits for the head of its response.
    pub(crate) async fn send(
        &mut self,
        request: Request<Body>,
    ) -> Result<http::Response<Incoming>, Box<Unanswered>> {
        let Some(sender) = self.sender.as_mut() else {
            unreachable!("a lease has its sender until it is dropped")
        };
        sender.try_send_request(request).await.map_err(|mut error| {
            let unsent = error.take_message();
            Box::new(Unanswered { unsent, error: error.into_error() })
        })
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let Some(sender) = self.sender.take().filter(|sender| !sender.is_closed()) else { return };
        let mut idle = self.pool.idle.borrow_mut();
        let waiting = idle.entry(self.endpoint).or_default();
        if waiting.len() < MAX_IDLE {
            waiting.push(Idle { sender, since: Instant::now() });
        }
    }
}
