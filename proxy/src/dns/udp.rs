//! DNS by UDP: one datagram, one answer.

use super::{
    QUERY_TIMEOUT, Server,
    message::{self, Decision, Transport},
    resolver,
};
use hickory_proto::op::ResponseCode;
use socket2::SockRef;
use std::{
    io::{self, Read as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::Interest,
    net::UdpSocket,
    time::{sleep, timeout},
};

/// Longest query: what EDNS clients say that they take, and far more than a query has.
const MAX_QUERY: usize = 4096;
/// Longest answer.
const MAX_ANSWER: usize = u16::MAX as usize;
/// Pause after an error that is there again at once.
const PAUSE: Duration = Duration::from_millis(50);

/// Serves a socket until the task is dropped.
pub(super) async fn serve(server: Arc<Server>, socket: Arc<UdpSocket>) {
    let mut buffer = [0; MAX_QUERY + 1];
    loop {
        match socket.recv_from(&mut buffer).await {
            Ok((len, _)) if len > MAX_QUERY => server.count("udp", "malformed"),
            Ok((len, client)) => take(&server, &socket, &buffer[..len], client).await,
            Err(error) => {
                tracing::warn!("receive DNS queries: {error}");
                sleep(PAUSE).await;
            }
        }
    }
}

async fn take(server: &Arc<Server>, socket: &Arc<UdpSocket>, query: &[u8], client: SocketAddr) {
    let (outcome, answer) = match server.decide(query, Transport::Udp) {
        Decision::Answer(answer) => ("answered", answer),
        Decision::Malformed(answer) => ("malformed", answer),
        Decision::Drop => return server.count("udp", "malformed"),
        Decision::Forward => return forward(server, socket, query, client),
    };
    server.count("udp", outcome);
    send(socket, &answer, client).await;
}

async fn askable(server: &Server, socket: &UdpSocket, client: SocketAddr) -> Option<SocketAddr> {
    let asked = resolver::asked(socket, client, &server.origins).await.unwrap_or_else(|error| {
        tracing::warn!(
            "a DNS query was refused, since it cannot be known which resolver it was for: {error}"
        );
        None
    });
    asked.filter(|&resolver| resolver::is_askable(resolver))
}

/// Asks a resolver while other queries are served. A client whose query is not answered asks again.
fn forward(server: &Arc<Server>, socket: &Arc<UdpSocket>, query: &[u8], client: SocketAddr) {
    let Ok(place) = Arc::clone(&server.in_flight).try_acquire_owned() else {
        return server.count("udp", "dropped");
    };
    let (server, socket, query) = (Arc::clone(server), Arc::clone(socket), query.to_vec());
    tokio::spawn(async move {
        let (outcome, answer) = match askable(&server, &socket, client).await {
            Some(resolver) => forwarded(&query, resolver).await,
            None => ("refused", Some(message::error(&query, ResponseCode::Refused))),
        };
        server.count("udp", outcome);
        if let Some(answer) = answer {
            send(&socket, &answer, client).await;
        }
        drop(place);
    });
}

/// What became of a query that a resolver was asked, and what the client is told.
async fn forwarded(query: &[u8], resolver: SocketAddr) -> (&'static str, Option<Vec<u8>>) {
    match exchange(query, resolver).await {
        Ok(answer) => ("forwarded", Some(answer)),
        Err(error) if error.kind() == io::ErrorKind::TimedOut => ("timed_out", None),
        Err(error) => {
            tracing::debug!(%resolver, "forward a DNS query: {error}");
            ("failed", Some(message::error(query, ResponseCode::ServFail)))
        }
    }
}

async fn send(socket: &UdpSocket, answer: &[u8], client: SocketAddr) {
    if let Err(error) = socket.send_to(answer, client).await {
        tracing::debug!(%client, "send a DNS answer: {error}");
    }
}

/// Asks a resolver. Each query has an id and, from the kernel, a port of its own, both random, and only the resolver's own
/// address is listened to (RFC 5452): whoever wants to answer in its place has to guess them all, in time.
async fn exchange(query: &[u8], resolver: SocketAddr) -> io::Result<Vec<u8>> {
    let mut asked = query.to_vec();
    message::set_id(&mut asked, rand::random());
    let any: IpAddr =
        if resolver.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(resolver).await?;
    socket.send(&asked).await?;
    let mut answer = timeout(QUERY_TIMEOUT, receive(&socket, &asked)).await??;
    message::set_id(&mut answer, message::id(query).unwrap_or_default());
    Ok(answer)
}

/// The first datagram that answers; others are ignored, for they may be somebody's guesses. That there is no resolver is
/// no datagram but an error of the socket (ICMP), which is waited for too.
async fn receive(socket: &UdpSocket, asked: &[u8]) -> io::Result<Vec<u8>> {
    let read = || {
        // Taken only now: a thousand queries that wait for answers shall not each hold so much.
        let mut answer = vec![0; MAX_ANSWER];
        let len = (&*SockRef::from(socket)).read(&mut answer)?;
        answer.truncate(len);
        Ok(answer)
    };
    loop {
        let answer = socket.async_io(Interest::READABLE | Interest::ERROR, read).await?;
        if message::is_answer(&answer, asked) {
            return Ok(answer);
        }
    }
}

#[cfg(test)]
mod tests;
