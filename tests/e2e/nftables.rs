//! What is particular to steering by a table: the kernel does not see the proxy for itself, and others can flush it.

use std::time::Duration;

use tests::{Mesh, ORIGIN, Place, Sandbox, answers, ask, eventually};

scenarios![only nftables:
    without_a_daemon_the_kernel_lets_go_after_three_seconds,
    without_a_daemon_a_closed_service_is_refused_after_three_seconds,
    a_flushed_table_is_repaired,
    counters_outlive_a_change_of_the_table,
];

const SOON: Duration = Duration::from_secs(5);

fn without_a_daemon_the_kernel_lets_go_after_three_seconds(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    mesh.agent.sigkill();
    answers(sandbox).are_balanced();
    eventually("connections go directly", SOON, || ask(sandbox, Place::Shop, &origin()).ok() == "origin");
    answers(sandbox).are_from(&["origin"]);
}

fn without_a_daemon_a_closed_service_is_refused_after_three_seconds(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "failure: closed\n");
    mesh.agent.sigkill();
    answers(sandbox).are_balanced();
    let connect = || sandbox.peer(Place::Shop).args(["connect", &origin()]).run();
    eventually("connections are refused", SOON, || connect().stderr.contains("ECONNREFUSED"));
    assert_eq!(mesh.origin.requests(), 0);
}

fn a_flushed_table_is_repaired(sandbox: &Sandbox) {
    let _mesh = Mesh::enabled(sandbox, "");
    sandbox.program(Place::Outside, "nft").args(["flush", "ruleset"]).run().ok();
    eventually("the service is steered again", SOON, || {
        ask(sandbox, Place::Shop, &origin()).ok() != "origin"
    });
    answers(sandbox).are_balanced();
}

fn counters_outlive_a_change_of_the_table(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    answers(sandbox).are_balanced();
    mesh.agent.enable("stock");
    answers(sandbox).are_balanced();
    assert_eq!(mesh.agent.counters("shop").steered, 12);
    assert_eq!(mesh.agent.counters("stock").steered, 0);
}

fn origin() -> String {
    format!("{ORIGIN}:8080")
}
