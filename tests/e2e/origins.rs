//! Where connections come from, told by the daemon where the kernel does not tell the proxy.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use tests::{Agent, Conversation, Finished, Mesh, ORIGIN, ORIGIN_V6, Place, Sandbox};
use tests::{answers, ask, eventually};

scenarios![only nftables:
    the_metrics_name_the_service,
    the_metrics_name_the_service_of_a_user,
    connections_from_one_port_are_told_apart,
    without_a_daemon_the_service_is_unknown_and_nothing_waits,
    a_daemon_that_hangs_delays_little,
    a_held_connection_is_found_by_either_of_its_ends,
    a_datagram_is_found_where_it_was_going,
    only_the_proxy_and_root_are_answered,
    malformed_and_slow_requests_hurt_nobody,
    the_socket_goes_with_the_daemon,
];
scenarios![only ebpf: there_is_no_socket_where_the_kernel_tells];

const SOON: Duration = Duration::from_secs(5);
/// How long the proxy waits for an answer, and what a request takes of which nothing waits, on a busy machine.
const PATIENCE: Duration = Duration::from_millis(200);
const AT_ONCE: Duration = Duration::from_millis(150);
fn the_metrics_name_the_service(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    mesh.agent.enable("stock");
    answers(sandbox).are_balanced();
    ask(sandbox, Place::Stock, &origin()).ok();
    ask(sandbox, Place::Stock, &format!("[{ORIGIN_V6}]:8080")).ok();
    assert_eq!(requests(&mesh, "shop"), 6.0);
    assert_eq!(requests(&mesh, "stock"), 2.0);

    // Made after the service was enabled, one soon after the other.
    for cgroup in ["shop/worker", "shop/worker/deep", "shop/other"] {
        sandbox.program_in(cgroup, "curl").args(curl()).run().ok();
    }
    assert_eq!(requests(&mesh, "shop"), 9.0);
    assert_eq!(requests(&mesh, "unknown"), 0.0);
    mesh.agent.disable("stock");
    ask(sandbox, Place::Shop, &origin()).ok();
    assert_eq!((requests(&mesh, "shop"), requests(&mesh, "stock")), (10.0, 2.0));
}

fn the_metrics_name_the_service_of_a_user(sandbox: &Sandbox) {
    let mesh = Mesh::start(sandbox, "  everybody: { user: nobody }\n");
    mesh.agent.enable("everybody");
    let setpriv = ["--reuid", "65534", "--regid", "65534", "--clear-groups", "--", "curl"];
    let as_user = |place| sandbox.program(place, "setpriv").args(setpriv).args(curl()).run();
    as_user(Place::Outside).ok();
    assert_eq!(requests(&mesh, "everybody"), 1.0);
    // The cgroup comes first, as it does in the table.
    mesh.agent.enable("shop");
    as_user(Place::Shop).ok();
    assert_eq!((requests(&mesh, "everybody"), requests(&mesh, "shop")), (1.0, 1.0));
}

fn connections_from_one_port_are_told_apart(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    let twins = sandbox.peer(Place::Shop).args(["twins", &origin(), &format!("{ORIGIN}:8081")]).run();
    assert_eq!(twins.ok().lines().count(), 2);
    assert_eq!((requests(&mesh, "shop"), requests(&mesh, "unknown")), (2.0, 0.0));
}

fn without_a_daemon_the_service_is_unknown_and_nothing_waits(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    ask(sandbox, Place::Shop, &origin()).ok();
    mesh.agent.sigkill();
    let began = Instant::now();
    answers(sandbox).are_balanced();
    assert!(began.elapsed() < AT_ONCE * 6, "{:?}", began.elapsed());
    let metrics = mesh.proxy.metrics();
    let requests = |service: &str| metrics.sum("mesh_proxy_requests_total", &[&label(service)]);
    assert_eq!((requests("shop"), requests("unknown")), (1.0, 6.0), "{}", metrics.text());

    let _agent = Agent::restart(sandbox);
    eventually("the service is known again", SOON, || {
        ask(sandbox, Place::Shop, &origin()).ok();
        mesh.proxy.metrics().sum("mesh_proxy_requests_total", &[&label("shop")]) > 1.0
    });
}

fn a_daemon_that_hangs_delays_little(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    ask(sandbox, Place::Shop, &origin()).ok();
    mesh.agent.freeze();
    let began = Instant::now();
    answers(sandbox).are_balanced();
    // Once for each worker of the proxy, and then not for a second.
    assert!(began.elapsed() < 2 * PATIENCE + AT_ONCE * 6, "{:?}", began.elapsed());
    mesh.agent.thaw();
    assert_eq!(requests(&mesh, "unknown"), 6.0);
}

fn a_held_connection_is_found_by_either_of_its_ends(sandbox: &Sandbox) {
    let _mesh = Mesh::enabled(sandbox, "");
    for (destination, host, proxy) in [
        (origin(), "10.77.0.1", "127.0.0.1:15001"),
        (format!("[{ORIGIN_V6}]:8080"), "[fd77::1]", "[::1]:15001"),
    ] {
        let mut held = sandbox.peer(Place::Shop).args(["hold", "tcp", &destination]).converse();
        let client = format!("{host}:{}", held.ask("").trim());
        let found = found(sandbox, &format!("tcp?client={client}&destination={destination}"));
        assert_eq!(found["destination"], destination);
        assert_eq!((&found["service"], &found["uid"]), (&"shop".into(), &0.into()));
        assert!(found["cgroup"].as_u64().is_some_and(|id| id > 1), "{found}");
        assert_eq!(self::found(sandbox, &format!("tcp?client={client}&proxy={proxy}")), found);

        // Neither a listener nor another client's.
        for other in
            [format!("client={client}&destination={host}:1"), format!("client={host}:1&proxy={proxy}")]
        {
            let (status, body) = get(sandbox, &format!("tcp?{other}"));
            assert_eq!((status, body), (404, "{\"error\":\"there is no such connection\"}\n".to_owned()));
        }
    }
    let mut held = sandbox.peer(Place::Outside).args(["hold", "tcp", &origin()]).converse();
    let client = format!("10.77.0.1:{}", held.ask("").trim());
    let found = found(sandbox, &format!("tcp?client={client}&destination={}", origin()));
    assert!(found["service"].is_null() && found["cgroup"].is_u64(), "{found}");
}

fn a_datagram_is_found_where_it_was_going(sandbox: &Sandbox) {
    let agent = Agent::start(sandbox, "");
    agent.enable("shop");
    let _resolvers = ["127.0.0.1:15053", "[::1]:15053"]
        .map(|address| sandbox.peer(Place::Proxy).args(["datagrams", address]).serve(sandbox.path(address)));
    let rules = "add table inet names; \
                 add chain inet names output { type nat hook output priority -100; }; \
                 add rule inet names output udp dport 53 redirect to :15053";
    sandbox.program(Place::Outside, "nft").arg(rules).run().ok();

    for (destination, host, proxy) in [
        (format!("{ORIGIN}:53"), "10.77.0.1", "127.0.0.1:15053"),
        (format!("[{ORIGIN_V6}]:53"), "[fd77::1]", "[::1]:15053"),
    ] {
        let sends = |place| sandbox.peer(place).args(["hold", "udp", &destination]).converse();
        let question =
            |client: &mut Conversation| format!("udp?client={host}:{}&proxy={proxy}", client.ask("").trim());
        let (mut shop, mut other) = (sends(Place::Shop), sends(Place::Outside));
        let found = |question: &str| found(sandbox, question);
        let answer = found(&question(&mut shop));
        assert_eq!((&answer["destination"], &answer["service"]), (&(&*destination).into(), &"shop".into()));
        let answer = found(&question(&mut other));
        assert_eq!(answer["destination"], destination);
        assert!(answer["service"].is_null(), "{answer}");

        // One whose socket is gone is told all the same where it was going.
        let gone = question(&mut shop);
        drop(shop);
        let answer = found(&gone);
        assert_eq!(answer["destination"], destination);
        assert!(answer["service"].is_null() && answer["cgroup"].is_null(), "{answer}");
        assert_eq!(get(sandbox, &format!("udp?client={host}:1&proxy={proxy}")).0, 404);
    }
}

fn only_the_proxy_and_root_are_answered(sandbox: &Sandbox) {
    let _agent = Agent::start(sandbox, "");
    let mode = fs::metadata(sandbox.path("run/origins.sock")).expect("the socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o666, "{mode:o}");
    let run = fs::metadata(sandbox.path("run")).expect("its folder").permissions().mode();
    assert_eq!(run & 0o777, 0o755, "{run:o}");

    let socket = sandbox.path("run/origins.sock").display().to_string();
    let url = "http://agent/v1/origins/tcp?client=10.77.0.1:1&destination=10.77.0.10:1";
    let curl = ["curl", "--silent", "--max-time", "5", "--unix-socket", &socket, url];
    let asked = |cgroup: &str, user: &str| -> Finished {
        let setpriv = sandbox.program_in(cgroup, "setpriv");
        setpriv.args(["--reuid", user, "--clear-groups", "--"]).args(curl).run()
    };
    for (cgroup, user) in [("proxy", NOBODY), ("proxy/below", NOBODY), ("proxy", ROOT), ("outside", ROOT)] {
        assert!(asked(cgroup, user).ok().contains("no such connection"), "{cgroup} {user}");
    }
    for cgroup in ["outside", "shop", "proxy2"] {
        assert_eq!(asked(cgroup, NOBODY).stdout, "", "{cgroup}");
    }
}

const ROOT: &str = "0";
const NOBODY: &str = "65534";

fn malformed_and_slow_requests_hurt_nobody(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    let long = "x".repeat(100_000);
    // Half a head, and nothing more.
    let slow: Vec<UnixStream> = (0..64)
        .map(|_| {
            let mut stream = connect(sandbox);
            stream.write_all(b"GET /v1/orig").expect("begin a request");
            stream
        })
        .collect();
    let requests = [
        "\0\0\0\0\r\n\r\n".to_owned(),
        "GET\r\n\r\n".to_owned(),
        request("GET /no/such/thing", ""),
        request("POST /v1/origins/tcp", "content-length: 99999999999\r\n") + &long,
        request("GET /v1/origins/tcp", ""),
        request("GET /v1/origins/tcp?client=1.1.1.1:1&proxy=[::1]:1", ""),
        request("GET /v1/origins/tcp?client=%zz&proxy=%", ""),
        request(&format!("GET /v1/origins/tcp?client={long}"), ""),
        request("GET /v1/origins/tcp", &format!("x-long: {long}\r\n")),
        request("GET /v1/origins/tcp", "transfer-encoding: chunked\r\n") + "nonsense\r\n",
    ];
    for request in requests {
        let answer = send(sandbox, &request);
        let start = request.get(..40).unwrap_or(&request);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{start:?}: {answer}");
    }
    answers(sandbox).are_balanced();
    assert_eq!(self::requests(&mesh, "shop"), 6.0);
    eventually("those that take too long are turned away", Duration::from_secs(15), || {
        slow.iter().all(|stream| {
            stream.set_read_timeout(Some(Duration::from_millis(1))).expect("set a timeout");
            (&mut &*stream).read(&mut [0; 512]).is_ok_and(|read| read == 0)
        })
    });
}

fn the_socket_goes_with_the_daemon(sandbox: &Sandbox) {
    let socket = sandbox.path("run/origins.sock");
    let agent = Agent::start(sandbox, "");
    assert!(socket.exists());
    agent.stop();
    assert!(!socket.exists());
    Agent::restart(sandbox).sigkill();
    assert!(socket.exists());
    Agent::command(sandbox, &["cleanup"]).ok();
    assert!(!socket.exists());
}

fn there_is_no_socket_where_the_kernel_tells(sandbox: &Sandbox) {
    let socket = sandbox.path("run/origins.sock");
    fs::create_dir(sandbox.path("run")).expect("make a folder");
    fs::write(&socket, "").expect("leave what a killed daemon leaves");
    let _agent = Agent::start(sandbox, "");
    assert!(!socket.exists());
}

fn requests(mesh: &Mesh<'_>, service: &str) -> f64 {
    mesh.proxy.metrics().sum("mesh_proxy_requests_total", &[&label(service)])
}

fn label(service: &str) -> String {
    format!("service=\"{service}\"")
}

fn curl() -> [String; 6] {
    let url = format!("http://{}/", origin());
    ["--silent", "--max-time", "5", "--header", "Host: catalog", &url].map(str::to_owned)
}

/// What is told of a connection that is there.
#[track_caller]
fn found(sandbox: &Sandbox, question: &str) -> serde_json::Value {
    let (status, body) = get(sandbox, question);
    assert_eq!(status, 200, "{question}: {body}");
    serde_json::from_str(&body).unwrap_or_else(|error| panic!("{error} in {body}"))
}

/// The status and the body of what root is answered.
#[track_caller]
fn get(sandbox: &Sandbox, question: &str) -> (u16, String) {
    let answer = send(sandbox, &request(&format!("GET /v1/origins/{question}"), ""));
    let (head, body) = answer.split_once("\r\n\r\n").expect("a whole response");
    let status = head.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok());
    (status.unwrap_or_default(), body.to_owned())
}

fn request(line: &str, fields: &str) -> String {
    format!("{line} HTTP/1.1\r\nhost: agent\r\nconnection: close\r\n{fields}\r\n")
}

/// The answer may be an end of the connection, even before all is sent.
fn send(sandbox: &Sandbox, request: &str) -> String {
    let mut stream = connect(sandbox);
    let _ = stream.write_all(request.as_bytes());
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

fn connect(sandbox: &Sandbox) -> UnixStream {
    let stream = UnixStream::connect(sandbox.path("run/origins.sock")).expect("connect to the agent");
    stream.set_read_timeout(Some(SOON)).expect("set a timeout");
    stream.set_write_timeout(Some(SOON)).expect("set a timeout");
    stream
}

fn origin() -> String {
    format!("{ORIGIN}:8080")
}
