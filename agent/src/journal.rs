//! What was made on this host: each thing is noted before it is made, and forgotten after it is removed. So any later version
//! finds it, also where the configuration has changed since or cannot be read.
//!
//! A line in it is a place to look at, never a reason to remove: whoever removes what is there makes sure that it is ours.

use crate::{
    config::Paths,
    durable,
    mode::Mode,
    workload::{hooks_dir, systemd::DropIn},
};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{
    collections::BTreeSet,
    fmt, fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

/// Version of the file's form. A later one may know more kinds of artefacts, and more of each; what is known here keeps its
/// meaning.
const VERSION: u32 = 1;
const FILE: &str = "journal.json";

/// One thing of ours, in the order in which they are removed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub(crate) enum Artefact {
    /// Links, maps and programs below a directory on a BPF file system.
    Pins { dir: PathBuf },
    /// The table of nf_tables in a network namespace, which is known by its inode.
    Table { namespace: u64 },
    /// Names in a hosts file.
    Hosts { file: PathBuf },
    /// A hook at containers' starts, which attaches by a configuration that may not be the default one.
    Hook {
        file: PathBuf,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        config: Option<PathBuf>,
    },
    /// A step before a unit's start.
    DropIn { file: PathBuf },
    /// The cgroup of a command, below the cgroup2 mount.
    Cgroup { path: String },
    /// Sockets, locks and notes of containers.
    Run { dir: PathBuf },
}

impl Artefact {
    /// What a mode makes.
    pub(crate) fn of(mode: Mode, paths: &Paths) -> io::Result<Self> {
        Ok(match mode {
            Mode::Ebpf => Self::Pins { dir: paths.pins.clone() },
            Mode::Nftables => Self::Table { namespace: namespace()? },
            Mode::Hosts => Self::Hosts { file: paths.hosts.clone() },
        })
    }

    /// A unit's drop-in.
    pub(crate) fn drop_in(drop_in: &DropIn) -> Self {
        Self::DropIn { file: drop_in.path() }
    }

    /// A hook.
    pub(crate) fn hook(hook: hooks_dir::Hook<'_>) -> Self {
        Self::Hook { file: hook.path(), config: hook.config.map(Path::to_owned) }
    }

    /// The mode that made it, where one did.
    pub(crate) fn mode(&self) -> Option<Mode> {
        match self {
            Self::Pins { .. } => Some(Mode::Ebpf),
            Self::Table { .. } => Some(Mode::Nftables),
            Self::Hosts { .. } => Some(Mode::Hosts),
            _ => None,
        }
    }

    /// What it is, and which one.
    pub(crate) fn name(&self) -> (&'static str, String) {
        let shown = |path: &Path| path.display().to_string();
        match self {
            Self::Pins { dir } => ("pins", shown(dir)),
            Self::Table { namespace } => ("table", format!("inet mesh_redirect in net:[{namespace}]")),
            Self::Hosts { file } => ("hosts", shown(file)),
            Self::Hook { file, .. } => ("hook", shown(file)),
            Self::DropIn { file } => ("drop-in", shown(file)),
            Self::Cgroup { path } => ("cgroup", path.clone()),
            Self::Run { dir } => ("run", shown(dir)),
        }
    }
}

impl fmt::Display for Artefact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, name) = self.name();
        write!(f, "{kind} {name}")
    }
}

/// The network namespace that this runs in.
pub(crate) fn namespace() -> io::Result<u64> {
    Ok(fs::metadata("/proc/self/ns/net")?.ino())
}

/// What the file says.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Noted {
    pub(crate) artefacts: BTreeSet<Artefact>,
    /// What only a later version can make something of. It is kept.
    pub(crate) unknown: Vec<Value>,
    version: u32,
}

/// The file as it is written.
#[derive(Debug, Serialize, Deserialize)]
struct Document {
    version: u32,
    artefacts: Vec<Value>,
}

/// A journal that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JournalError {
    /// The file system says no.
    #[error("{action} {path}: {cause}", path = .path.display())]
    Io {
        /// "read", "write", "remove".
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// The content is no journal.
    #[error("read {path}: it is no journal: {reason}", path = .path.display())]
    Corrupt {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// The file, and what of it is known to be noted.
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    noted: BTreeSet<Artefact>,
}

impl Journal {
    /// In the directory of the state, which need not exist yet.
    pub(crate) fn new(state: &Path) -> Self {
        Self { path: state.join(FILE), noted: BTreeSet::new() }
    }

    /// What is noted; nothing where there is no file.
    pub(crate) fn read(&self) -> Result<Noted, JournalError> {
        let text = match durable::read(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Noted::default()),
            text => text.map_err(self.failed("read"))?,
        };
        let corrupt = |error: serde_json::Error| JournalError::Corrupt {
            path: self.path.clone(),
            reason: error.to_string(),
        };
        let Document { version, artefacts } = serde_json::from_slice(&text).map_err(corrupt)?;
        let mut noted = Noted { version, ..Noted::default() };
        for artefact in artefacts {
            match serde_json::from_value(artefact.clone()) {
                Ok(known) => _ = noted.artefacts.insert(known),
                Err(_) => noted.unknown.push(artefact),
            }
        }
        Ok(noted)
    }

    /// Takes note of what is about to be made, unless it is noted.
    pub(crate) fn note(&mut self, artefacts: impl IntoIterator<Item = Artefact>) -> Result<(), JournalError> {
        let new: Vec<Artefact> =
            artefacts.into_iter().filter(|artefact| !self.noted.contains(artefact)).collect();
        if new.is_empty() {
            return Ok(());
        }
        self.change(|noted| noted.extend(new))
    }

    /// Forgets what has been removed.
    pub(crate) fn forget(&mut self, artefacts: &BTreeSet<Artefact>) -> Result<(), JournalError> {
        if self.noted.is_disjoint(artefacts) {
            return Ok(());
        }
        self.change(|noted| noted.retain(|artefact| !artefacts.contains(artefact)))
    }

    /// Forgets all but these, and what it does not know.
    pub(crate) fn keep(&mut self, artefacts: &BTreeSet<Artefact>) -> Result<(), JournalError> {
        self.change(|noted| noted.retain(|artefact| artefacts.contains(artefact)))
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What is noted, as this process knows it.
    pub(crate) fn noted(&self) -> &BTreeSet<Artefact> {
        &self.noted
    }

    /// Removes it, and its directory where nothing else is in it.
    pub(crate) fn remove(&self) -> Result<bool, JournalError> {
        let removed = durable::remove(&self.path, "journal").map_err(self.failed("remove"))?;
        if let Some(dir) = self.path.parent() {
            // A directory that holds something else stays, and so does a unit's StateDirectory that is in use.
            let _not_ours_alone = fs::remove_dir(dir);
        }
        Ok(removed)
    }

    /// Others may write too: the step before a unit's start needs no daemon.
    fn change(&mut self, change: impl FnOnce(&mut BTreeSet<Artefact>)) -> Result<(), JournalError> {
        let dir = self.path.parent().unwrap_or(Path::new("/"));
        let lock = || {
            fs::create_dir_all(dir)?;
            Flock::lock(fs::File::open(dir)?, FlockArg::LockExclusive).map_err(|(_, errno)| errno.into())
        };
        let _held = lock().map_err(self.failed("write"))?;
        let mut noted = self.read().unwrap_or_else(|error| {
            tracing::warn!("{error}; it is written anew, and does not know what only the former one knew");
            Noted::default()
        });
        let before = noted.clone();
        change(&mut noted.artefacts);
        if noted != before {
            durable::write(&self.path, &noted.document()?, "journal").map_err(self.failed("write"))?;
        }
        self.noted = noted.artefacts;
        Ok(())
    }

    fn failed(&self, action: &'static str) -> impl Fn(io::Error) -> JournalError {
        let path = self.path.clone();
        move |cause| JournalError::Io { action, path: path.clone(), cause }
    }
}

impl Noted {
    fn document(&self) -> Result<Vec<u8>, JournalError> {
        let write = || {
            let known = self.artefacts.iter().map(serde_json::to_value);
            let artefacts = known.chain(self.unknown.iter().cloned().map(Ok)).collect::<Result<_, _>>()?;
            // What a later version added stays, and so does its version.
            let document = Document { version: self.version.max(VERSION), artefacts };
            serde_json::to_vec_pretty(&document)
        };
        write().map_err(|error| JournalError::Corrupt { path: FILE.into(), reason: error.to_string() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pins(dir: &str) -> Artefact {
        Artefact::Pins { dir: dir.into() }
    }

    #[test]
    fn what_is_noted_is_read_until_it_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let mut journal = Journal::new(&state);
        assert_eq!(journal.read().unwrap(), Noted::default());
        let all = [
            pins("/a"),
            Artefact::Table { namespace: 4_026_531_840 },
            Artefact::Hosts { file: "/etc/hosts".into() },
            Artefact::Hook { file: "/hooks/hook.json".into(), config: Some("/agent.yaml".into()) },
            Artefact::DropIn { file: "/units/shop.service.d/50-mesh-redirect.conf".into() },
            Artefact::Cgroup { path: "/mesh-redirect/shop-1-1".into() },
            Artefact::Run { dir: "/run/mesh-redirect".into() },
        ];
        journal.note(all.clone()).unwrap();
        Journal::new(&state).note([pins("/b")]).unwrap();
        journal.forget(&BTreeSet::from([pins("/a")])).unwrap();
        let expected: BTreeSet<Artefact> = all.into_iter().skip(1).chain([pins("/b")]).collect();
        assert_eq!(journal.read().unwrap().artefacts, expected);
        assert_eq!(journal.noted(), &expected);
        assert!(journal.remove().unwrap() && !state.exists());
    }

    #[test]
    fn what_a_later_version_noted_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let later = r#"{"version": 9, "more": 1, "artefacts": [
            {"kind": "pins", "dir": "/a", "more": 1}, {"kind": "dam", "river": "/b"}, {"kind": "pins"}]}"#;
        fs::write(dir.path().join(FILE), later).unwrap();
        let mut journal = Journal::new(dir.path());
        journal.note([pins("/c")]).unwrap();
        let noted = journal.read().unwrap();
        assert_eq!((noted.version, noted.unknown.len()), (9, 2));
        assert_eq!(noted.artefacts, BTreeSet::from([pins("/a"), pins("/c")]));
    }

    #[test]
    fn what_is_no_journal_is_said_and_written_anew() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["", "{", "[]", r#"{"version": 1}"#, r#"{"version": 1, "artefacts": ["#] {
            fs::write(dir.path().join(FILE), text).unwrap();
            let mut journal = Journal::new(dir.path());
            let message = journal.read().unwrap_err().to_string();
            assert!(message.contains("journal.json: it is no journal"), "{message}");
            journal.note([pins("/a")]).unwrap();
            assert_eq!(journal.read().unwrap().artefacts, BTreeSet::from([pins("/a")]));
        }
    }
}
