//! Where a connection goes, as it is written on the command line.

use std::{
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

/// `ADDRESS:PORT`, `[ADDRESS]:PORT`, `NAME:PORT`, or any of them without a port: then all ports are meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Destination {
    pub(crate) host: Host,
    pub(crate) port: Option<u16>,
}

/// Who is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Host {
    Address(IpAddr),
    /// In lower case, without the root's final dot.
    Name(String),
}

/// What is written is no destination.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "expected an address or a host name, with a port or without, as 10.0.3.7:8080, [fd00::7]:8080, 10.0.3.7 or catalog:80"
)]
pub(crate) struct NoDestination;

impl FromStr for Destination {
    type Err = NoDestination;

    fn from_str(text: &str) -> Result<Self, NoDestination> {
        if let Ok(address) = text.parse::<SocketAddr>() {
            return Ok(Self { host: Host::Address(address.ip()), port: Some(address.port()) });
        }
        let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
        if let Ok(address) = bare.parse() {
            return Ok(Self { host: Host::Address(address), port: None });
        }
        let (name, port) = match text.rsplit_once(':') {
            Some((name, port)) => (name, Some(port.parse().map_err(|_| NoDestination)?)),
            None => (text, None),
        };
        let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
        if is_name(&name) { Ok(Self { host: Host::Name(name), port }) } else { Err(NoDestination) }
    }
}

/// What a resolver may be asked for: labels of letters, digits, hyphens and underscores, and not an address that is
/// mistyped.
fn is_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
    let is_label = |label: &str| !label.is_empty() && label.len() <= 63 && label.chars().all(allowed);
    let is_number = |label: &str| label.chars().all(|c| c.is_ascii_digit());
    name.len() <= 253 && name.split('.').all(is_label) && !name.rsplit('.').next().is_some_and(is_number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_names_are_taken_with_a_port_and_without() {
        let cases = [
            ("10.0.0.1:80", "10.0.0.1", Some(80)),
            ("10.0.0.1", "10.0.0.1", None),
            ("[fd00::1]:80", "fd00::1", Some(80)),
            ("[fd00::1]", "fd00::1", None),
            ("fd00::1", "fd00::1", None),
            ("::ffff:10.0.0.1", "::ffff:10.0.0.1", None),
        ];
        for (text, address, port) in cases {
            let host = Host::Address(address.parse().unwrap());
            assert_eq!(text.parse(), Ok(Destination { host, port }), "{text}");
        }
        for (text, name, port) in [
            ("Catalog:80", "catalog", Some(80)),
            ("a.b-c_d.", "a.b-c_d", None),
            ("3com.test", "3com.test", None),
        ] {
            assert_eq!(text.parse(), Ok(Destination { host: Host::Name(name.into()), port }), "{text}");
        }
    }

    #[test]
    fn what_is_neither_is_refused() {
        let long = "x".repeat(64);
        for text in [
            "",
            ":80",
            "10.0.0.256",
            "10.0.0:80",
            "catalog:http",
            "catalog:70000",
            "a b",
            "a..b",
            "a/8",
            &long,
        ] {
            assert_eq!(text.parse::<Destination>(), Err(NoDestination), "{text}");
        }
    }
}
