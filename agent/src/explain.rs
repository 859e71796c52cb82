//! What becomes of connections, and why.

mod destination;
mod names;
mod now;
mod outcome;

use crate::{
    config::{Config, Ports, check_name},
    ready,
    reason::Reason,
    routable::Routable,
};
use serde::Serialize;
use std::net::{IpAddr, SocketAddr};

pub(crate) use destination::{Destination, Host};
pub(crate) use names::{Source, in_hosts_file};
pub(crate) use now::Now;
pub(crate) use outcome::{Outcome, Proto, Situation};

/// What becomes of each destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Explanations {
    pub(crate) service: String,
    pub(crate) now: Now,
    pub(crate) explained: Vec<Explained>,
}

/// What becomes of one destination, or of some ports of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Explained {
    /// With its port, if one was asked about.
    pub(crate) destination: String,
    /// Ports of the destination, if none was asked about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ports: Option<String>,
    /// The name that was asked about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    /// Who says that the name has this address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) from: Option<Source>,
    pub(crate) proto: Proto,
    /// As if the service were enabled, where it is not.
    pub(crate) decision: Outcome,
    #[serde(flatten)]
    pub(crate) reason: Reason,
}

/// What becomes of what a service sends to destinations.
pub(crate) fn explain(
    config: &Config,
    service: &str,
    destinations: &[Destination],
    proto: Proto,
) -> anyhow::Result<Explanations> {
    check_name(service).map_err(anyhow::Error::msg)?;
    let situation = Situation::of(config, service);
    let explained =
        destinations.iter().flat_map(|destination| situation.explain(destination, proto)).collect();
    Ok(Explanations { service: service.to_owned(), now: situation.now, explained })
}

impl<'a> Situation<'a> {
    /// Asks the daemon, the disk and the proxy about a service.
    pub(crate) fn of(config: &'a Config, service: &'a str) -> Self {
        let now = Now::of(config, service);
        Self { config, service, routable: known_routable(config, &now), now }
    }

    fn explain(&self, Destination { host, port }: &Destination, proto: Proto) -> Vec<Explained> {
        match (host, *port) {
            (Host::Address(address), Some(port)) => vec![self.of_socket((*address, port).into(), proto)],
            (Host::Address(address), None) => self.of_address(*address, proto),
            (Host::Name(name), port) => self.of_name(name, port, proto),
        }
    }

    /// What becomes of one connection, or one datagram.
    pub(crate) fn of_socket(&self, destination: SocketAddr, proto: Proto) -> Explained {
        let (decision, reason) = self.decide(destination, proto);
        Explained::new(destination.to_string(), proto, decision, reason)
    }

    fn of_address(&self, address: IpAddr, proto: Proto) -> Vec<Explained> {
        let of_ports = |(ports, decision, reason): (Ports, _, _)| Explained {
            ports: Some(ports.to_string()),
            ..Explained::new(address.to_string(), proto, decision, reason)
        };
        self.decide_ports(address, proto).into_iter().map(of_ports).collect()
    }

    fn of_name(&self, name: &str, port: Option<u16>, proto: Proto) -> Vec<Explained> {
        let of_answer = |(source, answer): (Source, Result<IpAddr, String>)| {
            let explained = match answer {
                Ok(address) => self.explain(&Destination { host: Host::Address(address), port }, proto),
                Err(why) => vec![unresolved(name, port, proto, why)],
            };
            let named = move |explained| Explained {
                name: Some(name.to_owned()),
                from: Some(source.clone()),
                ..explained
            };
            explained.into_iter().map(named).collect::<Vec<_>>()
        };
        names::look_up(self, name).into_iter().flat_map(of_answer).collect()
    }
}

impl Explained {
    fn new(destination: String, proto: Proto, decision: Outcome, reason: Reason) -> Self {
        Self { destination, ports: None, name: None, from: None, proto, decision, reason }
    }
}

fn unresolved(name: &str, port: Option<u16>, proto: Proto, because: String) -> Explained {
    let destination = port.map_or_else(|| name.to_owned(), |port| format!("{name}:{port}"));
    let reason = Reason { steered: false, because, rule: None, file: None, line: None };
    Explained::new(destination, proto, Outcome::Unresolved, reason)
}

/// As the proxy says now, or as it was last known.
fn known_routable(config: &Config, now: &Now) -> Routable {
    let said = now.proxy.any().then(|| ready::routable(config.proxy.admin, None));
    match said {
        Some(Ok(Some((routable, _)))) => routable,
        _ => Routable::load(&config.paths.state),
    }
}
