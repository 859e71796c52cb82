//! Puts the product on a host, and takes it away again.

use crate::{
    build::{self, cargo, step},
    setup,
};
use anyhow::{Context as _, ensure};
use clap::Args;
use std::{
    fs::{self, Permissions},
    io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

const BINARIES: [&str; 2] = ["mesh-redirect", "mesh-proxy"];
const UNITS: [&str; 2] = ["mesh-redirect.service", "mesh-proxy.service"];
const CONFIGURATIONS: [&str; 2] = ["agent.yaml", "proxy.yaml"];
/// Shells, where they look for the completions of a program, below the prefix, and what stands before and after its name
/// there.
const COMPLETIONS: [(&str, &str, [&str; 2]); 3] = [
    ("bash", "share/bash-completion/completions", ["", ""]),
    ("zsh", "share/zsh/site-functions", ["_", ""]),
    ("fish", "share/fish/vendor_completions.d", ["", ".fish"]),
];
const MAN_DIR: &str = "share/man/man8";
const UNIT_DIR: &str = "/etc/systemd/system";
const CONFIGURATION_DIR: &str = "/etc/mesh-redirect";

/// Where on which host.
#[derive(Debug, Args)]
pub(crate) struct Place {
    /// Binaries go to PREFIX/bin
    #[arg(long, value_name = "DIR", default_value = "/usr/local")]
    prefix: PathBuf,
    /// The host's root directory, when it is not this host
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Install {
    #[command(flatten)]
    place: Place,
    /// Install binaries that were built before, and build none
    #[arg(long, value_name = "DIR")]
    bin_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Uninstall {
    #[command(flatten)]
    place: Place,
    /// Remove configuration files too that were edited
    #[arg(long)]
    purge: bool,
}

impl Place {
    /// A path as the host sees it, seen from here.
    fn at(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    fn check(&self) -> anyhow::Result<()> {
        ensure!(self.prefix.is_absolute(), "--prefix {}: expected an absolute path", self.prefix.display());
        ensure!(self.root.is_dir(), "--root {}: expected a directory", self.root.display());
        ensure!(nix::unistd::geteuid().is_root(), "installing needs root");
        Ok(())
    }

    fn binary(&self, name: &str) -> PathBuf {
        self.at(self.prefix.join("bin").join(name))
    }

    fn shared(&self, dir: &str) -> PathBuf {
        self.at(self.prefix.join(dir))
    }

    fn unit(&self, name: &str) -> PathBuf {
        self.at(Path::new(UNIT_DIR).join(name))
    }

    fn configuration(&self, name: &str) -> PathBuf {
        self.at(Path::new(CONFIGURATION_DIR).join(name))
    }

    /// Whether systemd manages the host, and the host is this one.
    fn has_systemd(&self) -> bool {
        self.is_here() && Path::new("/run/systemd/system").is_dir()
    }

    fn is_here(&self) -> bool {
        self.root == Path::new("/")
    }
}

impl Install {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        self.place.check()?;
        let binaries = match &self.bin_dir {
            Some(dir) => dir.clone(),
            None => built()?,
        };
        for name in BINARIES {
            let binary = binaries.join(name);
            let content = fs::read(&binary).with_context(|| format!("read {}", binary.display()))?;
            put(&self.place.binary(name), &content, 0o755)?;
        }
        for name in BINARIES {
            self.install_reference(name, &binaries.join(name))?;
        }
        for name in UNITS {
            let prefix = self.place.prefix.to_string_lossy();
            put(&self.place.unit(name), packaged(name)?.replace("@PREFIX@", &prefix).as_bytes(), 0o644)?;
        }
        for name in CONFIGURATIONS {
            let path = self.place.configuration(name);
            if path.exists() {
                println!("kept      {}", path.display());
            } else {
                put(&path, packaged(name)?.as_bytes(), 0o644)?;
            }
        }
        if self.place.has_systemd() {
            build::run(systemctl(&["daemon-reload"]))?;
        }
        println!("start it: systemctl enable --now mesh-redirect mesh-proxy");
        Ok(())
    }
}

impl Install {
    /// What the program says of itself: completions, and its manual.
    fn install_reference(&self, name: &str, program: &Path) -> anyhow::Result<()> {
        if Command::new(program).arg("--version").output().is_err() {
            println!("skipped   completions and manual: {} does not run here", program.display());
            return Ok(());
        }
        for (shell, dir, around) in COMPLETIONS {
            let script = said(program, &["completions", shell])?;
            put(&self.place.shared(dir).join(around.join(name)), &script, 0o644)?;
        }
        let dir = self.place.shared(MAN_DIR);
        fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        let written = said(program, &["man", "--dir", &dir.to_string_lossy()])?;
        for page in String::from_utf8_lossy(&written).lines() {
            println!("installed {page}");
        }
        Ok(())
    }
}

fn said(program: &Path, args: &[&str]) -> anyhow::Result<Vec<u8>> {
    let output = Command::new(program).args(args).output();
    let output = output.with_context(|| format!("run {}", program.display()))?;
    ensure!(
        output.status.success(),
        "{} {}: {}",
        program.display(),
        args.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(output.stdout)
}

fn built() -> anyhow::Result<PathBuf> {
    step("set-up", || setup::ensure(setup::For::Build))?;
    step("build", || build::run(cargo(&["build", "--release", "--locked", "-p", "agent", "-p", "proxy"])))?;
    Ok(build::binaries("release"))
}

impl Uninstall {
    /// What is steered is released first: with the daemon gone nobody else would.
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        self.place.check()?;
        let agent = self.place.binary("mesh-redirect");
        if self.place.has_systemd() {
            // The units may not be there, or not run.
            let _ = systemctl(&["disable", "--now", "--quiet", "mesh-redirect"]).status();
        }
        if self.place.is_here() && agent.exists() {
            let mut cleanup = Command::new(&agent);
            cleanup.arg("cleanup");
            build::run(cleanup).context("nothing was removed; what is steered stays so")?;
        }
        if self.place.has_systemd() {
            let _ = systemctl(&["disable", "--now", "--quiet", "mesh-proxy"]).status();
        }
        for path in BINARIES
            .map(|name| self.place.binary(name))
            .into_iter()
            .chain(UNITS.map(|name| self.place.unit(name)))
        {
            remove(&path)?;
        }
        self.remove_reference()?;
        self.remove_configuration()?;
        if self.place.has_systemd() {
            build::run(systemctl(&["daemon-reload"]))?;
        }
        Ok(())
    }

    fn remove_reference(&self) -> anyhow::Result<()> {
        for (_, dir, around) in COMPLETIONS {
            BINARIES.iter().try_for_each(|name| remove(&self.place.shared(dir).join(around.join(name))))?;
        }
        for page in fs::read_dir(self.place.shared(MAN_DIR)).into_iter().flatten().flatten() {
            let name = page.file_name();
            let name = name.to_string_lossy();
            let of =
                |program: &&str| name.strip_prefix(program).is_some_and(|rest| rest.starts_with(['.', '-']));
            if BINARIES.iter().any(of) {
                remove(&page.path())?;
            }
        }
        // Directories stay while anything is in them.
        let _ = fs::remove_dir(self.place.shared(MAN_DIR));
        for (_, dir, _) in COMPLETIONS {
            let (dir, above) = (self.place.shared(dir), self.place.shared(dir).with_file_name(""));
            let _ = fs::remove_dir(dir).and_then(|()| fs::remove_dir(above));
        }
        Ok(())
    }

    fn remove_configuration(&self) -> anyhow::Result<()> {
        for name in CONFIGURATIONS {
            let path = self.place.configuration(name);
            let edited =
                fs::read_to_string(&path).is_ok_and(|text| packaged(name).is_ok_and(|ours| ours != text));
            if edited && !self.purge {
                println!("kept      {} (edited; --purge removes it)", path.display());
            } else {
                remove(&path)?;
            }
        }
        // It stays while anything is in it.
        let _ = fs::remove_dir(self.place.at(CONFIGURATION_DIR));
        Ok(())
    }
}

fn packaged(name: &str) -> anyhow::Result<String> {
    let path = build::workspace().join("packaging").join(name);
    fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}

/// Replaces a file whole, also one that is being executed.
fn put(path: &Path, content: &[u8], mode: u32) -> anyhow::Result<()> {
    let next = path.with_extension("next");
    let written = path.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| {
        fs::write(&next, content)?;
        fs::set_permissions(&next, Permissions::from_mode(mode))?;
        fs::rename(&next, path)
    });
    written.with_context(|| format!("install {}", path.display()))?;
    println!("installed {}", path.display());
    Ok(())
}

fn remove(path: &Path) -> anyhow::Result<()> {
    match fs::remove_file(path) {
        Ok(()) => println!("removed   {}", path.display()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("remove {}", path.display())),
    }
    Ok(())
}

fn systemctl(args: &[&str]) -> Command {
    let mut command = Command::new("systemctl");
    command.args(args);
    command
}
