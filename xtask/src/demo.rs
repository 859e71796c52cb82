//! The main job, to watch: one unmodified program, before it is steered, while it is, and after.

use crate::{
    build::{self, step},
    setup,
};
use tests::{
    Agent, Answers, Footprint, INSTANCES, Metrics, Mode, ORIGIN, PROXY_CONFIG, Place, Proxy, Sandbox,
    Upstream,
};

/// Six requests, which curl makes over one connection.
const REQUESTS: &str = "http://catalog:8080/[1-6]";
/// One for a host that the proxy has no route for.
const UNKNOWN: &str = "http://other:8080/";
const LEGACY: [&str; 1] = ["legacy"];
const CATALOG: [&str; 2] = ["catalog-1", "catalog-2"];
/// What the proxy has to say of what just happened.
const SHOWN: [&str; 4] = [
    "mesh_proxy_connections_total",
    "mesh_proxy_requests_total",
    "mesh_proxy_request_duration_seconds_count",
    "mesh_proxy_upstream_connects_total",
];

/// Sets up, builds and shows it. It fails where the product does not do what it says.
pub(crate) fn run() -> anyhow::Result<()> {
    build::require_root("`cargo xtask demo`")?;
    step("set-up", || setup::ensure(setup::For::Demo))?;
    tests::use_binaries(step("build", || build::everything(&[]))?);
    show(&Sandbox::new("demo", Mode::Ebpf));
    Ok(())
}

fn show(sandbox: &Sandbox) {
    let [first, second] = INSTANCES.map(|address| format!("{address}:8080"));
    let _servers = [
        Upstream::http(sandbox, LEGACY[0], &[&format!("{ORIGIN}:8080")]),
        Upstream::http(sandbox, CATALOG[0], &[&first]),
        Upstream::http(sandbox, CATALOG[1], &[&second]),
    ];
    let _agent = Agent::start(sandbox, "");
    let proxy = Proxy::start(sandbox);

    heading("The scene: network namespaces and cgroups of the demo's own, and an unmodified program, curl");
    println!("curl is the service `shop`. The name catalog resolves to the server `legacy`, {ORIGIN}.");
    println!("The proxy, which runs without any privilege, has this in its proxy.yaml:\n");
    PROXY_CONFIG.lines().skip_while(|line| !line.starts_with("virtual_hosts")).for_each(indented);

    heading("Before: the kernel connects curl to what it asks for");
    curl(sandbox, REQUESTS, &LEGACY);

    heading("Enabled: its connections reach the proxy, which takes the instances in turn");
    mesh_redirect(sandbox, &["enable", "shop"]);
    curl(sandbox, REQUESTS, &CATALOG);
    println!("\nWhat the proxy has no route for goes where it was going:");
    curl(sandbox, UNKNOWN, &LEGACY);

    heading(
        "The proxy is killed: the kernel sees that nobody listens, and the next connection goes straight",
    );
    proxy.sigkill();
    curl(sandbox, REQUESTS, &LEGACY);
    println!("\nIt is started again:");
    let proxy = Proxy::start(sandbox);
    curl(sandbox, REQUESTS, &CATALOG);
    mesh_redirect(sandbox, &["status"]);

    heading("Disabled: as if it had never been there");
    let steering = Footprint::of(sandbox);
    mesh_redirect(sandbox, &["disable", "shop"]);
    curl(sandbox, REQUESTS, &LEGACY);
    mesh_redirect(sandbox, &["status"]);
    steering.is_gone();
    assert!(Footprint::of(sandbox).is_empty(), "something is left in the kernel");
    println!("\nbpftool finds no program, map or link of ours in the kernel any more.");

    heading("What the proxy has measured since it was started again");
    metrics(&proxy.metrics());
}

/// Runs curl as the service, and makes sure that just these servers answer.
fn curl(sandbox: &Sandbox, url: &str, servers: &[&str]) {
    println!("$ curl {url}");
    let names = ["catalog", "other"].map(|name| format!("{name}:8080:{ORIGIN}"));
    let resolve = names.iter().flat_map(|name| ["--resolve", name]);
    let options = ["--silent", "--show-error", "--max-time", "5", "--write-out", "\\n"];
    let finished = sandbox.program(Place::Shop, "curl").args(options).args(resolve).arg(url).run();
    let answers: Vec<&str> = finished.ok().lines().collect();
    indented(&answers.join("  "));
    answers.into_iter().map(str::to_owned).collect::<Answers>().are_from(servers);
}

fn mesh_redirect(sandbox: &Sandbox, args: &[&str]) {
    println!("$ mesh-redirect {}", args.join(" "));
    Agent::command(sandbox, args).ok().lines().for_each(indented);
}

fn metrics(metrics: &Metrics) {
    let name = |line: &str| line.split(['{', ' ']).next().unwrap_or_default().to_owned();
    metrics.text().lines().filter(|line| SHOWN.contains(&name(line).as_str())).for_each(indented);
}

fn heading(text: &str) {
    println!("\n── {text}\n");
}

fn indented(line: &str) {
    println!("    {line}");
}
