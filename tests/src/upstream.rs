//! Servers on the other end of the wire.

use std::fs;

use crate::process::Process;
use crate::sandbox::{Place, Sandbox};

/// A running server of the tests' own.
#[derive(Debug)]
pub struct Upstream {
    process: Process,
}

impl Upstream {
    /// An HTTP server that answers every request with its name.
    #[track_caller]
    pub fn http(sandbox: &Sandbox, name: &str, addresses: &[&str]) -> Self {
        Self::http_at(sandbox, Place::Peer, name, addresses)
    }

    /// The same, elsewhere than in the peer's namespace.
    #[track_caller]
    pub fn http_at(sandbox: &Sandbox, place: Place, name: &str, addresses: &[&str]) -> Self {
        Self::start(sandbox, place, name, &[&["http", name], addresses].concat())
    }

    /// A TCP server that returns every byte, and after the last one says how many there were.
    #[track_caller]
    pub fn echo(sandbox: &Sandbox, address: &str) -> Self {
        Self::start(sandbox, Place::Peer, "echo", &["echo", address])
    }

    /// A TCP server that speaks first, as mail and database servers do.
    #[track_caller]
    pub fn greeter(sandbox: &Sandbox, address: &str) -> Self {
        Self::start(sandbox, Place::Peer, "greeter", &["greet", address])
    }

    /// A UDP server that returns every datagram.
    #[track_caller]
    pub fn datagrams(sandbox: &Sandbox, address: &str) -> Self {
        Self::start(sandbox, Place::Peer, "datagrams", &["datagrams", address])
    }

    /// A resolver of other names than the proxy's, and of the proxy's as others know them; each says who it is as `who.test`.
    #[track_caller]
    pub fn resolver(sandbox: &Sandbox, place: Place, name: &str, addresses: &[&str]) -> Self {
        let long: Vec<String> = (0..12).map(|part| format!("{part:0>200}")).collect();
        let records = [
            "--host-record=catalog,10.77.0.10,60".to_owned(),
            "--host-record=other.test,10.77.0.10,fd77::10,77".to_owned(),
            format!("--txt-record=who.test,{name}"),
            format!("--txt-record=long.test,{}", long.join(",")),
        ];
        let options = "--keep-in-foreground --conf-file=/dev/null --no-resolv --no-hosts --user=root --pid-file= --log-facility=- --log-queries --bind-interfaces";
        let listen = addresses.iter().map(|address| format!("--listen-address={address}"));
        let dnsmasq = sandbox.program(place, "dnsmasq").args(options.split(' '));
        let log = sandbox.path(&format!("{name}.log"));
        let mut process = dnsmasq.args(records).args(listen.collect::<Vec<_>>()).serve(log);
        process.wait_until(|process| process.log().contains("started"));
        Self { process }
    }

    /// How often a resolver was asked for a name.
    pub fn queries(&self, name: &str) -> usize {
        let asked = |line: &&str| line.contains("query[") && line.contains(&format!(" {name} "));
        self.process.log().lines().filter(asked).count()
    }

    #[track_caller]
    fn start(sandbox: &Sandbox, place: Place, name: &str, args: &[&str]) -> Self {
        let log = sandbox.path(&format!("{name}.log"));
        // One of the same name may have said it before.
        let listening = |log: &str| log.lines().filter(|line| *line == "listening").count();
        let before = listening(&fs::read_to_string(&log).unwrap_or_default());
        let mut process = sandbox.peer(place).args(args).serve(log);
        process.wait_until(|process| listening(&process.log()) > before);
        Self { process }
    }

    /// How many connections it has accepted.
    pub fn connections(&self) -> usize {
        self.count("accepted ")
    }

    /// How many requests it was asked. A proxy may connect to where a request was going, to have it ready, and then route
    /// the request elsewhere; but what was asked here came past the proxy.
    pub fn requests(&self) -> usize {
        self.count("asked ")
    }

    fn count(&self, event: &str) -> usize {
        self.process.log().lines().filter(|line| line.starts_with(event)).count()
    }
}
