//! Containers that were seen starting, below the run directory: `containers/SERVICE/ID`, a link whose text is the path of
//! the container's cgroup. The hook writes them, with or without a daemon; the daemon reads where else it would have to
//! ask a runtime.

use crate::fault;
use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

/// Takes note of a container, and forgets those of the service whose cgroups are gone.
pub(crate) fn note(run: &Path, service: &str, id: &str, cgroup: &Path, root: &Path) -> io::Result<()> {
    let dir = of_service(run, service);
    fs::create_dir_all(&dir)?;
    fault::point("container", "directory made");
    for (link, cgroup) in links(run, service) {
        if !below(root, &cgroup).is_dir() {
            let _another_hook_was_faster = fs::remove_file(link);
        }
    }
    let (link, next) = (dir.join(id), dir.join(format!(".{id}")));
    match fs::remove_file(&next) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    symlink(cgroup, &next)?;
    fault::point("container", "temporary link made");
    fs::rename(next, link)?;
    fault::point("container", "noted");
    Ok(())
}

/// The cgroups of a service's containers, whether they are still there or not.
pub(crate) fn cgroups(run: &Path, service: &str) -> Vec<PathBuf> {
    links(run, service).into_iter().map(|(_, cgroup)| cgroup).collect()
}

/// Forgets the containers of a service.
pub(crate) fn forget(run: &Path, service: &str) {
    forget_all_in(&of_service(run, service));
    let _others_are_in_it = fs::remove_dir(all(run));
}

/// Forgets all containers.
pub(crate) fn forget_all(run: &Path) {
    let services = fs::read_dir(all(run)).into_iter().flatten().flatten();
    services.for_each(|service| forget_all_in(&service.path()));
    let _there_may_be_none = fs::remove_dir(all(run));
}

/// Only links are ours.
fn forget_all_in(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_symlink()) {
            let _already_gone = fs::remove_file(entry.path());
            fault::point("container", "forgotten");
        }
    }
    let _others_are_in_it = fs::remove_dir(dir);
}

fn all(run: &Path) -> PathBuf {
    run.join("containers")
}

fn of_service(run: &Path, service: &str) -> PathBuf {
    all(run).join(service)
}

fn links(run: &Path, service: &str) -> Vec<(PathBuf, PathBuf)> {
    let entries = fs::read_dir(of_service(run, service)).into_iter().flatten().flatten();
    let link = |entry: fs::DirEntry| Some((entry.path(), fs::read_link(entry.path()).ok()?));
    let mut links: Vec<(PathBuf, PathBuf)> = entries.filter_map(link).collect();
    links.sort();
    links
}

fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_is_noted_until_its_cgroup_is_gone_and_another_one_starts() {
        let (run, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (run, root) = (run.path(), root.path());
        let start = |id: &str, path: &str| {
            fs::create_dir_all(root.join(path)).unwrap();
            note(run, "web", id, &Path::new("/").join(path), root).unwrap();
        };
        start("1", "a/1");
        start("1", "a/1");
        start("2", "a/2");
        assert_eq!(cgroups(run, "web"), [Path::new("/a/1"), Path::new("/a/2")]);
        fs::remove_dir(root.join("a/1")).unwrap();
        assert_eq!(cgroups(run, "web").len(), 2);
        start("3", "a/3");
        assert_eq!(cgroups(run, "web"), [Path::new("/a/2"), Path::new("/a/3")]);
        assert!(cgroups(run, "shop").is_empty());
        forget(run, "web");
        assert!(cgroups(run, "web").is_empty() && !run.join("containers").exists());
    }
}
