//! Containers, started by a real runtime, whose hook is the agent's.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::agent::Agent;
use crate::host;
use crate::process::{Finished, Running};
use crate::sandbox::{Place, Sandbox};

/// A container whose only process is the tests' own program, on the sandbox's network and below its cgroup.
#[derive(Debug)]
pub struct Container<'s> {
    sandbox: &'s Sandbox,
    id: String,
    bundle: PathBuf,
}

impl<'s> Container<'s> {
    /// Prepares one that bears a name as containerd and nerdctl tell it.
    pub fn new(sandbox: &'s Sandbox, id: &str, name: &str, peer: &[&str]) -> Self {
        let bundle = sandbox.path("bundles").join(id);
        let rootfs = bundle.join("rootfs");
        fs::create_dir_all(&rootfs).expect("make a bundle");
        let args = [&["/peer"], peer].concat();
        let config = json!({
            "ociVersion": "1.0.2",
            "annotations": { "nerdctl/name": name },
            "root": { "path": "rootfs" },
            "mounts": mounts(&rootfs),
            "process": {
                "args": args,
                "cwd": "/",
                "user": { "uid": 0, "gid": 0 },
            },
            "hooks": { "createRuntime": [hook(sandbox)] },
            "linux": {
                "cgroupsPath": format!("{}/{id}", sandbox.cgroup_at("containers")),
                "namespaces": [{ "type": "mount" }, { "type": "pid" }],
            },
        });
        fs::write(bundle.join("config.json"), config.to_string()).expect("write a bundle's configuration");
        Self { sandbox, id: id.to_owned(), bundle }
    }

    /// Runs it from its start to its end.
    #[track_caller]
    pub fn run(&self) -> Finished {
        self.begin().finish()
    }

    /// Starts it, to be waited for later.
    #[track_caller]
    pub fn begin(&self) -> Running {
        let runc = self.sandbox.program(Place::Outside, "runc");
        let root = self.sandbox.path("runc");
        let runc = runc.args(["--root", &root.to_string_lossy(), "run"]);
        runc.args(["--bundle", &self.bundle.to_string_lossy(), &self.id]).begin()
    }
}

fn hook(sandbox: &Sandbox) -> Value {
    let arguments = ["mesh-redirect".to_owned()].into_iter().chain(Agent::hook(sandbox));
    json!({ "path": host::binary("mesh-redirect"), "args": arguments.collect::<Vec<_>>() })
}

/// The machine's own programs and libraries, and the tests' program.
fn mounts(rootfs: &Path) -> Vec<Value> {
    let bind = |from: &Path, to: &str| json!({ "type": "bind", "source": from, "destination": to, "options": ["rbind", "ro"] });
    let proc = json!({ "type": "proc", "source": "proc", "destination": "/proc" });
    let mut mounts = vec![proc, bind(&host::binary("peer"), "/peer")];
    for folder in ["/usr", "/lib", "/lib64"] {
        match fs::read_link(folder) {
            Ok(target) => {
                let link = rootfs.join(folder.trim_start_matches('/'));
                symlink(target, &link).expect("link a folder of libraries");
            }
            Err(_) => mounts.push(bind(Path::new(folder), folder)),
        }
    }
    mounts
}
