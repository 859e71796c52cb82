//! The control socket: who may speak, how much, and to whom it goes.

use crate::{
    api,
    config::check_name,
    daemon::{self, Request},
    decisions::Lines,
    exporter::Exporter,
    http::{self, Place, Places, json, refuse},
    plan::PlanError,
};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Either, Full, Limited};
use hyper::{
    Method, Response, StatusCode,
    body::{Body as _, Incoming},
    header::{CONTENT_TYPE, HeaderValue},
    http::request::Parts,
};
use serde::{Serialize, de::DeserializeOwned};
use std::{
    collections::BTreeSet,
    sync::{Arc, mpsc::Sender},
    time::Duration,
};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::oneshot,
    time::timeout,
};

/// Callers at once that are waited for; as many again may wait for their answers.
const MAX_CALLERS: usize = 64;
/// Bytes of a request's body: as many services as can be enabled, by their longest names.
const MAX_BODY: usize = 512 << 10;
/// How long a caller may take for it, and for everything.
const BODY_TIMEOUT: Duration = Duration::from_secs(5);
const CALL_TIMEOUT: Duration = Duration::from_secs(120);

/// Serves until the task is dropped.
pub(crate) async fn serve(listener: UnixListener, requests: Sender<Request>, exporter: Arc<Exporter>) {
    let places = Places::new(MAX_CALLERS);
    loop {
        let place = places.take().await;
        let stream = http::accept(async || listener.accept().await).await;
        let (requests, exporter) = (requests.clone(), Arc::clone(&exporter));
        tokio::spawn(async move { connection(stream, &place, &requests, &exporter).await });
        http::give_others_a_turn().await;
    }
}

async fn connection(stream: UnixStream, place: &Place, requests: &Sender<Request>, exporter: &Exporter) {
    let Ok(peer) = stream.peer_cred() else { return };
    // The file's mode says the same; this holds also where somebody changed it.
    if peer.uid() != 0 {
        tracing::warn!(uid = peer.uid(), pid = peer.pid(), "a caller that is not root was turned away");
        return;
    }
    let mind = Mind { requests, place };
    http::serve(stream, CALL_TIMEOUT, place, |request| respond(request, peer.pid(), mind, exporter)).await;
}

/// The daemon's mind, as a caller reaches it.
#[derive(Clone, Copy)]
struct Mind<'c> {
    requests: &'c Sender<Request>,
    place: &'c Place,
}

/// A document, or lines without an end.
type Answer = Response<Either<Full<Bytes>, Lines>>;

async fn respond(
    request: hyper::Request<Incoming>,
    pid: Option<i32>,
    mind: Mind<'_>,
    exporter: &Exporter,
) -> Answer {
    let (head, body) = request.into_parts();
    if (&head.method, head.uri.path()) != (&Method::GET, "/v1/watch") {
        return answer(&head, body, pid, mind, exporter).await.map(Either::Left);
    }
    match watch(head.uri.query().unwrap_or_default(), mind).await {
        Ok(lines) => {
            mind.place.keep();
            let mut response = Response::new(Either::Right(lines));
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/jsonl"));
            response
        }
        Err(refusal) => refusal.map(Either::Left),
    }
}

async fn watch(query: &str, mind: Mind<'_>) -> Result<Lines, Response<Full<Bytes>>> {
    let watch = asked(query).map_err(|error| refuse(StatusCode::BAD_REQUEST, &error))?;
    mind.wait(|reply| Request::Watch(watch, reply)).await
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
    mind: Mind<'_>,
    exporter: &Exporter,
) -> Response<Full<Bytes>> {
    let parts: Vec<&str> = head.uri.path().trim_start_matches('/').split('/').collect();
    match (&head.method, &parts[..]) {
        (&Method::GET, ["metrics"]) => mind.place.while_busy(exporter.respond()).await,
        (&Method::GET, ["v1", "status"]) => mind.ask(Request::Status).await,
        (_, ["v1", "services", name, ..]) if check_name(name).is_err() => {
            refuse(StatusCode::BAD_REQUEST, &check_name(name).err().unwrap_or_default())
        }
        (&Method::POST, ["v1", "enable"]) => match read(body).await {
            Ok(change) => mind.ask(|reply| Request::Enable(change, reply)).await,
            Err(error) => refuse(StatusCode::BAD_REQUEST, &error),
        },
        (&Method::POST, ["v1", "disable"]) => match read(body).await {
            Ok(change) => mind.ask(|reply| Request::Disable(change, reply)).await,
            Err(error) => refuse(StatusCode::BAD_REQUEST, &error),
        },
        (&Method::POST, ["v1", "connections"]) => match read(body).await {
            Ok(asked) => mind.ask(|reply| Request::Connections(asked, reply)).await,
            Err(error) => refuse(StatusCode::BAD_REQUEST, &error),
        },
        (&Method::POST, ["v1", "reload"]) => match read_or_default(body).await {
            Ok(reload) => mind.ask(|reply| Request::Reload(reload, reply)).await,
            Err(error) => refuse(StatusCode::BAD_REQUEST, &error),
        },
        (&Method::POST, ["v1", "services", name, "commands"]) => match pid {
            Some(pid) => mind.ask(|reply| Request::Join((*name).to_owned(), pid, reply)).await,
            None => refuse(StatusCode::BAD_REQUEST, "the kernel does not tell who is calling"),
        },
        (&Method::POST, ["v1", "services", name, "processes"]) => match read::<api::Process>(body).await {
            Ok(api::Process { pid }) => {
                mind.ask(|reply| Request::Adopt((*name).to_owned(), pid, reply)).await
            }
            Err(error) => refuse(StatusCode::BAD_REQUEST, &error),
        },
        (&Method::POST, ["v1", "services", name, "cgroups"]) => match process(body, pid).await {
            Ok(pid) => mind.ask(|reply| Request::Attach((*name).to_owned(), pid, reply)).await,
            Err(error) => refuse(StatusCode::BAD_REQUEST, &error),
        },
        (&Method::POST, ["v1", "proxy", "cgroups"]) => match pid {
            Some(pid) => mind.ask(|reply| Request::AttachProxy(pid, reply)).await,
            None => refuse(StatusCode::BAD_REQUEST, "the kernel does not tell who is calling"),
        },
        (
            _,
            ["metrics"]
            | ["v1", "status" | "enable" | "disable" | "connections" | "reload" | "watch"]
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
    let whole = timeout(BODY_TIMEOUT, Limited::new(body, MAX_BODY).collect()).await;
    let whole = whole.map_err(|_| format!("read the body: it did not come within {BODY_TIMEOUT:?}"))?;
    let body = whole.map_err(|error| format!("read the body: {error}"))?;
    serde_json::from_slice(&body.to_bytes()).map_err(|error| format!("read the body: {error}"))
}

impl Mind<'_> {
    async fn ask<T: Serialize>(
        self,
        request: impl FnOnce(daemon::Reply<T>) -> Request,
    ) -> Response<Full<Bytes>> {
        self.wait(request).await.map_or_else(|refusal| refusal, |value| json(StatusCode::OK, &value))
    }

    /// What the daemon answers, or how it refuses.
    async fn wait<T>(
        self,
        request: impl FnOnce(daemon::Reply<T>) -> Request,
    ) -> Result<T, Response<Full<Bytes>>> {
        let stopping = || refuse(StatusCode::SERVICE_UNAVAILABLE, "the daemon is stopping");
        let (reply, answer) = oneshot::channel();
        self.requests.send(request(reply)).map_err(|_| stopping())?;
        let answer = self.place.while_busy(answer).await.map_err(|_| stopping())?;
        answer.map_err(|error| {
            let programs = error.programs();
            json(status_of(&error), &api::Refusal { error: error.to_string(), programs })
        })
    }
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
