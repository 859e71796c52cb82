//! `mesh-redirect`: the daemon and its command line.

mod api;
mod attach;
mod beside;
mod check;
mod cleanup;
mod cli;
mod client;
mod commands;
mod config;
mod confine;
mod connections;
mod conntrack;
mod daemon;
mod decisions;
mod drain;
mod durable;
mod explain;
mod exporter;
mod fault;
mod http;
mod journal;
mod lock;
mod metrics;
mod mode;
mod netlink;
mod origins;
mod output;
mod paths;
mod plan;
mod present;
mod probe;
mod ready;
mod reason;
mod redirect;
mod reference;
mod removal;
mod routable;
mod rules;
mod run;
mod server;
mod sockets;
mod state;
mod sys;
mod watch;
mod workload;

use clap::Parser as _;
use std::{io::IsTerminal as _, process::ExitCode};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    log_to_stderr(cli.json);
    commands::run(cli)
}

fn log_to_stderr(json: bool) {
    let filter = EnvFilter::try_from_env("MESH_REDIRECT_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    if json { log.json().init() } else { log.init() }
}
