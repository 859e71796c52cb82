//! The command line's end of the control socket.

use crate::api::Refusal;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Method, Request, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{net::UnixStream, time::timeout};

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
    #[error("{0}")]
    Refused(String),
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

fn call<T: DeserializeOwned>(
    run: &Path,
    method: Method,
    path: &str,
    body: Vec<u8>,
) -> Result<T, ClientError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(protocol)?;
    let socket = run.join("agent.sock");
    runtime.block_on(async {
        let exchange = timeout(PATIENCE, exchange(&socket, method, path, body)).await;
        exchange.unwrap_or_else(|_| Err(protocol(format!("no answer within {PATIENCE:?}"))))
    })
}

async fn exchange<T: DeserializeOwned>(
    socket: &Path,
    method: Method,
    path: &str,
    body: Vec<u8>,
) -> Result<T, ClientError> {
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
    let success = response.status().is_success();
    let body = Limited::new(response.into_body(), MAX_BODY).collect().await.map_err(protocol)?.to_bytes();
    if success {
        return serde_json::from_slice(&body).map_err(protocol);
    }
    let Refusal { error } = serde_json::from_slice(&body).map_err(protocol)?;
    Err(ClientError::Refused(error))
}

#[expect(clippy::needless_pass_by_value, reason = "the shape that map_err wants")]
fn protocol(error: impl ToString) -> ClientError {
    ClientError::Protocol(error.to_string())
}
