//! `cargo xtask …`: every task of a developer's.

mod bench;
mod build;
mod demo;
#[expect(dead_code, reason = "the agent's build script, which includes it too, compiles with it")]
mod ebpf_toolchain;
mod install;
mod setup;
mod test;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Every task of a developer's
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Find or install what building and testing need; quick when nothing is missing
    Setup,
    /// Format, lints, unit and doc tests, end-to-end tests; sets up what they need (root)
    Test {
        /// Run only tests whose names contain this, without format and lints
        filter: Option<String>,
    },
    /// Set up, build, and watch the main job in network namespaces of its own (root)
    Demo,
    /// Measure
    #[command(subcommand)]
    Bench(bench::Bench),
    /// Build and install binaries, systemd units and commented configuration
    Install(install::Install),
    /// Undo `install`: end what runs, release the kernel, remove what was installed
    Uninstall(install::Uninstall),
}

fn main() -> ExitCode {
    let done = match Cli::parse().task {
        Task::Setup => setup::ensure(setup::For::Tests),
        Task::Test { filter } => test::run(filter.as_deref()),
        Task::Demo => demo::run(),
        Task::Bench(bench) => bench::run(&bench),
        Task::Install(install) => install.run(),
        Task::Uninstall(uninstall) => uninstall.run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cargo xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
