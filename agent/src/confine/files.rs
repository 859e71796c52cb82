//! Files: where the daemon may write (landlock(7), Linux 5.13). It may read what its user may.
//!
//! A rule is for a directory that is there, not for a name: what is removed and made anew is not covered by it. So what
//! the rules are for is made beforehand, and the daemon does not remove it.

use super::ConfineError;
use crate::{config::Paths, mode::Mode, workload::systemd};
use landlock::{
    ABI, AccessFs, BitFlags, CompatLevel, Compatible as _, PathBeneath, PathFd, Ruleset, RulesetAttr as _,
    RulesetCreatedAttr as _, RulesetError, RulesetStatus, Scope, make_bitflags,
};
use std::{
    fs,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

/// What is handled: the newest that was tried. Later versions would restrict more than files that are written.
const VERSION: ABI = ABI::V6;

const WRITE: BitFlags<AccessFs> = make_bitflags!(AccessFs::{WriteFile | Truncate});
/// A file by one that takes its place.
const REPLACE: BitFlags<AccessFs> = make_bitflags!(AccessFs::{WriteFile | Truncate | MakeReg | RemoveFile});
const OWN: BitFlags<AccessFs> = make_bitflags!(AccessFs::{
    WriteFile | Truncate | MakeReg | MakeSock | MakeDir | RemoveFile | RemoveDir
});
const DIRECTORIES: BitFlags<AccessFs> = make_bitflags!(AccessFs::{MakeDir | RemoveDir});
/// Processes are moved by writing, and cgroups are directories.
const CGROUPS: BitFlags<AccessFs> = make_bitflags!(AccessFs::{WriteFile | Truncate | MakeDir | RemoveDir});

/// A file, or a directory and all below it, and what may be done there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Area {
    path: PathBuf,
    may: BitFlags<AccessFs>,
}

/// Makes what the rules are for, where it is not there yet.
pub(super) fn make(paths: &Paths, mode: Mode) -> Result<(), ConfineError> {
    let pins = (mode == Mode::Ebpf).then_some(&paths.pins);
    [&paths.state].into_iter().chain(pins).try_for_each(|path| {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
        made.map_err(|cause| ConfineError::Directory { path: path.clone(), cause })
    })
}

/// Where the daemon writes. Its mode is one for its life.
pub(super) fn areas(paths: &Paths, mode: Mode, cgroup_root: &Path) -> Vec<Area> {
    let area = |path: &Path, may| Area { path: path.to_owned(), may };
    let steering = match mode {
        Mode::Ebpf => Some(area(&paths.pins, OWN)),
        Mode::Nftables => None,
        Mode::Hosts => paths.hosts.parent().map(|dir| area(dir, REPLACE)),
    };
    let mut areas = vec![
        area(&paths.run, OWN),
        area(&paths.state, OWN),
        area(Path::new(systemd::UNITS), OWN),
        area(cgroup_root, CGROUPS),
        // To where what nobody wants to read is written, also by programs that it runs.
        area(Path::new("/dev/null"), WRITE),
    ];
    areas.extend(steering);
    areas.extend(above_hooks(&paths.hooks).next().map(|dir| area(dir, OWN)));
    areas.extend(above_hooks(&paths.hooks).last().map(|dir| area(dir, DIRECTORIES)));
    areas
}

/// What is there of the hook's directory and of those in which it is made, and removed.
fn above_hooks(hooks: &Path) -> impl Iterator<Item = &Path> {
    let is_theirs = |dir: &&Path| dir.parent().is_some() && dir.is_dir();
    hooks.ancestors().take(3).filter(is_theirs)
}

/// Lets this thread write nowhere else, and signal nobody but what it starts (Linux 6.12). False where the kernel cannot.
pub(super) fn confine(areas: &[Area]) -> Result<bool, RulesetError> {
    let mut ruleset =
        Ruleset::default().handle_access(AccessFs::from_write(VERSION))?.scope(Scope::Signal)?.create()?;
    for Area { path, may } in areas {
        // One that is not there cannot be written to either.
        if let Ok(there) = PathFd::new(path) {
            ruleset = ruleset.add_rule(PathBeneath::new(there, *may))?;
        }
    }
    Ok(ruleset.restrict_self()?.ruleset != RulesetStatus::NotEnforced)
}

/// Whether the kernel can.
pub(super) fn are_confinable() -> bool {
    let required = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    required.handle_access(AccessFs::from_write(ABI::V1)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_directory_above_the_hook_is_its_own_and_never_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let hooks = dir.path().join("containers/oci/hooks.d");
        fs::create_dir_all(dir.path().join("containers")).unwrap();
        assert_eq!(above_hooks(&hooks).next(), Some(&*dir.path().join("containers")));
        fs::create_dir_all(&hooks).unwrap();
        assert_eq!(above_hooks(&hooks).next(), Some(&*hooks));
        assert_eq!(above_hooks(&hooks).last(), Some(&*dir.path().join("containers")));
        assert_eq!(above_hooks(Path::new("/nonexistent/hooks.d")).next(), None);
    }

    #[test]
    fn what_a_mode_writes_is_written_in_that_mode_alone() {
        let paths = Paths {
            run: "/run/m".into(),
            state: "/var/m".into(),
            pins: "/sys/fs/bpf/m".into(),
            hosts: "/etc/hosts".into(),
            hooks: "/usr/share/m".into(),
        };
        let may = |mode, path: &str| {
            let areas = areas(&paths, mode, Path::new("/sys/fs/cgroup"));
            areas.into_iter().find(|area| area.path == Path::new(path)).map(|area| area.may)
        };
        let of_mode = |mode| [may(mode, "/sys/fs/bpf/m"), may(mode, "/etc")];
        assert_eq!(of_mode(Mode::Ebpf), [Some(OWN), None]);
        assert_eq!(of_mode(Mode::Nftables), [None, None]);
        assert_eq!(of_mode(Mode::Hosts), [None, Some(REPLACE)]);
    }
}
