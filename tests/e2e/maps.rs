//! How full the kernel's maps are, and what they had to forget.

use std::time::Duration;

use tests::{Agent, MapStatus, Mesh, ORIGIN, Place, Sandbox, answers, eventually, slow_request};

scenarios![only ebpf:
    entries_go_with_their_connections,
    an_entry_that_takes_the_place_of_its_socket_s_own_is_not_taken_for_an_evicted_one,
    entries_that_had_to_make_room_are_counted,
];

const SOON: Duration = Duration::from_secs(5);

fn entries_go_with_their_connections(sandbox: &Sandbox) {
    let mesh = Mesh::start(sandbox, "");
    assert!(mesh.agent.status().maps.is_empty(), "nothing is loaded");
    mesh.agent.enable("shop");
    let services = mesh.agent.map("MR_SERVICES");
    assert_eq!((services.entries, services.capacity, services.evicted), (1, 4096, None));
    // The whole of both families.
    assert_eq!(mesh.agent.map("MR_RULES").entries, 2);
    let open = slow_request(sandbox);
    for name in ["MR_ORIGINS", "MR_CONNECTIONS"] {
        assert!(mesh.agent.map(name).entries >= 1, "{name}");
    }
    open.finish().ok();
    answers(sandbox).are_balanced();
    for name in ["MR_ORIGINS", "MR_CONNECTIONS"] {
        eventually("the entries are gone", SOON, || mesh.agent.map(name).entries == 0);
        assert_eq!(mesh.agent.map(name).evicted, Some(0), "{name}");
    }
}

fn an_entry_that_takes_the_place_of_its_socket_s_own_is_not_taken_for_an_evicted_one(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    fail_to_connect(sandbox, 1, 3);
    assert_eq!(mesh.agent.counters("shop").steered, 4);
    eventually("one is left", SOON, || origins(&mesh.agent).entries == 1);
    assert_eq!(origins(&mesh.agent).evicted, Some(0));
}

fn entries_that_had_to_make_room_are_counted(sandbox: &Sandbox) {
    const SOCKETS: u64 = 70_000;
    let mesh = Mesh::enabled(sandbox, "");
    fail_to_connect(sandbox, SOCKETS, 1);
    eventually("what is not there was evicted", SOON, || {
        let MapStatus { entries, capacity, evicted, .. } = origins(&mesh.agent);
        entries <= capacity && evicted == Some(SOCKETS - entries)
    });
}

fn origins(agent: &Agent<'_>) -> MapStatus {
    agent.map("MR_ORIGINS")
}

/// One connection, and then sockets at the same port of its own whose connects to the same destination fail, each a few
/// times: their origins are known by then, and nothing tells the kernel of their end.
#[track_caller]
fn fail_to_connect(sandbox: &Sandbox, sockets: u64, times: u64) {
    let script = format!(
        "import errno, socket
def client():
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    client.bind(('0.0.0.0', 40123))
    return client
first = client()
first.connect(('{ORIGIN}', 8080))
for _ in range({sockets}):
    with client() as other:
        for _ in range({times}):
            assert other.connect_ex(('{ORIGIN}', 8080)) == errno.EADDRNOTAVAIL
"
    );
    sandbox.program(Place::Shop, "python3").args(["-c", &script]).run().ok();
}
