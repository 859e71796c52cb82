//! This program itself, as the steps before starts run it.

use std::{
    env,
    ffi::OsStr,
    io,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

/// What the kernel adds to the path of a program whose file is gone (proc_pid_exe(5)).
const GONE: &[u8] = b" (deleted)";

/// Where it is. The one that an upgrade has put in its place is meant too, while this one still runs.
pub(super) fn path() -> io::Result<PathBuf> {
    let path = env::current_exe()?;
    Ok(if path.exists() { path } else { former(&path) })
}

fn former(path: &Path) -> PathBuf {
    let bytes = path.as_os_str().as_bytes();
    OsStr::from_bytes(bytes.strip_suffix(GONE).unwrap_or(bytes)).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_was_replaced_is_where_its_successor_is() {
        for (shown, meant) in [("/usr/bin/x (deleted)", "/usr/bin/x"), ("/usr/bin/x", "/usr/bin/x")] {
            assert_eq!(former(Path::new(shown)), Path::new(meant));
        }
        assert!(path().unwrap().exists());
    }
}
