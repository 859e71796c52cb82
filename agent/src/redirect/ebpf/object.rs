//! The compiled programs: into the kernel, and from there to cgroups.

use super::{Cgroup, Error, pins::Pins};
use crate::{fault, sys::bpf};
use agent_ebpf::{
    NETNS_COOKIES, maps,
    programs::{self, Program},
};
use aya::{
    Ebpf, EbpfLoader,
    maps::MapInfo,
    programs::{ProgramError, ProgramInfo},
    util::KernelVersion,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
    thread,
};

/// Built by the build script from `agent-ebpf`.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/mesh-redirect-ebpf"));

/// Loads and pins the programs of this binary, over the maps that are pinned already, and puts them in the place of
/// those that are attached: no connection goes without a program meanwhile. Programs that are the same stay.
pub(super) fn load(pins: &Pins, loader: Loader) -> Result<(), Error> {
    pins.create()?;
    share_maps(pins)?;
    let mut ebpf = load_object(pins, loader)?;
    fault::point("maps", "pinned");
    load_programs(&mut ebpf)?;
    let loaded = |program: Program| {
        let absent = || Error::Program { name: program.name, cause: Box::new(ProgramError::NotLoaded) };
        ebpf.program(program.name).map(|loaded| (program, loaded)).ok_or_else(absent)
    };
    let loaded: Vec<_> = programs::all().map(loaded).collect::<Result<_, _>>()?;
    if pins.are_complete() && loaded.iter().all(|(program, loaded)| is_pinned(pins, *program, loaded)) {
        return Ok(());
    }
    for (program, loaded) in loaded {
        replace_pin(pins, program, loaded)?;
    }
    update_links(pins)
}

/// Pins what tells of sockets that outlive a version under this version's names too: which listeners are the proxy's, so
/// that one is known that was opened before, and which of its ports stands for which resolver, for those that are asked
/// there.
fn share_maps(pins: &Pins) -> Result<(), Error> {
    let mut others = pins.others()?;
    others.sort_by_key(|other| !other.are_complete());
    for map in maps::SHARED.iter().filter(|map| !pins.map(map.name).exists()) {
        let Some(other) = others.iter().map(|other| other.map(map.name)).find(|path| is_alike(path, map))
        else {
            continue;
        };
        let path = pins.map(map.name);
        let shared = bpf::open_pin(&other).and_then(|other| bpf::pin(other.as_fd(), &path));
        shared.map_err(|cause| Error::Pin { action: "create", path, cause })?;
    }
    Ok(())
}

fn is_alike(path: &Path, map: &maps::Shared) -> bool {
    MapInfo::from_pin(path)
        .is_ok_and(|info| info.key_size() as usize == map.key && info.value_size() as usize == map.value)
}

/// Loads every program, all at once: the kernel takes milliseconds to verify one, and somebody waits for `enable`.
fn load_programs(ebpf: &mut Ebpf) -> Result<(), Error> {
    thread::scope(|scope| {
        let load = |(name, program)| (name, scope.spawn(move || load_program(program)));
        let mut loads: BTreeMap<&str, _> = ebpf.programs_mut().map(load).collect();
        programs::all().try_for_each(|Program { name, .. }| {
            let loaded = loads.remove(name).and_then(|load| load.join().ok());
            loaded
                .unwrap_or(Err(ProgramError::NotLoaded))
                .map_err(|cause| Error::Program { name, cause: Box::new(cause) })
        })
    })
}

/// Whether the program that is pinned has the same instructions.
fn is_pinned(pins: &Pins, program: Program, loaded: &aya::programs::Program) -> bool {
    let pinned = ProgramInfo::from_pin(pins.program(program)).map(|info| info.tag());
    matches!((pinned, loaded.info()), (Ok(pinned), Ok(loaded)) if pinned == loaded.tag())
}

/// A program that is pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pinned {
    pub(super) id: u32,
    /// Two of the same tag have the same instructions.
    pub(super) tag: u64,
}

/// Those that are pinned, by their names.
pub(super) fn all_pinned(pins: &Pins) -> BTreeMap<&'static str, Pinned> {
    let pinned = |program: Program| {
        let info = ProgramInfo::from_pin(pins.program(program)).ok()?;
        Some((program.name, Pinned { id: info.id(), tag: info.tag() }))
    };
    programs::all().filter_map(pinned).collect()
}

/// As [`load`], where no programs are pinned.
pub(super) fn load_if_absent(pins: &Pins) -> Result<(), Error> {
    if pins.are_complete() { Ok(()) } else { load(pins, loader()) }
}

/// Loads the programs and lets them go again: whether this kernel takes them.
pub(crate) fn try_load() -> Result<(), Error> {
    let mut ebpf = loader().load(OBJECT).map_err(|error| Error::Load(Box::new(error)))?;
    load_programs(&mut ebpf)
}

/// What the kernel calls the programs that are pinned.
pub(super) fn ids(pins: &Pins) -> BTreeSet<u32> {
    let infos = programs::all().filter_map(|program| ProgramInfo::from_pin(pins.program(program)).ok());
    infos.map(|info| info.id()).collect()
}

/// Attaches a pinned program to a cgroup.
pub(super) fn link(pins: &Pins, program: Program, cgroup: &Cgroup) -> Result<OwnedFd, Error> {
    let open = |cause: io::Error| {
        let name = program.name;
        if cause.kind() == io::ErrorKind::NotFound {
            Error::Gone { program: name, cgroup: cgroup.clone() }
        } else {
            Error::Attach { program: name, cgroup: cgroup.clone(), cause }
        }
    };
    let dir = fs::File::open(&cgroup.dir).map_err(open)?;
    let pinned = pinned(pins, program)?;
    fault::point("link", "about to be made");
    bpf::link_create(pinned.as_fd(), dir.as_fd(), program.attach_type).map_err(|cause| {
        match cause.raw_os_error() {
            // The cgroup was removed after it was opened (cgroup_bpf_attach: "if (cgroup_is_dead)").
            Some(libc::ENODEV | libc::ENOENT | libc::ENOLINK) => {
                Error::Gone { program: program.name, cgroup: cgroup.clone() }
            }
            _ => Error::Attach { program: program.name, cgroup: cgroup.clone(), cause },
        }
    })
}

/// What loads the object. To make one takes a while, since aya reads all the types of the kernel, though these programs
/// do not ask for them.
pub(super) type Loader = EbpfLoader<'static>;

pub(super) fn loader() -> Loader {
    let mut loader = EbpfLoader::new();
    loader.btf(None);
    // bpf_get_netns_cookie came to sock_ops programs in 5.15.
    let cookies: &'static u32 = if has_netns_cookies() { &1 } else { &0 };
    loader.override_global(NETNS_COOKIES, cookies, true);
    loader
}

fn has_netns_cookies() -> bool {
    KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(5, 15, 0))
}

fn load_object(pins: &Pins, mut loader: Loader) -> Result<Ebpf, Error> {
    for name in maps::ALL {
        loader.map_pin_path(name, pins.map(name));
    }
    loader.load(OBJECT).map_err(|error| Error::Load(Box::new(error)))
}

fn load_program(program: &mut aya::programs::Program) -> Result<(), ProgramError> {
    match program {
        aya::programs::Program::CgroupSockAddr(program) => program.load(),
        aya::programs::Program::CgroupSockopt(program) => program.load(),
        aya::programs::Program::SockOps(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}

/// Pins a loaded program in the place of the one that is pinned under its name, if one is.
fn replace_pin(pins: &Pins, program: Program, loaded: &aya::programs::Program) -> Result<(), Error> {
    let (next, path) = (pins.next_program(program), pins.program(program));
    let fd = loaded.fd().map_err(|cause| Error::Program { name: program.name, cause: Box::new(cause) })?;
    let replace = || {
        match fs::remove_file(&next) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        bpf::pin(fd.as_fd(), &next)?;
        fault::point("program", "pinned beside the former one");
        fs::rename(&next, &path).inspect(|()| fault::point("program", "in place"))
    };
    replace().map_err(|cause| Error::Pin { action: "create", path: path.clone(), cause })
}

/// Gives every link the programs that are pinned now.
fn update_links(pins: &Pins) -> Result<(), Error> {
    for scope in pins.scopes()? {
        for program in programs::all() {
            let Ok(link) = pins.link(scope, program) else { continue };
            match bpf::link_update(link.as_fd(), pinned(pins, program)?.as_fd()) {
                Ok(()) => fault::point("link", "given another program"),
                // The cgroup is gone; the next prune removes the link.
                Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {}
                Err(cause) => {
                    return Err(Error::Pin { action: "update", path: pins.program(program), cause });
                }
            }
        }
    }
    Ok(())
}

fn pinned(pins: &Pins, program: Program) -> Result<OwnedFd, Error> {
    let path = pins.program(program);
    bpf::open_pin(&path).map_err(|cause| Error::Pin { action: "open", path, cause })
}
