//! Metrics for whoever scrapes them: at the control socket, and where the configuration says so at an address, for
//! everybody who can reach it.

use crate::{
    daemon::Request,
    http::{self, Place, Places, refuse},
};
use bytes::Bytes;
use http_body_util::Full;
use hyper::{Method, Response, StatusCode, body::Incoming, header};
use std::{
    net::SocketAddr,
    sync::{Arc, mpsc::Sender},
    time::{Duration, Instant},
};
use tokio::{
    net::TcpListener,
    sync::{Mutex, oneshot},
    time::{sleep, timeout},
};

/// Scrapers at once; whoever takes longest makes room for further ones.
const MAX_SCRAPERS: usize = 16;
/// How long a scraper may take, with all that it asks for.
const SCRAPE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the daemon's mind may take, which has other things to do.
const MIND_TIMEOUT: Duration = Duration::from_secs(5);
/// What was told so recently is told again: no number of scrapers keeps the daemon from its work.
const FRESH: Duration = Duration::from_secs(1);
/// How often it is tried to listen where that is not possible yet.
const RETRY: Duration = Duration::from_secs(5);
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// See the module.
#[derive(Debug)]
pub(crate) struct Exporter {
    requests: Sender<Request>,
    last: Mutex<Option<(Instant, Bytes)>>,
}

impl Exporter {
    /// Of what the daemon's mind knows.
    pub(crate) fn new(requests: Sender<Request>) -> Self {
        Self { requests, last: Mutex::default() }
    }

    /// The answer to `GET /metrics`.
    pub(crate) async fn respond(&self) -> Response<Full<Bytes>> {
        match self.text().await {
            Ok(text) => {
                let mut response = Response::new(Full::new(text));
                let kind = header::HeaderValue::from_static(OPEN_METRICS);
                response.headers_mut().insert(header::CONTENT_TYPE, kind);
                response
            }
            Err(error) => refuse(StatusCode::SERVICE_UNAVAILABLE, &error),
        }
    }

    /// One scraper asks, and the others wait for what it is told.
    async fn text(&self) -> Result<Bytes, String> {
        let mut last = self.last.lock().await;
        if let Some((at, text)) = &*last
            && at.elapsed() < FRESH
        {
            return Ok(text.clone());
        }
        let (reply, answer) = oneshot::channel();
        let stopping = || "the daemon is stopping".to_owned();
        self.requests.send(Request::Metrics(reply)).map_err(|_| stopping())?;
        let answer = timeout(MIND_TIMEOUT, answer).await.map_err(|_| "the daemon is busy".to_owned())?;
        let measured = answer.map_err(|_| stopping())?.map_err(|error| error.to_string())?;
        let text = measured.encode().map_err(|_| "the metrics cannot be written".to_owned())?;
        let (_, text) = last.insert((Instant::now(), text.into()));
        Ok(text.clone())
    }
}

/// Serves at an address until the task is dropped. Steering does not depend on it.
pub(crate) async fn serve(address: SocketAddr, exporter: Arc<Exporter>) {
    let listener = bind(address).await;
    tracing::info!(%address, "metrics are served");
    let places = Places::new(MAX_SCRAPERS);
    loop {
        let place = places.take().await;
        let stream = http::accept(async || listener.accept().await).await;
        let exporter = Arc::clone(&exporter);
        tokio::spawn(async move {
            http::serve(stream, SCRAPE_TIMEOUT, &place, |request| respond(request, &exporter, &place)).await;
        });
        http::give_others_a_turn().await;
    }
}

/// An address that is not this host's yet, or another's still, is waited for.
async fn bind(address: SocketAddr) -> TcpListener {
    let mut is_said = false;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return listener,
            Err(error) if !is_said => {
                tracing::warn!("metrics cannot be served at {address}: {error}; tried again every {RETRY:?}");
                is_said = true;
            }
            Err(_) => {}
        }
        sleep(RETRY).await;
    }
}

async fn respond(
    request: hyper::Request<Incoming>,
    exporter: &Exporter,
    place: &Place,
) -> Response<Full<Bytes>> {
    match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => place.while_busy(exporter.respond()).await,
        (_, "/metrics") => refuse(StatusCode::METHOD_NOT_ALLOWED, "expected GET"),
        _ => refuse(StatusCode::NOT_FOUND, "expected /metrics"),
    }
}
