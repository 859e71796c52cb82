//! The daemon's mind: what it is told, what it keeps, what it makes the kernel do. One thread, no sharing.

mod change;
mod connections;
mod processes;
mod reload;
mod status;

use crate::{
    api,
    config::{self, Config, ConfigError},
    connections::ResetError,
    decisions::{self, Lines, Watchers},
    fault,
    journal::{Artefact, Journal},
    lock, metrics,
    mode::{self, Mode},
    origins, plan, probe,
    redirect::{self, Desired, Ready, Redirect, ebpf},
    removal,
    routable::Routable,
    state::{Entry, State, StateFile},
    watch::{self, NotReady},
    workload::{Unknown, Workloads},
};
use std::{
    collections::BTreeSet,
    io,
    path::PathBuf,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError},
    },
    time::{Duration, Instant},
};
use tokio::sync::{oneshot, watch::Sender};

/// How often the host is compared with what is wanted.
const TICK: Duration = Duration::from_secs(1);

/// What the daemon can be told, and where its answer goes.
#[derive(Debug)]
pub(crate) enum Request {
    Status(Reply<api::Status>),
    Metrics(Reply<metrics::Measured>),
    Enable(api::Change, Reply<api::Changed>),
    Disable(api::Change, Reply<api::Changed>),
    /// Look for open connections, or close them.
    Connections(api::Connections, Reply<api::Found>),
    /// Read the configuration anew.
    Reload(api::Reload, Reply<api::Reloaded>),
    /// Steer a process as a service, in a cgroup of its own.
    Join(String, i32, Reply<api::Joined>),
    /// Steer a process that runs, and its descendants, likewise.
    Adopt(String, u32, Reply<api::Joined>),
    /// Steer the cgroup that a process is in as a service's: the unit is about to start there.
    Attach(String, i32, Reply<api::Joined>),
    /// The same as the proxy's.
    AttachProxy(i32, Reply<api::Joined>),
    /// Tell what is decided, as long as the lines are read.
    Watch(api::Watch, Reply<Lines>),
    /// What the proxy can route, which has changed.
    Routable(Routable),
    /// Whether a proxy is ready, which was the configured one when it was asked.
    Proxy(config::Proxy, Ready),
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
    #[error("look at open connections: {0}")]
    Connections(io::Error),
    #[error("{0}; what was enabled or disabled is so all the same")]
    Reset(#[from] ResetError),
    #[error(
        "open connections cannot be drained or reset with `mode: hosts`: names are steered, and no connection tells by which name its address was found; leave out --existing, and restart the service instead"
    )]
    NamesOnly,
    #[error(
        "{0}: a connection that is closed now would not be steered when it is made anew; start the proxy first, or leave out --existing; nothing was done"
    )]
    NotReady(NotReady),
    #[error("service `{0}` is not enabled; `mesh-redirect enable {0}` does it")]
    NotEnabled(String),
    #[error(
        "decisions can be watched with mode ebpf alone, and this host has mode {0}, where nobody is told of each; `mesh-redirect status` shows what is counted there, the proxy's metrics show what it was sent, and `mesh-redirect check` says why the mode is not ebpf"
    )]
    NotWatchable(Mode),
    #[error("{max} watch already, which is the most; end one of them", max = decisions::MAX_WATCHERS)]
    TooManyWatchers,
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// What a daemon has for its life.
    #[error("{0}")]
    Fixed(String),
    #[error("{0}; it is enabled: correct the file, or `mesh-redirect disable` it first")]
    Lost(Unknown),
    #[error("the configuration was not taken over: {cause}; {}", held(.back))]
    NotReloaded {
        cause: Box<Error>,
        /// Why what held before does not hold again yet.
        back: Option<Box<Error>>,
    },
    #[error(transparent)]
    Plan(#[from] plan::PlanError),
    #[error(transparent)]
    Mode(#[from] mode::Impossible),
    #[error(transparent)]
    Redirect(#[from] redirect::Error),
    #[error(transparent)]
    State(#[from] crate::state::StateError),
    #[error(transparent)]
    Journal(#[from] crate::journal::JournalError),
    #[error("remove {artefact}, which steered before: {cause}")]
    Former { artefact: Artefact, cause: Box<removal::Error> },
    #[error(transparent)]
    Lock(#[from] lock::LockError),
    #[error("{action} {path}: {cause}", path = .path.display())]
    Io { action: &'static str, path: PathBuf, cause: io::Error },
}

fn held(back: &Option<Box<Error>>) -> String {
    match back {
        None => "nothing has changed".to_owned(),
        Some(error) => format!("going back failed too, and is tried again every second: {error}"),
    }
}

impl Error {
    /// Programs of others' because of which it was not done, as the kernel calls them.
    pub(crate) fn programs(&self) -> Vec<u32> {
        match self {
            Self::Redirect(redirect::Error::Ebpf(ebpf::Error::Held { by, .. })) => vec![by.id],
            _ => vec![],
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Daemon {
    config: Config,
    /// Where the configuration was read, when it is not the default file: drop-ins repeat it.
    config_file: Option<PathBuf>,
    state: State,
    file: StateFile,
    journal: Journal,
    /// What the mode makes.
    steering: Artefact,
    workloads: Workloads,
    compiled: plan::Compiled,
    mode: Mode,
    redirect: Redirect,
    /// What the proxy can route, where it could not be followed yet.
    pending: Option<Routable>,
    /// What was last heard of the proxy.
    proxy_ready: Ready,
    /// Why the host could not be brought in line when that was last tried.
    failure: Option<String>,
    /// Whether somebody else has changed what is on disk or in the kernel.
    has_drifted: bool,
    /// Where it is published what is enabled.
    origins: Sender<origins::Snapshot>,
    /// And which proxy is to be watched, and for what.
    watched: Sender<watch::Target>,
    /// Who watches decisions.
    watchers: Arc<Watchers>,
    commands: u64,
    tally: metrics::Tally,
}

impl Daemon {
    /// Takes over what is enabled, and what the kernel holds of it.
    pub(crate) fn start(
        config: Config,
        config_file: Option<PathBuf>,
        mut journal: Journal,
        workloads: Workloads,
        origins: Sender<origins::Snapshot>,
        watched: Sender<watch::Target>,
        watchers: Arc<Watchers>,
    ) -> Result<Self, Error> {
        let file = StateFile::new(&config.paths.state);
        let mut state = file.load()?;
        let mode::Choice { mode, reason } = mode::choose(config.mode, &probe::facts_of_wanted(&config))?;
        tracing::info!(%mode, "{reason}");
        let artefact = |mode| {
            let named = Artefact::of(mode, &config.paths);
            named.map_err(|cause| Error::Io { action: "read", path: "/proc/self/ns/net".into(), cause })
        };
        // A daemon that was killed at this may have left both; and one of a version without a journal its own.
        journal.note(state.mode().map(artefact).transpose()?)?;
        let steering = artefact(mode)?;
        let compiled = plan::Compiled::kept(&config);
        state.set_mode(mode);
        file.save(&state)?;
        let mut daemon = Self {
            state,
            mode,
            redirect: Redirect::new(mode, &config, workloads.cgroup_root()),
            pending: None,
            proxy_ready: Ready::default(),
            failure: None,
            has_drifted: false,
            origins,
            watched,
            watchers,
            config,
            config_file,
            file,
            journal,
            steering,
            workloads,
            compiled,
            commands: 0,
            tally: metrics::Tally::default(),
        };
        daemon.find_containers()?;
        daemon.reconcile()?;
        fault::point("daemon", "in step, but for what another mode left");
        daemon.remove_former()?;
        daemon.align_steps();
        if mode == Mode::Ebpf {
            // The directory of the pins is there from now on: what is confined cannot make it.
            daemon.journal.note([daemon.steering.clone()])?;
        }
        Ok(daemon)
    }

    /// What steered before, in another mode or at other paths, goes when its successor is in place; both at once only steer
    /// what is steered already.
    fn remove_former(&mut self) -> Result<(), Error> {
        let is_former = |artefact: &&Artefact| artefact.mode().is_some() && **artefact != self.steering;
        let former: BTreeSet<Artefact> = self.journal.noted().iter().filter(is_former).cloned().collect();
        for artefact in &former {
            match removal::remove(artefact, &self.config) {
                // It steers nobody here.
                Err(cause @ removal::Error::Elsewhere { .. }) => tracing::warn!("{artefact} stays: {cause}"),
                Err(cause) => {
                    return Err(Error::Former { artefact: artefact.clone(), cause: Box::new(cause) });
                }
                Ok(_) => self.journal.forget(&BTreeSet::from([artefact.clone()]))?,
            }
        }
        Ok(())
    }

    /// How it steers.
    pub(crate) fn mode(&self) -> Mode {
        self.mode
    }

    /// Does as it is told until it is told to stop, and compares the host with what is wanted in between.
    pub(crate) fn run(mut self, requests: &Receiver<Request>) {
        let tally = self.tally.clone();
        let answer = Answer(&tally);
        let mut next_look = Instant::now() + TICK;
        loop {
            match requests.recv_timeout(next_look.saturating_duration_since(Instant::now())) {
                Ok(Request::Status(reply)) => answer.give(reply, self.status()),
                Ok(Request::Metrics(reply)) => answer.give(reply, self.measure()),
                Ok(Request::Enable(change, reply)) => answer.give(reply, self.enable(&change)),
                Ok(Request::Disable(change, reply)) => answer.give(reply, self.disable(&change)),
                Ok(Request::Connections(asked, reply)) => answer.give(reply, self.connections(&asked)),
                Ok(Request::Reload(reload, reply)) => answer.give(reply, self.reload(reload)),
                Ok(Request::Join(name, pid, reply)) => answer.give(reply, self.join(&name, pid)),
                Ok(Request::Adopt(name, pid, reply)) => answer.give(reply, self.adopt(&name, pid)),
                Ok(Request::Attach(name, pid, reply)) => answer.give(reply, self.attach(&name, pid)),
                Ok(Request::Watch(watch, reply)) => answer.give(reply, self.watch(watch)),
                Ok(Request::Routable(routable)) => self.hear_of_routable(routable),
                Ok(Request::AttachProxy(pid, reply)) => answer.give(reply, self.attach_proxy(pid)),
                // What was said of another one than is configured now says nothing any more.
                Ok(Request::Proxy(proxy, ready)) if proxy == self.config.proxy => self.hear_of_proxy(ready),
                Ok(Request::Proxy(..)) => {}
                Ok(Request::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {}
            }
            // However many requests come, the host is looked at; and at once where a request has found it changed.
            if Instant::now() >= next_look || self.has_drifted {
                next_look = Instant::now() + TICK;
                let result = self.reconcile();
                match &result {
                    Ok(differed) => tally.looked(*differed),
                    Err(error) => {
                        tally.failed(error.kind());
                        if self.failure.is_none() {
                            tracing::error!("{error}; tried again every second");
                        }
                    }
                }
                self.failure = result.err().map(|error| error.to_string());
            }
        }
    }

    /// Brings kernel and host in line with what is wanted. True where they were not.
    fn reconcile(&mut self) -> Result<bool, Error> {
        if let Some(pending) = self.pending.take() {
            self.hear_of_routable(pending);
        }
        self.forget_ended_commands()?;
        let differed = self.apply(&self.state.clone())? || self.has_drifted;
        if self.has_drifted {
            self.align_files()?;
            self.has_drifted = false;
            self.ask_proxy();
        }
        Ok(differed)
    }

    fn hear_of_proxy(&mut self, ready: Ready) {
        if ready != self.proxy_ready {
            tracing::info!(
                ipv4 = ready.proxy[0],
                ipv6 = ready.proxy[1],
                dns = ready.dns.contains(&true),
                "is the proxy ready?"
            );
        }
        self.proxy_ready = ready;
        if let Err(error) = self.redirect.keep_alive(ready) {
            tracing::warn!("{error}");
        }
    }

    /// What cannot be had leaves what holds as it is, until the proxy can route something else; what only failed is tried
    /// again. It is kept when it holds: whoever starts from it must be able to.
    fn hear_of_routable(&mut self, routable: Routable) {
        let before = std::mem::replace(&mut self.compiled, plan::Compiled::new(Arc::new(routable.clone())));
        self.pending = None;
        if let Err(error) = self.apply(&self.state.clone()) {
            tracing::error!("what the proxy can route has changed, and is not followed: {error}");
            self.compiled = before;
            let is_impossible =
                matches!(error, Error::Plan(plan::PlanError::Policy { .. }) | Error::Redirect(_));
            self.pending = (!is_impossible).then_some(routable);
            return;
        }
        self.keep_routable();
    }

    /// Whoever starts after this process knows it while the proxy is away.
    fn keep_routable(&self) {
        if let Err(error) = self.compiled.routable().save(&self.config.paths.state) {
            tracing::warn!("keep what the proxy can route: {error}");
        }
    }

    fn measure(&mut self) -> Result<metrics::Measured, Error> {
        let status = self.status()?;
        let ready = match self.mode {
            // There the kernel sees for itself, and nobody else asks.
            Mode::Ebpf => watch::is_ready(&self.config.proxy, &mut self.workloads),
            Mode::Nftables | Mode::Hosts => self.proxy_ready,
        };
        let (watchers, dropped) = self.watchers.count();
        Ok(metrics::Measured { status, ready, watchers, dropped, tally: self.tally.clone() })
    }

    /// Makes another state the one that holds: on disk first, so that a crash leaves more wanted than done, never
    /// the reverse; back again where the kernel refuses.
    fn commit(&mut self, next: State) -> Result<(), Error> {
        self.file.save(&next)?;
        fault::point("daemon", "more is wanted than done");
        if let Err(error) = self.apply(&next) {
            self.file.save(&self.state)?;
            if let Err(second) = self.apply(&self.state.clone()) {
                tracing::error!("going back after a failure failed too: {second}");
            }
            return Err(error);
        }
        self.state = next;
        self.ask_proxy();
        Ok(())
    }

    /// What is steered now shall not wait for the next time that the proxy is asked.
    fn ask_proxy(&mut self) {
        if self.mode != Mode::Ebpf {
            let ready = watch::is_ready(&self.config.proxy, &mut self.workloads);
            self.hear_of_proxy(ready);
        }
    }

    /// Makes kernel and host agree with a state. True where something was changed.
    fn apply(&mut self, state: &State) -> Result<bool, Error> {
        let began = Instant::now();
        let outcome = self.bring_about(state);
        self.tally.applied(&outcome, began.elapsed());
        outcome
    }

    /// What is desired is looked up under the lock, and anew where a service is attached to a cgroup that it is not known
    /// to be in: a unit that has just attached itself would else be taken for one that is where it was before, or nowhere.
    /// Whose a connection is shall be known before the first one is steered.
    fn bring_about(&mut self, state: &State) -> Result<bool, Error> {
        let held = lock::kernel(&self.config.paths.run)?;
        let desired = self.desired(state, &held)?;
        self.publish(origins::Snapshot::from(&desired));
        if self.watchers.are_any() {
            self.watchers.publish(self.explanations(state));
        }
        if !desired.services.is_empty() {
            self.journal.note([self.steering.clone()])?;
        }
        let changed = self.redirect.apply(&desired)?;
        if desired.services.is_empty() && self.journal.noted().contains(&self.steering) {
            self.forget_steering()?;
        }
        Ok(changed)
    }

    /// What has to stay for connections that live on is forgotten when they have ended.
    fn forget_steering(&mut self) -> Result<(), Error> {
        if !self.redirect.is_there()? {
            self.journal.forget(&BTreeSet::from([self.steering.clone()]))?;
        }
        Ok(())
    }

    fn desired(&mut self, state: &State, _held: &lock::Lock) -> Result<Desired, Error> {
        let desired = plan::everything(&self.config, state, &mut self.workloads, &mut self.compiled)?;
        if !self.redirect.is_attached_elsewhere(&desired)? {
            return Ok(desired);
        }
        self.workloads.forget_units();
        Ok(plan::everything(&self.config, state, &mut self.workloads, &mut self.compiled)?)
    }

    fn publish(&self, snapshot: origins::Snapshot) {
        self.origins.send_if_modified(|published| {
            let is_new = *published != snapshot;
            *published = snapshot;
            is_new
        });
    }

    /// Lets somebody watch decisions on services, which have to be enabled or have commands that run as they.
    fn watch(&mut self, watch: api::Watch) -> Result<Lines, Error> {
        if self.mode != Mode::Ebpf {
            return Err(Error::NotWatchable(self.mode));
        }
        let absent: Vec<String> =
            watch.services.iter().filter(|name| self.state.get(name).is_none()).cloned().collect();
        self.workloads.resolve(&self.config, &absent)?;
        if let Some(name) = absent.into_iter().next() {
            return Err(Error::NotEnabled(name));
        }
        self.watchers.publish(self.explanations(&self.state));
        self.watchers.join(watch).ok_or(Error::TooManyWatchers)
    }

    /// What decisions are explained by.
    fn explanations(&self, state: &State) -> decisions::Snapshot {
        let service = |(name, entry): (&str, &Entry)| {
            (entry.id, decisions::Service { name: name.to_owned(), policy: self.config.policy(name).clone() })
        };
        decisions::Snapshot {
            services: state.iter().map(service).collect(),
            routable: Arc::clone(self.compiled.routable()),
            file: self.config.file.clone(),
        }
    }

    fn proxy_notes(&mut self) -> Vec<String> {
        let scope = &self.config.proxy.scope;
        let absent = self.workloads.cgroup(scope).is_none();
        let note = || format!("no proxy is there ({scope} does not run): nothing is steered until it is");
        absent.then(note).into_iter().collect()
    }
}

/// Answers those who asked, and counts what could not be done.
struct Answer<'d>(&'d metrics::Tally);

impl Answer<'_> {
    fn give<T>(&self, reply: Reply<T>, result: Result<T, Error>) {
        if let Err(error) = &result {
            tracing::warn!("{error}");
            self.0.failed(error.kind());
        }
        let _the_caller_may_be_gone = reply.send(result);
    }
}

impl Error {
    /// One word, for counting.
    fn kind(&self) -> &'static str {
        match self {
            Self::Plan(_) => "policy",
            Self::Mode(_) => "mode",
            Self::Redirect(_) => "redirect",
            Self::State(_) => "state",
            Self::Lock(_) => "lock",
            Self::DropIn { .. } | Self::Hook { .. } => "hook",
            Self::Io { .. } => "io",
            // What was asked for makes no sense here.
            _ => "request",
        }
    }
}
