//! What really happens to what a service sends, on every path there is: a prober that is steered as the service's goes down
//! each, to an echo at this host's own addresses. Nothing leaves the host.

mod echo;
mod message;
mod prober;
mod tried;

use crate::{
    api, client,
    config::{Config, check_name},
    explain::{Now, Proto, Situation},
    mode::Mode,
};
use anyhow::{Context as _, bail, ensure};
use echo::Echo;
use serde::{Deserialize, Serialize};
use std::{
    env,
    ffi::OsStr,
    fs::File,
    io::{self, Read as _},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

pub(crate) use tried::{Happened, Tried};

/// How long each step of a probe may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long all of them may take, beside the daemon, which waits for the kernel and the proxy.
const ALL_PATIENCE: Duration = Duration::from_secs(75);

/// A way of sending something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Way {
    Tcp,
    /// TCP whose first segment carries data (RFC 7413).
    FastOpen,
    /// TCP, connected through io_uring(7).
    IoUring,
    /// TCP over many paths (RFC 8684).
    Mptcp,
    Udp,
    DnsTcp,
    DnsUdp,
    /// By a socket that is not connected.
    DnsUdpUnconnected,
    /// By name, where names are what is steered.
    Name,
}

/// Those to an address.
const WAYS: [Way; 8] = [
    Way::Tcp,
    Way::FastOpen,
    Way::IoUring,
    Way::Mptcp,
    Way::Udp,
    Way::DnsTcp,
    Way::DnsUdp,
    Way::DnsUdpUnconnected,
];

impl Way {
    fn proto(self) -> Proto {
        match self {
            Self::Tcp | Self::FastOpen | Self::IoUring | Self::Mptcp | Self::DnsTcp | Self::Name => {
                Proto::Tcp
            }
            Self::Udp | Self::DnsUdp | Self::DnsUdpUnconnected => Proto::Udp,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::FastOpen => "TCP fast open",
            Self::IoUring => "TCP by io_uring",
            Self::Mptcp => "MPTCP",
            Self::Udp => "UDP",
            Self::DnsTcp => "DNS by TCP",
            Self::DnsUdp => "DNS by UDP",
            Self::DnsUdpUnconnected => "DNS by UDP, not connected",
            Self::Name => "name",
        }
    }
}

/// What the socket and the address are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Family {
    Ipv4,
    Ipv6,
    /// An IPv4 address, by a socket of IPv6.
    Mapped,
}

/// What the prober is to do.
#[derive(Debug, Serialize, Deserialize)]
struct Plan {
    nonce: String,
    hosts: PathBuf,
    probes: Vec<Probe>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Probe {
    way: Way,
    family: Family,
    to: SocketAddr,
    /// By which it is known, where names are what is steered.
    name: Option<String>,
}

/// What the prober saw.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Seen {
    /// The echo answered, and saw a peer.
    Answered {
        own: SocketAddr,
        seen: SocketAddr,
    },
    Refused(String),
    TimedOut,
    Failed(String),
    /// The kernel has no such path.
    Unavailable(String),
    /// The name led to the proxy, or not.
    Led,
    NotLed(String),
}

/// Every path of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Report {
    pub(crate) service: String,
    pub(crate) now: Now,
    pub(crate) paths: Vec<Tried>,
    /// Whether what happened is what policy says, wherever something did.
    pub(crate) agrees: bool,
}

/// Tries every path of a service, which need neither run nor be enabled.
pub(crate) fn check(config: &Config, file: Option<&Path>, service: &str) -> anyhow::Result<Report> {
    check_name(service).map_err(anyhow::Error::msg)?;
    // What goes wrong without it is its absence, not what the prober would make of it.
    client::get::<api::Status>(&config.paths.run, "/v1/status")?;
    let nonce: Arc<str> = nonce().context("read /dev/urandom")?.into();
    let situation = Situation::of(config, service);
    let (mut probes, mut not_probed) = (named(&situation), Vec::new());
    for families in [&[Family::Ipv4, Family::Mapped][..], &[Family::Ipv6]] {
        let is_v4 = families.contains(&Family::Ipv4);
        add_probes(families, &Echo::start(is_v4, &nonce), &mut probes, &mut not_probed);
    }
    let plan = Plan { nonce: nonce.to_string(), hosts: config.paths.hosts.clone(), probes };
    let seen = run_prober(file, service, &plan)?;
    let tried = plan.probes.iter().zip(&seen).map(|(probe, seen)| Tried::new(&situation, probe, seen));
    let paths: Vec<Tried> = tried.chain(not_probed).collect();
    let agrees = paths.iter().all(|tried| tried.agrees != Some(false));
    Ok(Report { service: service.to_owned(), now: situation.now, paths, agrees })
}

/// What the prober itself does: it is told a plan on its standard input, and says on its standard output what it saw.
pub(crate) fn probe() -> anyhow::Result<()> {
    let plan: Plan = serde_json::from_reader(io::stdin()).context("read the plan")?;
    Ok(serde_json::to_writer(io::stdout(), &prober::run(&plan))?)
}

/// This program once more, which has itself moved to a cgroup that is steered as the service's.
fn run_prober(file: Option<&Path>, service: &str, plan: &Plan) -> anyhow::Result<Vec<Seen>> {
    let mut command = Command::new(env::current_exe().context("find this program")?);
    command.args(file.map(|file| [OsStr::new("--config"), file.as_os_str()]).into_iter().flatten());
    command.args(["probe", service]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut prober = command.spawn().context("start the prober")?;
    // One that has ended already says why.
    let _told = prober.stdin.take().map(|stdin| serde_json::to_writer(stdin, plan));
    let (said, complained) = (prober.stdout.take(), prober.stderr.take());
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || sender.send((text(said), text(complained))));
    let heard = receiver.recv_timeout(ALL_PATIENCE);
    // It has ended, or shall.
    let _already_ended = prober.kill();
    prober.wait().context("wait for the prober")?;
    let (said, complaint) =
        heard.with_context(|| format!("waited {} s for the prober", ALL_PATIENCE.as_secs()))?;
    let Ok(seen) = serde_json::from_str::<Vec<Seen>>(&said) else {
        bail!("probe as `{service}`: {}", complaint.trim().trim_start_matches("mesh-redirect: "));
    };
    ensure!(seen.len() == plan.probes.len(), "the prober's report is of another plan");
    Ok(seen)
}

/// All that can be read.
fn text(from: Option<impl io::Read>) -> String {
    let mut bytes = Vec::new();
    let _as_far_as_it_goes = from.map(|mut from| from.read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Every way to an echo, or why there is none.
fn add_probes(
    families: &[Family],
    echo: &Result<Echo, String>,
    probes: &mut Vec<Probe>,
    not_probed: &mut Vec<Tried>,
) {
    for &family in families {
        for way in WAYS {
            match echo.as_ref().map_err(Clone::clone).and_then(|echo| echo.of(way)) {
                Ok(to) => probes.push(Probe { way, family, to: family.of(to), name: None }),
                Err(why) => not_probed.push(Tried::not_probed(way, family, why)),
            }
        }
    }
}

impl Family {
    fn of(self, to: SocketAddr) -> SocketAddr {
        match to {
            SocketAddr::V4(v4) if self == Self::Mapped => (v4.ip().to_ipv6_mapped(), v4.port()).into(),
            to => to,
        }
    }
}

/// The first name that the proxy listens for, where names are what is steered.
fn named(situation: &Situation<'_>) -> Vec<Probe> {
    if situation.now.mode != Some(Mode::Hosts) {
        return Vec::new();
    }
    let names = situation.routable.names().unwrap_or_default();
    let name = names.into_iter().find_map(|name| Some((name.ports.first().copied()?, name)));
    let probe = name.map(|(port, name)| Probe {
        way: Way::Name,
        family: Family::Ipv4,
        to: (name.address, port).into(),
        name: Some(name.name),
    });
    probe.into_iter().collect()
}

fn nonce() -> io::Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
