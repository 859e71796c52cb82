//! Where things are pinned: `PINS/v4/{maps,programs,links/SCOPE}/NAME`.
//!
//! Only names that this file can have written are ever removed.

use super::Error;
use crate::sys::bpf;
use agent_ebpf::{
    ABI_VERSION, maps,
    programs::{self, Program},
};
use std::{
    fmt, fs, io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    str::FromStr,
};

/// The pin directory.
#[derive(Debug)]
pub(super) struct Pins {
    root: PathBuf,
}

/// Links of one owner in one cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Scope {
    pub(super) owner: Owner,
    /// Id of the cgroup.
    pub(super) cgroup: u64,
}

/// Whom links are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Owner {
    Proxy,
    /// A service, by its id.
    Service(u32),
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.owner {
            Owner::Proxy => write!(f, "proxy-{}", self.cgroup),
            Owner::Service(id) => write!(f, "service-{id}-{}", self.cgroup),
        }
    }
}

impl FromStr for Scope {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        let parts: Vec<&str> = name.split('-').collect();
        let (owner, cgroup) = match parts[..] {
            ["proxy", cgroup] => (Owner::Proxy, cgroup),
            ["service", id, cgroup] => (Owner::Service(id.parse().map_err(drop)?), cgroup),
            _ => return Err(()),
        };
        Ok(Self { owner, cgroup: cgroup.parse().map_err(drop)? })
    }
}

impl Pins {
    pub(super) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    fn version(&self) -> PathBuf {
        self.root.join(format!("v{ABI_VERSION}"))
    }

    fn maps(&self) -> PathBuf {
        self.version().join("maps")
    }

    fn programs(&self) -> PathBuf {
        self.version().join("programs")
    }

    fn links(&self) -> PathBuf {
        self.version().join("links")
    }

    fn scope(&self, scope: Scope) -> PathBuf {
        self.links().join(scope.to_string())
    }

    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.maps().join(name)
    }

    pub(super) fn program(&self, program: Program) -> PathBuf {
        self.programs().join(program.name)
    }

    /// Where a program is pinned before it takes the place of the one of its name.
    pub(super) fn next_program(&self, program: Program) -> PathBuf {
        self.programs().join(format!("next_{}", program.name))
    }

    /// Whether everything was loaded and pinned; programs come last.
    pub(super) fn exist(&self) -> bool {
        programs::all().all(|program| self.program(program).exists())
    }

    /// Makes the directories, unless pins of another version are there.
    pub(super) fn create(&self) -> Result<(), Error> {
        for name in names(&self.root)? {
            if name.starts_with('v') && name != format!("v{ABI_VERSION}") {
                return Err(Error::OtherVersion { path: self.root.clone(), found: name });
            }
        }
        for dir in [self.maps(), self.programs(), self.links()] {
            create_dir(&dir)?;
        }
        Ok(())
    }

    /// Scopes that have a directory, attached or not.
    pub(super) fn scopes(&self) -> Result<Vec<Scope>, Error> {
        Ok(names(&self.links())?.iter().filter_map(|name| name.parse().ok()).collect())
    }

    pub(super) fn create_scope(&self, scope: Scope) -> Result<(), Error> {
        create_dir(&self.scope(scope))
    }

    pub(super) fn has_link(&self, scope: Scope, program: Program) -> bool {
        self.scope(scope).join(program.name).exists()
    }

    pub(super) fn pin_link(&self, scope: Scope, program: Program, link: BorrowedFd<'_>) -> Result<(), Error> {
        let path = self.scope(scope).join(program.name);
        bpf::pin(link, &path).map_err(|cause| Error::Pin { action: "create", path, cause })
    }

    pub(super) fn link(&self, scope: Scope, program: Program) -> io::Result<OwnedFd> {
        bpf::open_pin(&self.scope(scope).join(program.name))
    }

    /// Whether the kernel says that all of the programs are attached to the scope's cgroup.
    pub(super) fn is_attached(&self, scope: Scope, programs: &[Program]) -> bool {
        programs.iter().all(|&program| {
            let info = self.link(scope, program).and_then(|link| bpf::link_info(link.as_fd()));
            info.is_ok_and(|info| info.cgroup_id == scope.cgroup)
        })
    }

    /// Whether any program is attached for a scope; none is any more when its cgroup is gone.
    pub(super) fn is_somewhere(&self, scope: Scope) -> bool {
        programs::all().any(|program| self.is_attached(scope, &[program]))
    }

    /// Detaches a scope: first what rewrites, then what restores.
    pub(super) fn remove_scope(&self, scope: Scope) -> Result<(), Error> {
        self.remove_links(scope, &programs::all().collect::<Vec<_>>())?;
        remove_dir(&self.scope(scope))
    }

    /// Detaches programs, the last one first, as far as they are attached.
    pub(super) fn remove_links(&self, scope: Scope, programs: &[Program]) -> Result<(), Error> {
        let dir = self.scope(scope);
        programs.iter().rev().try_for_each(|program| remove_file(&dir.join(program.name)))
    }

    /// Removes maps, programs and the directories, which must be empty of links by then.
    pub(super) fn remove_all(&self) -> Result<(), Error> {
        for program in programs::all() {
            remove_file(&self.program(program))?;
            remove_file(&self.next_program(program))?;
        }
        for name in maps::ALL {
            remove_file(&self.map(name))?;
        }
        for dir in [self.maps(), self.programs(), self.links(), self.version()] {
            remove_dir(&dir)?;
        }
        match remove_dir(&self.root) {
            // A daemon may write there and not above: another one that is made in its place would not be its own.
            Err(Error::Pin { cause, .. }) if is_confined(cause.kind()) => Ok(()),
            removed => removed,
        }
    }
}

/// Names in a directory; none where there is no directory.
fn names(dir: &Path) -> Result<Vec<String>, Error> {
    let error = |cause| Error::Pin { action: "list", path: dir.to_owned(), cause };
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(error)?,
    };
    entries.map(|entry| Ok(entry.map_err(error)?.file_name().to_string_lossy().into_owned())).collect()
}

fn create_dir(dir: &Path) -> Result<(), Error> {
    use std::os::unix::fs::DirBuilderExt as _;
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|cause| Error::Pin { action: "create", path: dir.to_owned(), cause })
}

fn remove_file(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::Pin { action: "remove", path: path.to_owned(), cause: error })
        }
        _ => Ok(()),
    }
}

/// What is refused by landlock, and what where a unit has mounted the directory for its own writing.
fn is_confined(refused: io::ErrorKind) -> bool {
    use io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem, ResourceBusy};
    matches!(refused, PermissionDenied | ReadOnlyFilesystem | ResourceBusy)
}

/// A directory that somebody else put something into stays.
fn remove_dir(dir: &Path) -> Result<(), Error> {
    match fs::remove_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
            tracing::warn!(dir = %dir.display(), "not removed: it holds files that are not ours");
            Ok(())
        }
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::Pin { action: "remove", path: dir.to_owned(), cause: error })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scope_is_read_back_from_its_name_and_nothing_else_is_taken_for_one() {
        for scope in
            [Scope { owner: Owner::Proxy, cgroup: 7 }, Scope { owner: Owner::Service(3), cgroup: u64::MAX }]
        {
            assert_eq!(scope.to_string().parse(), Ok(scope));
        }
        for name in
            ["", "proxy", "proxy-", "proxy-x", "service-1", "service-1-2-3", "other-1", "service--1-2"]
        {
            assert_eq!(name.parse::<Scope>(), Err(()), "{name}");
        }
    }
}
