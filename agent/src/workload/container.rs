//! Containers: what runtimes call their cgroups, and what they call their containers.

use super::conmon;
use std::{
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

/// The fewest characters of an id that stand for it.
const SHORTEST: usize = 12;

/// What runtimes put before the id in a cgroup's name under systemd: `docker-ID.scope`.
const PREFIXES: [&str; 6] = ["docker-", "libpod-payload-", "libpod-", "cri-containerd-", "crio-", "nerdctl-"];

/// How long a runtime may take for an answer. One that starts the container just now may wait for our hook, and our hook for
/// the daemon.
const PATIENCE: Duration = Duration::from_secs(1);

/// Whether a cgroup of this name is the container's of this id, or of an id that begins so.
pub(super) fn is_named(cgroup: &str, id: &str) -> bool {
    let name = cgroup.strip_suffix(".scope").unwrap_or(cgroup);
    let name = PREFIXES.iter().find_map(|prefix| name.strip_prefix(prefix)).unwrap_or(name);
    let is_id = |text: &str| text.len() >= SHORTEST && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    // Containers that were given their id by hand have it as a name.
    name == id || (is_id(id) && is_id(name) && name.starts_with(id))
}

/// The id of a container of this name: of podman's and CRI-O's without asking, of others by their runtimes.
pub(super) fn id(name: &str) -> Option<String> {
    conmon::id(name).or_else(|| ["docker", "nerdctl"].into_iter().find_map(|runtime| inspect(runtime, name)))
}

fn inspect(runtime: &str, name: &str) -> Option<String> {
    let mut inspect = Command::new(runtime);
    inspect.args(["inspect", "--type", "container", "--format", "{{.Id}}", "--", name]);
    inspect.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = inspect.spawn().ok()?;
    let end = Instant::now() + PATIENCE;
    while child.try_wait().ok()?.is_none() {
        if Instant::now() >= end {
            let _ended_meanwhile = child.kill();
        }
        sleep(Duration::from_millis(10));
    }
    let output = child.wait_with_output().ok()?;
    let id = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (output.status.success() && !id.is_empty()).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_containers_cgroup_is_known_by_the_names_that_runtimes_give_it() {
        let id = "3f1c9a4d5e6b7c8d9e0f1a2b3c4d5e6f708192a3b4c5d6e7f8091a2b3c4d5e6f";
        for cgroup in [
            id.to_owned(),
            format!("docker-{id}.scope"),
            format!("libpod-{id}.scope"),
            format!("libpod-payload-{id}"),
            format!("cri-containerd-{id}.scope"),
        ] {
            assert!(is_named(&cgroup, id) && is_named(&cgroup, &id[..12]), "{cgroup}");
            assert!(!is_named(&cgroup, &id[..11]) && !is_named(&cgroup, &id[1..13]), "{cgroup}");
        }
        assert!(
            is_named("web", "web") && !is_named("web-2", "web") && !is_named("docker-web-2.scope", "web")
        );
        assert!(!is_named("docker.service", "docker") && !is_named(&format!("libpod-conmon-{id}.scope"), id));
    }
}
