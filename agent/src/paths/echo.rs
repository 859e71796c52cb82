//! Whom the prober asks: it answers what bears its number with whom it sees. It only answers, so that it does not matter
//! whether it is steered itself.

use super::{PATIENCE, message};
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
    pub(super) stream: SocketAddr,
    pub(super) datagram: SocketAddr,
    /// For DNS queries by TCP and by datagram, or why not.
    pub(super) dns: Result<SocketAddr, String>,
}

impl Echo {
    /// Answers at an address of this host's.
    pub(super) fn start(address: IpAddr, nonce: &Arc<str>) -> io::Result<Self> {
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

    fn start_dns(at: SocketAddr, nonce: &Arc<str>) -> io::Result<SocketAddr> {
        let (stream, datagram) = (TcpListener::bind(at)?, UdpSocket::bind(at)?);
        serve_streams(stream, nonce, query);
        serve_datagrams(datagram, nonce, message::answer);
        Ok(at)
    }
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
