//! The life of an HTTP/1.1 connection: each request routed, sent, and its response streamed back.

mod body;
mod failure;
mod headers;
mod upstream;

use crate::{context::Context, observe::Recorder, pool::Body, rewind::Rewind, target::Target};
use body::UpstreamBody;
use bytes::Bytes;
use failure::Failure;
use http::{HeaderValue, Method, Request, Response, Uri, Version, header::HOST};
use http_body_util::{Either, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn, upgrade::OnUpgrade};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::{
    convert::Infallible,
    pin::pin,
    time::{Duration, Instant},
};
use upstream::Answer;

/// Longest head of a request.
const MAX_HEAD: usize = 64 << 10;
const MAX_HEADERS: usize = 128;
/// How long a connection may stay without a whole request's head. A client of ours thinks it speaks with a server of
/// its own choice: closing early would be a change that it can see.
const IDLE_TIMEOUT: Duration = Duration::from_secs(3600);

/// What answers a request: an endpoint, or this proxy.
type AnswerBody = Either<UpstreamBody, Full<Bytes>>;

/// Serves a connection until it ends, or until this process does and the open request is answered.
pub(crate) async fn serve(context: &Context, recorder: Recorder, target: Option<Target<'_>>, stream: Rewind) {
    let exchange = Exchange { context, recorder, target };
    let service = service_fn(|request| async { Ok::<_, Infallible>(exchange.answer(request).await) });
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE_TIMEOUT)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD)
        .preserve_header_case(true)
        .auto_date_header(false)
        .half_close(true);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service).with_upgrades());
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = context.draining() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!("client connection: {error}");
    }
}

/// The requests of one connection.
struct Exchange<'a> {
    context: &'a Context,
    recorder: Recorder,
    target: Option<Target<'a>>,
}

impl Exchange<'_> {
    async fn answer(&self, request: Request<Incoming>) -> Response<AnswerBody> {
        match self.forward(request).await {
            Ok(response) => response.map(Either::Left),
            Err(failure) => {
                tracing::debug!("{failure}");
                self.recorder.failed(failure.flag());
                failure.response().map(Either::Right)
            }
        }
    }

    async fn forward(&self, mut request: Request<Incoming>) -> Result<Response<UpstreamBody>, Failure> {
        let begun = Instant::now();
        if !headers::is_plainly_framed(request.headers()) {
            return Err(Failure::BadCoding);
        }
        let upgrade = headers::is_upgrade(request.headers());
        let client = upgrade.then(|| hyper::upgrade::on(&mut request));
        headers::strip_hop_by_hop(request.headers_mut(), upgrade);
        let host = to_origin_form(&mut request)?;
        let request = request.map(Either::Left);
        let (cluster, answer) = self.send(host, request).await?;
        if !headers::is_plainly_framed(answer.response.headers()) {
            return Err(Failure::BadAnswer);
        }
        let (name, endpoint) = match &cluster {
            Some(name) => (name.as_str(), Some(answer.endpoint)),
            None => ("original", None),
        };
        self.recorder.answered(name, endpoint, answer.response.status().as_u16(), begun.elapsed());
        Ok(back(answer, client))
    }

    /// To the host's cluster; where it has none, to where the client was going.
    async fn send(
        &self,
        host: Option<String>,
        request: Request<Body>,
    ) -> Result<(Option<String>, Answer), Failure> {
        let snapshot = self.context.snapshot.load();
        let named = match self.target {
            Some(Target::Name(name)) => snapshot.routes.find(name),
            Some(Target::Origin(_)) | None => None,
        };
        let cluster = host.as_deref().and_then(|host| snapshot.routes.find(host)).or(named).cloned();
        drop(snapshot);
        let pool = &self.context.pool;
        match (cluster, self.target, host) {
            (Some(cluster), _, _) => {
                let answer = upstream::to_cluster(pool, &cluster, request).await?;
                Ok((Some(cluster.name.clone()), answer))
            }
            (None, Some(Target::Origin(origin)), _) if self.context.is_own(origin) => Err(Failure::Loop),
            (None, Some(Target::Origin(origin)), _) => {
                Ok((None, upstream::to_original(pool, origin, request).await?))
            }
            (None, _, Some(host)) => Err(Failure::NoRoute(host)),
            (None, _, None) => Err(Failure::NoHost),
        }
    }
}

/// Makes a request what an origin server expects (RFC 9112 §3.2.1), and tells its host.
fn to_origin_form(request: &mut Request<Incoming>) -> Result<Option<String>, Failure> {
    if request.method() == Method::CONNECT {
        return Err(Failure::BadTarget);
    }
    if request.headers().get_all(HOST).iter().nth(1).is_some() {
        return Err(Failure::ManyHosts);
    }
    *request.version_mut() = Version::HTTP_11;
    let Some(authority) = request.uri().authority().map(|authority| authority.as_str().to_owned()) else {
        let host = request.headers().get(HOST).and_then(|host| host.to_str().ok());
        return Ok(host.map(str::to_owned));
    };
    // An absolute-form target's authority is the host, whatever the header says (RFC 9112 §3.2.2).
    let path = request.uri().path_and_query().map_or("/", |path| path.as_str()).to_owned();
    *request.uri_mut() = Uri::try_from(path).map_err(|_| Failure::BadTarget)?;
    let host = HeaderValue::try_from(&authority).map_err(|_| Failure::BadTarget)?;
    request.headers_mut().insert(HOST, host);
    Ok(Some(authority))
}

/// The response for the client; where both sides agreed to go on in another protocol, they are joined.
fn back(answer: Answer, client: Option<OnUpgrade>) -> Response<UpstreamBody> {
    let Answer { mut response, lease, .. } = answer;
    let upgraded = client.filter(|_| headers::is_upgraded(response.status(), response.headers()));
    headers::strip_hop_by_hop(response.headers_mut(), upgraded.is_some());
    *response.version_mut() = Version::HTTP_11;
    if let Some(client) = upgraded {
        let server = hyper::upgrade::on(&mut response);
        tokio::task::spawn_local(join(client, server));
    }
    response.map(|body| UpstreamBody::new(body, lease))
}

async fn join(client: OnUpgrade, server: OnUpgrade) {
    let (Ok(client), Ok(server)) = tokio::join!(client, server) else { return };
    if let Err(error) =
        tokio::io::copy_bidirectional(&mut TokioIo::new(client), &mut TokioIo::new(server)).await
    {
        tracing::debug!("upgraded connection: {error}");
    }
}
