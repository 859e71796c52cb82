//! Getting a request to an endpoint, and its response's head back.

use super::failure::Failure;
use crate::{
    cluster::Cluster,
    pool::{Body, Lease, Pool},
    tunnel,
};
use http::{Method, Request, Response};
use http_body::Body as _;
use http_body_util::{Either, Empty};
use hyper::body::Incoming;
use std::{io, net::SocketAddr, time::Duration};

/// How long the original destination of a request may take to accept.
const ORIGINAL_CONNECT_TIMEOUT: Duration = tunnel::CONNECT_TIMEOUT;

/// An endpoint's answer, and the connection it comes over.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) response: Response<Incoming>,
    pub(super) lease: Lease,
    pub(super) endpoint: SocketAddr,
}

/// How an attempt ended.
enum Attempt {
    Answered(Answer),
    /// Nothing was sent: another endpoint may get it.
    Unsent(Request<Body>),
    Failed(Failure),
}

/// Sends a request to the endpoint whose turn it is; to the next one as long as nothing was sent.
pub(super) async fn to_cluster(
    pool: &Pool,
    cluster: &Cluster,
    mut request: Request<Body>,
) -> Result<Answer, Failure> {
    for endpoint in cluster.endpoints() {
        let connect = async || {
            let connected = pool.connect(endpoint, cluster.connect_timeout).await;
            match &connected {
                Ok(_) => cluster.upstream.connected.inc(),
                Err(error) if error.kind() == io::ErrorKind::TimedOut => cluster.upstream.timed_out.inc(),
                Err(_) => cluster.upstream.failed.inc(),
            };
            connected
        };
        match to_endpoint(pool, endpoint, request, connect).await {
            Attempt::Answered(answer) => return Ok(answer),
            Attempt::Unsent(unsent) => request = unsent,
            Attempt::Failed(failure) => return Err(failure),
        }
    }
    Err(Failure::NoConnection(cluster.name.clone()))
}

/// Sends a request to where it was going.
pub(super) async fn to_original(
    pool: &Pool,
    destination: SocketAddr,
    request: Request<Body>,
) -> Result<Answer, Failure> {
    let connect = async || pool.connect(destination, ORIGINAL_CONNECT_TIMEOUT).await;
    match to_endpoint(pool, destination, request, connect).await {
        Attempt::Answered(answer) => Ok(answer),
        Attempt::Unsent(_) => Err(Failure::NoConnection(destination.to_string())),
        Attempt::Failed(failure) => Err(failure),
    }
}

/// Over connections that wait, as long as they turn out to be closed; then over a new one.
async fn to_endpoint(
    pool: &Pool,
    endpoint: SocketAddr,
    mut request: Request<Body>,
    connect: impl AsyncFn() -> io::Result<Lease>,
) -> Attempt {
    while let Some(lease) = pool.take(endpoint) {
        // A waiting connection may have been closed while the request was under way to it. What changes nothing when
        // it comes twice (RFC 9110 §9.2.2) and has no body is kept for that case.
        let again = replay(&request);
        match over(lease, endpoint, request).await {
            Attempt::Unsent(unsent) => request = unsent,
            Attempt::Failed(Failure::Ended(error)) => match again {
                Some(again) => request = again,
                None => return Attempt::Failed(Failure::Ended(error)),
            },
            answered => return answered,
        }
    }
    match connect().await {
        Ok(lease) => over(lease, endpoint, request).await,
        Err(error) => {
            tracing::debug!(%endpoint, "connect: {error}");
            Attempt::Unsent(request)
        }
    }
}

async fn over(mut lease: Lease, endpoint: SocketAddr, request: Request<Body>) -> Attempt {
    match lease.send(request).await {
        Ok(response) => Attempt::Answered(Answer { response, lease, endpoint }),
        Err(unanswered) => match unanswered.unsent {
            Some(request) => Attempt::Unsent(request),
            // The one error of the user's, here, is that of the body it gave.
            None if unanswered.error.is_user() => Attempt::Failed(Failure::BadBody),
            None => Attempt::Failed(Failure::Ended(unanswered.error)),
        },
    }
}

fn replay(request: &Request<Body>) -> Option<Request<Body>> {
    let idempotent = [Method::GET, Method::HEAD, Method::OPTIONS, Method::TRACE, Method::PUT, Method::DELETE];
    if !request.body().is_end_stream() || !idempotent.contains(request.method()) {
        return None;
    }
    let mut again = Request::new(Either::Right(Empty::new()));
    *again.method_mut() = request.method().clone();
    *again.uri_mut() = request.uri().clone();
    *again.headers_mut() = request.headers().clone();
    // The case in which the headers were written.
    *again.extensions_mut() = request.extensions().clone();
    Some(again)
}
