//! What a name resolves to, as an application of a service would see it.

use super::{Now, Situation};
use crate::{mode::Mode, probe};
use serde::{Serialize, Serializer};
use std::{
    fmt, fs, io,
    net::{IpAddr, ToSocketAddrs as _},
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::Duration,
};

/// How long the system's resolver may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Who said it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// A line of a hosts file.
    Hosts(PathBuf, usize),
    /// The proxy, to which queries of the service go.
    Proxy,
    /// Whoever the system asks.
    Resolver,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hosts(file, line) => write!(f, "{}:{line}", file.display()),
            Self::Proxy => f.write_str("the proxy's DNS"),
            Self::Resolver => f.write_str("the resolver"),
        }
    }
}

impl Serialize for Source {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// An address of a name, or why there is none.
pub(super) type Answer = (Source, Result<IpAddr, String>);

/// Looks a name up. A hosts file that gives it an address has the last word (nsswitch.conf(5), as it is everywhere); else
/// it is asked for: of the proxy where queries of the service go there, and of the resolver, which all others ask.
pub(super) fn look_up(situation: &Situation<'_>, name: &str) -> Vec<Answer> {
    let file = &situation.config.paths.hosts;
    let hosts = in_hosts_file(file, name);
    if !hosts.is_empty() {
        return hosts
            .into_iter()
            .map(|(line, address)| (Source::Hosts(file.clone(), line), Ok(address)))
            .collect();
    }
    let of_proxy = if asks_proxy(&situation.now, situation.policy().dns.value) {
        situation.routable.addresses_of(name)
    } else {
        Vec::new()
    };
    let of_proxy = of_proxy.into_iter().map(|address| (Source::Proxy, Ok(address)));
    let of_resolver = match resolve(name) {
        Ok(addresses) => addresses.into_iter().map(|address| (Source::Resolver, Ok(address))).collect(),
        Err(error) => vec![(Source::Resolver, Err(format!("look up {name}: {error}")))],
    };
    of_proxy.chain(of_resolver).collect()
}

/// Whether the service's queries go to the proxy: those to a resolver on localhost do not.
fn asks_proxy(now: &Now, captures_dns: bool) -> bool {
    captures_dns
        && now.mode != Some(Mode::Hosts)
        && now.dns.any()
        && !now.observed
        && probe::resolver_on_localhost().is_none()
}

/// The addresses of a name, and at which lines of a hosts file they are.
pub(crate) fn in_hosts_file(path: &Path, name: &str) -> Vec<(usize, IpAddr)> {
    addresses(&String::from_utf8_lossy(&fs::read(path).unwrap_or_default()), name)
}

/// The lines are counted from 1 (hosts(5)).
fn addresses(text: &str, name: &str) -> Vec<(usize, IpAddr)> {
    let address = |(number, line): (usize, &str)| {
        let mut words = line.split('#').next()?.split_whitespace();
        let address = words.next()?.parse().ok()?;
        words.any(|word| word.eq_ignore_ascii_case(name)).then_some((number + 1, address))
    };
    text.lines().enumerate().filter_map(address).collect()
}

/// As the C library says; one that takes too long is left behind, and ends with this process.
fn resolve(name: &str) -> io::Result<Vec<IpAddr>> {
    let (sender, receiver) = mpsc::channel();
    let host = name.to_owned();
    thread::spawn(move || {
        let found = (host.as_str(), 0).to_socket_addrs();
        sender.send(found.map(|found| found.map(|address| address.ip()).collect::<Vec<_>>()))
    });
    let found = receiver.recv_timeout(PATIENCE);
    let mut found = found.unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut)))?;
    found.dedup();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hosts_file_gives_every_address_of_a_name_with_its_line() {
        let text = "# comment\n127.0.0.1 localhost\n10.0.0.1\ta Catalog # mail\n\nnonsense catalog\nfd00::1 catalog\n";
        let expected =
            [(3, "10.0.0.1"), (6, "fd00::1")].map(|(line, ip)| (line, ip.parse::<IpAddr>().unwrap()));
        assert_eq!(addresses(text, "catalog"), expected);
        assert!(addresses(text, "mail").is_empty());
    }
}
