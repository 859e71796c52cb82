//! Many services at once, by pattern, for show, or only to watch.

use tests::{Agent, Counters, Footprint, Mesh, ORIGIN, Place, Proxy, Sandbox, answers, ask};

scenarios![
    several_services_are_enabled_and_disabled_at_once,
    a_pattern_stands_for_the_services_it_matches,
    one_unknown_service_among_several_changes_nothing,
    a_dry_run_changes_nothing_and_shows_what_would_be,
    an_observed_service_is_counted_and_left_alone,
];

fn several_services_are_enabled_and_disabled_at_once(sandbox: &Sandbox) {
    let mesh = Mesh::start(sandbox, "");
    mesh_redirect(sandbox, &["enable", "shop", "stock", "shop"]).is("shop is enabled\nstock is enabled");
    assert_eq!(enabled(&mesh), ["shop", "stock"]);
    for place in [Place::Shop, Place::Stock] {
        assert_ne!(ask(sandbox, place, &origin()).ok(), "origin");
    }
    mesh_redirect(sandbox, &["disable", "stock", "shop"]).is("stock is disabled\nshop is disabled");
    assert!(Footprint::of(sandbox).is_empty());
}

fn a_pattern_stands_for_the_services_it_matches(sandbox: &Sandbox) {
    let mesh = Mesh::start(sandbox, &format!("  cart: {{ cgroup: {} }}\n", sandbox.cgroup(Place::Cart)));
    mesh_redirect(sandbox, &["enable", "s*"]).is("shop is enabled\nstock is enabled");
    let refused = mesh_redirect(sandbox, &["enable", "x*"]);
    assert!(refused.failed_with(1).contains("no service matches `x*`"), "{refused:?}");
    let refused = mesh_redirect(sandbox, &["enable", "[s"]);
    assert!(refused.failed_with(1).contains("[s"), "{refused:?}");
    assert_eq!(enabled(&mesh), ["shop", "stock"]);
    mesh_redirect(sandbox, &["disable", "*"]).is("shop is disabled\nstock is disabled");
}

fn one_unknown_service_among_several_changes_nothing(sandbox: &Sandbox) {
    let mesh = Mesh::start(sandbox, "");
    let refused = mesh_redirect(sandbox, &["enable", "shop", "nobody"]);
    assert!(refused.failed_with(1).contains("no service `nobody`"), "{refused:?}");
    assert!(enabled(&mesh).is_empty());
    assert!(Footprint::of(sandbox).is_empty());
}

fn a_dry_run_changes_nothing_and_shows_what_would_be(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "capture: { exclude: [10.9.0.0/16] }\n");
    let (steering, cgroup) = (Footprint::of(sandbox), sandbox.cgroup(Place::Stock));
    let shown = mesh_redirect(sandbox, &["enable", "stock", "--dry-run"]);
    let added = |text: &str| text.lines().all(|line| line.starts_with(['+', 's']));
    let changes = shown.ok();
    assert!(changes.starts_with("stock would be enabled\n+") && added(changes), "{changes}");
    // Links are at a cgroup's path, and a table has its id.
    let named = if changes.contains("link") {
        changes.contains(&cgroup)
    } else {
        changes.contains(": jump service_2")
    };
    assert!(named && changes.contains("stock"), "{changes}");
    assert_eq!((enabled(&mesh), Footprint::of(sandbox)), (vec!["shop".to_owned()], steering));

    let shown = mesh_redirect(sandbox, &["disable", "shop", "--dry-run"]);
    let changes = shown.ok();
    let removed = changes.lines().skip(1).all(|line| line.starts_with('-'));
    assert!(changes.starts_with("shop would be disabled\n-") && removed, "{changes}");
    assert!(changes.contains("shop"), "{changes}");
    answers(sandbox).are_balanced();
}

fn an_observed_service_is_counted_and_left_alone(sandbox: &Sandbox) {
    let mesh = Mesh::start(sandbox, "failure: closed\ncapture: { exclude: [10.77.0.2/32] }\n");
    mesh_redirect(sandbox, &["enable", "shop", "--observe"]).is("shop is observed");
    answers(sandbox).are_from(&["origin"]);
    ask(sandbox, Place::Shop, "10.77.0.2:8080").is("a");
    mesh.proxy.sigkill();
    answers(sandbox).are_from(&["origin"]);
    let observed = Counters { observed: 12, passed_by_rule: 1, ..Counters::default() };
    assert_eq!(mesh.agent.counters("shop"), observed);

    let _proxy = Proxy::start(sandbox);
    mesh.agent.enable("shop");
    answers(sandbox).are_balanced();
    assert_eq!(mesh.agent.counters("shop"), Counters { steered: 6, ..observed });
}

fn mesh_redirect(sandbox: &Sandbox, args: &[&str]) -> tests::Finished {
    Agent::command(sandbox, args)
}

fn enabled(mesh: &Mesh<'_>) -> Vec<String> {
    mesh.agent.status().services.into_iter().map(|service| service.name).collect()
}

fn origin() -> String {
    format!("{ORIGIN}:8080")
}
