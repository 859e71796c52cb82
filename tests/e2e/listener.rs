//! The proxy's listener: reached on purpose, a byte at a time, and on its way out.

use std::thread::sleep;
use std::time::Duration;

use tests::{Mesh, Place, Sandbox, ask, ask_with, slow_request};

scenarios![
    a_connection_made_on_purpose_is_routed_by_host,
    a_host_nobody_knows_is_refused_without_an_origin,
    a_request_that_comes_in_pieces_is_routed,
    a_draining_proxy_finishes_open_requests,
];

fn a_connection_made_on_purpose_is_routed_by_host(sandbox: &Sandbox) {
    let mesh = Mesh::start(sandbox, "");
    for address in ["127.0.0.1:15001", "[::1]:15001"] {
        let answer = ask_with(sandbox, Place::Outside, address, &["--header", "Host: CATALOG:8080"]);
        assert!(["a", "b"].contains(&answer.ok()), "{answer:?}");
    }
    let metrics = mesh.proxy.metrics();
    assert_eq!(metrics.sum("mesh_proxy_connections_total", &[r#"kind="direct""#]), 2.0);
    assert_eq!(metrics.sum("mesh_proxy_connections_total", &[r#"kind="steered""#]), 0.0);
}

fn a_host_nobody_knows_is_refused_without_an_origin(sandbox: &Sandbox) {
    let mesh = Mesh::start(sandbox, "");
    let options =
        ["--header", "Host: elsewhere.example", "--output", "/dev/null", "--write-out", "%{http_code}"];
    let code = ask_with(sandbox, Place::Outside, "127.0.0.1:15001", &options);
    assert!(["404", "421"].contains(&code.ok()), "{code:?}");
    assert_eq!(mesh.origin.requests(), 0);
}

fn a_request_that_comes_in_pieces_is_routed(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    let answer = sandbox.peer(Place::Shop).args(["dribble", "10.77.0.10:8080"]).run();
    assert!(["a", "b"].contains(&answer.ok()), "{answer:?}");
    assert_eq!(mesh.agent.counters("shop").steered, 1);
}

fn a_draining_proxy_finishes_open_requests(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    let open = slow_request(sandbox);
    mesh.proxy.terminate();
    sleep(Duration::from_millis(200));
    sandbox.settle();

    ask(sandbox, Place::Shop, "10.77.0.10:8080").is("origin");
    let answer = open.finish();
    assert!(["a", "b"].contains(&answer.ok()), "{answer:?}");
    mesh.proxy.drained();
}
