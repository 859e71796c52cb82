//! `cleanup` and the journal that it goes by, whatever became of either; and files of ours that somebody has tampered with.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tests::{Agent, Finished, Footprint, Mesh, Mode, ORIGIN, Place, Sandbox, Snapshot, ask, eventually};

scenarios![everywhere:
    cleanup_tells_what_it_removed,
    cleanup_finds_what_is_no_longer_where_the_configuration_says,
    cleanup_refuses_while_a_daemon_runs_whose_directory_has_moved,
    cleanup_needs_no_journal,
    cleanup_needs_no_configuration,
    a_journal_of_a_later_version_is_done_as_far_as_it_is_known,
    a_journal_that_lies_makes_cleanup_remove_nobody_elses,
    a_state_that_is_no_file_of_ours_is_refused_and_not_followed,
    a_journal_that_is_no_file_of_ours_is_not_followed,
    what_others_put_into_our_directories_stays,
];
scenarios![only ebpf:
    a_cgroup_that_vanishes_while_it_is_attached_to_is_no_error,
    steps_before_starts_follow_the_configuration,
    a_unit_whose_step_cannot_be_written_is_not_enabled,
];

fn cleanup_tells_what_it_removed(sandbox: &Sandbox) {
    let before = Snapshot::of(sandbox);
    let mesh = Mesh::enabled(sandbox, "");
    let before = known(before, sandbox);
    mesh.agent.sigkill();
    let cleaned = Agent::command(sandbox, &["cleanup", "--json"]);
    let said: Value = serde_json::from_str(cleaned.ok()).expect("JSON");
    let kinds: Vec<&str> = said["removed"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|thing| thing["kind"].as_str())
        .collect();
    let steering = match sandbox.mode {
        Mode::Ebpf => "pins",
        Mode::Nftables => "table",
        Mode::Hosts => "hosts",
    };
    assert_eq!(
        (kinds, &said["left"], &said["version"]),
        (vec![steering, "run", "state"], &json!([]), &json!(1))
    );
    is_as(sandbox, &before);
    let again = Agent::command(sandbox, &["cleanup"]);
    assert!(again.ok().ends_with("nothing of mesh-redirect is left on this host"), "{again:?}");
}

fn cleanup_finds_what_is_no_longer_where_the_configuration_says(sandbox: &Sandbox) {
    let before = Snapshot::of(sandbox);
    let mesh = Mesh::enabled(sandbox, WEB);
    mesh.agent.enable("web");
    let before = known(before, sandbox);
    mesh.agent.sigkill();
    move_paths(sandbox);
    Agent::command(sandbox, &["cleanup"]).ok();
    is_as(sandbox, &before);
    let moved = ["run-2", "hosts-2", "hooks-2"].map(|name| sandbox.path(name)).into_iter();
    let there: Vec<PathBuf> = moved.filter(|path| path.exists()).collect();
    assert!(there.is_empty(), "{there:?}");
}

fn cleanup_refuses_while_a_daemon_runs_whose_directory_has_moved(sandbox: &Sandbox) {
    let _mesh = Mesh::enabled(sandbox, "");
    let before = Snapshot::of(sandbox);
    move_paths(sandbox);
    let refused = Agent::command(sandbox, &["cleanup"]);
    assert!(refused.failed_with(1).contains("a daemon is running"), "{refused:?}");
    assert!(Snapshot::of(sandbox).differences(&before).is_empty());
}

/// A service that is a container, whose hook is one thing more to find.
const WEB: &str = "  web: { container: web }\n";

/// Everything but the state is elsewhere from now on.
fn move_paths(sandbox: &Sandbox) {
    let mut yaml = Agent::yaml(sandbox, WEB);
    let pins = sandbox.pins().display().to_string();
    yaml = yaml.replace(&pins, &format!("{pins}-2"));
    for (from, to) in [("run", "run-2"), ("hosts", "hosts-2"), ("hooks.d", "hooks-2")] {
        let [from, to] = [from, to].map(|name| sandbox.path(name).display().to_string());
        yaml = yaml.replace(&format!(": {from}\n"), &format!(": {to}\n"));
    }
    fs::write(sandbox.path("agent.yaml"), yaml).expect("write agent.yaml");
}

fn cleanup_needs_no_journal(sandbox: &Sandbox) {
    let before = Snapshot::of(sandbox);
    let mesh = Mesh::start(sandbox, WEB);
    let before = known(before, sandbox);
    mesh.agent.stop();
    let theirs = sandbox.path("theirs");
    fs::write(&theirs, "theirs").expect("write");
    for damage in DAMAGE {
        let agent = Agent::restart(sandbox);
        agent.enable_all(&["shop".to_owned(), "web".to_owned()]);
        agent.sigkill();
        damage.done_to(&journal(sandbox), &theirs);
        let cleaned = Agent::command(sandbox, &["cleanup"]);
        if damage == Damage::Folder {
            assert!(cleaned.stdout.contains("left    journal") && !cleaned.succeeded(), "{cleaned:?}");
            fs::remove_dir(journal(sandbox))
                .and_then(|()| fs::remove_dir(sandbox.path("state")))
                .expect("mend");
        } else {
            let says_so = cleaned.ok().contains("journal.json");
            assert_eq!(says_so, damage != Damage::Removed, "{damage:?}: {cleaned:?}");
        }
        is_as(sandbox, &before);
        assert_eq!(fs::read_to_string(&theirs).expect("theirs"), "theirs", "{damage:?}");
    }
}

/// The journal is then looked for where it is by default.
fn cleanup_needs_no_configuration(sandbox: &Sandbox) {
    // Where things are by default is the sandbox too.
    let script = r#"mount --bind "$0" /sys/fs/bpf; mount --bind "$1" /etc/hosts; shift; exec "$@""#;
    let [agent, config, hosts, pins] =
        [&tests::binary("mesh-redirect"), &sandbox.path("agent.yaml"), &sandbox.hosts(), sandbox.pins()]
            .map(|path| path.display().to_string());
    fs::create_dir(sandbox.pins()).expect("make a folder on bpffs");
    let run = |args: &[&str]| {
        let shell = sandbox.with_systemd(Place::Outside, "sh").args(["-ec", script, &pins, &hosts]);
        shell.args([&agent, "--config", &config]).args(args)
    };
    let own = sandbox.path("state").display().to_string();
    let yaml = Agent::yaml(sandbox, TILL).replace(&own, "/var/lib/mesh-redirect");
    let yaml = yaml.replace(&pins, "/sys/fs/bpf/mesh-redirect");
    fs::write(sandbox.path("agent.yaml"), yaml).expect("write agent.yaml");
    sandbox.program_in("till", "true").run().ok();
    run(&["check"]).run();
    let before = Snapshot::of(sandbox);
    let mut daemon = run(&["run"]).serve(sandbox.path("agent.log"));
    daemon.wait_until(|_| run(&["status"]).run().has_status());
    run(&["enable", "shop", "till"]).run().ok();
    assert!(sandbox.path("units/till.service.d/50-mesh-redirect.conf").exists());
    daemon.signal(nix::sys::signal::Signal::SIGKILL);
    daemon.ended();

    fs::write(sandbox.path("agent.yaml"), "mode: [").expect("spoil agent.yaml");
    let cleaned = run(&["cleanup"]).run();
    assert!(
        cleaned.ok().contains("agent.yaml:1") && cleaned.ok().contains("by the journal in /var/lib"),
        "{cleaned:?}"
    );
    is_as(sandbox, &before);
}

fn a_journal_of_a_later_version_is_done_as_far_as_it_is_known(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    mesh.agent.sigkill();
    let mut noted = read_journal(sandbox);
    noted["version"] = json!(2);
    noted["artefacts"].as_array_mut().expect("a list").push(json!({"kind": "dam", "river": "Elbe"}));
    fs::write(journal(sandbox), noted.to_string()).expect("write");

    let cleaned = Agent::command(sandbox, &["cleanup"]);
    cleaned.failed_with(1);
    let says = |what: &str| assert!(cleaned.stdout.contains(what), "{what}: {cleaned:?}");
    says("left    dam {\"kind\":\"dam\",\"river\":\"Elbe\"}: this version does not know it");
    says("of the version that made it");
    assert_eq!(Footprint::of(sandbox), Footprint::default());
    let left = read_journal(sandbox);
    assert_eq!(left, json!({"version": 2, "artefacts": [{"kind": "dam", "river": "Elbe"}]}));
    // A daemon of this version leaves it be too.
    let agent = Agent::restart(sandbox);
    agent.enable("shop");
    agent.stop();
    assert!(fs::read_to_string(journal(sandbox)).expect("the journal").contains("Elbe"));
}

fn a_journal_that_lies_makes_cleanup_remove_nobody_elses(sandbox: &Sandbox) {
    Agent::start(sandbox, "").stop();
    let theirs = sandbox.path("hooks.d/theirs");
    let put = |name: &str, text: &str| {
        let path = theirs.join(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("make a folder");
        fs::write(&path, text).expect("write");
        path
    };
    let pinned = sandbox.pins().join("theirs");
    fs::create_dir_all(pinned.join("v3/maps/inner")).expect("make a folder on bpffs");
    let hosts = put("etc-hosts", "127.0.0.1 localhost\n127.66.1.1 theirs\n");
    let hook = put("50-mesh-redirect.json", r#"{"hook": {"args": ["theirs", "attach", "--oci"]}}"#);
    let drop_in = put("shop.service.d/50-mesh-redirect.conf", "[Service]\nExecStartPre=/bin/true\n");
    let other = put("shop.service.d/override.conf", "# Written by mesh-redirect, or so it says\n");
    put("v3/maps/MR_RULES", "a file");
    put("agent.lock", "not a process id");
    put("agent.sock", "no socket");
    put("containers/shop/file", "no link");
    let _socket = UnixListener::bind(theirs.join("other.sock")).expect("bind");
    let outside = sandbox.cgroup(Place::Outside);
    sandbox.program(Place::Outside, "true").run().ok();
    let before = Snapshot::of(sandbox);
    let lies = json!([
        {"kind": "pins", "dir": theirs}, {"kind": "pins", "dir": pinned}, {"kind": "pins", "dir": "/"},
        {"kind": "hosts", "file": hosts}, {"kind": "hosts", "file": theirs}, {"kind": "hosts", "file": "/dev/null"},
        {"kind": "hook", "file": hook}, {"kind": "hook", "file": other}, {"kind": "hook", "file": ""},
        {"kind": "drop-in", "file": drop_in}, {"kind": "drop-in", "file": other}, {"kind": "drop-in", "file": "/"},
        {"kind": "cgroup", "path": outside}, {"kind": "cgroup", "path": format!("/mesh-redirect/..{outside}")},
        {"kind": "cgroup", "path": ""}, {"kind": "table", "namespace": 1}, {"kind": "run", "dir": theirs},
    ]);
    fs::write(journal(sandbox), json!({"version": 1, "artefacts": lies}).to_string()).expect("write");
    Agent::command(sandbox, &["cleanup"]);
    let ours = [sandbox.path("run"), sandbox.path("state")].map(|path| path.display().to_string());
    let changed = Snapshot::of(sandbox).differences(&before);
    let theirs: Vec<&String> =
        changed.iter().filter(|line| !ours.iter().any(|ours| line.starts_with(ours.as_str()))).collect();
    assert!(theirs.is_empty(), "{theirs:#?}");
}

fn a_state_that_is_no_file_of_ours_is_refused_and_not_followed(sandbox: &Sandbox) {
    let before = Snapshot::of(sandbox);
    let mesh = Mesh::start(sandbox, "");
    let before = known(before, sandbox);
    mesh.agent.stop();
    let (state, theirs) = (sandbox.path("state/enabled.json"), sandbox.path("theirs"));
    fs::write(&theirs, r#"{"version": 1, "services": {}}"#).expect("write");
    for damage in DAMAGE.into_iter().filter(|damage| *damage != Damage::Removed) {
        let agent = Agent::restart(sandbox);
        agent.enable("shop");
        agent.stop();
        let steering = Footprint::of(sandbox);
        damage.done_to(&state, &theirs);
        let refused = Agent::command(sandbox, &["run"]);
        assert!(refused.failed_with(1).contains("enabled.json"), "{damage:?}: {refused:?}");
        assert_eq!(Footprint::of(sandbox), steering, "{damage:?}");
        let cleaned = Agent::command(sandbox, &["cleanup"]);
        if damage == Damage::Folder {
            assert!(cleaned.stdout.contains("left    state") && !cleaned.succeeded(), "{cleaned:?}");
            fs::remove_dir(&state).and_then(|()| fs::remove_dir(sandbox.path("state"))).expect("mend");
        } else {
            cleaned.ok();
        }
        is_as(sandbox, &before);
        assert!(fs::read_to_string(&theirs).expect("theirs").starts_with(r#"{"version""#), "{damage:?}");
    }
}

fn a_journal_that_is_no_file_of_ours_is_not_followed(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    mesh.agent.stop();
    let (path, theirs) = (journal(sandbox), sandbox.path("theirs"));
    fs::write(&theirs, "theirs").expect("write");
    for damage in DAMAGE.into_iter().filter(|damage| *damage != Damage::Folder) {
        damage.done_to(&path, &theirs);
        Agent::restart(sandbox).stop();
        let noted = read_journal(sandbox).to_string();
        let steering = ["pins", "table", "hosts"].iter().any(|kind| noted.contains(kind));
        assert!(steering && noted.contains("run"), "{damage:?}: {noted}");
        assert_eq!(fs::read_to_string(&theirs).expect("theirs"), "theirs", "{damage:?}");
    }
    let steering = Footprint::of(sandbox);
    Damage::Folder.done_to(&path, &theirs);
    let refused = Agent::command(sandbox, &["run"]);
    assert!(refused.failed_with(1).contains("journal.json"), "{refused:?}");
    assert_eq!(Footprint::of(sandbox), steering);
}

fn what_others_put_into_our_directories_stays(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    let mut theirs = Vec::new();
    let mut folders = vec![sandbox.path("run"), sandbox.path("state")];
    if sandbox.mode == Mode::Ebpf {
        folders.extend(folders_below(sandbox.pins()));
    }
    for folder in folders {
        // On bpffs there are no files.
        let path = folder.join("theirs");
        fs::create_dir(&path).expect("make a folder");
        theirs.push(path);
    }
    mesh.agent.disable("shop");
    ask(sandbox, Place::Shop, &format!("{ORIGIN}:8080")).is("origin");
    mesh.agent.enable("shop");
    mesh.agent.stop();
    let agent = Agent::restart(sandbox);
    agent.sigkill();
    let cleaned = Agent::command(sandbox, &["cleanup"]);
    assert!(cleaned.ok().contains("run stays: what is in it is not ours"), "{cleaned:?}");
    theirs.iter().for_each(|path| assert!(path.is_dir(), "{} is gone", path.display()));
    let objects = fs_pins(sandbox.pins());
    assert!(objects.is_empty(), "{objects:?}");
    let run: Vec<_> =
        fs::read_dir(sandbox.path("run")).expect("run").flatten().map(|it| it.file_name()).collect();
    assert_eq!(run, ["theirs"]);
}

/// At three moments: before anything is attached to it, when a part is, and when it is to be said whose policy holds there.
fn a_cgroup_that_vanishes_while_it_is_attached_to_is_no_error(sandbox: &Sandbox) {
    let before = Snapshot::of(sandbox);
    let points = ["link: about to be made", "link: pinned", "services: one written"];
    let at = |place| points.map(|point| (place, point));
    for (place, point) in [Place::Shop, Place::Proxy].into_iter().flat_map(at) {
        for place in [Place::Shop, Place::Proxy] {
            sandbox.program(place, "true").run().ok();
        }
        Agent::configure(sandbox, "");
        let passed = sandbox.path("points");
        fs::write(&passed, "").expect("make the file of the points");
        let daemon = Agent::program(sandbox, &["run"]).env("MESH_REDIRECT_FAULT_LOG", &passed);
        let mut daemon = daemon.env("MESH_REDIRECT_FAULT_STOP", point).serve(sandbox.path("agent.log"));
        daemon.wait_until(|_| Agent::command(sandbox, &["status"]).has_status());
        fs::write(&passed, "armed\n").expect("arm the points");
        let enabling = Agent::program(sandbox, &["enable", "shop"]).begin();
        eventually("the daemon has stopped", SOON, || {
            fs::read_to_string(&passed).is_ok_and(|passed| passed.lines().last() == Some(point))
        });
        fs::write(&passed, "").expect("disarm the points");
        fs::remove_dir(tests::cgroup_path(&sandbox.cgroup(place))).expect("remove a cgroup");
        daemon.signal(nix::sys::signal::Signal::SIGCONT);
        let enabled = enabling.finish();
        assert!(enabled.succeeded(), "{place:?} at {point}: {enabled:?}");
        let gone = if place == Place::Shop { "service-1-" } else { "proxy-" };
        eventually("its links are gone", SOON, || {
            !Snapshot::of(sandbox).names().any(|name| name.contains(gone) && name.contains("links"))
        });
        daemon.signal(nix::sys::signal::Signal::SIGKILL);
        daemon.ended();
        Agent::command(sandbox, &["cleanup"]).ok();
        let left: Vec<String> = Snapshot::of(sandbox).differences(&before);
        let left: Vec<&String> = left.iter().filter(|line| !line.starts_with("/sys/fs/cgroup")).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

fn steps_before_starts_follow_the_configuration(sandbox: &Sandbox) {
    let with_units = WithUnits::start(sandbox, TILL);
    with_units.run(&["enable", "till"]).ok();
    let [till, register] = ["till", "register"].map(|unit| drop_in(sandbox, unit));
    let written = fs::read_to_string(&till).expect("the step");
    with_units.stop();
    fs::write(&till, written.replace("+-", "+")).expect("spoil the step");
    WithUnits::start(sandbox, TILL).stop();
    assert_eq!(fs::read_to_string(&till).expect("the step"), written);
    fs::remove_file(&till).expect("remove the step");
    WithUnits::start(sandbox, TILL).stop();
    assert_eq!(fs::read_to_string(&till).expect("the step"), written);

    WithUnits::start(sandbox, "  till: { unit: register.service }\n").stop();
    assert!(!till.exists() && !till.parent().expect("a folder").exists());
    assert!(register.exists());
    WithUnits::start(sandbox, &format!("  till: {{ cgroup: {} }}\n", sandbox.cgroup(Place::Cart))).stop();
    assert!(!register.exists());
}

fn a_unit_whose_step_cannot_be_written_is_not_enabled(sandbox: &Sandbox) {
    let with_units = WithUnits::start(sandbox, TILL);
    let folder = drop_in(sandbox, "till");
    let folder = folder.parent().expect("a folder");
    fs::write(folder, "in the way").expect("put something in the way");
    let before = Snapshot::of(sandbox);
    let refused = with_units.run(&["enable", "till"]);
    assert!(refused.failed_with(1).contains("write the step before units' starts"), "{refused:?}");
    let changed: Vec<String> = Snapshot::of(sandbox).differences(&before);
    let changed: Vec<&String> = changed.iter().filter(|line| !line.contains("journal.json")).collect();
    assert!(changed.is_empty(), "{changed:?}");
    assert!(with_units.run(&["status"]).ok().contains("no service is enabled"));
    fs::remove_file(folder).expect("take it away");
    with_units.run(&["enable", "till"]).ok();
}

const TILL: &str = "  till: { unit: till.service }\n";
const SOON: std::time::Duration = std::time::Duration::from_secs(10);

/// A daemon on a host with systemd.
struct WithUnits<'s> {
    sandbox: &'s Sandbox,
    daemon: tests::Process,
}

impl<'s> WithUnits<'s> {
    fn start(sandbox: &'s Sandbox, settings: &str) -> Self {
        Agent::configure(sandbox, settings);
        ["till", "register"].iter().for_each(|unit| _ = sandbox.program_in(unit, "true").run().ok());
        let daemon = Self::program(sandbox, &["run"]).serve(sandbox.path("agent.log"));
        let mut with_units = Self { sandbox, daemon };
        with_units.daemon.wait_until(|_| Self::program(sandbox, &["status"]).run().has_status());
        with_units
    }

    fn run(&self, args: &[&str]) -> Finished {
        Self::program(self.sandbox, args).run()
    }

    fn stop(mut self) {
        self.daemon.signal(nix::sys::signal::Signal::SIGTERM);
        assert!(self.daemon.ended().success());
    }

    fn program(sandbox: &'s Sandbox, args: &[&str]) -> tests::Program<'s> {
        let config = sandbox.path("agent.yaml").display().to_string();
        let program = sandbox.with_systemd(Place::Outside, tests::binary("mesh-redirect"));
        program.args(["--config", &config]).args(args)
    }
}

fn drop_in(sandbox: &Sandbox, unit: &str) -> PathBuf {
    sandbox.path(&format!("units/{unit}.service.d/50-mesh-redirect.conf"))
}

/// What can become of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Damage {
    Removed,
    Empty,
    Cut,
    Garbage,
    Link,
    Pipe,
    Folder,
}

const DAMAGE: [Damage; 7] = [
    Damage::Removed,
    Damage::Empty,
    Damage::Cut,
    Damage::Garbage,
    Damage::Link,
    Damage::Pipe,
    Damage::Folder,
];

impl Damage {
    /// `theirs` is a file of somebody else's.
    fn done_to(self, path: &Path, theirs: &Path) {
        let good = fs::read(path).unwrap_or_default();
        let _ = fs::remove_file(path);
        let done = match self {
            Self::Removed => Ok(()),
            Self::Empty => fs::write(path, ""),
            Self::Cut => fs::write(path, &good[..good.len() / 2]),
            Self::Garbage => fs::write(path, b"\xff\x00{]"),
            Self::Link => symlink(theirs, path),
            Self::Pipe => {
                nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRUSR).map_err(std::io::Error::from)
            }
            Self::Folder => fs::create_dir(path),
        };
        done.unwrap_or_else(|error| panic!("{self:?} {}: {error}", path.display()));
    }
}

fn journal(sandbox: &Sandbox) -> PathBuf {
    sandbox.path("state/journal.json")
}

fn read_journal(sandbox: &Sandbox) -> Value {
    serde_json::from_str(&fs::read_to_string(journal(sandbox)).expect("the journal")).expect("JSON")
}

/// The host as it was, now that programs have run in all the cgroups that a mesh has.
fn known(before: Snapshot, sandbox: &Sandbox) -> Snapshot {
    before.and_cgroups_of(&Snapshot::of(sandbox))
}

#[track_caller]
fn is_as(sandbox: &Sandbox, before: &Snapshot) {
    let left = Snapshot::of(sandbox).differences(before);
    assert!(left.is_empty(), "{left:#?}");
}

fn folders_below(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let below = entries.filter(|path| path.is_dir()).flat_map(|path| folders_below(&path));
    [folder.to_owned()].into_iter().chain(below).collect()
}

fn fs_pins(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { fs_pins(&path) } else { vec![path] }).collect()
}
