//! Policies by what the proxy can route, as it says itself.

use std::time::Duration;

use tests::{
    Agent, INSTANCES, Mesh, ORIGIN, ORIGIN_V6, PROXY_CONFIG, Place, Sandbox, answers, ask, eventually,
};

scenarios![
    what_the_proxy_can_route_is_steered_and_followed,
    a_service_of_the_proxys_is_excluded_wherever_it_is,
    what_was_routed_last_holds_while_the_proxy_is_away,
];

const SOON: Duration = Duration::from_secs(5);

fn what_the_proxy_can_route_is_steered_and_followed(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "capture: routable\n");
    becomes(sandbox, &["a", "b"]);
    answers(sandbox).are_balanced();
    // Another port of the same address is routed too, the same name's other family is not known.
    assert!(["a", "b"].contains(&ask(sandbox, Place::Shop, &format!("{ORIGIN}:8081")).ok()));
    ask(sandbox, Place::Shop, &format!("[{ORIGIN_V6}]:8080")).is("origin");
    let instance = ask(sandbox, Place::Shop, &format!("{}:8080", INSTANCES[0]));
    assert!(["a", "b"].contains(&instance.ok()));

    mesh.proxy.reload(&PROXY_CONFIG.replace("[catalog, 10.77.0.10]", "[catalog]"));
    becomes(sandbox, &["origin"]);
    mesh.proxy.reload(PROXY_CONFIG);
    becomes(sandbox, &["a", "b"]);
}

fn a_service_of_the_proxys_is_excluded_wherever_it_is(sandbox: &Sandbox) {
    let settings = "capture: { exclude: [{ service: catalog, ports: [8080] }] }\n";
    let _mesh = Mesh::enabled(sandbox, settings);
    becomes(sandbox, &["origin"]);
    ask(sandbox, Place::Shop, &format!("{}:8080", INSTANCES[1])).is("b");
    assert!(["a", "b"].contains(&ask(sandbox, Place::Shop, &format!("{ORIGIN}:8081")).ok()));
    let explained = Agent::command(sandbox, &["explain", "shop", &format!("{ORIGIN}:8080")]);
    assert!(explained.ok().contains("exclude service catalog ports 8080"), "{explained:?}");
}

fn what_was_routed_last_holds_while_the_proxy_is_away(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "capture: routable\nfailure: closed\n");
    becomes(sandbox, &["a", "b"]);
    mesh.proxy.sigkill();
    mesh.agent.stop();
    let _agent = Agent::restart(sandbox);
    sandbox.settle();
    let connect = |address: &str| sandbox.peer(Place::Shop).args(["connect", address]).run();
    let refused = connect(&format!("{ORIGIN}:8080"));
    assert!(refused.failed_with(1).contains("ECONNREFUSED"), "{refused:?}");
    connect(&format!("[{ORIGIN_V6}]:8080")).ok();
}

/// Soon, since the daemon asks twice a second.
#[track_caller]
fn becomes(sandbox: &Sandbox, servers: &[&str]) {
    eventually("the shop gets where it shall", SOON, || {
        servers.contains(&ask(sandbox, Place::Shop, &format!("{ORIGIN}:8080")).ok())
    });
}
