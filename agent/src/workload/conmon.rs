//! conmon, which watches every container of podman's and CRI-O's and whose arguments say which one: the only place that
//! names all of them (podman's lists on disk lack those of `--rootfs`, and `podman inspect` waits for a container that is
//! being started).

use super::parent;
use std::{fs, path::Path};

/// How far above a hook its conmon is: there is the runtime between them, and perhaps a wrapper of it.
const HIGHEST: usize = 4;

/// What its arguments say of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Watched {
    id: String,
    name: String,
}

/// What the container is called that was started by an ancestor of this process.
pub(super) fn name(id: &str) -> Option<String> {
    let above = |pid: &u32| parent(*pid).filter(|pid| *pid > 1);
    let ancestors = std::iter::successors(Some(std::process::id()), above).skip(1).take(HIGHEST);
    let watched = ancestors.filter_map(watched).find(|watched| watched.id == id);
    watched.map(|watched| watched.name)
}

/// The id of a container that runs, by its name.
pub(super) fn id(name: &str) -> Option<String> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(watched).find(|watched| watched.name == name).map(|watched| watched.id)
}

fn watched(pid: u32) -> Option<Watched> {
    parse(&fs::read(format!("/proc/{pid}/cmdline")).ok()?)
}

/// Arguments that end with NUL (proc_pid_cmdline(5)).
fn parse(cmdline: &[u8]) -> Option<Watched> {
    let mut arguments = cmdline.split(|byte| *byte == 0).filter_map(|argument| str::from_utf8(argument).ok());
    let program = Path::new(arguments.next()?).file_name()?;
    if program != "conmon" {
        return None;
    }
    let arguments: Vec<&str> = arguments.collect();
    let value = |short: &str, long: &str| {
        let option = arguments.iter().position(|argument| [short, long].contains(argument))?;
        arguments.get(option + 1).map(|value| (*value).to_owned())
    };
    Some(Watched { id: value("-c", "--cid")?, name: value("-n", "--name")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_conmon_is_believed_and_only_if_it_tells_both() {
        let parsed = |line: &str| parse(line.replace(' ', "\0").as_bytes());
        let watched = Some(Watched { id: "3f1c".into(), name: "web".into() });
        let podman =
            "/usr/bin/conmon --api-version 1 -c 3f1c -u 3f1c -r /usr/bin/runc -b /b -n web --exit-dir /e ";
        assert_eq!(parsed(podman), watched);
        assert_eq!(parsed("conmon --cid 3f1c --name web"), watched);
        for line in ["", "sh -c 3f1c -n web", "conmon -c 3f1c", "conmon -n web -c", "/usr/bin/conmonrs"] {
            assert_eq!(parsed(line), None, "{line}");
        }
    }

    #[test]
    fn what_conmon_is_said_to_watch_stands_in_its_arguments() {
        let seeds: [&[u8]; 2] = [
            b"/usr/bin/conmon\0--api-version\x001\0-c\x003f1c\0-u\x003f1c\0-n\0web\0--exit-dir\0/e\0",
            b"conmon\0--cid\x003f1c\0--name\0web\0",
        ];
        fuzz::damaged!(seeds, ["\0", "-c", "-n", "--cid", "--name", "conmon", "/"], |input: &[u8]| {
            let Some(Watched { id, name }) = parse(input) else { return };
            let arguments: Vec<&[u8]> = input.split(|byte| *byte == 0).skip(1).collect();
            assert!([id, name].iter().all(|value| arguments.contains(&value.as_bytes())));
        });
    }
}
