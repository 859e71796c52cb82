//! What the daemon's sockets have in common: HTTP/1.1, answers in JSON, and callers that take their time.

use crate::{api, fault};
use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Request, Response, StatusCode,
    body::{Body, Incoming},
    header,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::sys::stat;
use serde::Serialize;
use std::{
    collections::VecDeque,
    convert::Infallible,
    error::Error,
    fs, future, io,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::UnixListener,
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
    task::yield_now,
    time::sleep,
};

/// Pause after an error such as "too many open files", which is there again at once.
const PAUSE: Duration = Duration::from_millis(100);
/// Bytes of a request's head.
const MAX_HEAD: usize = 8 << 10;
/// How long a caller may take for it.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);

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
pub(crate) async fn accept<S, A>(mut next: impl AsyncFnMut() -> io::Result<(S, A)>) -> S {
    loop {
        match next().await {
            Ok((stream, _)) => return stream,
            Err(error) => {
                tracing::warn!("accept on a socket of the daemon's: {error}");
                sleep(PAUSE).await;
            }
        }
    }
}

/// Places of callers. So many may be waited for at once, and as many again be worked for: a caller that is slow to ask, or
/// to take its answer, makes room for the next one, and keeps nobody out.
#[derive(Debug)]
pub(crate) struct Places {
    most: usize,
    all: Arc<Semaphore>,
    /// Who is waited for, the first one in front.
    slow: Arc<Mutex<VecDeque<Arc<Notify>>>>,
}

/// A caller's place, until it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    most: usize,
    slow: Arc<Mutex<VecDeque<Arc<Notify>>>>,
    is_lost: Arc<Notify>,
    is_kept: AtomicBool,
    _taken: Option<OwnedSemaphorePermit>,
}

impl Places {
    /// So many.
    pub(crate) fn new(most: usize) -> Self {
        Self { most, all: Arc::new(Semaphore::new(2 * most)), slow: Arc::default() }
    }

    /// The next free one, which is waited for only while all of them are worked for.
    pub(crate) async fn take(&self) -> Place {
        let taken = Arc::clone(&self.all).acquire_owned().await.ok();
        Place {
            most: self.most,
            slow: Arc::clone(&self.slow),
            is_lost: Arc::default(),
            is_kept: AtomicBool::new(false),
            _taken: taken,
        }
    }
}

impl Place {
    /// The caller is waited for; the one that has been longest loses its place where there are too many.
    fn wait(&self) {
        let mut slow = locked(&self.slow);
        slow.push_back(Arc::clone(&self.is_lost));
        if slow.len() > self.most
            && let Some(slowest) = slow.pop_front()
        {
            slowest.notify_one();
        }
    }

    /// The caller is no longer waited for.
    fn leave(&self) {
        locked(&self.slow).retain(|other| !Arc::ptr_eq(other, &self.is_lost));
    }

    /// The caller stays as long as it likes.
    pub(crate) fn keep(&self) {
        self.is_kept.store(true, Ordering::Relaxed);
        self.leave();
    }

    /// When it is over, unless the place is kept.
    async fn ends_after(&self, limit: Duration) {
        sleep(limit).await;
        if self.is_kept.load(Ordering::Relaxed) {
            future::pending::<()>().await;
        }
    }

    /// Works for the caller, which has asked and now waits itself.
    pub(crate) async fn while_busy<T>(&self, work: impl Future<Output = T>) -> T {
        self.leave();
        let done = work.await;
        self.wait();
        done
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.leave();
    }
}

fn locked(slow: &Mutex<VecDeque<Arc<Notify>>>) -> MutexGuard<'_, VecDeque<Arc<Notify>>> {
    slow.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Who was accepted reads what was sent already before anybody else takes its place.
pub(crate) async fn give_others_a_turn() {
    yield_now().await;
}

/// Answers one request, unless the caller takes longer than it may, or somebody else needs its place.
pub(crate) async fn serve<S, F, B>(
    stream: S,
    limit: Duration,
    place: &Place,
    respond: impl Fn(Request<Incoming>) -> F,
) where
    S: AsyncRead + AsyncWrite + Unpin,
    F: Future<Output = Response<B>>,
    B: Body<Data: Send, Error: Into<Box<dyn Error + Send + Sync>>> + 'static,
{
    let service = service_fn(|request| {
        let response = respond(request);
        async { Ok::<_, Infallible>(response.await) }
    });
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        .keep_alive(false);
    place.wait();
    tokio::select! {
        served = builder.serve_connection(TokioIo::new(stream), service) => {
            served.unwrap_or_else(|error| tracing::debug!("a caller: {error}"));
        }
        () = place.ends_after(limit) => tracing::debug!("a caller took longer than {limit:?}"),
        () = place.is_lost.notified() => tracing::debug!("a caller that was slow made room for another one"),
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
