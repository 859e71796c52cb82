//! The life of the process: workers begin, signals come, workers end.

use crate::{
    admin::{self, Admin},
    config,
    context::Context,
    dns,
    model::Config,
    names::{self, Name, VirtualAddresses},
    observe::Metrics,
    origins::Origins,
    pool::Pool,
    resolve::{self, Resolved},
    snapshot::{Current, Snapshot},
    worker,
};
use anyhow::Context as _;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::{
    path::Path,
    sync::{Arc, mpsc},
    thread::{self, JoinHandle},
    time::Duration,
};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::{mpsc::unbounded_channel, watch},
};

/// Runs until it is told to end, and has ended what was open.
pub(crate) fn run(file: &Path, config: &Config) -> anyhow::Result<()> {
    if nix::unistd::geteuid().is_root() {
        tracing::warn!("running as root, which is not needed: run as an unprivileged user");
    }
    raise_descriptor_limit();
    let metrics = Metrics::default();
    let snapshot = Arc::new(Current::from_pointee(Snapshot::new(
        config.clone(),
        &VirtualAddresses::default(),
        &metrics,
    )));
    let (drain, draining) = watch::channel(false);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let listener = runtime
        .block_on(TcpListener::bind(config.admin))
        .with_context(|| format!("listen on {}", config.admin))?;
    let names: Arc<[Name]> = names::loopback(&config.virtual_hosts).into();
    let (mut workers, mut questions) = start_workers(config, &names, &snapshot, &metrics, &draining)?;
    if let Some(port) = config.dns {
        let origins = Origins::at(config.origins.clone());
        let server = dns::Server::new(Arc::clone(&snapshot), metrics.clone(), origins, draining);
        let (worker, ask) = start_dns(server, port, config.drain_timeout)?;
        workers.push(worker);
        questions.push(ask);
    }
    let resolved = Arc::new(Resolved::default());
    let resolving = runtime.spawn(resolve::run(Arc::clone(&snapshot), Arc::clone(&resolved)));
    let routable = admin::Routable { snapshot: Arc::clone(&snapshot), names, resolved };
    let admin = Arc::new(Admin::new(metrics.registry(), questions, routable));
    let serving = runtime.spawn(admin::serve(listener, Arc::clone(&admin)));
    admin.set_ready(true);
    // Where no service manager listens there is nobody to tell.
    let _no_manager = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    tracing::info!(port = config.listen.port, admin = %config.admin, workers = workers.len(), "ready");
    runtime.block_on(signals(file, &snapshot, &metrics))?;
    admin.set_ready(false);
    let _no_manager = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    tracing::info!("draining");
    drain.send_replace(true);
    runtime.block_on(async { tokio::task::spawn_blocking(|| end_workers(workers)).await })?;
    serving.abort();
    resolving.abort();
    Ok(())
}

/// Starts the workers and waits until every one listens.
fn start_workers(
    config: &Config,
    names: &Arc<[Name]>,
    snapshot: &Arc<Current>,
    metrics: &Metrics,
    draining: &watch::Receiver<bool>,
) -> anyhow::Result<(Vec<JoinHandle<()>>, Vec<admin::Worker>)> {
    let (listening, heard) = mpsc::channel();
    let (port, drain_timeout) = (config.listen.port, config.drain_timeout);
    let own_ports: Arc<[u16]> = config.own_ports().into();
    let mut asked = Vec::new();
    let mut start = |index| {
        let (ask, questions) = unbounded_channel();
        asked.push(ask);
        let (snapshot, metrics, drain) = (Arc::clone(snapshot), metrics.clone(), draining.clone());
        let (names, own_ports) = (Arc::clone(names), Arc::clone(&own_ports));
        let origins = config.origins.clone();
        let listening = listening.clone();
        let work = move || {
            let (pool, origins) = (Pool::default(), Origins::at(origins));
            let context = Context { snapshot, metrics, pool, origins, names, drain, own_ports };
            // The receiver waits for all workers; if it is gone, so is this process.
            worker::run(context, port, questions, drain_timeout, |result| _ = listening.send(result));
        };
        thread::Builder::new().name(format!("worker-{index}")).spawn(work)
    };
    let workers =
        (0..config.listen.workers).map(&mut start).collect::<Result<Vec<_>, _>>().context("start workers")?;
    for _ in &workers {
        heard.recv().context("a worker ended before it listened")??;
    }
    Ok((workers, asked))
}

/// Starts the thread that serves DNS, and waits until it listens.
fn start_dns(
    server: dns::Server,
    port: u16,
    drain_timeout: Duration,
) -> anyhow::Result<(JoinHandle<()>, admin::Worker)> {
    let (ask, questions) = unbounded_channel();
    let (listening, heard) = mpsc::channel();
    let work = move || dns::run(server, port, questions, drain_timeout, |result| _ = listening.send(result));
    let thread =
        thread::Builder::new().name("dns".to_owned()).spawn(work).context("start a thread for DNS")?;
    heard.recv().context("the thread for DNS ended before it listened")??;
    Ok((thread, ask))
}

fn end_workers(workers: Vec<JoinHandle<()>>) {
    for worker in workers {
        if worker.join().is_err() {
            tracing::error!("a worker panicked");
        }
    }
}

/// Handles signals until one says to end.
async fn signals(file: &Path, snapshot: &Current, metrics: &Metrics) -> anyhow::Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut hangup = signal(SignalKind::hangup())?;
    loop {
        tokio::select! {
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            _ = hangup.recv() => reload(file, snapshot, metrics),
        }
    }
}

/// Whole or not at all: a file that is wrong leaves what holds as it is.
fn reload(file: &Path, snapshot: &Current, metrics: &Metrics) {
    match config::load(file) {
        Ok(config) => {
            let next = Snapshot::new(config, &snapshot.load().addresses, metrics);
            snapshot.store(Arc::new(next));
            tracing::info!("virtual hosts and clusters were read anew");
        }
        Err(error) => tracing::error!("not reloaded, going on as before: {error}"),
    }
}

/// Each relayed connection takes two descriptors; the soft limit is often 1024.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!("the limit of open files cannot be raised: {error}");
    }
}
