//! Where things are pinned: `PINS/vN/{maps,programs,links/SCOPE}/NAME`, for each ABI version N.
//!
//! What is asked and done of another version rests on the contract beside [`ABI_VERSION`] alone. Only names that a version
//! of ours can have written are ever removed.

use super::Error;
use crate::{fault, sys::bpf};
use agent_ebpf::{
    ABI_VERSION, maps,
    programs::{self, Program},
};
use aya::maps::MapInfo;
use std::{
    fmt, fs, io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    str::FromStr,
};

/// What one ABI version pins below the pin directory.
#[derive(Clone, Debug)]
pub(super) struct Pins {
    root: PathBuf,
    version: u32,
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
    /// Of this binary's version.
    pub(super) fn new(root: PathBuf) -> Self {
        Self { root, version: ABI_VERSION }
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Of every version that is there.
    pub(super) fn all(&self) -> Result<Vec<Self>, Error> {
        let names = names(&self.root)?;
        let versions = names.iter().filter_map(|name| version(name));
        Ok(versions.map(|version| Self { root: self.root.clone(), version }).collect())
    }

    /// Of every other version that is there.
    pub(super) fn others(&self) -> Result<Vec<Self>, Error> {
        let mut others = self.all()?;
        others.retain(|pins| pins.version != self.version);
        Ok(others)
    }

    pub(super) fn version(&self) -> u32 {
        self.version
    }

    /// Whether they are of this binary's version.
    pub(super) fn are_ours(&self) -> bool {
        self.version == ABI_VERSION
    }

    fn dir(&self) -> PathBuf {
        self.root.join(format!("v{}", self.version))
    }

    fn maps(&self) -> PathBuf {
        self.dir().join(MAPS)
    }

    fn programs(&self) -> PathBuf {
        self.dir().join(PROGRAMS)
    }

    fn links(&self) -> PathBuf {
        self.dir().join(LINKS)
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
        self.programs().join(format!("{NEXT}{}", program.name))
    }

    /// Whether everything was loaded and pinned, and can be attached.
    pub(super) fn are_complete(&self) -> bool {
        self.program(programs::LAST).exists()
    }

    /// Makes the directories.
    pub(super) fn create(&self) -> Result<(), Error> {
        [self.maps(), self.programs(), self.links()].iter().try_for_each(|dir| {
            create_dir(dir)?;
            fault::point("pins", "directory made");
            Ok(())
        })
    }

    /// An error where something is there that no version would have put there.
    pub(super) fn check(&self) -> Result<(), Error> {
        let check = |dir: &Path, is_known: &dyn Fn(&str) -> bool| {
            let unknown = names(dir)?.into_iter().find(|name| !is_known(name));
            let error = |name: String| Error::Unknown { path: dir.join(name), version: self.version };
            unknown.map_or(Ok(()), |name| Err(error(name)))
        };
        check(&self.dir(), &|name| [MAPS, PROGRAMS, LINKS].contains(&name))?;
        check(&self.maps(), &is_map)?;
        check(&self.programs(), &is_program)?;
        check(&self.links(), &|name| name.parse::<Scope>().is_ok())?;
        self.scopes()?.iter().try_for_each(|scope| check(&self.scope(*scope), &is_link))
    }

    /// Those of some programs that are pinned; an error where there is one whose hook nobody knows.
    pub(super) fn known(&self, wanted: &[Program]) -> Result<Vec<Program>, Error> {
        let is_known = |name: &String| {
            let name = name.strip_prefix(NEXT).unwrap_or(name);
            programs::all().any(|program| program.name == name)
        };
        if let Some(name) = names(&self.programs())?.into_iter().find(|name| !is_known(name)) {
            return Err(Error::UnknownProgram { path: self.programs().join(name) });
        }
        let pinned = wanted.iter().copied().filter(|program| self.program(*program).exists());
        Ok(pinned.collect())
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
        fault::point("link", "about to be pinned");
        bpf::pin(link, &path).map_err(|cause| Error::Pin { action: "create", path, cause })?;
        fault::point("link", "pinned");
        Ok(())
    }

    pub(super) fn link(&self, scope: Scope, program: Program) -> io::Result<OwnedFd> {
        bpf::open_pin(&self.scope(scope).join(program.name))
    }

    /// Whether the kernel says that all of the programs are attached to the scope's cgroup.
    pub(super) fn is_attached(&self, scope: Scope, programs: &[Program]) -> bool {
        programs.iter().all(|program| {
            info(&self.scope(scope).join(program.name)).is_some_and(|info| info.cgroup_id == scope.cgroup)
        })
    }

    /// Whether the kernel says that a program runs at the scope's cgroup: the one of this id.
    pub(super) fn runs(&self, scope: Scope, program: Program, id: u32) -> bool {
        let info = self.link(scope, program).and_then(|link| bpf::link_info(link.as_fd()));
        info.is_ok_and(|info| info.prog_id == id)
    }

    /// Whether any program is attached for a scope; none is any more when its cgroup is gone.
    pub(super) fn is_somewhere(&self, scope: Scope) -> Result<bool, Error> {
        let mut infos = self.link_pins(scope)?.into_iter().filter_map(|path| info(&path));
        Ok(infos.any(|info| info.cgroup_id == scope.cgroup))
    }

    /// Whether connections that were steered are still open. They end at the proxy: what is left of one whose cgroup is
    /// gone is nobody's.
    pub(super) fn have_connections(&self) -> Result<bool, Error> {
        let path = self.map(maps::CONNECTIONS);
        if !path.exists() || !self.have_proxy()? {
            return Ok(false);
        }
        let failed = |cause| Error::Map { action: "read", name: maps::CONNECTIONS, cause: Box::new(cause) };
        let key_size = MapInfo::from_pin(&path).map_err(failed)?.key_size() as usize;
        let is_empty = bpf::open_pin(&path).and_then(|map| bpf::is_empty(map.as_fd(), key_size));
        Ok(!is_empty.map_err(|cause| failed(cause.into()))?)
    }

    fn have_proxy(&self) -> Result<bool, Error> {
        for scope in self.scopes()? {
            if scope.owner == Owner::Proxy && self.is_somewhere(scope)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Detaches a scope: first what rewrites, then what restores.
    pub(super) fn remove_scope(&self, scope: Scope) -> Result<(), Error> {
        self.remove_rewriting(scope)?;
        self.link_pins(scope)?.iter().try_for_each(|path| remove_file(path))?;
        remove_dir(&self.scope(scope))
    }

    /// Detaches from a scope what rewrites, whatever its name is: the kernel tells the hook.
    pub(super) fn remove_rewriting(&self, scope: Scope) -> Result<(), Error> {
        let rewrites =
            |path: &&PathBuf| info(path).is_some_and(|info| programs::REWRITING.contains(&info.attach_type));
        self.link_pins(scope)?.iter().filter(rewrites).try_for_each(|path| remove_file(path))
    }

    /// Detaches programs, the last one first, as far as they are attached.
    pub(super) fn remove_links(&self, scope: Scope, programs: &[Program]) -> Result<(), Error> {
        let dir = self.scope(scope);
        programs.iter().rev().try_for_each(|program| remove_file(&dir.join(program.name)))
    }

    /// Removes the programs' pins, so that they are attached nowhere else; where they are attached they stay.
    pub(super) fn remove_programs(&self) -> Result<(), Error> {
        remove_file(&self.program(programs::LAST))?;
        remove_files(&self.programs(), is_program)
    }

    /// Removes programs, maps and the directories, which must be empty of links by then.
    pub(super) fn remove_all(&self) -> Result<(), Error> {
        self.remove_programs()?;
        remove_files(&self.maps(), is_map)?;
        let dirs = [self.maps(), self.programs(), self.links(), self.dir()];
        dirs.iter().try_for_each(|dir| remove_dir(dir))
    }

    /// Removes the directory of all versions, unless one is left.
    pub(super) fn remove_root(&self) -> Result<(), Error> {
        match remove_dir(&self.root) {
            // A daemon may write there and not above: another one that is made in its place would not be its own.
            Err(Error::Pin { cause, .. }) if is_confined(cause.kind()) => Ok(()),
            removed => removed,
        }
    }

    fn link_pins(&self, scope: Scope) -> Result<Vec<PathBuf>, Error> {
        let dir = self.scope(scope);
        Ok(names(&dir)?.iter().filter(|name| is_link(name)).map(|name| dir.join(name)).collect())
    }
}

const MAPS: &str = "maps";
const PROGRAMS: &str = "programs";
const LINKS: &str = "links";
const NEXT: &str = "next_";

fn is_map(name: &str) -> bool {
    name.starts_with("MR_")
}

fn is_program(name: &str) -> bool {
    is_link(name.strip_prefix(NEXT).unwrap_or(name))
}

fn is_link(name: &str) -> bool {
    name.starts_with("mr_")
}

/// The version whose directory has this name.
fn version(name: &str) -> Option<u32> {
    let version = name.strip_prefix('v')?.parse().ok()?;
    (name == format!("v{version}")).then_some(version)
}

/// What the kernel says of a link; nothing where it is gone.
fn info(link: &Path) -> Option<bpf::CgroupLinkInfo> {
    bpf::open_pin(link).and_then(|link| bpf::link_info(link.as_fd())).ok()
}

fn remove_files(dir: &Path, are_ours: fn(&str) -> bool) -> Result<(), Error> {
    names(dir)?.iter().filter(|name| are_ours(name)).try_for_each(|name| remove_file(&dir.join(name)))
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
    match fs::remove_file(path).inspect(|()| fault::point("pin", "removed")) {
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
    match fs::remove_dir(dir).inspect(|()| fault::point("pins", "directory removed")) {
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

    #[test]
    fn only_what_is_written_as_a_version_is_one() {
        for (name, expected) in [
            ("v0", Some(0)),
            ("v3", Some(3)),
            ("v4294967295", Some(u32::MAX)),
            ("v4294967296", None),
            ("v", None),
            ("v03", None),
            ("v+3", None),
            ("v3a", None),
            ("3", None),
            ("values", None),
        ] {
            assert_eq!(version(name), expected, "{name}");
        }
    }
}
