//! What each command does.

use crate::{
    api, attach, beside, check, cleanup,
    cli::{self, Attach, Cli, Command},
    client::{self, ClientError},
    config::{Config, ConfigError, check_name},
    drain, explain,
    output::Output,
    paths, present, ready,
    redirect::ebpf::{self, Other},
    reference, run,
};
use anyhow::{Context as _, anyhow, bail};
use nix::unistd::geteuid;
use serde::Serialize;
use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    ops::ControlFlow,
    os::unix::process::CommandExt as _,
    path::Path,
    process::ExitCode,
};

/// Usage and configuration errors, as clap's.
const BAD_INPUT: u8 = 2;
/// A status that was told, and is not what is wanted.
const NOT_AS_WANTED: u8 = 3;

/// Runs a command line.
pub(crate) fn run(cli: Cli) -> ExitCode {
    let output = Output { json: cli.json };
    execute(cli, output).unwrap_or_else(|error| {
        output.error(&error);
        if error.is::<ConfigError>() { ExitCode::from(BAD_INPUT) } else { ExitCode::FAILURE }
    })
}

fn execute(cli: Cli, output: Output) -> anyhow::Result<ExitCode> {
    // A configuration that is broken does not matter to them.
    match cli.command {
        Command::Completions { shell } => return reference::completions(shell, output),
        Command::Man { command, dir } => {
            return reference::manual(command.as_deref(), dir.as_deref(), output);
        }
        _ => {}
    }
    let file = cli.config.map(std::path::absolute).transpose()?;
    let loaded = Config::load(file.as_deref());
    if let Command::Attach(Attach { oci: true, .. }) = cli.command {
        return Ok(attach::container(loaded));
    }
    let only_looks = matches!(
        cli.command,
        Command::Check { service: None } | Command::Explain { .. } | Command::Env { .. }
    );
    if geteuid().as_raw() != 0 && !only_looks {
        bail!("only root can do this: it changes where other users' connections go");
    }
    // It has to do what it can without a configuration too.
    if let Command::Cleanup = cli.command {
        return clean_up(loaded, file.as_deref(), output);
    }
    let config = loaded?;
    match cli.command {
        Command::Run => run::run(config, file)?,
        Command::Enable { change, observe } => {
            let verb = if observe { "observed" } else { "enabled" };
            self::change(&config, "/v1/enable", verb, change, observe, output)?;
        }
        Command::Disable { change } => {
            self::change(&config, "/v1/disable", "disabled", change, false, output)?;
        }
        Command::Reload { dry_run } => reload(&config, dry_run, output)?,
        Command::Status => return status(&config, output),
        Command::Watch { services, rate, count } => {
            let watch = api::Watch { services: services.into_iter().collect(), rate };
            self::watch(&config, &watch, count, output)?;
        }
        Command::Exec { service, command } => exec(&config, &service, &command, output)?,
        Command::Adopt { service, pid } => adopt(&config, &service, pid, output)?,
        Command::Attach(attach) => output.result(&attach::unit(&config, &attach)?, |_| String::new())?,
        Command::Explain { service, destinations, proto } => {
            let explained = explain::explain(&config, &service, &destinations, proto)?;
            output.result(&explained, present::explained)?;
        }
        Command::Env { service, systemd } => env(&config, &service, systemd, output)?,
        Command::Cleanup => return clean_up(Ok(config), file.as_deref(), output),
        // Those were printed above.
        Command::Completions { .. } | Command::Man { .. } => {}
        Command::Check { service: None } => {
            let findings = check::all(&config);
            output.result(&findings, present::check)?;
            return Ok(if findings.are_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Command::Check { service: Some(service) } => {
            let report = paths::check(&config, file.as_deref(), &service)?;
            output.result(&report, present::paths)?;
            return Ok(if report.agrees { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Command::Probe { service } => {
            join(&config, &service)?;
            paths::probe()?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn change(
    config: &Config,
    path: &str,
    verb: &str,
    change: cli::Change,
    observe: bool,
    output: Output,
) -> anyhow::Result<()> {
    let cli::Change { services, all_matching, dry_run, existing, drain_timeout } = change;
    let change = api::Change { services, all_matching, observe, dry_run, existing };
    let changed = client::post(&config.paths.run, path, Some(&change)).map_err(with_names)?;
    let mut changed = with_those_beside(changed);
    if let (api::Existing::Drain, Some(existing)) = (existing, &mut changed.existing) {
        drain::drain(config, existing, drain_timeout, output)?;
    }
    Ok(output.result(&changed, |changed| present::changed(verb, changed))?)
}

fn clean_up(
    loaded: Result<Config, ConfigError>,
    file: Option<&Path>,
    output: Output,
) -> anyhow::Result<ExitCode> {
    let cleaned = cleanup::cleanup(loaded, file)?;
    output.result(&cleaned, present::cleaned)?;
    Ok(if cleaned.is_complete() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn reload(config: &Config, dry_run: bool, output: Output) -> anyhow::Result<()> {
    let reload = api::Reload { dry_run };
    let reloaded: api::Reloaded =
        client::post(&config.paths.run, "/v1/reload", Some(&reload)).map_err(|error| match error {
            // The file is where the daemon is looked for, and may have changed.
            ClientError::Absent { .. } => {
                anyhow!("{error}. One that was started with another paths.run has to be restarted")
            }
            _ => error.into(),
        })?;
    Ok(output.result(&reloaded, present::reloaded)?)
}

/// Programs have names only for those who may ask the kernel for them, which the daemon may not.
fn with_names(error: ClientError) -> anyhow::Error {
    let ClientError::Refused { error, programs } = &error else { return error.into() };
    let names = if programs.is_empty() { BTreeMap::new() } else { ebpf::names() };
    let called = programs.iter().filter_map(|id| Some(format!("; {}", beside::called(*id, names.get(id)?))));
    anyhow::Error::msg(format!("{error}{}", called.collect::<String>()))
}

fn with_those_beside(mut changed: api::Changed) -> api::Changed {
    let names = if changed.beside.is_empty() { BTreeMap::new() } else { ebpf::names() };
    let mut notes = BTreeSet::new();
    for found in &mut changed.beside {
        found.name = names.get(&found.program).cloned();
        let api::Beside { service, program: id, name, hook, cgroup, order } = found.clone();
        let other = Other { id, hook, dir: cgroup.clone().into(), order };
        let finding = beside::program(&other, &cgroup, name.as_deref()).filter(|finding| !finding.ok);
        notes.extend(finding.map(|finding| format!("{service}: {finding}")));
    }
    changed.notes.extend(notes);
    changed
}

fn status(config: &Config, output: Output) -> anyhow::Result<ExitCode> {
    let status: api::Status = client::get(&config.paths.run, "/v1/status")?;
    output.result(&status, present::status)?;
    Ok(if status.healthy { ExitCode::SUCCESS } else { ExitCode::from(NOT_AS_WANTED) })
}

/// Until enough was shown, or nobody reads it any more. The daemon shall outlive it.
fn watch(config: &Config, watch: &api::Watch, count: Option<u64>, output: Output) -> anyhow::Result<()> {
    let mut columns = present::Decisions::default();
    let mut left = count.unwrap_or(u64::MAX);
    client::watch(&config.paths.run, watch, |watched: api::Watched| {
        left -= u64::from(matches!(watched, api::Watched::Decision(_)));
        let goes_on = output.line(&watched, |watched| columns.show(watched))? && left > 0;
        Ok(if goes_on { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
    })?;
    Ok(())
}

/// The daemon moves this process into a cgroup of its own, which is steered as a service's.
fn join(config: &Config, service: &str) -> anyhow::Result<api::Joined> {
    check_name(service).map_err(anyhow::Error::msg)?;
    let path = format!("/v1/services/{service}/commands");
    Ok(client::post(&config.paths.run, &path, None::<&()>)?)
}

/// This process becomes the command.
fn exec(config: &Config, service: &str, command: &[OsString], output: Output) -> anyhow::Result<()> {
    output.aside(&join(config, service)?, |joined| present::notes("mesh-redirect: ", &joined.notes));
    let [program, arguments @ ..] = command else { bail!("no command") };
    let error = std::process::Command::new(program).args(arguments).exec();
    Err(error).with_context(|| format!("run {}", program.to_string_lossy()))
}

fn adopt(config: &Config, service: &str, pid: u32, output: Output) -> anyhow::Result<()> {
    check_name(service).map_err(anyhow::Error::msg)?;
    let path = format!("/v1/services/{service}/processes");
    let joined: api::Joined = client::post(&config.paths.run, &path, Some(&api::Process { pid }))?;
    let text = |joined: &api::Joined| {
        let notes = present::notes("", &joined.notes);
        format!("process {pid} and its descendants are in {}\n{notes}", joined.cgroup)
    };
    Ok(output.result(&joined, text)?)
}

fn env(config: &Config, service: &str, systemd: bool, output: Output) -> anyhow::Result<()> {
    #[derive(Serialize)]
    struct Variables {
        variables: Vec<(String, String)>,
    }
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
    let prefix: String = name.name.chars().map(upper).collect();
    let variables = [("HOST", name.address.to_string()), ("PORT", port.to_string())];
    let variables = variables.map(|(what, value)| (format!("{prefix}_SERVICE_{what}"), value)).to_vec();
    let word = if systemd { "Environment=" } else { "export " };
    Ok(output.result(&Variables { variables }, |Variables { variables }| {
        variables.iter().map(|(name, value)| format!("{word}{name}={value}\n")).collect()
    })?)
}
