//! Locks between processes: one daemon at a time, and one hand in the kernel at a time.

use crate::{durable, fault, workload::started};
use nix::fcntl::{Flock, FlockArg};
use std::{
    fs,
    io::{self, Read as _, Seek as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

/// Held until it is dropped, or its process ends in any way.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: Flock<fs::File>,
}

/// A lock that cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LockError {
    /// Another process has it.
    #[error("a daemon is running (pid {holder}, by {path}); stop it first: `systemctl stop mesh-redirect`", path = .path.display())]
    Held {
        /// The lock's file.
        path: PathBuf,
        /// Who wrote its process id into it.
        holder: String,
    },
    /// The file system says no.
    #[error("lock {path}: {cause}", path = .path.display())]
    Io {
        /// The lock's file.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
}

/// The lock that a daemon holds while it runs; an error while another one does.
pub(crate) fn daemon(run: &Path) -> Result<Lock, LockError> {
    let path = run.join("agent.lock");
    let failed = |cause| LockError::Io { path: path.clone(), cause };
    match lock(run, &path, FlockArg::LockExclusiveNonblock).map_err(failed)? {
        Ok(mut file) => {
            let pid = std::process::id().to_string();
            file.set_len(0)
                .and_then(|()| file.rewind())
                .and_then(|()| file.write_all(pid.as_bytes()))
                .map_err(failed)?;
            fault::point("daemon lock", "held");
            Ok(Lock { _file: file })
        }
        Err((file, nix::Error::EWOULDBLOCK)) => Err(held(path, &file)),
        Err((_, errno)) => Err(failed(errno.into())),
    }
}

/// The lock of a daemon of an earlier configuration, in a directory that may be anybody's by now: nothing is made or written
/// there. None where it is no lock of ours; an error while a daemon holds it.
pub(crate) fn former_daemon(run: &Path) -> Result<Option<Lock>, LockError> {
    let path = run.join("agent.lock");
    if !is_lock(&path) {
        return Ok(None);
    }
    let opened = fs::OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(&path);
    let file = opened.map_err(|cause| LockError::Io { path: path.clone(), cause })?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(file) => Ok(Some(Lock { _file: file })),
        Err((file, nix::Error::EWOULDBLOCK)) => Err(held(path, &file)),
        Err((_, errno)) => Err(LockError::Io { path, cause: errno.into() }),
    }
}

fn held(path: PathBuf, file: &fs::File) -> LockError {
    let mut holder = String::new();
    let _unknown = file.take(16).read_to_string(&mut holder);
    LockError::Held { path, holder: if holder.is_empty() { "unknown".to_owned() } else { holder } }
}

/// The lock under which the kernel's side is changed; waits for it.
pub(crate) fn kernel(run: &Path) -> Result<Lock, LockError> {
    let path = run.join("kernel.lock");
    let failed = |cause| LockError::Io { path: path.clone(), cause };
    lock(run, &path, FlockArg::LockExclusive)
        .map_err(failed)?
        .map(|file| Lock { _file: file })
        .map_err(|(_, errno)| failed(errno.into()))
}

/// Removes the locks, the sockets and the notes of containers, and their directory where nothing else is in it. What bears
/// their names but is no such thing stays. False where nothing was there.
pub(crate) fn remove(run: &Path) -> bool {
    started::forget_all(run);
    let is_ours = |name: &str| match fs::symlink_metadata(run.join(name)).map(|about| about.file_type()) {
        Ok(kind) if name.ends_with(".sock") => kind.is_socket(),
        Ok(kind) => kind.is_file() && is_lock(&run.join(name)),
        Err(_) => false,
    };
    let mut removed = false;
    for name in ["agent.sock", "origins.sock", "agent.lock", "kernel.lock"] {
        if !is_ours(name) {
            continue;
        }
        removed |= fs::remove_file(run.join(name)).is_ok();
        fault::point("run", name);
    }
    let _in_use_is_fine = fs::remove_dir(run);
    removed
}

/// A process id, or nothing.
fn is_lock(path: &Path) -> bool {
    durable::read(path).is_ok_and(|text| text.len() < 16 && text.iter().all(u8::is_ascii_digit))
}

type Locked = Result<Flock<fs::File>, (fs::File, nix::Error)>;

/// Locks the file that is there once it is locked: `cleanup` may have removed the one that was opened.
fn lock(run: &Path, path: &Path, how: FlockArg) -> io::Result<Locked> {
    loop {
        match Flock::lock(open(run, path)?, how) {
            Ok(file) if is_there(&file, path) => return Ok(Ok(file)),
            Ok(_) => {}
            Err(refused) => return Ok(Err(refused)),
        }
    }
}

fn is_there(file: &fs::File, path: &Path) -> bool {
    let same = |file: fs::Metadata| fs::metadata(path).is_ok_and(|there| there.ino() == file.ino());
    file.metadata().is_ok_and(same)
}

fn open(run: &Path, path: &Path) -> io::Result<fs::File> {
    fs::DirBuilder::new().recursive(true).mode(0o755).create(run)?;
    let mut options = fs::OpenOptions::new();
    // The process id is written into it, whatever somebody may have linked here.
    options.read(true).write(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    match options.create_new(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            options.create_new(false).create(true).truncate(false).open(path)
        }
        made => made.inspect(|_| fault::point("lock", "file made")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_daemon_is_told_who_the_first_is() {
        let dir = tempfile::tempdir().unwrap();
        let first = daemon(dir.path()).unwrap();
        let message = daemon(dir.path()).unwrap_err().to_string();
        assert!(message.contains(&format!("pid {}", std::process::id())), "{message}");
        drop(first);
        daemon(dir.path()).unwrap();
    }
}
