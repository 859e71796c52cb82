//! The harness itself.

use std::panic::{AssertUnwindSafe, catch_unwind};

use tests::{Mode, ORIGIN, Place, Sandbox, Upstream, ask, cgroup_path};

#[test]
fn a_sandbox_leaves_nothing_behind_after_a_panic() {
    let mut traces = Vec::new();
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let sandbox = Sandbox::new("a_sandbox_leaves_nothing_behind_after_a_panic", Mode::Ebpf);
        let cgroups = [Place::Shop, Place::Peer].map(|place| cgroup_path(&sandbox.cgroup(place)));
        traces.extend(cgroups.into_iter().chain([sandbox.network(), sandbox.path("")]));
        let _server = Upstream::http(&sandbox, "origin", &[&format!("{ORIGIN}:8080")]);
        ask(&sandbox, Place::Shop, &format!("{ORIGIN}:8080")).is("origin");
        assert!(traces.iter().all(|path| path.exists()), "{traces:?}");
        panic!("on purpose");
    }));
    let message = outcome.expect_err("the panic").downcast_ref::<&str>().copied().unwrap_or_default();
    assert_eq!(message, "on purpose");
    traces.retain(|path| path.exists());
    assert!(traces.is_empty(), "still there: {traces:?}");
}
