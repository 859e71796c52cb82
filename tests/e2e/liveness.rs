//! What happens to a service when its proxy is away, hangs, or is not who it should be.

use std::time::Duration;

use tests::{Counters, Mesh, ORIGIN, Place, Proxy, Sandbox, Upstream, answers, ask, ask_with, eventually};

scenarios![everywhere: without_a_proxy_an_open_service_connects_directly];
scenarios![
    without_a_proxy_a_closed_service_is_refused,
    one_service_may_be_closed_while_others_are_open,
    a_proxy_that_hangs_is_passed_by,
    a_foreign_program_on_the_proxys_port_gets_nothing,
];

/// curl's exit code where a connection could not be made.
const CURL_COULD_NOT_CONNECT: i32 = 7;

fn without_a_proxy_an_open_service_connects_directly(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "failure: open\n");
    answers(sandbox).are_balanced();

    mesh.proxy.sigkill();
    sandbox.settle();
    ask(sandbox, Place::Shop, &origin()).is("origin");
    let counters = match sandbox.mode.is_in_kernel() {
        true => Counters { steered: 6, passed_proxy_absent: 1, ..Counters::default() },
        false => Counters::default(),
    };
    assert_eq!(mesh.agent.counters("shop"), counters);

    let _proxy = Proxy::start(sandbox);
    eventually("a proxy that is back gets connections again", Duration::from_secs(3), || {
        ask(sandbox, Place::Shop, &origin()).ok() != "origin"
    });
}

fn without_a_proxy_a_closed_service_is_refused(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "failure: closed\n");
    answers(sandbox).are_balanced();

    mesh.proxy.sigkill();
    sandbox.settle();
    let complaint = sandbox.peer(Place::Shop).args(["connect", &origin()]).run();
    assert!(complaint.failed_with(1).contains("ECONNREFUSED"), "{complaint:?}");
    assert_eq!(mesh.agent.counters("shop"), Counters { steered: 6, refused: 1, ..Counters::default() });
    assert_eq!(mesh.origin.requests(), 0);
}

fn one_service_may_be_closed_while_others_are_open(sandbox: &Sandbox) {
    let cart = format!("  cart: {{ cgroup: {}, failure: closed }}\n", sandbox.cgroup(Place::Cart));
    let mesh = Mesh::enabled(sandbox, &cart);
    mesh.agent.enable("cart");
    mesh.proxy.sigkill();
    sandbox.settle();
    ask(sandbox, Place::Shop, &origin()).is("origin");
    ask(sandbox, Place::Cart, &origin()).failed_with(CURL_COULD_NOT_CONNECT);
}

fn a_proxy_that_hangs_is_passed_by(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    answers(sandbox).are_balanced();

    mesh.proxy.freeze();
    eventually("a proxy that hangs is passed by", Duration::from_secs(5), || {
        ask_with(sandbox, Place::Shop, &origin(), &["--max-time", "0.3"]).stdout == "origin"
    });
    mesh.proxy.thaw();
    eventually("a proxy that runs on gets connections again", Duration::from_secs(3), || {
        ask(sandbox, Place::Shop, &origin()).ok() != "origin"
    });
    assert!(mesh.agent.counters("shop").passed_proxy_absent > 0);
}

fn a_foreign_program_on_the_proxys_port_gets_nothing(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    mesh.proxy.sigkill();
    sandbox.settle();
    let intruder =
        Upstream::http_at(sandbox, Place::Outside, "intruder", &["127.0.0.1:15001", "[::1]:15001"]);
    answers(sandbox).are_from(&["origin"]);
    assert_eq!(intruder.connections(), 0);
}

fn origin() -> String {
    format!("{ORIGIN}:8080")
}
