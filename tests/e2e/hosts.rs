//! Steering by names in a hosts file, where the kernel helps with nothing.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::time::Duration;

use tests::{Agent, Answers, Finished, INSTANCES, Place, Proxy, Sandbox, Upstream, eventually};

scenarios![only hosts:
    names_lead_to_the_proxy_until_the_last_service_is_disabled,
    services_are_told_apart_also_where_the_protocol_carries_no_name,
    names_lead_nowhere_near_a_proxy_that_is_gone,
    a_closed_service_keeps_its_names_without_the_proxy,
    everything_else_in_the_file_survives,
    a_file_that_is_a_mount_is_written_in_place,
    a_name_that_the_file_maps_already_is_left_to_it,
    the_environment_of_a_name_is_printed,
];

const SOON: Duration = Duration::from_secs(5);

const PROXY: &str = "\
listen: { port: 15001, workers: 2 }
admin: 127.0.0.1:15000
virtual_hosts:
  - { name: catalog, domains: [catalog, catalog.internal], cluster: catalog, ports: [8080, 8081] }
  - { name: mail, domains: [mail], cluster: mail, ports: [7025] }
  - { name: echo, domains: [echo], cluster: echo, ports: [7025] }
  - { name: quiet, domains: [quiet], cluster: catalog }
clusters:
  - { name: catalog, endpoints: ['10.77.0.2:8080', '10.77.0.3:8080'] }
  - { name: mail, endpoints: ['10.77.0.2:7025'] }
  - { name: echo, endpoints: ['10.77.0.3:7025'] }
";

/// A mesh whose proxy listens for names.
struct Named<'s> {
    agent: Agent<'s>,
    proxy: Proxy<'s>,
    _servers: [Upstream; 4],
}

impl<'s> Named<'s> {
    fn start(sandbox: &'s Sandbox, settings: &str) -> Self {
        let [a, b] = INSTANCES.map(|address| format!("{address}:8080"));
        Self {
            _servers: [
                Upstream::http(sandbox, "a", &[&a]),
                Upstream::http(sandbox, "b", &[&b]),
                Upstream::greeter(sandbox, &format!("{}:7025", INSTANCES[0])),
                Upstream::echo(sandbox, &format!("{}:7025", INSTANCES[1])),
            ],
            agent: Agent::start(sandbox, settings),
            proxy: Proxy::start_with(sandbox, PROXY),
        }
    }

    fn enabled(sandbox: &'s Sandbox, settings: &str) -> Self {
        let named = Self::start(sandbox, settings);
        named.agent.enable("shop");
        named
    }
}

fn names_lead_to_the_proxy_until_the_last_service_is_disabled(sandbox: &Sandbox) {
    let named = Named::start(sandbox, "");
    let before = fs::read(sandbox.hosts()).expect("the file");
    unresolved(&fetch(sandbox, "http://catalog:8080/"));
    named.agent.enable("shop");
    named.agent.enable("stock");
    for url in ["http://catalog:8080/", "http://catalog.internal:8081/"] {
        (0..6).map(|_| fetch(sandbox, url).ok().to_owned()).collect::<Answers>().are_balanced();
    }
    unresolved(&fetch(sandbox, "http://quiet:8080/"));
    named.agent.disable("shop");
    assert!(["a", "b"].contains(&fetch(sandbox, "http://catalog:8080/").ok()));
    named.agent.disable("stock");
    assert_eq!(fs::read(sandbox.hosts()).expect("the file"), before);
    unresolved(&fetch(sandbox, "http://catalog:8080/"));
    let metrics = named.proxy.metrics();
    assert_eq!(metrics.sum("mesh_proxy_connections_total", &[r#"kind="named""#]), 13.0);
}

/// Both listen on one port, and one of them speaks first.
fn services_are_told_apart_also_where_the_protocol_carries_no_name(sandbox: &Sandbox) {
    let _named = Named::enabled(sandbox, "");
    let script = |name: &str, read_first: bool| {
        format!(
            "import socket; s = socket.create_connection((\"{name}\", 7025), 5); s.settimeout(5)\n\
             if {}: print(s.recv(100).decode().strip())\n\
             s.sendall(b\"hello\\n\"); s.shutdown(socket.SHUT_WR)\n\
             print(b\"\".join(iter(lambda: s.recv(100), b\"\")).decode().strip())",
            if read_first { "True" } else { "False" }
        )
    };
    let python = |name, first| with_names(sandbox, &["python3", "-c", &script(name, first)]);
    python("mail", true).is("220 greeter\n250 hello");
    python("echo", false).is("hello\n6 bytes");
}

fn names_lead_nowhere_near_a_proxy_that_is_gone(sandbox: &Sandbox) {
    let named = Named::enabled(sandbox, "");
    assert!(["a", "b"].contains(&fetch(sandbox, "http://catalog:8080/").ok()));
    named.proxy.sigkill();
    sandbox.settle();
    unresolved(&fetch(sandbox, "http://catalog:8080/"));
    let _proxy = Proxy::start_with(sandbox, PROXY);
    eventually("the names are there again", SOON, || fetch(sandbox, "http://catalog:8080/").succeeded());
}

fn a_closed_service_keeps_its_names_without_the_proxy(sandbox: &Sandbox) {
    let named = Named::enabled(sandbox, "failure: closed\n");
    named.proxy.sigkill();
    sandbox.settle();
    const CURL_COULD_NOT_CONNECT: i32 = 7;
    fetch(sandbox, "http://catalog:8080/").failed_with(CURL_COULD_NOT_CONNECT);
}

fn everything_else_in_the_file_survives(sandbox: &Sandbox) {
    let text = b"127.0.0.1\tlocalhost # \xff\r\n\n10.0.0.1 a b\n\n# no end of line";
    fs::write(sandbox.hosts(), text).expect("write a hosts file");
    fs::set_permissions(sandbox.hosts(), Permissions::from_mode(0o640)).expect("set a mode");
    chown(sandbox.hosts(), Some(7), Some(8)).expect("set an owner");
    let named = Named::enabled(sandbox, "");
    let enabled = fs::read(sandbox.hosts()).expect("the file");
    assert!(enabled.starts_with(text) && enabled.len() > text.len());
    named.agent.disable("shop");
    let unchanged = || {
        let about = fs::metadata(sandbox.hosts()).expect("the file");
        assert_eq!((about.uid(), about.gid(), about.mode() & 0o7777), (7, 8, 0o640));
        assert_eq!(fs::read(sandbox.hosts()).expect("the file"), text);
    };
    unchanged();
    named.agent.enable("shop");
    named.agent.sigkill();
    Agent::command(sandbox, &["cleanup"]).ok();
    unchanged();
}

/// As a container's is.
fn a_file_that_is_a_mount_is_written_in_place(sandbox: &Sandbox) {
    let (real, hosts) = (sandbox.path("real"), sandbox.hosts());
    fs::write(&real, "127.0.0.1 localhost\n").expect("write a hosts file");
    let paths = [real.to_string_lossy(), hosts.to_string_lossy()];
    sandbox.program(Place::Outside, "mount").arg("--bind").args(&paths).run().ok();
    let named = Named::start(sandbox, "");
    named.agent.enable("shop");
    let answer = fetch(sandbox, "http://catalog:8080/");
    named.agent.disable("shop");
    let left = fs::read_to_string(&real);
    sandbox.program(Place::Outside, "umount").arg(&paths[1]).run().ok();
    assert!(["a", "b"].contains(&answer.ok()), "{answer:?}");
    assert_eq!(left.expect("the file"), "127.0.0.1 localhost\n");
}

fn a_name_that_the_file_maps_already_is_left_to_it(sandbox: &Sandbox) {
    fs::write(sandbox.hosts(), "10.77.0.3 catalog\n").expect("write a hosts file");
    let named = Named::enabled(sandbox, "");
    fetch(sandbox, "http://catalog:8080/").is("b");
    assert!(["a", "b"].contains(&fetch(sandbox, "http://catalog.internal:8080/").ok()));
    assert!(named.agent.log().contains("catalog is not steered"), "{}", named.agent.log());
}

fn the_environment_of_a_name_is_printed(sandbox: &Sandbox) {
    let _named = Named::start(sandbox, "");
    let shell = Agent::command(sandbox, &["env", "catalog.internal"]);
    let (host, port) = shell.ok().split_once('\n').expect("two lines");
    assert!(host.starts_with("export CATALOG_INTERNAL_SERVICE_HOST=127.66."), "{shell:?}");
    assert_eq!(port, "export CATALOG_INTERNAL_SERVICE_PORT=8080");
    let address = host.rsplit('=').next().unwrap_or_default();
    let url = format!("http://{address}:8080/");
    let curl =
        sandbox.program(Place::Outside, "curl").args(["--silent", "--header", "Host: anything", &url]).run();
    assert!(["a", "b"].contains(&curl.ok()), "{curl:?}");
    let systemd = Agent::command(sandbox, &["env", "mail", "--systemd"]);
    assert!(systemd.ok().starts_with("Environment=MAIL_SERVICE_HOST=127.66."), "{systemd:?}");
    let unknown = Agent::command(sandbox, &["env", "nobody"]);
    assert!(
        unknown.failed_with(1).contains("catalog, catalog.internal") || unknown.stderr.contains("catalog")
    );
}

fn fetch(sandbox: &Sandbox, url: &str) -> Finished {
    with_names(sandbox, &["curl", "--silent", "--show-error", "--max-time", "5", url])
}

/// In a mount namespace in which the file is /etc/hosts.
fn with_names(sandbox: &Sandbox, command: &[&str]) -> Finished {
    let hosts = sandbox.hosts().display().to_string();
    let script = r#"mount --bind "$0" /etc/hosts && exec "$@""#;
    let unshare = sandbox.program(Place::Shop, "unshare").args(["--mount", "sh", "-c", script, &hosts]);
    unshare.args(command).run()
}

#[track_caller]
fn unresolved(curl: &Finished) {
    const CURL_COULD_NOT_RESOLVE: i32 = 6;
    curl.failed_with(CURL_COULD_NOT_RESOLVE);
}
