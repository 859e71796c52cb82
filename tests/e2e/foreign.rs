//! What others have in the kernel and on the host is as it was, byte for byte, whatever we do beside it.

use tests::{Agent, Mesh, ORIGIN, Place, Process, Sandbox, answers, cgroup_path};

scenarios![what_others_have_is_untouched_and_works_on];

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
    let hook = foreign_hook(sandbox);
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

/// Somebody else's connect hook at the cgroup of a service.
fn foreign_hook(sandbox: &Sandbox) -> Process {
    let cgroup = cgroup_path(&sandbox.cgroup(Place::Shop)).display().to_string();
    let mut hook = sandbox.peer(Place::Outside).args(["hook", &cgroup]).serve(sandbox.path("hook.log"));
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
