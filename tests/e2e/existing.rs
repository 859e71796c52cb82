//! Connections that were open before a service was enabled, or are when it is disabled.

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;
use tests::{
    Agent, Conversation, Finished, Mesh, ORIGIN, ORIGIN_V6, Place, Sandbox, Upstream, ask, eventually,
};

scenarios![
    connections_from_before_are_told_and_kept,
    a_reset_closes_what_would_be_steered_of_that_service_and_nothing_else,
    connections_that_a_service_has_accepted_are_none_that_it_made,
    a_drain_waits_for_connections_to_end_and_closes_the_rest,
    a_drain_that_is_interrupted_leaves_the_rest_alone,
    a_disabled_services_steered_connections_are_closed_if_asked,
    without_a_proxy_nothing_is_closed,
];
scenarios![only hosts: names_tell_nothing_of_connections];

const SOON: Duration = Duration::from_secs(10);

fn connections_from_before_are_told_and_kept(sandbox: &Sandbox) {
    let echoes = Echoes::start(sandbox);
    let mesh = Mesh::start(sandbox, "");
    let (mut before, _others) = (echoes.linger(Place::Shop, &v4()), echoes.linger(Place::Stock, &v4()));
    let enabled = enable(sandbox, &["--json"]);
    let told = &json(&enabled)["existing"][0];
    assert_eq!((&told["service"], &told["count"], &told["open"]), (&"shop".into(), &1.into(), &1.into()));
    assert_eq!((&told["connections"][0]["remote"], &told["listed_at_most"]), (&v4().into(), &100.into()));
    let again = enable(sandbox, &[]);
    assert!(
        again.ok().contains("connections of shop that are open from before and not steered: 1;"),
        "{again:?}"
    );
    assert_eq!(unsteered(sandbox), 1);
    assert_eq!(before.ask("hello").trim(), "open");

    let mut steered = echoes.linger(Place::Shop, &v4());
    assert_eq!(steered.ask("hello").trim(), "open");
    assert_eq!((mesh.agent.counters("shop").steered, unsteered(sandbox)), (1, 1));
    drop(before);
    eventually("it is told no longer", SOON, || unsteered(sandbox) == 0);
}

fn a_reset_closes_what_would_be_steered_of_that_service_and_nothing_else(sandbox: &Sandbox) {
    let echoes = Echoes::start(sandbox);
    let _mesh = Mesh::start(sandbox, "capture: { exclude: [ports: [7001]] }\n");
    let mut closed = [
        echoes.linger(Place::Shop, &v4()),
        echoes.linger(Place::Shop, &v6()),
        sandbox.peer(Place::Shop).args(["linger", "--mapped", &v4()]).converse(),
        sandbox.peer_in("shop/worker").args(["linger", &v4()]).converse(),
    ];
    let mut left_alone = [
        echoes.linger(Place::Shop, &format!("{ORIGIN}:7001")),
        echoes.linger(Place::Stock, &v4()),
        echoes.linger(Place::Outside, &v6()),
    ];
    for connection in closed.iter_mut().chain(&mut left_alone) {
        assert_eq!(connection.ask("hello").trim(), "open");
    }
    let enabled = enable(sandbox, &["--existing=reset", "--json"]);
    let told = &json(&enabled)["existing"][0];
    assert_eq!((&told["count"], &told["reset"], &told["open"]), (&4.into(), &4.into(), &0.into()), "{told}");
    for connection in &mut closed {
        assert!(connection.ask("hello").contains("connection abort"), "{connection:?}");
    }
    for connection in &mut left_alone {
        assert_eq!(connection.ask("hello").trim(), "open");
    }
    assert_eq!(unsteered(sandbox), 0);
    // What is made anew is steered, and not closed when asked again.
    let mut steered = echoes.linger(Place::Shop, &v4());
    assert_eq!(steered.ask("hello").trim(), "open");
    enable(sandbox, &["--existing=reset"]).is("shop is already enabled");
    assert_eq!(steered.ask("hello").trim(), "open");
}

fn connections_that_a_service_has_accepted_are_none_that_it_made(sandbox: &Sandbox) {
    let _mesh = Mesh::start(sandbox, "");
    let server = "10.77.0.1:7100";
    let mut echo = sandbox.peer(Place::Shop).args(["echo", server]).serve(sandbox.path("echo.log"));
    echo.wait_until(|echo| echo.log().contains("listening"));
    let mut client = sandbox.peer(Place::Peer).args(["linger", server]).converse();
    assert_eq!(client.ask("hello").trim(), "open");
    let enabled = enable(sandbox, &["--existing=reset", "--json"]);
    assert_eq!(json(&enabled)["existing"][0]["count"].as_u64().unwrap_or_default(), 0, "{enabled:?}");
    assert_eq!(client.ask("hello").trim(), "open");
    assert_eq!(unsteered(sandbox), 0);
}

fn a_drain_waits_for_connections_to_end_and_closes_the_rest(sandbox: &Sandbox) {
    let echoes = Echoes::start(sandbox);
    let mesh = Mesh::start(sandbox, "");
    let ends = echoes.linger(Place::Shop, &v4());
    let drain = |timeout: &str| {
        let args = ["enable", "shop", "--existing=drain", "--drain-timeout", timeout, "--json"];
        Agent::program(sandbox, &args).begin()
    };
    let early = drain("20s");
    eventually("the service is enabled", SOON, || mesh.agent.status().services.len() == 1);
    // Nobody is held up.
    assert_eq!(unsteered(sandbox), 1);
    drop(ends);
    let early = early.finish();
    let told = &json(&early)["existing"][0];
    assert_eq!((&told["count"], &told["reset"], &told["open"]), (&1.into(), &0.into(), &0.into()), "{told}");

    mesh.agent.disable("shop");
    let (mut stays, ends) = (echoes.linger(Place::Shop, &v4()), echoes.linger(Place::Shop, &v6()));
    let rest = drain("2s");
    eventually("the service is enabled", SOON, || mesh.agent.status().services.len() == 1);
    drop(ends);
    let rest = rest.finish();
    let told = &json(&rest)["existing"][0];
    assert_eq!((&told["count"], &told["reset"], &told["open"]), (&2.into(), &1.into(), &0.into()), "{told}");
    assert!(stays.ask("hello").contains("connection abort"));
}

fn a_drain_that_is_interrupted_leaves_the_rest_alone(sandbox: &Sandbox) {
    let echoes = Echoes::start(sandbox);
    let mesh = Mesh::start(sandbox, "");
    let mut open = echoes.linger(Place::Shop, &v4());
    let mut drain =
        Agent::program(sandbox, &["enable", "shop", "--existing=drain"]).serve(sandbox.path("drain.log"));
    drain
        .wait_until(|drain| drain.log().contains("waiting up to 30s for open connections to end: 1 of shop"));
    drain.signal(Signal::SIGINT);
    drain.ended();
    assert_eq!(open.ask("hello").trim(), "open");
    assert_eq!(mesh.agent.status().services.len(), 1);
}

fn a_disabled_services_steered_connections_are_closed_if_asked(sandbox: &Sandbox) {
    let echoes = Echoes::start(sandbox);
    let mesh = Mesh::start(sandbox, "capture: { exclude: [ports: [7001]] }\n");
    let from_before = echoes.linger(Place::Shop, &v4());
    mesh.agent.enable_all(&["shop".to_owned(), "stock".to_owned()]);
    let mut steered = [
        echoes.linger(Place::Shop, &v4()),
        echoes.linger(Place::Shop, &v6()),
        sandbox.peer(Place::Shop).args(["linger", "--mapped", &v4()]).converse(),
    ];
    let mut left_alone = [
        from_before,
        echoes.linger(Place::Shop, &format!("{ORIGIN}:7001")),
        echoes.linger(Place::Stock, &v4()),
    ];
    for connection in steered.iter_mut().chain(&mut left_alone) {
        assert_eq!(connection.ask("hello").trim(), "open");
    }
    let kept = Agent::command(sandbox, &["disable", "shop"]);
    assert!(
        kept.ok().contains("connections of shop that are open from before and still steered: 3;"),
        "{kept:?}"
    );
    let reset = Agent::command(sandbox, &["disable", "shop", "--existing=reset"]);
    assert!(reset.ok().contains("still steered: 3 closed, 0 ended by themselves"), "{reset:?}");
    for connection in &mut steered {
        assert!(connection.ask("hello").contains("connection abort"), "{connection:?}");
    }
    for connection in &mut left_alone {
        assert_eq!(connection.ask("hello").trim(), "open");
    }
    ask(sandbox, Place::Shop, &format!("{ORIGIN}:8080")).is("origin");
}

fn without_a_proxy_nothing_is_closed(sandbox: &Sandbox) {
    let echoes = Echoes::start(sandbox);
    let mesh = Mesh::start(sandbox, "");
    let mut open = echoes.linger(Place::Shop, &v4());
    mesh.proxy.sigkill();
    for existing in ["--existing=reset", "--existing=drain"] {
        let refused = enable(sandbox, &[existing]);
        let complaint = refused.failed_with(1);
        let told = ["listens on port 15001", "would not be steered", "nothing was done"];
        assert!(told.iter().all(|words| complaint.contains(words)), "{complaint}");
    }
    assert!(mesh.agent.status().services.is_empty());
    assert_eq!(open.ask("hello").trim(), "open");
    let usage = enable(sandbox, &["--observe", "--existing=reset"]);
    assert!(usage.failed_with(2).contains("--observe"), "{usage:?}");
}

fn names_tell_nothing_of_connections(sandbox: &Sandbox) {
    let mesh = Mesh::start(sandbox, "");
    let refused = enable(sandbox, &["--existing=reset"]);
    assert!(refused.failed_with(1).contains("no connection tells by which name"), "{refused:?}");
    assert!(mesh.agent.status().services.is_empty());
    assert_eq!(json(&enable(sandbox, &["--json"]))["existing"], Value::Null);
    let status = Agent::command(sandbox, &["status", "--json"]);
    assert_eq!(json(&status)["services"][0]["unsteered"], Value::Null);
}

/// Echoes at the address that an application knows, at a port of each family, and at one that policy may exclude.
struct Echoes<'s> {
    sandbox: &'s Sandbox,
    _servers: [Upstream; 3],
}

impl<'s> Echoes<'s> {
    fn start(sandbox: &'s Sandbox) -> Self {
        let addresses = [v4(), v6(), format!("{ORIGIN}:7001")];
        Self { sandbox, _servers: addresses.map(|address| Upstream::echo(sandbox, &address)) }
    }

    /// One that was connected, and has been heard of.
    fn linger(&self, place: Place, address: &str) -> Conversation {
        let mut connection = self.sandbox.peer(place).args(["linger", address]).converse();
        assert_eq!(connection.ask("hello").trim(), "open");
        connection
    }
}

fn enable(sandbox: &Sandbox, options: &[&str]) -> Finished {
    Agent::command(sandbox, &[&["enable", "shop"], options].concat())
}

fn unsteered(sandbox: &Sandbox) -> u64 {
    let status = Agent::command(sandbox, &["status", "--json"]);
    json(&status)["services"][0]["unsteered"].as_u64().expect("a number")
}

fn json(finished: &Finished) -> Value {
    serde_json::from_str(&finished.stdout).unwrap_or_else(|error| panic!("{error}: {finished:?}"))
}

fn v4() -> String {
    format!("{ORIGIN}:7000")
}

fn v6() -> String {
    format!("[{ORIGIN_V6}]:7000")
}
