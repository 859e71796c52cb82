//! DNS for the services beside this proxy: names that are routed have virtual addresses, everything else is asked of the
//! resolver that the client meant to ask.
//!
//! One thread serves all of it, with sockets of its own: a worker that is busy with requests must not delay look-ups, and
//! a message takes microseconds. More threads would share the sockets by a hash of the client, and gain nothing.

mod message;
mod resolver;
mod tcp;
mod udp;

#[cfg(test)]
mod testing;

use crate::{
    accept::{self, Listeners},
    observe::Metrics,
    origin,
    origins::Origins,
    snapshot::Current,
    worker::{HEARTBEAT, Questions},
};
use message::{Decision, Transport};
use std::{
    future::Future,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
    time::Duration,
};
use tokio::{
    net::{TcpStream, UdpSocket},
    runtime,
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::{MissedTickBehavior, interval, sleep, timeout},
};

/// UDP ports from the configured one on: one for each resolver that a host may have captured.
pub(crate) const PORTS: u16 = 16;
/// How long a resolver may take.
const QUERY_TIMEOUT: Duration = Duration::from_secs(5);
/// Queries by UDP that wait for a resolver; further ones are dropped.
const MAX_IN_FLIGHT: u32 = 1024;
/// Connections at once; further ones wait.
const MAX_CONNECTIONS: u32 = 128;
/// How long datagrams that were steered already may still come after the kernel has seen that no more are welcome.
const LAST_DATAGRAMS: Duration = Duration::from_millis(250);

/// What all queries share.
#[derive(Debug)]
pub(crate) struct Server {
    snapshot: Arc<Current>,
    metrics: Metrics,
    origins: Origins,
    /// Becomes true when this process is to end.
    drain: watch::Receiver<bool>,
    in_flight: Arc<Semaphore>,
    connections: Arc<Semaphore>,
}

impl Server {
    pub(crate) fn new(
        snapshot: Arc<Current>,
        metrics: Metrics,
        origins: Origins,
        drain: watch::Receiver<bool>,
    ) -> Self {
        let places = |count: u32| Arc::new(Semaphore::new(count as usize));
        let (in_flight, connections) = (places(MAX_IN_FLIGHT), places(MAX_CONNECTIONS));
        Self { snapshot, metrics, origins, drain, in_flight, connections }
    }

    fn decide(&self, query: &[u8], transport: Transport) -> Decision {
        message::decide(query, &self.snapshot.load().addresses, transport)
    }

    fn count(&self, transport: &'static str, outcome: &'static str) {
        self.metrics.dns_query(transport, outcome);
    }

    /// Resolves when this process is to end.
    fn draining(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut drain = self.drain.clone();
        async move {
            let _ended = drain.wait_for(|drain| *drain).await;
        }
    }

    /// Resolves when nothing is open.
    async fn all_ended(&self) {
        let _connections = self.connections.acquire_many(MAX_CONNECTIONS).await;
        let _queries = self.in_flight.acquire_many(MAX_IN_FLIGHT).await;
    }
}

/// Serves until the process is to end, then finishes what is open, for so long. `listening` hears whether it can.
pub(crate) fn run(
    server: Server,
    port: u16,
    questions: Questions,
    drain_timeout: Duration,
    listening: impl FnOnce(io::Result<()>),
) {
    let runtime = match runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return listening(Err(error)),
    };
    runtime.block_on(async {
        match Sockets::bind(port) {
            Ok(sockets) => {
                listening(Ok(()));
                serve(&Arc::new(server), sockets, questions, drain_timeout).await;
            }
            Err(error) => listening(Err(error)),
        }
    });
}

/// Everything that is listened on.
struct Sockets {
    udp: Vec<Arc<UdpSocket>>,
    tcp: Listeners,
}

impl Sockets {
    /// The listeners come last: the kernel takes them as the sign that all of it is there.
    fn bind(port: u16) -> io::Result<Self> {
        let mut udp = bind_datagrams(Ipv4Addr::LOCALHOST.into(), port)?;
        match bind_datagrams(Ipv6Addr::LOCALHOST.into(), port) {
            Ok(sockets) => udp.extend(sockets),
            Err(error) if accept::is_without_ipv6(&error) => {}
            Err(error) => return Err(error),
        }
        Ok(Self { udp, tcp: Listeners::bind(port)? })
    }

    /// Tells the kernel that these sockets are being served.
    fn heartbeat(&self) {
        self.udp.iter().for_each(|socket| origin::heartbeat(socket.as_ref()));
        self.tcp.heartbeat();
    }
}

fn bind_datagrams(ip: IpAddr, first: u16) -> io::Result<Vec<Arc<UdpSocket>>> {
    (first..=first + (PORTS - 1))
        .map(|port| accept::bind_datagrams((ip, port).into()).map(Arc::new))
        .collect()
}

async fn serve(server: &Arc<Server>, sockets: Sockets, mut questions: Questions, drain_timeout: Duration) {
    for socket in &sockets.udp {
        tokio::spawn(serve_datagrams(Arc::clone(server), Arc::clone(socket)));
    }
    let mut heartbeat = interval(HEARTBEAT);
    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            (stream, place) = accept(server, &sockets.tcp) => spawn(server, stream, place),
            _ = heartbeat.tick() => sockets.heartbeat(),
            Some(reply) = questions.recv() => {
                sockets.heartbeat();
                let _nobody_waits_any_more = reply.send(());
            }
            () = server.draining() => break,
        }
    }
    drain(server, sockets.tcp, drain_timeout).await;
}

/// Serves a socket for as long as the runtime lives, also when a query was too much for the task that read it.
async fn serve_datagrams(server: Arc<Server>, socket: Arc<UdpSocket>) {
    loop {
        let serving = tokio::spawn(udp::serve(Arc::clone(&server), Arc::clone(&socket)));
        if let Err(error) = serving.await {
            tracing::error!("a task that served DNS ended, and begins anew: {error}");
        }
    }
}

/// The next connection, and its place.
async fn accept(server: &Server, listeners: &Listeners) -> (TcpStream, Option<OwnedSemaphorePermit>) {
    let place = Arc::clone(&server.connections).acquire_owned().await.ok();
    (listeners.accept().await, place)
}

fn spawn(server: &Arc<Server>, stream: TcpStream, place: Option<OwnedSemaphorePermit>) {
    let server = Arc::clone(server);
    tokio::spawn(async move {
        if let Err(error) = tcp::serve(&server, stream).await {
            tracing::debug!("DNS connection: {error}");
        }
        drop(place);
    });
}

/// Without listeners the kernel steers no more queries here; those that it did steer are answered.
async fn drain(server: &Arc<Server>, listeners: Listeners, limit: Duration) {
    while let Some(stream) = listeners.accept_waiting().await {
        spawn(server, stream, Arc::clone(&server.connections).try_acquire_owned().ok());
    }
    drop(listeners);
    sleep(LAST_DATAGRAMS.min(limit)).await;
    if timeout(limit, server.all_ended()).await.is_err() {
        tracing::warn!("DNS queries were still open after {limit:?} and are cut off");
    }
}
