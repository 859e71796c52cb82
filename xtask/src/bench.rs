//! Measurements. Each prints a table, and with `--json FILE` writes its rows.

mod connect;
mod report;

use crate::{
    build::{self, step},
    setup,
};
use clap::{Args, Subcommand};
use std::path::PathBuf;

/// What can be measured.
#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// What connect() costs: plain, with a hook that passes, with a hook that steers
    Connect(connect::Connect),
}

/// What every bench takes.
#[derive(Debug, Args)]
struct Output {
    /// Write the rows to a file: name, metric, value, unit, compared_to, ratio
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Sets up, builds, measures and reports.
pub(crate) fn run(bench: &Bench) -> anyhow::Result<()> {
    build::require_root("`cargo xtask bench`")?;
    step("set-up", || setup::ensure(setup::For::Demo))?;
    tests::use_binaries(step("build", build::everything)?);
    let (report, output) = match bench {
        Bench::Connect(connect) => (connect.measure(), &connect.output),
    };
    print!("\n{report}");
    output.json.as_deref().map_or(Ok(()), |file| report.write(file))
}
