//! What really happens to what a service sends, on every path there is: a prober that is steered as the service's goes down
//! each, to an echo at this host's own addresses. Nothing leaves the host.

mod echo;
mod message;
mod prober;

use crate::{
    api, client,
    config::{Config, check_name},
    explain::{Explained, Now, Outcome, Proto, Situation},
    mode::Mode,
    rules,
};
use anyhow::{Context as _, bail};
use echo::Echo;
use nix::{ifaddrs::getifaddrs, net::if_::InterfaceFlags, sys::socket::SockaddrStorage};
use serde::{Deserialize, Serialize};
use std::{
    env,
    ffi::OsStr,
    fs::File,
    io::{self, Read as _},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

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

/// What really happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Happened {
    /// The echo was reached by somebody else: the proxy.
    Steered,
    /// The echo was reached by the prober itself.
    Passed,
    Refused,
    TimedOut,
    /// It ended in another way.
    Failed,
    /// The kernel has no such path.
    Unavailable,
    /// There is nowhere to send it.
    NotProbed,
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

/// One path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Tried {
    pub(crate) path: Way,
    pub(crate) family: Family,
    pub(crate) happened: Happened,
    pub(crate) detail: String,
    /// None where nothing happened.
    pub(crate) agrees: Option<bool>,
    /// What was asked, and what policy says of it; none where nothing was asked.
    #[serde(flatten)]
    pub(crate) explained: Option<Explained>,
}

/// Tries every path of a service, which need neither run nor be enabled.
pub(crate) fn check(config: &Config, file: Option<&Path>, service: &str) -> anyhow::Result<Report> {
    check_name(service).map_err(anyhow::Error::msg)?;
    // What goes wrong without it is its absence, not what the prober would make of it.
    client::get::<api::Status>(&config.paths.run, "/v1/status")?;
    let nonce: Arc<str> = nonce().context("read /dev/urandom")?.into();
    let situation = Situation::of(config, service);
    let (mut probes, mut not_probed) = (named(&situation), Vec::new());
    for is_v4 in [true, false] {
        match start_echo(is_v4, &nonce) {
            Ok(echo) => add_probes(&echo, is_v4, &mut probes, &mut not_probed),
            Err(why) => {
                let family = if is_v4 { Family::Ipv4 } else { Family::Ipv6 };
                not_probed.extend(WAYS.map(|way| Tried::not_probed(way, family, why.clone())));
            }
        }
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
    command.args(["probe", service]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut prober = command.spawn().context("start the prober")?;
    let told = prober.stdin.take().map(|stdin| serde_json::to_writer(stdin, plan));
    let said = prober.stdout.take();
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut text = String::new();
        let read = said.map(|mut said| said.read_to_string(&mut text));
        sender.send(read.transpose().map(|_| text))
    });
    let heard = receiver.recv_timeout(ALL_PATIENCE);
    // It has ended, or shall.
    let _already_ended = prober.kill();
    let status = prober.wait().context("wait for the prober")?;
    told.transpose().context("tell the prober what to do")?;
    let heard = heard.with_context(|| format!("waited {} s for the prober", ALL_PATIENCE.as_secs()))?;
    let seen: Vec<Seen> = match serde_json::from_str(&heard.context("hear the prober")?) {
        Ok(seen) => seen,
        Err(_) => bail!("the prober ended without a report ({status}): its errors are above"),
    };
    Ok(seen)
}

/// An echo at the first address of a family that is this host's and nobody else's.
fn start_echo(is_v4: bool, nonce: &Arc<str>) -> Result<Echo, String> {
    let family = if is_v4 { "IPv4" } else { "IPv6" };
    let addresses = own_addresses().map_err(|error| format!("list this host's addresses: {error}"))?;
    let mut why = format!("this host has no {family} address but on loopback and its links");
    for address in addresses.into_iter().filter(|address| address.is_ipv4() == is_v4) {
        match Echo::start(address, nonce) {
            Ok(echo) => return Ok(echo),
            Err(error) => why = format!("listen at {address}: {error}"),
        }
    }
    Err(why)
}

/// Those of interfaces that are up, and that others may reach this host by.
fn own_addresses() -> nix::Result<Vec<IpAddr>> {
    let up = getifaddrs()?.filter(|interface| {
        interface.flags.contains(InterfaceFlags::IFF_UP)
            && !interface.flags.contains(InterfaceFlags::IFF_LOOPBACK)
    });
    let address = |storage: SockaddrStorage| match (storage.as_sockaddr_in(), storage.as_sockaddr_in6()) {
        (Some(v4), _) => Some(IpAddr::from(v4.ip())),
        (_, Some(v6)) => Some(IpAddr::from(v6.ip())),
        _ => None,
    };
    let addresses = up.filter_map(|interface| address(interface.address?));
    Ok(addresses.filter(|address| !rules::is_local(*address)).collect())
}

fn add_probes(echo: &Echo, is_v4: bool, probes: &mut Vec<Probe>, not_probed: &mut Vec<Tried>) {
    let families = if is_v4 { &[Family::Ipv4, Family::Mapped][..] } else { &[Family::Ipv6] };
    for &family in families {
        for way in WAYS {
            let to = match way {
                Way::Udp => Ok(echo.datagram),
                Way::DnsTcp | Way::DnsUdp | Way::DnsUdpUnconnected => echo.dns.clone(),
                _ => Ok(echo.stream),
            };
            match to {
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

impl Tried {
    fn new(situation: &Situation<'_>, probe: &Probe, seen: &Seen) -> Self {
        let Probe { way, family, to, name } = probe;
        let explained = Explained { name: name.clone(), ..situation.of_socket(*to, way.proto()) };
        let (happened, detail) = judge(seen);
        let agrees = expected(explained.decision, happened);
        Self { path: *way, family: *family, happened, detail, agrees, explained: Some(explained) }
    }

    fn not_probed(path: Way, family: Family, detail: String) -> Self {
        Self { path, family, happened: Happened::NotProbed, detail, agrees: None, explained: None }
    }
}

/// What happened, and how it shows.
fn judge(seen: &Seen) -> (Happened, String) {
    match seen {
        Seen::Answered { own, seen } if is_same(*own, *seen) => {
            (Happened::Passed, format!("the echo was reached from {seen}, which is the prober itself"))
        }
        Seen::Answered { own, seen } => {
            (Happened::Steered, format!("the echo was reached from {seen}, and the prober is {own}"))
        }
        Seen::Led => {
            (Happened::Steered, "the hosts file leads it to where the proxy listens for it".to_owned())
        }
        Seen::NotLed(why) => (Happened::Passed, why.clone()),
        Seen::Refused(why) => (Happened::Refused, why.clone()),
        Seen::TimedOut => (Happened::TimedOut, format!("nothing within {} s", PATIENCE.as_secs())),
        Seen::Failed(why) => (Happened::Failed, why.clone()),
        Seen::Unavailable(why) => (Happened::Unavailable, why.clone()),
    }
}

/// A socket that is not connected knows its port alone.
fn is_same(own: SocketAddr, seen: SocketAddr) -> bool {
    let (address, other) = (own.ip().to_canonical(), seen.ip().to_canonical());
    own.port() == seen.port() && (address.is_unspecified() || address == other)
}

/// Whether it is what was decided; none where nothing happened.
fn expected(decision: Outcome, happened: Happened) -> Option<bool> {
    if matches!(happened, Happened::Unavailable | Happened::NotProbed) {
        return None;
    }
    Some(match decision {
        Outcome::Steered | Outcome::Query => happened == Happened::Steered,
        Outcome::Refused => happened == Happened::Refused,
        _ => happened == Happened::Passed,
    })
}

fn nonce() -> io::Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(own: &str, seen: &str) -> Seen {
        Seen::Answered { own: own.parse().unwrap(), seen: seen.parse().unwrap() }
    }

    #[test]
    fn who_reached_the_echo_tells_what_happened() {
        let cases = [
            (answered("10.0.0.1:4000", "10.0.0.1:4000"), Happened::Passed),
            (answered("[::ffff:10.0.0.1]:4000", "10.0.0.1:4000"), Happened::Passed),
            (answered("0.0.0.0:4000", "10.0.0.1:4000"), Happened::Passed),
            (answered("[::]:4000", "10.0.0.1:4000"), Happened::Passed),
            (answered("0.0.0.0:4000", "10.0.0.1:4001"), Happened::Steered),
            (answered("127.0.0.1:4000", "10.0.0.1:4000"), Happened::Steered),
            (answered("10.0.0.1:4000", "10.0.0.1:4001"), Happened::Steered),
            (Seen::TimedOut, Happened::TimedOut),
            (Seen::Unavailable("ENOSYS".into()), Happened::Unavailable),
        ];
        for (seen, happened) in cases {
            assert_eq!(judge(&seen).0, happened, "{seen:?}");
        }
    }

    #[test]
    fn what_is_not_there_neither_agrees_nor_disagrees() {
        let cases = [
            (Outcome::Steered, Happened::Steered, Some(true)),
            (Outcome::Steered, Happened::Passed, Some(false)),
            (Outcome::Query, Happened::Steered, Some(true)),
            (Outcome::PassedByRule, Happened::Passed, Some(true)),
            (Outcome::PassedProxyAbsent, Happened::Refused, Some(false)),
            (Outcome::Ignored, Happened::Steered, Some(false)),
            (Outcome::Observed, Happened::Passed, Some(true)),
            (Outcome::Refused, Happened::Refused, Some(true)),
            (Outcome::Refused, Happened::TimedOut, Some(false)),
            (Outcome::Steered, Happened::Unavailable, None),
        ];
        for (decision, happened, agrees) in cases {
            assert_eq!(expected(decision, happened), agrees, "{decision:?} {happened:?}");
        }
    }
}
