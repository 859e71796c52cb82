//! Removing everything of ours from the host, without a daemon: what the journal says, and what is found by the
//! configuration.

use crate::{
    config::{Config, ConfigError, DEFAULT_FILE, DEFAULT_STATE, Scope},
    journal::{Artefact, Journal, Noted},
    lock, mode, probe,
    removal::{self, COMMANDS},
    routable::Routable,
    state::{State, StateFile},
    workload::{Workloads, hooks_dir::Hook, systemd},
};
use serde::Serialize;
use serde_json::Value;
use std::{
    collections::BTreeSet,
    fmt::Display,
    fs::{self, DirEntry},
    path::{Path, PathBuf},
    time::Duration,
};

/// What became of it.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Cleaned {
    pub(crate) removed: Vec<Thing>,
    /// What stays, and why.
    pub(crate) left: Vec<Left>,
    pub(crate) notes: Vec<String>,
}

/// Something of ours.
#[derive(Debug, Serialize)]
pub(crate) struct Thing {
    /// `pins`, `table`, `hosts`, `hook`, `drop-in`, `cgroup`, `run`, `state`.
    pub(crate) kind: String,
    pub(crate) name: String,
}

/// Something of ours that could not be removed.
#[derive(Debug, Serialize)]
pub(crate) struct Left {
    #[serde(flatten)]
    pub(crate) thing: Thing,
    pub(crate) error: String,
}

impl From<&Artefact> for Thing {
    fn from(artefact: &Artefact) -> Self {
        let (kind, name) = artefact.name();
        Self { kind: kind.to_owned(), name }
    }
}

/// May be repeated; refuses while a daemon runs. What cannot be removed keeps nothing else from being removed.
pub(crate) fn cleanup(loaded: Result<Config, ConfigError>, file: Option<&Path>) -> anyhow::Result<Cleaned> {
    let mut cleaned = Cleaned::default();
    let config = match loaded {
        Ok(config) => config,
        Err(error) => {
            cleaned.notes.push(format!(
                "{error}; cleaned up by the journal in {DEFAULT_STATE}, and where things are by default"
            ));
            Config::parse(Path::new(DEFAULT_FILE), "")?
        }
    };
    let state = &config.paths.state;
    let mut journal = Journal::new(state);
    let noted = journal.read().unwrap_or_else(|error| {
        cleaned.notes.push(format!(
            "{error}; what is only in it, at paths that the configuration no longer names, may be left"
        ));
        Noted::default()
    });
    let _only_one = lock_daemons(&config.paths.run, &noted.artefacts)?;
    let held = lock::kernel(&config.paths.run)?;
    let enabled = StateFile::new(state).load().inspect_err(|error| tracing::debug!("{error}")).ok();
    let found = found(&config, file, enabled.as_ref());
    let used = enabled.as_ref().and_then(State::mode);
    let is_sure = |artefact: &Artefact| noted.artefacts.contains(artefact) || artefact.mode() == used;
    let mut left = BTreeSet::new();
    for artefact in noted.artefacts.union(&found) {
        match removal::remove(artefact, &config) {
            Ok(true) => {
                cleaned.removed.push(artefact.into());
                cleaned.notes.extend(strangers(artefact));
            }
            Ok(false) => {}
            // A host that has no nf_tables has no table of ours either.
            Err(error) if artefact.mode().is_some() && !is_sure(artefact) => {
                tracing::debug!("{artefact}: {error}");
            }
            Err(error) => {
                cleaned.leave(artefact.into(), &error);
                left.insert(artefact.clone());
            }
        }
    }
    cleaned.reload_systemd();
    cleaned.remove_files(state);
    cleaned.remove_journal(&mut journal, &left, &noted.unknown);
    drop(held);
    Ok(cleaned)
}

/// No daemon may run, also where the configuration now names another directory for its lock.
fn lock_daemons(run: &Path, noted: &BTreeSet<Artefact>) -> Result<Vec<lock::Lock>, lock::LockError> {
    let mut locks = Vec::new();
    for artefact in noted {
        match artefact {
            Artefact::Run { dir } if dir != run => locks.extend(lock::former_daemon(dir)?),
            _ => {}
        }
    }
    locks.push(lock::daemon(run)?);
    Ok(locks)
}

/// What may be there by the configuration and the enabled set. What is not there is no error.
fn found(config: &Config, file: Option<&Path>, enabled: Option<&State>) -> BTreeSet<Artefact> {
    let paths = &config.paths;
    let modes = mode::ALL.into_iter().filter_map(|mode| Artefact::of(mode, paths).ok());
    let hook = Hook { dir: &paths.hooks, config: file };
    let hook = hook.is_there().then(|| Artefact::hook(hook));
    let drop_ins = drop_ins(config, enabled).into_iter().map(|file| Artefact::DropIn { file });
    let cgroups = commands(config, enabled).into_iter().map(|path| Artefact::Cgroup { path });
    let run = Artefact::Run { dir: paths.run.clone() };
    modes.chain(hook).chain(drop_ins).chain(cgroups).chain([run]).collect()
}

/// Those of the host's own state are all of ours that are there; another daemon's are not ours to remove.
fn drop_ins(config: &Config, enabled: Option<&State>) -> Vec<PathBuf> {
    if is_hosts_own(config) {
        return systemd::drop_ins();
    }
    let services = enabled.into_iter().flat_map(State::iter);
    let scopes: Vec<Scope> = services.map(|(name, _)| Workloads::scope(config, name)).collect();
    let files = scopes.iter().filter_map(Scope::unit).map(systemd::drop_in_path);
    files.filter(|file| systemd::is_drop_in(file)).collect()
}

fn commands(config: &Config, enabled: Option<&State>) -> Vec<String> {
    let services = enabled.into_iter().flat_map(State::iter);
    let mut known: Vec<String> = services.flat_map(|(_, entry)| entry.commands.iter().cloned()).collect();
    if is_hosts_own(config)
        && let Ok(root) = probe::cgroup2_mount()
    {
        let dir = Workloads::new(root).dir(COMMANDS);
        let there = fs::read_dir(dir).into_iter().flatten().flatten();
        known.extend(
            there.filter(is_old).map(|entry| format!("{COMMANDS}/{}", entry.file_name().to_string_lossy())),
        );
    }
    known
}

/// Where somebody else has put something.
fn strangers(artefact: &Artefact) -> Option<String> {
    let (Artefact::Pins { dir } | Artefact::Run { dir }) = artefact else { return None };
    dir.exists().then(|| format!("{} stays: what is in it is not ours", dir.display()))
}

/// One that was made a moment ago may be another daemon's, which is about to put a process into it.
fn is_old(cgroup: &DirEntry) -> bool {
    const A_MOMENT: Duration = Duration::from_secs(10);
    let about = cgroup.metadata().ok().filter(fs::Metadata::is_dir);
    let age = about.and_then(|about| about.modified().ok()?.elapsed().ok());
    age.is_some_and(|age| age > A_MOMENT)
}

fn is_hosts_own(config: &Config) -> bool {
    config.paths.state == Path::new(DEFAULT_STATE)
}

impl Cleaned {
    /// Whether nothing is left.
    pub(crate) fn is_complete(&self) -> bool {
        self.left.is_empty()
    }

    fn leave(&mut self, thing: Thing, error: &dyn Display) {
        self.left.push(Left { thing, error: error.to_string() });
    }

    fn reload_systemd(&mut self) {
        if self.removed.iter().any(|thing| thing.kind == "drop-in")
            && let Err(error) = systemd::reload()
        {
            self.notes.push(format!("{error}; until then systemd goes on by what is removed"));
        }
    }

    /// What is enabled, and what the proxy could route.
    fn remove_files(&mut self, state: &Path) {
        let thing = || Thing { kind: "state".to_owned(), name: state.display().to_string() };
        let routable = Routable::remove(state).map_err(|error| format!("what the proxy can route: {error}"));
        let enabled = StateFile::new(state).remove().map_err(|error| error.to_string());
        if matches!((&routable, &enabled), (Ok(true), _) | (_, Ok(true))) {
            self.removed.push(thing());
        }
        for error in [routable.err(), enabled.err()].into_iter().flatten() {
            self.leave(thing(), &error);
        }
    }

    /// It goes on to name what is left.
    fn remove_journal(&mut self, journal: &mut Journal, left: &BTreeSet<Artefact>, unknown: &[Value]) {
        for artefact in unknown {
            let kind = artefact["kind"].as_str().unwrap_or("unknown").to_owned();
            let thing = Thing { kind, name: artefact.to_string() };
            let error =
                "this version does not know it: run `mesh-redirect cleanup` of the version that made it";
            self.leave(thing, &error);
        }
        let done = if left.is_empty() && unknown.is_empty() {
            journal.remove().map(drop)
        } else {
            journal.keep(left)
        };
        if let Err(error) = done {
            let path = journal.path().display().to_string();
            self.leave(Thing { kind: "journal".to_owned(), name: path }, &error);
        }
    }
}
