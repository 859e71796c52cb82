//! A container that is about to start, as its runtime tells a hook of it (OCI runtime specification, "State" and
//! "Hooks"): which one it is, and which cgroup holds it.

use super::{conmon, container::is_named};
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read},
    path::Path,
};

/// Bytes of a state. Annotations are most of it, and Kubernetes allows 256 KiB of them.
const MAX_STATE: u64 = 1 << 20;
/// Bytes of what Docker keeps of a container.
const MAX_DOCKER: u64 = 4 << 20;
/// Longest id: a cgroup's directory and a link bear it.
const MAX_ID: usize = 200;

/// Annotations by which runtimes tell the name: containerd's and CRI-O's for Kubernetes, and nerdctl's.
const NAMES: [&str; 4] = [
    "io.kubernetes.cri.container-name",
    "io.kubernetes.container.name",
    "io.kubernetes.cri-o.Name",
    "nerdctl/name",
];

/// A container whose first process waits for the hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Starting {
    pub(crate) id: String,
    /// Its first process, in the hook's namespace.
    pub(crate) pid: i32,
    annotations: BTreeMap<String, String>,
}

/// A state that is not one.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotAState {
    /// It cannot be read.
    #[error("read the container's state from standard input: {0}")]
    Read(#[from] io::Error),
    /// It does not end where it should.
    #[error("read the container's state from standard input: it is larger than {MAX_STATE} bytes")]
    TooLarge,
    /// It is something else.
    #[error(
        "read the container's state from standard input: {0}; expected what an OCI runtime gives to its hooks"
    )]
    Parse(String),
}

/// The state as it is written; a runtime may say more.
#[derive(Deserialize)]
struct RawState {
    #[serde(rename = "ociVersion")]
    version: String,
    id: String,
    pid: i32,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

impl Starting {
    /// Reads a state to its end.
    pub(crate) fn read(state: impl Read) -> Result<Self, NotAState> {
        let mut text = Vec::new();
        state.take(MAX_STATE + 1).read_to_end(&mut text)?;
        if text.len() as u64 > MAX_STATE {
            return Err(NotAState::TooLarge);
        }
        Self::parse(&text).map_err(NotAState::Parse)
    }

    fn parse(text: &[u8]) -> Result<Self, String> {
        let raw: RawState = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        let RawState { version, id, pid, annotations } = raw;
        if version.split('.').next() != Some("1") {
            return Err(format!("its ociVersion is `{}`", version.escape_debug()));
        }
        let allowed = |c: char| c.is_ascii_alphanumeric() || "_+-.".contains(c);
        if id.is_empty() || id.len() > MAX_ID || id.starts_with('.') || !id.chars().all(allowed) {
            return Err(format!("`{}` is not a container's id", id.escape_debug()));
        }
        if pid <= 0 {
            return Err(format!("container {id} has no process (pid {pid})"));
        }
        Ok(Self { id, pid, annotations })
    }

    /// Whether it is the container that is wanted: by its id, the beginning of it, or a name.
    pub(crate) fn is(&self, wanted: &str, names: &[String]) -> bool {
        is_named(&self.id, wanted) || names.iter().any(|name| name == wanted)
    }

    /// What it is called, as far as that can be known without asking its runtime, which waits for the hook.
    pub(crate) fn names(&self) -> Vec<String> {
        let annotated = NAMES.iter().filter_map(|key| self.annotations.get(*key).cloned());
        annotated.chain(conmon::name(&self.id)).chain(docker_name(&self.id)).collect()
    }
}

fn docker_name(id: &str) -> Option<String> {
    let file =
        fs::File::open(Path::new("/var/lib/docker/containers").join(id).join("config.v2.json")).ok()?;
    let mut text = Vec::new();
    file.take(MAX_DOCKER).read_to_end(&mut text).ok()?;
    named_by_docker(&text)
}

fn named_by_docker(config: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct DockerContainer {
        name: String,
    }
    let DockerContainer { name } = serde_json::from_slice(config).ok()?;
    Some(name.strip_prefix('/').unwrap_or(&name).to_owned())
}

/// The path of the cgroup that holds all of a container: the outermost that bears its id, since a runtime may put the
/// first process into one below it, else the one that the process is in.
///
/// None where the container was given no cgroup of its own: the hook is in that of the runtime or of who called it.
pub(crate) fn cgroup<'p>(of_process: &'p str, of_hook: &str, id: &str) -> Option<&'p str> {
    let ends = of_process.match_indices('/').map(|(at, _)| at).skip(1).chain([of_process.len()]);
    let mut paths = ends.map(|end| &of_process[..end]);
    let bears_id = |path: &&str| path.rsplit('/').next().is_some_and(|name| is_named(name, id));
    let found = paths.find(bears_id).unwrap_or(of_process);
    let holds_hook = Path::new(of_hook).starts_with(found);
    (!holds_hook).then_some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "3f1c9a4d5e6b7c8d9e0f1a2b3c4d5e6f708192a3b4c5d6e7f8091a2b3c4d5e6f";

    #[test]
    fn a_state_needs_a_version_an_id_and_a_process_and_may_say_more() {
        let state = format!(
            r#"{{"ociVersion":"1.0.2-dev","id":"{ID}","status":"creating","pid":7,"bundle":"/b","new":[1]}}"#
        );
        let expected = Starting { id: ID.into(), pid: 7, annotations: BTreeMap::new() };
        assert_eq!(Starting::read(state.as_bytes()).unwrap(), expected);
        for (state, reason) in [
            ("", "EOF"),
            ("garbage", "expected value"),
            ("[]", "expected"),
            (r#"{"id":"a","pid":7}"#, "missing field `ociVersion`"),
            (r#"{"ociVersion":"2.0.0","id":"a","pid":7}"#, "its ociVersion is `2.0.0`"),
            (r#"{"ociVersion":"1.0.0","id":"a"}"#, "missing field `pid`"),
            (r#"{"ociVersion":"1.0.0","id":"a","pid":0}"#, "no process"),
            (r#"{"ociVersion":"1.0.0","id":"../a","pid":7}"#, "not a container's id"),
            (r#"{"ociVersion":"1.0.0","id":"","pid":7}"#, "not a container's id"),
            (r#"{"ociVersion":"1.0.0","id":"a","pid":7,"annotations":{"a":1}}"#, "expected a string"),
        ] {
            let message = Starting::read(state.as_bytes()).unwrap_err().to_string();
            assert!(message.contains(reason) && message.contains("standard input"), "{state}: {message}");
        }
    }

    #[test]
    fn a_state_without_end_is_not_read_to_its_end() {
        let message = Starting::read(io::repeat(b' ')).unwrap_err().to_string();
        assert!(message.contains("larger than 1048576 bytes"), "{message}");
    }

    #[test]
    fn a_container_is_known_by_its_id_the_beginning_of_it_and_its_names() {
        let annotations = NAMES.map(|key| (key.to_owned(), format!("by {key}"))).into();
        let starting = Starting { id: ID.into(), pid: 7, annotations };
        let names = starting.names();
        for wanted in [ID, &ID[..12], "by nerdctl/name", "by io.kubernetes.cri.container-name"] {
            assert!(starting.is(wanted, &names), "{wanted}");
        }
        for wanted in ["", &ID[..11], &ID[1..13], "by nerdctl/nam", "docker-"] {
            assert!(!starting.is(wanted, &names), "{wanted}");
        }
        assert_eq!(named_by_docker(br#"{"StreamConfig":{},"ID":"x","Name":"/web-1"}"#), Some("web-1".into()));
        assert_eq!(named_by_docker(b"{}"), None);
    }

    #[test]
    fn the_cgroup_is_the_outermost_that_is_the_containers_and_never_the_runtimes() {
        let of = |process: &str, hook: &str| cgroup(&process.replace("ID", ID), hook, ID).map(str::to_owned);
        for (process, expected) in [
            ("/system.slice/docker-ID.scope", "/system.slice/docker-ID.scope"),
            ("/docker/ID", "/docker/ID"),
            ("/machine.slice/libpod-ID.scope/container", "/machine.slice/libpod-ID.scope"),
            ("/machine.slice/libpod-ID.scope/init.scope", "/machine.slice/libpod-ID.scope"),
            ("/libpod_parent/libpod-ID", "/libpod_parent/libpod-ID"),
            ("/system.slice/web.service/libpod-payload-ID", "/system.slice/web.service/libpod-payload-ID"),
            (
                "/kubepods.slice/kubepods-pod1.slice/crio-ID.scope",
                "/kubepods.slice/kubepods-pod1.slice/crio-ID.scope",
            ),
            ("/where/somebody/wanted/it", "/where/somebody/wanted/it"),
        ] {
            for hook in ["/", "/system.slice/docker.service", "/where/somebody/wanted/it-not"] {
                assert_eq!(of(process, hook), Some(expected.replace("ID", ID)), "{process}");
            }
        }
        for (process, hook) in [
            ("/", "/"),
            ("/", "/system.slice/docker.service"),
            ("/user.slice/a.scope", "/user.slice/a.scope"),
            ("/user.slice/a.scope", "/user.slice/a.scope/b"),
        ] {
            assert_eq!(of(process, hook), None, "{process}");
        }
    }

    #[test]
    fn a_state_that_is_taken_names_a_process_and_an_id_that_is_one_part_of_a_path() {
        let state = format!(
            r#"{{"ociVersion":"1.0.2-dev","id":"{ID}","status":"creating","pid":7,"bundle":"/b",
                "annotations":{{"nerdctl/name":"web","io.kubernetes.cri.container-name":"app"}}}}"#
        );
        let seeds = [state.as_bytes(), br#"{"ociVersion":"1.0.0","id":"a","pid":7}"#];
        let words = [
            "\"",
            ":",
            ",",
            "{",
            "}",
            "null",
            "../",
            "\\u0000",
            "-7",
            "2147483648",
            "1.",
            "\"id\":",
            "\"annotations\":",
        ];
        fuzz::damaged!(seeds, words, |input: &[u8]| {
            let Ok(Starting { id, pid, .. }) = Starting::parse(input) else { return };
            assert!(pid > 0 && !id.is_empty() && id.len() <= MAX_ID);
            assert_eq!(Path::new("/a").join(&id).parent(), Some(Path::new("/a")));
        });
    }

    #[test]
    fn the_cgroup_of_a_container_holds_its_process_and_never_the_hook() {
        let process = format!("/kubepods.slice/kubepods-pod1.slice/crio-{ID}.scope/init.scope");
        let short = format!("/docker/{ID}\n/system.slice/docker.service");
        let seeds = [process.as_bytes(), short.as_bytes(), b"/\n/"];
        fuzz::damaged!(seeds, ["/", "//", "/..", ID, "docker-", ".scope", "\n"], |input: &[u8]| {
            let text = String::from_utf8_lossy(input);
            let (process, hook) = text.split_once('\n').unwrap_or((&text, "/"));
            let Some(found) = cgroup(process, hook, ID) else { return };
            assert!(Path::new(process).starts_with(found) && !Path::new(hook).starts_with(found), "{found}");
        });
    }

    #[test]
    fn what_docker_keeps_names_a_container_or_nothing() {
        let seeds: [&[u8]; 2] = [br#"{"StreamConfig":{},"ID":"x","Name":"/web-1"}"#, br#"{"Name":"web"}"#];
        fuzz::damaged!(
            seeds,
            ["\"Name\"", "\"", ":", "{", "}", "null", "//", "\\u0000"],
            |input: &[u8]| {
                let Some(name) = named_by_docker(input) else { return };
                assert!(name.len() <= input.len());
            }
        );
    }
}
