//! What somebody else has changed: chains, sets and counters by their names, rules and elements by their number.

use super::{
    Desired, Drift, Error, Nftables,
    kernel::Kernel,
    message,
    ruleset::{ALIVE, ALIVE_DNS, Ruleset, TABLE},
};
use std::collections::{BTreeMap, BTreeSet};

impl Nftables {
    /// See [`super::super::Redirect::drift`].
    pub(crate) fn drift(&mut self, desired: &Desired) -> Result<Vec<Drift>, Error> {
        // It may have to stay without a service.
        if desired.services.is_empty() {
            return Ok(Vec::new());
        }
        let ruleset = Ruleset::new(desired, &self.cgroup_root);
        let findings = find(self.kernel()?, &ruleset)?;
        self.is_changed |= !findings.is_empty();
        Ok(findings.into_iter().map(Drift::of_all).collect())
    }
}

fn find(kernel: &Kernel, ruleset: &Ruleset) -> Result<Vec<String>, Error> {
    let present = kernel.present()?;
    if present == message::Present::default() {
        return Ok(vec![format!("the table inet {TABLE} is missing")]);
    }
    if kernel.fingerprint()? != Some(ruleset.fingerprint()) {
        return Ok(vec![format!("the table inet {TABLE} is not the one that is wanted")]);
    }
    let alive = [ALIVE, ALIVE_DNS].map(str::to_owned);
    let sets: BTreeSet<String> = ruleset.sets.iter().map(|set| set.name.clone()).chain(alive).collect();
    let chains: BTreeMap<String, usize> =
        ruleset.chains.iter().map(|chain| (chain.name.clone(), chain.rules.len())).collect();
    let mut found = names("chain", &chains.keys().cloned().collect(), &present.chains);
    found.extend(names("set", &sets, &present.sets));
    found.extend(names("counter", &ruleset.counters, &present.counters));
    let rules = kernel.rules()?;
    for (chain, wanted) in chains.iter().filter(|(chain, _)| present.chains.contains(*chain)) {
        found.extend(number("chain", chain, "rules", *wanted, rules.get(chain).copied().unwrap_or_default()));
    }
    for set in ruleset.sets.iter().filter(|set| present.sets.contains(&set.name)) {
        let wanted = message::elements(&set.content).len();
        found.extend(number("set", &set.name, "elements", wanted, kernel.elements(&set.name)?));
    }
    Ok(found)
}

fn names(kind: &str, wanted: &BTreeSet<String>, present: &BTreeSet<String>) -> Vec<String> {
    let missing =
        wanted.difference(present).map(|name| format!("the {kind} {name} is missing in inet {TABLE}"));
    let foreign =
        present.difference(wanted).map(|name| format!("the {kind} {name} in inet {TABLE} is not ours"));
    missing.chain(foreign).collect()
}

fn number(kind: &str, name: &str, of: &str, wanted: usize, there: usize) -> Option<String> {
    (wanted != there)
        .then(|| format!("the {kind} {name} in inet {TABLE} has {there} {of}, and {wanted} are wanted"))
}
