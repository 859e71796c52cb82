//! Random sequences of what operators do, against a model: what the kernel does is always what the model says.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::io::{Write, stderr};
use std::time::Duration;

use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};
use tests::{Agent, Footprint, INSTANCES, ORIGIN, Place, Proxy, Sandbox, Upstream, cgroup_path, wait_for};

scenarios![the_kernel_agrees_with_the_model];

/// In each mode; `MESH_REDIRECT_STEPS` says otherwise.
const STEPS: usize = 200;
/// Of one sequence, which begins with a host that has nothing of ours.
const LENGTH: usize = 20;
/// A cgroup that was made anew is found within a second, and what waits for connections to end goes soon after.
const SOON: Duration = Duration::from_secs(8);

const SERVICES: [(&str, Place); 2] = [("shop", Place::Shop), ("stock", Place::Stock)];

fn the_kernel_agrees_with_the_model(sandbox: &Sandbox) {
    let [a, b] = INSTANCES.map(|address| format!("{address}:8080"));
    let _servers = [
        Upstream::http(sandbox, "a", &[&a]),
        Upstream::http(sandbox, "b", &[&b]),
        Upstream::http(sandbox, "origin", &[&format!("{ORIGIN}:8080")]),
    ];
    let steps = env::var("MESH_REDIRECT_STEPS").map_or(STEPS, |steps| steps.parse().expect("a number"));
    let seed = *crate::differential::SEED;
    // Past the capture of a test's output, so that it is in every log.
    let _ = writeln!(stderr(), "model test: {}: MESH_REDIRECT_SEED={seed}", sandbox.mode.name());
    let config = Config {
        cases: u32::try_from(steps.div_ceil(LENGTH)).expect("not so many"),
        max_shrink_iters: 60,
        failure_persistence: None,
        ..Config::default()
    };
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let outcome = runner.run(&prop::collection::vec(step(), LENGTH), |steps| {
        World::new(sandbox).run(&steps).map_err(TestCaseError::fail)
    });
    match outcome {
        Err(TestError::Fail(reason, steps)) => panic!("{reason}\nafter {steps:#?}"),
        outcome => outcome.expect("sequences"),
    }
}

/// What an operator does, or what happens to a host.
#[derive(Debug, Clone)]
enum Step {
    Enable {
        services: Vec<&'static str>,
        observe: bool,
    },
    /// By a pattern for all of them.
    EnableAll,
    Disable(Vec<&'static str>),
    DisableAll,
    /// Shown, and not done.
    DryRun(&'static str),
    Reload(Policy),
    /// Of a file that is not one.
    ReloadNonsense,
    Restart,
    /// Killed, and started anew.
    Crash,
    /// Stopped, cleaned up after, and started anew.
    Cleanup,
    /// Of the proxy.
    Kill,
    Start,
    /// A service's cgroup goes, and comes again with its next process.
    Remake(Place),
    /// A command is run as a service.
    Exec(&'static str),
}

/// What agent.yaml says besides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Policy {
    All,
    Excluded,
    Closed,
}

impl Policy {
    fn settings(self) -> &'static str {
        match self {
            Self::All => "",
            Self::Excluded => "capture: { exclude: [{ ports: [8080] }] }\n",
            Self::Closed => "failure: closed\n",
        }
    }
}

fn step() -> impl Strategy<Value = Step> {
    let names = SERVICES.map(|(name, _)| name);
    let services = move || subsequence(names.to_vec(), 1..=names.len());
    let policy = select(vec![Policy::All, Policy::Excluded, Policy::Closed]);
    prop_oneof![
        6 => (services(), prop::bool::weighted(0.3))
            .prop_map(|(services, observe)| Step::Enable { services, observe }),
        1 => Just(Step::EnableAll),
        4 => services().prop_map(Step::Disable),
        1 => Just(Step::DisableAll),
        1 => select(names.to_vec()).prop_map(Step::DryRun),
        4 => policy.prop_map(Step::Reload),
        1 => Just(Step::ReloadNonsense),
        2 => Just(Step::Restart),
        2 => Just(Step::Crash),
        1 => Just(Step::Cleanup),
        2 => Just(Step::Kill),
        3 => Just(Step::Start),
        1 => select(SERVICES.map(|(_, place)| place).to_vec()).prop_map(Step::Remake),
        1 => select(names.to_vec()).prop_map(Step::Exec),
    ]
}

/// What there should be.
#[derive(Debug, Clone)]
struct Model {
    /// By name, and whether it is only observed.
    enabled: BTreeMap<&'static str, bool>,
    policy: Policy,
    proxy: bool,
}

/// Whom a connection of a service reaches.
#[derive(Debug, PartialEq, Eq)]
enum Reaches {
    Proxy,
    Origin,
    Nobody,
}

impl Model {
    fn apply(&mut self, step: &Step) {
        match step {
            Step::Enable { services, observe } => {
                self.enabled.extend(services.iter().map(|service| (*service, *observe)));
            }
            Step::EnableAll => self.enabled.extend(SERVICES.map(|(name, _)| (name, false))),
            Step::Disable(services) => self.enabled.retain(|name, _| !services.contains(name)),
            Step::DisableAll | Step::Cleanup => self.enabled.clear(),
            Step::Reload(policy) => self.policy = *policy,
            Step::Kill => self.proxy = false,
            Step::Start => self.proxy = true,
            Step::DryRun(_)
            | Step::ReloadNonsense
            | Step::Restart
            | Step::Crash
            | Step::Remake(_)
            | Step::Exec(_) => {}
        }
    }

    fn expects(&self, service: &str) -> Reaches {
        let is_steered = self.enabled.get(service) == Some(&false) && self.policy != Policy::Excluded;
        match (is_steered, self.proxy, self.policy) {
            (false, ..) | (true, false, Policy::All | Policy::Excluded) => Reaches::Origin,
            (true, true, _) => Reaches::Proxy,
            (true, false, Policy::Closed) => Reaches::Nobody,
        }
    }
}

/// A host and its model.
struct World<'s> {
    sandbox: &'s Sandbox,
    model: Model,
    agent: Option<Agent<'s>>,
    proxy: Option<Proxy<'s>>,
}

impl<'s> World<'s> {
    fn new(sandbox: &'s Sandbox) -> Self {
        Agent::configure(sandbox, Policy::All.settings());
        Agent::command(sandbox, &["cleanup"]).ok();
        for (_, place) in SERVICES {
            sandbox.program(place, "true").run().ok();
        }
        let proxy = Some(Proxy::start(sandbox));
        let model = Model { enabled: BTreeMap::new(), policy: Policy::All, proxy: true };
        Self { sandbox, model, agent: Some(Agent::restart(sandbox)), proxy }
    }

    fn run(mut self, steps: &[Step]) -> Result<(), String> {
        for (number, step) in (1..).zip(steps) {
            self.act(step);
            self.model.apply(step);
            let mut said = None;
            let agrees = wait_for(SOON, || {
                said = self.disagrees();
                said.is_none().then_some(())
            });
            if agrees.is_none() {
                let log = self.agent.as_ref().map(Agent::log).unwrap_or_default();
                return Err(format!("step {number}, {step:?}: {said:?}, of {:?}\n{log}", self.model));
            }
        }
        Ok(())
    }

    fn act(&mut self, step: &Step) {
        match step {
            Step::Enable { services, observe } => {
                let observe = observe.then_some("--observe");
                let args: Vec<&str> = ["enable"].into_iter().chain(observe).chain(services.clone()).collect();
                Agent::command(self.sandbox, &args).ok();
            }
            Step::EnableAll => self.command(&["enable", "s*"], true),
            Step::Disable(services) => {
                self.command(&[&["disable"], &services[..]].concat(), true);
            }
            // Nothing matches where nothing is enabled, or all that is are commands.
            Step::DisableAll => self.command(&["disable", "s*"], !self.model.enabled.is_empty()),
            Step::DryRun(service) => self.command(&["enable", "--dry-run", service], true),
            Step::Reload(policy) => {
                Agent::configure(self.sandbox, policy.settings());
                self.command(&["reload"], true);
            }
            Step::ReloadNonsense => {
                Agent::configure(self.sandbox, "capture: nonsense\n");
                Agent::program(self.sandbox, &["reload"]).run().failed_with(2);
                Agent::configure(self.sandbox, self.model.policy.settings());
            }
            Step::Restart => {
                self.agent.take().expect("a daemon").stop();
                self.agent = Some(Agent::restart(self.sandbox));
            }
            Step::Crash => {
                self.agent.take().expect("a daemon").sigkill();
                self.agent = Some(Agent::restart(self.sandbox));
            }
            Step::Cleanup => {
                self.agent.take().expect("a daemon").stop();
                self.command(&["cleanup"], true);
                self.agent = Some(Agent::restart(self.sandbox));
            }
            Step::Kill => {
                if let Some(proxy) = self.proxy.take() {
                    proxy.sigkill();
                }
            }
            Step::Start if self.proxy.is_some() => {}
            Step::Start => self.proxy = Some(Proxy::start(self.sandbox)),
            Step::Remake(place) => {
                // A process that has just ended may still be there.
                let path = cgroup_path(&self.sandbox.cgroup(*place));
                wait_for(SOON, || fs::remove_dir(&path).is_ok().then_some(())).expect("remove a cgroup");
                self.sandbox.program(*place, "true").run().ok();
            }
            Step::Exec(service) => self.command(&["exec", service, "--", "true"], true),
        }
    }

    fn command(&self, args: &[&str], succeeds: bool) {
        let finished = Agent::command(self.sandbox, args);
        assert!(!succeeds || finished.succeeded(), "{args:?}: {finished:?}");
    }

    /// In what the host differs from the model.
    fn disagrees(&self) -> Option<String> {
        let enabled = self.enabled();
        if enabled
            != self.model.enabled.iter().map(|(name, observe)| ((*name).to_owned(), *observe)).collect()
        {
            return Some(format!("enabled are {enabled:?}"));
        }
        if self.model.enabled.is_empty() && !Footprint::of(self.sandbox).is_empty() {
            return Some("something is left in the kernel".to_owned());
        }
        SERVICES.iter().find_map(|(name, place)| {
            let (reached, expected) = (self.reached(*place), self.model.expects(name));
            (reached != expected).then(|| format!("{name} reaches {reached:?} and not {expected:?}"))
        })
    }

    /// As the daemon says.
    fn enabled(&self) -> BTreeMap<String, bool> {
        let status = Agent::command(self.sandbox, &["status", "--json"]);
        let status: serde_json::Value = serde_json::from_str(&status.stdout).expect("a status");
        let services = status["services"].as_array().expect("services").iter();
        let enabled = services.filter(|service| service["enabled"] == true);
        let named = enabled.map(|service| (service["name"].as_str().unwrap_or_default().to_owned(), service));
        named.map(|(name, service)| (name, service["observe"] == true)).collect()
    }

    /// As a connection finds out.
    fn reached(&self, place: Place) -> Reaches {
        let asked = tests::ask(self.sandbox, place, &format!("{ORIGIN}:8080"));
        match (asked.succeeded(), asked.stdout.trim()) {
            (true, "a" | "b") => Reaches::Proxy,
            (true, "origin") => Reaches::Origin,
            _ => Reaches::Nobody,
        }
    }
}
