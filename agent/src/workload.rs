//! What a service is on this host: from its name to the cgroup its processes are in.

mod conmon;
mod container;
pub(crate) mod hooks_dir;
pub(crate) mod oci;
mod program;
pub(crate) mod started;
pub(crate) mod systemd;

use crate::{
    config::{Config, Scope},
    redirect::Cgroup,
};
use std::{
    collections::{BTreeSet, HashMap},
    fs, io,
    path::Path,
    path::PathBuf,
    time::Duration,
    time::Instant,
};

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
    /// Nobody can say what units there are.
    #[error(transparent)]
    Systemd(#[from] io::Error),
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
    /// Ids of containers by their names, and when they were asked for.
    containers: HashMap<String, (Option<String>, Instant)>,
}

#[derive(Debug)]
struct UnitCgroup {
    is_loaded: bool,
    path: Option<String>,
    asked: Instant,
}

impl Workloads {
    /// Below a cgroup2 mount.
    pub(crate) fn new(cgroup_root: PathBuf) -> Self {
        Self { cgroup_root, units: HashMap::new(), containers: HashMap::new() }
    }

    /// The cgroup2 mount.
    pub(crate) fn cgroup_root(&self) -> &Path {
        &self.cgroup_root
    }

    /// What services are: what the configuration says, else the units of their names. They have to be there.
    pub(crate) fn resolve(&mut self, config: &Config, names: &[String]) -> Result<Vec<Scope>, Unknown> {
        let scopes: Vec<Scope> = names.iter().map(|name| Self::scope(config, name)).collect();
        self.ask(scopes.iter().filter_map(Scope::unit))?;
        for (name, scope) in names.iter().zip(&scopes) {
            self.check(config, name, scope)?;
        }
        Ok(scopes)
    }

    fn check(&self, config: &Config, name: &str, scope: &Scope) -> Result<(), Unknown> {
        let name = name.to_owned();
        match scope {
            Scope::Cgroup(path) if !self.dir(path).is_dir() => {
                Err(Unknown::Cgroup { name, path: path.clone(), root: self.cgroup_root.clone() })
            }
            Scope::Unit(unit) if !self.units.get(unit).is_some_and(|known| known.is_loaded) => {
                let named = config.services.get(&name).is_some_and(|service| service.scope.is_some());
                if named {
                    let closest = similar(unit, systemd::units());
                    return Err(Unknown::Unit { name, unit: unit.clone(), closest });
                }
                let known = config.services.keys().cloned().chain(unit_services());
                Err(Unknown::Service { closest: similar(&name, known), name })
            }
            _ => Ok(()),
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
            Scope::User(user) => Cgroup::open(&self.dir(&user_slice(*user))).ok(),
            Scope::UserUnit { user, unit } => {
                let manager = self.dir(&format!("{}/user@{user}.service", user_slice(*user)));
                below(&manager, USER_UNIT_DEPTH, &|name| name == unit)
            }
            Scope::Container(name) => self.container(name),
        }
    }

    /// Takes note of where a unit is.
    pub(crate) fn learn(&mut self, unit: String, path: String) {
        self.units.insert(unit, UnitCgroup { is_loaded: true, path: Some(path), asked: Instant::now() });
    }

    /// The cgroup of a process.
    ///
    /// systemd runs a unit's control commands in a `.control` child where the unit is delegated.
    pub(crate) fn cgroup_of(&self, pid: i32) -> io::Result<Cgroup> {
        let path = path_of_process(pid)?;
        Cgroup::open(&self.dir(path.strip_suffix("/.control").unwrap_or(&path)))
    }

    /// The id that a runtime gave to the container of this name, where it runs.
    pub(crate) fn container_id(&mut self, name: &str) -> Option<String> {
        self.container(name)?;
        self.containers.get(name)?.0.clone()
    }

    /// Cgroups of a service's containers that were seen starting, and are still there.
    pub(crate) fn started(&self, run: &Path, service: &str) -> Vec<Cgroup> {
        let paths = started::cgroups(run, service).into_iter();
        paths.filter_map(|path| Cgroup::open(&self.dir(&path.to_string_lossy())).ok()).collect()
    }

    /// A cgroup's path, as the configuration writes it.
    pub(crate) fn path_of(&self, cgroup: &Cgroup) -> String {
        self.path_of_dir(&cgroup.dir)
    }

    /// The same of its directory.
    pub(crate) fn path_of_dir(&self, dir: &Path) -> String {
        match dir.strip_prefix(&self.cgroup_root) {
            Ok(below) => format!("/{}", below.display()),
            Err(_) => dir.display().to_string(),
        }
    }

    /// The directory of a cgroup's path.
    pub(crate) fn dir(&self, path: &str) -> PathBuf {
        self.cgroup_root.join(path.trim_start_matches('/'))
    }

    /// The runtime is asked for the id only where no cgroup bears the name, and not again and again.
    fn container(&mut self, name: &str) -> Option<Cgroup> {
        let found = |id: &str| below(&self.cgroup_root, CONTAINER_DEPTH, &|dir| container::is_named(dir, id));
        if let Some(cgroup) = found(name) {
            return Some(cgroup);
        }
        if let Some((id, asked)) = self.containers.get(name) {
            let cgroup = id.as_deref().and_then(found);
            // One that is made anew has another id.
            if cgroup.is_some() || asked.elapsed() < ASK_AGAIN {
                return cgroup;
            }
        }
        let id = container::id(name);
        self.containers.insert(name.to_owned(), (id.clone(), Instant::now()));
        found(&id?)
    }

    /// Forgets where units were: a unit that did not run a moment ago may do so now.
    pub(crate) fn forget_units(&mut self) {
        self.units.clear();
    }

    /// Asks systemd for those of these units whose cgroup is not known and there, all at once.
    pub(crate) fn look_up<'u>(&mut self, units: impl Iterator<Item = &'u str>) -> io::Result<()> {
        let unknown = |unit: &&str| match self.units.get(*unit) {
            Some(known) => known.asked.elapsed() >= ASK_AGAIN && self.open(known).is_none(),
            None => true,
        };
        let unknown: Vec<&str> = units.filter(unknown).collect();
        self.ask(unknown.into_iter())
    }

    fn ask<'u>(&mut self, units: impl Iterator<Item = &'u str>) -> io::Result<()> {
        let units: Vec<&str> = units.collect();
        let asked = Instant::now();
        for (unit, systemd::Unit { is_loaded, control_group: path }) in systemd::show(&units)? {
            self.units.insert(unit.to_owned(), UnitCgroup { is_loaded, path, asked });
        }
        Ok(())
    }

    fn unit_cgroup(&mut self, unit: &str) -> Option<Cgroup> {
        if let Err(error) = self.look_up([unit].into_iter()) {
            tracing::warn!("{error}");
        }
        self.open(self.units.get(unit)?)
    }

    fn open(&self, unit: &UnitCgroup) -> Option<Cgroup> {
        Cgroup::open(&self.dir(unit.path.as_ref()?)).ok()
    }
}

/// The path of a process's cgroup, below the cgroup2 mount.
pub(crate) fn path_of_process(pid: i32) -> io::Result<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    cgroup2_path(&text).map(str::to_owned).ok_or_else(|| io::Error::other("it has no cgroup2 line (0::/…)"))
}

/// Of the text of proc_pid_cgroup(5).
fn cgroup2_path(text: &str) -> Option<&str> {
    text.lines().find_map(|line| line.strip_prefix("0::")).filter(|path| path.starts_with('/'))
}

/// A process and all that descend from it; none where it is not there.
pub(crate) fn descendants(pid: u32) -> BTreeSet<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let parents: Vec<(u32, u32)> = pids.filter_map(|pid| Some((pid, parent(pid)?))).collect();
    let mut found: BTreeSet<u32> =
        parents.iter().map(|(pid, _)| *pid).filter(|found| *found == pid).collect();
    loop {
        let is_child = |(pid, parent): &&(u32, u32)| found.contains(parent) && !found.contains(pid);
        let children: Vec<u32> = parents.iter().filter(is_child).map(|(pid, _)| *pid).collect();
        if children.is_empty() {
            return found;
        }
        found.extend(children);
    }
}

/// The parent of a process; none of one that has ended and only waits to be counted.
fn parent(pid: u32) -> Option<u32> {
    parent_of(&fs::read(format!("/proc/{pid}/stat")).ok()?)
}

/// The fourth field (proc_pid_stat(5)).
fn parent_of(stat: &[u8]) -> Option<u32> {
    // The second field, a name, may hold anything.
    let stat = String::from_utf8_lossy(stat);
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    fields.next().filter(|state| *state != "Z")?;
    fields.next()?.parse().ok()
}

/// Services by the names of this host's units.
pub(crate) fn unit_services() -> impl Iterator<Item = String> {
    let name = |unit: String| Some(unit.strip_suffix(".service")?.to_owned());
    systemd::units().into_iter().filter_map(name)
}

/// How deep below its user's manager a unit is: in a slice of the application, or in a slice of that.
const USER_UNIT_DEPTH: u32 = 3;
/// How deep below the root a container is: in the slices of Kubernetes, a pod's and a class's.
const CONTAINER_DEPTH: u32 = 6;

fn user_slice(user: u32) -> String {
    format!("/user.slice/user-{user}.slice")
}

/// The first cgroup below a directory whose name is the one that is looked for; nearer ones first.
fn below(dir: &Path, depth: u32, is_it: &dyn Fn(&str) -> bool) -> Option<Cgroup> {
    let mut level = vec![dir.to_owned()];
    for _ in 0..depth {
        let entries = level.iter().flat_map(|dir| fs::read_dir(dir).into_iter().flatten().flatten());
        let dirs: Vec<PathBuf> = entries
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| entry.path())
            .collect();
        let named = |dir: &&PathBuf| dir.file_name().and_then(|name| name.to_str()).is_some_and(is_it);
        if let Some(found) = dirs.iter().find(named) {
            return Cgroup::open(found).ok();
        }
        level = dirs;
    }
    None
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
        let mut workloads = Workloads::new(PathBuf::from("/nonexistent"));
        let mut resolve =
            |name: &str| workloads.resolve(&config, &[name.to_owned()]).unwrap_err().to_string();
        let message = resolve("paymets");
        assert!(
            message.contains("no service `paymets`") && message.contains("did you mean payments?"),
            "{message}"
        );
        let message = resolve("payments");
        assert!(message.contains("there is no cgroup /x below /nonexistent"), "{message}");
    }

    #[test]
    fn a_process_is_in_the_cgroup_of_the_cgroup2_line() {
        let seeds: [&[u8]; 2] = [b"12:cpu:/a\n1:name=systemd:/b\n0::/system.slice/shop.service\n", b"0::/\n"];
        fuzz::damaged!(seeds, ["0::", ":", "/", "/../", " (deleted)", "\r"], |input: &[u8]| {
            let text = String::from_utf8_lossy(input);
            let Some(path) = cgroup2_path(&text) else { return };
            assert!(path.starts_with('/') && !path.contains('\n') && text.contains(&format!("0::{path}")));
        });
    }

    #[test]
    fn a_process_has_the_parent_that_stands_after_its_name_whatever_its_name_is() {
        let stat = |name: &[u8], rest: &str| [b"7 (", name, b") ", rest.as_bytes()].concat();
        assert_eq!(parent_of(&stat(b"sh", "Z 3 7 7")), None);
        let seeds: [&[u8]; 3] = [b"sh", b"a) S 1 (b", b"\xff\n"];
        fuzz::damaged!(seeds, ["(", ")", ") R 1 ", " ", "Z"], |name: &[u8]| {
            assert_eq!(parent_of(&stat(name, "S 4294967295 7 7")), Some(u32::MAX));
            let _whatever = parent_of(name);
        });
    }
}
