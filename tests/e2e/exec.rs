//! `mesh-redirect exec`: the quickest way to try it.

use std::time::Duration;

use tests::{Agent, Footprint, Mesh, ORIGIN, Sandbox, eventually};

scenarios![
    exec_steers_a_command_and_leaves_nothing,
    exec_passes_on_the_exit_code,
    exec_without_a_daemon_says_so,
];

/// The daemon looks once a second whether a command has ended.
const SOON: Duration = Duration::from_secs(3);

fn exec_steers_a_command_and_leaves_nothing(sandbox: &Sandbox) {
    let _mesh = Mesh::start(sandbox, "");
    let script = format!("cat /proc/self/cgroup; curl --silent --max-time 5 http://{ORIGIN}:8080/");
    let finished = Agent::command(sandbox, &["exec", "shop", "--", "sh", "-c", &script]);
    let (cgroups, server) = finished.ok().rsplit_once('\n').expect("cgroups and an answer");
    assert!(["a", "b"].contains(&server), "{finished:?}");

    let scope = cgroups.lines().find_map(|line| line.strip_prefix("0::")).expect("a cgroup2");
    let scope = tests::cgroup_path(scope);
    eventually("the command's cgroup is gone", SOON, || !scope.exists());
    eventually("nothing is left in the kernel", SOON, || Footprint::of(sandbox).is_empty());
}

fn exec_passes_on_the_exit_code(sandbox: &Sandbox) {
    let agent = Agent::start(sandbox, "");
    Agent::command(sandbox, &["exec", "shop", "--", "sh", "-c", "exit 42"]).failed_with(42);
    let missing = Agent::command(sandbox, &["exec", "shop", "--", "/no/such/program"]);
    assert!(missing.failed_with(1).contains("/no/such/program"), "{missing:?}");
    eventually("neither command is left", SOON, || agent.status().services.is_empty());
}

fn exec_without_a_daemon_says_so(sandbox: &Sandbox) {
    Agent::start(sandbox, "").stop();
    let refused = Agent::command(sandbox, &["exec", "shop", "--", "true"]);
    let complaint = refused.failed_with(1);
    assert!(complaint.contains("agent.sock") && complaint.contains("mesh-redirect run"), "{complaint}");
}
