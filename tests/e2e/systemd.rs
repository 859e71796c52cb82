//! On a machine with systemd: installed, steered across restarts, and gone without a trace.

use std::env;
use std::fs;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use tests::{
    Build, Footprint, INSTANCES, Machine, Metrics, Mode, ORIGIN, PROXY_CONFIG, Release, Root, Sandbox,
};
use tests::{Status, Upstream, eventually, wait_for};

scenarios![only ebpf:
    a_unit_is_steered_across_restarts_and_all_is_uninstalled_without_a_trace,
    a_binary_of_another_abi_takes_over_without_a_gap,
];
scenarios![only nftables: a_host_that_refuses_bpf_gets_a_table];
scenarios![only hosts: a_host_that_refuses_both_gets_names];

/// The same on every systemd that there is in Debian.
mod a_unit_that_is_restarted_fifty_times_never_escapes {
    use super::{Mode, Release, Sandbox, restart_fifty_times};

    #[test]
    fn on_systemd_247() {
        restart_fifty_times(&Sandbox::new("restarted_on_systemd_247", Mode::Ebpf), Release::Bullseye);
    }

    #[test]
    fn on_systemd_252() {
        restart_fifty_times(&Sandbox::new("restarted_on_systemd_252", Mode::Ebpf), Release::Bookworm);
    }

    #[test]
    fn on_systemd_257() {
        restart_fifty_times(&Sandbox::new("restarted_on_systemd_257", Mode::Ebpf), Release::Trixie);
    }
}

/// What systemd itself says of the units, from 0 (safe) to 10.
mod the_units_are_confined {
    use super::{Mode, Release, Sandbox, are_confined};

    #[test]
    fn on_systemd_252() {
        are_confined(&Sandbox::new("confined_on_systemd_252", Mode::Ebpf), Release::Bookworm);
    }

    #[test]
    fn on_systemd_257() {
        are_confined(&Sandbox::new("confined_on_systemd_257", Mode::Ebpf), Release::Trixie);
    }
}

/// Every systemd has its own way with a unit that says when it has reloaded.
mod a_reload_moves_the_step_before_a_start_with_the_unit {
    use super::{Mode, Release, Sandbox, reload_with_another_unit};

    #[test]
    fn on_systemd_247() {
        reload_with_another_unit(&Sandbox::new("reloaded_on_systemd_247", Mode::Ebpf), Release::Bullseye);
    }

    #[test]
    fn on_systemd_252() {
        reload_with_another_unit(&Sandbox::new("reloaded_on_systemd_252", Mode::Ebpf), Release::Bookworm);
    }

    #[test]
    fn on_systemd_257() {
        reload_with_another_unit(&Sandbox::new("reloaded_on_systemd_257", Mode::Ebpf), Release::Trixie);
    }
}

/// A unit that never heard of the mesh: it connects as soon as it is started, and then over and over.
const SHOP: &str = "\
[Service]
ExecStart=/bin/sh -c 'while :; do curl --silent --max-time 2 http://10.77.0.10:8080/; sleep 0.05; done'
";

/// A unit that is restarted attaches itself.
const WITHOUT_A_DAEMON: &str = "\
systemctl stop mesh-redirect && systemctl restart shop && sleep 0.5 && systemctl start mesh-redirect";

/// Everywhere an installation or a running agent might leave something.
const LIST_FILES: &str =
    "find /etc /opt /usr /var/lib /run/systemd/system /sys/fs/bpf; find /run -name '*mesh*'";

const SOON: Duration = Duration::from_secs(10);

fn a_unit_is_steered_across_restarts_and_all_is_uninstalled_without_a_trace(sandbox: &Sandbox) {
    let shop = Shop::on_a_machine(sandbox);
    let files = shop.run(LIST_FILES);
    shop.install();
    shop.connects_directly();

    shop.run("mesh-redirect enable shop");
    shop.is_steered();
    assert!(Metrics::of(sandbox).sum("mesh_proxy_requests_total", &[r#"cluster="catalog""#]) > 0.0);
    shop.is_steered_throughout("systemctl restart shop");
    shop.is_steered_throughout("systemctl kill --signal=KILL mesh-redirect");
    shop.is_steered_throughout("systemctl restart mesh-redirect");
    shop.is_steered_throughout(WITHOUT_A_DAEMON);
    shop.run("systemctl restart mesh-proxy");
    shop.is_steered();

    shop.run("mesh-redirect disable shop");
    shop.connects_directly();
    assert_eq!(Footprint::of(sandbox), Footprint::default());
    shop.uninstall();
    assert_eq!(added(&files, &shop.run(LIST_FILES)), Vec::<&str>::new());
}

/// An administrator replaces the binary; units start anew before its daemon does, and after.
fn a_binary_of_another_abi_takes_over_without_a_gap(sandbox: &Sandbox) {
    let shop = Shop::on_a_machine(sandbox);
    shop.install();
    shop.run("mesh-redirect enable shop");
    shop.is_steered();
    for build in [Build::ChangedAbi, Build::Plain] {
        fs::copy(build.binary(), shop.machine.root().path().join("usr/local/bin/next")).expect("copy");
        shop.is_steered_throughout("mv /usr/local/bin/next /usr/local/bin/mesh-redirect");
        // What it writes for units' starts is for the binary that is there by then.
        shop.run(
            "rm /etc/systemd/system/shop.service.d/50-mesh-redirect.conf && (mesh-redirect status || true)",
        );
        eventually("the step before the start is back", SOON, || shop.machine.run(STEPS).succeeded());
        shop.is_steered_throughout("systemctl restart shop");
        shop.is_steered_throughout("systemctl restart mesh-redirect");
        shop.is_steered_throughout("systemctl restart shop");
        eventually("one version is there", SOON, || {
            shop.run("ls /sys/fs/bpf/mesh-redirect").lines().count() == 1
        });
        shop.is_steered();
    }
    shop.run("systemctl stop mesh-redirect && mesh-redirect cleanup");
    eventually("nothing is left in the kernel", SOON, || Footprint::of(sandbox).is_empty());
}

/// Connects with the first thing it does, and says whom it got.
const FIRST: &str = "\
[Service]
Type=oneshot
ExecStart=/usr/local/bin/peer connect 10.77.0.10:8080
";

const RESTARTS: usize = 25;

fn restart_fifty_times(sandbox: &Sandbox, release: Release) {
    let shop = Shop::on(sandbox, release);
    let version = format!("systemd {} ", release.systemd());
    assert!(shop.run("systemctl --version").starts_with(&version));
    let root = shop.machine.root();
    fs::copy(root.binaries().join("peer"), root.path().join("usr/local/bin/peer")).expect("copy");
    shop.machine.root().write("etc/systemd/system/first.service", FIRST);
    shop.install();
    shop.run("systemctl stop shop && mesh-redirect enable first");
    let direct = shop.origin.requests();
    let restart = format!("for i in $(seq {RESTARTS}); do systemctl restart first || exit 1; done");
    shop.run(&restart);
    shop.run("systemctl stop mesh-redirect");
    shop.run(&restart);

    let said = shop.run("journalctl --sync && journalctl --unit first --output cat");
    let served = |by: &str| said.lines().filter(|line| *line == format!("10.77.0.10:8080 {by}")).count();
    assert_eq!((served("a") + served("b"), served("origin")), (2 * RESTARTS, 0), "{said}");
    assert_eq!(shop.origin.requests(), direct);
}

const AT_MOST: [(&str, f64); 2] = [("mesh-redirect", 3.0), ("mesh-proxy", 1.5)];

fn are_confined(sandbox: &Sandbox, release: Release) {
    let shop = Shop::on(sandbox, release);
    shop.install();
    for (unit, most) in AT_MOST {
        let said = shop.run(&format!("systemd-analyze security --no-pager {unit}.service"));
        let exposure =
            said.lines().last().and_then(|line| line.split(": ").nth(1)?.split(' ').next()?.parse().ok());
        let exposure: f64 = exposure.unwrap_or_else(|| panic!("no exposure in {said}"));
        assert!(exposure <= most, "{unit}: {exposure}\n{said}");
    }
    let log = shop.run("journalctl --unit mesh-redirect --output cat");
    assert!(!log.contains("not confined"), "the daemon confines itself under its unit too: {log}");

    shop.run("mesh-redirect enable shop");
    shop.is_steered();
    shop.run("mesh-redirect exec other -- true");
    shop.run("sleep 60 & mesh-redirect adopt other $! && kill $!");
    let found = shop.run("mesh-redirect check --json");
    assert!(found.contains("landlock"), "{found}");
}

/// Which units have our step, and how the agent's own unit is.
const STEPS: &str = "ls /etc/systemd/system/*.service.d/50-mesh-redirect.conf";
const AGENT: &str = "systemctl show --property=ActiveState,SubState --value mesh-redirect";

fn reload_with_another_unit(sandbox: &Sandbox, release: Release) {
    let shop = Shop::on(sandbox, release);
    let root = shop.machine.root();
    let configure = |unit: &str| {
        let yaml = format!("services: {{ web: {{ unit: {unit} }} }}\n");
        root.write("etc/mesh-redirect/agent.yaml", &yaml);
    };
    root.write("etc/systemd/system/other.service", SHOP);
    shop.install();
    configure("shop.service");
    shop.run("systemctl reload mesh-redirect && mesh-redirect enable web");
    shop.is_steered();
    assert_eq!(shop.run(STEPS), "/etc/systemd/system/shop.service.d/50-mesh-redirect.conf");

    for change in [&format!("rm $({STEPS})"), &format!("echo '# mine' >> $({STEPS})")] {
        let before = shop.run(&format!("cat $({STEPS})"));
        shop.run(change);
        let named = shop.machine.run("mesh-redirect status");
        named.failed_with(3);
        let finding = "web: the step before the start of shop.service is missing or was edited";
        assert!(named.stdout.contains(finding), "{named:?}");
        eventually("it is healthy again", SOON, || shop.machine.run("mesh-redirect status").succeeded());
        assert_eq!(shop.run(&format!("cat $({STEPS})")), before);
    }

    configure("other.service");
    shop.run("systemctl reload mesh-redirect");
    assert_eq!(shop.run(STEPS), "/etc/systemd/system/other.service.d/50-mesh-redirect.conf");
    assert_eq!(shop.run(AGENT), "active\nrunning");
    shop.connects_directly();
    shop.run("systemctl stop shop");
    shop.is_steered_throughout("systemctl start other");

    for bad in ["other", "nobody.service"] {
        configure(bad);
        let refused = shop.machine.run("systemctl reload mesh-redirect");
        assert!(!refused.succeeded(), "{refused:?}");
        assert_eq!(shop.run(AGENT), "active\nrunning");
    }
    let refusals = || {
        let log = shop.run("journalctl --sync && journalctl --unit mesh-redirect --output cat");
        log.matches("there is no unit nobody.service").count()
    };
    let before = refusals();
    shop.run("systemctl kill --signal=HUP mesh-redirect");
    eventually("the signal was answered in the log", SOON, || refusals() > before);
    configure("other.service");
    shop.is_steered();
    assert_eq!(shop.run(AGENT), "active\nrunning");
}

/// As a container runtime or a hardened host refuses it to the daemon, and to the step before a unit's start.
const WITHOUT_BPF: &str = "[Service]\nSystemCallFilter=~bpf\nSystemCallErrorNumber=EPERM\n";

fn a_host_that_refuses_bpf_gets_a_table(sandbox: &Sandbox) {
    let shop = Shop::on_a_machine(sandbox);
    shop.restrict("mesh-redirect", WITHOUT_BPF);
    shop.install();
    let log = shop.run("journalctl --unit mesh-redirect --output cat");
    assert!(log.contains("no ebpf: ") && log.contains("mode=nftables"), "{log}");
    shop.connects_directly();

    shop.run("mesh-redirect enable shop");
    shop.is_steered();
    let of_shop = || Metrics::of(sandbox).sum("mesh_proxy_requests_total", &[r#"service="shop""#]);
    assert!(of_shop() > 0.0, "the proxy, which is nobody in particular, may ask whose connections are");
    shop.is_steered_throughout("systemctl restart shop");
    shop.is_steered_throughout("systemctl restart mesh-redirect");
    let before = of_shop();
    shop.is_steered_throughout("systemctl restart shop");
    assert!(of_shop() > before, "a daemon that was restarted tells it too");
    shop.run("mesh-redirect disable shop");
    shop.connects_directly();
    eventually("nothing is left in the kernel", SOON, || Footprint::of(sandbox).is_empty());
}

/// Without a netlink socket there is no nf_tables either.
const WITHOUT_NETLINK: &str = "RestrictAddressFamilies=\nRestrictAddressFamilies=AF_UNIX AF_INET AF_INET6\n";

/// A unit that looks a name up.
const BY_NAME: &str = "\
[Service]
ExecStart=/bin/sh -c 'while :; do curl --silent --max-time 2 http://catalog:8080/; echo; sleep 0.05; done'
";

fn a_host_that_refuses_both_gets_names(sandbox: &Sandbox) {
    let shop = Shop::on_a_machine(sandbox);
    let root = shop.machine.root();
    root.write("etc/hosts", "127.0.0.1 localhost\n");
    root.write("etc/systemd/system/shop.service", BY_NAME);
    shop.restrict("mesh-redirect", &format!("{WITHOUT_BPF}{WITHOUT_NETLINK}"));
    shop.install();
    let log = shop.run("journalctl --unit mesh-redirect --output cat");
    let chosen = log.contains("no ebpf: ") && log.contains("no nftables: ") && log.contains("mode=hosts");
    assert!(chosen, "{log}");

    let enabled = shop.run("mesh-redirect enable shop");
    assert!(enabled.contains("every process that looks them up is steered"), "{enabled}");
    eventually("the shop is answered", SOON, || {
        let said = shop.run("journalctl --unit shop --output cat");
        ["a", "b"].iter().all(|server| said.lines().any(|line| line == *server))
    });
    shop.run("mesh-redirect disable shop");
    assert_eq!(fs::read_to_string(root.path().join("etc/hosts")).expect("the file"), "127.0.0.1 localhost\n");
}

/// The unit `shop` on a machine of its own, and the servers it may end up at.
struct Shop<'s> {
    machine: Machine<'s>,
    origin: Upstream,
    _instances: [Upstream; 2],
}

impl<'s> Shop<'s> {
    fn on_a_machine(sandbox: &'s Sandbox) -> Self {
        Self::on(sandbox, Release::Bookworm)
    }

    fn on(sandbox: &'s Sandbox, release: Release) -> Self {
        let [a, b] = INSTANCES.map(|address| format!("{address}:8080"));
        let instances = [Upstream::http(sandbox, "a", &[&a]), Upstream::http(sandbox, "b", &[&b])];
        let origin = Upstream::http(sandbox, "origin", &[&format!("{ORIGIN}:8080")]);
        let root = Root::fresh(sandbox, release);
        root.write("etc/systemd/system/shop.service", SHOP);
        Self { machine: Machine::boot(sandbox, root), origin, _instances: instances }
    }

    fn install(&self) {
        let root = self.machine.root();
        xtask("install", root, &["--bin-dir", &root.binaries().to_string_lossy()]);
        self.machine.root().write("etc/mesh-redirect/proxy.yaml", PROXY_CONFIG);
        self.run("systemctl daemon-reload && systemctl start mesh-redirect mesh-proxy shop");
    }

    /// Adds settings to a unit that is not there yet.
    fn restrict(&self, unit: &str, settings: &str) {
        let folder = format!("etc/systemd/system/{unit}.service.d");
        fs::create_dir_all(self.machine.root().path().join(&folder)).expect("make a folder for settings");
        self.machine.root().write(&format!("{folder}/restricted.conf"), settings);
    }

    fn uninstall(&self) {
        self.run("systemctl stop shop mesh-proxy mesh-redirect && mesh-redirect cleanup");
        xtask("uninstall", self.machine.root(), &["--purge"]);
        self.run("systemctl daemon-reload");
    }

    #[track_caller]
    fn run(&self, command: &str) -> String {
        self.machine.run(command).ok().to_owned()
    }

    #[track_caller]
    fn connects_directly(&self) {
        let before = self.origin.requests();
        eventually("the shop connects directly", SOON, || self.origin.requests() > before + 2);
    }

    #[track_caller]
    fn is_steered(&self) {
        let before = wait_for(SOON, || self.steered()).expect("a status");
        eventually("the shop is steered", SOON, || self.steered().is_some_and(|now| now > before + 5));
    }

    /// Not even the first connection goes past the proxy.
    #[track_caller]
    fn is_steered_throughout(&self, happening: &str) {
        // What was under way before gets time to arrive.
        sleep(Duration::from_millis(200));
        let direct = self.origin.requests();
        self.run(happening);
        self.is_steered();
        let passed = self.origin.requests() - direct;
        let status =
            || self.machine.run("mesh-redirect status; journalctl --lines 40 --output short-precise").stdout;
        assert!(passed == 0, "{passed} went past the proxy: {happening}\n{}", status());
    }

    /// Nothing, while the daemon is being restarted.
    fn steered(&self) -> Option<u64> {
        let status = self.machine.run("mesh-redirect status --json");
        let status: Status = serde_json::from_str(&status.stdout).ok()?;
        Some(status.services.first()?.counters.steered)
    }
}

/// What the second listing has and the first has not.
fn added<'t>(before: &str, after: &'t str) -> Vec<&'t str> {
    let known: Vec<&str> = before.lines().collect();
    after.lines().filter(|file| !known.contains(file)).collect()
}

#[track_caller]
fn xtask(command: &str, root: &Root, options: &[&str]) {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let run = ["run", "--quiet", "--package", "xtask", "--", command, "--root"];
    let status = Command::new(cargo).args(run).arg(root.path()).args(options).status();
    assert!(status.expect("run cargo").success(), "cargo xtask {command}");
}
