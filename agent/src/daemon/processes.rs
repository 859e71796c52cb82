//! Processes that are steered as a service: each in a cgroup of its own, or in the one that a unit is about to start in.

use super::{Daemon, Error};
use crate::{
    api,
    config::{Scope, check_name},
    fault,
    journal::Artefact,
    redirect::Cgroup,
    removal::{self, COMMANDS},
    workload::{self, Workloads},
};
use std::{collections::BTreeSet, fs, io, path::Path};

impl Daemon {
    /// One process, which is about to become the command.
    pub(super) fn join(&mut self, name: &str, pid: i32) -> Result<api::Joined, Error> {
        self.take_in(name, pid.cast_unsigned(), |dir| fs::write(dir.join("cgroup.procs"), pid.to_string()))
    }

    /// A process that runs, and all that descend from it.
    pub(super) fn adopt(&mut self, name: &str, pid: u32) -> Result<api::Joined, Error> {
        if workload::descendants(pid).is_empty() {
            return Err(Error::NoProcess(pid));
        }
        let mut joined = self.take_in(name, pid, |dir| move_tree(dir, pid))?;
        joined.notes.insert(0, "sockets that are open already stay as they are".to_owned());
        Ok(joined)
    }

    /// Has processes moved to a new cgroup that is steered as a service.
    fn take_in(
        &mut self,
        name: &str,
        pid: u32,
        move_to: impl Fn(&Path) -> io::Result<()>,
    ) -> Result<api::Joined, Error> {
        check_name(name).map_err(Error::BadName)?;
        self.commands += 1;
        let cgroup = format!("{COMMANDS}/{name}-{pid}-{}", self.commands);
        let dir = self.workloads.dir(&cgroup);
        let io = |action| {
            let path = dir.clone();
            move |cause| Error::Io { action, path, cause }
        };
        self.journal.note([Artefact::Cgroup { path: cgroup.clone() }])?;
        fs::create_dir_all(&dir).map_err(io("create cgroup"))?;
        fault::point("command", "cgroup made");
        let mut next = self.state.clone();
        next.add_command(name, cgroup.clone());
        let joined = self.commit(next).and_then(|()| move_to(&dir).map_err(io("move processes into cgroup")));
        fault::point("command", "moved");
        if let Err(error) = joined {
            self.reconcile()?;
            return Err(error);
        }
        Ok(api::Joined { cgroup, notes: self.proxy_notes() })
    }

    pub(super) fn attach(&mut self, name: &str, pid: i32) -> Result<api::Joined, Error> {
        if !self.state.is_enabled(name) {
            return Err(Error::NotEnabled(name.to_owned()));
        }
        let cgroup = self.learn(Workloads::scope(&self.config, name), pid)?;
        self.apply(&self.state.clone())?;
        Ok(api::Joined { cgroup, notes: self.proxy_notes() })
    }

    pub(super) fn attach_proxy(&mut self, pid: i32) -> Result<api::Joined, Error> {
        let cgroup = self.learn(self.config.proxy.scope.clone(), pid)?;
        self.apply(&self.state.clone())?;
        Ok(api::Joined { cgroup, notes: vec![] })
    }

    /// Takes note of where a process that is in a scope is, and says where.
    fn learn(&mut self, scope: Scope, pid: i32) -> Result<String, Error> {
        let cgroup = self.workloads.cgroup_of(pid).map_err(|cause| Error::Io {
            action: "find the cgroup of the process",
            path: format!("/proc/{pid}/cgroup").into(),
            cause,
        })?;
        let path = self.workloads.path_of(&cgroup);
        if let Scope::Unit(unit) = scope {
            self.workloads.learn(unit, path.clone());
        }
        Ok(path)
    }

    /// Removes the cgroups of commands that have ended, or that a daemon was killed before it knew.
    pub(super) fn forget_ended_commands(&mut self) -> Result<(), Error> {
        let ended = self.ended_commands();
        if !ended.is_empty() {
            let mut next = self.state.clone();
            next.remove_commands(&ended);
            self.commit(next)?;
        }
        self.remove_command_cgroups()
    }

    /// Those in which nobody is.
    fn remove_command_cgroups(&mut self) -> Result<(), Error> {
        let running: BTreeSet<&String> = self.state.iter().flat_map(|(_, entry)| &entry.commands).collect();
        let ended = |artefact: &&Artefact| match artefact {
            Artefact::Cgroup { path } => !running.contains(path),
            _ => false,
        };
        let ended: Vec<Artefact> = self.journal.noted().iter().filter(ended).cloned().collect();
        let remove = |artefact: &Artefact| removal::remove(artefact, &self.config).is_ok();
        let removed: BTreeSet<Artefact> = ended.into_iter().filter(remove).collect();
        if !removed.is_empty() {
            fault::point("command", "cgroups removed");
            self.journal.forget(&removed)?;
        }
        Ok(())
    }

    /// Cgroups of commands in which no process is left.
    fn ended_commands(&self) -> BTreeSet<String> {
        let commands = self.state.iter().flat_map(|(_, entry)| entry.commands.iter());
        commands.filter(|path| !is_used(&self.workloads.dir(path))).cloned().collect()
    }
}

/// Until all are there: some may be born while others are moved.
fn move_tree(dir: &Path, pid: u32) -> io::Result<()> {
    const ROUNDS: usize = 100;
    let procs = dir.join("cgroup.procs");
    for _ in 0..ROUNDS {
        let there = fs::read_to_string(&procs)?;
        let there: BTreeSet<u32> = there.lines().filter_map(|line| line.parse().ok()).collect();
        let missing: Vec<u32> =
            workload::descendants(pid).into_iter().filter(|pid| !there.contains(pid)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        for pid in missing {
            match fs::write(&procs, pid.to_string()) {
                // It has ended meanwhile.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                result => result?,
            }
        }
    }
    Err(io::Error::other("its descendants are born faster than they can be moved"))
}

fn is_used(dir: &Path) -> bool {
    Cgroup::open(dir).is_ok_and(|cgroup| cgroup.is_populated())
}
