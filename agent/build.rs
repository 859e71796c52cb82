//! Compiles the eBPF programs, for the agent to embed.

#[path = "../xtask/src/ebpf_toolchain.rs"]
mod ebpf_toolchain;

use std::{env, error::Error, fs, path::PathBuf};

const OBJECT: &str = "mesh-redirect-ebpf";

fn main() -> Result<(), Box<dyn Error>> {
    for path in ["../agent-ebpf", "../Cargo.lock", "../xtask/src/ebpf_toolchain.rs", "build.rs"] {
        println!("cargo:rerun-if-changed={path}");
    }
    println!("cargo:rerun-if-env-changed=PATH");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let arch = env::var("CARGO_CFG_TARGET_ARCH")?;
    let target = match env::var("CARGO_CFG_TARGET_ENDIAN")?.as_str() {
        "big" => "bpfeb-unknown-none",
        _ => "bpfel-unknown-none",
    };
    // A directory of its own: Cargo holds a lock on the one in use while this runs.
    let target_dir = out.join("target");
    let flags =
        [&format!("--cfg=bpf_target_arch=\"{arch}\""), "-Cdebuginfo=2", "-Clink-arg=--btf"].join("\x1f");
    let features = match env::var_os("CARGO_FEATURE_CHANGED_ABI") {
        Some(_) => "programs,changed-abi",
        None => "programs",
    };
    let mut cargo = ebpf_toolchain::find()?.cargo();
    cargo
        .args(["build", "--package", "agent-ebpf", "--features", features, "--bins", "--release"])
        .args(["-Z", "build-std=core", "--target", target, "--target-dir"])
        .arg(&target_dir)
        .env("CARGO_ENCODED_RUSTFLAGS", flags);
    let output = cargo.output().map_err(|error| format!("{cargo:?}: {error}"))?;
    if !output.status.success() {
        return Err(
            format!("{cargo:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)).into()
        );
    }
    fs::copy(target_dir.join(target).join("release").join(OBJECT), out.join(OBJECT))?;
    Ok(())
}
