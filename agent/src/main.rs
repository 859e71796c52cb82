//! `mesh-redirect`: the daemon and its command line.

mod api;
mod attach;
mod check;
mod cli;
mod client;
mod commands;
mod config;
mod conntrack;
mod daemon;
mod http;
mod lock;
mod mode;
mod netlink;
mod origins;
mod plan;
mod present;
mod probe;
mod ready;
mod redirect;
mod routable;
mod rules;
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
    log_to_stderr();
    commands::run(cli).unwrap_or_else(|error| {
        eprintln!("mesh-redirect: {error:#}");
        ExitCode::FAILURE
    })
}

fn log_to_stderr() {
    let filter = EnvFilter::try_from_env("MESH_REDIRECT_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
}
