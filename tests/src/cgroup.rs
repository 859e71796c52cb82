//! Control groups.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::host::CGROUP2;
use crate::wait::wait_for;

/// A cgroup with everything below it; its processes are killed and it is removed when dropped.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Directly below the root of the hierarchy.
    pub(crate) fn create(name: &str) -> Self {
        let path = CGROUP2.join(name);
        fs::create_dir(&path).unwrap_or_else(|error| panic!("create the cgroup {}: {error}", path.display()));
        Self { path }
    }

    /// Its folder.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The folder of a cgroup below this one, made if need be.
    pub(crate) fn below(&self, name: &str) -> PathBuf {
        let path = self.path.join(name);
        fs::create_dir_all(&path).unwrap_or_else(|error| panic!("create {}: {error}", path.display()));
        path
    }

    /// Every cgroup in this subtree, the deepest first.
    pub(crate) fn subtree(&self) -> Vec<PathBuf> {
        subtree(&self.path)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

/// The cgroup's name as /proc/PID/cgroup and agent.yaml write it: its path from the root of the hierarchy.
pub(crate) fn name(path: &Path) -> String {
    let below = path.strip_prefix(&*CGROUP2).expect("a cgroup lies below the mount");
    format!("/{}", below.display())
}

/// The folder of a cgroup that has this name.
pub fn cgroup_path(name: &str) -> PathBuf {
    CGROUP2.join(name.trim_start_matches('/'))
}

/// The kernel's id of a cgroup, which is its inode number.
pub(crate) fn id(path: &Path) -> Option<u64> {
    Some(fs::metadata(path).ok()?.ino())
}

/// Kills what runs in a subtree and removes it.
pub(crate) fn remove(path: &Path) {
    let removed = fs::write(path.join("cgroup.kill"), "1").and_then(|()| {
        wait_for(Duration::from_secs(5), || (!populated(path)).then_some(()));
        subtree(path).iter().try_for_each(fs::remove_dir)
    });
    if let Err(error) = removed {
        eprintln!("cannot remove the cgroup {}: {error}", path.display());
    }
    remove_doubles(path);
}

/// On a machine with hybrid hierarchies, a container's cgroups have empty doubles in the other ones.
fn remove_doubles(path: &Path) {
    let hierarchies =
        fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|entry| entry.path());
    for hierarchy in hierarchies.filter(|hierarchy| *hierarchy != *CGROUP2) {
        for double in subtree(&hierarchy.join(name(path).trim_start_matches('/'))) {
            let _ = fs::remove_dir(double);
        }
    }
}

fn populated(path: &Path) -> bool {
    let events = fs::read_to_string(path.join("cgroup.events")).unwrap_or_default();
    events.lines().any(|line| line == "populated 1")
}

fn subtree(path: &Path) -> Vec<PathBuf> {
    let children = |path: &Path| -> io::Result<Vec<PathBuf>> {
        let entries = fs::read_dir(path)?.collect::<io::Result<Vec<_>>>()?;
        Ok(entries.iter().map(fs::DirEntry::path).filter(|path| path.is_dir()).collect())
    };
    let mut found: Vec<_> =
        children(path).unwrap_or_default().iter().flat_map(|path| subtree(path)).collect();
    found.push(path.to_path_buf());
    found
}
