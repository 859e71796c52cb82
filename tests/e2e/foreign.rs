//! What others have in the kernel and on the host is as it was, byte for byte, whatever we do beside it.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tests::{Agent, Finished, Footprint, Mesh, ORIGIN, Place, Process, Sandbox, answers, cgroup_path};

scenarios![what_others_have_is_untouched_and_works_on, tables_of_others_are_named];
scenarios![only ebpf:
    a_load_balancer_above_translates_what_is_not_steered_and_what_the_proxy_asks_for,
    a_load_balancer_before_ours_is_told_of_and_works_on,
    a_program_that_is_alone_is_named_and_nothing_is_changed,
    a_program_that_would_not_run_any_more_is_named_and_nothing_is_changed,
];

/// As Docker, kube-proxy and a firewall have it.
const OTHERS: &str = "
nft add table inet firewall
nft add chain inet firewall output '{ type filter hook output priority 0; policy accept; }'
nft add rule inet firewall output tcp dport 4444 counter drop
nft add table ip mesh
nft add chain ip mesh output '{ type nat hook output priority -100; }'
nft add rule ip mesh output ip daddr 10.77.0.9 tcp dport 8080 dnat to 10.77.0.10:8081
nft add set ip mesh addresses '{ type ipv4_addr; flags interval; elements = { 10.0.0.0/8 }; }'
iptables-legacy -t filter -A OUTPUT -p tcp --dport 4445 -j DROP
iptables-legacy -t nat -A OUTPUT -d 10.77.0.8 -p tcp --dport 8080 -j DNAT --to-destination 10.77.0.10:8081
ip6tables-legacy -t filter -A OUTPUT -p tcp --dport 4445 -j DROP
iptables-nft -t filter -A OUTPUT -p tcp --dport 4446 -j DROP
iptables-nft -t mangle -A OUTPUT -p tcp --dport 4447 -j MARK --set-mark 7
";

/// All of it, without what is counted.
const LIST: &str = "
nft --stateless list ruleset
iptables-legacy-save | grep -v '^[#:]'
ip6tables-legacy-save | grep -v '^[#:]'
iptables-nft-save 2>/dev/null | grep -v '^[#:]'
cat /etc/hosts
stat --format '%i %a %U %s %y' /etc/hosts
";

fn what_others_have_is_untouched_and_works_on(sandbox: &Sandbox) {
    shell(sandbox, OTHERS);
    let hook = hook(sandbox, &cgroup_path(&sandbox.cgroup(Place::Shop)), &[]);
    let before = everything(sandbox);
    assert!(
        before.contains("table inet firewall")
            && before.contains("10.77.0.8")
            && before.contains("somebody_else")
    );

    let mesh = Mesh::start(sandbox, "capture: { dns: true }\n");
    mesh.agent.enable_all(&["shop".to_owned(), "stock".to_owned()]);
    answers(sandbox).are_balanced();
    // A service that is not ours still gets its translations.
    tests::ask(sandbox, Place::Outside, "10.77.0.9:8080").is("origin");
    tests::ask(sandbox, Place::Outside, "10.77.0.8:8080").is("origin");
    mesh.agent.disable_all(&["shop".to_owned(), "stock".to_owned()]);
    assert_eq!(everything(sandbox), before, "after disable");

    mesh.agent.enable("shop");
    answers(sandbox).are_balanced();
    mesh.agent.sigkill();
    Agent::command(sandbox, &["cleanup"]).ok();
    assert_eq!(everything(sandbox), before, "after cleanup");
    tests::ask(sandbox, Place::Shop, &format!("{ORIGIN}:8080")).is("origin");
    tests::ask(sandbox, Place::Outside, "10.77.0.9:8080").is("origin");
    drop(hook);
}

/// An address that nobody has.
const SERVICE: &str = "10.96.0.1:80";
const TRANSLATE: [&str; 3] = ["--translate", SERVICE, "10.77.0.10:8080"];

/// As Cilium is attached at the root; here, above the service and the proxy. It is there before ours, and then after them.
fn a_load_balancer_above_translates_what_is_not_steered_and_what_the_proxy_asks_for(sandbox: &Sandbox) {
    let options = [&TRANSLATE[..], &["--name", "cil_sock4_connect"]].concat();
    let before = hook(sandbox, &above(sandbox), &options);
    let mesh = Mesh::start(sandbox, "");
    asked(sandbox, Place::Shop, "catalog").is("origin");
    let enabled = Agent::command(sandbox, &["enable", "shop"]);
    assert!(!enabled.ok().contains("note:"), "{enabled:?}");
    let goes_through = || {
        assert_ne!(asked(sandbox, Place::Shop, "catalog").ok(), "origin", "the proxy knows where it leads");
        asked(sandbox, Place::Shop, "unknown").is("origin");
        asked(sandbox, Place::Outside, "catalog").is("origin");
    };
    goes_through();
    let found = beside(sandbox);
    assert!(
        found.iter().any(|(ok, found)| *ok
            && found.starts_with("Cilium: program cil_sock4_conne (id ")
            && found.contains(" at connect4 of /")
            && found.contains("after ours")),
        "{found:?}"
    );

    drop(before);
    let _after = hook(sandbox, &above(sandbox), &options);
    goes_through();
    assert_eq!(mesh.agent.counters("shop").steered, 4);
}

/// At the very cgroup of the service: the kernel goes by the order in which they came.
fn a_load_balancer_before_ours_is_told_of_and_works_on(sandbox: &Sandbox) {
    let shop = cgroup_path(&sandbox.cgroup(Place::Shop));
    let _before = hook(sandbox, &shop, &TRANSLATE);
    let mesh = Mesh::start(sandbox, "");
    let enabled = Agent::command(sandbox, &["--json", "enable", "shop"]);
    let said: Value = serde_json::from_str(enabled.ok()).expect("what was enabled, as JSON");
    let note = said["notes"].as_array().and_then(|notes| notes.iter().filter_map(Value::as_str).next());
    let note = note.unwrap_or_else(|| panic!("no note: {said}"));
    assert!(note.contains("shop: program somebody_else (id ") && note.contains("runs before ours"), "{note}");
    let beside = &said["beside"][0];
    assert_eq!((&beside["name"], &beside["order"]), (&"somebody_else".into(), &"first".into()), "{said}");

    assert_ne!(asked(sandbox, Place::Shop, "catalog").ok(), "origin");
    asked(sandbox, Place::Shop, "unknown").is("origin");
    assert_eq!(mesh.agent.counters("shop").steered, 2);
}

fn a_program_that_is_alone_is_named_and_nothing_is_changed(sandbox: &Sandbox) {
    let shop = cgroup_path(&sandbox.cgroup(Place::Shop));
    is_refused_beside(sandbox, &shop, "--alone", "holds connect4 of ");
}

fn a_program_that_would_not_run_any_more_is_named_and_nothing_is_changed(sandbox: &Sandbox) {
    is_refused_beside(sandbox, &above(sandbox), "--gives-way", "would not run there any more");
}

#[track_caller]
fn is_refused_beside(sandbox: &Sandbox, at: &Path, how: &str, because: &str) {
    let mesh = Mesh::start(sandbox, "");
    let _hook = hook(sandbox, at, &[how]);
    let before = Footprint::of(sandbox);
    let refused = Agent::command(sandbox, &["enable", "shop"]);
    let complaint = refused.failed_with(1);
    let words =
        [because, &at.display().to_string(), "is somebody_else", "BPF_F_ALLOW_MULTI", "mode: nftables"];
    assert!(words.iter().all(|word| complaint.contains(word)), "{complaint}");
    assert!(mesh.agent.status().services.is_empty());
    assert_eq!(Footprint::of(sandbox), before);
    tests::ask(sandbox, Place::Shop, &format!("{ORIGIN}:8080")).is("origin");
    let found = beside(sandbox);
    assert!(found.iter().any(|(ok, found)| !ok && found.contains("somebody_else")), "{found:?}");
}

/// As their makers name them.
const TABLES: &str = "
nft add table ip nat
nft add chain ip nat OUTPUT '{ type nat hook output priority -100; }'
nft add chain ip nat DOCKER
nft add chain ip nat KUBE-SERVICES
nft add table inet firewalld
nft add chain inet firewalld nat_OUTPUT '{ type nat hook output priority -90; }'
nft add table inet istio-proxy-nat
nft add chain inet istio-proxy-nat output '{ type nat hook output priority -100; }'
iptables-legacy -t nat -A OUTPUT -d 10.77.0.8 -p tcp --dport 8080 -j DNAT --to-destination 10.77.0.10:8081
nft add table ip postrouting
nft add chain ip postrouting out '{ type nat hook postrouting priority 100; }'
";

fn tables_of_others_are_named(sandbox: &Sandbox) {
    shell(sandbox, TABLES);
    let _mesh = Mesh::start(sandbox, "");
    let enabled = Agent::command(sandbox, &["enable", "shop"]);
    let notes = enabled.ok();
    assert!(notes.contains("note: Istio: table inet istio-proxy-nat, priority -100 steers too"), "{notes}");
    assert!(!notes.contains("Docker") && !notes.contains("firewalld"), "{notes}");
    answers(sandbox).are_balanced();
    let found = beside(sandbox);
    let starts = [
        (true, "Docker, kube-proxy: table ip nat, priority -100 is asked after ours"),
        (true, "firewalld: table inet firewalld, priority -90 is asked after ours"),
        (true, "table ip nat of iptables-legacy, priority -100 is asked after ours"),
        (false, "Istio: table inet istio-proxy-nat, priority -100 steers too"),
    ];
    for (ok, start) in starts {
        assert!(
            found.iter().any(|(is_ok, found)| *is_ok == ok && found.starts_with(start)),
            "{start}: {found:?}"
        );
    }
    assert_eq!(found.len(), starts.len(), "{found:?}");
}

/// What `check` finds beside us: whether it is well, and what it is.
#[track_caller]
fn beside(sandbox: &Sandbox) -> Vec<(bool, String)> {
    let check = Agent::command(sandbox, &["check", "--json"]);
    let said: Value = serde_json::from_str(check.ok()).expect("the findings as JSON");
    let lines = said["findings"].as_array().into_iter().flatten().filter(|line| line["subject"] == "beside");
    lines.map(|line| (line["ok"] == true, line["finding"].as_str().unwrap_or_default().to_owned())).collect()
}

/// Who answers a request to the address that nobody has.
fn asked(sandbox: &Sandbox, place: Place, host: &str) -> Finished {
    let curl = sandbox.program(place, "curl").args(["--silent", "--show-error", "--max-time", "5"]);
    curl.args(["--header", &format!("Host: {host}"), &format!("http://{SERVICE}/")]).run()
}

/// The cgroup above all of the sandbox's.
fn above(sandbox: &Sandbox) -> PathBuf {
    let shop = cgroup_path(&sandbox.cgroup(Place::Shop));
    shop.parent().map(Path::to_owned).expect("a cgroup above")
}

/// Somebody else's connect hook at a cgroup.
fn hook(sandbox: &Sandbox, cgroup: &Path, options: &[&str]) -> Process {
    let cgroup = cgroup.display().to_string();
    let peer = sandbox.peer(Place::Outside).arg("hook").args(options).arg(&cgroup);
    let log = sandbox.path("hook.log");
    let _of_one_before = fs::remove_file(&log);
    let mut hook = peer.serve(log);
    hook.wait_until(|hook| hook.log().contains("attached"));
    hook
}

fn everything(sandbox: &Sandbox) -> String {
    let cgroup = cgroup_path(&sandbox.cgroup(Place::Shop)).display().to_string();
    let hooks = sandbox.program(Place::Outside, "bpftool").args(["cgroup", "show", &cgroup]).run();
    [shell(sandbox, LIST), hooks.ok().to_owned()].join("\n")
}

fn shell(sandbox: &Sandbox, commands: &str) -> String {
    let finished = sandbox.program(Place::Outside, "sh").args(["-ec", commands]).run();
    finished.ok().to_owned()
}
