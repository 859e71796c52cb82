//! Reading the configuration anew: all of it takes effect, or nothing changes.

use super::{Daemon, Error, change::difference};
use crate::{
    api,
    config::{self, Config},
    fault,
    plan::Compiled,
    state::State,
    watch,
    workload::{Workloads, started},
};
use sd_notify::NotifyState;
use std::{io, mem, sync::Arc};

/// Lines of a difference that are logged.
const LOGGED: usize = 100;

/// What depends on the configuration.
struct Setup {
    config: Config,
    compiled: Compiled,
    state: State,
}

impl Daemon {
    /// Reads the file that this process was started with.
    pub(super) fn reload(&mut self, api::Reload { dry_run }: api::Reload) -> Result<api::Reloaded, Error> {
        if dry_run {
            return self.try_reload(true);
        }
        // A service manager waits until it is told that this is over, however it ends.
        notify_reloading();
        let reloaded = self.try_reload(false);
        let _no_manager = sd_notify::notify(&[NotifyState::Ready]);
        if let Ok(api::Reloaded { difference, .. }) = &reloaded {
            log(difference);
        }
        reloaded
    }

    fn try_reload(&mut self, dry_run: bool) -> Result<api::Reloaded, Error> {
        let config = Config::load(self.config_file.as_deref())?;
        refuse_what_is_fixed(&self.config, &config)?;
        let before = self.described_whole()?;
        let compiled = self.compiled_for(&config);
        let former = self.put(Setup { config, compiled, state: self.state.clone() });
        self.state = self.with_containers();
        let after = self.plan(&former);
        let notes = self.proxy_notes();
        if dry_run || after.is_err() {
            self.put(former);
        } else if let Err(cause) = self.take_effect(&former) {
            return Err(self.go_back(former, cause));
        }
        let after = after.map_err(|cause| Error::NotReloaded { cause: Box::new(cause), back: None })?;
        Ok(api::Reloaded { reloaded: !dry_run, difference: difference(&before, &after), notes })
    }

    /// Puts another set-up in the place of the one that holds, which it returns. The kernel does not know of it yet.
    fn put(&mut self, Setup { config, compiled, state }: Setup) -> Setup {
        self.redirect.set_proxy_admin(config.proxy.admin);
        Setup {
            config: mem::replace(&mut self.config, config),
            compiled: mem::replace(&mut self.compiled, compiled),
            state: mem::replace(&mut self.state, state),
        }
    }

    /// Whether all of the file can be had, also what nobody has asked for yet; and what it makes of kernel and host.
    fn plan(&mut self, former: &Setup) -> Result<String, Error> {
        self.compiled.compile_all(&self.config)?;
        let moved = self.state.iter().filter(|(name, entry)| {
            let scope = |config| Workloads::scope(config, name);
            entry.enabled && scope(&former.config) != scope(&self.config)
        });
        let moved: Vec<String> = moved.map(|(name, _)| name.to_owned()).collect();
        self.workloads.resolve(&self.config, &moved).map_err(Error::Lost)?;
        self.described_whole()
    }

    /// On disk first, as with every change.
    fn take_effect(&mut self, former: &Setup) -> Result<(), Error> {
        self.file.save(&self.state)?;
        self.apply(&self.state.clone())?;
        fault::point("reload", "applied");
        self.align_files()?;
        fault::point("reload", "files in line");
        if self.forget_replaced_containers(&former.state) {
            self.apply(&self.state.clone())?;
        }
        let target = watch::Target::from(&self.config);
        self.watched.send_if_modified(|watched| mem::replace(watched, target.clone()) != target);
        if self.config.follows_routable() {
            self.keep_routable();
        }
        self.ask_proxy();
        Ok(())
    }

    /// Has what held before take effect again.
    fn go_back(&mut self, former: Setup, cause: Error) -> Error {
        self.put(former);
        let saved = self.file.save(&self.state).map_err(Error::from);
        let applied = saved.and_then(|()| self.apply(&self.state.clone()));
        let back = applied.and_then(|_| self.align_files()).err();
        Error::NotReloaded { cause: Box::new(cause), back: back.map(Box::new) }
    }

    /// What the proxy can route is asked for where it makes a difference now: it may not have been followed until now.
    fn compiled_for(&mut self, config: &Config) -> Compiled {
        let asked =
            config.follows_routable().then(|| watch::routable_now(&config.proxy, &mut self.workloads));
        let kept = || Arc::clone(self.compiled.routable());
        Compiled::new(asked.flatten().map_or_else(kept, Arc::new))
    }

    /// Everything that the configuration makes of kernel, host and this process.
    fn described_whole(&mut self) -> Result<String, Error> {
        let config::Proxy { port, dns_port, admin, scope } = &self.config.proxy;
        let proxy = format!("proxy {scope}: port {port}, DNS port {dns_port}, admin {admin}\n");
        Ok(proxy + &self.described(&self.state.clone())?)
    }

    /// Containers that were seen starting as a service that is another one now.
    fn forget_replaced_containers(&self, former: &State) -> bool {
        let name = |state: &State, service| Some(state.get(service)?.container.as_ref()?.name.clone());
        let replaced = former
            .containers()
            .filter(|(service, _, container)| name(&self.state, service).as_ref() != Some(&container.name));
        let replaced: Vec<&str> = replaced.map(|(service, ..)| service).collect();
        replaced.iter().for_each(|service| started::forget(&self.config.paths.run, service));
        !replaced.is_empty()
    }
}

/// What a process has for its life: all that it holds in the kernel and on disk is where these say.
fn refuse_what_is_fixed(now: &Config, next: &Config) -> Result<(), Error> {
    let (a, b) = (&now.paths, &next.paths);
    let differ = [
        ("paths.run", a.run != b.run),
        ("paths.state", a.state != b.state),
        ("paths.pins", a.pins != b.pins),
        ("paths.hosts", a.hosts != b.hosts),
        ("paths.hooks", a.hooks != b.hooks),
    ];
    let paths: Vec<&str> = differ.into_iter().filter(|(_, differs)| *differs).map(|(name, _)| name).collect();
    if !paths.is_empty() {
        return Err(Error::Fixed(format!(
            "{} cannot change while the daemon runs, and nothing has changed; with the former file stop the daemon (`systemctl stop mesh-redirect`) and run `mesh-redirect cleanup`, then start it with the new one",
            paths.join(", ")
        )));
    }
    if now.metrics != next.metrics {
        return Err(Error::Fixed(
            "metrics cannot change while the daemon runs, and nothing has changed; restart it (`systemctl restart mesh-redirect`)"
                .to_owned(),
        ));
    }
    if now.mode != next.mode {
        return Err(Error::Fixed(
            "mode cannot change while the daemon runs, and nothing has changed; restart it (`systemctl restart mesh-redirect`), which moves every enabled service over"
                .to_owned(),
        ));
    }
    Ok(())
}

/// systemd 253 and later takes the one only with the other.
fn notify_reloading() {
    let notified =
        NotifyState::monotonic_usec_now().and_then(|now| sd_notify::notify(&[NotifyState::Reloading, now]));
    let _no_manager: io::Result<()> = notified;
}

fn log(difference: &str) {
    let lines = difference.lines().count();
    tracing::info!("the configuration was read anew: {lines} lines of difference");
    difference.lines().take(LOGGED).for_each(|line| tracing::info!("{line}"));
    if lines > LOGGED {
        tracing::info!("and {} more", lines - LOGGED);
    }
}
