//! Finds the toolchain that compiles the eBPF programs. The agent's build script includes this file, so it stands alone.

use std::{
    env, fmt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// A compiler with the sources of `core`, and a linker for BPF.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Toolchain {
    compiler: Compiler,
    linker: PathBuf,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Compiler {
    /// rustup's nightly with rust-src.
    RustupNightly,
    /// Debian's rustc-web, cargo-web and rust-web-src: a stable compiler, asked to be lenient.
    Debian,
}

/// What is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Missing {
    /// A compiler with the sources of `core`.
    pub(crate) compiler: bool,
    /// The linker.
    pub(crate) linker: bool,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the eBPF programs cannot be compiled: ")?;
        if self.compiler {
            f.write_str("no compiler with the sources of core (rustup's nightly with rust-src, or Debian's rustc-web, cargo-web and rust-web-src); ")?;
        }
        if self.linker {
            f.write_str("no bpf-linker in PATH or Cargo's bin directory; ")?;
        }
        f.write_str("run `cargo xtask setup`")
    }
}

impl std::error::Error for Missing {}

/// Finds one, Debian's first: a linker reads what compilers of its own and of older LLVM versions write, and Debian's is
/// never the newest.
pub(crate) fn find() -> Result<Toolchain, Missing> {
    let compiler = if debian_has_sources() {
        Some(Compiler::Debian)
    } else {
        nightly_has_sources().then_some(Compiler::RustupNightly)
    };
    match (compiler, linker()) {
        (Some(compiler), Some(linker)) => Ok(Toolchain { compiler, linker }),
        (compiler, linker) => Err(Missing { compiler: compiler.is_none(), linker: linker.is_none() }),
    }
}

impl Toolchain {
    /// A `cargo` of this toolchain, free of what an outer Cargo has put into the environment.
    pub(crate) fn cargo(&self) -> Command {
        let mut command = match self.compiler {
            Compiler::RustupNightly => {
                let mut command = Command::new("rustup");
                command.args(["run", "nightly", "cargo"]);
                command
            }
            Compiler::Debian => Command::new("/usr/bin/cargo"),
        };
        for (name, _) in env::vars_os() {
            let text = name.to_string_lossy();
            let inherited = ["RUSTC", "RUSTDOC", "RUSTUP_TOOLCHAIN", "RUSTFLAGS"].contains(&&*text)
                || text.starts_with("RUSTC_")
                || (text.starts_with("CARGO") && text != "CARGO_HOME" && text != "CARGO_NET_OFFLINE");
            if inherited {
                command.env_remove(name);
            }
        }
        if self.compiler == Compiler::Debian {
            command.env("RUSTC", "/usr/bin/rustc").env("RUSTC_BOOTSTRAP", "1");
        }
        let linker_dir = self.linker.parent().map(Path::to_owned);
        let path = env::var_os("PATH").unwrap_or_default();
        if let Ok(path) = env::join_paths(linker_dir.into_iter().chain(env::split_paths(&path))) {
            command.env("PATH", path);
        }
        command
    }
}

fn nightly_has_sources() -> bool {
    let sysroot = Command::new("rustup")
        .args(["run", "nightly", "rustc", "--print", "sysroot"])
        .env_remove("RUSTUP_TOOLCHAIN")
        .stderr(Stdio::null())
        .output();
    sysroot.is_ok_and(|output| {
        let sysroot = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        output.status.success() && Path::new(&sysroot).join("lib/rustlib/src/rust/library/core").is_dir()
    })
}

fn debian_has_sources() -> bool {
    let present = |path: &str| Path::new(path).exists();
    present("/usr/bin/cargo")
        && present("/usr/bin/rustc")
        && present("/usr/lib/rustlib/src/rust/library/core")
}

fn linker() -> Option<PathBuf> {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cargo")));
    let path = env::var_os("PATH").unwrap_or_default();
    let mut dirs = env::split_paths(&path).chain(home.map(|home| home.join("bin")));
    dirs.find_map(|dir| Some(dir.join("bpf-linker")).filter(|path| path.is_file()))
}
