//! Files that are there whole or not at all, whenever this process dies. A symbolic link in their place is neither followed
//! nor written through.

use crate::fault;
use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

/// Longest file that is read.
const MAX_BYTES: u64 = 64 << 20;

/// Reads a regular file.
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    // What is no file must not be waited for either: a pipe's other end may never come.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(said)?;
    let about = file.metadata()?;
    if !about.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    if about.len() > MAX_BYTES {
        return Err(io::Error::other(format!("it is larger than {MAX_BYTES} bytes")));
    }
    let mut content = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut content)?;
    Ok(content)
}

/// Puts a file in the place of the one that is there, if one is. `subject` names it to tests.
pub(crate) fn replace(path: &Path, content: &[u8], subject: &str) -> io::Result<()> {
    put(path, content, subject, |_| Ok(()))
}

/// The same, and it survives the host's death too.
pub(crate) fn write(path: &Path, content: &[u8], subject: &str) -> io::Result<()> {
    put(path, content, subject, File::sync_all)?;
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

fn put(path: &Path, content: &[u8], subject: &str, sync: impl Fn(&File) -> io::Result<()>) -> io::Result<()> {
    let next = next(path);
    let put = || {
        // Of a process that was killed, or somebody's link.
        unlink(&next)?;
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o644).open(&next)?;
        fault::point(subject, "temporary file made");
        file.write_all(content)?;
        sync(&file)?;
        fault::point(subject, "temporary file written");
        fs::rename(&next, path)?;
        fault::point(subject, "in place");
        Ok(())
    };
    put().inspect_err(|_| _ = unlink(&next))
}

/// Removes a file, and what a killed process left beside it. True where either was there.
pub(crate) fn remove(path: &Path, subject: &str) -> io::Result<bool> {
    let was_beside = remove_beside(path)?;
    let was_there = unlink(path)?;
    fault::point(subject, "removed");
    Ok(was_there || was_beside)
}

/// Removes what a killed process left beside a file; nobody else has a reason to choose its name.
pub(crate) fn remove_beside(path: &Path) -> io::Result<bool> {
    unlink(&next(path))
}

/// Where a file is made before it takes its place.
fn next(path: &Path) -> PathBuf {
    let mut name: OsString = path.into();
    name.push(".next");
    name.into()
}

/// Removes a file where there is one. A read-only file system would refuse also where there is none.
pub(crate) fn unlink(path: &Path) -> io::Result<bool> {
    match fs::symlink_metadata(path).and_then(|_| fs::remove_file(path)) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// The kernel's own words for a link are "too many levels of symbolic links".
fn said(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::ELOOP) => io::Error::other("it is a symbolic link, which is not followed"),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_link_is_neither_followed_nor_written_through() {
        let dir = tempfile::tempdir().unwrap();
        let [theirs, ours] = ["theirs", "ours"].map(|name| dir.path().join(name));
        fs::write(&theirs, "theirs").unwrap();
        symlink(&theirs, &ours).unwrap();
        symlink(&theirs, next(&ours)).unwrap();
        assert!(read(&ours).unwrap_err().to_string().contains("a symbolic link"));
        write(&ours, b"ours", "test").unwrap();
        assert_eq!(read(&ours).unwrap(), b"ours");
        symlink(&theirs, next(&ours)).unwrap();
        assert!(remove(&ours, "test").unwrap() && !remove(&ours, "test").unwrap());
        assert_eq!(fs::read(&theirs).unwrap(), b"theirs");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_is_no_file_is_an_error_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("folder");
        fs::create_dir(&path).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("no regular file"));
        write(&path, b"", "test").unwrap_err();
        remove(&path, "test").unwrap_err();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
