//! Connections that are open while services are enabled or disabled: found, and closed if so asked.

use super::{Daemon, Error};
use crate::{
    api::{self, Existing},
    config::check_name,
    connections::{self, Owners},
    mode::Mode,
    plan,
    redirect::{Desired, Service},
    sockets::Connection,
    watch,
};
use std::collections::BTreeSet;

impl Daemon {
    pub(super) fn connections(&mut self, asked: &api::Connections) -> Result<api::Found, Error> {
        let api::Connections { services, steered, reset } = asked;
        services.iter().try_for_each(|name| check_name(name)).map_err(Error::BadName)?;
        match (reset, steered) {
            (true, false) => self.require_proxy()?,
            _ => self.require_connections()?,
        }
        let existing =
            self.existing(services, *steered, if *reset { Existing::Reset } else { Existing::Keep })?;
        Ok(api::Found { existing: existing.unwrap_or_default() })
    }

    /// Whether connections tell anything here.
    pub(super) fn require_connections(&self) -> Result<(), Error> {
        if self.mode == Mode::Hosts { Err(Error::NamesOnly) } else { Ok(()) }
    }

    /// Whether a connection that is closed now, and made anew, would be steered.
    pub(super) fn require_proxy(&mut self) -> Result<(), Error> {
        self.require_connections()?;
        watch::readiness(&self.config.proxy, &mut self.workloads).map(drop).map_err(Error::NotReady)
    }

    /// Open connections of services: those that are steered, or those that are not and should be. None where they do not
    /// tell. Who waits until they have drained asks again.
    pub(super) fn existing(
        &mut self,
        names: &[String],
        steered: bool,
        existing: Existing,
    ) -> Result<Option<Vec<api::OfService>>, Error> {
        let Some(open) = self.open_connections()? else { return Ok(None) };
        let desired = self.with_services(names, steered)?;
        let owners = Owners::new(&desired, self.mode);
        let found = if steered { open.steered(&owners) } else { open.unsteered(&owners) };
        let found = found.map_err(Error::Connections)?;
        let of = |name: &String| of_service(name, steered, &found, existing == Existing::Reset);
        names.iter().map(of).collect::<Result<_, _>>().map(Some)
    }

    /// What is desired, and where these services are, whether they are enabled or not. Commands that run as a service
    /// that is disabled are steered still, and not asked for.
    fn with_services(&mut self, names: &[String], disabled: bool) -> Result<Desired, Error> {
        let mut state = self.state.clone();
        for name in names.iter().filter(|_| disabled) {
            state.enable(name, false);
        }
        let mut desired = plan::everything(&self.config, &state, &mut self.workloads, &mut self.compiled)?;
        let commands: BTreeSet<&String> = self.state.iter().flat_map(|(_, entry)| &entry.commands).collect();
        for service in desired.services.iter_mut().filter(|service| disabled && names.contains(&service.name))
        {
            service.scopes.retain(|cgroup| !commands.contains(&self.workloads.path_of(cgroup)));
        }
        Ok(desired)
    }
}

fn of_service(
    name: &str,
    steered: bool,
    found: &[(&Service, &Connection)],
    reset: bool,
) -> Result<api::OfService, Error> {
    let own: Vec<&Connection> =
        found.iter().filter(|(service, _)| service.name == name).map(|(_, connection)| *connection).collect();
    let listed = own.iter().take(api::MAX_LISTED);
    let closed = if reset { connections::reset(own.iter().copied())? } else { 0 };
    Ok(api::OfService {
        service: name.to_owned(),
        steered,
        count: own.len(),
        reset: closed,
        open: if reset { 0 } else { own.len() },
        connections: listed
            .map(|Connection { local, remote, .. }| api::Connection { local: *local, remote: *remote })
            .collect(),
        listed_at_most: api::MAX_LISTED,
    })
}
