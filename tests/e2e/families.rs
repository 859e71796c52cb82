//! Address families and ways of connecting, and what the application sees of it.

use tests::{Counters, Mesh, ORIGIN, ORIGIN_V6, Place, Sandbox};

scenarios![an_application_sees_the_peer_it_asked_for, a_non_blocking_connect_is_steered];

fn an_application_sees_the_peer_it_asked_for(sandbox: &Sandbox) {
    every_family_is_steered(sandbox, &[]);
}

fn a_non_blocking_connect_is_steered(sandbox: &Sandbox) {
    every_family_is_steered(sandbox, &["--non-blocking"]);
}

#[track_caller]
fn every_family_is_steered(sandbox: &Sandbox, options: &[&str]) {
    let mesh = Mesh::enabled(sandbox, "");
    let (v4, v6) = (format!("{ORIGIN}:8080"), format!("[{ORIGIN_V6}]:8080"));
    let mapped = format!("[::ffff:{ORIGIN}]:8080");
    let cases = [(&v4, &v4, None), (&v6, &v6, None), (&v4, &mapped, Some("--mapped"))];
    for (asked, seen, family) in cases {
        let client = sandbox.peer(Place::Shop).arg("connect").args(options).args(family).arg(asked).run();
        let (peer, server) = client.ok().split_once(' ').expect("PEER SERVER");
        assert_eq!(peer, seen, "connected to {asked}");
        assert!(["a", "b"].contains(&server), "connected to {asked}, answered by {server}");
    }
    assert_eq!(mesh.agent.counters("shop"), Counters { steered: 3, ..Counters::default() });
    assert_eq!(mesh.origin.requests(), 0);
}
