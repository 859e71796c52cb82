//! The control socket: for root alone, and not to be broken by what is sent to it.

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use serde_json::Value;
use tests::{Agent, Footprint, Mesh, Place, Sandbox, answers, eventually};

scenarios![
    only_root_may_use_the_socket,
    malformed_requests_are_answered_and_survived,
    callers_that_stop_halfway_keep_nobody_out,
    a_connection_is_for_one_request_and_need_not_be_read_to_its_end,
    many_callers_at_once_are_all_answered_as_if_one_came_after_the_other,
];

/// How much more memory the daemon may take under attack: what it holds of so many callers at once, and what the
/// allocator keeps.
const GROWTH_KIB: u64 = 96 << 10;

fn only_root_may_use_the_socket(sandbox: &Sandbox) {
    let agent = Agent::start(sandbox, "");
    let socket = sandbox.path("run/agent.sock");
    let mode = fs::metadata(&socket).expect("the socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "{mode:o}");
    assert!(status_as(sandbox, ROOT).contains("services"));
    assert!(!status_as(sandbox, NOBODY).contains("services"));

    // Permissions may be changed by mistake; the peer's credentials decide all the same.
    fs::set_permissions(sandbox.path("run"), Permissions::from_mode(0o755)).expect("open the folder");
    fs::set_permissions(&socket, Permissions::from_mode(0o666)).expect("open the socket");
    assert!(!status_as(sandbox, NOBODY).contains("services"));
    assert!(agent.status().services.is_empty());
}

const ROOT: &str = "0";
const NOBODY: &str = "65534";

/// What a user gets for the request that `status` makes.
fn status_as(sandbox: &Sandbox, user: &str) -> String {
    let socket = sandbox.path("run/agent.sock").display().to_string();
    let curl = ["curl", "--silent", "--max-time", "5", "--unix-socket", &socket, "http://agent/v1/status"];
    let setpriv = sandbox.program(Place::Outside, "setpriv").args(["--reuid", user, "--clear-groups", "--"]);
    setpriv.args(curl).run().stdout
}

fn malformed_requests_are_answered_and_survived(sandbox: &Sandbox) {
    let agent = Agent::start(sandbox, "");
    let long = "x".repeat(1_000_000);
    let requests = [
        "\0\0\0\0\r\n\r\n".to_owned(),
        "GET\r\n\r\n".to_owned(),
        request("GET /no/such/thing", ""),
        request("POST /v1/status", ""),
        request("POST /v1/services/..%2f../commands", ""),
        request("POST /v1/watch", ""),
        request("GET /v1/watch?rate=0", ""),
        request("GET /v1/watch?rate=5&rate=6", ""),
        request("GET /v1/watch?service=..%2f..", ""),
        request("GET /v1/watch?service=no-such-service", ""),
        request("GET /v1/watch?everything=yes", ""),
        request(&format!("POST /v1/services/{}/commands", &long[..5000]), ""),
        body("{}"),
        body("[]"),
        body(r#"{"services": ["../.."]}"#),
        body(r#"{"services": ["shop"], "observed": true}"#),
        body(r#"{"services": ["[a-"]}"#),
        body(&format!(r#"{{"services": ["{long}"]}}"#)),
        request(&format!("GET /{long}"), ""),
        request("GET /v1/status", &format!("x-long: {long}\r\n")),
        request("POST /v1/enable", "content-length: 99999999999\r\n") + &long,
        request("POST /v1/enable", "transfer-encoding: chunked\r\n") + "nonsense\r\n",
    ];
    for request in requests {
        let answer = send(&sandbox.path("run/agent.sock"), request.as_bytes());
        let start = request.get(..40).unwrap_or(&request);
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 4"),
            "{start:?} was answered with {answer}"
        );
        assert!(agent.status().services.is_empty(), "after {start:?}");
    }
}

fn body(json: &str) -> String {
    request("POST /v1/enable", &format!("content-length: {}\r\n", json.len())) + json
}

fn request(line: &str, fields: &str) -> String {
    format!("{line} HTTP/1.1\r\nhost: agent\r\nconnection: close\r\n{fields}\r\n")
}

/// The answer may be an end of the connection, even before all is sent.
fn send(socket: &Path, request: &[u8]) -> String {
    let mut stream = UnixStream::connect(socket).expect("connect to the agent");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("set a timeout");
    stream.set_write_timeout(Some(Duration::from_secs(60))).expect("set a timeout");
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

fn callers_that_stop_halfway_keep_nobody_out(sandbox: &Sandbox) {
    let agent = Agent::start(sandbox, "");
    let (socket, before) = (sandbox.path("run/agent.sock"), memory(&agent));
    let half = "x".repeat(200 << 10);
    let beginnings = [
        String::new(),
        "POST /v1/enable HTTP/1.1\r\nhost: ag".to_owned(),
        request("POST /v1/enable", "content-length: 400000\r\n") + &half,
        request("POST /v1/enable", "transfer-encoding: chunked\r\n") + "5\r\nabc",
        request("GET /v1/status", ""),
    ];
    let begin = |beginning: &String| {
        let mut stream = UnixStream::connect(&socket).expect("connect to the agent");
        stream.set_write_timeout(Some(Duration::from_secs(5))).expect("set a timeout");
        let _cut_off_meanwhile = stream.write_all(beginning.as_bytes());
        stream
    };
    for _ in 0..3 {
        let halfway: Vec<UnixStream> = beginnings.iter().cycle().take(300).map(begin).collect();
        assert!(agent.status().services.is_empty());
        drop(halfway);
    }
    // One that is not pressed for its place is told what it did wrong.
    for beginning in &beginnings[2..4] {
        let mut answer = String::new();
        let _closed = begin(beginning).read_to_string(&mut answer);
        assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("did not come within"), "{answer}");
    }
    // And one that says goodbye halfway is gone.
    for beginning in &beginnings {
        let mut stream = begin(beginning);
        let _closed_already = stream.shutdown(Shutdown::Write);
        let mut answer = String::new();
        let _closed = stream.read_to_string(&mut answer);
        let is_sound = ["", "HTTP/1.1 4", "HTTP/1.1 200"].iter().any(|start| answer.starts_with(start));
        assert!(is_sound, "{answer}");
    }
    let after = memory(&agent);
    assert!(after < before + GROWTH_KIB, "{before} KiB before, {after} KiB after");
    assert!(Footprint::of(sandbox).is_empty());
}

fn a_connection_is_for_one_request_and_need_not_be_read_to_its_end(sandbox: &Sandbox) {
    let agent = Agent::start(sandbox, "");
    let socket = sandbox.path("run/agent.sock");
    let status = "GET /v1/status HTTP/1.1\r\nhost: agent\r\n\r\n";
    for second in [status, "\0\0\0\0", "POST /v1/enable HTTP/1.1\r\n"] {
        let answer = send(&socket, format!("{status}{second}").as_bytes());
        assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
        assert_eq!(answer.matches("HTTP/1.1").count(), 1, "{second:?}: {answer}");
    }
    for _ in 0..200 {
        let mut stream = UnixStream::connect(&socket).expect("connect to the agent");
        let _closed_already = stream.write_all(status.as_bytes());
    }
    assert!(agent.status().services.is_empty());
}

fn many_callers_at_once_are_all_answered_as_if_one_came_after_the_other(sandbox: &Sandbox) {
    const CALLERS: usize = 40;
    const CALLS: usize = 25;
    // One service stays, so that the others come and go in a mesh that is there.
    let mesh = Mesh::enabled(sandbox, "");
    let (socket, before) = (sandbox.path("run/agent.sock"), memory(&mesh.agent));
    let call = |caller: usize, number: usize| {
        let verb = if (caller + number).is_multiple_of(2) { "enable" } else { "disable" };
        let services = r#"{"services": ["stock"]}"#;
        let length = format!("content-length: {}\r\n", services.len());
        let answer = send(&socket, (request(&format!("POST /v1/{verb}"), &length) + services).as_bytes());
        let (head, body) = answer.split_once("\r\n\r\n").expect("an answer");
        assert!(head.starts_with("HTTP/1.1 200"), "{answer}");
        let changed: Value = serde_json::from_str(body).expect("what changed, as JSON");
        let changed = changed["services"][0]["changed"].as_bool().expect("whether it changed");
        i64::from(changed) * if verb == "enable" { 1 } else { -1 }
    };
    let sum: i64 = thread::scope(|scope| {
        let caller = |caller| scope.spawn(move || (0..CALLS).map(|number| call(caller, number)).sum::<i64>());
        let callers: Vec<_> = (0..CALLERS).map(caller).collect();
        callers.into_iter().map(|caller| caller.join().expect("a caller")).sum()
    });
    // Each change is followed by the opposite one, so what is left over is what holds.
    let enabled = mesh.agent.status().services.iter().any(|service| service.name == "stock");
    assert_eq!(sum, i64::from(enabled));
    mesh.agent.disable("stock");
    answers(sandbox).are_balanced();
    let after = memory(&mesh.agent);
    assert!(after < before + GROWTH_KIB, "{before} KiB before, {after} KiB after");
    let steering = Footprint::of(sandbox);
    mesh.agent.disable("shop");
    eventually("nothing is left", Duration::from_secs(5), || Footprint::of(sandbox).is_empty());
    steering.is_gone();
}

/// What the daemon has in memory, in KiB.
fn memory(agent: &Agent<'_>) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", agent.pid())).expect("the daemon's status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    line.trim().trim_end_matches(" kB").parse().expect("a number of KiB")
}
