//! Points between two steps that change something outside this process, at which tests end it, to see that nothing is left
//! behind.
//!
//! With the feature `fault-points`, which is for tests alone; without it they are nothing. While the file is there that
//! `MESH_REDIRECT_FAULT_LOG` names, every point that is passed is a line of it, whichever process passes it. The process
//! whose line has the number that `MESH_REDIRECT_FAULT_KILL` gives kills itself there, and one whose line is
//! `MESH_REDIRECT_FAULT_STOP` stops there until it is told to go on (SIGCONT).

#[cfg(feature = "fault-points")]
pub(crate) use armed::point;

/// A step of `subject` has just been done, or is just about to be.
#[cfg(not(feature = "fault-points"))]
#[inline(always)]
pub(crate) fn point(_subject: &str, _step: &str) {}

#[cfg(feature = "fault-points")]
mod armed {
    use nix::sys::signal::{Signal, raise};
    use std::{
        env,
        fs::{self, File},
        io::{self, Write as _},
        path::{Path, PathBuf},
        sync::{Mutex, PoisonError},
    };

    const LOG: &str = "MESH_REDIRECT_FAULT_LOG";
    const KILL: &str = "MESH_REDIRECT_FAULT_KILL";
    const STOP: &str = "MESH_REDIRECT_FAULT_STOP";

    /// A step of `subject` has just been done, or is just about to be.
    pub(crate) fn point(subject: &str, step: &str) {
        let Some(log) = env::var_os(LOG).map(PathBuf::from) else { return };
        let line = format!("{subject}: {step}");
        let Ok(number) = append(&log, &line) else { return };
        if env::var(KILL).is_ok_and(|wanted| wanted.parse() == Ok(number)) {
            end(Signal::SIGKILL);
        }
        if env::var(STOP).is_ok_and(|wanted| wanted == line) {
            end(Signal::SIGSTOP);
        }
    }

    /// What the file begins with once the test is ready.
    const ARMED: &str = "armed\n";
    /// Kept open: a daemon that has confined itself may not open it any more.
    static FILE: Mutex<Option<File>> = Mutex::new(None);

    /// Writes the line, and says which one it is.
    fn append(log: &Path, line: &str) -> io::Result<usize> {
        let mut kept = FILE.lock().unwrap_or_else(PoisonError::into_inner);
        let file = match &mut *kept {
            Some(file) => file,
            none => none.insert(File::options().append(true).open(log)?),
        };
        if !fs::read_to_string(log)?.starts_with(ARMED) {
            return Err(io::ErrorKind::NotConnected.into());
        }
        file.write_all(format!("{line}\n").as_bytes())?;
        Ok(fs::read_to_string(log)?.lines().count() - 1)
    }

    fn end(signal: Signal) {
        let _nothing_can_be_done_about_it = raise(signal);
    }
}
