//! What the daemon's sockets have in common: HTTP/1.1 over a Unix socket, and answers in JSON.

use crate::{api, fault};
use bytes::Bytes;
use http_body_util::Full;
use hyper::{Response, StatusCode, header};
use nix::sys::stat;
use serde::Serialize;
use std::{fs, io, path::Path, time::Duration};
use tokio::net::{UnixListener, UnixStream};

/// Pause after an error such as "too many open files", which is there again at once.
const PAUSE: Duration = Duration::from_millis(100);

/// Binds a socket in the place of one that a dead daemon left. Only root can open it, from the first moment.
pub(crate) fn bind(path: &Path) -> io::Result<UnixListener> {
    remove(path)?;
    fault::point("socket", "about to be bound");
    let before = stat::umask(stat::Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(path);
    stat::umask(before);
    fault::point("socket", "bound");
    listener
}

/// Removes a socket that may be there.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The next caller.
pub(crate) async fn accept(listener: &UnixListener) -> UnixStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(error) => {
                tracing::warn!("accept on a socket of the daemon's: {error}");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// Says why not.
pub(crate) fn refuse(status: StatusCode, error: &str) -> Response<Full<Bytes>> {
    json(status, &api::Refusal { error: error.to_owned(), programs: vec![] })
}

/// An answer.
pub(crate) fn json(status: StatusCode, value: &impl Serialize) -> Response<Full<Bytes>> {
    let mut body = serde_json::to_vec(value).unwrap_or_default();
    body.push(b'\n');
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    let kind = header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}
