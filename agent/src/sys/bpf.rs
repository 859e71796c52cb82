//! `bpf(2)` for cgroup links and their pins, and for the number of a map's entries.
//!
//! aya 0.14 can neither replace the program of a cgroup link nor pin a getsockopt link, and reads maps entry by entry.

#![expect(unsafe_code, reason = "bpf(2) takes pointers")]

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

const BPF_MAP_GET_NEXT_KEY: u32 = 4;
const BPF_OBJ_PIN: u32 = 6;
const BPF_OBJ_GET: u32 = 7;
const BPF_OBJ_GET_INFO_BY_FD: u32 = 15;
const BPF_PROG_QUERY: u32 = 16;
const BPF_MAP_LOOKUP_BATCH: u32 = 24;
const BPF_LINK_CREATE: u32 = 28;
const BPF_LINK_UPDATE: u32 = 29;

/// `struct bpf_link_info` of a cgroup link (linux/bpf.h).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct CgroupLinkInfo {
    kind: u32,
    id: u32,
    /// Id of the program that runs there.
    pub(crate) prog_id: u32,
    padding: u32,
    /// Id of the cgroup; zero once the cgroup is gone.
    pub(crate) cgroup_id: u64,
    /// `enum bpf_attach_type`: which hook it is.
    pub(crate) attach_type: u32,
    tail: u32,
}

/// Attaches a program to a cgroup; the attachment ends when the last descriptor and pin of the link are gone. Linux 5.7.
pub(crate) fn link_create(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    attach_type: u32,
) -> io::Result<OwnedFd> {
    let mut attr = [program.as_raw_fd() as u32, cgroup.as_raw_fd() as u32, attach_type, 0];
    owned(bpf(BPF_LINK_CREATE, &mut attr)?)
}

/// Replaces the program of a link, atomically. Linux 5.7.
pub(crate) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = [link.as_raw_fd() as u32, program.as_raw_fd() as u32, 0, 0];
    bpf(BPF_LINK_UPDATE, &mut attr).map(drop)
}

/// What the kernel says of a cgroup link. Linux 5.8.
pub(crate) fn link_info(link: BorrowedFd<'_>) -> io::Result<CgroupLinkInfo> {
    #[repr(C)]
    struct Attr {
        fd: u32,
        len: u32,
        info: u64,
    }
    let mut info = CgroupLinkInfo::default();
    let len = size_of_val(&info) as u32;
    let mut attr =
        Attr { fd: link.as_raw_fd() as u32, len, info: (&raw mut info).expose_provenance() as u64 };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    Ok(info)
}

/// The programs at a hook of a cgroup, whoever attached them; not those of cgroups above.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Attached {
    /// In the order in which they run.
    pub(crate) ids: Vec<u32>,
    pub(crate) sharing: Sharing,
}

/// How programs at a hook go with others, as the first one asked for when it was attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sharing {
    /// None beside it, and none below; also where there is no program.
    Alone,
    /// None beside it; those below take its place (BPF_F_ALLOW_OVERRIDE).
    GivesWay,
    /// All run (BPF_F_ALLOW_MULTI).
    Many,
}

impl Sharing {
    pub(crate) fn from_flags(flags: u32) -> Self {
        const BPF_F_ALLOW_OVERRIDE: u32 = 1;
        const BPF_F_ALLOW_MULTI: u32 = 2;
        match flags {
            _ if flags & BPF_F_ALLOW_MULTI != 0 => Self::Many,
            _ if flags & BPF_F_ALLOW_OVERRIDE != 0 => Self::GivesWay,
            _ => Self::Alone,
        }
    }
}

/// What is at a hook of a cgroup. Linux 4.15.
pub(crate) fn attached(cgroup: BorrowedFd<'_>, attach_type: u32) -> io::Result<Attached> {
    #[repr(C)]
    struct Attr {
        cgroup: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        ids: u64,
        count: u32,
        padding: u32,
    }
    // What one hook of one cgroup can hold (BPF_CGROUP_MAX_PROGS).
    let mut ids = [0_u32; 64];
    let mut attr = Attr {
        cgroup: cgroup.as_raw_fd() as u32,
        attach_type,
        query_flags: 0,
        attach_flags: 0,
        ids: ids.as_mut_ptr().expose_provenance() as u64,
        count: ids.len() as u32,
        padding: 0,
    };
    bpf(BPF_PROG_QUERY, &mut attr)?;
    let ids = ids.into_iter().take(attr.count as usize).collect();
    Ok(Attached { ids, sharing: Sharing::from_flags(attr.attach_flags) })
}

/// How many entries a hash map holds, read in one pass over its buckets; `value_size` is that of all CPUs together where
/// each has a value of its own. Linux 5.6.
pub(crate) fn count_entries(map: BorrowedFd<'_>, key_size: usize, value_size: usize) -> io::Result<u64> {
    #[repr(C)]
    struct Attr {
        from: u64,
        to: u64,
        keys: u64,
        values: u64,
        count: u32,
        map: u32,
        element_flags: u64,
        flags: u64,
    }
    // More than any bucket holds.
    const AT_ONCE: u32 = 4096;
    let mut keys = vec![0_u8; AT_ONCE as usize * key_size];
    let mut values = vec![0_u8; AT_ONCE as usize * value_size];
    // The bucket to go on from, which the kernel reads before it writes the next one.
    let mut bucket = 0_u32;
    let at = (&raw mut bucket).expose_provenance() as u64;
    let mut attr = Attr {
        from: 0,
        to: at,
        keys: keys.as_mut_ptr().expose_provenance() as u64,
        values: values.as_mut_ptr().expose_provenance() as u64,
        count: AT_ONCE,
        map: map.as_raw_fd() as u32,
        element_flags: 0,
        flags: 0,
    };
    let mut entries = 0;
    loop {
        attr.count = AT_ONCE;
        match bpf(BPF_MAP_LOOKUP_BATCH, &mut attr) {
            Ok(_) => entries += u64::from(attr.count),
            // The end.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                return Ok(entries + u64::from(attr.count));
            }
            Err(error) => return Err(error),
        }
        attr.from = at;
    }
}

/// Whether a map has no entry; its keys have so many bytes. Linux 4.12.
pub(crate) fn is_empty(map: BorrowedFd<'_>, key_size: usize) -> io::Result<bool> {
    #[repr(C)]
    struct Attr {
        map: u32,
        padding: u32,
        key: u64,
        next_key: u64,
    }
    let mut first = vec![0_u8; key_size];
    // After no key comes the first one.
    let next_key = first.as_mut_ptr().expose_provenance() as u64;
    let mut attr = Attr { map: map.as_raw_fd() as u32, padding: 0, key: 0, next_key };
    match bpf(BPF_MAP_GET_NEXT_KEY, &mut attr) {
        Ok(_) => Ok(false),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(true),
        Err(error) => Err(error),
    }
}

/// Gives a link, map or program a name on a BPF file system.
pub(crate) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attr =
        ObjAttr { path: path.as_ptr().expose_provenance() as u64, fd: object.as_raw_fd() as u32, flags: 0 };
    bpf(BPF_OBJ_PIN, &mut attr).map(drop)
}

/// Opens what has a name on a BPF file system.
pub(crate) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attr = ObjAttr { path: path.as_ptr().expose_provenance() as u64, fd: 0, flags: 0 };
    owned(bpf(BPF_OBJ_GET, &mut attr)?)
}

#[repr(C)]
struct ObjAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from)
}

fn owned(fd: i64) -> io::Result<OwnedFd> {
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bpf<T>(command: u32, attr: &mut T) -> io::Result<i64> {
    // SAFETY: the kernel reads and writes no more than the size it is told, and addresses inside point at live values.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
