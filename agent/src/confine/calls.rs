//! System calls: what is not asked of the kernel (seccomp(2)).
//!
//! What is denied is listed, not what is allowed: the commands that the daemon runs (systemctl, docker) are linked to C
//! libraries of any age and make calls that nobody here knows of, and one that is missing would show on a stranger's host,
//! in the middle of steering. The unit, which systemd knows better, allows a list besides. Denied calls answer EPERM, as
//! those do for which a capability is missing, and are not fatal.

use seccompiler::{
    BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};
use std::{collections::BTreeMap, fs};

/// Calls that are denied whatever their arguments.
const DENIED: &[libc::c_long] = &[
    // Other views of the host than the one that there is.
    libc::SYS_chroot,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_fspick,
    libc::SYS_mount,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_pivot_root,
    libc::SYS_setns,
    libc::SYS_umount2,
    libc::SYS_unshare,
    // Other processes' insides.
    libc::SYS_kcmp,
    libc::SYS_pidfd_getfd,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    // The host itself.
    libc::SYS_acct,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_finit_module,
    libc::SYS_init_module,
    libc::SYS_kexec_file_load,
    libc::SYS_kexec_load,
    libc::SYS_mknodat,
    libc::SYS_quotactl,
    libc::SYS_reboot,
    libc::SYS_setdomainname,
    libc::SYS_sethostname,
    libc::SYS_settimeofday,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_syslog,
    libc::SYS_vhangup,
    // Parts of the kernel that have had more holes than most, or see everything (CAP_PERFMON is kept for the verifier).
    libc::SYS_add_key,
    libc::SYS_fanotify_init,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_keyctl,
    libc::SYS_open_by_handle_at,
    libc::SYS_perf_event_open,
    libc::SYS_request_key,
    libc::SYS_userfaultfd,
];

/// Those that only this architecture has.
#[cfg(target_arch = "x86_64")]
const DENIED_HERE: &[libc::c_long] =
    &[libc::SYS_ioperm, libc::SYS_iopl, libc::SYS_mknod, libc::SYS_modify_ldt, libc::SYS_uselib];
#[cfg(not(target_arch = "x86_64"))]
const DENIED_HERE: &[libc::c_long] = &[];

/// Sockets of other families are denied.
const FAMILIES: [libc::c_int; 4] = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];

/// Of `clone`: namespaces, in a new one of which for users a process would have every capability.
const NAMESPACES: [libc::c_int; 7] = [
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWNET,
    libc::CLONE_NEWNS,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWUTS,
];

type Rules = BTreeMap<libc::c_long, Vec<SeccompRule>>;

/// Denies these calls to this thread. False where the kernel cannot.
pub(super) fn confine() -> Result<bool, Error> {
    let Ok(arch) = TargetArch::try_from(std::env::consts::ARCH) else { return Ok(false) };
    if !are_confinable() {
        return Ok(false);
    }
    for (rules, errno) in [(denied()?, libc::EPERM), (unknown(), libc::ENOSYS)] {
        let matched = SeccompAction::Errno(errno.cast_unsigned());
        let filter = SeccompFilter::new(rules, SeccompAction::Allow, matched, arch)?;
        apply_filter(&with_one_abi(filter.try_into()?))?;
    }
    Ok(true)
}

/// Whether the kernel can.
pub(super) fn are_confinable() -> bool {
    // The line came in Linux 5.9 (proc_pid_status(5)); all that is not about processes may be hidden from a service.
    let status = fs::read_to_string("/proc/self/status");
    status.is_ok_and(|status| status.lines().any(|line| line.starts_with("Seccomp_filters:")))
}

fn denied() -> Result<Rules, Error> {
    let whatever = DENIED.iter().chain(DENIED_HERE).map(|&call| (call, vec![]));
    let is_other = FAMILIES.into_iter().map(|family| first(SeccompCmpOp::Ne, family));
    let other_family = SeccompRule::new(is_other.collect::<Result<_, _>>()?)?;
    let namespaces = NAMESPACES.into_iter().map(|namespace| {
        let is_asked_for = first(SeccompCmpOp::MaskedEq(bits(namespace)), namespace)?;
        Ok(SeccompRule::new(vec![is_asked_for])?)
    });
    let by_argument = [
        (libc::SYS_socket, vec![other_family]),
        (libc::SYS_clone, namespaces.collect::<Result<_, Error>>()?),
    ];
    Ok(whatever.chain(by_argument).collect())
}

/// A filter cannot see what is asked of `clone3`; a C library that is told that there is none takes `clone`.
fn unknown() -> Rules {
    Rules::from([(libc::SYS_clone3, vec![])])
}

/// A condition on a call's first argument, which is an `int`, or flags of which these are the lower half.
fn first(is: SeccompCmpOp, value: libc::c_int) -> Result<SeccompCondition, Error> {
    Ok(SeccompCondition::new(0, SeccompCmpArgLen::Dword, is, bits(value))?)
}

fn bits(value: libc::c_int) -> u64 {
    u64::from(value.cast_unsigned())
}

/// On x86_64 the calls of the x32 ABI have numbers of their own, which the filter would let pass.
fn with_one_abi(filter: BpfProgram) -> BpfProgram {
    use seccompiler::sock_filter;
    const X32: u32 = 0x4000_0000;
    let instruction = |code: u32, jt, jf, k| sock_filter { code: code as u16, jt, jf, k };
    let refuse_x32 = [
        // The number of the call is the first word.
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        instruction(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, 0, 1, X32),
        instruction(
            libc::BPF_RET | libc::BPF_K,
            0,
            0,
            libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned(),
        ),
    ];
    if cfg!(target_arch = "x86_64") { refuse_x32.into_iter().chain(filter).collect() } else { filter }
}
