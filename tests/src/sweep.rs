//! Names that tell whose they are, and the removal of what a killed test run could not remove itself.

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process;

use tempfile::TempDir;

use crate::host::{BPFFS, CGROUP2};
use crate::{cgroup, machine, netns};

const PREFIX: &str = "mesh-redirect-test-";

/// The name of a scenario's cgroup, namespace and pins. It ends with the process that answers for them.
pub(crate) fn name(scenario: &str) -> String {
    format!("{PREFIX}{scenario}-{}", process::id())
}

/// A temporary folder, whose name is short enough for the sockets in it.
pub(crate) fn temporary_folder() -> io::Result<TempDir> {
    tempfile::Builder::new().prefix(PREFIX).suffix(&format!("-{}", process::id())).tempdir()
}

/// Removes what belongs to test processes that are no more.
pub(crate) fn sweep() {
    orphans(&CGROUP2).iter().for_each(|path| cgroup::remove(path));
    for path in orphans(Path::new("/run/netns")) {
        netns::remove(&path.file_name().unwrap_or_default().to_string_lossy());
    }
    for path in orphans(Path::new(BPFFS)) {
        let _ = fs::remove_dir_all(path);
    }
    for path in orphans(&env::temp_dir()) {
        machine::sweep(&path);
        let _ = fs::remove_dir_all(path);
    }
}

fn orphans(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| is_orphan(path).unwrap_or(false)).collect()
}

fn is_orphan(path: &Path) -> Option<bool> {
    let (_, owner) = path.file_name()?.to_str()?.strip_prefix(PREFIX)?.rsplit_once('-')?;
    // The peer's namespace bears the same name with a word after it.
    let owner = owner.split('.').next()?;
    Some(!Path::new("/proc").join(owner).exists())
}
