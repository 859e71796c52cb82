//! What becomes of connections, and why.

mod destination;
mod names;
mod now;
mod outcome;

use crate::{
    config::{Config, check_name},
    ready,
    reason::Reason,
    routable::Routable,
};
use destination::Host;
use serde::Serialize;
use std::net::{IpAddr, SocketAddr};

pub(crate) use destination::Destination;
pub(crate) use names::Source;
pub(crate) use now::Now;
pub(crate) use outcome::{Outcome, Policies, Proto};

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
    let now = Now::of(config, service);
    let routable = &known_routable(config, &now);
    let policies = Policies { config, service, policy: config.policy(service), routable, now: &now };
    let of_destination = |Destination { host, port }: &Destination| match host {
        Host::Address(address) => of_address(&policies, *address, *port, proto),
        Host::Name(name) => of_name(&policies, name, *port, proto),
    };
    let explained = destinations.iter().flat_map(of_destination).collect();
    Ok(Explanations { service: service.to_owned(), now, explained })
}

/// As the proxy says now, or as it was last known.
fn known_routable(config: &Config, now: &Now) -> Routable {
    let said = now.proxy.any().then(|| ready::routable(config.proxy.admin, None));
    match said {
        Some(Ok(Some((routable, _)))) => routable,
        _ => Routable::load(&config.paths.state),
    }
}

fn of_address(policies: &Policies<'_>, address: IpAddr, port: Option<u16>, proto: Proto) -> Vec<Explained> {
    let explained = |destination, ports, decision, reason| Explained {
        destination,
        ports,
        name: None,
        from: None,
        proto,
        decision,
        reason,
    };
    let Some(port) = port else {
        let decided = policies.decide_ports(address, proto).into_iter();
        let of_ports = decided.map(|(ports, decision, reason)| {
            explained(address.to_string(), Some(ports.to_string()), decision, reason)
        });
        return of_ports.collect();
    };
    let destination = SocketAddr::new(address, port);
    let (decision, reason) = policies.decide(destination, proto);
    vec![explained(destination.to_string(), None, decision, reason)]
}

fn of_name(policies: &Policies<'_>, name: &str, port: Option<u16>, proto: Proto) -> Vec<Explained> {
    let of_answer = |(source, answer): (Source, Result<IpAddr, String>)| {
        let explained = match answer {
            Ok(address) => of_address(policies, address, port, proto),
            Err(why) => vec![unresolved(name, port, proto, why)],
        };
        let named = move |explained| Explained {
            name: Some(name.to_owned()),
            from: Some(source.clone()),
            ..explained
        };
        explained.into_iter().map(named).collect::<Vec<_>>()
    };
    names::look_up(policies, name).into_iter().flat_map(of_answer).collect()
}

fn unresolved(name: &str, port: Option<u16>, proto: Proto, because: String) -> Explained {
    Explained {
        destination: port.map_or_else(|| name.to_owned(), |port| format!("{name}:{port}")),
        ports: None,
        name: None,
        from: None,
        proto,
        decision: Outcome::Unresolved,
        reason: Reason { steered: false, because, rule: None, file: None, line: None },
    }
}
