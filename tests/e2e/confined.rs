//! A running daemon has no more privileges than it needs, whatever it was started with.

use std::collections::BTreeMap;
use std::fs;

use tests::{Agent, Mesh, Sandbox};

scenarios![everywhere: every_thread_of_the_daemon_is_confined];

/// CAP_DAC_OVERRIDE, CAP_NET_ADMIN, CAP_PERFMON and CAP_BPF (linux/capability.h).
const NEEDED: u64 = 1 << 1 | 1 << 12 | 1 << 38 | 1 << 39;

fn every_thread_of_the_daemon_is_confined(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "capture: { base: routable }\n");
    let threads = threads(&mesh.agent);
    assert!(threads.len() > 1, "{threads:?}");
    for thread in threads {
        let bits = |set: &str| u64::from_str_radix(&thread[set], 16).expect("a set of capabilities");
        assert_eq!(["CapPrm", "CapEff", "CapBnd"].map(bits), [NEEDED; 3], "{thread:?}");
        assert_eq!(["CapInh", "CapAmb"].map(bits), [0; 2], "{thread:?}");
        // A filter is mode 2.
        assert_eq!((&*thread["NoNewPrivs"], &*thread["Seccomp"]), ("1", "2"), "{thread:?}");
    }
    let log = mesh.agent.log();
    assert!(!log.contains("not confined"), "{log}");
}

/// What the kernel says of each (proc_pid_status(5)).
fn threads(agent: &Agent<'_>) -> Vec<BTreeMap<String, String>> {
    let tasks = fs::read_dir(format!("/proc/{}/task", agent.pid())).expect("the daemon's threads");
    let statuses = tasks.flatten().filter_map(|task| fs::read_to_string(task.path().join("status")).ok());
    let fields = |status: String| {
        let fields = status.lines().filter_map(|line| line.split_once(':'));
        fields.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect()
    };
    statuses.map(fields).collect()
}
