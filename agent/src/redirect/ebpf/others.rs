//! Programs of others' at the hooks that ours are at: of a cgroup and of those above it.
//!
//! For each event the kernel runs the programs of the socket's cgroup in the order in which they were attached, and then
//! those of the cgroups above, the nearest first. They share a hook only where the first was attached so that others may
//! come (BPF_F_ALLOW_MULTI), as links always are; one that was attached without lets none beside it, or gives way to
//! those below (kernel/bpf/cgroup.c: `hierarchy_allows_attach`, `compute_effective_progs`). That one was attached to run before
//! those below (BPF_F_PREORDER, Linux 6.15), the kernel does not tell.

use crate::sys::bpf::{self, Attached, Sharing};
use agent_ebpf::programs::Program;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    fs, io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

/// A program that is not ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Other {
    /// What the kernel calls it.
    pub(crate) id: u32,
    /// At which hook.
    pub(crate) hook: String,
    /// Of which cgroup.
    pub(crate) dir: PathBuf,
    pub(crate) order: Order,
}

/// How it goes with ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Order {
    /// It runs before ours.
    First,
    /// It runs after ours.
    After,
    /// It lets none beside it, nor below.
    Alone,
    /// It would not run any more where ours are.
    Displaced,
}

/// What is at hooks, as long as one does one thing: those of cgroups that are above many are asked for once.
#[derive(Debug, Default)]
pub(crate) struct Hooks {
    /// By a cgroup and an attach type: what is there, and above.
    above: BTreeMap<(PathBuf, u32), Vec<Level>>,
}

/// A cgroup, and what is at one of its hooks.
type Level = (PathBuf, Attached);

impl Hooks {
    /// Programs that are not ours at hooks of a cgroup and of those above it, whether ours are attached or not.
    pub(crate) fn others(
        &mut self,
        cgroup: &Path,
        programs: &[Program],
        ours: &BTreeSet<u32>,
    ) -> io::Result<Vec<Other>> {
        let dir = fs::File::open(cgroup)?;
        let mut others = Vec::new();
        for program in programs {
            let own = bpf::attached(dir.as_fd(), program.attach_type)?;
            let above = self.above(cgroup, program.attach_type)?;
            let other = |(level, id, order): Ordered| {
                let dir = level.map_or(cgroup, |level| &above[level].0).to_owned();
                Other { id, hook: hook(*program).to_owned(), dir, order }
            };
            others.extend(orders(&own, above, ours).into_iter().map(other));
        }
        Ok(others)
    }

    /// The one, if any, because of which ours cannot be attached, or should not.
    pub(super) fn in_the_way(&mut self, cgroup: &Path, programs: &[Program]) -> Option<(Program, Other)> {
        programs.iter().find_map(|program| {
            // What cannot be asked the kernel will say when ours are attached.
            let others = self.others(cgroup, &[*program], &BTreeSet::new()).unwrap_or_default();
            let other =
                others.into_iter().find(|other| matches!(other.order, Order::Alone | Order::Displaced));
            Some((*program, other?))
        })
    }

    fn above(&mut self, cgroup: &Path, attach_type: u32) -> io::Result<&[Level]> {
        let parent = cgroup.parent().unwrap_or(cgroup);
        Ok(match self.above.entry((parent.to_owned(), attach_type)) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => unknown.insert(levels(parent, attach_type)?),
        })
    }
}

/// A cgroup and those above it, to the top of what can be seen.
fn levels(cgroup: &Path, attach_type: u32) -> io::Result<Vec<Level>> {
    let is_cgroup = |dir: &&Path| {
        let kind = nix::sys::statfs::statfs(*dir).map(|fs| fs.filesystem_type());
        kind == Ok(nix::sys::statfs::CGROUP2_SUPER_MAGIC)
    };
    let dirs = cgroup.ancestors().take_while(is_cgroup);
    dirs.map(|dir| Ok((dir.to_owned(), bpf::attached(fs::File::open(dir)?.as_fd(), attach_type)?))).collect()
}

/// Names of programs, as far as this process may ask for them (CAP_SYS_ADMIN): the daemon may not.
pub(crate) fn names() -> BTreeMap<u32, String> {
    let infos = aya::programs::loaded_programs().filter_map(Result::ok);
    infos.filter_map(|info| Some((info.id(), info.name_as_str()?.to_owned()))).collect()
}

fn hook(program: Program) -> &'static str {
    match program.name {
        "mr_client_ops" | "mr_proxy_ops" => "sock_ops",
        "mr_peername4" => "getpeername4",
        "mr_peername6" => "getpeername6",
        name => name.strip_prefix("mr_").unwrap_or(name),
    }
}

/// Which of the levels above a program is at, if any, its id and its order.
type Ordered = (Option<usize>, u32, Order);

/// Each program that is not ours, at the cgroup where ours are, or will be, and above.
fn orders(own: &Attached, above: &[Level], ours: &BTreeSet<u32>) -> Vec<Ordered> {
    let we = own.ids.iter().position(|id| ours.contains(id)).unwrap_or(own.ids.len());
    let of_own = own.ids.iter().enumerate().filter(|(_, id)| !ours.contains(id)).map(|(index, &id)| {
        let order = match own.sharing {
            Sharing::Many if index < we => Order::First,
            Sharing::Many => Order::After,
            Sharing::GivesWay | Sharing::Alone => Order::Alone,
        };
        (None, id, order)
    });
    let mut found: Vec<Ordered> = of_own.collect();
    let is_attached = we < own.ids.len();
    let mut is_shared = false;
    for (index, (_, level)) in above.iter().enumerate().filter(|(_, (_, level))| !level.ids.is_empty()) {
        let order = match level.sharing {
            Sharing::Many => Order::After,
            // Below one that shares it did not run before ours either.
            _ if is_shared => continue,
            Sharing::Alone if !is_attached => Order::Alone,
            Sharing::GivesWay | Sharing::Alone => Order::Displaced,
        };
        is_shared = true;
        found.extend(level.ids.iter().map(|&id| (Some(index), id, order)));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use Sharing::{Alone, GivesWay, Many};

    #[test]
    fn programs_run_by_level_and_then_in_the_order_in_which_they_came() {
        const OURS: u32 = 1;
        let level = |(sharing, ids): (Sharing, &[u32])| Attached { ids: ids.to_vec(), sharing };
        let none = (Alone, &[][..]);
        // Own level, those above, and what is found.
        type Levels<'a> = (Sharing, &'a [u32]);
        let cases: [(Levels<'_>, &[Levels<'_>], &[Ordered]); 9] = [
            (none, &[none], &[]),
            ((Many, &[5, OURS, 6]), &[], &[(None, 5, Order::First), (None, 6, Order::After)]),
            ((Many, &[5]), &[], &[(None, 5, Order::First)]),
            ((GivesWay, &[5]), &[], &[(None, 5, Order::Alone)]),
            ((Many, &[OURS]), &[none, (Many, &[5])], &[(Some(1), 5, Order::After)]),
            (none, &[(Alone, &[5])], &[(Some(0), 5, Order::Alone)]),
            (none, &[(GivesWay, &[5]), (Alone, &[6])], &[(Some(0), 5, Order::Displaced)]),
            (none, &[(Many, &[5]), (Alone, &[6])], &[(Some(0), 5, Order::After)]),
            // One that came to a cgroup above after ours does not run where ours are.
            ((Many, &[OURS]), &[(Alone, &[5])], &[(Some(0), 5, Order::Displaced)]),
        ];
        for (own, above, expected) in cases {
            let levels: Vec<Level> = above.iter().map(|above| (PathBuf::new(), level(*above))).collect();
            assert_eq!(orders(&level(own), &levels, &BTreeSet::from([OURS])), expected, "{own:?} {above:?}");
        }
        assert_eq!([0, 1, 2].map(Sharing::from_flags), [Alone, GivesWay, Many]);
    }
}
