//! What each command does.

use crate::{
    api, attach, check,
    cli::{self, Attach, Cli, Command, Output},
    client,
    config::{Config, ConfigError, DEFAULT_STATE, Scope, check_name},
    daemon::{Daemon, Request},
    http, lock,
    mode::{self, Mode},
    origins::{self, Snapshot, server::OriginsServer},
    present, probe, ready,
    redirect::Redirect,
    routable::Routable,
    rules, server,
    state::StateFile,
    watch,
    workload::{Workloads, hooks_dir::Hook, started, systemd},
};
use anyhow::{Context as _, bail};
use nix::unistd::geteuid;
use std::{
    ffi::OsString,
    fs, future,
    io::Write as _,
    net::SocketAddr,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::mpsc,
    thread,
};
use tokio::signal::unix::{SignalKind, signal};

/// Usage and configuration errors, as clap's.
const BAD_INPUT: u8 = 2;

/// Runs a command line.
pub(crate) fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let file = cli.config.map(std::path::absolute).transpose()?;
    let loaded = Config::load(file.as_deref());
    if let Command::Attach(Attach { oci: true, .. }) = cli.command {
        return Ok(attach::container(loaded));
    }
    let config = match loaded {
        Ok(config) => config,
        Err(error) => return Ok(bad_input(&error)),
    };
    let only_looks =
        matches!(cli.command, Command::Check { .. } | Command::Explain { .. } | Command::Env { .. });
    if geteuid().as_raw() != 0 && !only_looks {
        bail!("only root can do this: it changes where other users' connections go");
    }
    match cli.command {
        Command::Run => daemon(config, file)?,
        Command::Enable { change, observe } => {
            let verb = if observe { "observed" } else { "enabled" };
            self::change(&config, "/v1/enable", verb, change, observe)?;
        }
        Command::Disable { change } => self::change(&config, "/v1/disable", "disabled", change, false)?,
        Command::Status { output } => status(&config, output)?,
        Command::Exec { service, command } => exec(&config, &service, &command)?,
        Command::Adopt { service, pid } => adopt(&config, &service, pid)?,
        Command::Attach(attach) => attach::unit(&config, &attach)?,
        Command::Explain { service, destinations, output } => {
            return explain(&config, &service, &destinations, output);
        }
        Command::Env { service, systemd } => env(&config, &service, systemd)?,
        Command::Cleanup => cleanup(&config, file.as_deref())?,
        Command::Check { output } => return check(&config, output),
    }
    Ok(ExitCode::SUCCESS)
}

fn bad_input(error: &ConfigError) -> ExitCode {
    eprintln!("mesh-redirect: {error}");
    ExitCode::from(BAD_INPUT)
}

fn daemon(config: Config, file: Option<PathBuf>) -> anyhow::Result<()> {
    let (run, proxy) = (config.paths.run.clone(), config.proxy.clone());
    let follows_routable = config.follows_routable();
    let _only_one = lock::daemon(&run)?;
    let cgroup_root = probe::cgroup2_mount()?;
    let (published, snapshots) = tokio::sync::watch::channel(Snapshot::default());
    let daemon = Daemon::start(config, file, Workloads::new(cgroup_root.clone()), published)?;
    let mode = daemon.mode();
    let (requests, received) = mpsc::channel();
    if mode != Mode::Ebpf {
        let cgroup_root = cgroup_root.clone();
        let (tell, proxy) = (requests.clone(), proxy.clone());
        let watch = move || {
            watch::proxy(&proxy, Workloads::new(cgroup_root), |ready| {
                tell.send(Request::Proxy(ready)).is_ok()
            });
        };
        thread::Builder::new().name("watch".to_owned()).spawn(watch)?;
    }
    if follows_routable {
        let (tell, proxy, workloads) = (requests.clone(), proxy.clone(), Workloads::new(cgroup_root.clone()));
        let watch = move || {
            watch::routable(&proxy, workloads, |routable| tell.send(Request::Routable(routable)).is_ok());
        };
        thread::Builder::new().name("routable".to_owned()).spawn(watch)?;
    }
    let mind = thread::Builder::new().name("daemon".to_owned()).spawn(move || daemon.run(&received))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let origins = origins_server(mode, &run, snapshots, Workloads::new(cgroup_root));
        serve_until_told_to_stop(&run, requests.clone(), origins).await
    })?;
    let _already_stopped = requests.send(Request::Stop);
    if mind.join().is_err() {
        bail!("the daemon's thread panicked; what is steered stays steered");
    }
    Ok(())
}

/// With eBPF the kernel tells the proxy, and with a hosts file nobody knows. Steering does not depend on it.
fn origins_server(
    mode: Mode,
    run: &Path,
    snapshots: tokio::sync::watch::Receiver<Snapshot>,
    workloads: Workloads,
) -> Option<OriginsServer> {
    let path = origins::server::path(run);
    if mode != Mode::Nftables {
        // Of a daemon that was killed.
        let _absent_is_fine = fs::remove_file(path);
        return None;
    }
    let server = OriginsServer::bind(&path, snapshots, workloads);
    server
        .inspect_err(|error| {
            tracing::warn!("proxies cannot be told whose connections are, at {}: {error}", path.display());
        })
        .ok()
}

async fn serve_until_told_to_stop(
    run: &Path,
    requests: mpsc::Sender<Request>,
    origins: Option<OriginsServer>,
) -> anyhow::Result<()> {
    let socket = run.join("agent.sock");
    let listener = http::bind(&socket).with_context(|| format!("bind {}", socket.display()))?;
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let serve_origins = async {
        match origins {
            Some(origins) => origins.serve().await,
            None => future::pending().await,
        }
    };
    // Where no service manager listens there is nobody to tell.
    let _no_manager = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    tracing::info!(socket = %socket.display(), "ready");
    tokio::select! {
        () = server::serve(listener, requests) => {}
        () = serve_origins => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    let _no_manager = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    tracing::info!("stopping; what is steered stays steered");
    for socket in [socket, origins::server::path(run)] {
        http::remove(&socket).with_context(|| format!("remove {}", socket.display()))?;
    }
    Ok(())
}

fn change(config: &Config, path: &str, verb: &str, change: cli::Change, observe: bool) -> anyhow::Result<()> {
    let cli::Change { services, all_matching, dry_run, output } = change;
    let change = api::Change { services, all_matching, observe, dry_run };
    let changed: api::Changed = client::post(&config.paths.run, path, Some(&change))?;
    if output.json { print_json(&changed) } else { print(&present::changed(verb, &changed)) }
}

fn status(config: &Config, output: Output) -> anyhow::Result<()> {
    let status: api::Status = client::get(&config.paths.run, "/v1/status")?;
    if output.json { print_json(&status) } else { print(&present::status(&status)) }
}

/// The daemon moves this process into a cgroup of its own; it then becomes the command.
fn exec(config: &Config, service: &str, command: &[OsString]) -> anyhow::Result<()> {
    check_name(service).map_err(anyhow::Error::msg)?;
    let path = format!("/v1/services/{service}/commands");
    let joined: api::Joined = client::post(&config.paths.run, &path, None::<&()>)?;
    for note in joined.notes {
        eprintln!("mesh-redirect: note: {note}");
    }
    let [program, arguments @ ..] = command else { bail!("no command") };
    let error = std::process::Command::new(program).args(arguments).exec();
    Err(error).with_context(|| format!("run {}", program.to_string_lossy()))
}

fn adopt(config: &Config, service: &str, pid: u32) -> anyhow::Result<()> {
    check_name(service).map_err(anyhow::Error::msg)?;
    let path = format!("/v1/services/{service}/processes");
    let joined: api::Joined = client::post(&config.paths.run, &path, Some(&api::Process { pid }))?;
    let notes = joined.notes.iter().map(|note| format!("note: {note}\n")).collect::<String>();
    print(&format!("process {pid} and its descendants are in {}\n{notes}", joined.cgroup))
}

fn cleanup(config: &Config, file: Option<&Path>) -> anyhow::Result<()> {
    let run = &config.paths.run;
    let _only_one = lock::daemon(run)?;
    let held = lock::kernel(run)?;
    remove_redirects(config)?;
    remove_drop_ins(config)?;
    Routable::remove(&config.paths.state);
    Hook { dir: &config.paths.hooks, config: file }.remove().context("remove the hook")?;
    started::forget_all(run);
    let file = StateFile::new(&config.paths.state);
    remove_command_cgroups(&file);
    file.remove()?;
    drop(held);
    lock::remove(run);
    print("nothing of mesh-redirect is left in the kernel or in its state\n")
}

/// Whatever mode was the last one, and whether its state can be read. A host that has no nf_tables has none of ours.
fn remove_redirects(config: &Config) -> anyhow::Result<()> {
    let cgroup_root = probe::cgroup2_mount().unwrap_or_default();
    let used = StateFile::new(&config.paths.state).load().ok().and_then(|state| state.mode());
    for mode in mode::ALL {
        let removed = Redirect::new(mode, config, &cgroup_root).remove();
        match removed {
            Err(error) if used == Some(mode) => return Err(error.into()),
            Err(error) => tracing::debug!(%mode, "{error}"),
            Ok(()) => {}
        }
    }
    Ok(())
}

/// Drop-ins of this state only where it is not the host's own: another daemon's are not ours to remove.
fn remove_drop_ins(config: &Config) -> anyhow::Result<()> {
    if config.paths.state == Path::new(DEFAULT_STATE) {
        return systemd::remove_all_drop_ins().context("remove drop-ins");
    }
    let Ok(state) = StateFile::new(&config.paths.state).load() else { return Ok(()) };
    let scopes: Vec<Scope> = state.iter().map(|(name, _)| Workloads::scope(config, name)).collect();
    systemd::remove_drop_ins(scopes.iter().filter_map(Scope::unit)).context("remove drop-ins")
}

/// A command that still runs keeps its cgroup, which is harmless then.
fn remove_command_cgroups(file: &StateFile) {
    let (Ok(state), Ok(root)) = (file.load(), probe::cgroup2_mount()) else { return };
    let workloads = Workloads::new(root);
    for path in state.iter().flat_map(|(_, entry)| &entry.commands) {
        let _still_runs = fs::remove_dir(workloads.dir(path));
    }
    let _still_used = fs::remove_dir(workloads.dir("/mesh-redirect"));
}

fn check(config: &Config, output: Output) -> anyhow::Result<ExitCode> {
    let facts = probe::facts(config);
    let lines = check::all(config, &facts);
    if output.json {
        print_json(&lines)?;
    } else {
        let chosen = mode::choose(config.mode, &facts).ok().map(|choice| choice.mode);
        print(&(present::check(&lines) + &present::capabilities(&facts, chosen)))?;
    }
    let good = lines.iter().all(|line| line.ok || !line.required);
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn env(config: &Config, service: &str, systemd: bool) -> anyhow::Result<()> {
    let admin = config.proxy.admin;
    let names = ready::names(admin).with_context(|| format!("ask the proxy at {admin} for its names"))?;
    let found =
        names.iter().find(|name| name.name == service).and_then(|name| Some((name, name.ports.first()?)));
    let Some((name, port)) = found else {
        let known: Vec<&str> = names.iter().map(|name| name.name.as_str()).collect();
        bail!(
            "the proxy listens for no name `{service}`; it does for: {}. A virtual host with `ports` makes it so",
            if known.is_empty() { "none".to_owned() } else { known.join(", ") }
        );
    };
    let upper = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' };
    let variable: String = name.name.chars().map(upper).collect();
    let lines = [("HOST", name.address.to_string()), ("PORT", port.to_string())];
    let word = if systemd { "Environment=" } else { "export " };
    print(&lines.map(|(what, value)| format!("{word}{variable}_SERVICE_{what}={value}\n")).concat())
}

fn explain(
    config: &Config,
    service: &str,
    destinations: &[SocketAddr],
    output: Output,
) -> anyhow::Result<ExitCode> {
    check_name(service).map_err(anyhow::Error::msg)?;
    let policy = config.policy(service);
    let routable = if policy.follows_routable() { known_routable(config) } else { Routable::default() };
    let explained: Vec<present::Explained> = destinations
        .iter()
        .map(|&destination| {
            present::Explained::new(destination, &rules::decide(policy, &routable, destination))
        })
        .collect();
    if output.json {
        print_json(&explained)?;
    } else {
        print(&present::explained(&explained))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// As the proxy says now, or as it was last known.
fn known_routable(config: &Config) -> Routable {
    match ready::routable(config.proxy.admin, None) {
        Ok(Some((routable, _))) => routable,
        _ => Routable::load(&config.paths.state),
    }
}

fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    print(&(serde_json::to_string_pretty(value)? + "\n"))
}

/// A reader that has seen enough (`| head`) is no failure.
fn print(text: &str) -> anyhow::Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}
