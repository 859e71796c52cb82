//! Bytes from one connection to another and back, as they come, with each side's end passed on.

use crate::observe::Metrics;
use bytes::Bytes;
use socket2::SockRef;
use std::{io, net::SocketAddr, time::Duration};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    time::timeout,
};

/// How long the original destination may take to accept.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes read at once.
const CHUNK: usize = 16 << 10;

/// Connects to where a client was going.
pub(crate) async fn dial(destination: SocketAddr) -> io::Result<TcpStream> {
    let upstream = timeout(CONNECT_TIMEOUT, TcpStream::connect(destination)).await??;
    upstream.set_nodelay(true)?;
    Ok(upstream)
}

/// Ends a connection at once, as a refused or broken one ends: the client must not take what was lost for received.
pub(crate) fn reset(stream: &TcpStream) {
    // The option only shortens the end; without it the client sees a close.
    let _best_effort = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// Relays until both sides have ended, or one broke.
pub(crate) async fn relay(
    metrics: &Metrics,
    service: &str,
    prefix: Bytes,
    mut client: TcpStream,
    mut upstream: TcpStream,
) {
    let outcome = match both_ways(metrics, prefix, &mut client, &mut upstream).await {
        Ok(()) => "ended",
        Err(error) => {
            tracing::debug!("tunnel: {error}");
            reset(&client);
            reset(&upstream);
            "broken"
        }
    };
    metrics.tunnel(service, outcome);
}

async fn both_ways(
    metrics: &Metrics,
    prefix: Bytes,
    client: &mut TcpStream,
    upstream: &mut TcpStream,
) -> io::Result<()> {
    let (sent, received) = metrics.tunnel_bytes();
    let (client_read, client_write) = client.split();
    let (upstream_read, mut upstream_write) = upstream.split();
    if !prefix.is_empty() {
        upstream_write.write_all(&prefix).await?;
        sent.inc_by(prefix.len() as u64);
    }
    tokio::try_join!(
        one_way(client_read, upstream_write, |bytes| _ = sent.inc_by(bytes)),
        one_way(upstream_read, client_write, |bytes| _ = received.inc_by(bytes)),
    )?;
    Ok(())
}

/// The end of what is read is the end of what is written (half-close): the other way goes on.
async fn one_way(mut from: ReadHalf<'_>, mut to: WriteHalf<'_>, count: impl Fn(u64)) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    loop {
        let len = from.read(&mut chunk).await?;
        if len == 0 {
            return match to.shutdown().await {
                Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
                result => result,
            };
        }
        to.write_all(&chunk[..len]).await?;
        count(len as u64);
    }
}
