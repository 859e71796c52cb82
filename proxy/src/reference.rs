//! Completions and pages of the manual, from what the command line is parsed with.

use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;
use std::{fs::File, io, path::Path};

/// System administration (man(1)).
const SECTION: &str = "8";
const MANUAL: &str = "mesh-redirect";

/// Prints a shell's completions.
pub(crate) fn completions(mut command: Command, shell: Shell) -> io::Result<()> {
    let (name, mut script) = (command.get_name().to_owned(), Vec::new());
    clap_complete::generate(shell, &mut command, name, &mut script);
    io::Write::write_all(&mut io::stdout(), &script)
}

/// Writes a page for each command to a directory, and says which.
pub(crate) fn manual(command: Command, dir: &Path) -> io::Result<()> {
    let mut whole = command.disable_help_subcommand(true);
    whole.build();
    for command in [&whole].into_iter().chain(whole.get_subcommands()) {
        let name = command.get_display_name().unwrap_or_else(|| command.get_name());
        let file = dir.join(format!("{name}.{SECTION}"));
        let source = format!("mesh-proxy {}", env!("CARGO_PKG_VERSION"));
        let page = Man::new(command.clone()).title(name).section(SECTION).source(source).manual(MANUAL);
        page.render(&mut File::create(&file)?)?;
        println!("{}", file.display());
    }
    Ok(())
}
