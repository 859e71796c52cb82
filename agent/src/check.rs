//! Whether this host can do what is asked of it: one line for each fact, with the remedy.

use crate::{
    api, beside,
    client::{self, ClientError},
    config::Config,
    confine,
    mode::{self, Facts, Mode},
    probe,
    redirect::{
        ebpf::{self, Ebpf},
        nftables,
    },
    workload::Workloads,
};
use serde::Serialize;
use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    path::PathBuf,
    time::Duration,
};

/// The oldest kernel with all that the programs use: a cgroup storage shared by programs (5.9), socket storage in
/// sock_ops programs (5.8) and CAP_BPF (5.8).
const OLDEST_KERNEL: (u32, u32) = (5, 10);

/// One fact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Line {
    pub(crate) subject: &'static str,
    pub(crate) ok: bool,
    /// Whether nothing can be steered without it.
    pub(crate) required: bool,
    pub(crate) finding: String,
    /// What to do where it is not ok.
    pub(crate) remedy: Option<String>,
}

impl Line {
    fn required(subject: &'static str, result: Result<String, String>, remedy: impl Into<String>) -> Self {
        let ok = result.is_ok();
        let finding = result.unwrap_or_else(|finding| finding);
        Self { subject, ok, required: true, finding, remedy: (!ok).then(|| remedy.into()) }
    }

    fn wanted(subject: &'static str, result: Result<String, String>, remedy: impl Into<String>) -> Self {
        Self { required: false, ..Self::required(subject, result, remedy) }
    }
}

/// All there is to know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Findings {
    pub(crate) findings: Vec<Line>,
    /// The one that is used, or would be.
    pub(crate) mode: Option<Mode>,
    pub(crate) possible: Vec<Mode>,
}

impl Findings {
    /// Whether something can be steered.
    pub(crate) fn are_good(&self) -> bool {
        self.findings.iter().all(|line| line.ok || !line.required)
    }
}

/// Looks at everything.
pub(crate) fn all(config: &Config) -> Findings {
    let facts = &probe::facts(config);
    let status = client::get::<api::Status>(&config.paths.run, "/v1/status");
    let mut findings = vec![
        kernel(),
        cgroup2(),
        privileges(),
        ebpf(facts),
        nftables(facts),
        hosts(facts),
        mode(config, facts),
        confinement(),
        daemon(&status),
        proxy_listens(config),
        proxy_attached(config),
    ];
    findings.extend(beside(config, status.as_ref().ok()));
    let possible = mode::ALL.into_iter().filter(|mode| facts.of(*mode).is_ok()).collect();
    let mode = mode::choose(config.mode, facts).ok().map(|choice| choice.mode);
    Findings { findings, mode, possible }
}

fn kernel() -> Line {
    let (major, minor) = OLDEST_KERNEL;
    let result = match probe::kernel() {
        Ok((release, version)) if version >= OLDEST_KERNEL => Ok(release),
        Ok((release, _)) => Err(format!("{release} is older than {major}.{minor}")),
        Err(error) => Err(format!("uname: {error}")),
    };
    Line::required("kernel", result, format!("boot Linux {major}.{minor} or newer"))
}

fn cgroup2() -> Line {
    let result = probe::cgroup2_mount()
        .map(|dir| format!("mounted at {}", dir.display()))
        .map_err(|error| error.to_string());
    Line::required("cgroup2", result, "mount it, or boot with systemd.unified_cgroup_hierarchy=1")
}

fn privileges() -> Line {
    let result = match probe::missing_capabilities() {
        Ok(missing) if missing.is_empty() => Ok("CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON".to_owned()),
        Ok(missing) => Err(format!("{} missing", missing.join(" and "))),
        Err(error) => Err(format!("read /proc/self/status: {error}")),
    };
    Line::wanted("privileges", result, "run as root, or give the unit these capabilities")
}

fn ebpf(facts: &Facts) -> Line {
    let result = facts.ebpf.clone().map(|()| "possible: every program loads".to_owned());
    Line::wanted(
        "ebpf",
        result,
        "a kernel with CONFIG_CGROUP_BPF, the privileges above and a BPF file system (`mount -t bpf bpf /sys/fs/bpf`) are needed",
    )
}

fn nftables(facts: &Facts) -> Line {
    let result = facts.nftables.clone().map(|()| "possible: the kernel takes the rules".to_owned());
    Line::wanted(
        "nftables",
        result,
        "Linux 5.13 with CONFIG_NF_TABLES, CONFIG_NFT_SOCKET, CONFIG_NFT_REDIR and CONFIG_SOCK_CGROUP_DATA, and CAP_NET_ADMIN are needed",
    )
}

fn hosts(facts: &Facts) -> Line {
    let how = if facts.hosts_is_mount { "written in place, since it is a mount" } else { "replaced" };
    let result = facts.hosts.clone().map(|()| format!("possible: the file can be {how}"));
    Line::wanted(
        "hosts",
        result,
        "write access to the file is needed; for a unit, `ReadWritePaths=/etc/hosts`",
    )
}

fn mode(config: &Config, facts: &Facts) -> Line {
    let result = match mode::choose(config.mode, facts) {
        Ok(mode::Choice { mode, reason }) => Ok(format!("{mode}: {reason}")),
        Err(error) => Err(error.to_string()),
    };
    Line::required("mode", result, "see the remedies above, or set `mode: auto`")
}

fn confinement() -> Line {
    Line::wanted(
        "confinement",
        confine::possible(),
        "boot with `lsm=landlock,…` (Linux 5.13, CONFIG_SECURITY_LANDLOCK), and with CONFIG_SECCOMP_FILTER; until then the daemon can do more than it needs",
    )
}

fn daemon(status: &Result<api::Status, ClientError>) -> Line {
    let result = match status {
        Ok(status) => Ok(format!("running, {} services enabled", status.services.len())),
        Err(error) => Err(error.to_string()),
    };
    Line::wanted("daemon", result, "see its log: `journalctl -u mesh-redirect`")
}

fn proxy_listens(config: &Config) -> Line {
    let port = config.proxy.port;
    let listens = |address: SocketAddr| TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok();
    let (v4, v6) = (listens((Ipv4Addr::LOCALHOST, port).into()), listens((Ipv6Addr::LOCALHOST, port).into()));
    let result = match (v4, v6) {
        (true, true) => Ok(format!("on 127.0.0.1:{port} and [::1]:{port}")),
        (true, false) => Ok(format!("on 127.0.0.1:{port} only: IPv6 destinations count as having no proxy")),
        (false, true) => Ok(format!("on [::1]:{port} only: IPv4 destinations count as having no proxy")),
        (false, false) => Err(format!("nobody listens on port {port} of 127.0.0.1 or ::1")),
    };
    Line::wanted(
        "proxy listens",
        result,
        "start it: `systemctl start mesh-proxy`; until then services fail open or closed as configured",
    )
}

fn proxy_attached(config: &Config) -> Line {
    let found =
        probe::cgroup2_mount().map(Workloads::new).map(|mut workloads| workloads.cgroup(&config.proxy.scope));
    let result = match found {
        Ok(Some(cgroup)) => Ok(format!("in {cgroup}")),
        Ok(None) => Err(format!("{} does not run", config.proxy.scope)),
        Err(error) => Err(error.to_string()),
    };
    Line::wanted(
        "proxy cgroup",
        result,
        "set proxy.unit or proxy.cgroup to where the proxy runs; only listeners opened there get traffic",
    )
}

/// Whoever else changes where connections go: at the cgroups of services, enabled or configured, or else at the root, and
/// in this network namespace.
fn beside(config: &Config, status: Option<&api::Status>) -> Vec<Line> {
    let root = probe::cgroup2_mount().unwrap_or_default();
    let mut workloads = Workloads::new(root.clone());
    let configured =
        config.services.keys().filter_map(|name| workloads.cgroup(&Workloads::scope(config, name)));
    let mut cgroups: BTreeSet<PathBuf> = configured.map(|cgroup| cgroup.dir).chain([root]).collect();
    let scopes = status.iter().flat_map(|status| &status.services).flat_map(|service| &service.scopes);
    cgroups.extend(scopes.map(|scope| workloads.dir(&scope.cgroup)));
    let ours = Ebpf::new(config.paths.pins.clone(), config.proxy.admin).programs();
    let (names, mut hooks) = (ebpf::names(), ebpf::Hooks::default());
    let others = cgroups.iter().flat_map(|cgroup| ebpf::others_beside(&mut hooks, cgroup, &ours));
    let programs = others.filter_map(|other| {
        let cgroup = workloads.path_of_dir(&other.dir);
        beside::program(&other, &cgroup, names.get(&other.id).map(String::as_str))
    });
    let chains = nftables::other_nat_chains().unwrap_or_default();
    let findings: BTreeSet<beside::Finding> = programs.chain(chains.iter().map(beside::chain)).collect();
    let line = |beside::Finding { who, how, ok, remedy }: beside::Finding| {
        let found = format!("{who} {how}");
        Line::wanted("beside", if ok { Ok(found) } else { Err(found) }, remedy)
    };
    findings.into_iter().map(line).collect()
}
