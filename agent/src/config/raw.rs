//! The configuration as it is written. Nothing past [`super::Config`] sees these types.

use super::{Capture, Destinations};
use ipnet::IpNet;
use serde::{
    Deserialize, Deserializer,
    de::{self, MapAccess, Visitor},
};
use serde_saphyr::{Location, Spanned};
use std::{collections::BTreeMap, fmt, net::SocketAddr, num::NonZeroU16, path::PathBuf};

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawConfig {
    pub(super) mode: Option<RawMode>,
    pub(super) paths: RawPaths,
    pub(super) proxy: RawProxy,
    pub(super) metrics: Option<Spanned<SocketAddr>>,
    pub(super) failure: Option<Failure>,
    pub(super) capture: Option<Spanned<RawCapture>>,
    pub(super) services: BTreeMap<Name, RawService>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawPaths {
    pub(super) run: Option<Spanned<PathBuf>>,
    pub(super) state: Option<Spanned<PathBuf>>,
    pub(super) pins: Option<Spanned<PathBuf>>,
    pub(super) hosts: Option<Spanned<PathBuf>>,
    pub(super) hooks: Option<Spanned<PathBuf>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawProxy {
    pub(super) port: Option<Port>,
    pub(super) dns_port: Option<Spanned<Port>>,
    pub(super) admin: Option<Spanned<SocketAddr>>,
    pub(super) unit: Option<Spanned<String>>,
    pub(super) cgroup: Option<Spanned<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawService {
    pub(super) unit: Option<Spanned<String>>,
    pub(super) cgroup: Option<Spanned<String>>,
    pub(super) user: Option<Spanned<User>>,
    pub(super) container: Option<Spanned<String>>,
    pub(super) failure: Option<Failure>,
    pub(super) capture: Option<Spanned<RawCapture>>,
}

/// A mapping, or the base alone.
#[derive(Debug, Default)]
pub(super) struct RawCapture {
    pub(super) base: Option<Spanned<Base>>,
    pub(super) include: Option<Spanned<Vec<Spanned<Capture>>>>,
    pub(super) exclude: Option<Vec<Spanned<Capture>>>,
    pub(super) dns: Option<Spanned<bool>>,
}

impl<'de> Deserialize<'de> for RawCapture {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Fields {
            base: Option<Spanned<Base>>,
            include: Option<Spanned<Vec<Spanned<Capture>>>>,
            exclude: Option<Vec<Spanned<Capture>>>,
            dns: Option<Spanned<bool>>,
        }

        struct RawCaptureVisitor;

        impl<'de> Visitor<'de> for RawCaptureVisitor {
            type Value = RawCapture;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "all, routable or listed, or a mapping with `base`, `include`, `exclude` and `dns`",
                )
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<RawCapture, E> {
                let base = Base::deserialize(de::value::StrDeserializer::new(text))?;
                // Where it is, whoever asked for this value knows.
                let base = Spanned { value: base, referenced: Location::UNKNOWN, defined: Location::UNKNOWN };
                Ok(RawCapture { base: Some(base), ..RawCapture::default() })
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<RawCapture, A::Error> {
                let deserializer = de::value::MapAccessDeserializer::new(map);
                let Fields { base, include, exclude, dns } = Fields::deserialize(deserializer)?;
                Ok(RawCapture { base, include, exclude, dns })
            }
        }

        deserializer.deserialize_any(RawCaptureVisitor)
    }
}

/// What is steered unless captures say otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Base {
    /// Everything.
    All,
    /// What the proxy can route.
    Routable,
    /// What is included alone.
    Listed,
}

/// What a service, or the proxy, is to the host, as it is written.
#[derive(Debug, Default)]
pub(super) struct RawScope {
    pub(super) unit: Option<Spanned<String>>,
    pub(super) cgroup: Option<Spanned<String>>,
    pub(super) user: Option<Spanned<User>>,
    pub(super) container: Option<Spanned<String>>,
}

/// A user, by number or by name.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum User {
    Id(u32),
    Name(String),
}

/// How connections are steered.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum RawMode {
    Auto,
    Ebpf,
    Nftables,
    Hosts,
}

/// A service's name.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Name(pub(super) String);

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        super::check_name(&name).map_err(de::Error::custom)?;
        Ok(Self(name))
    }
}

/// What becomes of steered connections while no proxy listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Failure {
    /// They go where they were going.
    Open,
    /// They are refused.
    Closed,
}

impl fmt::Display for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::All => "all",
            Self::Routable => "routable",
            Self::Listed => "listed",
        })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Open => "open",
            Self::Closed => "closed",
        })
    }
}

/// An inclusive range of ports, 1 to 65535.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ports {
    pub(crate) first: u16,
    pub(crate) last: u16,
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.first)?;
        if self.first == self.last { Ok(()) } else { write!(f, "-{}", self.last) }
    }
}

/// A port to listen on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Port(NonZeroU16);

impl Port {
    pub(super) fn get(self) -> u16 {
        self.0.get()
    }
}

impl<'de> Deserialize<'de> for Port {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Ports { first, last } = Ports::deserialize(deserializer)?;
        match NonZeroU16::new(first) {
            Some(port) if first == last => Ok(Self(port)),
            _ => Err(de::Error::custom("a range of ports where one is expected")),
        }
    }
}

impl<'de> Deserialize<'de> for Ports {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PortsVisitor;

        impl Visitor<'_> for PortsVisitor {
            type Value = Ports;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a port (1 to 65535) or a range of ports (8000-8999)")
            }

            fn visit_u64<E: de::Error>(self, port: u64) -> Result<Ports, E> {
                self.visit_str(&port.to_string())
            }

            fn visit_i64<E: de::Error>(self, port: i64) -> Result<Ports, E> {
                self.visit_str(&port.to_string())
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Ports, E> {
                let (first, last) = text.split_once('-').unwrap_or((text, text));
                let port = |text: &str| text.trim().parse::<u16>().ok().filter(|&port| port != 0);
                match (port(first), port(last)) {
                    (Some(first), Some(last)) if first <= last => Ok(Ports { first, last }),
                    (Some(_), Some(_)) => Err(E::custom(format!(
                        "`{text}` ends before it begins; expected a range as 8000-8999"
                    ))),
                    _ => Err(E::custom(format!(
                        "`{}` is not a port; expected 1 to 65535, or a range as 8000-8999",
                        text.escape_debug()
                    ))),
                }
            }
        }

        deserializer.deserialize_any(PortsVisitor)
    }
}

/// A CIDR whose host bits are zero.
struct Cidr(IpNet);

impl Cidr {
    fn parse<E: de::Error>(text: &str) -> Result<Self, E> {
        let net: IpNet = text.parse().or_else(|_| text.parse().map(single)).map_err(|_| {
            E::custom(format!(
                "`{}` is not a CIDR; expected an address block as 10.0.0.0/8 or fd00::/8",
                text.escape_debug()
            ))
        })?;
        if net.addr() == net.network() {
            Ok(Self(net))
        } else {
            Err(E::custom(format!("`{text}` has host bits set; expected {}", net.trunc())))
        }
    }
}

/// An address alone is the block of that one address.
fn single(address: std::net::IpAddr) -> IpNet {
    IpNet::from(address)
}

impl<'de> Deserialize<'de> for Cidr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::parse(&String::deserialize(deserializer)?)
    }
}

impl<'de> Deserialize<'de> for Capture {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Fields {
            cidr: Option<Cidr>,
            service: Option<String>,
            #[serde(default)]
            ports: Vec<Ports>,
        }

        struct CaptureVisitor;

        impl<'de> Visitor<'de> for CaptureVisitor {
            type Value = Capture;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a CIDR, or a mapping with `cidr` or `service`, `ports` or both")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Capture, E> {
                Ok(Capture { destinations: Destinations::Block(Cidr::parse(text)?.0), ports: Vec::new() })
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Capture, A::Error> {
                let deserializer = de::value::MapAccessDeserializer::new(map);
                let Fields { cidr, service, ports } = Fields::deserialize(deserializer)?;
                let destinations = match (cidr, service) {
                    (None, None) if ports.is_empty() => {
                        return Err(de::Error::custom("expected `cidr` or `service`, `ports` or both"));
                    }
                    (None, None) => Destinations::Any,
                    (Some(cidr), None) => Destinations::Block(cidr.0),
                    (None, Some(service)) => Destinations::Service(service),
                    (Some(_), Some(_)) => {
                        return Err(de::Error::custom(
                            "`cidr` and `service` are given; expected one of them",
                        ));
                    }
                };
                Ok(Capture { destinations, ports })
            }
        }

        deserializer.deserialize_any(CaptureVisitor)
    }
}
