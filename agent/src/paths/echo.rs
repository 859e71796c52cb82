//! Whom the prober asks: it answers what bears its number with whom it sees. It only answers, so that it does not matter
//! whether it is steered itself.

use super::{PATIENCE, Way, message};
use crate::rules;
use nix::{ifaddrs::getifaddrs, net::if_::InterfaceFlags, sys::socket::SockaddrStorage};
use std::{
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::Arc,
    thread,
};

/// Longest that is read.
const MAX_MESSAGE: usize = 512;

/// Where it listens, on one address, until this process ends.
#[derive(Debug)]
pub(super) struct Echo {
    stream: SocketAddr,
    datagram: SocketAddr,
    /// For DNS queries by TCP and by datagram, or why not.
    dns: Result<SocketAddr, String>,
}

impl Echo {
    /// Answers at the first address of a family that is this host's and nobody else's, or says why there is none.
    pub(super) fn start(is_v4: bool, nonce: &Arc<str>) -> Result<Self, String> {
        let family = if is_v4 { "IPv4" } else { "IPv6" };
        let addresses = own_addresses().map_err(|error| format!("list this host's addresses: {error}"))?;
        let mut why = format!("this host has no {family} address but on loopback and its links");
        for address in addresses.into_iter().filter(|address| address.is_ipv4() == is_v4) {
            match Self::start_at(address, nonce) {
                Ok(echo) => return Ok(echo),
                Err(error) => why = format!("listen at {address}: {error}"),
            }
        }
        Err(why)
    }

    fn start_at(address: IpAddr, nonce: &Arc<str>) -> io::Result<Self> {
        let stream = TcpListener::bind((address, 0))?;
        let datagram = UdpSocket::bind((address, 0))?;
        let places = (stream.local_addr()?, datagram.local_addr()?);
        serve_streams(stream, nonce, line);
        serve_datagrams(datagram, nonce, |said, nonce, peer| {
            (said == message::hello(nonce).as_bytes()).then(|| message::reply(nonce, peer).into_bytes())
        });
        let dns = Self::start_dns((address, agent_ebpf::DNS_PORT).into(), nonce);
        let dns = dns.map_err(|error| format!("listen at port {}: {error}", agent_ebpf::DNS_PORT));
        Ok(Self { stream: places.0, datagram: places.1, dns })
    }

    /// Where it answers what is sent in a way, or why it does not.
    pub(super) fn of(&self, way: Way) -> Result<SocketAddr, String> {
        match way {
            Way::Udp => Ok(self.datagram),
            Way::DnsTcp | Way::DnsUdp | Way::DnsUdpUnconnected => self.dns.clone(),
            Way::Tcp | Way::FastOpen | Way::IoUring | Way::Mptcp | Way::Name => Ok(self.stream),
        }
    }

    fn start_dns(at: SocketAddr, nonce: &Arc<str>) -> io::Result<SocketAddr> {
        let (stream, datagram) = (TcpListener::bind(at)?, UdpSocket::bind(at)?);
        serve_streams(stream, nonce, query);
        serve_datagrams(datagram, nonce, message::answer);
        Ok(at)
    }
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

fn serve_streams(
    listener: TcpListener,
    nonce: &Arc<str>,
    answer: fn(TcpStream, &str, SocketAddr) -> io::Result<()>,
) {
    let nonce = Arc::clone(nonce);
    thread::spawn(move || {
        for (stream, peer) in std::iter::from_fn(|| listener.accept().ok()) {
            let nonce = Arc::clone(&nonce);
            thread::spawn(move || answer(stream, &nonce, peer));
        }
    });
}

fn serve_datagrams(
    socket: UdpSocket,
    nonce: &Arc<str>,
    answer: fn(&[u8], &str, SocketAddr) -> Option<Vec<u8>>,
) {
    let nonce = Arc::clone(nonce);
    thread::spawn(move || {
        let mut said = [0; MAX_MESSAGE];
        while let Ok((length, peer)) = socket.recv_from(&mut said) {
            if let Some(answer) = answer(&said[..length], &nonce, peer) {
                let _whoever_is_gone = socket.send_to(&answer, peer);
            }
        }
    });
}

/// One line.
fn line(mut stream: TcpStream, nonce: &str, peer: SocketAddr) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut said = String::new();
    BufReader::new((&stream).take(MAX_MESSAGE as u64)).read_line(&mut said)?;
    if said == message::hello(nonce) {
        stream.write_all(message::reply(nonce, peer).as_bytes())?;
    }
    Ok(())
}

/// One query after its length (RFC 1035 §4.2.2).
fn query(mut stream: TcpStream, nonce: &str, peer: SocketAddr) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut said = vec![0; usize::from(u16::from_be_bytes(length)).min(MAX_MESSAGE)];
    stream.read_exact(&mut said)?;
    if let Some(answer) = message::answer(&said, nonce, peer) {
        stream.write_all(&[&(answer.len() as u16).to_be_bytes()[..], &answer].concat())?;
    }
    Ok(())
}
