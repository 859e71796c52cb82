//! One version of the agent after another, in place, where programs, maps and links are of another ABI.

use std::fs;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;

use tests::{
    Agent, Answers, Build, Conversation, Footprint, Mesh, ORIGIN, Place, Proxy, RESOLVERS, Running, Sandbox,
    Upstream, answers, cgroup_path, eventually,
};

use crate::daemon::{every_request_was_proxied, origin};

scenarios![only ebpf:
    an_upgrade_under_load_fails_no_request_and_lets_none_escape,
    a_downgrade_under_load_fails_no_request_and_lets_none_escape,
    upgrades_and_downgrades_by_turns_fail_no_request_and_let_none_escape,
    a_daemon_killed_while_it_takes_over_is_succeeded_by_either_version,
    a_connection_from_before_goes_on_and_with_its_end_the_other_version_is_gone,
    a_unit_that_starts_before_the_daemon_is_upgraded_is_steered_from_its_first_connection,
    a_proxy_that_starts_before_the_daemon_is_upgraded_gets_connections,
    a_proxy_that_sends_no_heartbeats_is_known_to_the_next_version,
    queries_are_answered_by_the_resolver_that_was_asked_throughout_an_upgrade,
    cleanup_of_either_version_leaves_nothing_of_the_other,
    a_version_that_is_not_understood_is_refused_by_name_and_goes_on_steering,
    a_program_that_is_not_known_is_refused_by_name,
];

const SOON: Duration = Duration::from_secs(10);
/// Long enough to be in the middle of.
const A_WHILE: Duration = Duration::from_secs(1);

fn an_upgrade_under_load_fails_no_request_and_lets_none_escape(sandbox: &Sandbox) {
    one_after_another(sandbox, &[Build::Plain, Build::ChangedAbi]);
}

fn a_downgrade_under_load_fails_no_request_and_lets_none_escape(sandbox: &Sandbox) {
    one_after_another(sandbox, &[Build::ChangedAbi, Build::Plain]);
}

fn upgrades_and_downgrades_by_turns_fail_no_request_and_let_none_escape(sandbox: &Sandbox) {
    let by_turns = [Build::Plain, Build::ChangedAbi].repeat(3);
    one_after_another(sandbox, &by_turns);
}

fn one_after_another(sandbox: &Sandbox, builds: &[Build]) {
    let mesh = Mesh::start(sandbox, "");
    mesh.agent.stop();
    let mut agent = Agent::restart_as(builds[0], sandbox);
    agent.enable("shop");
    let first = versions(sandbox);
    let load = load(sandbox, 4 * builds.len());
    for build in &builds[1..] {
        sleep(A_WHILE);
        agent.stop();
        // Where it goes on at once, the version that comes back is still there.
        agent = Agent::restart_as(*build, sandbox);
    }
    the_other_version_is_gone(sandbox, &agent);
    assert_ne!(versions(sandbox), first);
    let answered = every_request_was_proxied(load);
    println!("{answered} requests through {} versions", builds.len());
    assert_eq!(mesh.origin.requests(), 0);
    let counters = agent.counters("shop");
    assert!(counters.steered > 0 && counters.passed_proxy_absent + counters.errors == 0, "{counters:?}");
}

fn a_daemon_killed_while_it_takes_over_is_succeeded_by_either_version(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    mesh.agent.stop();
    let load = load(sandbox, 20);
    let builds = [Build::ChangedAbi, Build::Plain].repeat(2);
    let upgrades = builds.iter().chain([Build::ChangedAbi, Build::ChangedAbi, Build::Plain].iter());
    for (build, milliseconds) in upgrades.zip([20, 60, 100, 150, 200, 300, 500]) {
        let log = sandbox.path("agent.log");
        let mut daemon = Agent::program_of(*build, sandbox, Place::Outside, &["run"]).serve(log);
        sleep(Duration::from_millis(milliseconds));
        daemon.signal(nix::sys::signal::Signal::SIGKILL);
        daemon.ended();
        let starting = Agent::program_of(build.other(), sandbox, Place::Cart, &["attach", "shop"]);
        starting.run().ok();
        is_steered(sandbox, Place::Cart);
    }
    let agent = Agent::restart_as(Build::ChangedAbi, sandbox);
    the_other_version_is_gone(sandbox, &agent);
    every_request_was_proxied(load);
    assert_eq!(mesh.origin.requests(), 0);
}

fn a_connection_from_before_goes_on_and_with_its_end_the_other_version_is_gone(sandbox: &Sandbox) {
    for build in [Build::Plain, Build::ChangedAbi] {
        let mesh = Mesh::start(sandbox, "");
        mesh.agent.stop();
        let agent = Agent::restart_as(build, sandbox);
        agent.enable("shop");
        let mut open = sandbox.program(Place::Shop, "python3").args(["-c", OVER_AND_OVER]).converse();
        goes_on(&mut open);
        agent.stop();

        let agent = Agent::restart_as(build.other(), sandbox);
        assert_eq!(agent.status().retiring.len(), 1);
        sleep(2 * A_WHILE);
        goes_on(&mut open);
        answers(sandbox).are_balanced();
        is_steered(sandbox, Place::Shop);
        assert_eq!((versions(sandbox).len(), agent.status().retiring.len()), (2, 1), "{}", agent.log());
        drop(open);
        the_other_version_is_gone(sandbox, &agent);
        assert!(agent.log().contains("the other version is gone"), "{}", agent.log());
        agent.disable("shop");
        nothing_is_left(sandbox);
    }
}

/// One connection for all requests; says whom the application sees at its other end, and who answers.
const OVER_AND_OVER: &str = "
import http.client, sys
connection = http.client.HTTPConnection('10.77.0.10', 8080, timeout=5)
for _ in sys.stdin:
    connection.request('GET', '/', headers={'Host': 'catalog'})
    peer = connection.sock.getpeername()[0]
    print(peer, connection.getresponse().read().decode(), flush=True)
";

#[track_caller]
fn goes_on(open: &mut Conversation) {
    let said = open.ask("");
    assert!(["a", "b"].map(|who| format!("{ORIGIN} {who}\n")).contains(&said), "{said}");
}

/// As systemd has it: a new cgroup, and in it the step before the unit's start, by whatever binary is there now.
fn a_unit_that_starts_before_the_daemon_is_upgraded_is_steered_from_its_first_connection(sandbox: &Sandbox) {
    let mesh = Mesh::start(sandbox, "");
    mesh.agent.stop();
    for build in [Build::Plain, Build::ChangedAbi] {
        let agent = Agent::restart_as(build, sandbox);
        agent.enable("shop");
        let before = versions(sandbox);
        for _ in 0..10 {
            starts_anew(sandbox, build.other());
        }
        agent.stop();
        starts_anew(sandbox, build.other());
        assert_eq!(versions(sandbox), before, "what steers is attached, and nothing else");
        let agent = Agent::restart_as(build, sandbox);
        is_steered(sandbox, Place::Shop);
        agent.stop();
        starts_anew(sandbox, build);
        let agent = Agent::restart_as(build.other(), sandbox);
        is_steered(sandbox, Place::Shop);
        the_other_version_is_gone(sandbox, &agent);
        agent.stop();
    }
    assert_eq!(mesh.origin.requests(), 0);
}

#[track_caller]
fn starts_anew(sandbox: &Sandbox, build: Build) {
    fs::remove_dir(cgroup_path(&sandbox.cgroup(Place::Shop))).expect("remove the shop's cgroup");
    Agent::program_of(build, sandbox, Place::Shop, &["attach", "shop"]).run().ok();
    is_steered(sandbox, Place::Shop);
}

fn a_proxy_that_starts_before_the_daemon_is_upgraded_gets_connections(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    mesh.agent.stop();
    mesh.proxy.sigkill();
    fs::remove_dir(cgroup_path(&sandbox.cgroup(Place::Proxy))).expect("remove the proxy's cgroup");
    Agent::program_of(Build::ChangedAbi, sandbox, Place::Proxy, &["attach", "--proxy"]).run().ok();
    let _proxy = Proxy::start(sandbox);
    is_steered(sandbox, Place::Shop);
    let agent = Agent::restart_as(Build::ChangedAbi, sandbox);
    is_steered(sandbox, Place::Shop);
    the_other_version_is_gone(sandbox, &agent);
}

/// A listener that says nothing: it is known by having been opened in the proxy's cgroup, before the next version was there.
fn a_proxy_that_sends_no_heartbeats_is_known_to_the_next_version(sandbox: &Sandbox) {
    let agent = Agent::start(sandbox, "failure: closed\n");
    agent.enable("shop");
    let _listener = Upstream::http_at(sandbox, Place::Proxy, "proxy", &["127.0.0.1:15001"]);
    let who = || sandbox.peer(Place::Shop).args(["connect", &origin()]).run();
    who().is(&format!("{} proxy", origin()));
    agent.stop();
    let agent = Agent::restart_as(Build::ChangedAbi, sandbox);
    the_other_version_is_gone(sandbox, &agent);
    who().is(&format!("{} proxy", origin()));
}

fn queries_are_answered_by_the_resolver_that_was_asked_throughout_an_upgrade(sandbox: &Sandbox) {
    let mesh = Mesh::start(sandbox, "capture: { dns: true }\n");
    let [first, other] = [("first", RESOLVERS[0]), ("other", ITS_RIVAL)];
    let rival = ["address", "add", &format!("{ITS_RIVAL}/24"), "dev", "eth0"];
    sandbox.program(Place::Peer, "ip").args(rival).run().ok();
    let _resolvers =
        [first, other].map(|(name, address)| Upstream::resolver(sandbox, Place::Peer, name, &[address]));
    mesh.agent.enable("shop");
    let connected = |address: &str| {
        sandbox.program(Place::Shop, "python3").args(["-c", &format!("{ASK}{IN_TURN}"), address]).converse()
    };
    let mut from_before = connected(first.1);
    from_before.ask("");
    let throughout = [&format!("{ASK}{THROUGHOUT}"), "12", other.0, other.1, first.0, first.1];
    let queries = sandbox.program(Place::Shop, "python3").arg("-c").args(throughout).begin();
    let mut agent = mesh.agent;
    for build in [Build::ChangedAbi, Build::Plain] {
        sleep(A_WHILE);
        agent.stop();
        agent = Agent::restart_as(build, sandbox);
        the_other_version_is_gone(sandbox, &agent);
        assert_eq!(from_before.ask(""), format!("{0} {0} first\n", first.1));
        assert_eq!(connected(other.1).ask(""), format!("{0} {0} other\n", other.1));
    }
    let answers: Answers = serde_json::from_str(queries.finish().ok()).expect("the answers as JSON");
    answers.are_from(&["first", "other", "virtual"]);
}

/// A resolver that would have the same port of the proxy's as the first one, if it were asked before it.
const ITS_RIVAL: &str = "10.77.0.69";

/// A query for a name, of a kind, on a socket that is connected.
const ASK: &str = r"
import json, socket, sys, time
def connected(address):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.settimeout(5)
    s.connect((address, 53))
    return s
def ask(s, name, kind):
    labels = b''.join(bytes([len(label)]) + label for label in name.split(b'.'))
    s.send(b'\x12\x34\1\0\0\1\0\0\0\0\0\0' + labels + bytes([0, 0, kind, 0, 1]))
    return s.recvfrom(512)
A, TXT = 1, 16
";
/// Whom the socket is connected to, whom the answer came from, and who that is.
const IN_TURN: &str = r"
s = connected(sys.argv[1])
for _ in sys.stdin:
    answer, sender = ask(s, b'who.test', TXT)
    print(s.getpeername()[0], sender[0], answer[-5:].decode(), flush=True)
";
/// For so many seconds: who each resolver says it is, and whether names of the proxy's are answered by it.
const THROUGHOUT: &str = r"
end, answers = time.time() + int(sys.argv[1]), {}
resolvers = list(zip(sys.argv[2::2], sys.argv[3::2]))
while time.time() < end:
    for name, address in resolvers:
        with connected(address) as s:
            try:
                who = ask(s, b'who.test', TXT)[0][-5:].decode('latin1')
                routed = 'virtual' if ask(s, b'catalog', A)[0][-4] == 241 else 'escaped'
            except OSError as error:
                who = routed = str(error)
            for what in [who if who == name else f'{who} for {name}', routed]:
                answers[what] = answers.get(what, 0) + 1
    time.sleep(0.005)
print(json.dumps(answers))
";

fn cleanup_of_either_version_leaves_nothing_of_the_other(sandbox: &Sandbox) {
    for build in [Build::Plain, Build::ChangedAbi] {
        let mesh = Mesh::enabled(sandbox, "");
        let mut open = sandbox.program(Place::Shop, "python3").args(["-c", OVER_AND_OVER]).converse();
        goes_on(&mut open);
        mesh.agent.stop();
        Agent::restart_as(Build::ChangedAbi, sandbox).sigkill();
        assert_eq!(versions(sandbox).len(), 2);
        is_cleaned_up_by(sandbox, build);
        // The connection itself lives on.
        let said = open.ask("");
        assert!(["a\n", "b\n"].iter().any(|who| said.ends_with(who)), "{said}");
    }
    // One that has more than this one knows of.
    let mesh = Mesh::enabled(sandbox, "");
    mesh.agent.stop();
    make_later_version(sandbox);
    is_cleaned_up_by(sandbox, Build::Plain);
}

#[track_caller]
fn is_cleaned_up_by(sandbox: &Sandbox, build: Build) {
    let steering = Footprint::of(sandbox);
    Agent::program_of(build, sandbox, Place::Outside, &["cleanup"]).run().ok();
    nothing_is_left(sandbox);
    steering.is_gone();
    assert!(!sandbox.pins().exists(), "{} is still there", sandbox.pins().display());
}

fn a_version_that_is_not_understood_is_refused_by_name_and_goes_on_steering(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    mesh.agent.stop();
    let unknown = versions(sandbox)[0].join("future");
    fs::create_dir(&unknown).expect("make a folder");
    let steering = Footprint::of(sandbox);
    let refused = Agent::program_of(Build::ChangedAbi, sandbox, Place::Outside, &["run"]).run();
    let complaint = refused.failed_with(1);
    assert!(complaint.contains(&unknown.display().to_string()) && complaint.contains("cleanup"));
    assert_eq!(Footprint::of(sandbox), steering);
    answers(sandbox).are_balanced();

    fs::remove_dir(&unknown).expect("remove it");
    let agent = Agent::restart_as(Build::ChangedAbi, sandbox);
    the_other_version_is_gone(sandbox, &agent);
    answers(sandbox).are_balanced();
}

fn a_program_that_is_not_known_is_refused_by_name(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    mesh.agent.stop();
    let program = make_later_version(sandbox);
    let refused = Agent::program_of(Build::Plain, sandbox, Place::Cart, &["attach", "shop"]).run();
    let complaint = refused.failed_with(1);
    assert!(complaint.contains(&program.display().to_string()) && complaint.contains("restart"));

    let agent = Agent::restart(sandbox);
    the_other_version_is_gone(sandbox, &agent);
    answers(sandbox).are_balanced();
    assert_eq!(mesh.origin.requests(), 0);
}

/// Makes of what is pinned a version with a map and a program of its own, and says where the program is.
fn make_later_version(sandbox: &Sandbox) -> PathBuf {
    let later = sandbox.pins().join("v9");
    fs::rename(&versions(sandbox)[0], &later).expect("rename the pins");
    let [maps, programs] = ["maps", "programs"].map(|folder| later.join(folder));
    let program = programs.join("mr_future");
    fs::hard_link(maps.join("MR_RULES"), maps.join("MR_FUTURE")).expect("pin a map");
    fs::hard_link(programs.join("mr_connect4"), &program).expect("pin a program");
    program
}

/// Eight clients, which together connect a thousand times a second.
fn load(sandbox: &Sandbox, seconds: usize) -> Running {
    let milliseconds = (1000 * seconds).to_string();
    sandbox.peer(Place::Shop).args(["load", &origin(), "8", &milliseconds, "1000"]).begin()
}

#[track_caller]
fn is_steered(sandbox: &Sandbox, place: Place) {
    let said = sandbox.peer(place).args(["connect", &origin()]).run();
    assert!(["a", "b"].map(|who| format!("{} {who}", origin())).contains(&said.ok().to_owned()), "{said:?}");
}

#[track_caller]
fn the_other_version_is_gone(sandbox: &Sandbox, agent: &Agent<'_>) {
    eventually("the other version is gone", SOON, || agent.status().retiring.is_empty());
    assert_eq!(versions(sandbox).len(), 1);
}

/// The kernel lets go a moment after the last reference.
#[track_caller]
fn nothing_is_left(sandbox: &Sandbox) {
    eventually("nothing is left", SOON, || Footprint::of(sandbox).is_empty());
}

/// Folders of versions that are pinned.
fn versions(sandbox: &Sandbox) -> Vec<PathBuf> {
    let entries = fs::read_dir(sandbox.pins()).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}
