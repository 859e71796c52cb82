//! Containers, by the hook that runs before their first process.

use std::fs;
use std::time::Duration;

use tests::{Agent, Answers, Container, Finished, Mesh, Mode, ORIGIN, Place, Sandbox, eventually};

scenarios![
    a_container_that_is_restarted_fifty_times_never_escapes,
    a_container_that_only_the_hook_can_name_stays_attached,
    a_container_that_must_not_start_unsteered_does_not,
    a_container_that_is_no_enabled_service_is_left_alone,
    the_hook_is_registered_while_a_container_is_enabled,
];
scenarios![only ebpf: what_is_no_state_of_a_container_is_refused_in_words];

const RESTARTS: usize = 25;
const SOON: Duration = Duration::from_secs(5);
/// A service that is known by a name: its id is another one at each start.
const WEB: &str = "  web: { container: web }\n";
const WEB_CLOSED: &str = "  web: { container: web, failure: closed }\n";

fn a_container_that_is_restarted_fifty_times_never_escapes(sandbox: &Sandbox) {
    let mesh = Mesh::start(sandbox, WEB);
    let absent = Agent::command(sandbox, &["enable", "web"]);
    assert!(absent.ok().contains("web does not run now"), "{absent:?}");
    let restart = |sandbox: &Sandbox| {
        for number in 0..RESTARTS {
            assert_ne!(web(sandbox, number % 5).ok(), &by("origin"));
        }
    };
    restart(sandbox);
    assert_eq!(mesh.agent.counters("web").steered, RESTARTS as u64);
    // A table needs a daemon that says whether the proxy is ready.
    if sandbox.mode == Mode::Ebpf {
        mesh.agent.stop();
        restart(sandbox);
    }
    assert_eq!(mesh.origin.requests(), 0);
}

/// No runtime that the daemon could ask has heard of it.
fn a_container_that_only_the_hook_can_name_stays_attached(sandbox: &Sandbox) {
    let mesh = Mesh::start(sandbox, WEB);
    mesh.agent.enable("web");
    let address = format!("{ORIGIN}:8080");
    let running = prepared(sandbox, 1, "web", &["load", &address, "1", "4000"]).begin();
    eventually("it is steered", SOON, || mesh.agent.counters("web").steered > 0);
    mesh.agent.enable("stock");
    mesh.agent.disable("stock");
    mesh.agent.stop();
    let agent = Agent::restart(sandbox);
    let before = agent.counters("web").steered;
    eventually("it is still steered", SOON, || agent.counters("web").steered > before);
    let answers: Answers = serde_json::from_str(running.finish().ok()).expect("who answered");
    answers.are_from(&["a", "b"]);
}

fn a_container_that_must_not_start_unsteered_does_not(sandbox: &Sandbox) {
    let mesh = Mesh::start(sandbox, WEB_CLOSED);
    mesh.agent.enable("web");
    assert_ne!(web(sandbox, 1).ok(), by("origin"));
    mesh.agent.stop();
    // Nobody can change what is in the kernel.
    let lock = sandbox.path("run").join("kernel.lock");
    fs::remove_file(&lock).and_then(|()| fs::create_dir(&lock)).expect("spoil the lock");
    let refused = web(sandbox, 2);
    assert!(refused.failed_with(1).contains("attach service `web` to container"), "{refused:?}");
    container(sandbox, 3, "other").is(&by("origin"));

    let opened = Agent::yaml(sandbox, WEB);
    fs::remove_dir(&lock).expect("mend the lock");
    fs::write(sandbox.path("agent.yaml"), opened).expect("write agent.yaml");
    Agent::restart(sandbox).stop();
    fs::remove_file(&lock).and_then(|()| fs::create_dir(&lock)).expect("spoil the lock");
    web(sandbox, 4).is(&by("origin"));
}

fn a_container_that_is_no_enabled_service_is_left_alone(sandbox: &Sandbox) {
    let mesh = Mesh::start(sandbox, WEB);
    web(sandbox, 1).is(&by("origin"));
    mesh.agent.enable("web");
    container(sandbox, 2, "web-2").is(&by("origin"));
    mesh.agent.disable("web");
    web(sandbox, 3).is(&by("origin"));
    assert!(!sandbox.path("run").join("containers").exists());
}

fn the_hook_is_registered_while_a_container_is_enabled(sandbox: &Sandbox) {
    let mesh = Mesh::start(sandbox, &format!("{WEB}  api: {{ container: api }}\n"));
    let file = sandbox.path("hooks.d").join("50-mesh-redirect.json");
    let shown = Agent::command(sandbox, &["enable", "web", "--dry-run"]);
    let line = format!("+file {}", file.display());
    assert!(shown.ok().lines().any(|shown| shown == line), "{shown:?}");
    assert!(!file.exists());

    mesh.agent.enable("web");
    mesh.agent.enable("api");
    let text = fs::read_to_string(&file).expect("the hook");
    assert!(text.contains("createRuntime") && Agent::hook(sandbox).iter().all(|word| text.contains(word)));
    mesh.agent.disable("web");
    assert!(file.exists());
    mesh.agent.disable("api");
    assert!(!sandbox.path("hooks.d").exists());
    fs::write(sandbox.path("hooks.d"), "").expect("put something in the way");
    let enabled = Agent::command(sandbox, &["enable", "web"]);
    assert!(enabled.ok().contains("no hook was registered (write to"), "{enabled:?}");
    fs::remove_file(sandbox.path("hooks.d")).expect("take it away");
    mesh.agent.enable("web");
    mesh.agent.stop();
    Agent::command(sandbox, &["cleanup"]).ok();
    assert!(!sandbox.path("hooks.d").exists() && !sandbox.path("run").exists());
}

fn what_is_no_state_of_a_container_is_refused_in_words(sandbox: &Sandbox) {
    let mesh = Mesh::start(sandbox, WEB);
    mesh.agent.enable("web");
    let states = [
        ("echo garbage", "expected value"),
        ("head -c 2000000 /dev/zero", "larger than"),
        ("sleep 4", "in vain"),
    ];
    for (state, reason) in states {
        let said = fed(sandbox, state);
        assert!(said.succeeded() && said.stderr.contains(reason), "{said:?}");
    }
    mesh.agent.stop();
    Agent::configure(sandbox, WEB_CLOSED);
    let _agent = Agent::restart(sandbox);
    assert!(fed(sandbox, "echo garbage").failed_with(1).contains("expected value"));
}

/// The hook, with what a command writes as the state.
#[track_caller]
fn fed(sandbox: &Sandbox, command: &str) -> Finished {
    let hook = sandbox.program(Place::Outside, "sh").args(["-c", &format!("{command} | \"$0\" \"$@\"")]);
    hook.arg(&tests::binary("mesh-redirect").to_string_lossy()).args(Agent::hook(sandbox)).run()
}

#[track_caller]
fn web(sandbox: &Sandbox, number: usize) -> Finished {
    container(sandbox, number, "web")
}

/// Runs a container whose first instructions connect to the origin.
#[track_caller]
fn container(sandbox: &Sandbox, number: usize, name: &str) -> Finished {
    prepared(sandbox, number, name, &["connect", &format!("{ORIGIN}:8080")]).run()
}

fn prepared<'s>(sandbox: &'s Sandbox, number: usize, name: &str, peer: &[&str]) -> Container<'s> {
    let id = format!("{number:064x}");
    let bundle = sandbox.path("bundles").join(&id);
    if bundle.exists() {
        fs::remove_dir_all(&bundle).expect("remove the last one's bundle");
    }
    Container::new(sandbox, &id, name, peer)
}

fn by(server: &str) -> String {
    format!("{ORIGIN}:8080 {server}")
}
