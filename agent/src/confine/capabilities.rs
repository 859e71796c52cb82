//! Capabilities: what of root's powers is kept (capabilities(7)).

use caps::{CapSet, Capability, CapsHashSet, errors::CapsError};

/// To load eBPF programs, to attach them and to speak to nf_tables, and to load programs that the verifier does not take
/// for an unprivileged user's. And to make cgroups below the root, which not even its owner may write to, for `exec` and
/// `adopt`, and to edit a hosts file that is another user's; where root may write at all is up to landlock.
const NEEDED: [Capability; 4] =
    [Capability::CAP_BPF, Capability::CAP_NET_ADMIN, Capability::CAP_PERFMON, Capability::CAP_DAC_OVERRIDE];

/// Those that came out of CAP_SYS_ADMIN in Linux 5.8, which some container runtimes give in place of them.
const NEW: [Capability; 2] = [Capability::CAP_BPF, Capability::CAP_PERFMON];

/// Keeps what is needed, and cannot get more.
pub(super) fn reduce() -> Result<(), CapsError> {
    let permitted = caps::read(None, CapSet::Permitted)?;
    let kept = kept(&permitted);
    // Whoever may not do it cannot gain anything either: no new privileges come with a program that is executed.
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        let bounding = caps::read(None, CapSet::Bounding)?;
        bounding.difference(&kept).try_for_each(|&given_up| caps::drop(None, CapSet::Bounding, given_up))?;
    }
    caps::clear(None, CapSet::Ambient)?;
    caps::clear(None, CapSet::Inheritable)?;
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)
}

fn kept(permitted: &CapsHashSet) -> CapsHashSet {
    let older = (!NEW.iter().all(|new| permitted.contains(new))).then_some(Capability::CAP_SYS_ADMIN);
    NEEDED.into_iter().chain(older).filter(|needed| permitted.contains(needed)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sys_admin_is_kept_only_where_it_stands_for_others() {
        use Capability::{CAP_BPF, CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_NET_ADMIN, CAP_PERFMON, CAP_SYS_ADMIN};
        let cases: [(&[Capability], &[Capability]); 5] = [
            (&[], &[]),
            (&[CAP_CHOWN, CAP_NET_ADMIN], &[CAP_NET_ADMIN]),
            (&[CAP_SYS_ADMIN, CAP_NET_ADMIN], &[CAP_SYS_ADMIN, CAP_NET_ADMIN]),
            (&[CAP_SYS_ADMIN, CAP_BPF, CAP_PERFMON], &[CAP_BPF, CAP_PERFMON]),
            (&[CAP_SYS_ADMIN, CAP_NET_ADMIN, CAP_BPF, CAP_PERFMON, CAP_DAC_OVERRIDE], &NEEDED),
        ];
        for (permitted, expected) in cases {
            assert_eq!(kept(&permitted.iter().copied().collect()), expected.iter().copied().collect());
        }
    }
}
