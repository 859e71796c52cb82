//! Measurements. Each prints a table, and with `--json FILE` writes its rows.

mod connect;
mod enable;
mod report;
mod watch;

use crate::{
    build::{self, step},
    setup,
};
use anyhow::Context as _;
use clap::{Args, Subcommand};
use std::{fs::File, path::PathBuf};

/// What can be measured.
#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// What connect() costs: plain, with a hook that passes, with a hook that steers
    Connect(connect::Connect),
    /// How long `enable` takes, of one service and of a thousand
    Enable(enable::Enable),
    /// What connect() costs at the highest rate there is while decisions are watched
    Watch(watch::Watch),
}

/// What every bench takes.
#[derive(Debug, Args)]
struct Output {
    /// Write the rows to a file: name, metric, value, unit, compared_to, ratio
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Sets up, builds, measures and reports. A file that cannot be written is found before anything is measured.
pub(crate) fn run(bench: &Bench) -> anyhow::Result<()> {
    build::require_root("`cargo xtask bench`")?;
    let json = match bench {
        Bench::Connect(connect) => connect.output.create()?,
        Bench::Enable(enable) => enable.output.create()?,
        Bench::Watch(watch) => watch.output.create()?,
    };
    step("set-up", || setup::ensure(setup::For::Demo))?;
    tests::use_binaries(step("build", || build::everything(&[]))?);
    let report = match bench {
        Bench::Connect(connect) => connect.measure(),
        Bench::Enable(enable) => enable.measure(),
        Bench::Watch(watch) => watch.measure(),
    };
    print!("\n{report}");
    json.map_or(Ok(()), |file| report.write(file))
}

impl Output {
    fn create(&self) -> anyhow::Result<Option<File>> {
        let create = |file: &PathBuf| File::create(file).with_context(|| format!("write {}", file.display()));
        self.json.as_ref().map(create).transpose()
    }
}
