//! Goes down every path, in a cgroup that is steered as the service's, and says what it saw.

use super::{PATIENCE, Plan, Probe, Seen, Way, message};
use crate::{sockets, sys::io_uring::Ring};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
    thread,
};

/// Longest that is read.
const MAX_MESSAGE: u64 = 512;

/// All at once, since each may take its time.
pub(super) fn run(plan: &Plan) -> Vec<Seen> {
    thread::scope(|scope| {
        let start = |probe| scope.spawn(move || go(plan, probe));
        let running: Vec<_> = plan.probes.iter().map(start).collect();
        let ended = running.into_iter().map(thread::ScopedJoinHandle::join);
        ended.map(|seen| seen.unwrap_or_else(|_| Seen::Failed("the prober failed".to_owned()))).collect()
    })
}

fn go(plan: &Plan, probe: &Probe) -> Seen {
    let Probe { way, to, name, .. } = probe;
    let seen = match way {
        Way::Tcp | Way::FastOpen | Way::IoUring | Way::Mptcp => by_stream(*way, *to, &plan.nonce),
        Way::Udp => by_datagram(*to, true, message::hello(&plan.nonce).as_bytes(), |said| {
            message::seen(std::str::from_utf8(said).ok()?, &plan.nonce)
        }),
        Way::DnsTcp => query_by_stream(*to, &plan.nonce),
        Way::DnsUdp | Way::DnsUdpUnconnected => {
            let is_ours = |said: &[u8]| message::seen_in_answer(said, &plan.nonce);
            by_datagram(*to, *way == Way::DnsUdp, &message::query(&plan.nonce), is_ours)
        }
        Way::Name => Ok(led(&plan.hosts, name.as_deref().unwrap_or_default(), *to)),
    };
    seen.unwrap_or_else(|failed| failed)
}

fn by_stream(way: Way, to: SocketAddr, nonce: &str) -> Result<Seen, Seen> {
    let hello = message::hello(nonce);
    let mut socket = connect(way, to, hello.as_bytes())?;
    let mut said = String::new();
    (&mut socket).take(MAX_MESSAGE).read_to_string(&mut said).map_err(|error| ended(&error))?;
    let seen = message::seen(&said, nonce).ok_or_else(|| unexpected(said.is_empty()))?;
    answered(&socket, seen)
}

/// A socket that is connected, and has sent something.
fn connect(way: Way, to: SocketAddr, hello: &[u8]) -> Result<Socket, Seen> {
    let protocol = if way == Way::Mptcp { Protocol::MPTCP } else { Protocol::TCP };
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(protocol));
    let mut socket = socket.map_err(|error| no_such_path(way, &error))?;
    // A connect is as patient as a write (socket(7)).
    let patient =
        socket.set_write_timeout(Some(PATIENCE)).and_then(|()| socket.set_read_timeout(Some(PATIENCE)));
    patient.map_err(|error| Seen::Failed(error.to_string()))?;
    let address = SockAddr::from(to);
    match way {
        Way::FastOpen => {
            let sent = socket.send_to_with_flags(hello, &address, libc::MSG_FASTOPEN);
            return match sent {
                Ok(_) => Ok(socket),
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    Err(no_such_path(way, &error))
                }
                Err(error) => Err(refused(&error)),
            };
        }
        Way::IoUring => {
            let ring = Ring::new().map_err(|error| no_such_path(way, &error))?;
            ring.connect(&socket, &address, PATIENCE)
        }
        _ => socket.connect(&address),
    }
    .map_err(|error| refused(&error))?;
    socket.write_all(hello).map_err(|error| ended(&error))?;
    Ok(socket)
}

fn query_by_stream(to: SocketAddr, nonce: &str) -> Result<Seen, Seen> {
    let query = message::query(nonce);
    let framed = [&(query.len() as u16).to_be_bytes()[..], &query].concat();
    let mut socket = connect(Way::DnsTcp, to, &framed)?;
    let mut length = [0; 2];
    socket.read_exact(&mut length).map_err(|error| ended(&error))?;
    let mut said = vec![0; usize::from(u16::from_be_bytes(length))];
    socket.read_exact(&mut said).map_err(|error| ended(&error))?;
    let seen = message::seen_in_answer(&said, nonce).ok_or_else(|| unexpected(false))?;
    answered(&socket, seen)
}

fn by_datagram(
    to: SocketAddr,
    connected: bool,
    hello: &[u8],
    read: impl Fn(&[u8]) -> Option<SocketAddr>,
) -> Result<Seen, Seen> {
    let failed = |error: io::Error| Seen::Failed(error.to_string());
    let socket = Socket::new(Domain::for_address(to), Type::DGRAM, None).map_err(failed)?;
    socket.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
    let address = SockAddr::from(to);
    if connected {
        socket.connect(&address).and_then(|()| socket.send(hello)).map_err(|error| refused(&error))?;
    } else {
        socket.send_to(hello, &address).map_err(|error| refused(&error))?;
    }
    let mut said = [0; MAX_MESSAGE as usize];
    let length = (&socket).read(&mut said).map_err(|error| refused(&error))?;
    let seen = read(&said[..length]).ok_or_else(|| unexpected(false))?;
    answered(&socket, seen)
}

fn answered(socket: &Socket, seen: SocketAddr) -> Result<Seen, Seen> {
    let own = socket.local_addr().map_err(|error| Seen::Failed(error.to_string()))?;
    let own = own.as_socket().unwrap_or((Ipv4Addr::UNSPECIFIED, 0).into());
    Ok(Seen::Answered { own, seen })
}

/// Whether the hosts file leads a name to where the proxy listens for it. Nothing is sent there: the proxy would go on to
/// an endpoint of the name.
fn led(hosts: &Path, name: &str, to: SocketAddr) -> Seen {
    let answers = crate::explain::in_hosts_file(hosts, name);
    if !answers.iter().any(|(_, address)| *address == to.ip()) {
        return Seen::NotLed(format!("{} does not lead {name} to the proxy", hosts.display()));
    }
    match sockets::listeners(to.port()) {
        Ok(listeners) if listeners.iter().any(|listener| takes(listener.address, to.ip())) => Seen::Led,
        Ok(_) => Seen::Refused(format!("nobody listens at {to}, where the hosts file leads {name}")),
        Err(error) => Seen::Failed(format!("ask who listens at {to}: {error}")),
    }
}

fn takes(listener: IpAddr, address: IpAddr) -> bool {
    [address, Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()].contains(&listener)
}

/// What the kernel has not, or is told not to do.
fn no_such_path(way: Way, error: &io::Error) -> Seen {
    let switch = match way {
        Way::FastOpen => "; net.ipv4.tcp_fastopen says whether it is on",
        Way::IoUring => "; kernel.io_uring_disabled, or a seccomp filter, says whether it is on",
        Way::Mptcp => "; net.mptcp.enabled says whether it is on",
        _ => "",
    };
    Seen::Unavailable(format!("{error}{switch}"))
}

fn refused(error: &io::Error) -> Seen {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => Seen::Refused(error.to_string()),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Seen::TimedOut,
        // A connect that has a limit ends so.
        _ if error.raw_os_error() == Some(libc::EINPROGRESS) => Seen::TimedOut,
        _ => Seen::Failed(error.to_string()),
    }
}

/// Of a connection that was made.
fn ended(error: &io::Error) -> Seen {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Seen::TimedOut,
        io::ErrorKind::UnexpectedEof => unexpected(true),
        _ => Seen::Failed(format!("connected, and then: {error}")),
    }
}

fn unexpected(is_silent: bool) -> Seen {
    Seen::Failed(if is_silent {
        "connected, and the connection ended without an answer".to_owned()
    } else {
        "somebody else answered".to_owned()
    })
}
