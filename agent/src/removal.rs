//! Removing a thing that is, or may be, on this host: only where it is ours, whoever says that it is there.

use crate::{
    config::Config,
    journal::{self, Artefact},
    lock, probe,
    redirect::{self, Redirect},
    workload::{Workloads, hooks_dir::Hook, systemd},
};
use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Component, Path},
};

/// Cgroups of commands are below this one.
pub(crate) const COMMANDS: &str = "/mesh-redirect";

/// A thing that stays.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Redirect(#[from] redirect::Error),
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Probe(#[from] probe::ProbeError),
    #[error(
        "it is in another network namespace, where {user} is: run `mesh-redirect cleanup` there (`nsenter --net={user}`)"
    )]
    Elsewhere { user: String },
    #[error(
        "a process is in it, which is not steered any more; run `mesh-redirect cleanup` when it has ended"
    )]
    InUse,
}

/// Removes it. False where there was nothing.
pub(crate) fn remove(artefact: &Artefact, config: &Config) -> Result<bool, Error> {
    match artefact {
        Artefact::Pins { dir } if !probe::is_on_bpffs(dir) => Ok(false),
        Artefact::Table { namespace } if *namespace != journal::namespace()? => match user_of(*namespace) {
            Some(user) => Err(Error::Elsewhere { user }),
            // It went, and the table with it.
            None => Ok(false),
        },
        Artefact::Pins { .. } | Artefact::Table { .. } | Artefact::Hosts { .. } => {
            redirect(artefact, config).map_or(Ok(false), release)
        }
        Artefact::Hook { file, config } => Ok(match Hook::at(file, config.as_deref()) {
            Some(hook) => hook.remove()?,
            None => false,
        }),
        Artefact::DropIn { file } => Ok(systemd::remove_drop_in(file)?),
        Artefact::Cgroup { path } => command(path),
        Artefact::Run { dir } => Ok(lock::remove(dir)),
    }
}

/// The mode that made a thing, over the paths that it was made at.
fn redirect(artefact: &Artefact, config: &Config) -> Option<Redirect> {
    let mut config = config.clone();
    match artefact {
        Artefact::Pins { dir } => config.paths.pins.clone_from(dir),
        Artefact::Hosts { file } => config.paths.hosts.clone_from(file),
        _ => {}
    }
    let cgroup_root = probe::cgroup2_mount().unwrap_or_default();
    Some(Redirect::new(artefact.mode()?, &config, &cgroup_root))
}

fn release(mut redirect: Redirect) -> Result<bool, Error> {
    let was_there = redirect.is_there()?;
    redirect.remove()?;
    Ok(was_there)
}

fn command(path: &str) -> Result<bool, Error> {
    let below = Path::new(path).strip_prefix(COMMANDS).map(Path::components);
    if !below.is_ok_and(|mut below| below.all(|part| matches!(part, Component::Normal(_)))) {
        return Ok(false);
    }
    let workloads = Workloads::new(probe::cgroup2_mount()?);
    let removed = match fs::remove_dir(workloads.dir(path)) {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => return Err(Error::InUse),
        Err(error) => return Err(error.into()),
    };
    let _others_are_in_it = fs::remove_dir(workloads.dir(COMMANDS));
    Ok(removed)
}

/// Who holds a network namespace: a process, or a name (ip-netns(8)).
fn user_of(namespace: u64) -> Option<String> {
    let entries = |dir| fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let of_processes = entries("/proc").map(|process| process.join("ns/net"));
    let mut all = of_processes.chain(entries("/run/netns"));
    let found = all.find(|path| fs::metadata(path).is_ok_and(|about| about.ino() == namespace))?;
    Some(found.display().to_string())
}
