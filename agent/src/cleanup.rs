//! Removing everything of ours from the host, without a daemon.

use crate::{
    config::{Config, DEFAULT_STATE, Scope},
    lock, mode, probe,
    redirect::Redirect,
    routable::Routable,
    state::StateFile,
    workload::{Workloads, hooks_dir::Hook, started, systemd},
};
use anyhow::Context as _;
use serde::Serialize;
use std::{fs, path::Path};

/// Nothing of ours is left.
#[derive(Debug, Serialize)]
pub(crate) struct Cleaned {}

/// May be repeated; refuses while a daemon runs.
pub(crate) fn cleanup(config: &Config, file: Option<&Path>) -> anyhow::Result<Cleaned> {
    let run = &config.paths.run;
    let _only_one = lock::daemon(run)?;
    let held = lock::kernel(run)?;
    remove_redirects(config)?;
    remove_drop_ins(config)?;
    Routable::remove(&config.paths.state);
    Hook { dir: &config.paths.hooks, config: file }.remove().context("remove the hook")?;
    started::forget_all(run);
    let file = StateFile::new(&config.paths.state);
    remove_command_cgroups(&file);
    file.remove()?;
    drop(held);
    lock::remove(run);
    Ok(Cleaned {})
}

/// Whatever mode was the last one, and whether its state can be read. A host that has no nf_tables has none of ours.
fn remove_redirects(config: &Config) -> anyhow::Result<()> {
    let cgroup_root = probe::cgroup2_mount().unwrap_or_default();
    let used = StateFile::new(&config.paths.state).load().ok().and_then(|state| state.mode());
    for mode in mode::ALL {
        let removed = Redirect::new(mode, config, &cgroup_root).remove();
        match removed {
            Err(error) if used == Some(mode) => return Err(error.into()),
            Err(error) => tracing::debug!(%mode, "{error}"),
            Ok(()) => {}
        }
    }
    Ok(())
}

/// Drop-ins of this state only where it is not the host's own: another daemon's are not ours to remove.
fn remove_drop_ins(config: &Config) -> anyhow::Result<()> {
    if config.paths.state == Path::new(DEFAULT_STATE) {
        return systemd::remove_all_drop_ins().context("remove drop-ins");
    }
    let Ok(state) = StateFile::new(&config.paths.state).load() else { return Ok(()) };
    let scopes: Vec<Scope> = state.iter().map(|(name, _)| Workloads::scope(config, name)).collect();
    systemd::remove_drop_ins(scopes.iter().filter_map(Scope::unit)).context("remove drop-ins")
}

/// A command that still runs keeps its cgroup, which is harmless then.
fn remove_command_cgroups(file: &StateFile) {
    let (Ok(state), Ok(root)) = (file.load(), probe::cgroup2_mount()) else { return };
    let workloads = Workloads::new(root);
    for path in state.iter().flat_map(|(_, entry)| &entry.commands) {
        let _still_runs = fs::remove_dir(workloads.dir(path));
    }
    let _still_used = fs::remove_dir(workloads.dir("/mesh-redirect"));
}
