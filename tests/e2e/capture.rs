//! Which connections are steered, and which are left alone.

use std::net::Ipv4Addr;

use tests::{
    Agent, Answers, Counters, Footprint, INSTANCES, Mesh, ORIGIN, ORIGIN_V6, Place, Sandbox, Upstream,
    answers, ask,
};

scenarios![
    an_excluded_network_is_left_alone,
    an_excluded_port_is_left_alone,
    a_port_excluded_in_a_network_is_steered_elsewhere,
    an_include_list_narrows_what_is_steered,
    a_service_may_have_rules_of_its_own,
    a_program_outside_the_cgroup_is_left_alone,
    a_more_specific_include_overrules_an_exclude,
    loopback_is_left_alone,
    a_datagram_socket_is_left_alone,
];
scenarios![only ebpf:
    a_service_that_is_not_enabled_runs_no_program_of_ours,
    more_blocks_than_the_kernel_holds_are_an_error_that_leaves_nothing,
];

/// What was written of a policy that did not fit must not become part of the next one.
fn more_blocks_than_the_kernel_holds_are_an_error_that_leaves_nothing(sandbox: &Sandbox) {
    let block = |number: u32| format!("{}/32", Ipv4Addr::from((10 << 24 | 77 << 16) + number));
    let include = (0..70_000).map(block).collect::<Vec<_>>().join(", ");
    let service = |place: Place, include: &str| {
        format!("{{ cgroup: {}, capture: {{ include: [{include}] }} }}", sandbox.cgroup(place))
    };
    let (large, small) = (service(Place::Cart, &include), service(Place::Outside, "100.64.0.0/24"));
    let mesh = Mesh::start(sandbox, &format!("  cart: {large}\n  small: {small}\n"));
    let refused = Agent::command(sandbox, &["enable", "cart"]);
    let complaint = refused.failed_with(1);
    assert!(complaint.contains("MR_RULES") && complaint.contains("65536"), "{complaint}");
    assert!(mesh.agent.status().services.is_empty());
    mesh.agent.enable("shop");
    Agent::command(sandbox, &["enable", "cart"]).failed_with(1);
    mesh.agent.enable("small");
    answers(sandbox).are_balanced();
    ask(sandbox, Place::Outside, &format!("{ORIGIN}:8080")).is("origin");
}

fn an_excluded_network_is_left_alone(sandbox: &Sandbox) {
    let settings = "capture:\n  exclude: [10.77.0.8/29, 'fd77::10/124']\n";
    let mesh = Mesh::enabled(sandbox, settings);
    shop(sandbox, &[&format!("{ORIGIN}:8080"), &format!("[{ORIGIN_V6}]:8080")]).are_from(&["origin"]);
    shop(sandbox, &[format!("{}:8080", INSTANCES[0]).as_str(); 4]).are_balanced();
    assert_eq!(
        mesh.agent.counters("shop"),
        Counters { steered: 4, passed_by_rule: 2, ..Counters::default() }
    );
}

fn an_excluded_port_is_left_alone(sandbox: &Sandbox) {
    let settings = "capture:\n  exclude:\n    - ports: [22, 8081-8090]\n";
    let mesh = Mesh::enabled(sandbox, settings);
    shop(sandbox, &[&format!("{ORIGIN}:8081"), &format!("[{ORIGIN_V6}]:8081")]).are_from(&["origin"]);
    answers(sandbox).are_balanced();
    assert_eq!(
        mesh.agent.counters("shop"),
        Counters { steered: 6, passed_by_rule: 2, ..Counters::default() }
    );
}

fn a_port_excluded_in_a_network_is_steered_elsewhere(sandbox: &Sandbox) {
    let settings = "capture:\n  exclude:\n    - { cidr: 10.77.0.10/32, ports: [8080] }\n";
    let _mesh = Mesh::enabled(sandbox, settings);
    shop(sandbox, &[&format!("{ORIGIN}:8080")]).are_from(&["origin"]);
    shop(sandbox, &[&format!("{ORIGIN}:8081"), &format!("{}:8080", INSTANCES[1])]).are_balanced();
}

fn an_include_list_narrows_what_is_steered(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "capture:\n  include: [10.77.0.10/32]\n");
    answers(sandbox).are_balanced();
    shop(sandbox, &[&format!("{}:8080", INSTANCES[0])]).are_from(&["a"]);
    shop(sandbox, &[&format!("[{ORIGIN_V6}]:8080")]).are_from(&["origin"]);
    assert_eq!(
        mesh.agent.counters("shop"),
        Counters { steered: 6, passed_by_rule: 2, ..Counters::default() }
    );
}

fn a_service_may_have_rules_of_its_own(sandbox: &Sandbox) {
    let cart = format!("  cart: {{ cgroup: {}, capture: {{ exclude: [10.77.0.10/32] }} }}\n", {
        sandbox.cgroup(Place::Cart)
    });
    let mesh = Mesh::enabled(sandbox, &cart);
    mesh.agent.enable("cart");
    ask(sandbox, Place::Cart, &format!("{ORIGIN}:8080")).is("origin");
    answers(sandbox).are_balanced();
    assert_eq!(mesh.agent.counters("cart"), Counters { passed_by_rule: 1, ..Counters::default() });
}

fn a_program_outside_the_cgroup_is_left_alone(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    for place in [Place::Outside, Place::Stock] {
        ask(sandbox, place, &format!("{ORIGIN}:8080")).is("origin");
    }
    assert_eq!(mesh.agent.counters("shop"), Counters::default());
}

fn a_more_specific_include_overrules_an_exclude(sandbox: &Sandbox) {
    let settings = "capture:\n  include: [0.0.0.0/0, 10.77.0.10/32]\n  exclude: [10.77.0.0/24]\n";
    let _mesh = Mesh::enabled(sandbox, settings);
    answers(sandbox).are_balanced();
    shop(sandbox, &[&format!("{}:8080", INSTANCES[1])]).are_from(&["b"]);
}

fn loopback_is_left_alone(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    let _local = Upstream::http_at(sandbox, Place::Outside, "local", &["127.0.0.1:8080", "[::1]:8080"]);
    shop(sandbox, &["127.0.0.1:8080", "[::1]:8080"]).are_from(&["local"]);
    assert_eq!(mesh.agent.counters("shop").steered, 0);
}

fn a_datagram_socket_is_left_alone(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    let address = format!("{ORIGIN}:53");
    let _server = Upstream::datagrams(sandbox, &address);
    sandbox.peer(Place::Shop).args(["datagram", &address]).run().is(&format!("{address} echo"));
    assert_eq!(mesh.agent.counters("shop").steered, 0);
}

/// By the kernel's own count.
fn a_service_that_is_not_enabled_runs_no_program_of_ours(sandbox: &Sandbox) {
    let _mesh = Mesh::enabled(sandbox, "");
    let mut counting = sandbox.peer(Place::Outside).arg("count-runs").serve(sandbox.path("counting.log"));
    counting.wait_until(|counting| counting.log().contains("counting"));
    let steering = Footprint::of(sandbox);
    for place in [Place::Outside, Place::Stock, Place::Cart] {
        ask(sandbox, place, &format!("{ORIGIN}:8080")).is("origin");
    }
    assert_eq!(steering.runs(), 0);
    answers(sandbox).are_balanced();
    assert!(steering.runs() >= 6, "the kernel counts: {}", steering.runs());
}

/// Who answers the shop at each of these addresses.
#[track_caller]
fn shop(sandbox: &Sandbox, addresses: &[&str]) -> Answers {
    addresses.iter().map(|address| ask(sandbox, Place::Shop, address).ok().to_owned()).collect()
}
