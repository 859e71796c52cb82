//! The daemon's process: its threads, its sockets and its end.

use crate::{
    api,
    config::Config,
    confine,
    daemon::{Daemon, Request},
    decisions::{self, Watchers},
    exporter::{self, Exporter},
    http,
    journal::{Artefact, Journal},
    lock,
    mode::Mode,
    origins::{self, Snapshot, server::OriginsServer},
    probe, server,
    watch::{self, Target},
    workload::Workloads,
};
use anyhow::{Context as _, bail};
use std::{
    fs, future,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    thread,
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::oneshot,
};

/// Runs it until it is told to stop.
pub(crate) fn run(config: Config, file: Option<PathBuf>) -> anyhow::Result<()> {
    let (paths, metrics) = (config.paths.clone(), config.metrics);
    let mut journal = Journal::new(&paths.state);
    journal.note([Artefact::Run { dir: paths.run.clone() }])?;
    let _only_one = lock::daemon(&paths.run)?;
    let cgroup_root = probe::cgroup2_mount()?;
    let (published, snapshots) = tokio::sync::watch::channel(Snapshot::default());
    let (watched, targets) = tokio::sync::watch::channel(Target::from(&config));
    let watchers = Arc::new(Watchers::default());
    let workloads = Workloads::new(cgroup_root.clone());
    let daemon = Daemon::start(config, file, journal, workloads, published, watched, Arc::clone(&watchers))?;
    let mode = daemon.mode();
    // Before there is a second thread, which would not be confined by it.
    confine::daemon(&paths, mode, &cgroup_root)?;
    let (requests, received) = mpsc::channel();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    if mode != Mode::Ebpf {
        let (tell, targets, workloads) =
            (requests.clone(), targets.clone(), Workloads::new(cgroup_root.clone()));
        let watch = move || {
            watch::proxy(&targets, workloads, |proxy, ready| tell.send(Request::Proxy(proxy, ready)).is_ok());
        };
        thread::Builder::new().name("watch".to_owned()).spawn(watch)?;
    }
    let (tell, workloads, handle) =
        (requests.clone(), Workloads::new(cgroup_root.clone()), runtime.handle().clone());
    let watch = move || {
        let tell = |routable| tell.send(Request::Routable(routable)).is_ok();
        watch::routable(targets, &handle, workloads, tell);
    };
    thread::Builder::new().name("routable".to_owned()).spawn(watch)?;
    let reader = {
        let (pins, watchers) = (paths.pins.clone(), Arc::clone(&watchers));
        let read = move || decisions::reader::run(&pins, &watchers);
        thread::Builder::new().name("decisions".to_owned()).spawn(read)?
    };
    let mind = thread::Builder::new().name("daemon".to_owned()).spawn(move || daemon.run(&received))?;
    runtime.block_on(async {
        let origins = origins_server(mode, &paths.run, snapshots, Workloads::new(cgroup_root));
        serve_until_told_to_stop(&paths.run, requests.clone(), origins, metrics).await
    })?;
    watchers.end();
    let _already_stopped = requests.send(Request::Stop);
    if reader.join().is_err() {
        tracing::warn!("the thread that reads decisions has panicked");
    }
    if mind.join().is_err() {
        bail!("the daemon's thread panicked; what is steered stays steered");
    }
    Ok(())
}

/// With eBPF the kernel tells the proxy, and with a hosts file nobody knows. Steering does not depend on it.
fn origins_server(
    mode: Mode,
    run: &Path,
    snapshots: tokio::sync::watch::Receiver<Snapshot>,
    workloads: Workloads,
) -> Option<OriginsServer> {
    let path = origins::server::path(run);
    if mode != Mode::Nftables {
        // Of a daemon that was killed.
        let _absent_is_fine = fs::remove_file(path);
        return None;
    }
    let server = OriginsServer::bind(&path, snapshots, workloads);
    server
        .inspect_err(|error| {
            tracing::warn!("proxies cannot be told whose connections are, at {}: {error}", path.display());
        })
        .ok()
}

/// Whoever sends a signal gets no answer; what comes of it is in the log.
async fn reload_on(mut hangup: Signal, requests: mpsc::Sender<Request>) {
    while hangup.recv().await.is_some() {
        let (reply, reloaded) = oneshot::channel();
        if requests.send(Request::Reload(api::Reload::default(), reply)).is_err() {
            break;
        }
        let _logged_already = reloaded.await;
    }
    future::pending::<()>().await;
}

async fn serve_until_told_to_stop(
    run: &Path,
    requests: mpsc::Sender<Request>,
    origins: Option<OriginsServer>,
    metrics: Option<SocketAddr>,
) -> anyhow::Result<()> {
    let socket = run.join("agent.sock");
    let listener = http::bind(&socket).with_context(|| format!("bind {}", socket.display()))?;
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let hangup = signal(SignalKind::hangup())?;
    let serve_origins = async {
        match origins {
            Some(origins) => origins.serve().await,
            None => future::pending().await,
        }
    };
    let exporter = Arc::new(Exporter::new(requests.clone()));
    let serve_metrics = async {
        match metrics {
            Some(address) => exporter::serve(address, Arc::clone(&exporter)).await,
            None => future::pending().await,
        }
    };
    // Where no service manager listens there is nobody to tell.
    let _no_manager = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    tracing::info!(socket = %socket.display(), "ready");
    tokio::select! {
        () = server::serve(listener, requests.clone(), Arc::clone(&exporter)) => {}
        () = serve_metrics => {}
        () = reload_on(hangup, requests) => {}
        () = serve_origins => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    let _no_manager = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    tracing::info!("stopping; what is steered stays steered");
    for socket in [socket, origins::server::path(run)] {
        http::remove(&socket).with_context(|| format!("remove {}", socket.display()))?;
    }
    Ok(())
}
