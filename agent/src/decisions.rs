//! Decisions, told to those who watch while they are made.
//!
//! Data flows one way. The daemon's mind publishes a [`Snapshot`] while somebody watches; the [`reader`] takes what the
//! hooks tell, says whose it is and why, and hands each watcher its lines. Nobody waits for a watcher: what does not fit
//! into its queue is counted and lost.

pub(crate) mod reader;

use crate::{
    api::{self, Watched},
    config::Policy,
    reason::Reason,
    routable::Routable,
    rules::{self, Verdict},
};
use agent_ebpf::{AF_INET, Counter, Event, IPPROTO_UDP, Limit};
use bytes::{Bytes, BytesMut};
use hyper::body::{Body, Frame};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    convert::Infallible,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};
use tokio::sync::mpsc::{self, error::TrySendError};

/// Watchers at once. The control socket has places for more callers than these.
pub(crate) const MAX_WATCHERS: usize = 16;
/// Lines that wait for one watcher; further ones are lost.
const QUEUE: usize = 4096;
/// Lines that are sent at once.
const LINES: usize = 256;
/// Destinations whose rules are remembered.
const MAX_KNOWN: usize = 4096;

/// What decisions are explained by: as the daemon applied it last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Snapshot {
    /// By the ids that the hooks know.
    pub(crate) services: BTreeMap<u32, Service>,
    pub(crate) routable: Arc<Routable>,
    /// Where the policies are written.
    pub(crate) file: PathBuf,
}

/// A service that is enabled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Service {
    pub(crate) name: String,
    pub(crate) policy: Policy,
}

/// Says what was decided in words, by one snapshot.
struct Teller {
    snapshot: Arc<Snapshot>,
    rules: HashMap<(u32, SocketAddr, u32), String>,
}

impl Teller {
    fn new(snapshot: Arc<Snapshot>) -> Self {
        Self { snapshot, rules: HashMap::new() }
    }

    /// Nothing where the event is none that these programs tell.
    fn decision(&mut self, event: &Event, time: String) -> Option<api::Decision> {
        let outcome = (*Counter::ALL.get(event.counter as usize)?).into();
        let destination = destination(event);
        let service = self.snapshot.services.get(&event.service);
        Some(api::Decision {
            time,
            service: service.map_or_else(|| "unknown".to_owned(), |service| service.name.clone()),
            pid: event.pid,
            command: command(event),
            uid: event.uid,
            destination,
            transport: if event.transport == IPPROTO_UDP { api::Transport::Udp } else { api::Transport::Tcp },
            decision: outcome,
            rule: self.rule(event, destination, outcome),
        })
    }

    /// A policy may be large, and what is connected to is the same again and again.
    fn rule(&mut self, event: &Event, destination: SocketAddr, outcome: api::Outcome) -> String {
        let Some(service) = self.snapshot.services.get(&event.service) else { return "unknown".to_owned() };
        if self.rules.len() >= MAX_KNOWN {
            self.rules.clear();
        }
        let key = (event.service, destination, event.counter);
        let rule = || rule(&self.snapshot, &service.policy, destination, outcome);
        self.rules.entry(key).or_insert_with(rule).clone()
    }
}

/// What policy says of a destination, and why; else what kept the hooks from doing it.
fn rule(snapshot: &Snapshot, policy: &Policy, destination: SocketAddr, outcome: api::Outcome) -> String {
    match (rules::decide(policy, &snapshot.routable, destination), outcome) {
        (Verdict::Steered(_), api::Outcome::PassedByRule) => "the socket is bound to an interface".to_owned(),
        (Verdict::Local, _) => Reason::new(&snapshot.file, &Verdict::Local).because,
        (verdict, _) => {
            let reason = Reason::new(&snapshot.file, &verdict);
            format!("{}: {}", reason.because, reason.place())
        }
    }
}

fn destination(event: &Event) -> SocketAddr {
    let [a, b, c, d, ..] = event.addr;
    let ip: IpAddr = if event.family == AF_INET { [a, b, c, d].into() } else { event.addr.into() };
    (ip, event.port).into()
}

fn command(event: &Event) -> String {
    let name = event.comm.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(name).into_owned()
}

impl From<Counter> for api::Outcome {
    fn from(counter: Counter) -> Self {
        match counter {
            Counter::Steered => Self::Steered,
            Counter::PassedByRule => Self::PassedByRule,
            Counter::PassedProxyAbsent => Self::PassedProxyAbsent,
            Counter::Refused => Self::Refused,
            Counter::Errors => Self::Error,
            Counter::Observed => Self::Observed,
            Counter::Queries => Self::Query,
        }
    }
}

/// Who watches, shared by the mind, which lets them in, and the reader, which serves them.
#[derive(Debug, Default)]
pub(crate) struct Watchers {
    shared: Mutex<Shared>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Shared {
    watchers: Vec<Watcher>,
    snapshot: Arc<Snapshot>,
    /// Whether the daemon stops.
    ended: bool,
    /// What watchers were not told, all of them together.
    dropped: u64,
}

#[derive(Debug)]
struct Watcher {
    watch: api::Watch,
    limit: Limit,
    /// What it was not told, and has not been told of.
    dropped: u64,
    lines: mpsc::Sender<Bytes>,
}

/// What has to be told so that everybody gets what they asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Interest {
    /// Ids; absent for all.
    services: Option<BTreeSet<u32>>,
    rate: u32,
    snapshot: Arc<Snapshot>,
}

impl Watchers {
    /// One more; none where there are too many.
    pub(crate) fn join(&self, watch: api::Watch) -> Option<Lines> {
        let mut shared = self.shared();
        shared.watchers.retain(Watcher::is_there);
        if shared.watchers.len() >= MAX_WATCHERS {
            return None;
        }
        let (lines, receiver) = mpsc::channel(QUEUE);
        let limit = Limit { since_ns: 0, told: 0, dropped: 0 };
        shared.watchers.push(Watcher { watch, limit, dropped: 0, lines });
        self.changed.notify_all();
        Some(Lines(receiver))
    }

    /// Whether anybody watches.
    pub(crate) fn are_any(&self) -> bool {
        self.shared().watchers.iter().any(Watcher::is_there)
    }

    /// How many watch, and how much they were not told since the daemon started.
    pub(crate) fn count(&self) -> (u64, u64) {
        let mut shared = self.shared();
        shared.watchers.retain(Watcher::is_there);
        (shared.watchers.len() as u64, shared.dropped)
    }

    /// Says what decisions are explained by from now on.
    pub(crate) fn publish(&self, snapshot: Snapshot) {
        // Not compared with the one before: policies are the same wherever they are written, and rules tell where.
        self.shared().snapshot = Arc::new(snapshot);
    }

    /// Ends every watch, since the daemon stops.
    pub(crate) fn end(&self) {
        let mut shared = self.shared();
        shared.ended = true;
        shared.watchers.clear();
        self.changed.notify_all();
    }

    /// Waits until somebody watches; false when nobody will any more.
    fn wait(&self) -> bool {
        let mut shared = self.shared();
        while shared.watchers.is_empty() && !shared.ended {
            shared = self.changed.wait(shared).unwrap_or_else(PoisonError::into_inner);
        }
        !shared.ended
    }

    /// What is to be told now, if anybody is left.
    fn interest(&self) -> Option<Interest> {
        let mut shared = self.shared();
        shared.watchers.retain(Watcher::is_there);
        let rate = shared.watchers.iter().map(|watcher| watcher.watch.rate).max()?;
        let snapshot = Arc::clone(&shared.snapshot);
        let wants_all = shared.watchers.iter().any(|watcher| watcher.watch.services.is_empty());
        let is_watched = |name: &String| shared.watchers.iter().any(|watcher| watcher.wants(name));
        let ids = snapshot.services.iter().filter(|(_, service)| is_watched(&service.name));
        let services = (!wants_all).then(|| ids.map(|(id, _)| *id).collect());
        Some(Interest { services, rate, snapshot })
    }

    /// Hands a decision to those who want it.
    fn tell(&self, time_ns: u64, decision: api::Decision) {
        let mut shared = self.shared();
        let service = decision.service.clone();
        let line = line(&Watched::Decision(decision));
        let wanting = shared.watchers.iter_mut().filter(|watcher| watcher.wants(&service));
        let told = wanting.map(|watcher| watcher.tell(time_ns, &line));
        shared.dropped += told.filter(|told| !told).count() as u64;
    }

    /// Tells everybody how many decisions they were not told, the hooks' among them: `more`, of some of the services that
    /// are watched.
    fn tell_dropped(&self, more: u64) {
        let mut shared = self.shared();
        shared.dropped += more * shared.watchers.len() as u64;
        shared.watchers.iter_mut().for_each(|watcher| watcher.tell_dropped(more));
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watcher {
    fn is_there(&self) -> bool {
        !self.lines.is_closed()
    }

    fn wants(&self, service: &str) -> bool {
        self.watch.services.is_empty() || self.watch.services.contains(service)
    }

    fn tell(&mut self, time_ns: u64, line: &Bytes) -> bool {
        let told = self.limit.allows(self.watch.rate, time_ns) && self.lines.try_send(line.clone()).is_ok();
        self.dropped += u64::from(!told);
        told
    }

    fn tell_dropped(&mut self, more: u64) {
        self.dropped += more;
        if self.dropped == 0 {
            return;
        }
        match self.lines.try_send(line(&Watched::Dropped { dropped: self.dropped })) {
            Ok(()) => self.dropped = 0,
            Err(TrySendError::Full(_) | TrySendError::Closed(_)) => {}
        }
    }
}

fn line(watched: &Watched) -> Bytes {
    let mut line = serde_json::to_vec(watched).unwrap_or_default();
    line.push(b'\n');
    line.into()
}

/// A watcher's lines, as a body: it ends when the daemon stops, and who drops it watches no more.
#[derive(Debug)]
pub(crate) struct Lines(mpsc::Receiver<Bytes>);

impl Body for Lines {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let mut lines = Vec::new();
        self.0.poll_recv_many(context, &mut lines, LINES).map(|count| {
            let together = || lines.iter().flatten().collect::<BytesMut>().freeze();
            (count > 0).then(|| Ok(Frame::data(together())))
        })
    }
}

#[cfg(test)]
mod tests;
