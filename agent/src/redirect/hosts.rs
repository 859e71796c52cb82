//! Steering by names alone, where the kernel helps with nothing: a hosts file maps each routed name to a loopback
//! address at which the proxy listens for it (hosts(5)).
//!
//! The file is the whole host's, so every process that looks the names up is steered. While the proxy is not ready the
//! names are not there, and lead where they always led, unless every enabled service asked for `failure: closed`.

mod document;

use super::{Desired, Drift, ServiceStatus, Status};
use crate::{config::Failure, durable, fault, ready, routable::Name};
use agent_ebpf::Counters;
use nix::fcntl::{Flock, FlockArg};
use std::{
    collections::BTreeSet,
    fs,
    io::{self, Read as _, Seek as _, Write as _},
    net::{Ipv4Addr, SocketAddr},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, fchown},
    path::{Path, PathBuf},
};

/// What can go wrong with the file.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The file system says no.
    #[error("{action} {path}: {cause}", path = .path.display())]
    File { action: &'static str, path: PathBuf, cause: io::Error },
    /// The proxy does not say what it routes.
    #[error("ask the proxy at {admin} for its names: {cause}")]
    Names { admin: SocketAddr, cause: io::Error },
}

/// Longest file that is edited.
const MAX_BYTES: u64 = 16 << 20;

/// The mode, over its file.
#[derive(Debug)]
pub(crate) struct Hosts {
    file: PathBuf,
    proxy_admin: SocketAddr,
    /// Whether a service is enabled, and whether all that are refuse to go without the proxy.
    wanted: bool,
    closed: bool,
    /// Names that were left to the file, which is said once.
    left: BTreeSet<String>,
}

impl Hosts {
    /// Over a hosts file; the proxy says at its admin address what it routes.
    pub(crate) fn new(file: PathBuf, proxy_admin: SocketAddr) -> Self {
        Self { file, proxy_admin, wanted: false, closed: false, left: BTreeSet::new() }
    }

    /// See [`super::Redirect::set_proxy_admin`].
    pub(crate) fn set_proxy_admin(&mut self, admin: SocketAddr) {
        self.proxy_admin = admin;
    }

    /// Takes note of what is desired; the names come with the proxy. True where the file was changed.
    pub(crate) fn apply(&mut self, desired: &Desired) -> Result<bool, Error> {
        let steered: Vec<_> = desired.services.iter().filter(|service| !service.observe).collect();
        self.wanted = !steered.is_empty();
        self.closed = self.wanted && steered.iter().all(|service| service.failure == Failure::Closed);
        if self.wanted { Ok(false) } else { self.remove_names() }
    }

    /// Removes the names, and what a killed process left beside the file.
    pub(crate) fn remove(&mut self) -> Result<(), Error> {
        self.remove_names().map(drop)
    }

    /// True where there were some.
    fn remove_names(&self) -> Result<bool, Error> {
        durable::unlink(&next(&self.file)).map_err(self.failed("clean up beside"))?;
        match self.edit(document::without) {
            Err(Error::File { cause, .. }) if cause.kind() == io::ErrorKind::NotFound => Ok(false),
            edited => edited,
        }
    }

    /// Whether names are there, or what a killed process left.
    pub(crate) fn is_there(&self) -> Result<bool, Error> {
        match self.open() {
            Err(Error::File { cause, .. }) if cause.kind() == io::ErrorKind::NotFound => Ok(false),
            opened => opened.map(|(_, text)| document::without(&text) != text || next(&self.file).exists()),
        }
    }

    /// Writes the names of a proxy that is ready, and removes them of one that is not.
    pub(crate) fn keep_alive(&mut self, ready: [bool; 2]) -> Result<(), Error> {
        match (self.wanted, ready.contains(&true)) {
            (false, _) => Ok(()),
            (true, true) => self.write_names(),
            (true, false) if self.closed => Ok(()),
            (true, false) => self.remove(),
        }
    }

    fn names(&self) -> Result<Vec<(String, Ipv4Addr)>, Error> {
        let admin = self.proxy_admin;
        let names = ready::names(admin).map_err(|cause| Error::Names { admin, cause })?;
        Ok(names.into_iter().map(|Name { name, address, .. }| (name, address)).collect())
    }

    fn write_names(&mut self) -> Result<(), Error> {
        let names = self.names()?;
        let mut left = Vec::new();
        self.edit(|text| {
            let (text, left_out) = document::with(text, &names);
            left = left_out;
            text
        })?;
        for name in left {
            if self.left.insert(name.clone()) {
                tracing::warn!(file = %self.file.display(), "{name} is not steered: the file gives it an address already");
            }
        }
        Ok(())
    }

    /// See [`super::Redirect::drift`]; what is not as it shall be is written anew when the proxy was asked again.
    pub(crate) fn drift(&self, ready: [bool; 2]) -> Result<Vec<Drift>, Error> {
        let (_, text) = self.open()?;
        let file = self.file.display();
        let is_there = document::without(&text) != text;
        let finding = match (self.wanted, ready.contains(&true)) {
            (true, true) => {
                let (wanted, _) = document::with(&text, &self.names()?);
                let what = if is_there { "are not the proxy's" } else { "are missing" };
                (wanted != text).then(|| format!("the names in {file} {what}"))
            }
            (true, false) if !self.closed => {
                is_there.then(|| format!("names are in {file}, and the proxy is not ready"))
            }
            (true, false) => None,
            (false, _) => is_there.then(|| format!("names are in {file}, and no service is enabled")),
        };
        Ok(finding.map(Drift::of_all).into_iter().collect())
    }

    /// What the block says, or would say.
    pub(crate) fn describe(&self, desired: &Desired) -> String {
        if desired.services.is_empty() {
            return String::new();
        }
        let names = ready::names(self.proxy_admin).unwrap_or_default();
        let line = |name: &Name| format!("{}: {}\t{}\n", self.file.display(), name.address, name.name);
        names.iter().map(line).collect()
    }

    /// Whether the names are there; nothing is counted.
    pub(crate) fn status(&self, desired: &Desired) -> Result<Status, Error> {
        let (_, text) = self.open()?;
        let in_place = document::without(&text) != text;
        let service = |service: &super::Service| ServiceStatus {
            id: service.id,
            cgroups: service.scopes.iter().filter(|_| in_place).map(|cgroup| cgroup.id).collect(),
            counters: Counters::ZERO,
        };
        Ok(Status {
            proxies: desired.proxy.iter().map(|cgroup| cgroup.id).collect(),
            services: desired.services.iter().map(service).collect(),
            retiring: Vec::new(),
        })
    }

    fn open(&self) -> Result<(fs::File, Vec<u8>), Error> {
        let open = || {
            let file = fs::OpenOptions::new().read(true).open(&self.file)?;
            let mut text = Vec::new();
            if (&file).take(MAX_BYTES + 1).read_to_end(&mut text)? as u64 > MAX_BYTES {
                return Err(io::Error::other(format!("it is larger than {MAX_BYTES} bytes")));
            }
            Ok((file, text))
        };
        open().map_err(self.failed("read"))
    }

    /// Changes the file, whole or not at all, and not where nothing changes. True where it was changed.
    fn edit(&self, change: impl FnOnce(&[u8]) -> Vec<u8>) -> Result<bool, Error> {
        let (file, text) = self.open()?;
        let changed = change(&text);
        if changed == text {
            return Ok(false);
        }
        let _held = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, errno)| self.failed("lock")(errno.into()))?;
        replace(&self.file, &changed)
            .or_else(|_| overwrite(&self.file, &changed))
            .map_err(self.failed("write"))?;
        Ok(true)
    }

    fn failed(&self, action: &'static str) -> impl Fn(io::Error) -> Error {
        let path = self.file.clone();
        move |cause| Error::File { action, path: path.clone(), cause }
    }
}

/// By a file beside it that takes its place, with owner, mode and label of the one that was there.
fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    let next = next(path);
    let write = || {
        let before = fs::metadata(path)?;
        durable::unlink(&next)?;
        let mut file = fs::File::create_new(&next)?;
        fault::point("hosts", "temporary file made");
        fchown(&file, Some(before.uid()), Some(before.gid()))?;
        file.set_permissions(fs::Permissions::from_mode(before.mode()))?;
        if let Some(label) = xattr::get(path, SELINUX).ok().flatten() {
            xattr::set(&next, SELINUX, &label)?;
        }
        fault::point("hosts", "temporary file owned");
        file.write_all(text)?;
        file.sync_all()?;
        fault::point("hosts", "temporary file written");
        fs::rename(&next, path)?;
        fault::point("hosts", "replaced");
        Ok(())
    };
    write().inspect_err(|_| _ = fs::remove_file(&next))
}

/// Where a file is made before it takes the place of the one that is there.
fn next(path: &Path) -> PathBuf {
    path.with_extension("mesh-redirect")
}

const SELINUX: &str = "security.selinux";

/// Where it cannot be replaced: a container's file is a mount, and a unit may be allowed nothing but the file.
fn overwrite(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).open(path)?;
    file.rewind()?;
    fault::point("hosts", "about to be overwritten");
    file.write_all(text)?;
    fault::point("hosts", "overwritten");
    file.set_len(text.len() as u64)?;
    fault::point("hosts", "cut");
    file.sync_all()
}

/// Whether the file can be written.
pub(crate) fn try_file(path: &Path) -> Result<(), Error> {
    let opened = fs::OpenOptions::new().read(true).write(true).open(path);
    opened.map(drop).map_err(|cause| Error::File { action: "write", path: path.to_owned(), cause })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_keeps_its_owner_and_mode_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hosts");
        fs::write(&path, "127.0.0.1 localhost").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o604)).unwrap();
        for write in [replace, overwrite] {
            write(&path, b"longer than before, and then some").unwrap();
            write(&path, b"short").unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"short");
            assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o604);
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        }
    }
}
