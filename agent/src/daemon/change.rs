//! Enabling and disabling: what is asked for, what it would change, and what has to be said of it.

use super::{Daemon, Error};
use crate::{
    api::{self, Existing},
    beside,
    config::{Failure, Scope, check_name},
    journal::Artefact,
    mode::Mode,
    plan, probe,
    redirect::{
        ebpf::Other,
        nftables::{self, NatChain},
    },
    removal,
    state::{Container, State},
    workload::{
        self, Workloads,
        hooks_dir::Hook,
        started,
        systemd::{self, DropIn},
    },
};
use globset::{Glob, GlobMatcher};
use similar::{ChangeTag, TextDiff};
use std::{collections::BTreeSet, io};

impl Daemon {
    pub(super) fn enable(&mut self, change: &api::Change) -> Result<api::Changed, Error> {
        let mut known: Vec<String> = self.config.services.keys().cloned().collect();
        if change.all_matching {
            known.extend(workload::unit_services());
        }
        let names = expand(&change.services, &known)?;
        let scopes = self.workloads.resolve(&self.config, &names)?;
        let mut next = self.state.clone();
        let services = names.iter().map(|service| api::ChangedService {
            service: service.clone(),
            changed: next.enable(service, change.observe),
        });
        let services = services.collect();
        for (name, scope) in names.iter().zip(&scopes) {
            next.set_container(name, self.container(name, scope));
        }
        if change.dry_run {
            let difference = Some(self.difference(&next)?);
            let beside = self.beside(&names, &scopes);
            return Ok(api::Changed { services, notes: vec![], existing: None, difference, beside });
        }
        if change.existing != Existing::Keep {
            self.require_proxy()?;
        }
        let before = self.state.clone();
        self.commit(next)?;
        if let Err(error) = self.align_drop_ins() {
            self.commit(before)?;
            if let Err(second) = self.align_drop_ins() {
                tracing::error!("going back after a failure failed too: {second}");
            }
            return Err(error);
        }
        let mut notes = self.proxy_notes();
        notes.extend(self.mode_notes());
        notes.extend(self.dns_notes(&names));
        let registered = self.align_hook();
        notes.extend(self.hook_notes(&scopes, registered.err()));
        let cgroups = scopes.iter().map(|scope| self.workloads.cgroup(scope));
        let absent: Vec<bool> = cgroups.map(|cgroup| cgroup.is_none()).collect();
        for (name, _) in names.iter().zip(absent).filter(|(_, absent)| *absent) {
            notes.push(format!("{name} does not run now; it will be steered from its first connection"));
        }
        notes.extend(self.beside_notes());
        let beside = self.beside(&names, &scopes);
        let existing = if change.observe { None } else { self.told(&names, false, change, &mut notes)? };
        Ok(api::Changed { services, notes, existing, difference: None, beside })
    }

    pub(super) fn disable(&mut self, change: &api::Change) -> Result<api::Changed, Error> {
        let enabled: Vec<String> = self.state.iter().map(|(name, _)| name.to_owned()).collect();
        let names = expand(&change.services, &enabled)?;
        let mut next = self.state.clone();
        let services = names
            .iter()
            .map(|service| api::ChangedService { service: service.clone(), changed: next.disable(service) });
        let services = services.collect();
        if change.dry_run {
            let difference = Some(self.difference(&next)?);
            return Ok(api::Changed { services, notes: vec![], existing: None, difference, beside: vec![] });
        }
        if change.existing != Existing::Keep {
            self.require_connections()?;
        }
        self.commit(next)?;
        self.align_files()?;
        names.iter().for_each(|name| started::forget(&self.config.paths.run, name));
        let mut notes = self.lost_addresses(&names);
        let existing = self.told(&names, true, change, &mut notes)?;
        Ok(api::Changed { services, notes, existing, difference: None, beside: vec![] })
    }

    /// Open connections. That they cannot be told is no failure of what was done, unless something was to be done with them.
    fn told(
        &mut self,
        names: &[String],
        steered: bool,
        change: &api::Change,
        notes: &mut Vec<String>,
    ) -> Result<Option<Vec<api::OfService>>, Error> {
        match self.existing(names, steered, change.existing) {
            Err(error) if change.existing == Existing::Keep => {
                notes.push(error.to_string());
                Ok(None)
            }
            existing => existing,
        }
    }

    /// Programs of others' beside those of services.
    fn beside(&mut self, names: &[String], scopes: &[Scope]) -> Vec<api::Beside> {
        let cgroups: Vec<_> = scopes.iter().map(|scope| self.workloads.cgroup(scope)).collect();
        let beside = |(service, other): (&String, Other)| api::Beside {
            service: service.clone(),
            program: other.id,
            name: None,
            hook: other.hook,
            cgroup: self.workloads.path_of_dir(&other.dir),
            order: other.order,
        };
        let others = names.iter().zip(self.redirect.others(&cgroups));
        others
            .flat_map(|(name, others)| others.into_iter().map(move |other| (name, other)))
            .map(beside)
            .collect()
    }

    /// Tables of others' that do not just go with ours.
    fn beside_notes(&self) -> Vec<String> {
        let chains = nftables::other_nat_chains().unwrap_or_default();
        let matters = |chain: &&NatChain| self.mode == Mode::Nftables || beside::steers(chain);
        let findings = chains.iter().filter(matters).map(beside::chain);
        findings.filter(|finding| !finding.ok).map(|finding| finding.to_string()).collect()
    }

    /// What has to be said to those whose names had addresses that lead nowhere now.
    fn lost_addresses(&self, names: &[String]) -> Vec<String> {
        let captured_dns =
            names.iter().filter(|name| self.mode != Mode::Hosts && self.config.policy(name).dns.value);
        let note = |name: &String| {
            format!(
                "{name} has to look its names up anew, which most programs do within 30 s: the virtual addresses that it was given lead nowhere now"
            )
        };
        captured_dns.map(note).collect()
    }

    /// What another state would add and remove, line by line.
    fn difference(&mut self, next: &State) -> Result<String, Error> {
        let before = self.described(&self.state.clone())?;
        let after = self.described(next)?;
        Ok(difference(&before, &after))
    }

    /// Everything that a state makes of kernel and host.
    pub(super) fn described(&mut self, state: &State) -> Result<String, Error> {
        let desired = plan::everything(&self.config, state, &mut self.workloads, &mut self.compiled)?;
        let mut text = self.redirect.describe(&desired);
        for (name, _) in state.iter().filter(|(_, entry)| entry.enabled) {
            let Some(drop_in) = self.drop_in(name, &Workloads::scope(&self.config, name)) else { continue };
            let file = drop_in.file(self.config_file.as_deref()).map_err(drop_in_error("describe"))?;
            text += &format!("file {}\n", file.0.display());
            text.extend(file.1.lines().map(|line| format!("\t{line}\n")));
        }
        if state.containers().next().is_some() && self.hook().is_of_use() {
            let (path, content) =
                self.hook().file().map_err(|cause| Error::Hook { action: "describe", cause })?;
            text += &format!("file {}\n", path.display());
            text.extend(content.lines().map(|line| format!("\t{line}\n")));
        }
        Ok(text)
    }

    /// The steps before the starts of enabled services' units.
    pub(super) fn drop_ins(&self) -> Vec<DropIn> {
        let enabled = self.state.iter().filter(|(_, entry)| entry.enabled);
        enabled.filter_map(|(name, _)| self.drop_in(name, &Workloads::scope(&self.config, name))).collect()
    }

    pub(super) fn hook(&self) -> Hook<'_> {
        Hook { dir: &self.config.paths.hooks, config: self.config_file.as_deref() }
    }

    /// Brings the steps before starts in line with what is enabled, wherever an earlier daemon, or another configuration, left
    /// them. What fails is said: services are steered all the same.
    pub(super) fn align_steps(&mut self) {
        for aligned in [self.align_drop_ins(), self.align_hook()] {
            if let Err(error) = aligned {
                tracing::error!("{error}; units and containers that start are found within a second");
            }
        }
    }

    /// The same, where it has to be so.
    pub(super) fn align_files(&mut self) -> Result<(), Error> {
        self.align_drop_ins()?;
        self.align_hook()
    }

    /// Every enabled unit has its drop-in, and no other unit one that the journal knows.
    fn align_drop_ins(&mut self) -> Result<(), Error> {
        let wanted = self.drop_ins();
        let noted: BTreeSet<Artefact> = wanted.iter().map(Artefact::drop_in).collect();
        self.journal.note(noted.iter().cloned())?;
        systemd::write_drop_ins(&wanted, self.config_file.as_deref()).map_err(drop_in_error("write"))?;
        let is_drop_in = |artefact: &&Artefact| matches!(artefact, Artefact::DropIn { .. });
        let unwanted =
            self.journal.noted().iter().filter(is_drop_in).filter(|noted_one| !noted.contains(noted_one));
        let unwanted: BTreeSet<Artefact> = unwanted.cloned().collect();
        let files = unwanted.iter().filter_map(|artefact| match artefact {
            Artefact::DropIn { file } => Some(file.as_path()),
            _ => None,
        });
        systemd::remove_drop_ins(files).map_err(drop_in_error("remove"))?;
        Ok(self.journal.forget(&unwanted)?)
    }

    /// The hook is there while a container is enabled, and no other one that the journal knows.
    fn align_hook(&mut self) -> Result<(), Error> {
        let wanted = self.hook();
        let wanted =
            (self.state.containers().next().is_some() && wanted.is_of_use()).then(|| Artefact::hook(wanted));
        if let Some(hook) = &wanted {
            self.journal.note([hook.clone()])?;
            self.hook().write().map_err(|cause| Error::Hook { action: "write", cause })?;
        }
        let is_hook = |artefact: &&Artefact| matches!(artefact, Artefact::Hook { .. });
        let unwanted =
            self.journal.noted().iter().filter(is_hook).filter(|hook| Some(*hook) != wanted.as_ref());
        for artefact in unwanted.cloned().collect::<Vec<_>>() {
            let removed = removal::remove(&artefact, &self.config);
            removed.map_err(|cause| Error::Former { artefact: artefact.clone(), cause: Box::new(cause) })?;
            self.journal.forget(&BTreeSet::from([artefact]))?;
        }
        Ok(())
    }

    /// What the hook has to know of a service.
    fn container(&mut self, service: &str, scope: &Scope) -> Option<Container> {
        let Scope::Container(name) = scope else { return None };
        let required = self.config.policy(service).failure == Failure::Closed;
        Some(Container { name: name.clone(), id: self.workloads.container_id(name), required })
    }

    /// The configuration may have changed since services were enabled.
    pub(super) fn find_containers(&mut self) -> Result<(), Error> {
        let next = self.with_containers();
        self.file.save(&next)?;
        self.state = next;
        Ok(())
    }

    /// The state, with the containers that enabled services are by the configuration.
    pub(super) fn with_containers(&mut self) -> State {
        let mut next = self.state.clone();
        for (name, _) in self.state.clone().iter().filter(|(_, entry)| entry.enabled) {
            let container = self.container(name, &Workloads::scope(&self.config, name));
            next.set_container(name, container);
        }
        next
    }

    fn drop_in(&self, service: &str, scope: &Scope) -> Option<DropIn> {
        let required = self.config.policy(service).failure == Failure::Closed;
        // Slices and scopes have no step before their start.
        let unit = scope.unit().filter(|unit| unit.ends_with(".service"))?;
        Some(DropIn { unit: unit.to_owned(), service: service.to_owned(), required })
    }

    /// What has to be said of the mode when something is enabled.
    fn mode_notes(&self) -> Option<String> {
        let note = "names are mapped for the whole host: every process that looks them up is steered, whatever its service";
        (self.mode == Mode::Hosts).then(|| note.to_owned())
    }

    /// What has to be said of containers whose start is not waited for. They are steered all the same, if later.
    fn hook_notes(&self, scopes: &[Scope], refused: Option<Error>) -> Option<String> {
        let reason = match refused {
            Some(Error::Hook { cause, .. }) => {
                format!("write to {}: {cause}", self.config.paths.hooks.display())
            }
            Some(error) => error.to_string(),
            None if self.hook().is_of_use() => return None,
            None => "no podman or CRI-O is here to run it".to_owned(),
        };
        let note = format!(
            "no hook was registered ({reason}): unless a runtime was told to run it, a container that is started is found within a second"
        );
        scopes.iter().any(|scope| matches!(scope, Scope::Container(_))).then_some(note)
    }

    /// Where queries that shall be captured will not be.
    fn dns_notes(&self, names: &[String]) -> Option<String> {
        let captures_dns = names.iter().any(|name| self.config.policy(name).dns.value);
        let resolver = probe::resolver_on_localhost().filter(|_| captures_dns && self.mode != Mode::Hosts)?;
        Some(format!(
            "this host's resolver is {resolver}: queries to it are not captured, and those it sends on are its own"
        ))
    }
}

/// What differs between two texts, line by line.
pub(super) fn difference(before: &str, after: &str) -> String {
    let difference = TextDiff::from_lines(before, after);
    let changes = difference.iter_all_changes().filter(|change| change.tag() != ChangeTag::Equal);
    changes.map(|change| format!("{}{}", change.tag(), change.value())).collect()
}

pub(super) fn drop_in_error(action: &'static str) -> impl Fn(io::Error) -> Error {
    move |cause| Error::DropIn { action, cause }
}

/// Names as they are, and patterns as the known names that they match.
fn expand(asked: &[String], known: &[String]) -> Result<Vec<String>, Error> {
    let mut names: Vec<String> = Vec::new();
    if asked.is_empty() {
        return Err(Error::BadName("no service is named".to_owned()));
    }
    for asked in asked {
        if !asked.contains(['*', '?', '[', '{']) {
            check_name(asked).map_err(Error::BadName)?;
            names.push(asked.clone());
            continue;
        }
        let pattern = matcher(asked)?;
        let before = names.len();
        names.extend(known.iter().filter(|name| pattern.is_match(name)).cloned());
        if names.len() == before {
            return Err(Error::NoMatch { pattern: asked.clone() });
        }
    }
    // In the order in which they were asked for, each once.
    let mut seen = BTreeSet::new();
    names.retain(|name| seen.insert(name.clone()));
    Ok(names)
}

/// Longest pattern: several names' length.
const MAX_PATTERN: usize = 256;

fn matcher(pattern: &str) -> Result<GlobMatcher, Error> {
    if pattern.len() > MAX_PATTERN || pattern.contains(char::is_control) {
        let message = format!("expected patterns of at most {MAX_PATTERN} bytes, without control characters");
        return Err(Error::BadPattern(message));
    }
    let glob = Glob::new(pattern).map_err(|error| Error::BadPattern(error.to_string()))?;
    Ok(glob.compile_matcher())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_that_no_name_can_match_is_refused_unseen() {
        for pattern in ["*".repeat(MAX_PATTERN + 1), "[a-\0]".to_owned()] {
            let message = expand(&[pattern], &[]).unwrap_err().to_string();
            assert!(message.contains("at most 256 bytes"), "{message}");
        }
    }

    #[test]
    fn whatever_is_asked_for_becomes_names_that_were_asked_for_or_are_known() {
        let known = ["cart", "payments", "payment-api", "shop"].map(str::to_owned);
        let seeds = [
            r#"{"services": ["shop", "pay*", "[a-z]art", "{cart,shop}"], "all_matching": false, "observe": true, "dry_run": true}"#,
            r#"{"services": ["a@b.service"]}"#,
        ]
        .map(str::as_bytes);
        let words = [
            "\"",
            ",",
            "*",
            "**/",
            "?",
            "[",
            "]",
            "[!",
            "{",
            "}",
            "{a,",
            "\\\\",
            "../",
            "\\u0000",
            "\"shop\",",
            "[]",
            "{}",
        ];
        fuzz::damaged!(seeds, words, |input: &[u8]| {
            let Ok(change) = serde_json::from_slice::<api::Change>(input) else { return };
            match expand(&change.services, &known) {
                Ok(names) => {
                    assert!(!names.is_empty() && BTreeSet::from_iter(&names).len() == names.len());
                    assert!(names.iter().all(|name| check_name(name).is_ok()));
                    assert!(names.iter().all(|name| known.contains(name) || change.services.contains(name)));
                }
                Err(error) => assert!(!error.to_string().contains(char::is_control), "{error:?}"),
            }
        });
    }
}
