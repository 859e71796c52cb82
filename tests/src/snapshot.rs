//! Everything that steering may change on a host, to be compared with how it was.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use crate::cgroup;
use crate::host::PATH;
use crate::kernel;
use crate::sandbox::Sandbox;

/// Files below the sandbox's folder that are the agent's to change, and everything in the kernel.
const FOLDERS: [&str; 5] = ["run", "state", "hooks.d", "units", "var"];

/// What there is, each thing by its name: files with all that is theirs but the inode, pins, links at cgroups, and the rules
/// of the network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot(BTreeMap<String, String>);

impl Snapshot {
    /// What there is now.
    pub fn of(sandbox: &Sandbox) -> Self {
        let mut found = Self(BTreeMap::new());
        for folder in FOLDERS {
            found.add_tree(&sandbox.path(folder));
        }
        // With whatever was left beside it.
        let beside = fs::read_dir(sandbox.path("")).into_iter().flatten().flatten();
        for file in beside.filter(|file| file.file_name().to_string_lossy().starts_with("hosts")) {
            found.add(&file.path());
        }
        found.add_tree(sandbox.pins());
        found.add_cgroups(sandbox);
        found.add_commands(sandbox);
        found.0.insert("nft list ruleset".to_owned(), rules(sandbox));
        found
    }

    /// The same with one thing put otherwise.
    #[must_use]
    pub fn with(mut self, change: impl Fn(&str, &mut String)) -> Self {
        self.0.iter_mut().for_each(|(name, what)| change(name, what));
        self
    }

    /// The same with the cgroups of another one, to which nothing is attached.
    #[must_use]
    pub fn and_cgroups_of(mut self, other: &Self) -> Self {
        let cgroups = other.0.keys().filter(|name| Path::new(name).join("cgroup.procs").exists());
        for name in cgroups {
            self.0.entry(name.clone()).or_default();
        }
        self
    }

    /// Of all that is there.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// What differs, as lines; none where nothing does.
    pub fn differences(&self, before: &Self) -> Vec<String> {
        let names = self.0.keys().chain(before.0.keys()).collect::<std::collections::BTreeSet<_>>();
        let differs = names.into_iter().filter(|name| self.0.get(*name) != before.0.get(*name));
        differs
            .map(|name| format!("{name}: {:?}, before {:?}", self.0.get(name), before.0.get(name)))
            .collect()
    }

    fn add_tree(&mut self, path: &Path) {
        if fs::symlink_metadata(path).is_err() {
            return;
        }
        self.add(path);
        for entry in fs::read_dir(path).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                self.add_tree(&entry.path());
            } else {
                self.add(&entry.path());
            }
        }
    }

    fn add(&mut self, path: &Path) {
        let Ok(about) = fs::symlink_metadata(path) else { return };
        let kind = about.file_type();
        let content = match () {
            () if kind.is_symlink() => format!("{:?}", fs::read_link(path).unwrap_or_default()),
            () if kind.is_socket() => "a socket".to_owned(),
            // What is pinned cannot be read.
            () if kind.is_file() => {
                fs::read(path).map(|it| it.escape_ascii().to_string()).unwrap_or_default()
            }
            () => "a folder".to_owned(),
        };
        let (mode, owner) = (about.mode(), (about.uid(), about.gid()));
        self.0.insert(path.display().to_string(), format!("{mode:o} {owner:?} {content}"));
    }

    /// Of services that bear the sandbox's mark.
    fn add_commands(&mut self, sandbox: &Sandbox) {
        let commands = fs::read_dir(cgroup::cgroup_path("/mesh-redirect")).into_iter().flatten().flatten();
        let ours = commands.filter(|entry| entry.file_name().to_string_lossy().contains(&sandbox.mark()));
        self.0.extend(ours.map(|entry| (entry.path().display().to_string(), "a cgroup".to_owned())));
    }

    fn add_cgroups(&mut self, sandbox: &Sandbox) {
        let links = kernel::list(&["link", "show"]);
        for path in sandbox.cgroups() {
            let id = cgroup::id(&path);
            let here = links.iter().filter(|link| link["cgroup_id"].as_u64() == id);
            let mut attached: Vec<&str> =
                here.map(|link| link["attach_type"].as_str().unwrap_or("unknown")).collect();
            attached.sort_unstable();
            self.0.insert(path.display().to_string(), attached.join(" "));
        }
    }
}

/// But for what the kernel counts and lets expire.
fn rules(sandbox: &Sandbox) -> String {
    let list = ["--stateless", "list", "ruleset"];
    let nft = sandbox.enter(|| Command::new("nft").args(list).env("PATH", PATH).output().expect("run nft"));
    assert!(nft.status.success(), "nft list ruleset: {nft:?}");
    let text = String::from_utf8_lossy(&nft.stdout).into_owned();
    text.lines().filter(|line| !line.contains(" timeout 3s")).collect::<Vec<_>>().join("\n")
}
