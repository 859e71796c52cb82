//! What is enabled, on disk: written before the kernel is touched, so that a restart goes on from there.

use crate::{
    config::{check_cgroup, check_name},
    durable, fault,
    mode::Mode,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

/// Version of the file's form.
const VERSION: u32 = 1;

/// The enabled set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct State {
    version: u32,
    /// How the daemon steers, for what runs without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mode: Option<Mode>,
    services: BTreeMap<String, Entry>,
}

/// One service of which something is steered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Entry {
    /// What the kernel's maps call it.
    pub(crate) id: u32,
    /// Seconds of the Unix epoch.
    pub(crate) since: u64,
    /// Whether the service itself is enabled; if not, only commands run as it are steered.
    pub(crate) enabled: bool,
    /// Whether what would be steered is only counted.
    #[serde(default)]
    pub(crate) observe: bool,
    /// What the hook at containers' starts looks for, where the service is a container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) container: Option<Container>,
    /// Cgroups of commands that were run as this service, below the cgroup2 mount.
    pub(crate) commands: BTreeSet<String>,
}

/// A container that is a service. It is known here too, so that a configuration that cannot be read keeps no other
/// container from starting.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Container {
    /// Its id, the beginning of it, or its name: as it is configured.
    pub(crate) name: String,
    /// The id that belonged to the name when it was last asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<String>,
    /// Whether it must not start unsteered.
    pub(crate) required: bool,
}

/// A state that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StateError {
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
    /// The content is not a state.
    #[error(
        "read {path}: {reason}; nothing was changed. Restore the file, or run `mesh-redirect cleanup` and enable services anew",
        path = .path.display()
    )]
    Corrupt {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl State {
    /// As it was written; else what is wrong with it. Names and cgroups become parts of paths.
    fn parse(text: &[u8]) -> Result<Self, String> {
        let state: Self = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        if state.version != VERSION {
            return Err(format!("its version is {}; expected {VERSION}", state.version));
        }
        let ids: BTreeSet<u32> = state.services.values().map(|entry| entry.id).collect();
        if ids.len() != state.services.len() || ids.contains(&0) {
            return Err("ids are not distinct and positive".to_owned());
        }
        state.services.keys().try_for_each(|name| check_name(name))?;
        state.services.values().flat_map(|entry| &entry.commands).try_for_each(|path| check_cgroup(path))?;
        Ok(state)
    }

    /// How the daemon steers, or did last.
    pub(crate) fn mode(&self) -> Option<Mode> {
        self.mode
    }

    /// With another way of steering.
    pub(crate) fn set_mode(&mut self, mode: Mode) {
        self.mode = Some(mode);
    }

    /// Every entry, by name.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.services.iter().map(|(name, entry)| (name.as_str(), entry))
    }

    /// Whether a service is enabled.
    pub(crate) fn is_enabled(&self, name: &str) -> bool {
        self.services.get(name).is_some_and(|entry| entry.enabled)
    }

    /// Every enabled service that is a container.
    pub(crate) fn containers(&self) -> impl Iterator<Item = (&str, &Entry, &Container)> {
        let enabled = self.iter().filter(|(_, entry)| entry.enabled);
        enabled.filter_map(|(name, entry)| Some((name, entry, entry.container.as_ref()?)))
    }

    /// With a service that is this container, or none.
    pub(crate) fn set_container(&mut self, name: &str, container: Option<Container>) {
        if let Some(entry) = self.services.get_mut(name) {
            entry.container = container;
        }
    }

    /// A service's entry.
    pub(crate) fn get(&self, name: &str) -> Option<&Entry> {
        self.services.get(name)
    }

    /// With a service enabled, or only observed. True where it was not so before.
    pub(crate) fn enable(&mut self, name: &str, observe: bool) -> bool {
        let entry = self.entry(name);
        let changed = !entry.enabled || entry.observe != observe;
        if changed {
            entry.since = now();
        }
        (entry.enabled, entry.observe) = (true, observe);
        changed
    }

    /// With a service not enabled. True where it was.
    pub(crate) fn disable(&mut self, name: &str) -> bool {
        let Some(entry) = self.services.get_mut(name) else { return false };
        let changed = entry.enabled;
        (entry.enabled, entry.observe, entry.container) = (false, false, None);
        if entry.commands.is_empty() {
            self.services.remove(name);
        }
        changed
    }

    /// With a command run as a service, in a cgroup of its own.
    pub(crate) fn add_command(&mut self, name: &str, cgroup: String) {
        self.entry(name).commands.insert(cgroup);
    }

    /// Without the commands of these cgroups.
    pub(crate) fn remove_commands(&mut self, cgroups: &BTreeSet<String>) {
        for entry in self.services.values_mut() {
            entry.commands.retain(|cgroup| !cgroups.contains(cgroup));
        }
        self.services.retain(|_, entry| entry.enabled || !entry.commands.is_empty());
    }

    fn entry(&mut self, name: &str) -> &mut Entry {
        let used: BTreeSet<u32> = self.services.values().map(|entry| entry.id).collect();
        let free = (1..=u32::MAX).find(|id| !used.contains(id)).unwrap_or(u32::MAX);
        let new = || Entry {
            id: free,
            since: now(),
            enabled: false,
            observe: false,
            container: None,
            commands: BTreeSet::new(),
        };
        self.services.entry(name.to_owned()).or_insert_with(new)
    }
}

/// The file.
#[derive(Clone, Debug)]
pub(crate) struct StateFile {
    path: PathBuf,
}

impl StateFile {
    /// In a directory that need not exist yet.
    pub(crate) fn new(dir: &Path) -> Self {
        Self { path: dir.join("enabled.json") }
    }

    /// Reads it; a file that is absent is an empty state.
    pub(crate) fn load(&self) -> Result<State, StateError> {
        let text = match durable::read(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(State { version: VERSION, ..State::default() });
            }
            text => text.map_err(self.failed("read"))?,
        };
        State::parse(&text).map_err(|reason| StateError::Corrupt { path: self.path.clone(), reason })
    }

    /// Writes it whole or not at all.
    pub(crate) fn save(&self, state: &State) -> Result<(), StateError> {
        let write = || {
            let dir = self.path.parent().unwrap_or(Path::new("/"));
            fs::create_dir_all(dir)?;
            fault::point("state", "directory made");
            durable::write(&self.path, &serde_json::to_vec_pretty(state)?, "state")
        };
        write().map_err(self.failed("write"))
    }

    /// Removes it, and its directory where nothing else is in it. False where it was not there.
    pub(crate) fn remove(&self) -> Result<bool, StateError> {
        let removed = durable::remove(&self.path, "state").map_err(self.failed("remove"))?;
        if let Some(dir) = self.path.parent() {
            // A directory that holds something else stays, and so does a unit's StateDirectory that is in use.
            let _not_ours_alone = fs::remove_dir(dir);
        }
        Ok(removed)
    }

    fn failed(&self, action: &'static str) -> impl Fn(io::Error) -> StateError {
        let path = self.path.clone();
        move |cause| StateError::Io { action, path: path.clone(), cause }
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_saved_is_loaded_and_absence_is_empty() {
        let dir = tempfile::tempdir().unwrap();
        let file = StateFile::new(&dir.path().join("state"));
        let mut state = file.load().unwrap();
        assert_eq!(state.iter().count(), 0);
        state.enable("payments", false);
        state.add_command("shop", "/mesh-redirect/shop-1".into());
        file.save(&state).unwrap();
        assert_eq!(file.load().unwrap(), state);
        file.remove().unwrap();
        assert!(!dir.path().join("state").exists());
    }

    #[test]
    fn ids_are_distinct_and_reused_only_when_free() {
        let mut state = State::default();
        for name in ["a", "b", "c"] {
            assert!(state.enable(name, false));
        }
        assert!(state.disable("b") && !state.disable("b"));
        state.enable("d", true);
        let ids: Vec<(&str, u32)> = state.iter().map(|(name, entry)| (name, entry.id)).collect();
        assert_eq!(ids, [("a", 1), ("c", 3), ("d", 2)]);
    }

    #[test]
    fn a_service_stays_while_a_command_runs_as_it() {
        let mut state = State::default();
        state.enable("shop", false);
        state.add_command("shop", "/x".into());
        state.disable("shop");
        assert!(!state.is_enabled("shop"));
        assert!(state.get("shop").is_some());
        state.remove_commands(&BTreeSet::from(["/x".to_owned()]));
        assert!(state.get("shop").is_none());
    }

    #[test]
    fn a_file_that_is_not_a_state_is_refused_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let file = StateFile::new(dir.path());
        let same_ids = r#"{"version":1,"services":{"a":{"id":1,"since":0,"enabled":true,"commands":[]},"b":{"id":1,"since":0,"enabled":true,"commands":[]}}}"#;
        for text in [
            "",
            "{",
            "[]",
            r#"{"version":2,"services":{}}"#,
            r#"{"version":1,"services":{},"x":1}"#,
            same_ids,
            &same_ids.replace(r#""b":{"id":1"#, r#""../b":{"id":2"#),
            &same_ids.replace("[]", r#"["/../a"]"#).replace(r#""b":{"id":1"#, r#""b":{"id":2"#),
        ] {
            fs::write(dir.path().join("enabled.json"), text).unwrap();
            let message = file.load().unwrap_err().to_string();
            assert!(message.contains("enabled.json") && message.contains("nothing was changed"), "{message}");
            assert_eq!(fs::read_to_string(dir.path().join("enabled.json")).unwrap(), text);
        }
    }

    #[test]
    fn a_state_is_sound_and_is_written_as_it_is_read() {
        let seeds = [
            r#"{"version":1,"services":{}}"#,
            r#"{"version":1,"mode":"nftables","services":{
                "shop":{"id":1,"since":1790000000,"enabled":true,"observe":true,"commands":["/mesh-redirect/shop-1"]},
                "web":{"id":2,"since":0,"enabled":false,"container":{"name":"web","id":"3f1c","required":true},"commands":[]}}}"#,
        ]
        .map(str::as_bytes);
        let words = [
            "\"", ":", ",", "{", "}", "[", "]", "null", "true", "\\u0000", "../", "\"x\":1,", "\"id\":",
            "1e0", "hosts",
        ];
        assert!(seeds.iter().all(|seed| State::parse(seed).is_ok()));
        fuzz::damaged!(seeds, words, |input: &[u8]| {
            let Ok(state) = State::parse(input) else { return };
            let ids: BTreeSet<u32> = state.iter().map(|(_, entry)| entry.id).collect();
            assert!(ids.len() == state.iter().count() && !ids.contains(&0));
            assert!(state.iter().all(|(name, _)| !name.contains('/') && !name.starts_with('.')));
            let commands = || state.iter().flat_map(|(_, entry)| &entry.commands);
            assert!(
                commands().all(|path| path.starts_with('/') && !path.split('/').any(|part| part == ".."))
            );
            assert_eq!(State::parse(&serde_json::to_vec(&state).unwrap()), Ok(state));
        });
    }
}
