//! What steering left in the kernel, as bpftool sees it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use serde_json::Value;

use crate::cgroup;
use crate::host::PATH;
use crate::sandbox::Sandbox;
use crate::wait::wait_for;

type Ids = BTreeSet<u64>;

/// The kernel objects that belong to one sandbox: those attached to its cgroups or pinned in its folder, and what these
/// use in turn. Other sandboxes and other programs of the machine do not count.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    links: Ids,
    programs: Ids,
    maps: Ids,
    pins: BTreeSet<PathBuf>,
    /// The table of nf_tables, but for what the kernel counts and lets expire.
    table: Option<String>,
}

impl Footprint {
    /// What there is now.
    pub fn of(sandbox: &Sandbox) -> Self {
        let mut found = Self::default();
        let links = list(&["link", "show"]);
        for cgroup in sandbox.cgroups() {
            found.add_attached(&cgroup, &links);
        }
        for pin in files(sandbox.pins()) {
            found.add_pinned(pin);
        }
        found.add_used();
        found.table = table(sandbox);
        found
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// How often the programs at services' cgroups ran, while the kernel counted it.
    pub fn runs(&self) -> u64 {
        let programs = list(&["prog", "show"]);
        let ours = programs
            .iter()
            .filter(|program| program["id"].as_u64().is_some_and(|id| self.programs.contains(&id)));
        let at_services = ours.filter(|program| {
            let name = program["name"].as_str().unwrap_or_default();
            ["mr_connect", "mr_peername", "mr_client"].iter().any(|start| name.starts_with(start))
        });
        at_services.filter_map(|program| program["run_cnt"].as_u64()).sum()
    }

    /// Waits until the kernel has let go of all of it, which it does a moment after the last reference.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn is_gone(&self) {
        let gone = wait_for(Duration::from_secs(5), || self.remaining().is_empty().then_some(()));
        assert!(gone.is_some(), "still in the kernel: {:?}", self.remaining());
    }

    fn remaining(&self) -> Self {
        let alive = |kind| ids(&list(&[kind, "show"]));
        Self {
            links: &self.links & &alive("link"),
            programs: &self.programs & &alive("prog"),
            maps: &self.maps & &alive("map"),
            // A table is gone at once.
            table: None,
            pins: self.pins.iter().filter(|pin| pin.exists()).cloned().collect(),
        }
    }

    fn add_attached(&mut self, cgroup: &Path, links: &[Value]) {
        let id = cgroup::id(cgroup);
        let here = links.iter().filter(|link| link["cgroup_id"].as_u64() == id);
        self.links.extend(here.filter_map(|link| link["id"].as_u64()));
        let mut programs = list(&["cgroup", "show", &cgroup.to_string_lossy()]);
        programs.retain(|program| !is_systemds(program));
        self.programs.extend(ids(&programs));
    }

    /// A pin does not say of which kind it is: bpftool finds it to be of one, and complains about the others.
    fn add_pinned(&mut self, pin: PathBuf) {
        for (kind, found) in
            [("prog", &mut self.programs), ("map", &mut self.maps), ("link", &mut self.links)]
        {
            found.extend(ids(&objects(&bpftool(&[kind, "show", "pinned", &pin.to_string_lossy()]))));
        }
        self.pins.insert(pin);
    }

    fn add_used(&mut self) {
        for program in list(&["prog", "show"]) {
            if program["id"].as_u64().is_some_and(|id| self.programs.contains(&id)) {
                self.maps
                    .extend(program["map_ids"].as_array().into_iter().flatten().filter_map(Value::as_u64));
            }
        }
    }
}

fn table(sandbox: &Sandbox) -> Option<String> {
    let list = ["--stateless", "list", "table", "inet", "mesh_redirect"];
    let nft = sandbox.enter(|| Command::new("nft").args(list).env("PATH", PATH).output().expect("run nft"));
    let text = String::from_utf8_lossy(&nft.stdout).into_owned();
    let lasting = |line: &&str| !line.contains(" timeout 3s");
    nft.status.success().then(|| text.lines().filter(lasting).collect::<Vec<_>>().join("\n"))
}

/// systemd attaches programs to its units' cgroups too, for device access and for IP accounting.
fn is_systemds(attached: &Value) -> bool {
    let hook = attached["attach_type"].as_str().unwrap_or_default();
    ["device", "ingress", "egress"].iter().any(|theirs| hook.ends_with(theirs))
}

fn ids(objects: &[Value]) -> Ids {
    objects.iter().filter_map(|object| object["id"].as_u64()).collect()
}

/// Also while others come and go, of whom bpftool says that it cannot have them.
#[track_caller]
pub(crate) fn list(args: &[&str]) -> Vec<Value> {
    let mut said = String::new();
    let listed = wait_for(Duration::from_secs(5), || {
        let output = bpftool(args);
        said = String::from_utf8_lossy(&output.stdout).into_owned();
        output.status.success().then(|| objects(&output))
    });
    listed.unwrap_or_else(|| panic!("bpftool {args:?}: {said}"))
}

fn bpftool(args: &[&str]) -> Output {
    Command::new("bpftool").arg("--json").args(args).env("PATH", PATH).output().expect("run bpftool")
}

/// Many objects, one, or none.
fn objects(output: &Output) -> Vec<Value> {
    match serde_json::from_slice(&output.stdout) {
        Ok(Value::Array(objects)) => objects,
        Ok(object @ Value::Object(_)) => vec![object],
        _ => Vec::new(),
    }
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}
