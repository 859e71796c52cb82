//! The admin address: metrics and readiness.

use crate::observe;
use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode, body::Incoming, header, server::conn::http1, service::service_fn,
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
use tokio::{net::TcpListener, sync::Semaphore};

/// Callers at once; further ones wait.
const MAX_CONNECTIONS: usize = 64;
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const TEXT: &str = "text/plain; charset=utf-8";

/// What is served.
#[derive(Debug)]
pub(crate) struct Admin {
    registry: Registry,
    ready: AtomicBool,
}

impl Admin {
    /// Not ready yet.
    pub(crate) fn new(registry: Registry) -> Self {
        Self { registry, ready: AtomicBool::new(false) }
    }

    /// Says whether new connections are welcome.
    pub(crate) fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Relaxed);
    }

    fn respond(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        if request.method() != Method::GET {
            return response(StatusCode::METHOD_NOT_ALLOWED, TEXT, "expected GET\n");
        }
        match request.uri().path() {
            "/ready" if self.ready.load(Ordering::Relaxed) => response(StatusCode::OK, TEXT, "ready\n"),
            "/ready" => response(StatusCode::SERVICE_UNAVAILABLE, TEXT, "not ready\n"),
            "/metrics" => match observe::encode(&self.registry) {
                Ok(text) => response(StatusCode::OK, OPEN_METRICS, text),
                Err(_) => {
                    response(StatusCode::INTERNAL_SERVER_ERROR, TEXT, "the metrics cannot be written\n")
                }
            },
            _ => response(StatusCode::NOT_FOUND, TEXT, "expected /metrics or /ready\n"),
        }
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
                let response = admin.respond(&request);
                async { Ok::<_, Infallible>(response) }
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
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}
