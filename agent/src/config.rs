//! The configuration file: what is meant ([`Config`]), read strictly from what was written (`raw`).

mod raw;

use crate::mode::{Mode, Wanted};
use raw::{RawCapture, RawConfig, RawMode, RawProxy, RawScope, RawService};
use serde_saphyr::{Location, Spanned};
use std::{
    collections::BTreeMap,
    fmt, fs, io,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
};

pub(crate) use raw::{Base, Failure, Ports};

/// Where the configuration is looked for when no other file is named.
pub(crate) const DEFAULT_FILE: &str = "/etc/mesh-redirect/agent.yaml";

/// Where the enabled set is kept when the configuration says nothing of it, or cannot be read.
pub(crate) const DEFAULT_STATE: &str = "/var/lib/mesh-redirect";

/// Longest file that is read.
const MAX_BYTES: u64 = 4 << 20;

/// A validated configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Config {
    /// The file that it was read from, or would have been.
    pub(crate) file: PathBuf,
    pub(crate) mode: Wanted,
    pub(crate) paths: Paths,
    pub(crate) proxy: Proxy,
    /// Where metrics are served, besides the control socket.
    pub(crate) metrics: Option<SocketAddr>,
    /// What holds for services that say nothing of their own.
    pub(crate) defaults: Policy,
    /// The services that the file names.
    pub(crate) services: BTreeMap<String, Service>,
}

/// Where things are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Paths {
    /// Control socket and locks; empty at boot.
    pub(crate) run: PathBuf,
    /// The enabled set; survives a boot.
    pub(crate) state: PathBuf,
    /// Links, maps and programs; on a BPF file system.
    pub(crate) pins: PathBuf,
    /// The hosts file, for the mode that edits it.
    pub(crate) hosts: PathBuf,
    /// Where podman and CRI-O look for hooks.
    pub(crate) hooks: PathBuf,
}

/// The co-located proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Proxy {
    /// Where it listens on 127.0.0.1 and ::1.
    pub(crate) port: u16,
    /// Where it serves DNS on 127.0.0.1 and ::1: the first of [`agent_ebpf::RESOLVER_PORTS`] ports.
    pub(crate) dns_port: u16,
    /// Where it says whether it is ready: `GET /ready`.
    pub(crate) admin: SocketAddr,
    pub(crate) scope: Scope,
}

/// What a service, or the proxy, is to the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// A path below the cgroup2 mount, beginning with a slash.
    Cgroup(String),
    /// A systemd unit.
    Unit(String),
    /// A unit of a user's own systemd (`systemctl --user`).
    UserUnit { user: u32, unit: String },
    /// All processes of a user's.
    User(u32),
    /// A container, by its id, the beginning of it, or its name.
    Container(String),
}

impl Scope {
    /// The unit, if it is one.
    pub(crate) fn unit(&self) -> Option<&str> {
        match self {
            Self::Unit(unit) => Some(unit),
            _ => None,
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cgroup(path) => write!(f, "cgroup {path}"),
            Self::Unit(unit) => f.write_str(unit),
            Self::UserUnit { user, unit } => write!(f, "{unit} of user {user}"),
            Self::User(user) => write!(f, "user {user}"),
            Self::Container(name) => write!(f, "container {name}"),
        }
    }
}

/// A service that the file names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Service {
    /// Absent when the file gives only a policy; then the unit of the service's name.
    pub(crate) scope: Option<Scope>,
    pub(crate) policy: Policy,
}

/// What of a service's traffic is steered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Policy {
    pub(crate) failure: Failure,
    /// What is steered unless the others say otherwise.
    pub(crate) base: Written<Base>,
    /// Shared by services that inherit it.
    pub(crate) include: Arc<[Written<Capture>]>,
    pub(crate) exclude: Arc<[Written<Capture>]>,
    /// Whether DNS queries are steered.
    pub(crate) dns: Written<bool>,
}

/// What the file says, or what holds where it says nothing.
#[derive(Clone, Copy, Debug, Eq)]
pub(crate) struct Written<T> {
    pub(crate) value: T,
    /// From 1; none for what is built in.
    pub(crate) line: Option<u64>,
}

/// Where something is written makes no difference to what it means: policies that say the same are the same, and share
/// what they are compiled to.
impl<T: PartialEq> PartialEq for Written<T> {
    fn eq(&self, other: &Self) -> bool {
        self.value == other.value
    }
}

impl<T> Written<T> {
    /// What holds without being written.
    pub(crate) const fn built_in(value: T) -> Self {
        Self { value, line: None }
    }

    fn at(location: Location, value: T) -> Self {
        Self { value, line: Some(location.line()).filter(|line| *line != 0) }
    }
}

/// By the place of what is meant, not of the alias that stands for it.
impl<T> From<Spanned<T>> for Written<T> {
    fn from(Spanned { value, defined, .. }: Spanned<T>) -> Self {
        Self::at(defined, value)
    }
}

impl Policy {
    /// Whether what the proxy can route makes a difference to it.
    pub(crate) fn follows_routable(&self) -> bool {
        let is_service =
            |capture: &Written<Capture>| matches!(capture.value.destinations, Destinations::Service(_));
        self.dns.value
            || self.base.value == Base::Routable
            || self.include.iter().chain(&*self.exclude).any(is_service)
    }
}

/// A set of destinations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Capture {
    pub(crate) destinations: Destinations,
    /// Empty: any port.
    pub(crate) ports: Vec<Ports>,
}

/// Addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Destinations {
    /// Of either family.
    Any,
    /// A block of them.
    Block(ipnet::IpNet),
    /// Those of a service that the proxy can route, as it says itself.
    Service(String),
}

impl fmt::Display for Capture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.destinations {
            Destinations::Any => f.write_str("any address")?,
            Destinations::Block(block) => block.fmt(f)?,
            Destinations::Service(name) => write!(f, "service {name}")?,
        }
        let any = Ports { first: 0, last: u16::MAX };
        let ports: Vec<String> =
            self.ports.iter().filter(|ports| **ports != any).map(ToString::to_string).collect();
        if ports.is_empty() { Ok(()) } else { write!(f, " ports {}", ports.join(", ")) }
    }
}

impl Config {
    /// Reads the named file, or the default one, which may be absent.
    pub(crate) fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        let path = file.unwrap_or(Path::new(DEFAULT_FILE));
        match read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && file.is_none() => Self::parse(path, ""),
            Err(error) => Err(ConfigError::Read { file: path.to_owned(), error }),
            Ok(text) => Self::parse(path, &text),
        }
    }

    /// Parses and validates what is written in `file`.
    pub(crate) fn parse(file: &Path, text: &str) -> Result<Self, ConfigError> {
        let options = serde_saphyr::options! { with_snippet: false, strict_booleans: true };
        let at = |location: Location, message: String| ConfigError::Invalid {
            file: file.to_owned(),
            line: location.line(),
            column: location.column(),
            message: printable(&message),
        };
        let raw: RawConfig = serde_saphyr::from_str_with_options(text, options).map_err(|error| {
            at(error.location().unwrap_or(Location::UNKNOWN), strip_location(&error.to_string()))
        })?;
        raw.validate(file).map_err(|Fault { location, message }| at(location, message))
    }

    /// Whether what the proxy can route makes a difference to any service.
    pub(crate) fn follows_routable(&self) -> bool {
        let of_services = self.services.values().map(|service| &service.policy);
        of_services.chain([&self.defaults]).any(Policy::follows_routable)
    }

    /// The policy of a service, named by the file or not.
    pub(crate) fn policy(&self, service: &str) -> &Policy {
        self.services.get(service).map_or(&self.defaults, |service| &service.policy)
    }
}

fn read(path: &Path) -> io::Result<String> {
    use io::Read as _;
    let mut text = String::new();
    let file = fs::File::open(path)?;
    if file.metadata()?.len() > MAX_BYTES {
        return Err(io::Error::other(format!("the file is larger than {MAX_BYTES} bytes")));
    }
    file.take(MAX_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

/// What is quoted in a message may be anything, also what a terminal takes for a command.
fn printable(message: &str) -> String {
    let mut text = String::new();
    for c in message.chars() {
        if c.is_control() { text.extend(c.escape_debug()) } else { text.push(c) }
    }
    text
}

/// The parser says where once more at the end of its message.
fn strip_location(message: &str) -> String {
    message.split(" at line ").next().unwrap_or(message).to_owned()
}

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

/// A fault that the types could not express.
struct Fault {
    location: Location,
    message: String,
}

fn fault<T, R>(at: &Spanned<T>, message: impl Into<String>) -> Result<R, Fault> {
    Err(Fault { location: at.referenced, message: message.into() })
}

impl RawConfig {
    fn validate(self, file: &Path) -> Result<Config, Fault> {
        let none = Policy {
            failure: Failure::Open,
            base: Written::built_in(Base::All),
            include: [].into(),
            exclude: [].into(),
            dns: Written::built_in(false),
        };
        let defaults = policy(self.failure, self.capture, &none);
        let paths = Paths {
            run: absolute(self.paths.run, "/run/mesh-redirect")?,
            state: absolute(self.paths.state, DEFAULT_STATE)?,
            pins: pins(self.paths.pins)?,
            hosts: absolute(self.paths.hosts, "/etc/hosts")?,
            hooks: absolute(self.paths.hooks, "/usr/share/containers/oci/hooks.d")?,
        };
        let RawProxy { port, dns_port, admin, unit, cgroup } = self.proxy;
        let scope = RawScope { unit, cgroup, ..RawScope::default() }.validate()?;
        let proxy = Proxy {
            port: port.map_or(15001, raw::Port::get),
            dns_port: first_dns_port(dns_port)?,
            admin: admin.map_or(SocketAddr::from((Ipv4Addr::LOCALHOST, 15000)), |admin| admin.value),
            scope: scope.unwrap_or_else(|| Scope::Unit("mesh-proxy.service".to_owned())),
        };
        let metrics = self.metrics.as_ref().map(|address| own_address(address, &proxy)).transpose()?;
        let mut services = BTreeMap::new();
        for (raw::Name(name), raw) in self.services {
            services.insert(name, service(raw, &defaults)?);
        }
        let mode = match self.mode {
            None | Some(RawMode::Auto) => Wanted::Auto,
            Some(RawMode::Ebpf) => Wanted::Only(Mode::Ebpf),
            Some(RawMode::Nftables) => Wanted::Only(Mode::Nftables),
            Some(RawMode::Hosts) => Wanted::Only(Mode::Hosts),
        };
        Ok(Config { file: file.to_owned(), mode, paths, proxy, metrics, defaults, services })
    }
}

fn service(raw: RawService, defaults: &Policy) -> Result<Service, Fault> {
    let RawService { unit, cgroup, user, container, failure, capture } = raw;
    let policy = policy(failure, capture, defaults);
    Ok(Service { scope: RawScope { unit, cgroup, user, container }.validate()?, policy })
}

/// A policy, which has from another one what it does not say itself. Whoever lists what is steered means the list alone.
fn policy(failure: Option<Failure>, capture: Option<Spanned<RawCapture>>, inherited: &Policy) -> Policy {
    let place = capture.as_ref().map_or(Location::UNKNOWN, |capture| capture.defined);
    let RawCapture { base, include, exclude, dns } = capture.map(|capture| capture.value).unwrap_or_default();
    let listed = include.as_ref().map(|include| Written::at(include.defined, Base::Listed));
    // A base that is all that is said has its place from what it is said of.
    let base = base.map(|base| match base.defined {
        Location::UNKNOWN => Written::at(place, base.value),
        _ => base.into(),
    });
    let written = |captures: Vec<Spanned<Capture>>| captures.into_iter().map(Written::from).collect();
    Policy {
        failure: failure.unwrap_or(inherited.failure),
        base: base.or(listed).unwrap_or(inherited.base),
        include: include.map_or_else(|| Arc::clone(&inherited.include), |include| written(include.value)),
        exclude: exclude.map_or_else(|| Arc::clone(&inherited.exclude), written),
        dns: dns.map_or(inherited.dns, Written::from),
    }
}

/// Where nobody listens whom we know.
fn own_address(address: &Spanned<SocketAddr>, proxy: &Proxy) -> Result<SocketAddr, Fault> {
    let port = address.value.port();
    match port {
        0 => fault(address, "0 is not a port; expected 1 to 65535"),
        _ if [proxy.port, proxy.admin.port()].contains(&port) => {
            fault(address, format!("port {port} is the proxy's; expected another one"))
        }
        _ => Ok(address.value),
    }
}

fn first_dns_port(port: Option<Spanned<raw::Port>>) -> Result<u16, Fault> {
    let Some(port) = port else { return Ok(15053) };
    let first = port.value.get();
    let ports = agent_ebpf::RESOLVER_PORTS;
    match first.checked_add(ports - 1) {
        Some(_) => Ok(first),
        None => {
            fault(&port, format!("DNS takes {ports} ports from {first} on, which is more than there are"))
        }
    }
}

impl RawScope {
    fn validate(self) -> Result<Option<Scope>, Fault> {
        let user = self.user.map(|user| user_id(&user)).transpose()?;
        match (self.unit, self.cgroup, self.container, user) {
            (Some(unit), None, None, user) => {
                check_unit(&unit.value).or_else(|message| fault(&unit, message))?;
                let unit = unit.value;
                Ok(Some(match user {
                    Some(user) => Scope::UserUnit { user, unit },
                    None => Scope::Unit(unit),
                }))
            }
            (None, Some(cgroup), None, None) => {
                check_cgroup(&cgroup.value).or_else(|message| fault(&cgroup, message))?;
                Ok(Some(Scope::Cgroup(cgroup.value)))
            }
            (None, None, Some(container), None) => {
                check_name(&container.value).or_else(|message| fault(&container, message))?;
                Ok(Some(Scope::Container(container.value)))
            }
            (None, None, None, user) => Ok(user.map(Scope::User)),
            (unit, cgroup, container, user) => {
                let user_is_given = user.map(|_| "`user`");
                let given = [(&unit, "`unit`"), (&cgroup, "`cgroup`"), (&container, "`container`")];
                let given = given.into_iter().filter(|(value, _)| value.is_some()).map(|(_, name)| name);
                let names: Vec<&str> = given.chain(user_is_given).collect();
                let message = format!(
                    "{} are given; expected one of them, or `user` and `unit` for a user's own unit",
                    names.join(" and ")
                );
                let first = [unit, cgroup, container].into_iter().flatten().next();
                first.map_or(Ok(None), |first| fault(&first, message))
            }
        }
    }
}

/// A number, or the name of somebody this host knows.
fn user_id(user: &Spanned<raw::User>) -> Result<u32, Fault> {
    let name = match &user.value {
        raw::User::Id(id) => return Ok(*id),
        raw::User::Name(name) => name,
    };
    match nix::unistd::User::from_name(name) {
        Ok(Some(found)) => Ok(found.uid.as_raw()),
        Ok(None) => fault(user, format!("there is no user `{}` on this host", name.escape_debug())),
        Err(error) => fault(user, format!("look up user `{}`: {error}", name.escape_debug())),
    }
}

fn absolute(path: Option<Spanned<PathBuf>>, default: &str) -> Result<PathBuf, Fault> {
    match path {
        None => Ok(PathBuf::from(default)),
        Some(path) if path.value.is_absolute() => Ok(path.value),
        Some(path) => fault(
            &path,
            format!(
                "`{}` is a relative path; expected one that begins with `/`",
                path.value.to_string_lossy().escape_debug()
            ),
        ),
    }
}

/// Names with dots are reserved on a BPF file system.
fn pins(path: Option<Spanned<PathBuf>>) -> Result<PathBuf, Fault> {
    if let Some(path) = &path
        && path.value.as_os_str().as_encoded_bytes().contains(&b'.')
    {
        return fault(path, "expected a path without dots: the BPF file system reserves such names");
    }
    absolute(path, "/sys/fs/bpf/mesh-redirect")
}

/// A service's name: what a systemd unit may be called, in at most 63 bytes.
pub(crate) fn check_name(name: &str) -> Result<(), String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || ":-_.@".contains(c);
    let good = !name.is_empty()
        && name.len() < agent_ebpf::NAME_LEN
        && name.chars().all(allowed)
        && !name.starts_with(['.', '-']);
    if good {
        return Ok(());
    }
    Err(format!(
        "`{}` is not a service name; expected 1 to {} of the characters A-Z a-z 0-9 : - _ . @, the first neither . nor -",
        name.escape_debug(),
        agent_ebpf::NAME_LEN - 1
    ))
}

fn check_unit(unit: &str) -> Result<(), String> {
    let (stem, kind) = unit.rsplit_once('.').unwrap_or((unit, ""));
    let allowed = |c: char| c.is_ascii_alphanumeric() || ":-_.@\\".contains(c);
    if ["service", "scope", "slice"].contains(&kind) && !stem.is_empty() && stem.chars().all(allowed) {
        return Ok(());
    }
    Err(format!(
        "`{}` is not a unit with a cgroup; expected NAME.service, NAME.slice or NAME.scope",
        unit.escape_debug()
    ))
}

/// A path below the cgroup2 mount that stays below it.
pub(crate) fn check_cgroup(path: &str) -> Result<(), String> {
    let mut parts = path.strip_prefix('/').unwrap_or_default().split('/');
    if parts.all(|part| !part.is_empty() && part != "." && part != "..") {
        return Ok(());
    }
    Err(format!(
        "`{}` is not a cgroup; expected a path below the cgroup2 mount, as /system.slice/payments.service (and not its root)",
        path.escape_debug()
    ))
}

#[cfg(test)]
mod tests;
