//! Somebody else's eBPF program.

#![expect(unsafe_code, reason = "bpf(2) takes pointers")]

use std::fs::File;
use std::io;
use std::net::SocketAddrV4;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::thread::park;

const BPF_PROG_LOAD: u32 = 5;
const BPF_PROG_ATTACH: u32 = 8;
const BPF_LINK_CREATE: u32 = 28;
const BPF_PROG_TYPE_CGROUP_SOCK_ADDR: u32 = 18;
const BPF_CGROUP_INET4_CONNECT: u32 = 10;
const BPF_F_ALLOW_OVERRIDE: u32 = 1;

/// Where the address and the port are in `struct bpf_sock_addr`.
const USER_IP4: i16 = 4;
const USER_PORT: i16 = 24;

/// What is attached, and how.
pub(crate) struct Hook<'a> {
    name: &'a str,
    /// Flags of an attachment of the older kind, which shares its place with nobody; none of a link, which does.
    flags: Option<u32>,
    translate: Option<[SocketAddrV4; 2]>,
}

impl<'a> Hook<'a> {
    pub(crate) fn parse(mut options: &[&'a str]) -> anyhow::Result<Self> {
        let mut hook = Self { name: "somebody_else", flags: None, translate: None };
        loop {
            options = match options {
                [] => return Ok(hook),
                ["--name", name, rest @ ..] => {
                    hook.name = name;
                    rest
                }
                ["--alone", rest @ ..] => {
                    hook.flags = Some(0);
                    rest
                }
                ["--gives-way", rest @ ..] => {
                    hook.flags = Some(BPF_F_ALLOW_OVERRIDE);
                    rest
                }
                ["--translate", from, to, rest @ ..] => {
                    hook.translate = Some([from.parse()?, to.parse()?]);
                    rest
                }
                _ => anyhow::bail!("usage: see the head of the program's source"),
            }
        }
    }

    /// Its instructions (linux/bpf.h).
    fn program(&self) -> Vec<u64> {
        let [load, store, compare, set] = [0x61, 0x63, 0x56, 0xb4];
        let mut program = Vec::new();
        if let Some([from, to]) = self.translate {
            let words =
                |to: SocketAddrV4| [i32::from_ne_bytes(to.ip().octets()), i32::from(to.port().to_be())];
            let [[from_ip, from_port], [to_ip, to_port]] = [words(from), words(to)];
            program.extend([
                instruction(load, 2, 1, USER_IP4, 0),
                // To what ends it.
                instruction(compare, 2, 0, 6, from_ip),
                instruction(load, 2, 1, USER_PORT, 0),
                instruction(compare, 2, 0, 4, from_port),
                instruction(set, 2, 0, 0, to_ip),
                instruction(store, 1, 2, USER_IP4, 0),
                instruction(set, 2, 0, 0, to_port),
                instruction(store, 1, 2, USER_PORT, 0),
            ]);
        }
        // `r0 = 1; exit`: the connection goes on.
        program.extend([instruction(0xb7, 0, 0, 0, 1), instruction(0x95, 0, 0, 0, 0)]);
        program
    }
}

fn instruction(code: u8, to: u8, from: u8, offset: i16, value: i32) -> u64 {
    let [low, high] = offset.to_le_bytes();
    let [a, b, c, d] = value.to_le_bytes();
    u64::from_le_bytes([code, from << 4 | to, low, high, a, b, c, d])
}

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

/// Stays attached until it is killed, or until its cgroup is gone where it is alone.
pub(crate) fn attach(cgroup: &str, hook: &Hook<'_>) -> anyhow::Result<()> {
    let code = hook.program();
    let mut name = [0; 16];
    name.iter_mut().take(15).zip(hook.name.bytes()).for_each(|(byte, of_name)| *byte = of_name);
    let mut load = Load {
        kind: BPF_PROG_TYPE_CGROUP_SOCK_ADDR,
        instructions: code.len() as u32,
        code: code.as_ptr().expose_provenance() as u64,
        license: c"GPL".as_ptr().expose_provenance() as u64,
        log: [0; 2],
        kernel: 0,
        flags: 0,
        name,
        interface: 0,
        attach_type: BPF_CGROUP_INET4_CONNECT,
    };
    let program = owned(bpf(BPF_PROG_LOAD, &mut load)?);
    let (program_fd, cgroup) = (program.as_raw_fd() as u32, File::open(cgroup)?);
    let cgroup_fd = cgroup.as_raw_fd() as u32;
    let _link = match hook.flags {
        Some(flags) => {
            bpf(BPF_PROG_ATTACH, &mut [cgroup_fd, program_fd, BPF_CGROUP_INET4_CONNECT, flags])?;
            None
        }
        None => Some(owned(bpf(BPF_LINK_CREATE, &mut [program_fd, cgroup_fd, BPF_CGROUP_INET4_CONNECT, 0])?)),
    };
    println!("attached");
    loop {
        park();
    }
}

/// The kernel counts while somebody wants it to.
pub(crate) fn count_runs() -> anyhow::Result<()> {
    const BPF_ENABLE_STATS: u32 = 32;
    const BPF_STATS_RUN_TIME: u32 = 0;
    let _counting = owned(bpf(BPF_ENABLE_STATS, &mut [BPF_STATS_RUN_TIME])?);
    println!("counting");
    loop {
        park();
    }
}

fn bpf<T>(command: u32, attributes: &mut T) -> io::Result<i32> {
    // SAFETY: the kernel reads no more than the size it is told, and addresses inside point at live values.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}

fn owned(fd: i32) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
