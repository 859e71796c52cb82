//! `mesh-proxy`: the data plane beside a service.

mod accept;
mod admin;
mod balance;
mod cluster;
mod config;
mod connection;
mod context;
mod detect;
mod dns;
mod http;
mod model;
mod names;
mod observe;
mod origin;
mod origins;
mod pool;
mod process;
mod reference;
mod resolve;
mod rewind;
mod routable;
mod route;
mod snapshot;
mod target;
mod tunnel;
mod worker;

use clap::{CommandFactory as _, Parser, Subcommand};
use clap_complete::Shell;
use config::ConfigError;
use std::{
    io::IsTerminal as _,
    path::{Path, PathBuf},
    process::ExitCode,
};
use tracing_subscriber::EnvFilter;

/// Balances and observes the connections that are steered into it, and relays what it does not know untouched.
#[derive(Debug, Parser)]
#[command(name = "mesh-proxy", version, about, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run in the foreground; SIGTERM drains, SIGHUP reads virtual hosts and clusters anew
    Run {
        /// The configuration file
        #[arg(long, value_name = "FILE", default_value = "/etc/mesh-redirect/proxy.yaml")]
        config: PathBuf,
    },
    /// Check a configuration file
    Check {
        /// The file
        file: PathBuf,
    },
    /// Print what a shell needs to complete these commands, for a file that it reads when it starts
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Write the pages of the manual
    Man {
        /// Write them to this directory
        #[arg(long, value_name = "DIR")]
        dir: PathBuf,
    },
}

/// A configuration that is wrong, as clap's usage errors.
const BAD_INPUT: u8 = 2;

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Run { config } => run(&config),
        Command::Check { file } => check(&file),
        Command::Completions { shell } => reference::completions(Cli::command(), shell).map_err(Into::into),
        Command::Man { dir } => reference::manual(Cli::command(), &dir).map_err(Into::into),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-proxy: {error:#}");
            if error.is::<ConfigError>() { ExitCode::from(BAD_INPUT) } else { ExitCode::FAILURE }
        }
    }
}

fn run(file: &Path) -> anyhow::Result<()> {
    let config = config::load(file)?;
    log_to_stderr();
    process::run(file, &config)
}

fn check(file: &Path) -> anyhow::Result<()> {
    let config = config::load(file)?;
    let (hosts, clusters) = (config.virtual_hosts.len(), config.clusters.len());
    println!("{}: {hosts} virtual hosts, {clusters} clusters", file.display());
    Ok(())
}

fn log_to_stderr() {
    let filter = EnvFilter::try_from_env("MESH_PROXY_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
}
