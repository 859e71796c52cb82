//! The control socket: who may speak, how much, and to whom it goes.

use crate::{
    api,
    config::check_name,
    daemon::{self, Request},
    http::{self, json, refuse},
    plan::PlanError,
};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{
    Method, Response, StatusCode,
    body::{Body as _, Incoming},
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::{Serialize, de::DeserializeOwned};
use std::{
    convert::Infallible,
    sync::{Arc, mpsc::Sender},
    time::Duration,
};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{Semaphore, oneshot},
    time::timeout,
};

/// Callers at once; further ones wait.
const MAX_CONNECTIONS: usize = 64;
/// Bytes of a request's body: as many services as can be enabled, by their longest names.
const MAX_BODY: usize = 512 << 10;
/// Bytes of a request's head.
const MAX_HEAD: usize = 8 << 10;
/// How long a caller may take for its request, and for all of it.
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
    let service = service_fn(|request| {
        let requests = requests.clone();
        async move { Ok::<_, Infallible>(respond(request, peer.pid(), &requests).await) }
    });
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        .keep_alive(false);
    match timeout(CONNECTION_TIMEOUT, builder.serve_connection(TokioIo::new(stream), service)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!("control socket: {error}"),
        Err(_) => tracing::debug!("control socket: a caller took too long"),
    }
}

async fn respond(
    request: hyper::Request<Incoming>,
    pid: Option<i32>,
    requests: &Sender<Request>,
) -> Response<Full<Bytes>> {
    let (head, body) = request.into_parts();
    let parts: Vec<&str> = head.uri.path().trim_start_matches('/').split('/').collect();
    match (&head.method, &parts[..]) {
        (&Method::GET, ["v1", "status"]) => ask(requests, Request::Status).await,
        (_, ["v1", "services", name, ..]) if check_name(name).is_err() => {
            json(StatusCode::BAD_REQUEST, &api::Refusal { error: check_name(name).err().unwrap_or_default() })
        }
        (&Method::POST, ["v1", "enable"]) => match read(body).await {
            Ok(change) => ask(requests, |reply| Request::Enable(change, reply)).await,
            Err(error) => refuse(StatusCode::BAD_REQUEST, &error),
        },
        (&Method::POST, ["v1", "disable"]) => match read(body).await {
            Ok(change) => ask(requests, |reply| Request::Disable(change, reply)).await,
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
            ["v1", "status" | "enable" | "disable" | "reload"]
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
    let (reply, answer) = oneshot::channel();
    if requests.send(request(reply)).is_err() {
        return refuse(StatusCode::SERVICE_UNAVAILABLE, "the daemon is stopping");
    }
    match answer.await {
        Ok(Ok(value)) => json(StatusCode::OK, &value),
        Ok(Err(error)) => refuse(status_of(&error), &error.to_string()),
        Err(_) => refuse(StatusCode::SERVICE_UNAVAILABLE, "the daemon is stopping"),
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
        | daemon::Error::NoMatch { .. }
        | daemon::Error::BadPattern(_)
        | daemon::Error::Plan(PlanError::Policy { .. }) => StatusCode::BAD_REQUEST,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}
