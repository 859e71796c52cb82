//! The admin address: metrics, readiness, and what is routed.

use crate::{names::Name, observe, resolve::Resolved, routable, snapshot::Current};
use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    HeaderMap, Method, Request, Response, StatusCode,
    body::Incoming,
    header::{self, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::registry::Registry;
use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, mpsc, oneshot},
    time::timeout,
};

/// Callers at once; further ones wait.
const MAX_CONNECTIONS: usize = 64;
/// How long a worker may take to say that it serves; it does nothing else that takes longer than a moment.
const WORKER_TIMEOUT: Duration = Duration::from_millis(200);
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const JSON: &str = "application/json";
const TEXT: &str = "text/plain; charset=utf-8";

/// What is served.
#[derive(Debug)]
pub(crate) struct Admin {
    registry: Registry,
    ready: AtomicBool,
    workers: Vec<Worker>,
    routable: Routable,
}

/// What is told of what is routed.
#[derive(Debug)]
pub(crate) struct Routable {
    pub(crate) snapshot: Arc<Current>,
    /// Names that are listened on by themselves.
    pub(crate) names: Arc<[Name]>,
    pub(crate) resolved: Arc<Resolved>,
}

/// How a worker is asked whether it serves: it answers when it has told the kernel so too.
pub(crate) type Worker = mpsc::UnboundedSender<oneshot::Sender<()>>;

impl Admin {
    /// Not ready yet; `workers` are those that all have to serve.
    pub(crate) fn new(registry: Registry, workers: Vec<Worker>, routable: Routable) -> Self {
        Self { registry, ready: AtomicBool::new(false), workers, routable }
    }

    /// Says whether new connections are welcome.
    pub(crate) fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Relaxed);
    }

    /// Whether new connections are welcome, and every worker serves.
    async fn is_ready(&self) -> bool {
        let ask = |worker: &Worker| {
            let (reply, answer) = oneshot::channel();
            worker.send(reply).is_ok().then_some(answer)
        };
        let answers: Option<Vec<_>> = self.workers.iter().map(ask).collect();
        let (true, Some(answers)) = (self.ready.load(Ordering::Relaxed), answers) else { return false };
        let all = async {
            for answer in answers {
                answer.await?;
            }
            Ok::<_, oneshot::error::RecvError>(())
        };
        matches!(timeout(WORKER_TIMEOUT, all).await, Ok(Ok(())))
    }

    async fn respond(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        if request.method() != Method::GET {
            return response(StatusCode::METHOD_NOT_ALLOWED, TEXT, "expected GET\n");
        }
        match request.uri().path() {
            "/ready" if self.is_ready().await => response(StatusCode::OK, TEXT, "ready\n"),
            "/ready" => response(StatusCode::SERVICE_UNAVAILABLE, TEXT, "not ready\n"),
            "/metrics" => match observe::encode(&self.registry) {
                Ok(text) => response(StatusCode::OK, OPEN_METRICS, text),
                Err(_) => {
                    response(StatusCode::INTERNAL_SERVER_ERROR, TEXT, "the metrics cannot be written\n")
                }
            },
            "/routable" => self.routable.respond(request.headers()),
            _ => response(StatusCode::NOT_FOUND, TEXT, "expected /metrics, /ready or /routable\n"),
        }
    }
}

impl Routable {
    /// Unless the caller has it already.
    fn respond(&self, headers: &HeaderMap) -> Response<Full<Bytes>> {
        let Ok(json) = routable::document(&self.snapshot.load(), &self.names, &self.resolved.load()) else {
            return response(StatusCode::INTERNAL_SERVER_ERROR, TEXT, "what is routed cannot be written\n");
        };
        let tag = routable::entity_tag(&json);
        let mut known = headers.get_all(header::IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok());
        let mut response = if known.any(|known| routable::is_known(known, &tag)) {
            response(StatusCode::NOT_MODIFIED, JSON, Bytes::new())
        } else {
            response(StatusCode::OK, JSON, json)
        };
        response.headers_mut().extend(HeaderValue::try_from(tag).ok().map(|tag| (header::ETAG, tag)));
        response
    }
}

/// Serves until the task is dropped.
pub(crate) async fn serve(listener: TcpListener, admin: Arc<Admin>) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!("accept on the admin address: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let admin = Arc::clone(&admin);
        tokio::spawn(async move {
            let service = service_fn(|request| {
                let admin = Arc::clone(&admin);
                async move { Ok::<_, Infallible>(admin.respond(&request).await) }
            });
            let mut builder = http1::Builder::new();
            builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_buf_size(16 << 10);
            if let Err(error) = builder.serve_connection(TokioIo::new(stream), service).await {
                tracing::debug!("admin connection: {error}");
            }
            drop(place);
        });
    }
}

fn response(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
