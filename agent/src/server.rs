//! The control socket: who may speak, how much, and to whom it goes.

use crate::{
    api,
    config::check_name,
    daemon::{self, Request},
    decisions::Lines,
    http::{self, json, refuse},
    plan::PlanError,
};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Either, Full, Limited};
use hyper::{
    Method, Response, StatusCode,
    body::{Body as _, Incoming},
    header::{CONTENT_TYPE, HeaderValue},
    http::request::Parts,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::{Serialize, de::DeserializeOwned};
use std::{
    collections::BTreeSet,
    convert::Infallible,
    future,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::Sender,
    },
    time::Duration,
};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{Semaphore, oneshot},
    time::sleep,
};

/// Callers at once; further ones wait.
const MAX_CONNECTIONS: usize = 64;
/// Bytes of a request's body: as many services as can be enabled, by their longest names.
const MAX_BODY: usize = 512 << 10;
/// Bytes of a request's head.
const MAX_HEAD: usize = 8 << 10;
/// How long a caller may take for its request, and for all of it unless it watches.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(120);

/// Serves until the task is dropped.
pub(crate) async fn serve(listener: UnixListener, requests: Sender<Request>) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let stream = http::accept(&listener).await;
        let requests = requests.clone();
        tokio::spawn(async move {
            connection(stream, requests).await;
            drop(place);
        });
    }
}

async fn connection(stream: UnixStream, requests: Sender<Request>) {
    let Ok(peer) = stream.peer_cred() else { return };
    // The file's mode says the same; this holds also where somebody changed it.
    if peer.uid() != 0 {
        tracing::warn!(uid = peer.uid(), pid = peer.pid(), "a caller that is not root was turned away");
        return;
    }
    let watches = AtomicBool::new(false);
    let service = service_fn(|request| {
        let (requests, watches) = (requests.clone(), &watches);
        async move { Ok::<_, Infallible>(respond(request, peer.pid(), &requests, watches).await) }
    });
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        .keep_alive(false);
    let time_is_up = async {
        sleep(CONNECTION_TIMEOUT).await;
        if watches.load(Ordering::Relaxed) {
            future::pending::<()>().await;
        }
    };
    tokio::select! {
        served = builder.serve_connection(TokioIo::new(stream), service) => {
            served.unwrap_or_else(|error| tracing::debug!("control socket: {error}"));
        }
        () = time_is_up => tracing::debug!("control socket: a caller took too long"),
    }
}

/// A document, or lines without an end.
type Answer = Response<Either<Full<Bytes>, Lines>>;

async fn respond(
    request: hyper::Request<Incoming>,
    pid: Option<i32>,
    requests: &Sender<Request>,
    watches: &AtomicBool,
) -> Answer {
    let (head, body) = request.into_parts();
    if (&head.method, head.uri.path()) != (&Method::GET, "/v1/watch") {
        return answer(&head, body, pid, requests).await.map(Either::Left);
    }
    match watch(head.uri.query().unwrap_or_default(), requests).await {
        Ok(lines) => {
            watches.store(true, Ordering::Relaxed);
            let mut response = Response::new(Either::Right(lines));
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/jsonl"));
            response
        }
        Err(refusal) => refusal.map(Either::Left),
    }
}

async fn watch(query: &str, requests: &Sender<Request>) -> Result<Lines, Response<Full<Bytes>>> {
    let watch = asked(query).map_err(|error| refuse(StatusCode::BAD_REQUEST, &error))?;
    wait(requests, |reply| Request::Watch(watch, reply)).await
}

/// What is to be watched; else what is wrong with it.
fn asked(query: &str) -> Result<api::Watch, String> {
    let (mut services, mut rate) = (BTreeSet::new(), None);
    for (key, value) in form_urlencoded::parse(query.as_bytes()) {
        match &*key {
            "service" => {
                check_name(&value)?;
                services.insert(value.into_owned());
            }
            "rate" if rate.is_none() => rate = Some(value.parse().ok().filter(is_rate).ok_or_else(bad_rate)?),
            _ => return Err(format!("unknown or repeated parameter `{}`", key.escape_debug())),
        }
    }
    Ok(api::Watch { services, rate: rate.unwrap_or(api::Watch::RATE) })
}

fn is_rate(rate: &u32) -> bool {
    (1..=api::Watch::MAX_RATE).contains(rate)
}

fn bad_rate() -> String {
    format!("expected a rate from 1 to {}", api::Watch::MAX_RATE)
}

async fn answer(
    head: &Parts,
    body: Incoming,
    pid: Option<i32>,
    requests: &Sender<Request>,
) -> Response<Full<Bytes>> {
    let parts: Vec<&str> = head.uri.path().trim_start_matches('/').split('/').collect();
    match (&head.method, &parts[..]) {
        (&Method::GET, ["v1", "status"]) => ask(requests, Request::Status).await,
        (_, ["v1", "services", name, ..]) if check_name(name).is_err() => {
            refuse(StatusCode::BAD_REQUEST, &check_name(name).err().unwrap_or_default())
        }
        (&Method::POST, ["v1", "enable"]) => match read(body).await {
            Ok(change) => ask(requests, |reply| Request::Enable(change, reply)).await,
            Err(error) => refuse(StatusCode::BAD_REQUEST, &error),
        },
        (&Method::POST, ["v1", "disable"]) => match read(body).await {
            Ok(change) => ask(requests, |reply| Request::Disable(change, reply)).await,
            Err(error) => refuse(StatusCode::BAD_REQUEST, &error),
        },
        (&Method::POST, ["v1", "connections"]) => match read(body).await {
            Ok(asked) => ask(requests, |reply| Request::Connections(asked, reply)).await,
            Err(error) => refuse(StatusCode::BAD_REQUEST, &error),
        },
        (&Method::POST, ["v1", "reload"]) => match read_or_default(body).await {
            Ok(reload) => ask(requests, |reply| Request::Reload(reload, reply)).await,
            Err(error) => refuse(StatusCode::BAD_REQUEST, &error),
        },
        (&Method::POST, ["v1", "services", name, "commands"]) => match pid {
            Some(pid) => ask(requests, |reply| Request::Join((*name).to_owned(), pid, reply)).await,
            None => refuse(StatusCode::BAD_REQUEST, "the kernel does not tell who is calling"),
        },
        (&Method::POST, ["v1", "services", name, "processes"]) => match read::<api::Process>(body).await {
            Ok(api::Process { pid }) => {
                ask(requests, |reply| Request::Adopt((*name).to_owned(), pid, reply)).await
            }
            Err(error) => refuse(StatusCode::BAD_REQUEST, &error),
        },
        (&Method::POST, ["v1", "services", name, "cgroups"]) => match process(body, pid).await {
            Ok(pid) => ask(requests, |reply| Request::Attach((*name).to_owned(), pid, reply)).await,
            Err(error) => refuse(StatusCode::BAD_REQUEST, &error),
        },
        (&Method::POST, ["v1", "proxy", "cgroups"]) => match pid {
            Some(pid) => ask(requests, |reply| Request::AttachProxy(pid, reply)).await,
            None => refuse(StatusCode::BAD_REQUEST, "the kernel does not tell who is calling"),
        },
        (
            _,
            ["v1", "status" | "enable" | "disable" | "connections" | "reload" | "watch"]
            | ["v1", "proxy", "cgroups"]
            | ["v1", "services", _, "commands" | "cgroups" | "processes"],
        ) => refuse(StatusCode::METHOD_NOT_ALLOWED, "this path does not know this method"),
        _ => refuse(StatusCode::NOT_FOUND, "no such path; see the reference of the control socket"),
    }
}

/// The process that is told of, else the one that is calling.
async fn process(body: Incoming, caller: Option<i32>) -> Result<i32, String> {
    if body.is_end_stream() {
        return caller.ok_or_else(|| "the kernel does not tell who is calling".to_owned());
    }
    read(body).await.map(|api::Process { pid }| pid.cast_signed())
}

/// What is said by saying nothing is the default.
async fn read_or_default<T: DeserializeOwned + Default>(body: Incoming) -> Result<T, String> {
    if body.is_end_stream() { Ok(T::default()) } else { read(body).await }
}

async fn read<T: DeserializeOwned>(body: Incoming) -> Result<T, String> {
    let body =
        Limited::new(body, MAX_BODY).collect().await.map_err(|error| format!("read the body: {error}"))?;
    serde_json::from_slice(&body.to_bytes()).map_err(|error| format!("read the body: {error}"))
}

async fn ask<T: Serialize>(
    requests: &Sender<Request>,
    request: impl FnOnce(daemon::Reply<T>) -> Request,
) -> Response<Full<Bytes>> {
    wait(requests, request).await.map_or_else(|refusal| refusal, |value| json(StatusCode::OK, &value))
}

/// What the daemon answers, or how it refuses.
async fn wait<T>(
    requests: &Sender<Request>,
    request: impl FnOnce(daemon::Reply<T>) -> Request,
) -> Result<T, Response<Full<Bytes>>> {
    let stopping = || refuse(StatusCode::SERVICE_UNAVAILABLE, "the daemon is stopping");
    let (reply, answer) = oneshot::channel();
    requests.send(request(reply)).map_err(|_| stopping())?;
    let answer = answer.await.map_err(|_| stopping())?;
    answer.map_err(|error| {
        let programs = error.programs();
        json(status_of(&error), &api::Refusal { error: error.to_string(), programs })
    })
}

fn status_of(error: &daemon::Error) -> StatusCode {
    match error {
        daemon::Error::Unknown(_)
        | daemon::Error::Lost(_)
        | daemon::Error::NotEnabled(_)
        | daemon::Error::NoProcess(_) => StatusCode::NOT_FOUND,
        daemon::Error::NotReloaded { cause, .. } => status_of(cause),
        daemon::Error::BadName(_)
        | daemon::Error::Config(_)
        | daemon::Error::Fixed(_)
        | daemon::Error::NamesOnly
        | daemon::Error::NoMatch { .. }
        | daemon::Error::BadPattern(_)
        | daemon::Error::Plan(PlanError::Policy { .. }) => StatusCode::BAD_REQUEST,
        daemon::Error::NotReady(_) | daemon::Error::NotWatchable(_) => StatusCode::CONFLICT,
        daemon::Error::TooManyWatchers => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}
