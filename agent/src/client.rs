//! The command line's end of the control socket.

use crate::api::{self, Refusal};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Method, Request, Response, body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Serialize, de::DeserializeOwned};
use std::{
    io,
    ops::ControlFlow,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};
use tokio::{net::UnixStream, sync::oneshot, time::timeout};

/// How long an answer may take. A step before a unit's start must not take as long as the start may, 90 s by default.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of an answer.
const MAX_BODY: usize = 16 << 20;

/// Why there is no answer, or not the one that was hoped for.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    /// Nobody answers at the socket.
    #[error("no daemon answers at {socket}: {cause}; start it: `systemctl start mesh-redirect`, or `mesh-redirect run`", socket = .socket.display())]
    Absent {
        /// Where.
        socket: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// The daemon refused.
    #[error("{error}")]
    Refused {
        /// Why.
        error: String,
        /// Programs of others' because of which it did.
        programs: Vec<u32>,
    },
    /// What has no end has ended.
    #[error(
        "the daemon has ended, and nothing more is shown; is it to be started again? `systemctl start mesh-redirect`"
    )]
    Ended,
    /// Nobody can be shown what was answered.
    #[error("write to standard output: {0}")]
    Show(#[from] io::Error),
    /// The answer is not one.
    #[error("talk to the daemon: {0}")]
    Protocol(String),
}

/// Asks for something.
pub(crate) fn get<T: DeserializeOwned>(run: &Path, path: &str) -> Result<T, ClientError> {
    call(run, Method::GET, path, Vec::new())
}

/// Has something done.
pub(crate) fn post<T: DeserializeOwned>(
    run: &Path,
    path: &str,
    body: Option<&impl Serialize>,
) -> Result<T, ClientError> {
    let body = body.map(serde_json::to_vec).transpose().map_err(protocol)?;
    call(run, Method::POST, path, body.unwrap_or_default())
}

/// Has decisions told, one after the other, until `show` has seen enough or nobody reads what it writes.
pub(crate) fn watch(
    run: &Path,
    watch: &api::Watch,
    mut show: impl FnMut(api::Watched) -> io::Result<ControlFlow<()>>,
) -> Result<(), ClientError> {
    let mut query = form_urlencoded::Serializer::new(String::new());
    query.append_pair("rate", &watch.rate.to_string());
    query.extend_pairs(watch.services.iter().map(|service| ("service", service)));
    let path = format!("/v1/watch?{}", query.finish());
    let reader_is_gone = reader_is_gone();
    on_socket(run, async |socket| {
        let answer = patient(send(socket, Method::GET, &path, Vec::new())).await?;
        let lines =
            each_line(answer.into_body(), |line| Ok(show(serde_json::from_slice(line).map_err(protocol)?)?));
        tokio::select! {
            shown = lines => shown,
            Ok(()) = reader_is_gone => Ok(()),
        }
    })
}

/// Comes when whoever reads standard output is gone, which is not seen otherwise until there is something to write.
fn reader_is_gone() -> oneshot::Receiver<()> {
    let (sender, receiver) = oneshot::channel();
    thread::spawn(move || {
        let stdout = io::stdout();
        let mut reader = [PollFd::new(stdout.as_fd(), PollFlags::empty())];
        // Where it cannot be asked it is seen when something is written.
        if poll(&mut reader, PollTimeout::NONE).is_ok() {
            let _already_done = sender.send(());
        }
    });
    receiver
}

async fn each_line(
    mut body: Incoming,
    mut show: impl FnMut(&[u8]) -> Result<ControlFlow<()>, ClientError>,
) -> Result<(), ClientError> {
    let mut rest = Vec::new();
    while let Some(Ok(frame)) = body.frame().await {
        rest.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
        let Some(end) = rest.iter().rposition(|byte| *byte == b'\n') else { continue };
        let whole: Vec<u8> = rest.drain(..=end).collect();
        for line in whole.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            if show(line)?.is_break() {
                return Ok(());
            }
        }
    }
    Err(ClientError::Ended)
}

fn call<T: DeserializeOwned>(
    run: &Path,
    method: Method,
    path: &str,
    body: Vec<u8>,
) -> Result<T, ClientError> {
    on_socket(run, async |socket| {
        patient(async {
            let answer = send(socket, method, path, body).await?;
            serde_json::from_slice(&whole(answer).await?).map_err(protocol)
        })
        .await
    })
}

fn on_socket<T>(
    run: &Path,
    exchange: impl AsyncFnOnce(&Path) -> Result<T, ClientError>,
) -> Result<T, ClientError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(protocol)?;
    runtime.block_on(exchange(&run.join("agent.sock")))
}

async fn patient<T>(exchange: impl Future<Output = Result<T, ClientError>>) -> Result<T, ClientError> {
    let exchanged = timeout(PATIENCE, exchange).await;
    exchanged.unwrap_or_else(|_| Err(protocol(format!("no answer within {PATIENCE:?}"))))
}

/// The answer, unless it is a refusal.
async fn send(
    socket: &Path,
    method: Method,
    path: &str,
    body: Vec<u8>,
) -> Result<Response<Incoming>, ClientError> {
    let absent = |cause| ClientError::Absent { socket: socket.to_owned(), cause };
    let stream = UnixStream::connect(socket).await.map_err(absent)?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(protocol)?;
    tokio::spawn(connection);
    let request = Request::builder().method(method).uri(path).header("host", "mesh-redirect");
    let request = request.body(Full::new(Bytes::from(body)));
    let response = sender.send_request(request.map_err(protocol)?).await.map_err(|error| {
        ClientError::Protocol(format!(
            "{error}; the daemon closes the connection on callers that are not root"
        ))
    })?;
    if response.status().is_success() {
        return Ok(response);
    }
    let Refusal { error, programs } = serde_json::from_slice(&whole(response).await?).map_err(protocol)?;
    Err(ClientError::Refused { error, programs })
}

async fn whole(response: Response<Incoming>) -> Result<Bytes, ClientError> {
    Ok(Limited::new(response.into_body(), MAX_BODY).collect().await.map_err(protocol)?.to_bytes())
}

#[expect(clippy::needless_pass_by_value, reason = "the shape that map_err wants")]
fn protocol(error: impl ToString) -> ClientError {
    ClientError::Protocol(error.to_string())
}
