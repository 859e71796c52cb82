//! The control socket: for root alone, and not to be broken by what is sent to it.

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use tests::{Agent, Place, Sandbox};

scenarios![only_root_may_use_the_socket, malformed_requests_are_answered_and_survived];

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
    stream.set_read_timeout(Some(Duration::from_secs(5))).expect("set a timeout");
    stream.set_write_timeout(Some(Duration::from_secs(5))).expect("set a timeout");
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}
