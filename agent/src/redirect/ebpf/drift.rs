//! What somebody else has changed. Whatever is found is forgotten, so that the next `apply` does it anew.

use super::{
    Cgroup, Desired, Drift, Ebpf, Error, Maps, Scopes, Service, Written,
    object::{self, Pinned},
    pins::{Owner, Scope},
    programs_of, wanted_scopes,
};
use agent_ebpf::programs::{self, Program};
use std::collections::BTreeMap;

/// Programs that are pinned, by their names.
type AllPinned = BTreeMap<&'static str, Pinned>;

impl Ebpf {
    /// See [`super::super::Redirect::drift`].
    pub(crate) fn drift(&mut self, desired: &Desired) -> Result<Vec<Drift>, Error> {
        let mut found = self.elsewhere(desired)?;
        if desired.services.is_empty() {
            return Ok(found);
        }
        let pinned = object::all_pinned(&self.pins);
        found.extend(self.of_programs(&pinned));
        let opened = Maps::open(&self.pins).and_then(|maps| Ok((maps, Scopes::open(&self.pins)?)));
        let (maps, scopes) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                self.forget_everything();
                found.push(Drift::of_all(error.to_string()));
                return Ok(found);
            }
        };
        if let Some(cgroup) = &desired.proxy {
            let scope = Scope { owner: Owner::Proxy, cgroup: cgroup.id };
            found.extend(self.attached(&pinned, scope, cgroup, &programs::PROXY).map(Drift::of_all));
        }
        for service in &desired.services {
            found.extend(self.of_service(&pinned, &scopes, service));
        }
        let differing = self.written.forget_what_differs(&maps).into_iter();
        found.extend(differing.map(|name| {
            Drift::of(&name, "what the kernel's maps say of it is not what was written".to_owned())
        }));
        Ok(found)
    }

    /// Programs that are attached where nothing is wanted.
    fn elsewhere(&self, desired: &Desired) -> Result<Vec<Drift>, Error> {
        let wanted = wanted_scopes(desired);
        let mut elsewhere = Vec::new();
        for scope in self.pins.scopes()? {
            if !wanted.contains(&scope) && self.pins.is_somewhere(scope)? {
                elsewhere.push(scope);
            }
        }
        let drift = |Scope { owner, cgroup }| {
            let service = desired.services.iter().find(|service| owner == Owner::Service(service.id));
            let finding =
                format!("programs are attached to the cgroup of id {cgroup}, where none are wanted");
            Drift { service: service.map(|service| service.name.clone()), finding }
        };
        Ok(elsewhere.into_iter().map(drift).collect())
    }

    fn of_programs(&mut self, pinned: &AllPinned) -> Vec<Drift> {
        let tag = |all: &AllPinned, name| all.get(name).map(|Pinned { tag, .. }| *tag);
        let drift = |Program { name, .. }| match tag(pinned, name) {
            None => Some(Drift::of_all(format!("the program {name} is not pinned"))),
            found if found == tag(&self.own, name) => None,
            Some(_) => {
                Some(Drift::of_all(format!("the pinned program {name} is not the one of this daemon")))
            }
        };
        let found: Vec<Drift> = programs::all().filter_map(drift).collect();
        self.loaded &= found.is_empty();
        found
    }

    fn of_service(&mut self, pinned: &AllPinned, scopes: &Scopes, service: &Service) -> Vec<Drift> {
        let programs = programs_of(service);
        let mut found = Vec::new();
        for cgroup in &service.scopes {
            let scope = Scope { owner: Owner::Service(service.id), cgroup: cgroup.id };
            let mut finding = self.attached(pinned, scope, cgroup, &programs);
            if finding.is_none() && !scopes.has(cgroup, service.id, &programs) && cgroup.exists() {
                finding =
                    Some(format!("{cgroup} is not the service's to the programs that are attached to it"));
            }
            if let Some(finding) = finding {
                self.attached.remove(&scope);
                found.push(Drift::of(&service.name, finding));
            }
        }
        found
    }

    /// Which of the programs do not run at a cgroup that is there.
    fn attached(
        &self,
        pinned: &AllPinned,
        scope: Scope,
        cgroup: &Cgroup,
        programs: &[Program],
    ) -> Option<String> {
        let runs = |program: Program| {
            // That it is not pinned is told by itself.
            let id = pinned.get(program.name).map(|Pinned { id, .. }| *id);
            self.pins.is_attached(scope, &[program]) && id.is_none_or(|id| self.pins.runs(scope, program, id))
        };
        let missing = programs.iter().filter(|program| !runs(**program));
        let missing: Vec<&str> = missing.map(|program| program.name).collect();
        let is_wrong = !missing.is_empty() && cgroup.exists();
        is_wrong.then(|| format!("not attached to {cgroup}: {}", missing.join(", ")))
    }

    fn forget_everything(&mut self) {
        self.loaded = false;
        self.attached.clear();
        self.written = Written::default();
    }
}
