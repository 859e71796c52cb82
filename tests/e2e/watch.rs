//! `watch`: decisions, told while they are made, to as many as want to know, at no connection's expense.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::{Value, json};

use tests::{
    Agent, Footprint, Mesh, ORIGIN, Place, Process, RESOLVERS, Sandbox, Upstream, answers, binary, eventually,
};

scenarios![only ebpf:
    every_kind_of_decision_says_who_where_and_why,
    a_query_is_told_and_one_too_many_is_an_error,
    only_the_services_that_were_asked_for_are_shown,
    what_exceeds_the_rate_is_counted,
    a_watcher_that_does_not_read_hinders_nobody,
    what_is_enabled_later_is_shown_too,
    the_hooks_tell_nothing_when_the_last_watcher_has_left,
    the_hooks_stop_by_themselves_when_the_daemon_is_dead,
    it_ends_when_nobody_reads_it,
    a_service_that_is_not_enabled_cannot_be_watched,
];
scenarios![only nftables: nftables_tells_nobody_and_says_so];
scenarios![only hosts: a_hosts_file_tells_nobody_and_says_so];

const SOON: Duration = Duration::from_secs(10);

/// A `mesh-redirect watch --json`.
struct Watch(Process);

impl Watch {
    /// One that shows what is decided from now on: connections to `ping` of the shop's are made until it does.
    #[track_caller]
    fn start(sandbox: &Sandbox, args: &[&str]) -> Self {
        let watch = Self::begin(sandbox, args);
        eventually("it shows decisions", SOON, || {
            ping(sandbox, Place::Shop);
            !watch.of("shop").is_empty()
        });
        watch
    }

    fn begin(sandbox: &Sandbox, args: &[&str]) -> Self {
        let log = sandbox.path(&format!("watch{}.log", args.join("")));
        Self(Agent::program(sandbox, &[&["watch", "--json"], args].concat()).serve(log))
    }

    fn lines(&self) -> Vec<Value> {
        let log = self.0.log();
        let whole = log.rsplit_once('\n').map_or("", |(whole, _)| whole);
        whole.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
    }

    /// Decisions of a service.
    fn of(&self, service: &str) -> Vec<Value> {
        self.lines().into_iter().filter(|line| line["service"] == service).collect()
    }

    /// The decision on a connection of a process.
    #[track_caller]
    fn by(&self, pid: u32) -> Value {
        let mut found = None;
        eventually("the decision is shown", SOON, || {
            found = self.lines().into_iter().find(|line| line["pid"] == pid);
            found.is_some()
        });
        found.unwrap_or_default()
    }

    /// How many decisions were shown, and how many were said not to be.
    fn shown_and_dropped(&self) -> (u64, u64) {
        let lines = self.lines();
        let dropped = lines.iter().filter_map(|line| line["dropped"].as_u64());
        (lines.iter().filter(|line| line.get("decision").is_some()).count() as u64, dropped.sum())
    }
}

/// Something that is never steered.
fn ping(sandbox: &Sandbox, place: Place) {
    connect(sandbox, place, "127.0.0.1:9");
}

/// A connection of a process that has ended then; says which one it was.
#[track_caller]
fn connect(sandbox: &Sandbox, place: Place, address: &str) -> u32 {
    let mut process = sandbox.peer(place).args(["decide", address]).serve(sandbox.path("connects.log"));
    let pid = process.pid();
    assert!(process.ended().success());
    pid
}

fn every_kind_of_decision_says_who_where_and_why(sandbox: &Sandbox) {
    let cart = format!("  cart: {{ cgroup: {}, failure: closed }}\n", sandbox.cgroup(Place::Cart));
    let mesh = Mesh::start(sandbox, &(cart + "capture:\n  exclude: [10.77.0.8/29]\n"));
    mesh.agent.enable_all(&["shop".to_owned(), "cart".to_owned()]);
    Agent::command(sandbox, &["enable", "--observe", "stock"]).ok();
    let watch = Watch::start(sandbox, &[]);

    let steered = watch.by(connect(sandbox, Place::Shop, "10.77.0.2:8080"));
    assert_eq!(steered["version"], 1);
    assert!(steered["time"].as_str().is_some_and(|time| time.starts_with("20") && time.ends_with('Z')));
    let expected = json!({
        "service": "shop", "command": "peer", "uid": 0, "destination": "10.77.0.2:8080", "transport": "tcp",
        "decision": "steered",
    });
    expected
        .as_object()
        .expect("fields")
        .iter()
        .for_each(|(field, value)| assert_eq!(&steered[field], value));
    assert!(steered["rule"].as_str().is_some_and(|rule| rule.contains("covers it")), "{steered}");

    let by_rule = watch.by(connect(sandbox, Place::Shop, &format!("{ORIGIN}:8080")));
    assert_eq!(by_rule["decision"], "passed_by_rule");
    assert!(by_rule["rule"].as_str().is_some_and(|rule| rule.contains("10.77.0.8/29")), "{by_rule}");
    let v6 = watch.by(connect(sandbox, Place::Shop, "[fd77::2]:8080"));
    assert_eq!((&v6["destination"], &v6["decision"]), (&json!("[fd77::2]:8080"), &json!("steered")));
    let mapped = watch.by(connect(sandbox, Place::Shop, "[::ffff:10.77.0.2]:8080"));
    assert_eq!(mapped["destination"], "10.77.0.2:8080");
    let observed = watch.by(connect(sandbox, Place::Stock, "10.77.0.2:8080"));
    assert_eq!((&observed["service"], &observed["decision"]), (&json!("stock"), &json!("observed")));

    mesh.proxy.sigkill();
    let absent = watch.by(connect(sandbox, Place::Shop, "10.77.0.2:8080"));
    assert_eq!(absent["decision"], "passed_proxy_absent");
    let refused = watch.by(connect(sandbox, Place::Cart, "10.77.0.2:8080"));
    assert_eq!((&refused["service"], &refused["decision"]), (&json!("cart"), &json!("refused")));
    assert_eq!(watch.shown_and_dropped().1, 0);
}

fn a_query_is_told_and_one_too_many_is_an_error(sandbox: &Sandbox) {
    let _mesh = Mesh::enabled(sandbox, "capture: { dns: true }\n");
    let _resolver = Upstream::resolver(sandbox, Place::Peer, "resolver", &[RESOLVERS[0]]);
    let watch = Watch::start(sandbox, &[]);
    let dig = [&format!("@{}", RESOLVERS[0]), "+short", "catalog"];
    sandbox.program(Place::Shop, "dig").args(dig).run().ok();
    // There are sixteen places for resolvers, of which one is taken.
    let script = "import socket\n\
                  for last in range(16): socket.socket(type=socket.SOCK_DGRAM).connect((f'10.77.0.{100 + last}', 53))";
    sandbox.program(Place::Shop, "python3").args(["-c", script]).run().ok();
    let decided = |decision: &str| {
        watch.of("shop").into_iter().filter(|line| line["decision"] == decision).collect::<Vec<_>>()
    };
    eventually("all are shown", SOON, || decided("query").len() == 16 && decided("error").len() == 1);
    let query = &decided("query")[0];
    assert_eq!((&query["destination"], &query["transport"]), (&json!("10.77.0.53:53"), &json!("udp")));
    assert_eq!(decided("error")[0]["command"], "python3");
}

fn only_the_services_that_were_asked_for_are_shown(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    mesh.agent.enable("stock");
    let (shop, all) = (Watch::start(sandbox, &["shop"]), Watch::start(sandbox, &[]));
    eventually("those of the other are shown", SOON, || {
        ping(sandbox, Place::Stock);
        !all.of("stock").is_empty()
    });
    let pid = connect(sandbox, Place::Shop, "10.77.0.2:8080");
    shop.by(pid);
    all.by(pid);
    assert!(shop.of("stock").is_empty());
}

fn what_exceeds_the_rate_is_counted(sandbox: &Sandbox) {
    const CONNECTS: u64 = 2000;
    let mesh = Mesh::enabled(sandbox, "");
    let watch = Watch::start(sandbox, &["--rate", "5"]);
    let before = settled(&watch);
    connect_often(sandbox, CONNECTS);
    let counted = mesh.agent.counters("shop").passed_by_rule;
    assert!(counted > CONNECTS);
    eventually("each is shown or counted", SOON, || {
        let (shown, dropped) = watch.shown_and_dropped();
        shown + dropped == before + CONNECTS
    });
    let (shown, dropped) = watch.shown_and_dropped();
    assert!(dropped > CONNECTS / 2, "{shown} were shown, {dropped} dropped");
}

/// How many decisions were shown or counted, when there are no more to come.
fn settled(watch: &Watch) -> u64 {
    let sum = || {
        let (shown, dropped) = watch.shown_and_dropped();
        shown + dropped
    };
    let mut before = sum();
    eventually("no more is shown", SOON, || {
        std::thread::sleep(Duration::from_millis(1500));
        std::mem::replace(&mut before, sum()) == before
    });
    before
}

/// Connections of the shop's that are refused at once.
#[track_caller]
fn connect_often(sandbox: &Sandbox, times: u64) {
    let script = format!(
        "import socket
for _ in range({times}):
    with socket.socket() as client: client.connect_ex(('127.0.0.1', 9))"
    );
    sandbox.program(Place::Shop, "python3").args(["-c", &script]).run().ok();
}

fn a_watcher_that_does_not_read_hinders_nobody(sandbox: &Sandbox) {
    const CONNECTS: u64 = 20_000;
    let mesh = Mesh::enabled(sandbox, "");
    let mut deaf = UnixStream::connect(sandbox.path("run/agent.sock")).expect("connect to the agent");
    let request = b"GET /v1/watch?rate=100000 HTTP/1.1\r\nhost: agent\r\n\r\n";
    deaf.write_all(request).expect("ask to watch");
    let watch = Watch::start(sandbox, &["--rate", "100000"]);
    let before = settled(&watch);
    connect_often(sandbox, CONNECTS);
    answers(sandbox).are_balanced();
    eventually("the other is shown all of it", SOON, || {
        let (shown, dropped) = watch.shown_and_dropped();
        shown + dropped >= before + CONNECTS
    });
    assert_eq!(mesh.agent.status().services.len(), 1);

    // When it reads at last it learns that it has missed some.
    deaf.set_read_timeout(Some(SOON)).expect("set a timeout");
    let (mut read, mut chunk) = (Vec::new(), [0; 1 << 16]);
    while !String::from_utf8_lossy(&read).contains("\n{\"dropped\":") {
        let count = deaf.read(&mut chunk).expect("read on");
        assert_ne!(count, 0, "the stream has ended");
        read.extend_from_slice(&chunk[..count]);
    }
}

fn what_is_enabled_later_is_shown_too(sandbox: &Sandbox) {
    let mesh = Mesh::start(sandbox, "");
    let watch = Watch::begin(sandbox, &[]);
    for round in 1..=2 {
        mesh.agent.enable("shop");
        let before = watch.of("shop").len();
        eventually(&format!("it is shown in round {round}"), SOON, || {
            ping(sandbox, Place::Shop);
            watch.of("shop").len() > before
        });
        mesh.agent.disable("shop");
    }
    let footprint = Footprint::of(sandbox);
    assert!(footprint.is_empty(), "{footprint:?}");
}

fn the_hooks_tell_nothing_when_the_last_watcher_has_left(sandbox: &Sandbox) {
    let _mesh = Mesh::enabled(sandbox, "");
    let watch = Watch::start(sandbox, &[]);
    assert!(told_of_a_ping(sandbox) > 0);
    drop(watch);
    eventually("nothing is told", SOON, || told_of_a_ping(sandbox) == 0);
    // And what was told to nobody is not shown to the next one.
    let next = Watch::start(sandbox, &["--count", "1"]);
    assert_eq!(next.lines().len(), 1);
}

fn the_hooks_stop_by_themselves_when_the_daemon_is_dead(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    let mut watch = Watch::start(sandbox, &[]);
    mesh.agent.sigkill();
    assert_eq!(watch.0.ended().code(), Some(1));
    assert!(watch.0.log().contains("the daemon has ended"), "{}", watch.0.log());
    eventually("nothing is told", SOON, || told_of_a_ping(sandbox) == 0);
    answers(sandbox).are_balanced();

    let _agent = Agent::restart(sandbox);
    let next = Watch::start(sandbox, &["shop"]);
    next.by(connect(sandbox, Place::Shop, "10.77.0.2:8080"));
}

/// How many decisions the hooks tell, or would if there was room, when there is one.
#[track_caller]
fn told_of_a_ping(sandbox: &Sandbox) -> u64 {
    let before = told(sandbox);
    ping(sandbox, Place::Shop);
    told(sandbox).abs_diff(before)
}

/// Of the second that is now, over all CPUs.
#[track_caller]
fn told(sandbox: &Sandbox) -> u64 {
    let pin = sandbox.pins().join("v4/maps/MR_LIMITS").display().to_string();
    let lookup = ["--json", "map", "lookup", "pinned", &pin, "key", "0", "0", "0", "0"];
    let found = sandbox.program(Place::Outside, "bpftool").args(lookup).run();
    let found: Value = serde_json::from_str(found.ok()).expect("the limits as JSON");
    let each = found["values"].as_array().expect("a value for each CPU").iter();
    each.map(|limit| number(&limit["value"].as_array().expect("bytes")[8..16])).sum()
}

fn number(bytes: &[Value]) -> u64 {
    let byte = |byte: &Value| {
        let hex = byte.as_str().and_then(|byte| byte.strip_prefix("0x")).expect("a byte");
        u8::from_str_radix(hex, 16).expect("two digits")
    };
    bytes.iter().rev().fold(0, |number, next| number << 8 | u64::from(byte(next)))
}

fn it_ends_when_nobody_reads_it(sandbox: &Sandbox) {
    let _mesh = Mesh::enabled(sandbox, "");
    let [mesh_redirect, config] =
        [binary("mesh-redirect"), sandbox.path("agent.yaml")].map(|path| path.display().to_string());
    let shell = |script: &str| {
        sandbox.program(Place::Outside, "sh").args(["-c", script, &mesh_redirect, &config]).begin()
    };
    // Without any decision.
    shell(r#""$0" --config "$1" watch | true"#).finish().is("");
    // In the middle of many.
    let head = shell(r#""$0" --config "$1" watch --json | head --lines 2 | wc --lines"#);
    let counted = shell(r#""$0" --config "$1" watch --count 2"#);
    for _ in 0..50 {
        ping(sandbox, Place::Shop);
        std::thread::sleep(Duration::from_millis(20));
    }
    head.finish().is("2");
    let counted = counted.finish();
    let lines: Vec<&str> = counted.ok().lines().collect();
    assert!(lines[0].starts_with("TIME") && lines[1].contains("by rule"), "{counted:?}");
    assert_eq!(lines.len(), 3, "{counted:?}");
}

fn a_service_that_is_not_enabled_cannot_be_watched(sandbox: &Sandbox) {
    let _mesh = Mesh::enabled(sandbox, "");
    let refused = Agent::command(sandbox, &["watch", "shop", "stock"]);
    assert!(refused.failed_with(1).contains("`stock` is not enabled"), "{refused:?}");
    let refused = Agent::command(sandbox, &["watch", "shpo"]);
    assert!(refused.failed_with(1).contains("no service `shpo`"), "{refused:?}");
    Agent::command(sandbox, &["watch", "--rate", "0"]).failed_with(2);
}

fn nftables_tells_nobody_and_says_so(sandbox: &Sandbox) {
    cannot_be_watched(sandbox);
}

fn a_hosts_file_tells_nobody_and_says_so(sandbox: &Sandbox) {
    cannot_be_watched(sandbox);
}

#[track_caller]
fn cannot_be_watched(sandbox: &Sandbox) {
    let _agent = Agent::start(sandbox, "");
    let refused = Agent::command(sandbox, &["watch"]);
    let complaint = refused.failed_with(1);
    assert!(complaint.contains("mode ebpf alone") && complaint.contains(sandbox.mode.name()), "{complaint}");
}
