//! A connection to a resolver. It is a task of its own, so that what is answered here never waits for a resolver that
//! does not accept.

use super::{
    MAX_IN_FLIGHT, QUERY_TIMEOUT,
    frames::{self, Frames, MAX_MESSAGE},
};
use std::{future, io, net::SocketAddr};
use tokio::{net::TcpStream, sync::mpsc, time::timeout};

/// Answers that wait to be passed on; further ones are not read.
const MAX_ANSWERS: usize = 4;

/// See the module; the connection ends when this is dropped.
#[derive(Debug)]
pub(super) struct Upstream {
    queries: mpsc::Sender<Vec<u8>>,
    answers: mpsc::Receiver<Vec<u8>>,
}

impl Upstream {
    /// Begins to connect.
    pub(super) fn open(resolver: SocketAddr) -> Self {
        let (queries, to_ask) = mpsc::channel(MAX_IN_FLIGHT);
        let (heard, answers) = mpsc::channel(MAX_ANSWERS);
        tokio::spawn(async move {
            if let Err(error) = relay(resolver, to_ask, heard).await {
                tracing::debug!(%resolver, "DNS connection to a resolver: {error}");
            }
        });
        Self { queries, answers }
    }

    /// False where that cannot be.
    pub(super) fn ask(&self, query: Vec<u8>) -> bool {
        self.queries.try_send(query).is_ok()
    }
}

/// The next answer; none when the connection has ended. Where there is no connection there is nothing to wait for.
pub(super) async fn answer(upstream: &mut Option<Upstream>) -> Option<Vec<u8>> {
    match upstream {
        Some(upstream) => upstream.answers.recv().await,
        None => future::pending().await,
    }
}

async fn relay(
    resolver: SocketAddr,
    mut queries: mpsc::Receiver<Vec<u8>>,
    answers: mpsc::Sender<Vec<u8>>,
) -> io::Result<()> {
    let stream = timeout(QUERY_TIMEOUT, TcpStream::connect(resolver)).await??;
    stream.set_nodelay(true)?;
    let (read, mut write) = stream.into_split();
    let mut frames = Frames::new(read, MAX_MESSAGE);
    loop {
        tokio::select! {
            query = queries.recv() => match query {
                Some(query) => frames::write(&mut write, &query, QUERY_TIMEOUT).await?,
                None => return Ok(()),
            },
            answer = frames.next() => match answer? {
                // Where nobody listens any more, the queries end too.
                Some(answer) => _ = answers.send(answer).await,
                None => return Ok(()),
            },
        }
    }
}
