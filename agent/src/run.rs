//! The daemon's process: its threads, its sockets and its end.

use crate::{
    config::Config,
    confine,
    daemon::{Daemon, Request},
    http, lock,
    mode::Mode,
    origins::{self, Snapshot, server::OriginsServer},
    probe, server, watch,
    workload::Workloads,
};
use anyhow::{Context as _, bail};
use std::{
    fs, future,
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
};
use tokio::signal::unix::{SignalKind, signal};

/// Runs it until it is told to stop.
pub(crate) fn run(config: Config, file: Option<PathBuf>) -> anyhow::Result<()> {
    let (paths, proxy) = (config.paths.clone(), config.proxy.clone());
    let follows_routable = config.follows_routable();
    let _only_one = lock::daemon(&paths.run)?;
    let cgroup_root = probe::cgroup2_mount()?;
    let (published, snapshots) = tokio::sync::watch::channel(Snapshot::default());
    let daemon = Daemon::start(config, file, Workloads::new(cgroup_root.clone()), published)?;
    let mode = daemon.mode();
    // Before there is a second thread, which would not be confined by it.
    confine::daemon(&paths, mode, &cgroup_root)?;
    let (requests, received) = mpsc::channel();
    if mode != Mode::Ebpf {
        let cgroup_root = cgroup_root.clone();
        let (tell, proxy) = (requests.clone(), proxy.clone());
        let watch = move || {
            watch::proxy(&proxy, Workloads::new(cgroup_root), |ready| {
                tell.send(Request::Proxy(ready)).is_ok()
            });
        };
        thread::Builder::new().name("watch".to_owned()).spawn(watch)?;
    }
    if follows_routable {
        let (tell, proxy, workloads) = (requests.clone(), proxy.clone(), Workloads::new(cgroup_root.clone()));
        let watch = move || {
            watch::routable(&proxy, workloads, |routable| tell.send(Request::Routable(routable)).is_ok());
        };
        thread::Builder::new().name("routable".to_owned()).spawn(watch)?;
    }
    let mind = thread::Builder::new().name("daemon".to_owned()).spawn(move || daemon.run(&received))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let origins = origins_server(mode, &paths.run, snapshots, Workloads::new(cgroup_root));
        serve_until_told_to_stop(&paths.run, requests.clone(), origins).await
    })?;
    let _already_stopped = requests.send(Request::Stop);
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

async fn serve_until_told_to_stop(
    run: &Path,
    requests: mpsc::Sender<Request>,
    origins: Option<OriginsServer>,
) -> anyhow::Result<()> {
    let socket = run.join("agent.sock");
    let listener = http::bind(&socket).with_context(|| format!("bind {}", socket.display()))?;
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let serve_origins = async {
        match origins {
            Some(origins) => origins.serve().await,
            None => future::pending().await,
        }
    };
    // Where no service manager listens there is nobody to tell.
    let _no_manager = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    tracing::info!(socket = %socket.display(), "ready");
    tokio::select! {
        () = server::serve(listener, requests) => {}
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
