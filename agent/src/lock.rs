//! Locks between processes: one daemon at a time, and one hand in the kernel at a time.

use nix::fcntl::{Flock, FlockArg};
use std::{
    fs,
    io::{self, Read as _, Seek as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
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
    let file = open(run, &path).map_err(failed)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut file) => {
            let pid = std::process::id().to_string();
            file.set_len(0)
                .and_then(|()| file.rewind())
                .and_then(|()| file.write_all(pid.as_bytes()))
                .map_err(failed)?;
            Ok(Lock { _file: file })
        }
        Err((mut file, nix::Error::EWOULDBLOCK)) => {
            let mut holder = String::new();
            let _unknown = io::Read::by_ref(&mut file).take(16).read_to_string(&mut holder);
            Err(LockError::Held {
                path,
                holder: if holder.is_empty() { "unknown".to_owned() } else { holder },
            })
        }
        Err((_, errno)) => Err(failed(errno.into())),
    }
}

/// The lock under which the kernel's side is changed; waits for it.
pub(crate) fn kernel(run: &Path) -> Result<Lock, LockError> {
    let path = run.join("kernel.lock");
    let failed = |cause| LockError::Io { path: path.clone(), cause };
    let file = open(run, &path).map_err(failed)?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map(|file| Lock { _file: file })
        .map_err(|(_, errno)| failed(errno.into()))
}

/// Removes the files, and their directory where nothing else is in it.
pub(crate) fn remove(run: &Path) {
    for name in ["agent.lock", "kernel.lock", "agent.sock", "origins.sock"] {
        let _absent_is_fine = fs::remove_file(run.join(name));
    }
    let _in_use_is_fine = fs::remove_dir(run);
}

fn open(run: &Path, path: &Path) -> io::Result<fs::File> {
    fs::DirBuilder::new().recursive(true).mode(0o755).create(run)?;
    fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
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
