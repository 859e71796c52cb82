//! What is not routed is relayed as bytes to where it was going.

use std::time::Duration;

use tests::{Counters, Mesh, ORIGIN, ORIGIN_V6, Place, Sandbox, Upstream, ask_with, eventually};

scenarios![
    a_half_closed_connection_is_relayed_to_the_end,
    a_large_transfer_arrives_whole,
    a_server_that_speaks_first_is_heard,
    a_connection_to_a_closed_port_is_reset,
    a_request_for_an_unknown_host_passes_untouched,
    what_a_client_sends_before_it_closes_arrives_where_it_was_going,
];

fn a_half_closed_connection_is_relayed_to_the_end(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    let (v4, v6) = (format!("{ORIGIN}:7000"), format!("[{ORIGIN_V6}]:7000"));
    for address in [&v4, &v6] {
        let _echo = Upstream::echo(sandbox, address);
        for bytes in ["1", "100000"] {
            half_close(sandbox, address, bytes);
        }
    }
    assert_eq!(mesh.agent.counters("shop"), Counters { steered: 4, ..Counters::default() });
}

fn a_large_transfer_arrives_whole(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    let address = format!("{ORIGIN}:7000");
    let _echo = Upstream::echo(sandbox, &address);
    half_close(sandbox, &address, "20000000");
    assert!(mesh.proxy.metrics().sum("mesh_proxy_tunnel_bytes_total", &[]) >= 40_000_000.0);
}

fn a_server_that_speaks_first_is_heard(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    let address = format!("{ORIGIN}:7025");
    let _greeter = Upstream::greeter(sandbox, &address);
    sandbox.peer(Place::Shop).args(["hello", &address]).run().is("220 greeter\n250 hello");
    assert_eq!(mesh.agent.counters("shop").steered, 1);
}

/// The connection itself succeeds, since the proxy is there; that nobody is behind it must show all the same.
fn a_connection_to_a_closed_port_is_reset(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    let client = sandbox.peer(Place::Shop).args(["hello", &format!("{ORIGIN}:7999")]).run();
    assert!(client.failed_with(1).contains("ECONNRESET"), "{client:?}");
    assert_eq!(mesh.agent.counters("shop").steered, 1);
}

fn a_request_for_an_unknown_host_passes_untouched(sandbox: &Sandbox) {
    let mesh = Mesh::start(sandbox, "");
    let request = [
        "--header",
        "Host: elsewhere.example",
        "--header",
        "X-Odd:  two  spaces",
        "--request-target",
        "/head",
    ];
    let head = || ask_with(sandbox, Place::Shop, &format!("{ORIGIN}:8080"), &request).ok().to_owned();
    let direct = head();
    mesh.agent.enable("shop");
    assert_eq!(head(), direct);
    assert_eq!(mesh.agent.counters("shop").steered, 1);
    assert_eq!(mesh.origin.requests(), 2);
}

/// The proxy accepts only when the client is long gone.
fn what_a_client_sends_before_it_closes_arrives_where_it_was_going(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    let other = Upstream::http(sandbox, "other", &[&format!("{ORIGIN}:8090")]);
    mesh.proxy.freeze();
    sandbox.peer(Place::Shop).args(["throw", &format!("{ORIGIN}:8090")]).run().ok();
    mesh.proxy.thaw();
    eventually("the request arrives", Duration::from_secs(5), || other.requests() == 1);
    assert_eq!(mesh.agent.counters("shop"), Counters { steered: 1, ..Counters::default() });
}

/// The shop sends so many bytes, closes its half, and gets them back with the echo's last words.
#[track_caller]
fn half_close(sandbox: &Sandbox, address: &str, bytes: &str) {
    let client = sandbox.peer(Place::Shop).args(["half-close", address, bytes]).run();
    client.is(&format!("{bytes} bytes"));
}
