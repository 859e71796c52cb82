//! Containers: what runtimes call their cgroups, and what they call their containers.

use std::process::{Command, Stdio};

/// The fewest characters of an id that stand for it.
const SHORTEST: usize = 12;

/// What runtimes put before the id in a cgroup's name under systemd: `docker-ID.scope`.
const PREFIXES: [&str; 5] = ["docker-", "libpod-", "cri-containerd-", "crio-", "nerdctl-"];

/// Whether a cgroup of this name is the container's of this id, or of an id that begins so.
pub(super) fn is_named(cgroup: &str, id: &str) -> bool {
    let name = cgroup.strip_suffix(".scope").unwrap_or(cgroup);
    let name = PREFIXES.iter().find_map(|prefix| name.strip_prefix(prefix)).unwrap_or(name);
    let is_id = |text: &str| text.len() >= SHORTEST && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    // Containers that were given their id by hand have it as a name.
    name == id || (is_id(id) && is_id(name) && name.starts_with(id))
}

/// The id of a container of this name, by the runtimes that are installed.
pub(super) fn id(name: &str) -> Option<String> {
    ["docker", "podman", "nerdctl"].into_iter().find_map(|runtime| {
        let mut inspect = Command::new(runtime);
        inspect.args(["inspect", "--type", "container", "--format", "{{.Id}}", "--", name]);
        let output = inspect.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
        let id = String::from_utf8(output.stdout).ok()?.trim().to_owned();
        (output.status.success() && !id.is_empty()).then_some(id)
    })
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
            format!("cri-containerd-{id}.scope"),
        ] {
            assert!(is_named(&cgroup, id) && is_named(&cgroup, &id[..12]), "{cgroup}");
            assert!(!is_named(&cgroup, &id[..11]) && !is_named(&cgroup, &id[1..13]), "{cgroup}");
        }
        assert!(
            is_named("web", "web") && !is_named("web-2", "web") && !is_named("docker-web-2.scope", "web")
        );
        assert!(!is_named("docker.service", "docker"));
    }
}
