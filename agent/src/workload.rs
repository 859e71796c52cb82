//! What a service is on this host: from its name to the cgroup its processes are in.

pub(crate) mod systemd;

use crate::{
    config::{Config, Scope},
    redirect::Cgroup,
};
use std::{collections::HashMap, fs, io, path::Path, path::PathBuf, time::Duration, time::Instant};

/// How long a unit that does not run is not asked for again. Its own start attaches it in any case.
const ASK_AGAIN: Duration = Duration::from_secs(5);

/// A name that means nothing here.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unknown {
    /// Neither the configuration nor systemd knows it.
    #[error("no service `{name}`: the configuration does not name it and there is no unit {name}.service{}", hint(.closest))]
    Service {
        /// What was asked for.
        name: String,
        /// What may have been meant.
        closest: Vec<String>,
    },
    /// The configuration names a cgroup that is not there.
    #[error("service `{name}`: there is no cgroup {path} below {root}", root = .root.display())]
    Cgroup {
        /// The service.
        name: String,
        /// The cgroup.
        path: String,
        /// The cgroup2 mount.
        root: PathBuf,
    },
    /// The configuration names a unit that is not there.
    #[error("service `{name}`: there is no unit {unit}{}", hint(.closest))]
    Unit {
        /// The service.
        name: String,
        /// The unit.
        unit: String,
        /// What may have been meant.
        closest: Vec<String>,
    },
}

fn hint(names: &[String]) -> String {
    if names.is_empty() { String::new() } else { format!("; did you mean {}?", names.join(", ")) }
}

/// Finds cgroups, and remembers where units were.
#[derive(Debug)]
pub(crate) struct Workloads {
    cgroup_root: PathBuf,
    units: HashMap<String, UnitCgroup>,
}

#[derive(Debug)]
struct UnitCgroup {
    path: Option<String>,
    asked: Instant,
}

impl Workloads {
    /// Below a cgroup2 mount.
    pub(crate) fn new(cgroup_root: PathBuf) -> Self {
        Self { cgroup_root, units: HashMap::new() }
    }

    /// The cgroup2 mount.
    pub(crate) fn cgroup_root(&self) -> &Path {
        &self.cgroup_root
    }

    /// What a service is: what the configuration says, else the unit of its name. It has to be there.
    pub(crate) fn resolve(&self, config: &Config, name: &str) -> Result<Scope, Unknown> {
        let written = config.services.get(name).and_then(|service| service.scope.as_ref());
        match written {
            Some(Scope::Cgroup(path)) if !self.dir(path).is_dir() => {
                let root = self.cgroup_root.clone();
                Err(Unknown::Cgroup { name: name.to_owned(), path: path.clone(), root })
            }
            Some(Scope::Unit(unit)) if !systemd::is_loaded(unit) => {
                let closest = similar(unit, systemd::units());
                Err(Unknown::Unit { name: name.to_owned(), unit: unit.clone(), closest })
            }
            Some(scope) => Ok(scope.clone()),
            None => {
                let unit = implied_unit(name);
                if systemd::is_loaded(&unit) {
                    return Ok(Scope::Unit(unit));
                }
                let units = systemd::units()
                    .into_iter()
                    .filter_map(|unit| Some(unit.strip_suffix(".service")?.to_owned()));
                let known = config.services.keys().cloned().chain(units);
                Err(Unknown::Service { name: name.to_owned(), closest: similar(name, known) })
            }
        }
    }

    /// What a service that was resolved once is, whether it is there now or not.
    pub(crate) fn scope(config: &Config, name: &str) -> Scope {
        let written = config.services.get(name).and_then(|service| service.scope.clone());
        written.unwrap_or_else(|| Scope::Unit(implied_unit(name)))
    }

    /// The cgroup of a scope, if it exists now.
    pub(crate) fn cgroup(&mut self, scope: &Scope) -> Option<Cgroup> {
        match scope {
            Scope::Cgroup(path) => Cgroup::open(&self.dir(path)).ok(),
            Scope::Unit(unit) => self.unit_cgroup(unit),
        }
    }

    /// Takes note of where a unit is.
    pub(crate) fn learn(&mut self, unit: String, path: String) {
        self.units.insert(unit, UnitCgroup { path: Some(path), asked: Instant::now() });
    }

    /// The cgroup of a process.
    ///
    /// systemd runs a unit's control commands in a `.control` child where the unit is delegated.
    pub(crate) fn cgroup_of(&self, pid: i32) -> io::Result<Cgroup> {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let path = text.lines().find_map(|line| line.strip_prefix("0::"));
        let path = path.ok_or_else(|| io::Error::other("it has no cgroup2 line (0::/…)"))?;
        Cgroup::open(&self.dir(path.strip_suffix("/.control").unwrap_or(path)))
    }

    /// A cgroup's path, as the configuration writes it.
    pub(crate) fn path_of(&self, cgroup: &Cgroup) -> String {
        match cgroup.dir.strip_prefix(&self.cgroup_root) {
            Ok(below) => format!("/{}", below.display()),
            Err(_) => cgroup.dir.display().to_string(),
        }
    }

    /// The directory of a cgroup's path.
    pub(crate) fn dir(&self, path: &str) -> PathBuf {
        self.cgroup_root.join(path.trim_start_matches('/'))
    }

    fn unit_cgroup(&mut self, unit: &str) -> Option<Cgroup> {
        let known = self.units.get(unit);
        if let Some(cgroup) = known.and_then(|known| Cgroup::open(&self.dir(known.path.as_ref()?)).ok()) {
            return Some(cgroup);
        }
        if known.is_some_and(|known| known.asked.elapsed() < ASK_AGAIN) {
            return None;
        }
        let path = systemd::control_group(unit);
        let cgroup = path.as_ref().and_then(|path| Cgroup::open(&self.dir(path)).ok());
        self.units.insert(unit.to_owned(), UnitCgroup { path, asked: Instant::now() });
        cgroup
    }
}

fn implied_unit(name: &str) -> String {
    if name.ends_with(".service") { name.to_owned() } else { format!("{name}.service") }
}

/// The up to three names that are most alike, best first.
fn similar(name: &str, known: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut scored: Vec<(f64, String)> =
        known.into_iter().map(|other| (strsim::jaro_winkler(name, &other), other)).collect();
    scored.retain(|(score, _)| *score > 0.75);
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
    scored.dedup();
    scored.into_iter().take(3).map(|(_, name)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_alike_are_offered_best_first() {
        let known = ["payments", "payment-api", "shop", "paymentz"].map(str::to_owned);
        assert_eq!(similar("paymnts", known.clone()), ["payments", "paymentz", "payment-api"]);
        assert!(similar("zebra", known).is_empty());
    }

    #[test]
    fn a_service_nobody_knows_is_an_error_that_offers_what_the_configuration_has() {
        let config = Config::parse(Path::new("f"), "services: { payments: { cgroup: /x } }").unwrap();
        let workloads = Workloads::new(PathBuf::from("/nonexistent"));
        let message = workloads.resolve(&config, "paymets").unwrap_err().to_string();
        assert!(
            message.contains("no service `paymets`") && message.contains("did you mean payments?"),
            "{message}"
        );
        let message = workloads.resolve(&config, "payments").unwrap_err().to_string();
        assert!(message.contains("there is no cgroup /x below /nonexistent"), "{message}");
    }
}
