//! Somebody else's eBPF program.

#![expect(unsafe_code, reason = "bpf(2) takes pointers")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::thread::park;

const BPF_PROG_LOAD: u32 = 5;
const BPF_LINK_CREATE: u32 = 28;
const BPF_PROG_TYPE_CGROUP_SOCK_ADDR: u32 = 18;
const BPF_CGROUP_INET4_CONNECT: u32 = 10;

/// `r0 = 1; exit`: the connection goes on.
const PROGRAM: [u64; 2] = [0x0000_0001_0000_00b7, 0x0000_0000_0000_0095];

/// The head of `union bpf_attr` for `BPF_PROG_LOAD`.
#[repr(C)]
struct Load {
    kind: u32,
    instructions: u32,
    code: u64,
    license: u64,
    log: [u64; 2],
    kernel: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

/// Stays attached until it is killed.
pub(crate) fn attach(cgroup: &str) -> anyhow::Result<()> {
    let mut load = Load {
        kind: BPF_PROG_TYPE_CGROUP_SOCK_ADDR,
        instructions: PROGRAM.len() as u32,
        code: PROGRAM.as_ptr().expose_provenance() as u64,
        license: c"GPL".as_ptr().expose_provenance() as u64,
        log: [0; 2],
        kernel: 0,
        flags: 0,
        name: *b"somebody_else\0\0\0",
        interface: 0,
        attach_type: BPF_CGROUP_INET4_CONNECT,
    };
    let program = bpf(BPF_PROG_LOAD, &mut load)?;
    let cgroup = File::open(cgroup)?;
    let mut create = [program.as_raw_fd() as u32, cgroup.as_raw_fd() as u32, BPF_CGROUP_INET4_CONNECT, 0_u32];
    let _link = bpf(BPF_LINK_CREATE, &mut create)?;
    println!("attached");
    loop {
        park();
    }
}

/// The kernel counts while somebody wants it to.
pub(crate) fn count_runs() -> anyhow::Result<()> {
    const BPF_ENABLE_STATS: u32 = 32;
    const BPF_STATS_RUN_TIME: u32 = 0;
    let _counting = bpf(BPF_ENABLE_STATS, &mut [BPF_STATS_RUN_TIME])?;
    println!("counting");
    loop {
        park();
    }
}

fn bpf<T>(command: u32, attributes: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads no more than the size it is told, and addresses inside point at live values.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
