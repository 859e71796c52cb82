//! DNS that is captured: names of the proxy's lead to it, whatever asks and however, and all others where they always led.

use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;

use tests::{Finished, Mesh, ORIGIN, PROXY_CONFIG, Place, Program, Proxy, RESOLVERS, Sandbox, Upstream, ask};

scenarios![
    a_name_that_is_routed_leads_to_its_instances,
    every_resolver_finds_the_virtual_address,
    other_names_are_asked_of_the_resolver_that_was_asked,
    an_answer_that_is_too_long_for_a_datagram_comes_by_tcp,
    a_resolver_on_localhost_is_not_captured,
    services_that_share_an_address_are_told_apart_by_their_names,
    queries_and_virtual_addresses_survive_the_proxy,
    an_observed_service_and_one_without_dns_ask_their_resolvers,
    a_proxy_that_serves_no_dns_gets_no_queries,
];
scenarios![only ebpf: the_application_sees_the_resolver_that_it_asked];

const DNS: &str = "capture: { dns: true }\n";
const VIRTUAL: &str = "241.";

fn a_name_that_is_routed_leads_to_its_instances(sandbox: &Sandbox) {
    let mesh = Mesh::start(sandbox, DNS);
    let resolver = resolver(sandbox);
    curl(sandbox, "http://catalog:8080/").is("origin");
    mesh.agent.enable("shop");
    let answers: Vec<String> =
        (0..4).map(|_| curl(sandbox, "http://catalog:8080/").ok().to_owned()).collect();
    assert!(answers.iter().all(|who| ["a", "b"].contains(&who.as_str())), "{answers:?}");
    curl(sandbox, "http://other.test:8080/").is("origin");
    assert_eq!(resolver.queries("catalog"), 2, "before it was enabled, for both families");
    let counters = mesh.agent.counters("shop");
    assert!(counters.queries >= 5 && counters.errors == 0, "{counters:?}");

    mesh.agent.disable("shop");
    curl(sandbox, "http://catalog:8080/").is("origin");
}

fn every_resolver_finds_the_virtual_address(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, DNS);
    let _resolver = resolver(sandbox);
    let answered = |transport: &str| {
        mesh.proxy.metrics().sum("mesh_proxy_dns_queries_total", &[transport, r#"outcome="answered""#])
    };
    every_client_finds_it(sandbox, "timeout:2");
    assert!(answered(r#"transport="udp""#) > 0.0);
    // By TCP from the first query on; musl before 1.2.4 knows no TCP.
    let before = answered(r#"transport="tcp""#);
    every_client_finds_it(sandbox, "use-vc");
    assert!(answered(r#"transport="tcp""#) >= before + 4.0, "glibc, Go, Python and Java");
}

#[track_caller]
fn every_client_finds_it(sandbox: &Sandbox, options: &str) {
    let resolving = |program: &str| sandbox.resolving_with(Place::Shop, RESOLVERS[0], options, program);
    let musl = musl_binary(sandbox).display().to_string();
    let java = source("Lookup.java");
    let clients: [(&str, &[&str]); 6] = [
        ("dig", &["+short"]),
        ("dig", &["+short", "+tcp"]),
        ("getent", &["ahostsv4"]),
        (&musl, &[]),
        ("python3", &["-c", "import socket, sys; print(socket.gethostbyname(sys.argv[1]))"]),
        ("java", &["-XX:TieredStopAtLevel=1", &java]),
    ];
    for (client, options) in clients {
        let look_up = |name: &str| resolving(client).args(options).args([name]).run().ok().to_owned();
        let (routed, other) = (look_up("catalog"), look_up("other.test"));
        assert!(
            routed.starts_with(VIRTUAL) || routed.contains(&format!("\n{VIRTUAL}")),
            "{client}: {routed}"
        );
        assert!(other.contains(ORIGIN), "{client}: {other}");
    }
    // Go's own resolver, whatever C library the program is linked with.
    let go = |url: &str| {
        let hey = ["GODEBUG=netdns=go", "hey", "-n", "4", "-c", "1", url];
        resolving("env").args(hey).run().ok().to_owned()
    };
    assert!(go("http://catalog:8080/").contains("[200]\t4 responses"));
    assert!(go("http://other.test:8080/").contains("[200]\t4 responses"));
}

fn other_names_are_asked_of_the_resolver_that_was_asked(sandbox: &Sandbox) {
    let _mesh = Mesh::enabled(sandbox, DNS);
    let resolvers = RESOLVERS
        .map(|address| (address, Upstream::resolver(sandbox, Place::Peer, &name_of(address), &[address])));
    for (address, _) in &resolvers {
        let server = format!("@{address}");
        for transport in ["+notcp", "+tcp"] {
            let who = dig(sandbox, &[&server, transport, "+short", "who.test", "TXT"]);
            assert_eq!(who, format!("\"{}\"", name_of(address)), "{transport}");
            assert!(dig(sandbox, &[&server, transport, "+short", "catalog"]).starts_with(VIRTUAL));
        }
    }
    let server = format!("@{}", RESOLVERS[0]);
    // A name's lifetime, a name that is not there, and what is said beside a question go through as they are.
    let answer = dig(sandbox, &[&server, "+noall", "+answer", "other.test"]);
    assert_eq!(answer.split_whitespace().collect::<Vec<_>>(), ["other.test.", "77", "IN", "A", ORIGIN]);
    assert!(dig(sandbox, &[&server, "absent.test"]).contains("status: REFUSED"), "as dnsmasq says it");
    assert!(dig(sandbox, &[&server, "+bufsize=1400", "catalog"]).contains("EDNS: version: 0"));
    assert!(!dig(sandbox, &[&server, "+noedns", "catalog"]).contains("EDNS"));
}

fn an_answer_that_is_too_long_for_a_datagram_comes_by_tcp(sandbox: &Sandbox) {
    let _mesh = Mesh::enabled(sandbox, DNS);
    let _resolver = resolver(sandbox);
    let server = format!("@{}", RESOLVERS[0]);
    let truncated = dig(sandbox, &[&server, "+ignore", "+bufsize=512", "long.test", "TXT"]);
    assert!(truncated.contains(" tc "), "{truncated}");
    let whole = dig(sandbox, &[&server, "+short", "+bufsize=512", "long.test", "TXT"]);
    assert!(whole.len() > 2400, "{whole}");
}

fn a_resolver_on_localhost_is_not_captured(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, DNS);
    let _resolver = Upstream::resolver(sandbox, Place::Outside, "local", &["127.0.0.1"]);
    let look_up = sandbox.resolving(Place::Shop, "127.0.0.1", "getent").args(["ahostsv4", "catalog"]).run();
    assert!(look_up.ok().starts_with(ORIGIN), "{look_up:?}");
    assert_eq!(mesh.agent.counters("shop").queries, 0);
}

/// One address, one port, a protocol without names.
fn services_that_share_an_address_are_told_apart_by_their_names(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, DNS);
    let _resolver = resolver(sandbox);
    let [a, b] = ["10.77.0.2:9000", "10.77.0.3:9000"];
    let _orders = Upstream::http(sandbox, "orders", &[a]);
    let _stock = Upstream::http(sandbox, "stock", &[b]);
    let more = format!(
        "virtual_hosts:\n  - {{ name: orders, domains: [orders.test], cluster: orders }}\n  - {{ name: stock, domains: [stock.test], cluster: stock }}\nclusters:\n  - {{ name: orders, endpoints: ['{a}'] }}\n  - {{ name: stock, endpoints: ['{b}'] }}\n"
    );
    drop(mesh.proxy);
    let _proxy =
        Proxy::start_with(sandbox, &format!("admin: 127.0.0.1:15000\ndns: {{ port: 15053 }}\n{more}"));
    sandbox.settle();
    for name in ["orders", "stock"] {
        // A name that no route knows, so that the address alone can tell.
        let options = ["--silent", "--max-time", "5", "--header", "Host: nobody"];
        let asked = resolving(sandbox, "curl").args(options).arg(&format!("http://{name}.test:5432/")).run();
        asked.is(name);
    }
}

fn queries_and_virtual_addresses_survive_the_proxy(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, DNS);
    let _resolver = resolver(sandbox);
    let virtual_address = dig(sandbox, &[&format!("@{}", RESOLVERS[0]), "+short", "catalog"]);
    ask(sandbox, Place::Shop, &format!("{virtual_address}:8080")).ok();
    // The daemon has heard of the address by now.
    sleep(Duration::from_secs(1));
    mesh.proxy.sigkill();
    sandbox.settle();
    assert_eq!(dig(sandbox, &[&format!("@{}", RESOLVERS[0]), "+short", "catalog"]), ORIGIN);
    ask(sandbox, Place::Shop, &format!("{virtual_address}:8080")).is("a");
}

fn an_observed_service_and_one_without_dns_ask_their_resolvers(sandbox: &Sandbox) {
    let mesh = Mesh::start(sandbox, "  cart: { capture: { dns: true } }\n");
    let _resolver = resolver(sandbox);
    mesh.agent.enable("shop");
    assert_eq!(dig(sandbox, &[&format!("@{}", RESOLVERS[0]), "+short", "catalog"]), ORIGIN);
}

fn a_proxy_that_serves_no_dns_gets_no_queries(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "capture: { dns: true }\nfailure: closed\n");
    let _resolver = resolver(sandbox);
    drop(mesh.proxy);
    let _proxy = Proxy::start_with(sandbox, &PROXY_CONFIG.replace("dns: { port: 15053 }\n", ""));
    sandbox.settle();
    for transport in ["+notcp", "+tcp"] {
        let server = format!("@{}", RESOLVERS[0]);
        assert_eq!(dig(sandbox, &[&server, transport, "+short", "catalog"]), ORIGIN, "{transport}");
    }
    assert!(["a", "b"].contains(&ask(sandbox, Place::Shop, &format!("{ORIGIN}:8080")).ok()));
}

fn the_application_sees_the_resolver_that_it_asked(sandbox: &Sandbox) {
    let _mesh = Mesh::enabled(sandbox, DNS);
    let _resolver = resolver(sandbox);
    let query = r"q=b'\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x07catalog\x00\x00\x01\x00\x01'";
    let script = format!(
        "import socket, sys
{query}
for family, to in ((socket.AF_INET, '10.77.0.53'), (socket.AF_INET6, 'fd77::53'), (socket.AF_INET6, '::ffff:10.77.0.53')):
    connected, other = socket.socket(family, socket.SOCK_DGRAM), socket.socket(family, socket.SOCK_DGRAM)
    for each in (connected, other):
        each.settimeout(5)
    connected.connect((to, 53)); connected.send(q); connected.recvfrom(512)
    other.sendto(q, (to, 53)); answer, sender = other.recvfrom(512)
    print(connected.getpeername()[:2], sender[:2], len(answer) > len(q))
"
    );
    let seen = sandbox.program(Place::Shop, "python3").args(["-c", &script]).run();
    let line = |address: &str| format!("('{address}', 53) ('{address}', 53) True");
    let expected = ["10.77.0.53", "fd77::53", "::ffff:10.77.0.53"].map(line);
    assert_eq!(seen.ok().lines().collect::<Vec<_>>(), expected);
}

fn resolver(sandbox: &Sandbox) -> Upstream {
    Upstream::resolver(sandbox, Place::Peer, "resolver", &[RESOLVERS[0], RESOLVERS[2]])
}

fn name_of(address: &str) -> String {
    format!("resolver-{}", address.replace([':', '.'], "-"))
}

fn resolving<'s>(sandbox: &'s Sandbox, program: &str) -> Program<'s> {
    sandbox.resolving(Place::Shop, RESOLVERS[0], program)
}

#[track_caller]
fn curl(sandbox: &Sandbox, url: &str) -> Finished {
    resolving(sandbox, "curl").args(["--silent", "--show-error", "--max-time", "5", url]).run()
}

#[track_caller]
fn dig(sandbox: &Sandbox, args: &[&str]) -> String {
    let options = ["+tries=1", "+time=3"];
    sandbox.program(Place::Shop, "dig").args(options).args(args).run().ok().to_owned()
}

fn source(name: &str) -> String {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("e2e/clients").join(name).display().to_string()
}

fn musl_binary(sandbox: &Sandbox) -> PathBuf {
    let binary = sandbox.path("lookup");
    let source = source("lookup.c");
    let gcc = ["-static", "-o", &binary.to_string_lossy(), &source].map(str::to_owned);
    sandbox.program(Place::Outside, "musl-gcc").args(gcc).run().ok();
    binary
}
