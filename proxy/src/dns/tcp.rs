//! DNS by TCP (RFC 7766): several queries on a connection, answered in whatever order.

mod frames;
mod upstream;

use super::{
    QUERY_TIMEOUT, Server,
    message::{self, Decision, Transport},
    resolver,
};
use crate::{origin, tunnel};
use frames::Frames;
use hickory_proto::op::ResponseCode;
use std::{io, mem, net::SocketAddr, time::Duration};
use tokio::{
    net::{TcpStream, tcp::OwnedWriteHalf},
    time::{Instant, sleep_until},
};
use upstream::Upstream;

/// How long a connection may stay without a query.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest query. Updates, which are the longest, are sent by what can split them.
const MAX_QUERY: usize = 16 << 10;
/// Queries of a connection that wait for the resolver; further ones are not read before one is answered.
const MAX_IN_FLIGHT: usize = 32;

/// Serves a connection until it ends.
pub(super) async fn serve(server: &Server, stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let origin = origin::of(&stream, stream.local_addr()?).inspect_err(|error| {
        tracing::warn!("a DNS connection was closed whose origin cannot be read: {error}");
        server.metrics.origin_errors.inc();
        tunnel::reset(&stream);
    })?;
    let resolver = origin.map(|origin| origin.destination).filter(|asked| resolver::is_askable(*asked));
    converse(server, stream, resolver).await
}

/// Answers what a client asks; the resolver is the one it meant to ask, where there is one.
async fn converse(server: &Server, stream: TcpStream, resolver: Option<SocketAddr>) -> io::Result<()> {
    let (read, write) = stream.into_split();
    let mut queries = Frames::new(read, MAX_QUERY);
    let mut connection = Connection { server, client: write, resolver, upstream: None, waiting: Vec::new() };
    let mut idle = Instant::now() + IDLE_TIMEOUT;
    let mut ended = false;
    while !(ended && connection.waiting.is_empty()) {
        let expires = connection.waiting.iter().map(|query| query.expires).min();
        tokio::select! {
            query = queries.next(), if !ended && connection.waiting.len() < MAX_IN_FLIGHT => match query? {
                Some(query) => {
                    connection.take(query).await?;
                    idle = Instant::now() + IDLE_TIMEOUT;
                }
                None => ended = true,
            },
            answer = upstream::answer(&mut connection.upstream) => match answer {
                Some(answer) => connection.pass_on(answer).await?,
                None => connection.lose_upstream().await?,
            },
            () = sleep_until(expires.unwrap_or(idle)) => match expires {
                Some(_) => connection.expire().await?,
                None => return Ok(()),
            },
            () = server.draining(), if !ended => ended = true,
        }
    }
    Ok(())
}

struct Connection<'a> {
    server: &'a Server,
    client: OwnedWriteHalf,
    resolver: Option<SocketAddr>,
    upstream: Option<Upstream>,
    waiting: Vec<Waiting>,
}

/// A query that the resolver was asked.
struct Waiting {
    /// As it was sent on, under an id of its own.
    asked: Vec<u8>,
    /// The client's id.
    id: [u8; 2],
    expires: Instant,
}

impl Waiting {
    fn failed(mut self) -> Vec<u8> {
        message::set_id(&mut self.asked, self.id);
        message::error(&self.asked, ResponseCode::ServFail)
    }
}

impl Connection<'_> {
    async fn take(&mut self, query: Vec<u8>) -> io::Result<()> {
        match self.server.decide(&query, Transport::Tcp) {
            Decision::Answer(answer) => self.send("answered", &answer).await,
            Decision::Malformed(answer) => self.send("malformed", &answer).await,
            Decision::Drop => {
                self.server.count("tcp", "malformed");
                Err(io::Error::new(io::ErrorKind::InvalidData, "what came is no query"))
            }
            Decision::Forward => match self.resolver {
                Some(resolver) => self.forward(query, resolver).await,
                None => self.send("refused", &message::error(&query, ResponseCode::Refused)).await,
            },
        }
    }

    async fn forward(&mut self, mut query: Vec<u8>, resolver: SocketAddr) -> io::Result<()> {
        let id = message::id(&query).unwrap_or_default();
        message::set_id(&mut query, self.free_id());
        let waiting = Waiting { asked: query, id, expires: Instant::now() + QUERY_TIMEOUT };
        let upstream = self.upstream.get_or_insert_with(|| Upstream::open(resolver));
        if upstream.ask(waiting.asked.clone()) {
            self.waiting.push(waiting);
            return Ok(());
        }
        self.send("failed", &waiting.failed()).await
    }

    /// Random, and not that of a query that waits.
    fn free_id(&self) -> [u8; 2] {
        loop {
            let id = rand::random();
            if self.waiting.iter().all(|waiting| message::id(&waiting.asked) != Some(id)) {
                return id;
            }
        }
    }

    /// What answers no query that waits is late, or false.
    async fn pass_on(&mut self, mut answer: Vec<u8>) -> io::Result<()> {
        let answered = self.waiting.iter().position(|waiting| message::is_answer(&answer, &waiting.asked));
        let Some(answered) = answered else { return Ok(()) };
        message::set_id(&mut answer, self.waiting.swap_remove(answered).id);
        self.send("forwarded", &answer).await
    }

    async fn lose_upstream(&mut self) -> io::Result<()> {
        self.upstream = None;
        for waiting in mem::take(&mut self.waiting) {
            self.send("failed", &waiting.failed()).await?;
        }
        Ok(())
    }

    async fn expire(&mut self) -> io::Result<()> {
        let now = Instant::now();
        let (expired, waiting) =
            mem::take(&mut self.waiting).into_iter().partition(|query| query.expires <= now);
        self.waiting = waiting;
        let expired: Vec<Waiting> = expired;
        for query in expired {
            self.send("timed_out", &query.failed()).await?;
        }
        Ok(())
    }

    async fn send(&mut self, outcome: &'static str, answer: &[u8]) -> io::Result<()> {
        self.server.count("tcp", outcome);
        frames::write(&mut self.client, answer, IDLE_TIMEOUT).await
    }
}

#[cfg(test)]
mod tests;
