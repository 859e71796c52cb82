//! As if it had never been there.

use std::fs;

use tests::{Agent, Footprint, Mesh, ORIGIN, Place, Sandbox, answers, ask, slow_request};

scenarios![disabling_the_last_service_leaves_nothing_in_the_kernel, a_steered_connection_outlives_disable,];
scenarios![everywhere:
    cleanup_needs_no_daemon_and_leaves_nothing,
    cleanup_refuses_while_a_daemon_runs,
    cleanup_may_be_repeated,
];

fn disabling_the_last_service_leaves_nothing_in_the_kernel(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    mesh.agent.enable("stock");
    answers(sandbox).are_balanced();
    let steering = Footprint::of(sandbox);
    assert!(!steering.is_empty());

    mesh.agent.disable("stock");
    answers(sandbox).are_balanced();
    mesh.agent.disable("shop");
    answers(sandbox).are_from(&["origin"]);
    assert_eq!(Footprint::of(sandbox), Footprint::default());
    steering.is_gone();
}

fn a_steered_connection_outlives_disable(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    let open = slow_request(sandbox);
    mesh.agent.disable("shop");
    ask(sandbox, Place::Shop, &format!("{ORIGIN}:8080")).is("origin");
    let answer = open.finish();
    assert!(["a", "b"].contains(&answer.ok()), "{answer:?}");
}

fn cleanup_needs_no_daemon_and_leaves_nothing(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    mesh.agent.enable("stock");
    answers(sandbox).are_balanced();
    let steering = Footprint::of(sandbox);
    assert_eq!(steering.is_empty(), !sandbox.mode.is_in_kernel());
    mesh.agent.sigkill();

    Agent::command(sandbox, &["cleanup"]).ok();
    assert_eq!(Footprint::of(sandbox), Footprint::default());
    steering.is_gone();
    assert!(!sandbox.pins().exists(), "{} is still there", sandbox.pins().display());
    assert_eq!(fs::read_to_string(sandbox.hosts()).expect("the hosts file"), "127.0.0.1 localhost\n");
    ask(sandbox, Place::Shop, &format!("{ORIGIN}:8080")).is("origin");

    let agent = Agent::restart(sandbox);
    assert!(agent.status().services.is_empty(), "the enabled set is still there");
}

fn cleanup_refuses_while_a_daemon_runs(sandbox: &Sandbox) {
    let _mesh = Mesh::enabled(sandbox, "");
    let steering = Footprint::of(sandbox);
    let refused = Agent::command(sandbox, &["cleanup"]);
    let complaint = refused.failed_with(1);
    assert!(complaint.contains("running") || complaint.contains("runs"), "{complaint}");
    assert_eq!(Footprint::of(sandbox), steering);
    answers(sandbox).are_balanced();
}

fn cleanup_may_be_repeated(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    mesh.agent.stop();
    for _ in 0..2 {
        Agent::command(sandbox, &["cleanup"]).ok();
    }
    assert!(Footprint::of(sandbox).is_empty());
}
