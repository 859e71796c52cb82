//! What is not as it is wanted is named, and repaired where the daemon can.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use tests::{Agent, Finished, Mesh, ORIGIN, Place, Proxy, Sandbox, answers, ask, eventually};

scenarios![everywhere:
    a_status_tells_health_by_its_exit_code,
    a_proxy_that_is_not_there_is_named,
];
scenarios![only ebpf:
    a_link_that_was_removed_is_named_and_made_anew,
    programs_and_maps_that_are_not_pinned_are_named_and_made_anew,
    an_entry_that_was_changed_is_named_and_written_anew,
    what_is_attached_where_nothing_is_wanted_is_named,
    a_proxys_side_that_was_detached_is_named,
];
scenarios![only nftables:
    a_table_that_was_deleted_is_named_and_made_anew,
    what_was_changed_in_the_table_is_named_and_made_anew,
];
scenarios![only hosts: names_that_were_removed_are_named];
scenarios![a_hook_that_was_removed_is_named_and_written_anew];

const SOON: Duration = Duration::from_secs(10);

fn a_status_tells_health_by_its_exit_code(sandbox: &Sandbox) {
    let mesh = Mesh::start(sandbox, "");
    // Nothing is wanted of a proxy as long as no service is steered.
    mesh.proxy.sigkill();
    sandbox.settle();
    is_healthy(sandbox);
    let _proxy = Proxy::start(sandbox);
    mesh.agent.enable("shop");
    let status = is_healthy(sandbox);
    let service = &status["services"][0];
    assert_eq!(service["mode"], sandbox.mode.name());
    assert_eq!(service["scopes"][0]["attached"], true);
    assert!(service["since"].as_u64().is_some_and(|since| since > 0), "{service}");
    mesh.agent.stop();
    Agent::command(sandbox, &["status"]).failed_with(1);
}

fn a_proxy_that_is_not_there_is_named(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    mesh.proxy.sigkill();
    sandbox.settle();
    names(sandbox, None, "nothing is steered: no socket of the proxy's alone listens on port 15001");
    let _proxy = Proxy::start(sandbox);
    eventually("it is healthy again", SOON, || status(sandbox).succeeded());
    let text = Agent::command(sandbox, &["status"]);
    assert!(!text.ok().contains("NOT AS WANTED"), "{text:?}");
}

fn a_link_that_was_removed_is_named_and_made_anew(sandbox: &Sandbox) {
    let _mesh = Mesh::enabled(sandbox, "");
    let link = links(sandbox, "service-1-").join("mr_connect4");
    fs::remove_file(link).expect("remove a link");
    // The kernel lets go of it a moment later.
    eventually("it is detached", SOON, || ask(sandbox, Place::Shop, &origin()).ok() == "origin");
    let text = Agent::command(sandbox, &["status"]);
    text.failed_with(3);
    let finding = format!("not attached to {}", tests::cgroup_path(&sandbox.cgroup(Place::Shop)).display());
    assert!(text.stdout.contains(&format!("NOT AS WANTED shop: {finding}: mr_connect4; ")), "{text:?}");
    eventually("it is healthy again", SOON, || status(sandbox).succeeded());
    answers(sandbox).are_balanced();
}

fn programs_and_maps_that_are_not_pinned_are_named_and_made_anew(sandbox: &Sandbox) {
    let _mesh = Mesh::enabled(sandbox, "");
    for (pin, finding) in [
        ("programs/mr_connect4", "the program mr_connect4 is not pinned"),
        ("maps/MR_SERVICES", "open map MR_SERVICES"),
    ] {
        fs::remove_file(version(sandbox).join(pin)).expect("remove a pin");
        names(sandbox, None, finding);
        eventually("it is healthy again", SOON, || status(sandbox).succeeded());
        answers(sandbox).are_balanced();
    }
}

fn an_entry_that_was_changed_is_named_and_written_anew(sandbox: &Sandbox) {
    let _mesh = Mesh::enabled(sandbox, "");
    let finding = "what the kernel's maps say of it is not what was written";
    bpftool(sandbox, "delete", "MR_SERVICES", "1 0 0 0");
    ask(sandbox, Place::Shop, &origin()).is("origin");
    names(sandbox, Some("shop"), finding);
    eventually("it is healthy again", SOON, || status(sandbox).succeeded());
    answers(sandbox).are_balanced();

    // 64 bits of policy and family, and none of an address: all of IPv4.
    let first = "64 0 0 0 1 0 0 0 2 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0";
    bpftool(sandbox, "delete", "MR_RULES", first);
    names(sandbox, Some("shop"), finding);
    eventually("it is healthy again", SOON, || status(sandbox).succeeded());
    answers(sandbox).are_balanced();
}

/// The daemon makes it anew every second, unless it is asked first.
fn what_is_attached_where_nothing_is_wanted_is_named(sandbox: &Sandbox) {
    let _mesh = Mesh::enabled(sandbox, "");
    eventually("it is named", SOON, || {
        let own = links(sandbox, "service-1-");
        let other = own.to_string_lossy().replace("service-1-", "service-9-");
        let _ = fs::rename(&own, other);
        status(sandbox).stdout.contains("where none are wanted")
    });
    eventually("it is healthy again", SOON, || status(sandbox).succeeded());
    answers(sandbox).are_balanced();
}

fn a_proxys_side_that_was_detached_is_named(sandbox: &Sandbox) {
    let _mesh = Mesh::enabled(sandbox, "");
    let finding = format!("not attached to {}", tests::cgroup_path(&sandbox.cgroup(Place::Proxy)).display());
    eventually("it is named", SOON, || {
        let _ = fs::remove_file(links(sandbox, "proxy-").join("mr_getsockopt"));
        status(sandbox).stdout.contains(&format!("{finding}: mr_getsockopt"))
    });
    eventually("it is healthy again", SOON, || status(sandbox).succeeded());
}

fn a_table_that_was_deleted_is_named_and_made_anew(sandbox: &Sandbox) {
    let _mesh = Mesh::enabled(sandbox, "");
    eventually("it is named", SOON, || {
        nft(sandbox, "delete table inet mesh_redirect");
        status(sandbox).stdout.contains("the table inet mesh_redirect is missing")
    });
    eventually("it is healthy again", SOON, || status(sandbox).succeeded());
    eventually("the shop is steered", SOON, || ask(sandbox, Place::Shop, &origin()).ok() != "origin");
}

fn what_was_changed_in_the_table_is_named_and_made_anew(sandbox: &Sandbox) {
    let _mesh = Mesh::enabled(sandbox, "");
    for (change, finding) in [
        (
            "flush chain inet mesh_redirect steer_1",
            "the chain steer_1 in inet mesh_redirect has 0 rules, and 2 are",
        ),
        (
            "flush set inet mesh_redirect policy_0_ipv4",
            "the set policy_0_ipv4 in inet mesh_redirect has 0 elements",
        ),
        ("add chain inet mesh_redirect mine", "the chain mine in inet mesh_redirect is not ours"),
    ] {
        nft(sandbox, change);
        names(sandbox, None, finding);
        eventually("it is healthy again", SOON, || status(sandbox).succeeded());
        answers(sandbox).are_balanced();
    }
}

fn names_that_were_removed_are_named(sandbox: &Sandbox) {
    let _mesh = Mesh::enabled(sandbox, "");
    eventually("it is named", SOON, || {
        fs::write(sandbox.hosts(), "127.0.0.1 localhost\n").expect("write the hosts file");
        status(sandbox).stdout.contains("are missing")
    });
    eventually("it is healthy again", SOON, || status(sandbox).succeeded());
    answers(sandbox).are_balanced();

    fs::remove_file(sandbox.hosts()).expect("remove the hosts file");
    names(sandbox, None, "it cannot be told what is there: read ");
}

fn a_hook_that_was_removed_is_named_and_written_anew(sandbox: &Sandbox) {
    let mesh = Mesh::start(sandbox, "  web: { container: '0123456789abcdef' }\n");
    mesh.agent.enable("web");
    is_healthy(sandbox);
    let hook = sandbox.path("hooks.d/50-mesh-redirect.json");
    fs::remove_file(&hook).expect("remove the hook");
    names(sandbox, None, "the hook at containers' starts");
    eventually("it is healthy again", SOON, || status(sandbox).succeeded());
    assert!(hook.exists());
}

fn status(sandbox: &Sandbox) -> Finished {
    Agent::command(sandbox, &["status", "--json"])
}

#[track_caller]
fn is_healthy(sandbox: &Sandbox) -> Value {
    let status: Value = serde_json::from_str(status(sandbox).ok()).expect("a status");
    assert_eq!((&status["healthy"], &status["drift"]), (&true.into(), &Value::Array(vec![])), "{status}");
    status
}

#[track_caller]
fn names(sandbox: &Sandbox, service: Option<&str>, finding: &str) {
    let told = status(sandbox);
    told.failed_with(3);
    let status: Value = serde_json::from_str(&told.stdout).expect("a status");
    assert_eq!(status["healthy"], false);
    let is_it = |drift: &Value| {
        drift["service"].as_str() == service
            && drift["finding"].as_str().is_some_and(|found| found.contains(finding))
            && drift["remedy"].as_str().is_some_and(|remedy| !remedy.is_empty())
    };
    assert!(status["drift"].as_array().is_some_and(|drift| drift.iter().any(is_it)), "{finding}: {status:#}");
}

/// Where the pins are, of whatever version.
fn version(sandbox: &Sandbox) -> PathBuf {
    let mut versions = fs::read_dir(sandbox.pins()).expect("the pins").flatten();
    versions.next().expect("a version of the pins").path()
}

fn links(sandbox: &Sandbox, owner: &str) -> PathBuf {
    let links = version(sandbox).join("links");
    let mut scopes = fs::read_dir(&links).expect("the links").flatten();
    let found = scopes.find(|scope| scope.file_name().to_string_lossy().starts_with(owner));
    found.map_or_else(|| links.join(format!("{owner}0")), |scope| scope.path())
}

#[track_caller]
fn bpftool(sandbox: &Sandbox, change: &str, map: &str, key: &str) {
    let pin = version(sandbox).join("maps").join(map);
    let mut bpftool = Command::new("bpftool");
    bpftool.args(["map", change, "pinned"]).arg(pin).arg("key").args(key.split(' '));
    assert!(bpftool.status().expect("run bpftool").success(), "{change} {map} {key}");
}

fn nft(sandbox: &Sandbox, command: &str) {
    let args = command.split(' ');
    sandbox.enter(|| Command::new("nft").args(args).output().expect("run nft"));
}

fn origin() -> String {
    format!("{ORIGIN}:8080")
}
