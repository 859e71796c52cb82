//! The configuration file, strictly checked: what is wrong is named with its place and what was expected.

use crate::{
    dns,
    model::{Cluster, Config, Listen, VirtualHost},
    names::is_virtual,
};
use serde::{Deserialize, Deserializer, de};
use serde_saphyr::{Location, Spanned};
use std::{
    collections::BTreeSet,
    fs, io,
    io::Read as _,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

/// Longest file that is read.
const MAX_BYTES: u64 = 64 << 20;
/// Ports of all names that are listened on by themselves.
const MAX_NAMED_LISTENERS: usize = 4096;
/// First port of DNS, so that the last one is a port too.
const LAST_DNS_PORT: u16 = u16::MAX - (dns::PORTS - 1);
/// Threads unless the file says otherwise: as many as there are processors, and no more than this.
const MAX_DEFAULT_WORKERS: usize = 4;

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    /// The file cannot be read.
    #[error("{file}: {error}", file = .file.display())]
    Read {
        /// Which.
        file: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Its content is not what it has to be.
    #[error("{file}:{line}:{column}: {message}", file = .file.display())]
    Invalid {
        /// Which.
        file: PathBuf,
        /// From 1.
        line: u64,
        /// From 1.
        column: u64,
        /// What is wrong, and what was expected.
        message: String,
    },
}

/// Reads and validates a file.
pub(crate) fn load(file: &Path) -> Result<Config, ConfigError> {
    let text = read(file).map_err(|error| ConfigError::Read { file: file.to_owned(), error })?;
    parse(file, &text)
}

/// Validates; `file` is for messages only.
fn parse(file: &Path, text: &str) -> Result<Config, ConfigError> {
    let at = |location: Location, message: String| ConfigError::Invalid {
        file: file.to_owned(),
        line: location.line(),
        column: location.column(),
        message: printable(&message),
    };
    let options = serde_saphyr::options! { with_snippet: false, strict_booleans: true };
    let raw: RawConfig = serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        // The parser says where once more at the end of its message.
        let message = error.to_string();
        let message = message.split(" at line ").next().unwrap_or(&message).to_owned();
        at(error.location().unwrap_or(Location::UNKNOWN), message)
    })?;
    raw.validate().map_err(|Fault { location, message }| at(location, message))
}

/// What is quoted in a message may be anything, also what a terminal takes for a command.
fn printable(message: &str) -> String {
    let mut text = String::new();
    for c in message.chars() {
        if c.is_control() { text.extend(c.escape_debug()) } else { text.push(c) }
    }
    text
}

fn read(file: &Path) -> io::Result<String> {
    let mut text = String::new();
    let read = fs::File::open(file)?.take(MAX_BYTES + 1).read_to_string(&mut text)?;
    if read as u64 > MAX_BYTES {
        return Err(io::Error::other(format!("the file is larger than {MAX_BYTES} bytes")));
    }
    Ok(text)
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawConfig {
    listen: RawListen,
    admin: Option<Spanned<SocketAddr>>,
    origins: Option<Spanned<PathBuf>>,
    dns: RawDns,
    resolve_domains: bool,
    drain_timeout: Option<Span>,
    virtual_hosts: Vec<RawVirtualHost>,
    clusters: Vec<RawCluster>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawListen {
    port: Option<Spanned<u16>>,
    workers: Option<Spanned<usize>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawDns {
    port: Option<Spanned<u16>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawVirtualHost {
    name: Spanned<String>,
    domains: Spanned<Vec<Spanned<String>>>,
    cluster: Spanned<String>,
    #[serde(default)]
    ports: Vec<Spanned<u16>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCluster {
    name: Spanned<String>,
    connect_timeout: Option<Span>,
    endpoints: Spanned<Vec<Spanned<SocketAddr>>>,
}

/// A length of time as people write it: `500ms`, `10s`, `2m`.
#[derive(Clone, Copy, Debug)]
struct Span(Duration);

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        match humantime::parse_duration(&text) {
            Ok(duration) if !duration.is_zero() => Ok(Self(duration)),
            _ => Err(de::Error::custom(format!(
                "`{}` is not a length of time; expected one as 500ms, 10s or 2m",
                text.escape_debug()
            ))),
        }
    }
}

/// A fault that the types could not express.
struct Fault {
    location: Location,
    message: String,
}

fn fault<T, R>(at: &Spanned<T>, message: impl Into<String>) -> Result<R, Fault> {
    Err(Fault { location: at.referenced, message: message.into() })
}

impl RawConfig {
    fn validate(self) -> Result<Config, Fault> {
        let listen = self.listen.validate()?;
        let admin =
            self.admin.as_ref().map_or(SocketAddr::from((Ipv4Addr::LOCALHOST, 15000)), |admin| admin.value);
        if let Some(written) = self.admin.as_ref().filter(|written| written.value.port() == listen.port) {
            return fault(written, format!("port {} is the listener's; expected another one", listen.port));
        }
        let dns = self.dns.validate([listen.port, admin.port()])?;
        let own: Vec<u16> = [listen.port, admin.port()].into_iter().chain(dns).collect();
        let mut names = BTreeSet::new();
        let mut clusters = Vec::new();
        for raw in self.clusters {
            distinct("cluster", &raw.name, &mut names)?;
            clusters.push(raw.validate(&own)?);
        }
        let (mut hosts, mut domains, mut virtual_hosts) = (BTreeSet::new(), BTreeSet::new(), Vec::new());
        for raw in self.virtual_hosts {
            distinct("virtual host", &raw.name, &mut hosts)?;
            let name = raw.name.clone();
            virtual_hosts.push(raw.validate(&names, &mut domains)?);
            let listeners: usize =
                virtual_hosts.iter().map(|host| host.ports.len() * host.domains.len()).sum();
            if listeners > MAX_NAMED_LISTENERS {
                let message = format!(
                    "with `ports` of this virtual host there are {listeners} addresses to listen on; the limit is {MAX_NAMED_LISTENERS}"
                );
                return fault(&name, message);
            }
        }
        let origins = match self.origins {
            Some(path) if !path.value.is_absolute() => {
                let message = format!(
                    "`{}` is a relative path; expected one that begins with `/`",
                    path.value.to_string_lossy().escape_debug()
                );
                return fault(&path, message);
            }
            Some(path) => path.value,
            None => PathBuf::from("/run/mesh-redirect/origins.sock"),
        };
        let drain_timeout = self.drain_timeout.map_or(Duration::from_secs(10), |span| span.0);
        let resolve_domains = self.resolve_domains;
        Ok(Config { listen, admin, origins, dns, resolve_domains, drain_timeout, virtual_hosts, clusters })
    }
}

impl RawListen {
    fn validate(self) -> Result<Listen, Fault> {
        let port = match self.port {
            Some(port) if port.value == 0 => return fault(&port, "0 is not a port; expected 1 to 65535"),
            Some(port) => port.value,
            None => 15001,
        };
        let workers = match self.workers {
            Some(workers) if !(1..=1024).contains(&workers.value) => {
                return fault(&workers, format!("{} workers; expected 1 to 1024", workers.value));
            }
            Some(workers) => workers.value,
            None => thread::available_parallelism().map_or(1, |cpus| cpus.get().min(MAX_DEFAULT_WORKERS)),
        };
        Ok(Listen { port, workers })
    }
}

impl RawDns {
    fn validate(self, taken: [u16; 2]) -> Result<Option<u16>, Fault> {
        match self.port {
            Some(port) if !(1..=LAST_DNS_PORT).contains(&port.value) => fault(
                &port,
                format!("{} is not the first of sixteen ports; expected 1 to {LAST_DNS_PORT}", port.value),
            ),
            Some(port) if taken.contains(&port.value) => fault(
                &port,
                format!("port {} is the listener's or the admin address's; expected another one", port.value),
            ),
            port => Ok(port.map(|port| port.value)),
        }
    }
}

impl RawCluster {
    fn validate(self, own_ports: &[u16]) -> Result<Cluster, Fault> {
        if self.endpoints.value.is_empty() {
            return fault(
                &self.endpoints,
                format!("cluster `{}` has no endpoint; expected at least one", self.name.value),
            );
        }
        let mut endpoints = Vec::new();
        for endpoint in self.endpoints.value {
            let address = endpoint.value;
            if address.port() == 0 || address.ip().is_unspecified() {
                return fault(
                    &endpoint,
                    format!("`{address}` is not an address to connect to; expected IP:PORT"),
                );
            }
            if is_own(address, own_ports) {
                return fault(
                    &endpoint,
                    format!("`{address}` is this proxy itself; expected another server"),
                );
            }
            if is_virtual(address.ip()) {
                return fault(
                    &endpoint,
                    format!("`{address}` is in a block of virtual addresses; expected a server's address"),
                );
            }
            if endpoints.contains(&address) {
                return fault(&endpoint, format!("`{address}` is there twice"));
            }
            endpoints.push(address);
        }
        let connect_timeout = self.connect_timeout.map_or(Duration::from_secs(1), |span| span.0);
        Ok(Cluster { name: self.name.value, connect_timeout, endpoints })
    }
}

impl RawVirtualHost {
    fn validate(
        self,
        clusters: &BTreeSet<String>,
        taken: &mut BTreeSet<String>,
    ) -> Result<VirtualHost, Fault> {
        if !clusters.contains(&self.cluster.value) {
            let known: Vec<&str> = clusters.iter().map(String::as_str).collect();
            let expected = if known.is_empty() {
                "none is defined".to_owned()
            } else {
                format!("expected one of: {}", known.join(", "))
            };
            return fault(&self.cluster, format!("there is no cluster `{}`; {expected}", self.cluster.value));
        }
        if self.domains.value.is_empty() {
            return fault(
                &self.domains,
                format!("virtual host `{}` has no domain; expected at least one", self.name.value),
            );
        }
        let mut domains = Vec::new();
        for domain in self.domains.value {
            let name = domain.value.strip_suffix('.').unwrap_or(&domain.value).to_ascii_lowercase();
            let allowed = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
            if name.is_empty() || name.len() > 253 || !name.chars().all(allowed) {
                return fault(
                    &domain,
                    format!(
                        "`{}` is not a host name; expected one as catalog.internal, without a port",
                        name.escape_debug()
                    ),
                );
            }
            if !taken.insert(name.clone()) {
                return fault(
                    &domain,
                    format!("domain `{name}` is there twice; expected each in one virtual host"),
                );
            }
            domains.push(name);
        }
        if let Some(zero) = self.ports.iter().find(|port| port.value == 0) {
            return fault(zero, "0 is not a port; expected 1 to 65535");
        }
        let ports = self.ports.into_iter().map(|port| port.value).collect::<BTreeSet<u16>>();
        Ok(VirtualHost {
            name: self.name.value,
            domains,
            cluster: self.cluster.value,
            ports: ports.into_iter().collect(),
        })
    }
}

fn distinct(kind: &str, name: &Spanned<String>, taken: &mut BTreeSet<String>) -> Result<(), Fault> {
    if name.value.is_empty() {
        return fault(name, format!("a {kind} without a name"));
    }
    if taken.insert(name.value.clone()) {
        return Ok(());
    }
    fault(name, format!("{kind} `{}` is there twice; expected distinct names", name.value))
}

/// Whether an address is one of this proxy's own.
fn is_own(address: SocketAddr, own_ports: &[u16]) -> bool {
    let loopback = match address.ip() {
        IpAddr::V4(ip) => ip.is_loopback(),
        IpAddr::V6(ip) => ip.is_loopback(),
    };
    loopback && own_ports.contains(&address.port())
}

#[cfg(test)]
mod tests;
