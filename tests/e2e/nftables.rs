//! What is particular to steering by a table: the kernel does not see the proxy for itself, and others can flush it.

use std::time::Duration;

use tests::{Agent, Footprint, Mesh, ORIGIN, Place, Sandbox, answers, ask, eventually};

scenarios![only nftables:
    without_a_daemon_the_kernel_lets_go_after_three_seconds,
    without_a_daemon_a_closed_service_is_refused_after_three_seconds,
    a_flushed_table_is_repaired,
    counters_outlive_a_change_of_the_table,
    a_table_of_another_version_is_replaced_and_removed_whole,
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

/// Sets, maps, chains and counters that this version does not know, and another fingerprint.
const OF_ANOTHER_VERSION: &str = "
nft flush chain inet mesh_redirect output
nft -f - <<END
table inet mesh_redirect {
    counter future_count {}
    set future_set { type ipv4_addr . inet_service; flags interval; elements = { 10.0.0.0/8 . 80-90 }; }
    chain future { counter name future_count ip daddr . tcp dport @future_set return; }
    map future_map { type ipv4_addr : verdict; elements = { 10.77.0.10 : jump future }; }
    chain future_hook { type filter hook output priority 0; policy accept; ip daddr vmap @future_map; }
    chain output { ip daddr vmap @future_map comment \"mesh-redirect 99.0.0 0123456789abcdef\"; }
}
END
";

fn a_table_of_another_version_is_replaced_and_removed_whole(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    let ours = lines_of_table(sandbox);
    mesh.agent.stop();
    let become_another = || sandbox.program(Place::Outside, "sh").args(["-ec", OF_ANOTHER_VERSION]).run();
    become_another().ok();
    assert_ne!(lines_of_table(sandbox), ours);

    let agent = Agent::restart(sandbox);
    assert_eq!(lines_of_table(sandbox), ours);
    eventually("the service is steered again", SOON, || {
        ask(sandbox, Place::Shop, &origin()).ok() != "origin"
    });
    agent.stop();
    become_another().ok();
    Agent::command(sandbox, &["cleanup"]).ok();
    assert!(Footprint::of(sandbox).is_empty());
}

/// In no order, without what expires.
#[track_caller]
fn lines_of_table(sandbox: &Sandbox) -> Vec<String> {
    let list = ["--stateless", "list", "table", "inet", "mesh_redirect"];
    let listed = sandbox.program(Place::Outside, "nft").args(list).run();
    let lasting = listed.ok().lines().filter(|line| !line.contains(" timeout 3s"));
    let mut lines: Vec<String> = lasting.map(str::to_owned).collect();
    lines.sort();
    lines
}

fn origin() -> String {
    format!("{ORIGIN}:8080")
}
