//! What continuous integration runs.

use crate::{
    build::{self, PROFILE, cargo, step},
    setup,
};

/// All tests, or those whose names contain `filter`.
pub(crate) fn run(filter: Option<&str>) -> anyhow::Result<()> {
    build::require_root("`cargo xtask test`")?;
    step("set-up", || setup::ensure(setup::For::Tests))?;
    if filter.is_none() {
        step("format", || build::run(cargo(&["fmt", "--all", "--check"])))?;
        step("lints", lints)?;
    }
    step("unit and doc tests", || unit_tests(filter))?;
    step("build of the other ABI", build::changed_abi)?;
    step("build", || build::everything(&FEATURES))?;
    step("end-to-end tests", || end_to_end_tests(filter))
}

/// Points at which the end-to-end tests kill the agent.
const FEATURES: [&str; 2] = ["--features", "agent/fault-points"];

// Every step selects the whole workspace, the same features and the same profile, so that each crate, and the eBPF object, is
// built once.

fn lints() -> anyhow::Result<()> {
    let clippy = ["clippy", "--workspace", "--all-targets", "--locked", "--profile", PROFILE];
    build::run(cargo(&[&clippy[..], &FEATURES, &["--", "--deny", "warnings"]].concat()))
}

fn unit_tests(filter: Option<&str>) -> anyhow::Result<()> {
    let test = ["test", "--workspace", "--exclude", "tests", "--locked", "--profile", PROFILE];
    build::run(cargo(&[&test[..], &FEATURES, &filter.map_or(vec![], |filter| vec![filter])].concat()))
}

fn end_to_end_tests(filter: Option<&str>) -> anyhow::Result<()> {
    let test = ["test", "--workspace", "--locked", "--profile", PROFILE, "--test", "e2e"];
    let mut command = cargo(&[&test[..], &FEATURES, &filter.map_or(vec![], |filter| vec![filter])].concat());
    command.env("MESH_REDIRECT_BIN_DIR", build::binaries(PROFILE));
    command.env("MESH_REDIRECT_SYSTEMD_ROOTS", setup::SYSTEMD_ROOTS);
    build::run(command)
}
