//! Clients, which say what they saw.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::time::{ClockId, clock_gettime};
use socket2::{Domain, Socket, Type};
use tests::{Answers, http};

/// A pause between two requests of one client: load that shows gaps, not load that hurts.
pub(crate) const PACE: Duration = Duration::from_millis(2);

/// Connects as it is told, and says whom the kernel says it is connected to, and who answers.
pub(crate) fn connect(address: SocketAddr, options: &[&str]) -> anyhow::Result<()> {
    let address = if options.contains(&"--mapped") { mapped(address) } else { address };
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    if options.contains(&"--non-blocking") {
        connect_without_blocking(&socket, address)?;
    } else {
        socket.connect(&address.into())?;
    }
    let peer = socket.peer_addr()?.as_socket().context("a peer that is no IP address")?;
    println!("{peer} {}", http::ask(socket.into(), "catalog", "/")?.body);
    Ok(())
}

/// The same address for an IPv6 socket.
fn mapped(address: SocketAddr) -> SocketAddr {
    let ip = match address {
        SocketAddr::V4(v4) => v4.ip().to_ipv6_mapped(),
        SocketAddr::V6(v6) => *v6.ip(),
    };
    (ip, address.port()).into()
}

/// What event loops do: connect, wait until the socket is writable, ask `SO_ERROR`.
fn connect_without_blocking(socket: &Socket, address: SocketAddr) -> anyhow::Result<()> {
    socket.set_nonblocking(true)?;
    let begun = socket.connect(&address.into()).err().and_then(|error| error.raw_os_error());
    ensure!(begun == Some(Errno::EINPROGRESS as i32), "connect does not say EINPROGRESS but {begun:?}");
    poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)], PollTimeout::from(5000_u16))?;
    if let Some(error) = socket.take_error()? {
        return Err(error.into());
    }
    Ok(socket.set_nonblocking(false)?)
}

/// Connects where nobody listens but the proxy. A connection ends with a reset, so that no port stays in use.
pub(crate) fn decide(addresses: &[&str]) -> anyhow::Result<()> {
    for address in addresses {
        let address: SocketAddr = address.parse()?;
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        socket.set_linger(Some(Duration::ZERO))?;
        match socket.connect(&address.into()) {
            Ok(()) => println!("steered"),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => println!("passed"),
            Err(error) => println!("{error}"),
        }
    }
    Ok(())
}

/// Asks for a name where nobody answers but the proxy, each time from another port: what was decided of one is remembered
/// for a while where addresses are translated.
pub(crate) fn decide_queries(name: &str, first: u16, addresses: &[&str]) -> anyhow::Result<()> {
    for (address, port) in addresses.iter().zip(first..) {
        let address: SocketAddr = address.parse()?;
        let any = if address.is_ipv4() { "0.0.0.0" } else { "::" };
        let socket = UdpSocket::bind((any, port))?;
        socket.set_read_timeout(Some(Duration::from_secs(5)))?;
        socket.connect(address)?;
        socket.send(&query(name))?;
        match socket.recv(&mut [0; 512]) {
            Ok(_) => println!("steered"),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => println!("passed"),
            Err(error) => println!("{error}"),
        }
    }
    Ok(())
}

/// For an IPv4 address (RFC 1035 §4.1).
fn query(name: &str) -> Vec<u8> {
    let labels = name.split('.').flat_map(|label| [&[label.len() as u8], label.as_bytes()].concat());
    let head = [0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    head.into_iter().chain(labels).chain([0, 0, 1, 0, 1]).collect()
}

/// Sends a request a byte at a time, as a network with the smallest packets would.
pub(crate) fn dribble(address: SocketAddr) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    for byte in http::request("catalog", "/").bytes() {
        stream.write_all(&[byte])?;
        thread::sleep(PACE);
    }
    println!("{}", http::answer(stream)?.body);
    Ok(())
}

/// Does not wait for anybody; asks for a host that no proxy knows.
pub(crate) fn throw(address: SocketAddr) -> anyhow::Result<()> {
    Ok(TcpStream::connect(address)?.write_all(http::request("nobody", "/thrown").as_bytes())?)
}

/// Sends, closes its half, and reads on until the echo has closed the other.
pub(crate) fn half_close(address: SocketAddr, bytes: usize) -> anyhow::Result<()> {
    let sent: Vec<u8> = (0..bytes).map(pattern).collect();
    let mut stream = TcpStream::connect(address)?;
    let received = thread::scope(|scope| -> anyhow::Result<Vec<u8>> {
        let writer = scope.spawn(|| -> io::Result<()> {
            (&stream).write_all(&sent)?;
            stream.shutdown(Shutdown::Write)
        });
        let mut received = Vec::new();
        let read = (&stream).read_to_end(&mut received);
        writer.join().map_err(|_| anyhow::anyhow!("the writer has panicked"))??;
        read?;
        Ok(received)
    })?;
    let rest = received.strip_prefix(sent.as_slice()).context("the echo differs from what was sent")?;
    println!("{}", String::from_utf8_lossy(rest));
    Ok(stream.flush()?)
}

/// Bytes in which a lost, doubled or swapped block shows.
fn pattern(position: usize) -> u8 {
    (position.wrapping_mul(2_654_435_761) >> 13) as u8
}

/// Listens first.
pub(crate) fn hello(address: SocketAddr) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect(address)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut heard = String::new();
    reader.read_line(&mut heard)?;
    stream.write_all(b"hello\n")?;
    reader.read_to_string(&mut heard)?;
    print!("{heard}");
    Ok(())
}

/// What resolvers do: a connected socket, and an answer from whom was asked.
pub(crate) fn datagram(address: SocketAddr) -> anyhow::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    socket.connect(address)?;
    socket.send(b"echo")?;
    let mut buffer = [0; 1500];
    let length = socket.recv(&mut buffer)?;
    println!("{} {}", socket.peer_addr()?, String::from_utf8_lossy(&buffer[..length]));
    Ok(())
}

/// Stays connected.
pub(crate) fn hold_connection(address: SocketAddr) -> anyhow::Result<()> {
    let stream = TcpStream::connect(address)?;
    for _ in io::stdin().lines() {
        println!("{}", stream.local_addr()?.port());
    }
    Ok(())
}

/// Stays connected to an echo for as long as it is let.
pub(crate) fn linger(address: SocketAddr, options: &[&str]) -> anyhow::Result<()> {
    let address = if options.contains(&"--mapped") { mapped(address) } else { address };
    let stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    for line in io::stdin().lines() {
        match returns(&stream, &line?) {
            Ok(()) => println!("open"),
            Err(error) => println!("{error}"),
        }
    }
    Ok(())
}

fn returns(mut stream: &TcpStream, line: &str) -> io::Result<()> {
    writeln!(stream, "{line}")?;
    let mut returned = String::new();
    match BufReader::new(stream).read_line(&mut returned)? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}

/// What resolvers do too: a datagram to whom it may concern, over a socket that is not connected.
pub(crate) fn hold_datagrams(address: SocketAddr) -> anyhow::Result<()> {
    let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any)?;
    for _ in io::stdin().lines() {
        socket.send_to(b"echo", address)?;
        println!("{}", socket.local_addr()?.port());
    }
    Ok(())
}

/// Connects twice from one port, which only the destinations tell apart.
pub(crate) fn twins(addresses: [SocketAddr; 2]) -> anyhow::Result<()> {
    let mut local = SocketAddr::from(([0, 0, 0, 0], 0));
    let mut streams: Vec<TcpStream> = Vec::new();
    for address in addresses {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&local.into())?;
        socket.connect(&address.into())?;
        let stream = TcpStream::from(socket);
        local.set_port(stream.local_addr()?.port());
        streams.push(stream);
    }
    for stream in streams {
        println!("{}", http::ask(stream, "catalog", "/")?.body);
    }
    Ok(())
}

/// Measures `connect()` alone. A connection ends with a reset, so that no port stays in use.
pub(crate) fn time_connects(address: SocketAddr) -> anyhow::Result<()> {
    for line in io::stdin().lines() {
        let times: Vec<String> = (0..line?.trim().parse()?)
            .map(|_| Ok(time_connect(address)?.to_string()))
            .collect::<io::Result<_>>()?;
        println!("{}", times.join(" "));
    }
    Ok(())
}

fn time_connect(address: SocketAddr) -> io::Result<u128> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_linger(Some(Duration::ZERO))?;
    let target = address.into();
    let begun = Instant::now();
    socket.connect(&target)?;
    Ok(begun.elapsed().as_nanos())
}

/// For each number that it reads, says what as many connects took: altogether, of the processor's time, and each one.
pub(crate) fn rush(address: SocketAddr) -> anyhow::Result<()> {
    let processor = || clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map(Duration::from);
    for line in io::stdin().lines() {
        let mut times = vec![0; line?.trim().parse()?];
        let (begun, before) = (Instant::now(), processor()?);
        for time in &mut times {
            *time = time_connect(address)?;
        }
        let (wall, processor) = (begun.elapsed(), processor()? - before);
        let totals = [wall, processor].map(|total| total.as_nanos());
        let all: Vec<String> = totals.into_iter().chain(times).map(|time| time.to_string()).collect();
        println!("{}", all.join(" "));
    }
    Ok(())
}

/// A few clients, each of which connects anew for every request. With a rate they keep to it together, in requests a
/// second: one that was held up catches up.
pub(crate) fn load(
    address: SocketAddr,
    clients: u32,
    milliseconds: u64,
    rate: Option<u32>,
) -> anyhow::Result<()> {
    let begun = Instant::now();
    let end = begun + Duration::from_millis(milliseconds);
    let pause = rate.map(|rate| Duration::from_secs(1) * clients / rate);
    let client = move |number: u32| {
        let begun = begun + pause.unwrap_or_default() * number / clients;
        let mut sent = 0;
        ask_until(end, address, || match pause {
            Some(pause) => {
                sent += 1;
                thread::sleep((begun + pause * sent).saturating_duration_since(Instant::now()));
            }
            None => thread::sleep(PACE),
        })
    };
    let threads: Vec<_> = (0..clients).map(|number| thread::spawn(move || client(number))).collect();
    let mut answers = Vec::new();
    for thread in threads {
        answers.extend(thread.join().map_err(|_| anyhow::anyhow!("a client has panicked"))?);
    }
    println!("{}", serde_json::to_string(&answers.into_iter().collect::<Answers>())?);
    Ok(())
}

fn ask_until(end: Instant, address: SocketAddr, mut pause: impl FnMut()) -> Vec<String> {
    let mut answers = Vec::new();
    while Instant::now() < end {
        answers.push(match http::get(address, "catalog", "/") {
            Ok(answer) if answer.status == 200 => answer.body,
            other => {
                eprintln!("{other:?}");
                "failed".to_owned()
            }
        });
        pause();
    }
    answers
}
