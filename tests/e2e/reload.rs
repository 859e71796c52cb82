//! The configuration is read anew: whole or not at all.

use std::fs;
use std::thread::sleep;
use std::time::Duration;

use serde_json::Value;
use tests::{
    Agent, Answers, Finished, Footprint, Mesh, ORIGIN, ORIGIN_V6, PROXY_CONFIG, Place, Proxy, Sandbox,
    answers, ask, eventually,
};

scenarios![everywhere:
    an_invalid_file_changes_nothing,
    what_a_process_has_for_life_is_refused_by_name,
    a_hangup_reloads,
];
scenarios![
    a_reload_changes_policy_at_the_next_connect_and_fails_no_request,
    a_dry_run_shows_the_difference_and_changes_nothing,
    a_proxy_port_that_moves_is_followed,
    a_policy_that_cannot_be_compiled_is_refused_whole,
    a_service_that_is_elsewhere_now_is_followed,
    an_enabled_service_that_is_nowhere_now_is_refused,
    what_the_proxy_can_route_is_followed_from_a_reload_on,
    the_hook_goes_with_the_last_service_that_is_a_container,
];
scenarios![only ebpf: what_the_kernel_has_no_room_for_leaves_what_held];

const SOON: Duration = Duration::from_secs(5);

fn a_reload_changes_policy_at_the_next_connect_and_fails_no_request(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "capture: { exclude: [10.77.0.10/32] }\n");
    answers(sandbox).are_from(&["origin"]);
    let load = sandbox.peer(Place::Shop).args(["load", &origin(), "4", "3000"]).begin();
    sleep(Duration::from_secs(1));
    let reloaded = mesh.agent.reload("");
    for _ in 0..4 {
        assert_ne!(ask(sandbox, Place::Shop, &origin()).ok(), "origin", "{reloaded:?}");
    }
    assert!(
        reloaded.ok().starts_with("the configuration was read anew, and this has changed:\n"),
        "{reloaded:?}"
    );
    assert!(reloaded.stdout.lines().any(|line| line.starts_with(['+', '-'])), "{reloaded:?}");
    let answered: Answers = serde_json::from_str(load.finish().ok()).expect("the answers as JSON");
    answered.are_from(&["a", "b", "origin"]);

    let again = mesh.agent.reload("");
    again.is("the configuration was read anew; nothing of kernel and host has changed");
}

fn a_dry_run_shows_the_difference_and_changes_nothing(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    let steering = Footprint::of(sandbox);
    Agent::configure(sandbox, "failure: closed\ncapture: { exclude: [10.77.0.10/32] }\n");
    let shown = Agent::command(sandbox, &["reload", "--dry-run"]);
    let changes = shown.ok().strip_prefix("this would change:\n");
    let lines: Vec<&str> = changes.unwrap_or_else(|| panic!("{shown:?}")).lines().collect();
    assert!(lines.iter().all(|line| line.starts_with(['+', '-'])), "{shown:?}");
    assert!(lines.iter().any(|line| line.starts_with('+')) && lines.iter().any(|line| line.starts_with('-')));

    let json = Agent::command(sandbox, &["reload", "--dry-run", "--json"]);
    let json: Value = serde_json::from_str(json.ok()).expect("JSON");
    assert_eq!((&json["version"], &json["reloaded"]), (&Value::from(1), &Value::from(false)));
    assert_eq!(json["difference"].as_str().map(str::trim_end), Some(lines.join("\n").as_str()));
    assert_eq!(Footprint::of(sandbox), steering);
    answers(sandbox).are_balanced();

    let done = Agent::command(sandbox, &["reload", "--json"]);
    let done: Value = serde_json::from_str(done.ok()).expect("JSON");
    assert_eq!((&done["reloaded"], &done["difference"]), (&Value::from(true), &json["difference"]));
    answers(sandbox).are_from(&["origin"]);
    mesh.agent.disable("shop");
}

fn an_invalid_file_changes_nothing(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    let steering = Footprint::of(sandbox);
    let hosts = fs::read(sandbox.hosts()).expect("the hosts file");
    let refused = mesh.agent.reload("failure: never\n");
    let line = Agent::yaml(sandbox, "").lines().count() + 1;
    let place = format!("{}:{line}:10: ", sandbox.path("agent.yaml").display());
    assert!(refused.failed_with(2).contains(&place), "{refused:?}");

    let asked = post_reload(sandbox);
    let answer = asked.ok();
    assert!(answer.contains(&place) && answer.contains("`never`") && answer.ends_with("400"), "{answer}");
    mesh.agent.hang_up();
    // The request was answered with the same words before.
    eventually("the log says why", SOON, || mesh.agent.log().matches(&place).count() == 2);
    assert_eq!(Footprint::of(sandbox), steering);
    assert_eq!(fs::read(sandbox.hosts()).expect("the hosts file"), hosts);
    answers(sandbox).are_balanced();
}

/// By the daemon itself: the command reads the file first, to find the daemon by it.
fn post_reload(sandbox: &Sandbox) -> Finished {
    let socket = sandbox.path("run/agent.sock").display().to_string();
    let curl = sandbox.program(Place::Outside, "curl").args(["--silent", "--max-time", "5", "--unix-socket"]);
    curl.args([&socket, "--request", "POST", "--write-out", "%{http_code}", "http://agent/v1/reload"]).run()
}

fn what_a_process_has_for_life_is_refused_by_name(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    let steering = Footprint::of(sandbox);
    let yaml = Agent::yaml(sandbox, "");
    let other =
        |line: &str| if line.starts_with("mode:") { "mode: auto".to_owned() } else { format!("{line}2") };
    let keys = ["mode: ", "  run: ", "  state: ", "  pins: ", "  hosts: ", "  hooks: "];
    for key in keys {
        let line = yaml.lines().find(|line| line.starts_with(key)).expect("a setting");
        // Nor does what else has changed take effect.
        let changed = yaml.replace(line, &other(line)) + "capture: { exclude: [0.0.0.0/0] }\n";
        fs::write(sandbox.path("agent.yaml"), changed).expect("write agent.yaml");
        let answer = post_reload(sandbox);
        let name = key.trim().trim_end_matches(':');
        let named = if name == "mode" { "mode".to_owned() } else { format!("paths.{name}") };
        let told = format!("{named} cannot change while the daemon runs, and nothing has changed; ");
        assert!(answer.ok().contains(&told) && answer.ok().ends_with("400"), "{answer:?}");
    }
    assert_eq!(Footprint::of(sandbox), steering);
    answers(sandbox).are_balanced();

    let run = yaml.replace("/run\n", "/run2\n");
    fs::write(sandbox.path("agent.yaml"), run).expect("write agent.yaml");
    let lost = Agent::command(sandbox, &["reload"]);
    assert!(lost.failed_with(1).contains("another paths.run has to be restarted"), "{lost:?}");
    Agent::configure(sandbox, "");
    assert_eq!(mesh.agent.status().services.len(), 1);
}

fn a_hangup_reloads(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    Agent::configure(sandbox, "failure: closed\n");
    mesh.agent.hang_up();
    let failure = || {
        let status = Agent::command(sandbox, &["status", "--json"]);
        let status: Value = serde_json::from_str(&status.stdout).unwrap_or_default();
        status["services"][0]["failure"].clone()
    };
    eventually("the file was read", SOON, || failure() == "closed");
    eventually("the log says so", SOON, || mesh.agent.log().contains("the configuration was read anew"));
    answers(sandbox).are_balanced();
}

fn a_proxy_port_that_moves_is_followed(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    answers(sandbox).are_balanced();
    mesh.proxy.sigkill();
    let _proxy = Proxy::start_with(sandbox, &PROXY_CONFIG.replace("15001", "15002"));
    sandbox.settle();
    answers(sandbox).are_from(&["origin"]);
    let moved = Agent::yaml(sandbox, "").replace("15001", "15002");
    fs::write(sandbox.path("agent.yaml"), moved).expect("write agent.yaml");
    let reloaded = Agent::command(sandbox, &["reload"]);
    assert!(reloaded.ok().contains("+proxy") && reloaded.ok().contains("port 15002"), "{reloaded:?}");
    answers(sandbox).are_balanced();
    sandbox.settle();
    answers(sandbox).are_balanced();
    assert_eq!(mesh.agent.counters("shop").steered, 18);
}

fn a_policy_that_cannot_be_compiled_is_refused_whole(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    let steering = Footprint::of(sandbox);
    let ports: Vec<String> = (0..17).map(|range| (100 * range + 1000).to_string()).collect();
    let too_many =
        format!("capture: {{ include: [{{ cidr: 10.77.0.10/32, ports: [{}] }}] }}", ports.join(", "));
    let cart =
        format!("  cart: {{ cgroup: {}, {too_many} }}\nfailure: closed\n", sandbox.cgroup(Place::Cart));
    // Of an enabled service, and of one that may be enabled some day.
    for settings in [format!("{too_many}\nfailure: closed\n"), cart] {
        let refused = mesh.agent.reload(&settings);
        let complaint = refused.failed_with(1);
        let told = ["separate port ranges", "was not taken over", "nothing has changed"];
        assert!(told.iter().all(|words| complaint.contains(words)), "{complaint}");
        assert_eq!(Footprint::of(sandbox), steering);
    }
    answers(sandbox).are_balanced();
    mesh.proxy.sigkill();
    sandbox.settle();
    ask(sandbox, Place::Shop, &origin()).is("origin");
}

/// Both policies fit, but not beside each other, as they are for a moment.
fn what_the_kernel_has_no_room_for_leaves_what_held(sandbox: &Sandbox) {
    let many = |first: u8| {
        let blocks = (0..40_000).map(|n: u32| format!("{first}.{}.{}.0/24", n >> 8, n & 255));
        format!("capture: {{ exclude: [{}] }}\n", blocks.collect::<Vec<_>>().join(", "))
    };
    let mesh = Mesh::enabled(sandbox, &many(20));
    let refused = mesh.agent.reload(&format!("{}failure: closed\n", many(21)));
    let complaint = refused.failed_with(1);
    let told = ["write map MR_RULES: it is full", "nothing has changed"];
    assert!(told.iter().all(|words| complaint.contains(words)), "{complaint}");
    answers(sandbox).are_balanced();
    mesh.agent.reload("").ok();
    mesh.agent.reload(&many(21)).ok();
    answers(sandbox).are_balanced();
    mesh.agent.disable("shop");
    assert!(Footprint::of(sandbox).is_empty());
}

fn a_service_that_is_elsewhere_now_is_followed(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    move_shop_to(sandbox, &sandbox.cgroup(Place::Cart));
    let reloaded = Agent::command(sandbox, &["reload"]);
    reloaded.ok();
    ask(sandbox, Place::Shop, &origin()).is("origin");
    assert_ne!(ask(sandbox, Place::Cart, &origin()).ok(), "origin", "{reloaded:?}");
    mesh.agent.disable("shop");
    assert!(Footprint::of(sandbox).is_empty());
}

fn an_enabled_service_that_is_nowhere_now_is_refused(sandbox: &Sandbox) {
    let _mesh = Mesh::enabled(sandbox, "");
    let steering = Footprint::of(sandbox);
    move_shop_to(sandbox, "/no/such/cgroup");
    let refused = Agent::command(sandbox, &["reload"]);
    let complaint = refused.failed_with(1);
    assert!(complaint.contains("service `shop`: there is no cgroup /no/such/cgroup"), "{complaint}");
    assert!(complaint.contains("`mesh-redirect disable` it first"), "{complaint}");
    assert_eq!(Footprint::of(sandbox), steering);
    answers(sandbox).are_balanced();
}

fn move_shop_to(sandbox: &Sandbox, cgroup: &str) {
    let shop = format!("shop: {{ cgroup: {} }}", sandbox.cgroup(Place::Shop));
    let moved = Agent::yaml(sandbox, "").replace(&shop, &format!("shop: {{ cgroup: {cgroup} }}"));
    fs::write(sandbox.path("agent.yaml"), moved).expect("write agent.yaml");
}

fn what_the_proxy_can_route_is_followed_from_a_reload_on(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "capture: { exclude: [10.77.0.0/24] }\n");
    answers(sandbox).are_from(&["origin"]);
    mesh.agent.reload("capture: routable\n").ok();
    answers(sandbox).are_balanced();
    let instance = || ask(sandbox, Place::Shop, "10.77.0.2:8080");
    let before = mesh.agent.counters("shop").steered;
    instance().ok();
    assert_eq!(mesh.agent.counters("shop").steered, before + 1);
    ask(sandbox, Place::Shop, &format!("[{ORIGIN_V6}]:8080")).is("origin");

    mesh.proxy.reload(&PROXY_CONFIG.replace("10.77.0.2:8080, ", ""));
    eventually("what the proxy can route now is followed", SOON, || {
        let before = mesh.agent.counters("shop").passed_by_rule;
        instance().ok();
        mesh.agent.counters("shop").passed_by_rule > before
    });
    mesh.agent.reload("").ok();
    ask(sandbox, Place::Shop, &format!("[{ORIGIN_V6}]:8080")).is("b");
}

fn the_hook_goes_with_the_last_service_that_is_a_container(sandbox: &Sandbox) {
    let web = |scope: &str| format!("  web: {{ {scope} }}\n");
    let mesh = Mesh::start(sandbox, &web("container: '0123456789abcdef'"));
    mesh.agent.enable("web");
    let hook = sandbox.path("hooks.d/50-mesh-redirect.json");
    assert!(hook.exists());
    let reloaded = mesh.agent.reload(&web(&format!("cgroup: {}", sandbox.cgroup(Place::Cart))));
    assert!(reloaded.ok().contains("-file ") && !hook.exists(), "{reloaded:?}");
    assert_ne!(ask(sandbox, Place::Cart, &origin()).ok(), "origin");
    mesh.agent.reload(&web("container: '0123456789abcdef'")).ok();
    assert!(hook.exists());
    ask(sandbox, Place::Cart, &origin()).is("origin");
}

fn origin() -> String {
    format!("{ORIGIN}:8080")
}
