//! Completions and pages of the manual, from what the command line is parsed with.

use crate::{cli::Cli, output::Output};
use anyhow::{Context as _, bail};
use clap::{Command, CommandFactory as _};
use clap_complete::Shell;
use clap_mangen::Man;
use serde::Serialize;
use std::{
    fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
};

/// System administration (man(1)).
const SECTION: &str = "8";
const MANUAL: &str = "mesh-redirect";

/// Prints a shell's completions.
pub(crate) fn completions(shell: Shell, output: Output) -> anyhow::Result<ExitCode> {
    #[derive(Serialize)]
    struct Completions {
        shell: String,
        script: String,
    }
    let (mut command, mut script) = (Cli::command(), Vec::new());
    let name = command.get_name().to_owned();
    clap_complete::generate(shell, &mut command, name, &mut script);
    let completions = Completions { shell: shell.to_string(), script: String::from_utf8(script)? };
    output.result(&completions, |completions| completions.script.clone())?;
    Ok(ExitCode::SUCCESS)
}

/// Prints a page, or writes all of them.
pub(crate) fn manual(command: Option<&str>, dir: Option<&Path>, output: Output) -> anyhow::Result<ExitCode> {
    #[derive(Serialize)]
    struct Page {
        page: String,
    }
    #[derive(Serialize)]
    struct Written {
        files: Vec<PathBuf>,
    }
    let whole = whole();
    let Some(dir) = dir else {
        let found = match command {
            None => Some(&whole),
            Some(name) => whole.find_subcommand(name),
        };
        let Some(found) = found else { bail!("there is no command `{}`", command.unwrap_or_default()) };
        output.result(&Page { page: page(found)? }, |page| page.page.clone())?;
        return Ok(ExitCode::SUCCESS);
    };
    let shown = whole.get_subcommands().filter(|command| !command.is_hide_set());
    let pages = [&whole].into_iter().chain(shown);
    let files = pages.map(|command| write(command, dir)).collect::<Result<_, _>>()?;
    output.result(&Written { files }, |written| {
        written.files.iter().map(|file| format!("{}\n", file.display())).collect()
    })?;
    Ok(ExitCode::SUCCESS)
}

/// With the names that subcommands have in their pages: `mesh-redirect-enable`.
fn whole() -> Command {
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    command
}

fn write(command: &Command, dir: &Path) -> anyhow::Result<PathBuf> {
    let file = dir.join(format!("{}.{SECTION}", name(command)));
    fs::write(&file, page(command)?).with_context(|| format!("write {}", file.display()))?;
    Ok(file)
}

fn page(command: &Command) -> io::Result<String> {
    let mut page = Vec::new();
    let source = format!("mesh-redirect {}", env!("CARGO_PKG_VERSION"));
    Man::new(command.clone())
        .title(name(command))
        .section(SECTION)
        .source(source)
        .manual(MANUAL)
        .render(&mut page)?;
    String::from_utf8(page).map_err(io::Error::other)
}

fn name(command: &Command) -> &str {
    command.get_display_name().unwrap_or_else(|| command.get_name())
}
