//! What a service may be on a host: more than a unit or a cgroup.

use std::fs;
use std::time::Duration;

use tests::{Agent, Mesh, ORIGIN, Place, Process, Sandbox, answers, ask, cgroup_path, eventually};

scenarios![
    a_running_process_and_its_descendants_are_adopted,
    a_process_that_is_not_there_cannot_be_adopted,
    a_container_is_known_by_its_id_and_steered_again_after_a_restart,
];
scenarios![only nftables: a_user_is_steered_and_the_proxy_of_the_same_user_is_not];

const SOON: Duration = Duration::from_secs(5);

fn a_running_process_and_its_descendants_are_adopted(sandbox: &Sandbox) {
    let _mesh = Mesh::start(sandbox, "");
    let script =
        format!("while :; do curl --silent --max-time 2 http://{}/; echo; sleep 0.1; done & wait", origin());
    let log = sandbox.path("running.log");
    let running = sandbox.program(Place::Outside, "sh").args(["-c", &script]).serve(log);
    let last = |running: &Process| running.log().lines().last().unwrap_or_default().to_owned();
    eventually("it connects directly", SOON, || last(&running) == "origin");

    let pid = running.pid().to_string();
    let adopted = Agent::command(sandbox, &["adopt", "shop", &pid]);
    assert!(adopted.ok().contains("sockets that are open already stay as they are"), "{adopted:?}");
    eventually("it is steered", SOON, || ["a", "b"].contains(&last(&running).as_str()));
    drop(running);
    // The loop is its own process, and nobody's child now.
    let scope = adopted.stdout.split_whitespace().find(|word| word.starts_with("/mesh-redirect/"));
    let scope = cgroup_path(scope.expect("a cgroup"));
    fs::write(scope.join("cgroup.kill"), "1").expect("end what was adopted");
    eventually("the cgroup is gone", SOON, || !scope.exists());
}

fn a_process_that_is_not_there_cannot_be_adopted(sandbox: &Sandbox) {
    let agent = Agent::start(sandbox, "");
    let refused = Agent::command(sandbox, &["adopt", "shop", "4194999"]);
    assert!(refused.failed_with(1).contains("there is no process 4194999"), "{refused:?}");
    assert!(agent.status().services.is_empty());
}

fn a_container_is_known_by_its_id_and_steered_again_after_a_restart(sandbox: &Sandbox) {
    // As good as random: the temporary folder's name differs from any other's.
    let id: String =
        sandbox.path("").to_string_lossy().bytes().rev().map(|byte| format!("{byte:02x}")).collect();
    let (id, cgroup) = (&id[..40], format!("system.slice/docker-{}.scope", &id[..40]));
    let mesh = Mesh::start(sandbox, &format!("  web: {{ container: '{}' }}\n", &id[..30]));
    let absent = Agent::command(sandbox, &["enable", "web"]);
    assert!(absent.ok().contains("web does not run now"), "{absent:?}");

    for _ in 0..2 {
        let curl = || {
            let url = format!("http://{}/", origin());
            sandbox
                .program_in(&cgroup, "curl")
                .args(["--silent", "--max-time", "5", "--header", "Host: catalog", &url])
                .run()
        };
        eventually("the container is steered", SOON, || ["a", "b"].contains(&curl().ok()));
        fs::remove_dir(cgroup_path(&sandbox.cgroup_at(&cgroup))).expect("remove the container's cgroup");
    }
    mesh.agent.disable("web");
}

fn a_user_is_steered_and_the_proxy_of_the_same_user_is_not(sandbox: &Sandbox) {
    let mesh = Mesh::start(sandbox, "  everybody: { user: nobody }\n");
    mesh.agent.enable("everybody");
    let as_user = |user: &str| {
        let setpriv = sandbox.program(Place::Outside, "setpriv");
        let setpriv = setpriv.args(["--reuid", user, "--regid", user, "--clear-groups", "--"]);
        setpriv
            .args([
                "curl",
                "--silent",
                "--max-time",
                "5",
                "--header",
                "Host: catalog",
                &format!("http://{}/", origin()),
            ])
            .run()
    };
    for _ in 0..4 {
        assert!(["a", "b"].contains(&as_user("65534").ok()));
    }
    as_user("65533").is("origin");
    ask(sandbox, Place::Outside, &origin()).is("origin");
    assert_eq!(mesh.agent.counters("everybody").steered, 4);
    mesh.agent.enable("shop");
    answers(sandbox).are_balanced();
}

fn origin() -> String {
    format!("{ORIGIN}:8080")
}
