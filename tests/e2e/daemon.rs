//! The daemon comes and goes; what it has set up stays.

use std::fs;
use std::thread::sleep;
use std::time::Duration;

use tests::{
    Agent, Answers, Footprint, Mesh, ORIGIN, Place, Running, Sandbox, answers, ask, cgroup_path, eventually,
    slow_request,
};

scenarios![everywhere:
    the_enabled_set_survives_a_restart,
    enable_and_disable_may_be_repeated,
    an_unknown_service_is_answered_with_the_closest_matches,
    two_daemons_cannot_run_at_once,
    a_damaged_state_is_refused_and_changes_nothing,
];
scenarios![
    a_daemon_killed_under_load_fails_no_request,
    a_restarted_daemon_takes_over_under_load,
    a_stopped_daemon_leaves_services_steered,
    a_daemon_starts_over_what_another_policy_has_left,
    a_cgroup_that_was_made_anew_is_steered_again,
    a_connection_from_before_enable_is_left_alone,
    check_finds_everything_in_place,
];

/// Long enough to be in the middle of.
const A_WHILE: Duration = Duration::from_secs(1);

fn a_daemon_killed_under_load_fails_no_request(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    let load = load(sandbox);
    sleep(A_WHILE);
    mesh.agent.sigkill();
    every_request_was_proxied(load);
}

fn a_restarted_daemon_takes_over_under_load(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    answers(sandbox).are_balanced();
    let before = mesh.agent.status();
    mesh.agent.sigkill();

    let load = load(sandbox);
    sleep(A_WHILE);
    let agent = Agent::restart(sandbox);
    let answered = every_request_was_proxied(load);

    let (before, after) = (&before.services[0], &agent.status().services[0]);
    assert_eq!((&after.name, after.since), (&before.name, before.since));
    let expected = before.counters.steered + answered as u64;
    assert_eq!(after.counters.steered, expected, "the counters go on where they were");
}

fn a_stopped_daemon_leaves_services_steered(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    let steering = Footprint::of(sandbox);
    let log = mesh.agent.log();
    mesh.agent.stop();
    assert_eq!(Footprint::of(sandbox), steering, "{log}");

    let answers = sandbox.peer(Place::Shop).args(["load", &origin(), "1", "300"]).run();
    proxied(answers.ok());
}

/// What it tries out to see whether it can steer is not hindered by what is there.
fn a_daemon_starts_over_what_another_policy_has_left(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "capture: { exclude: [10.88.0.0/16, 'fd88::/16'] }\n");
    mesh.agent.stop();
    let agent = Agent::start(sandbox, "capture: { exclude: [10.89.0.0/16] }\n");
    answers(sandbox).are_balanced();
    assert_eq!(agent.status().services.len(), 1);
}

fn the_enabled_set_survives_a_restart(sandbox: &Sandbox) {
    let agent = Agent::start(sandbox, "");
    agent.enable("stock");
    agent.enable("shop");
    agent.disable("stock");
    agent.stop();

    let agent = Agent::restart(sandbox);
    let enabled: Vec<_> = agent.status().services.into_iter().map(|service| service.name).collect();
    assert_eq!(enabled, ["shop"]);
}

fn enable_and_disable_may_be_repeated(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    answers(sandbox).are_balanced();
    let (status, steering) = (mesh.agent.status(), Footprint::of(sandbox));

    mesh.agent.enable("shop");
    assert_eq!(mesh.agent.status().services, status.services);
    assert_eq!(Footprint::of(sandbox), steering);

    mesh.agent.disable("shop");
    mesh.agent.disable("shop");
    assert!(mesh.agent.status().services.is_empty());
    steering.is_gone();
}

fn an_unknown_service_is_answered_with_the_closest_matches(sandbox: &Sandbox) {
    let agent = Agent::start(sandbox, "");
    let refused = Agent::command(sandbox, &["enable", "shpo"]);
    let complaint = refused.failed_with(1);
    assert!(complaint.contains("shpo") && complaint.contains("shop"), "{complaint}");
    assert!(agent.status().services.is_empty());
    assert!(Footprint::of(sandbox).is_empty());
}

fn two_daemons_cannot_run_at_once(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    let steering = Footprint::of(sandbox);
    Agent::command(sandbox, &["run"]).failed_with(1);
    assert_eq!(Footprint::of(sandbox), steering);
    answers(sandbox).are_balanced();
    assert_eq!(mesh.agent.counters("shop").steered, if sandbox.mode.is_in_kernel() { 6 } else { 0 });
}

fn a_damaged_state_is_refused_and_changes_nothing(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    let steering = Footprint::of(sandbox);
    mesh.agent.stop();
    let state = sandbox.path("state/enabled.json");
    let good = fs::read(&state).expect("the enabled set");

    fs::write(&state, &good[..good.len() / 2]).expect("damage the enabled set");
    let refused = Agent::command(sandbox, &["run"]);
    assert!(refused.failed_with(1).contains("enabled.json"), "{refused:?}");
    assert_eq!(Footprint::of(sandbox), steering);

    fs::write(&state, good).expect("restore the enabled set");
    assert_eq!(Agent::restart(sandbox).status().services[0].name, "shop");
}

/// As a container's cgroup is, or that of a unit without our drop-in.
fn a_cgroup_that_was_made_anew_is_steered_again(sandbox: &Sandbox) {
    let _mesh = Mesh::enabled(sandbox, "");
    answers(sandbox).are_balanced();
    fs::remove_dir(cgroup_path(&sandbox.cgroup(Place::Shop))).expect("remove the shop's cgroup");
    eventually("the new cgroup is steered", Duration::from_secs(5), || {
        ask(sandbox, Place::Shop, &origin()).ok() != "origin"
    });
}

fn a_connection_from_before_enable_is_left_alone(sandbox: &Sandbox) {
    let mesh = Mesh::start(sandbox, "");
    let open = slow_request(sandbox);
    mesh.agent.enable("shop");
    answers(sandbox).are_balanced();
    open.finish().is("origin");
}

fn check_finds_everything_in_place(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    let check = || Agent::command(sandbox, &["check", "--json"]);
    let all_is_well = |said: &str| {
        let said: serde_json::Value = serde_json::from_str(said).expect("the findings as JSON");
        let lines = said["findings"].as_array().expect("the findings");
        !lines.is_empty() && lines.iter().all(|line| line["ok"] == true)
    };
    let before = check();
    assert!(all_is_well(before.ok()), "{before:?}");

    mesh.proxy.sigkill();
    let after = check();
    assert!(!all_is_well(after.ok()), "{after:?}");
}

/// Four clients, which connect anew for every request, for three seconds.
fn load(sandbox: &Sandbox) -> Running {
    sandbox.peer(Place::Shop).args(["load", &origin(), "4", "3000"]).begin()
}

/// None failed, and none went past the proxy.
#[track_caller]
pub(crate) fn every_request_was_proxied(load: Running) -> usize {
    let finished = load.finish();
    let answered = proxied(finished.ok());
    assert!(answered > 500, "too little load to tell: {answered} requests");
    answered
}

#[track_caller]
fn proxied(answers: &str) -> usize {
    let answers: Answers = serde_json::from_str(answers).expect("the answers as JSON");
    answers.are_from(&["a", "b"]);
    answers.total()
}

pub(crate) fn origin() -> String {
    format!("{ORIGIN}:8080")
}
