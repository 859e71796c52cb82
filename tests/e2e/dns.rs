//! Names that the proxy routes: told by DNS and at the admin address, and served at the addresses that are told.

use std::time::Duration;

use tests::{Agent, Answers, Finished, INSTANCES, Place, Proxy, Sandbox, Upstream, eventually};

scenarios![only ebpf:
    a_routed_name_has_one_address_in_each_family_by_udp_and_by_tcp,
    what_else_is_asked_of_a_routed_name_leads_nowhere_else,
    a_query_that_nobody_steered_is_refused_unless_its_name_is_routed,
    names_keep_their_addresses_when_the_configuration_is_read_anew,
    what_is_routed_is_told_once,
    a_connection_to_a_virtual_address_is_served_as_for_its_name,
    a_virtual_address_that_no_name_has_is_a_reset,
    a_draining_proxy_answers_no_more_queries,
];

const SOON: Duration = Duration::from_secs(5);

const PROXY: &str = "\
listen: { port: 15001, workers: 2 }
admin: 127.0.0.1:15000
dns: { port: 15053 }
virtual_hosts:
  - { name: catalog, domains: [catalog, catalog.internal, 10.77.0.10], cluster: catalog, ports: [8080] }
  - { name: mail, domains: [mail], cluster: mail }
clusters:
  - { name: catalog, endpoints: ['10.77.0.2:8080', '10.77.0.3:8080'] }
  - { name: mail, endpoints: ['10.77.0.2:7025'] }
";

fn a_routed_name_has_one_address_in_each_family_by_udp_and_by_tcp(sandbox: &Sandbox) {
    let _proxy = Proxy::start_with(sandbox, PROXY);
    let (ipv4, ipv6) = addresses(sandbox, "catalog.internal");
    assert!(ipv4.starts_with("241.") && ipv6.starts_with("fdb2:6c1e:9d04::"), "{ipv4} {ipv6}");
    assert_ne!(addresses(sandbox, "catalog").0, ipv4);
    let asked = ["catalog.internal", "A"];
    for how in [
        &["@127.0.0.1"][..],
        &["@::1"],
        &["@127.0.0.1", "+tcp"],
        &["@::1", "+tcp"],
        &["@127.0.0.1", "-p", "15068"],
        &["@127.0.0.1", "+noedns"],
        &["@127.0.0.1", "+dnssec", "+bufsize=512"],
    ] {
        dig(sandbox, &[how, &asked, &["+short"]].concat()).is(&ipv4);
    }
    let whole = dig(sandbox, &["@127.0.0.1", "CataLog.Internal.", "A"]);
    let answer = format!("CataLog.Internal.\t30\tIN\tA\t{ipv4}");
    assert!(whole.ok().contains(&answer) && whole.ok().contains("flags: qr aa rd ra;"), "{whole:?}");
    dig(sandbox, &["@127.0.0.1", "-x", &ipv4, "+short"]).is("catalog.internal.");
    dig(sandbox, &["@127.0.0.1", "-x", &ipv6, "+short"]).is("catalog.internal.");
    let version = dig(sandbox, &["@127.0.0.1", "catalog", "A", "+edns=1", "+noednsneg"]);
    assert!(version.ok().contains("status: BADVERS"), "{version:?}");
}

fn what_else_is_asked_of_a_routed_name_leads_nowhere_else(sandbox: &Sandbox) {
    let _proxy = Proxy::start_with(sandbox, PROXY);
    for (name, kind) in [("catalog", "HTTPS"), ("catalog", "SVCB"), ("_8443._https.catalog", "HTTPS")] {
        let empty = dig(sandbox, &["@127.0.0.1", name, kind]);
        assert!(empty.ok().contains("status: NOERROR") && empty.ok().contains("ANSWER: 0"), "{empty:?}");
    }
    let any = dig(sandbox, &["@127.0.0.1", "catalog", "ANY", "+notcp", "+short"]);
    let (ipv4, ipv6) = addresses(sandbox, "catalog");
    any.is(&format!("{ipv4}\n{ipv6}"));
}

fn a_query_that_nobody_steered_is_refused_unless_its_name_is_routed(sandbox: &Sandbox) {
    let proxy = Proxy::start_with(sandbox, PROXY);
    for how in ["+notcp", "+tcp"] {
        for (name, kind) in [("elsewhere.example", "A"), ("catalog", "MX"), ("1.0.77.10.in-addr.arpa", "PTR")]
        {
            let refused = dig(sandbox, &["@127.0.0.1", how, name, kind]);
            assert!(refused.ok().contains("status: REFUSED"), "{refused:?}");
        }
        dig(sandbox, &["@127.0.0.1", how, "catalog", "A"]).ok();
    }
    let metrics = proxy.metrics();
    for transport in [r#"transport="udp""#, r#"transport="tcp""#] {
        let sum = |outcome| metrics.sum("mesh_proxy_dns_queries_total", &[transport, outcome]);
        assert_eq!((sum(r#"outcome="refused""#), sum(r#"outcome="answered""#)), (3.0, 1.0));
    }
}

fn names_keep_their_addresses_when_the_configuration_is_read_anew(sandbox: &Sandbox) {
    let proxy = Proxy::start_with(sandbox, PROXY);
    let before = addresses(sandbox, "catalog");
    proxy.reload(&PROXY.replace("domains: [mail]", "domains: [aardvark, mail, post]"));
    eventually("the new name is known", SOON, || {
        !dig(sandbox, &["@127.0.0.1", "post", "A", "+short"]).ok().is_empty()
    });
    assert_eq!(addresses(sandbox, "catalog"), before);
}

fn what_is_routed_is_told_once(sandbox: &Sandbox) {
    let proxy = Proxy::start_with(sandbox, PROXY);
    let first = routable(sandbox, "");
    let (head, body) = first.ok().split_once("\r\n\r\n").expect("a head and a body");
    let document: serde_json::Value = serde_json::from_str(body).expect("JSON");
    assert_eq!(document["version"], 1);
    let catalog = &document["services"][0];
    assert_eq!(catalog["name"], "catalog");
    assert_eq!(catalog["addresses"], serde_json::json!(["10.77.0.10"]));
    assert_eq!(catalog["endpoints"], serde_json::json!(["10.77.0.2:8080", "10.77.0.3:8080"]));
    assert_eq!(catalog["ports"], serde_json::json!([8080]));
    let (ipv4, ipv6) = addresses(sandbox, "catalog.internal");
    let domain = &catalog["domains"][1];
    assert_eq!(
        (&domain["name"], &domain["virtual"]),
        (&"catalog.internal".into(), &serde_json::json!([ipv4, ipv6]))
    );
    assert!(domain["loopback"].as_str().is_some_and(|address| address.starts_with("127.66.")), "{domain}");
    assert_eq!(document["services"][1]["domains"][0].get("loopback"), None);

    let tag = head.lines().find_map(|line| line.strip_prefix("etag: ")).expect("an ETag");
    assert!(routable(sandbox, tag).ok().starts_with("HTTP/1.1 304"));
    assert!(routable(sandbox, "\"other\"").ok().starts_with("HTTP/1.1 200"));
    proxy.reload(&PROXY.replace("10.77.0.3:8080", "10.77.0.4:8080"));
    eventually("the tag is another one", SOON, || routable(sandbox, tag).ok().starts_with("HTTP/1.1 200"));
}

fn a_connection_to_a_virtual_address_is_served_as_for_its_name(sandbox: &Sandbox) {
    let [a, b] = INSTANCES.map(|address| format!("{address}:8080"));
    let _servers = [
        Upstream::http(sandbox, "a", &[&a]),
        Upstream::http(sandbox, "b", &[&b]),
        Upstream::greeter(sandbox, &format!("{}:7025", INSTANCES[0])),
    ];
    let agent = Agent::start(sandbox, "");
    let proxy = Proxy::start_with(sandbox, PROXY);
    agent.enable("shop");
    let [catalog, mail] = ["catalog", "mail"].map(|name| addresses(sandbox, name).1);
    for host in ["catalog", "nobody.knows.this", "catalog.internal:1234"] {
        let fetch = |_| fetch(sandbox, &format!("[{catalog}]"), host).ok().to_owned();
        (0..6).map(fetch).collect::<Answers>().are_balanced();
    }
    // Two requests of one connection, for a host that is known and one that is not.
    let url = format!("http://[{catalog}]/");
    let first = ["--silent", "--max-time", "5", "--header", "Host: catalog", &url];
    let then = ["--next", "--silent", "--max-time", "5", "--header", "Host: other", &url];
    let both = sandbox.program(Place::Shop, "curl").args(first).args(then).run();
    assert!(both.ok().len() == 2 && both.ok().chars().all(|who| "ab".contains(who)), "{both:?}");
    let script = format!(
        "import socket; s = socket.create_connection((\"{mail}\", 25), 5); s.settimeout(5)\n\
         print(s.recv(100).decode().strip())"
    );
    sandbox.program(Place::Shop, "python3").args(["-c", &script]).run().is("220 greeter");
    let steered = proxy.metrics().sum("mesh_proxy_connections_total", &[r#"kind="steered""#]);
    assert_eq!(steered, 20.0);
    assert_eq!(proxy.metrics().sum("mesh_proxy_self_loops_total", &[]), 0.0);
}

fn a_virtual_address_that_no_name_has_is_a_reset(sandbox: &Sandbox) {
    let agent = Agent::start(sandbox, "");
    let proxy = Proxy::start_with(sandbox, PROXY);
    agent.enable("shop");
    for address in ["fdb2:6c1e:9d04::1", "fdb2:6c1e:9d04:1::1"] {
        let script = format!(
            "import socket\n\
             try: print(socket.create_connection((\"{address}\", 80), 5).recv(1))\n\
             except ConnectionResetError: print(\"reset\")"
        );
        sandbox.program(Place::Shop, "python3").args(["-c", &script]).run().is("reset");
    }
    assert_eq!(proxy.metrics().sum("mesh_proxy_unassigned_addresses_total", &[]), 2.0);
}

fn a_draining_proxy_answers_no_more_queries(sandbox: &Sandbox) {
    let proxy = Proxy::start_with(sandbox, PROXY);
    addresses(sandbox, "catalog");
    proxy.terminate();
    proxy.drained();
    const DIG_GOT_NO_REPLY: i32 = 9;
    dig(sandbox, &["@127.0.0.1", "catalog", "A"]).failed_with(DIG_GOT_NO_REPLY);
}

/// The two addresses of a name, as the proxy's DNS tells them.
#[track_caller]
fn addresses(sandbox: &Sandbox, name: &str) -> (String, String) {
    let address = |kind| dig(sandbox, &["@127.0.0.1", name, kind, "+short"]).ok().to_owned();
    let addresses = (address("A"), address("AAAA"));
    assert!(!addresses.0.is_empty() && !addresses.1.is_empty(), "{name}: {addresses:?}");
    addresses
}

#[track_caller]
fn dig(sandbox: &Sandbox, args: &[&str]) -> Finished {
    let dig = sandbox.program(Place::Outside, "dig").args(["-p", "15053", "+time=2", "+tries=1"]);
    dig.args(args).run()
}

#[track_caller]
fn fetch(sandbox: &Sandbox, address: &str, host: &str) -> Finished {
    let curl = sandbox.program(Place::Shop, "curl").args(["--silent", "--show-error", "--max-time", "5"]);
    curl.args(["--header", &format!("Host: {host}"), &format!("http://{address}/")]).run()
}

/// Head and body of what the proxy says that it routes.
#[track_caller]
fn routable(sandbox: &Sandbox, known: &str) -> Finished {
    let curl = sandbox.program(Place::Outside, "curl").args(["--silent", "--include", "--max-time", "5"]);
    let header = format!("If-None-Match: {known}");
    curl.args(["--header", &header, "http://127.0.0.1:15000/routable"]).run()
}
