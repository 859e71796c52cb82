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
mod resolve;
mod rewind;
mod routable;
mod route;
mod snapshot;
mod target;
mod tunnel;
mod worker;

use clap::{Parser, Subcommand};
use std::{io::IsTerminal as _, path::PathBuf, process::ExitCode};
use tracing_subscriber::EnvFilter;

/// Balances and observes the connections that are steered into it, and relays what it does not know untouched.
#[derive(Debug, Parser)]
#[command(version, about, max_term_width = 110)]
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
}

/// A configuration that is wrong, as clap's usage errors.
const BAD_INPUT: u8 = 2;

fn main() -> ExitCode {
    let command = Cli::parse().command;
    let (Command::Run { config: file } | Command::Check { file }) = &command;
    let config = match config::load(file) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("mesh-proxy: {error}");
            return ExitCode::from(BAD_INPUT);
        }
    };
    if let Command::Check { .. } = command {
        println!(
            "{}: {} virtual hosts, {} clusters",
            file.display(),
            config.virtual_hosts.len(),
            config.clusters.len()
        );
        return ExitCode::SUCCESS;
    }
    log_to_stderr();
    match process::run(file, &config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-proxy: {error:#}");
            ExitCode::FAILURE
        }
    }
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
