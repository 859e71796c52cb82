//! The daemon's mind: what it is told, what it keeps, what it makes the kernel do. One thread, no sharing.

use crate::{
    api,
    config::{Config, Failure, Scope, check_name},
    lock,
    mode::{self, Mode},
    origins, plan, probe,
    redirect::{self, Cgroup, Redirect},
    routable::Routable,
    state::{Container, State, StateFile},
    watch,
    workload::{
        self, Unknown, Workloads,
        hooks_dir::Hook,
        started,
        systemd::{self, DropIn},
    },
};
use globset::Glob;
use similar::{ChangeTag, TextDiff};
use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, RecvTimeoutError},
    time::{Duration, Instant},
};
use tokio::sync::{oneshot, watch::Sender};

/// How often the host is compared with what is wanted.
const TICK: Duration = Duration::from_secs(1);
/// Cgroups of commands are made below this one.
const COMMANDS: &str = "/mesh-redirect";

/// What the daemon can be told, and where its answer goes.
#[derive(Debug)]
pub(crate) enum Request {
    Status(Reply<api::Status>),
    Enable(api::Change, Reply<api::Changed>),
    Disable(api::Change, Reply<api::Changed>),
    /// Steer a process as a service, in a cgroup of its own.
    Join(String, i32, Reply<api::Joined>),
    /// Steer a process that runs, and its descendants, likewise.
    Adopt(String, u32, Reply<api::Joined>),
    /// Steer the cgroup that a process is in as a service's: the unit is about to start there.
    Attach(String, i32, Reply<api::Joined>),
    /// The same as the proxy's.
    AttachProxy(i32, Reply<api::Joined>),
    /// What the proxy can route, which has changed.
    Routable(Routable),
    /// Whether the proxy is ready for IPv4 and for IPv6.
    Proxy([bool; 2]),
    Stop,
}

/// Where an answer goes.
pub(crate) type Reply<T> = oneshot::Sender<Result<T, Error>>;

/// Why the daemon could not do as it was told. Nothing was changed then.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Unknown(#[from] Unknown),
    #[error("{0}")]
    BadName(String),
    #[error(
        "no service matches `{pattern}`; patterns are for services of the configuration, and with --all-matching for systemd units"
    )]
    NoMatch { pattern: String },
    #[error("there is no process {0}")]
    NoProcess(u32),
    #[error("{0}")]
    BadPattern(String),
    #[error("{action} the step before units' starts: {cause}")]
    DropIn { action: &'static str, cause: io::Error },
    #[error("{action} the hook at containers' starts: {cause}")]
    Hook { action: &'static str, cause: io::Error },
    #[error("service `{0}` is not enabled; `mesh-redirect enable {0}` does it")]
    NotEnabled(String),
    #[error(transparent)]
    Plan(#[from] plan::PlanError),
    #[error(transparent)]
    Mode(#[from] mode::Impossible),
    #[error(transparent)]
    Redirect(#[from] redirect::Error),
    #[error(transparent)]
    State(#[from] crate::state::StateError),
    #[error(transparent)]
    Lock(#[from] lock::LockError),
    #[error("{action} {path}: {cause}", path = .path.display())]
    Io { action: &'static str, path: PathBuf, cause: io::Error },
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Daemon {
    config: Config,
    /// Where the configuration was read, when it is not the default file: drop-ins repeat it.
    config_file: Option<PathBuf>,
    state: State,
    file: StateFile,
    workloads: Workloads,
    compiled: plan::Compiled,
    mode: Mode,
    redirect: Redirect,
    /// What was last heard of the proxy.
    proxy_ready: [bool; 2],
    /// Where it is published what is enabled.
    origins: Sender<origins::Snapshot>,
    commands: u64,
}

impl Daemon {
    /// Takes over what is enabled, and what the kernel holds of it.
    pub(crate) fn start(
        config: Config,
        config_file: Option<PathBuf>,
        workloads: Workloads,
        origins: Sender<origins::Snapshot>,
    ) -> Result<Self, Error> {
        let file = StateFile::new(&config.paths.state);
        let mut state = file.load()?;
        let mode::Choice { mode, reason } = mode::choose(config.mode, &probe::facts(&config))?;
        tracing::info!(%mode, "{reason}");
        let redirect = |mode| Redirect::new(mode, &config, workloads.cgroup_root());
        let former = state.mode().filter(|former| *former != mode).map(redirect);
        let compiled = plan::Compiled::new(Routable::load(&config.paths.state));
        state.set_mode(mode);
        file.save(&state)?;
        let mut daemon = Self {
            state,
            mode,
            redirect: redirect(mode),
            proxy_ready: [false; 2],
            origins,
            config,
            config_file,
            file,
            workloads,
            compiled,
            commands: 0,
        };
        daemon.find_containers()?;
        daemon.reconcile()?;
        // What steered before goes when its successor is in place; both at once only steer what is steered already.
        former.map_or(Ok(()), |mut former| former.remove())?;
        Ok(daemon)
    }

    /// How it steers.
    pub(crate) fn mode(&self) -> Mode {
        self.mode
    }

    /// Does as it is told until it is told to stop, and compares the host with what is wanted in between.
    pub(crate) fn run(mut self, requests: &Receiver<Request>) {
        let mut healthy = true;
        let mut next_look = Instant::now() + TICK;
        loop {
            match requests.recv_timeout(next_look.saturating_duration_since(Instant::now())) {
                Ok(Request::Status(reply)) => answer(reply, self.status()),
                Ok(Request::Enable(change, reply)) => answer(reply, self.enable(&change)),
                Ok(Request::Disable(change, reply)) => answer(reply, self.disable(&change)),
                Ok(Request::Join(name, pid, reply)) => answer(reply, self.join(&name, pid)),
                Ok(Request::Adopt(name, pid, reply)) => answer(reply, self.adopt(&name, pid)),
                Ok(Request::Attach(name, pid, reply)) => answer(reply, self.attach(&name, pid)),
                Ok(Request::Routable(routable)) => self.hear_of_routable(routable),
                Ok(Request::AttachProxy(pid, reply)) => answer(reply, self.attach_proxy(pid)),
                Ok(Request::Proxy(ready)) => self.hear_of_proxy(ready),
                Ok(Request::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {}
            }
            // However many requests come, the host is looked at.
            if Instant::now() >= next_look {
                next_look = Instant::now() + TICK;
                let result = self.reconcile();
                if let (Err(error), true) = (&result, healthy) {
                    tracing::error!("{error}; tried again every second");
                }
                healthy = result.is_ok();
            }
        }
    }

    /// Brings kernel and host in line with what is wanted.
    fn reconcile(&mut self) -> Result<(), Error> {
        let ended = self.ended_commands();
        if !ended.is_empty() {
            let mut next = self.state.clone();
            next.remove_commands(&ended);
            self.commit(next)?;
            for path in ended {
                let _already_gone = fs::remove_dir(self.workloads.dir(&path));
            }
            let _still_used = fs::remove_dir(self.workloads.dir(COMMANDS));
        }
        self.apply(&self.state.clone())
    }

    fn enable(&mut self, change: &api::Change) -> Result<api::Changed, Error> {
        let mut known: Vec<String> = self.config.services.keys().cloned().collect();
        if change.all_matching {
            known.extend(workload::unit_services());
        }
        let names = expand(&change.services, &known)?;
        let scopes = self.workloads.resolve(&self.config, &names)?;
        let mut next = self.state.clone();
        let services = names.iter().map(|service| api::ChangedService {
            service: service.clone(),
            changed: next.enable(service, change.observe),
        });
        let services = services.collect();
        for (name, scope) in names.iter().zip(&scopes) {
            next.set_container(name, self.container(name, scope));
        }
        if change.dry_run {
            return Ok(api::Changed { services, notes: vec![], difference: Some(self.difference(&next)?) });
        }
        self.commit(next)?;
        let drop_ins: Vec<DropIn> =
            names.iter().zip(&scopes).filter_map(|(name, scope)| self.drop_in(name, scope)).collect();
        systemd::write_drop_ins(&drop_ins, self.config_file.as_deref()).map_err(drop_in_error("write"))?;
        let mut notes = self.proxy_notes();
        notes.extend(self.mode_notes());
        notes.extend(self.dns_notes(&names));
        let registered = self.register_hook();
        notes.extend(self.hook_notes(&scopes, registered.err()));
        let cgroups = scopes.iter().map(|scope| self.workloads.cgroup(scope));
        let absent: Vec<bool> = cgroups.map(|cgroup| cgroup.is_none()).collect();
        for (name, _) in names.iter().zip(absent).filter(|(_, absent)| *absent) {
            notes.push(format!("{name} does not run now; it will be steered from its first connection"));
        }
        Ok(api::Changed { services, notes, difference: None })
    }

    fn disable(&mut self, change: &api::Change) -> Result<api::Changed, Error> {
        let enabled: Vec<String> = self.state.iter().map(|(name, _)| name.to_owned()).collect();
        let names = expand(&change.services, &enabled)?;
        let mut next = self.state.clone();
        let services = names
            .iter()
            .map(|service| api::ChangedService { service: service.clone(), changed: next.disable(service) });
        let services = services.collect();
        if change.dry_run {
            return Ok(api::Changed { services, notes: vec![], difference: Some(self.difference(&next)?) });
        }
        self.commit(next)?;
        let scopes: Vec<Scope> = names.iter().map(|name| Workloads::scope(&self.config, name)).collect();
        let units = scopes.iter().filter_map(Scope::unit);
        systemd::remove_drop_ins(units).map_err(drop_in_error("remove"))?;
        self.register_hook().map_err(hook_error("remove"))?;
        names.iter().for_each(|name| started::forget(&self.config.paths.run, name));
        Ok(api::Changed { services, notes: vec![], difference: None })
    }

    /// What another state would add and remove, line by line.
    fn difference(&mut self, next: &State) -> Result<String, Error> {
        let before = self.described(&self.state.clone())?;
        let after = self.described(next)?;
        let difference = TextDiff::from_lines(&before, &after);
        let changes = difference.iter_all_changes().filter(|change| change.tag() != ChangeTag::Equal);
        Ok(changes.map(|change| format!("{}{}", change.tag(), change.value())).collect())
    }

    /// Everything that a state makes of kernel and host.
    fn described(&mut self, state: &State) -> Result<String, Error> {
        let desired = plan::everything(&self.config, state, &mut self.workloads, &mut self.compiled)?;
        let mut text = self.redirect.describe(&desired);
        for (name, _) in state.iter().filter(|(_, entry)| entry.enabled) {
            let Some(drop_in) = self.drop_in(name, &Workloads::scope(&self.config, name)) else { continue };
            let file = drop_in.file(self.config_file.as_deref()).map_err(drop_in_error("describe"))?;
            text += &format!("file {}\n", file.0.display());
            text.extend(file.1.lines().map(|line| format!("\t{line}\n")));
        }
        if state.containers().next().is_some() && self.hook().is_of_use() {
            let (path, content) = self.hook().file().map_err(hook_error("describe"))?;
            text += &format!("file {}\n", path.display());
            text.extend(content.lines().map(|line| format!("\t{line}\n")));
        }
        Ok(text)
    }

    fn hook(&self) -> Hook<'_> {
        Hook { dir: &self.config.paths.hooks, config: self.config_file.as_deref() }
    }

    /// The hook is there while a container is enabled.
    fn register_hook(&self) -> io::Result<()> {
        let hook = self.hook();
        match self.state.containers().next() {
            None => hook.remove(),
            Some(_) if hook.is_of_use() => hook.write(),
            Some(_) => Ok(()),
        }
    }

    /// What the hook has to know of a service.
    fn container(&mut self, service: &str, scope: &Scope) -> Option<Container> {
        let Scope::Container(name) = scope else { return None };
        let required = self.config.policy(service).failure == Failure::Closed;
        Some(Container { name: name.clone(), id: self.workloads.container_id(name), required })
    }

    /// The configuration may have changed since services were enabled.
    fn find_containers(&mut self) -> Result<(), Error> {
        let mut next = self.state.clone();
        for (name, _) in self.state.clone().iter().filter(|(_, entry)| entry.enabled) {
            let container = self.container(name, &Workloads::scope(&self.config, name));
            next.set_container(name, container);
        }
        self.file.save(&next)?;
        self.state = next;
        Ok(())
    }

    fn drop_in(&self, service: &str, scope: &Scope) -> Option<DropIn> {
        let required = self.config.policy(service).failure == Failure::Closed;
        // Slices and scopes have no step before their start.
        let unit = scope.unit().filter(|unit| unit.ends_with(".service"))?;
        Some(DropIn { unit: unit.to_owned(), service: service.to_owned(), required })
    }

    /// One process, which is about to become the command.
    fn join(&mut self, name: &str, pid: i32) -> Result<api::Joined, Error> {
        self.take_in(name, pid.cast_unsigned(), |dir| fs::write(dir.join("cgroup.procs"), pid.to_string()))
    }

    /// A process that runs, and all that descend from it.
    fn adopt(&mut self, name: &str, pid: u32) -> Result<api::Joined, Error> {
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
        fs::create_dir_all(&dir).map_err(io("create cgroup"))?;
        let mut next = self.state.clone();
        next.add_command(name, cgroup.clone());
        let joined = self.commit(next).and_then(|()| move_to(&dir).map_err(io("move processes into cgroup")));
        if let Err(error) = joined {
            self.reconcile()?;
            return Err(error);
        }
        Ok(api::Joined { cgroup, notes: self.proxy_notes() })
    }

    fn attach(&mut self, name: &str, pid: i32) -> Result<api::Joined, Error> {
        if !self.state.is_enabled(name) {
            return Err(Error::NotEnabled(name.to_owned()));
        }
        let cgroup = self.learn(Workloads::scope(&self.config, name), pid)?;
        self.apply(&self.state.clone())?;
        Ok(api::Joined { cgroup, notes: self.proxy_notes() })
    }

    fn attach_proxy(&mut self, pid: i32) -> Result<api::Joined, Error> {
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

    fn hear_of_proxy(&mut self, ready: [bool; 2]) {
        if ready != self.proxy_ready {
            tracing::info!(ipv4 = ready[0], ipv6 = ready[1], "is the proxy ready?");
        }
        self.proxy_ready = ready;
        if let Err(error) = self.redirect.keep_alive(ready) {
            tracing::warn!("{error}");
        }
    }

    /// What cannot be had leaves what holds as it is, until the proxy can route something else.
    fn hear_of_routable(&mut self, routable: Routable) {
        let saved = routable.save(&self.config.paths.state);
        let before = std::mem::replace(&mut self.compiled, plan::Compiled::new(routable));
        if let Err(error) = self.apply(&self.state.clone()) {
            tracing::error!("what the proxy can route has changed, and is not followed: {error}");
            self.compiled = before;
        }
        if let Err(error) = saved {
            tracing::warn!("keep what the proxy can route: {error}");
        }
    }

    fn status(&mut self) -> Result<api::Status, Error> {
        let desired = plan::everything(&self.config, &self.state, &mut self.workloads, &mut self.compiled)?;
        let kernel = self.redirect.status(&desired)?;
        let proxy = api::Proxy {
            port: self.config.proxy.port,
            cgroup: desired.proxy.as_ref().map(|cgroup| self.workloads.path_of(cgroup)),
            attached: desired.proxy.as_ref().is_some_and(|cgroup| kernel.proxies.contains(&cgroup.id)),
        };
        let services = desired.services.iter().zip(self.state.iter()).map(|(service, (name, entry))| {
            let known = kernel.services.iter().find(|known| known.id == service.id);
            let scope = |cgroup: &Cgroup| api::Scope {
                cgroup: self.workloads.path_of(cgroup),
                attached: known.is_some_and(|known| known.cgroups.contains(&cgroup.id)),
            };
            api::Service {
                name: name.to_owned(),
                enabled: entry.enabled,
                observe: entry.observe,
                since: entry.since,
                failure: service.failure.to_string(),
                scopes: service.scopes.iter().map(scope).collect(),
                counters: known.map(|known| known.counters.into()).unwrap_or_default(),
            }
        });
        Ok(api::Status { version: api::STATUS_VERSION, mode: self.mode, proxy, services: services.collect() })
    }

    /// Makes another state the one that holds: on disk first, so that a crash leaves more wanted than done, never
    /// the reverse; back again where the kernel refuses.
    fn commit(&mut self, next: State) -> Result<(), Error> {
        self.file.save(&next)?;
        if let Err(error) = self.apply(&next) {
            self.file.save(&self.state)?;
            if let Err(second) = self.apply(&self.state.clone()) {
                tracing::error!("going back after a failure failed too: {second}");
            }
            return Err(error);
        }
        self.state = next;
        if self.mode != Mode::Ebpf {
            // What is enabled now shall not wait for the next time that the proxy is asked.
            let ready = watch::is_ready(&self.config.proxy, &mut self.workloads);
            self.hear_of_proxy(ready);
        }
        Ok(())
    }

    /// What is desired is looked up under the lock, and anew where a service is attached to a cgroup that it is not known
    /// to be in: a unit that has just attached itself would else be taken for one that is where it was before, or nowhere.
    /// Whose a connection is shall be known before the first one is steered.
    fn apply(&mut self, state: &State) -> Result<(), Error> {
        let _held = lock::kernel(&self.config.paths.run)?;
        let mut desired = plan::everything(&self.config, state, &mut self.workloads, &mut self.compiled)?;
        if self.redirect.is_attached_elsewhere(&desired)? {
            self.workloads.forget_units();
            desired = plan::everything(&self.config, state, &mut self.workloads, &mut self.compiled)?;
        }
        self.publish(origins::Snapshot::from(&desired));
        Ok(self.redirect.apply(&desired)?)
    }

    fn publish(&self, snapshot: origins::Snapshot) {
        self.origins.send_if_modified(|published| {
            let is_new = *published != snapshot;
            *published = snapshot;
            is_new
        });
    }

    /// Cgroups of commands in which no process is left.
    fn ended_commands(&self) -> BTreeSet<String> {
        let commands = self.state.iter().flat_map(|(_, entry)| entry.commands.iter());
        commands.filter(|path| !is_used(&self.workloads.dir(path))).cloned().collect()
    }

    /// What has to be said of the mode when something is enabled.
    fn mode_notes(&self) -> Option<String> {
        let note = "names are mapped for the whole host: every process that looks them up is steered, whatever its service";
        (self.mode == Mode::Hosts).then(|| note.to_owned())
    }

    /// What has to be said of containers whose start is not waited for. They are steered all the same, if later.
    fn hook_notes(&self, scopes: &[Scope], refused: Option<io::Error>) -> Option<String> {
        let reason = match refused {
            Some(error) => format!("write to {}: {error}", self.config.paths.hooks.display()),
            None if self.hook().is_of_use() => return None,
            None => "no podman or CRI-O is here to run it".to_owned(),
        };
        let note = format!(
            "no hook was registered ({reason}): unless a runtime was told to run it, a container that is started is found within a second"
        );
        scopes.iter().any(|scope| matches!(scope, Scope::Container(_))).then_some(note)
    }

    /// Where queries that shall be captured will not be.
    fn dns_notes(&self, names: &[String]) -> Option<String> {
        let captures_dns = names.iter().any(|name| self.config.policy(name).dns);
        let resolver = probe::resolver_on_localhost().filter(|_| captures_dns && self.mode != Mode::Hosts)?;
        Some(format!(
            "this host's resolver is {resolver}: queries to it are not captured, and those it sends on are its own"
        ))
    }

    fn proxy_notes(&mut self) -> Vec<String> {
        let scope = &self.config.proxy.scope;
        let absent = self.workloads.cgroup(scope).is_none();
        let note = || format!("no proxy is there ({scope} does not run): nothing is steered until it is");
        absent.then(note).into_iter().collect()
    }
}

fn answer<T>(reply: Reply<T>, result: Result<T, Error>) {
    if let Err(error) = &result {
        tracing::warn!("{error}");
    }
    let _the_caller_may_be_gone = reply.send(result);
}

fn drop_in_error(action: &'static str) -> impl Fn(io::Error) -> Error {
    move |cause| Error::DropIn { action, cause }
}

fn hook_error(action: &'static str) -> impl Fn(io::Error) -> Error {
    move |cause| Error::Hook { action, cause }
}

/// Names as they are, and patterns as the known names that they match.
fn expand(asked: &[String], known: &[String]) -> Result<Vec<String>, Error> {
    let mut names: Vec<String> = Vec::new();
    if asked.is_empty() {
        return Err(Error::BadName("no service is named".to_owned()));
    }
    for asked in asked {
        if !asked.contains(['*', '?', '[', '{']) {
            check_name(asked).map_err(Error::BadName)?;
            names.push(asked.clone());
            continue;
        }
        let pattern =
            Glob::new(asked).map_err(|error| Error::BadPattern(error.to_string()))?.compile_matcher();
        let before = names.len();
        names.extend(known.iter().filter(|name| pattern.is_match(name)).cloned());
        if names.len() == before {
            return Err(Error::NoMatch { pattern: asked.clone() });
        }
    }
    // In the order in which they were asked for, each once.
    let mut seen = BTreeSet::new();
    names.retain(|name| seen.insert(name.clone()));
    Ok(names)
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

impl From<agent_ebpf::Counters> for api::Counters {
    fn from(counters: agent_ebpf::Counters) -> Self {
        let agent_ebpf::Counters {
            steered,
            passed_by_rule,
            passed_proxy_absent,
            refused,
            errors,
            observed,
            queries,
        } = counters;
        Self { steered, passed_by_rule, passed_proxy_absent, refused, errors, observed, queries }
    }
}
