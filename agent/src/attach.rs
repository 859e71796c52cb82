//! The step before a service's first process: a unit's `ExecStartPre=`, a container's hook.

use crate::{
    api, cli, client,
    config::{Config, ConfigError, DEFAULT_STATE, Paths, check_name},
    journal::{Artefact, Journal},
    lock,
    mode::Mode,
    plan, probe,
    redirect::{Cgroup, ebpf::Ebpf},
    state::{Entry, State, StateFile},
    workload::{
        self, Workloads,
        oci::{self, Starting},
        started,
    },
};
use anyhow::{Context as _, bail};
use std::{
    io,
    path::Path,
    process::{self, ExitCode},
    sync::mpsc,
    thread,
    time::Duration,
};

/// How long a runtime may take to tell of a container; it does so at once.
const STATE_PATIENCE: Duration = Duration::from_secs(2);
/// How long a container's start may be held up by a daemon that hangs.
const ATTACH_PATIENCE: Duration = Duration::from_secs(10);

/// Attaches to the cgroup that this process is in. With eBPF it needs no daemon: what is pinned is attached. With
/// nf_tables only a daemon keeps the proxy alive. Names are for every process.
pub(crate) fn unit(config: &Config, attach: &cli::Attach) -> anyhow::Result<api::Joined> {
    let state = StateFile::new(&config.paths.state).load()?;
    let service = attach.service.as_deref();
    if state.mode() == Some(Mode::Nftables) {
        return by_daemon(config, service, None);
    }
    let workloads = Workloads::new(probe::cgroup2_mount()?);
    let cgroup = workloads.cgroup_of(process::id().cast_signed())?;
    let joined = api::Joined { cgroup: workloads.path_of(&cgroup), notes: vec![] };
    if state.mode() == Some(Mode::Hosts) {
        return Ok(joined);
    }
    let _held = lock::kernel(&config.paths.run)?;
    // It may have been disabled while this waited.
    let state = StateFile::new(&config.paths.state).load()?;
    let Some(name) = service else {
        note_pins(config);
        ebpf(config).attach_proxy(&cgroup)?;
        return Ok(joined);
    };
    let Some(entry) = state.get(name) else {
        bail!("service `{name}` is not enabled; `mesh-redirect enable {name}` does it");
    };
    without_daemon(config, name, entry, cgroup)?;
    Ok(joined)
}

/// Attaches to the cgroup of a container that is about to start, where it is an enabled service. Every container of the
/// host passes here: one that is none of ours starts whatever is wrong with us, and soon.
pub(crate) fn container(config: Result<Config, ConfigError>) -> ExitCode {
    let Err(Failed { required, cause }) = try_container(config) else { return ExitCode::SUCCESS };
    tracing::error!("{cause:#}");
    if required { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// A container that could not be attached to.
struct Failed {
    /// Whether it must not start unsteered.
    required: bool,
    cause: anyhow::Error,
}

impl Failed {
    fn new(required: bool) -> impl FnOnce(anyhow::Error) -> Self {
        move |cause| Self { required, cause }
    }
}

fn try_container(config: Result<Config, ConfigError>) -> Result<(), Failed> {
    // First, so that no runtime is left writing to nobody.
    let starting = within(STATE_PATIENCE, "the container's state", || Ok(Starting::read(io::stdin())?));
    let dir = config.as_ref().map_or(Path::new(DEFAULT_STATE), |config| &config.paths.state);
    let state = StateFile::new(dir).load().map_err(|error| Failed::new(false)(error.into()))?;
    // It may be any of them.
    let any_required = state.containers().any(|(_, _, wanted)| wanted.required);
    let starting = starting.map_err(Failed::new(any_required))?;
    let services = services(&state, &starting);
    if services.is_empty() {
        return Ok(());
    }
    let required = services.iter().any(|(_, required)| *required);
    let attach = move || {
        let config = config?;
        services.iter().try_for_each(|(name, _)| {
            let attached = attach_started(&config, &state, name, &starting);
            attached.with_context(|| format!("attach service `{name}` to container {}", starting.id))
        })
    };
    within(ATTACH_PATIENCE, "the kernel's lock or the daemon", attach).map_err(Failed::new(required))
}

/// The enabled services that a container is, and whether it must not start unless steered.
fn services(state: &State, starting: &Starting) -> Vec<(String, bool)> {
    // Where there are none the container's name need not be found out.
    if state.containers().next().is_none() {
        return Vec::new();
    }
    let names = starting.names();
    let ours = state.containers().filter(|(_, _, wanted)| {
        starting.is(&wanted.name, &names) || wanted.id.as_ref() == Some(&starting.id)
    });
    ours.map(|(name, _, wanted)| (name.to_owned(), wanted.required)).collect()
}

fn attach_started(config: &Config, state: &State, name: &str, starting: &Starting) -> anyhow::Result<()> {
    let Some(entry) = state.get(name).filter(|_| state.mode() != Some(Mode::Hosts)) else { return Ok(()) };
    let process = workload::path_of_process(starting.pid).context("find its cgroup")?;
    let hook = workload::path_of_process(process::id().cast_signed())?;
    let Some(path) = oci::cgroup(&process, &hook, &starting.id) else {
        bail!("it has no cgroup of its own, and {process} has others' processes in it");
    };
    let (root, run) = (probe::cgroup2_mount()?, &config.paths.run);
    let cgroup = Cgroup::open(&Workloads::new(root.clone()).dir(path))?;
    let held = lock::kernel(run)?;
    started::note(run, name, &starting.id, Path::new(path), &root).context("take note of it")?;
    if state.mode() != Some(Mode::Nftables) {
        return without_daemon(config, name, entry, cgroup);
    }
    drop(held);
    by_daemon(config, Some(name), Some(&api::Process { pid: starting.pid.cast_unsigned() })).map(drop)
}

fn without_daemon(config: &Config, name: &str, entry: &Entry, cgroup: Cgroup) -> anyhow::Result<()> {
    let mut compiled = plan::Compiled::kept(config);
    let mut service = plan::service(config, name, entry, &mut compiled)?;
    service.scopes.push(cgroup);
    note_pins(config);
    Ok(ebpf(config).attach_service(&service)?)
}

/// A unit does not stay down for a journal that cannot be written, which the daemon will say too.
fn note_pins(config: &Config) {
    let Paths { pins, run, state, .. } = &config.paths;
    let made = [Artefact::Pins { dir: pins.clone() }, Artefact::Run { dir: run.clone() }];
    if let Err(error) = Journal::new(state).note(made) {
        tracing::warn!("{error}");
    }
}

/// For a service, or the proxy; the cgroup is that of the process, or of this one.
fn by_daemon(
    config: &Config,
    service: Option<&str>,
    process: Option<&api::Process>,
) -> anyhow::Result<api::Joined> {
    service.map_or(Ok(()), check_name).map_err(anyhow::Error::msg)?;
    let path = match service {
        Some(name) => format!("/v1/services/{name}/cgroups"),
        None => "/v1/proxy/cgroups".to_owned(),
    };
    Ok(client::post(&config.paths.run, &path, process)?)
}

fn ebpf(config: &Config) -> Ebpf {
    Ebpf::new(config.paths.pins.clone(), config.proxy.admin)
}

/// Does something that may hang; then it is left behind, and ends with this process.
fn within<T: Send + 'static>(
    patience: Duration,
    what: &str,
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || sender.send(work()));
    match receiver.recv_timeout(patience) {
        Ok(done) => done,
        Err(_) => bail!("waited {} s for {what}, in vain", patience.as_secs()),
    }
}
