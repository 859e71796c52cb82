//! Binaries under test on a root file system with an older C library than this machine's.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::host::{binary, tool};

const BINARIES: [&str; 3] = ["mesh-redirect", "mesh-proxy", "peer"];
/// Where this machine's loader and libraries are there.
const LIBRARIES: &str = "/opt/libraries";

/// Copies the binaries to a folder, and what they load to the root, where they then find it.
#[track_caller]
pub(crate) fn bring_libraries(root: &Path, to: &Path) {
    let libraries = root.join(LIBRARIES.trim_start_matches('/'));
    for folder in [&libraries, to] {
        fs::create_dir_all(folder).unwrap_or_else(|error| panic!("make {}: {error}", folder.display()));
    }
    for name in BINARIES {
        let (from, copy) = (binary(name).display().to_string(), to.join(name).display().to_string());
        tool("cp", &[&from, &copy]);
        for library in loaded(&from) {
            tool("cp", &["--dereference", &library, &libraries.to_string_lossy()]);
        }
        let loader = tool("patchelf", &["--print-interpreter", &copy]);
        let loader = Path::new(loader.trim()).file_name().unwrap_or_default().to_string_lossy();
        let loader = format!("{LIBRARIES}/{loader}");
        tool("patchelf", &["--set-interpreter", &loader, "--set-rpath", LIBRARIES, &copy]);
    }
}

/// Paths of the loader and of every library: ldd says `libc.so.6 => /lib/libc.so.6 (0x…)`, and of the loader its path alone.
fn loaded(binary: &str) -> BTreeSet<String> {
    let said = tool("ldd", &[binary]);
    said.split_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned).collect()
}
