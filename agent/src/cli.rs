//! The command line, without logic.

use crate::{
    api::{Existing, Watch},
    explain::{Destination, Proto},
};
use clap::{Args, Parser, Subcommand, value_parser};
use clap_complete::Shell;
use std::{ffi::OsString, path::PathBuf, time::Duration};

/// Steers unmodified services' outbound connections into a co-located proxy, one service at a time.
#[derive(Debug, Parser)]
#[command(name = "mesh-redirect", version, about, max_term_width = 110)]
pub(crate) struct Cli {
    /// The configuration file [default: /etc/mesh-redirect/agent.yaml, which may be absent]
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Results, notes and errors as JSON
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What is to be done.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the daemon in the foreground
    Run,
    /// Steer services: their running processes' next connections, and every later start's first
    Enable {
        #[command(flatten)]
        change: Change,
        /// Only count what would be steered, and let it go where it was going
        #[arg(long, conflicts_with = "existing")]
        observe: bool,
    },
    /// Stop steering services
    Disable {
        #[command(flatten)]
        change: Change,
    },
    /// Have the daemon read its configuration anew: all of it takes effect, or nothing changes; shows what was added and
    /// removed
    Reload {
        /// Do nothing; show what would be added and removed
        #[arg(long)]
        dry_run: bool,
    },
    /// Show what is steered, since when and how much
    Status,
    /// Show what is decided of each connection and DNS query, while it is decided
    Watch {
        /// Enabled services [default: all]
        #[arg(value_name = "SERVICE")]
        services: Vec<String>,
        /// Show at most so many in a second; the others are counted
        #[arg(long, value_name = "N", default_value_t = Watch::RATE, value_parser = value_parser!(u32).range(1..=i64::from(Watch::MAX_RATE)))]
        rate: u32,
        /// End after so many
        #[arg(long, value_name = "N", value_parser = value_parser!(u64).range(1..))]
        count: Option<u64>,
    },
    /// Run a command with its connections steered as a service's
    Exec {
        /// Whose policy applies; need not be enabled, nor exist
        service: String,
        /// The command and its arguments
        #[arg(last = true, required = true, value_name = "COMMAND")]
        command: Vec<OsString>,
    },
    /// Steer a running process and its descendants as a service, in a cgroup of their own
    Adopt {
        /// Whose policy applies; need not be enabled, nor exist
        service: String,
        /// The process; its open sockets stay as they are
        pid: u32,
    },
    /// Attach to a cgroup before its first process runs, without a daemon: for a unit's ExecStartPre= and for OCI hooks
    Attach(Attach),
    /// Tell what becomes of connections of a service, which rule says so, and where it is written
    Explain {
        /// Whose policy; a service that the configuration does not name has the defaults
        service: String,
        /// Where the connections go: an address or a host name; without a port, all ports
        #[arg(required = true, value_name = "ADDRESS[:PORT]|NAME[:PORT]")]
        destinations: Vec<Destination>,
        /// What is sent there
        #[arg(long, value_enum, default_value_t)]
        proto: Proto,
    },
    /// Print where the proxy listens for a name, as NAME_SERVICE_HOST and NAME_SERVICE_PORT
    Env {
        /// A name that the proxy routes
        service: String,
        /// As lines of a systemd unit, not of a shell
        #[arg(long)]
        systemd: bool,
    },
    /// Remove everything of ours from this host; refuses while a daemon runs
    Cleanup,
    /// Tell whether this host can do it, and what to do where it cannot; or what really happens to what a service sends
    Check {
        /// Send something down every path as this service, to this host itself; need not be enabled, nor exist
        service: Option<String>,
    },
    /// The part of `check SERVICE` that runs as the service
    #[command(hide = true)]
    Probe {
        /// Whose policy applies
        service: String,
    },
    /// Print what a shell needs to complete these commands, for a file that it reads when it starts
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Print a page of the manual, or write all pages
    Man {
        /// The command that it is about; this program, unless one is named
        command: Option<String>,
        /// Write every page to this directory
        #[arg(long, value_name = "DIR", conflicts_with = "command")]
        dir: Option<PathBuf>,
    },
}

/// Which services, and whether in earnest.
#[derive(Debug, Args)]
pub(crate) struct Change {
    /// Services of the configuration, systemd units, or patterns of the configuration's services (`pay*`)
    #[arg(required = true, value_name = "SERVICE")]
    pub(crate) services: Vec<String>,
    /// Let patterns match every systemd service of this host too
    #[arg(long)]
    pub(crate) all_matching: bool,
    /// Do nothing; show what would be added and removed
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// What becomes of the services' open connections that are steered otherwise than new ones
    #[arg(long, value_enum, default_value_t, value_name = "WHAT", conflicts_with = "dry_run")]
    pub(crate) existing: Existing,
    /// How long `--existing=drain` waits before it closes those that are left
    #[arg(long, value_parser = humantime::parse_duration, default_value = "30s", value_name = "TIME")]
    pub(crate) drain_timeout: Duration,
}

/// Whose cgroup it is.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Attach {
    /// An enabled service's
    pub(crate) service: Option<String>,
    /// The proxy's
    #[arg(long)]
    pub(crate) proxy: bool,
    /// A container's, whose state is read from standard input; one that is no enabled service is left alone
    #[arg(long)]
    pub(crate) oci: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{Command, CommandFactory as _};

    fn commands(of: &Command) -> Vec<Command> {
        [of.clone()].into_iter().chain(of.get_subcommands().flat_map(commands)).collect()
    }

    #[test]
    fn every_command_and_every_argument_says_what_it_is() {
        for command in commands(&Cli::command()) {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            let mut arguments = command.get_arguments();
            let silent = arguments.find(|argument| argument.get_help().is_none());
            assert!(silent.is_none(), "{}: {silent:?}", command.get_name());
        }
    }
}
