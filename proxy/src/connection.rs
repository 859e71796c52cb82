//! The life of a connection: whence it came, what it speaks, and so what is done with it.

use crate::{
    context::Context,
    detect::{self, Protocol},
    http,
    names::is_virtual,
    observe::Recorder,
    origin::{self, Origin},
    rewind::Rewind,
    target::Target,
    tunnel,
};
use bytes::{Bytes, BytesMut};
use std::{io, net::SocketAddr, time::Duration};
use tokio::{
    io::AsyncReadExt as _,
    net::TcpStream,
    time::{Instant, sleep, timeout_at},
};

/// How long a client gets to speak first before its destination is dialled, which may be the one to begin.
const CLIENT_FIRST: Duration = Duration::from_millis(10);
/// How long a client that began something like HTTP gets for its head. A tunnel loses nothing, so this can be short.
const HEAD_TIMEOUT: Duration = Duration::from_secs(2);
/// Whose a connection is that nobody tells of.
const UNKNOWN_SERVICE: &str = "unknown";
/// Longest head that is looked at.
const MAX_HEAD: usize = 64 << 10;

/// Serves a connection until it ends.
pub(crate) async fn serve(context: &Context, stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let origin = origin::of(&stream, stream.local_addr()?).inspect_err(|error| {
        tracing::warn!("a connection was closed whose origin cannot be read: {error}");
        context.metrics.origin_errors.inc();
        tunnel::reset(&stream);
    })?;
    context.metrics.connection(if origin.is_some() { "steered" } else { "direct" });
    let recorder = |service: &str| Recorder::new(context.metrics.clone(), context.metrics.service(service));
    let Some(origin) = origin else {
        http::serve(context, recorder("direct"), None, Rewind::new(Bytes::new(), stream)).await;
        return Ok(());
    };
    let destination = origin.destination;
    let name = context.snapshot.load().addresses.name_at(destination.ip()).cloned();
    if name.is_none() && context.is_own(destination) {
        let metrics = &context.metrics;
        if is_virtual(destination.ip()) { &metrics.unassigned_addresses } else { &metrics.self_loops }.inc();
        tunnel::reset(&stream);
        return Ok(());
    }
    let service = service(context, &origin, &stream).await;
    let recorder = recorder(service.as_deref().unwrap_or(UNKNOWN_SERVICE));
    let target = name.as_deref().map_or(Target::Origin(destination), Target::Name);
    relay_or_route(context, recorder, target, stream).await
}

/// As the kernel tells, or else the agent.
async fn service(context: &Context, origin: &Origin, stream: &TcpStream) -> Option<String> {
    if origin.service.is_some() {
        return origin.service.clone();
    }
    // A client that is gone already is nobody's any more.
    let (client, proxy) = (stream.peer_addr().ok()?, stream.local_addr().ok()?);
    context.origins.tcp(client, proxy).await
}

/// Serves a connection to a name's own address until it ends.
pub(crate) async fn serve_named(context: &Context, name: &str, stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    context.metrics.connection("named");
    let recorder = Recorder::new(context.metrics.clone(), context.metrics.service("named"));
    relay_or_route(context, recorder, Target::Name(name), stream).await
}

async fn relay_or_route(
    context: &Context,
    recorder: Recorder,
    target: Target<'_>,
    mut client: TcpStream,
) -> io::Result<()> {
    let mut dialled = None;
    let mut head = BytesMut::with_capacity(4 << 10);
    tokio::select! {
        biased;
        first = client.read_buf(&mut head) => { first?; }
        () = sleep(CLIENT_FIRST) => {
            let Some(upstream) = dial(context, recorder.service(), target, &client).await else { return Ok(()) };
            tokio::select! {
                first = client.read_buf(&mut head) => { first?; }
                _server_spoke_or_ended = upstream.readable() => {}
            }
            dialled = Some(upstream);
        }
    }
    if !head.is_empty() && is_routed(context, &mut client, &mut head).await? {
        http::serve(context, recorder, Some(target), Rewind::new(head.freeze(), client)).await;
        return Ok(());
    }
    let upstream = match dialled {
        Some(upstream) => upstream,
        None => match dial(context, recorder.service(), target, &client).await {
            Some(upstream) => upstream,
            None => return Ok(()),
        },
    };
    tunnel::relay(&context.metrics, recorder.service(), head.freeze(), client, upstream).await;
    Ok(())
}

/// Reads on while it may be HTTP; true when it is, for a host of ours.
async fn is_routed(context: &Context, client: &mut TcpStream, head: &mut BytesMut) -> io::Result<bool> {
    let deadline = Instant::now() + HEAD_TIMEOUT;
    loop {
        match detect::protocol(head) {
            Protocol::Http1 { host } => {
                return Ok(host.is_some_and(|host| context.snapshot.load().routes.find(&host).is_some()));
            }
            Protocol::Opaque => return Ok(false),
            Protocol::Undecided if head.len() >= MAX_HEAD => return Ok(false),
            Protocol::Undecided => {}
        }
        // One that ended, or is too slow, goes where it was going.
        let Ok(read) = timeout_at(deadline, client.read_buf(head)).await else { return Ok(false) };
        if read? == 0 {
            return Ok(false);
        }
    }
}

/// Connects to where the client was going; a client that cannot get there learns it as a reset.
async fn dial(context: &Context, service: &str, target: Target<'_>, client: &TcpStream) -> Option<TcpStream> {
    let endpoints: Vec<SocketAddr> = match target {
        Target::Origin(origin) => vec![origin],
        Target::Name(name) => {
            let snapshot = context.snapshot.load();
            snapshot.routes.find(name).map(|cluster| cluster.endpoints().collect()).unwrap_or_default()
        }
    };
    for endpoint in endpoints {
        match tunnel::dial(endpoint).await {
            Ok(upstream) => return Some(upstream),
            Err(error) => tracing::debug!(%endpoint, "dial: {error}"),
        }
    }
    context.metrics.tunnel(service, "not_connected");
    tunnel::reset(client);
    None
}
