//! Whatever dies when: the agent is killed between every two steps that change something, and nothing is left behind.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tests::{
    Agent, Answers, Build, INSTANCES, Mode, ORIGIN, Place, Process, Proxy, Sandbox, Snapshot, Upstream,
    wait_for,
};

scenarios![everywhere: a_kill_at_any_step_leaves_nothing_behind];

const SOON: Duration = Duration::from_secs(3);
/// Another ABI version stays for a second at least.
const RETIRED: Duration = Duration::from_secs(10);

fn a_kill_at_any_step_leaves_nothing_behind(sandbox: &Sandbox) {
    let [a, b] = INSTANCES.map(|address| format!("{address}:8080"));
    let _servers = [
        Upstream::http(sandbox, "a", &[&a]),
        Upstream::http(sandbox, "b", &[&b]),
        Upstream::http(sandbox, "origin", &[&format!("{ORIGIN}:8080")]),
    ];
    let _proxy = Proxy::start(sandbox);
    for place in [Place::Shop, Place::Stock, Place::Cart, Place::Outside] {
        sandbox.with_systemd(place, "true").run().ok();
    }
    for unit in ["till", "register"] {
        sandbox.program_in(unit, "true").run().ok();
    }
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let bystander = scope.spawn(|| bystander(sandbox, &done));
        let ended = Ended(&done);
        let (mut kills, mut distinct) = (0, BTreeSet::new());
        let mut faults = Vec::new();
        for scenario in SCENARIOS.iter().filter(|scenario| (scenario.applies)(sandbox.mode)) {
            kills += Rig::new(sandbox, scenario).kill_at_every_point(&mut distinct, &mut faults);
        }
        drop(ended);
        let asked = bystander.join().expect("a bystander that noticed nothing");
        println!(
            "{} points, {kills} kills, {asked} connections of a service that is not enabled",
            distinct.len()
        );
        assert!(faults.is_empty(), "{}", faults.join("\n"));
    });
}

/// Lets the bystander go, also after a panic.
struct Ended<'d>(&'d AtomicBool);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A service that is not enabled, and never notices anything.
fn bystander(sandbox: &Sandbox, done: &AtomicBool) -> usize {
    let mut asked = 0;
    while !done.load(Ordering::Relaxed) {
        let load =
            sandbox.peer(Place::Cart).args(["load", &format!("{ORIGIN}:8080"), "1", "500", "50"]).run();
        let answers: Answers = serde_json::from_str(load.ok()).expect("the answers as JSON");
        answers.are_from(&["origin"]);
        asked += answers.total();
    }
    asked
}

/// Something that is done to a host.
struct Scenario {
    name: &'static str,
    /// Whether there is systemd.
    with_systemd: bool,
    applies: fn(Mode) -> bool,
    /// What is there before, which nobody disturbs.
    before: fn(&mut Rig<'_>),
    /// What is disturbed. It is done again until the end where a daemon was killed.
    act: fn(&mut Rig<'_>),
}

/// Where points that are passed are written, and how it begins while they count (agent/src/fault.rs).
const LOG: &str = "points";
const ARMED: &str = "armed\n";

const SCENARIOS: [Scenario; 15] = [
    Scenario {
        name: "a daemon starts with nothing enabled, and the first service is enabled",
        with_systemd: false,
        applies: |_| true,
        before: |_| {},
        act: |rig| {
            rig.start();
            rig.command(&["enable", "shop"]);
        },
    },
    Scenario {
        name: "another service is enabled",
        with_systemd: false,
        applies: |_| true,
        before: |rig| rig.started_with(&["shop"]),
        act: |rig| rig.command(&["enable", "stock"]),
    },
    Scenario {
        name: "one of two services is disabled",
        with_systemd: false,
        applies: |_| true,
        before: |rig| rig.started_with(&["shop", "stock"]),
        act: |rig| rig.command(&["disable", "shop"]),
    },
    Scenario {
        name: "the last service is disabled",
        with_systemd: false,
        applies: |_| true,
        before: |rig| rig.started_with(&["shop"]),
        act: |rig| rig.command(&["disable", "shop"]),
    },
    Scenario {
        name: "a daemon starts with a service enabled",
        with_systemd: false,
        applies: |_| true,
        before: |rig| {
            rig.started_with(&["shop"]);
            rig.stop();
        },
        act: |rig| rig.start(),
    },
    Scenario {
        name: "a daemon starts with another mode",
        with_systemd: false,
        applies: |_| true,
        before: |rig| {
            rig.started_with(&["shop"]);
            rig.stop();
            let mode = if rig.sandbox.mode == Mode::Nftables { "ebpf" } else { "nftables" };
            rig.configure(mode, "");
        },
        act: |rig| rig.start(),
    },
    Scenario {
        name: "a unit attaches itself after a boot, without a daemon",
        with_systemd: false,
        applies: |mode| mode == Mode::Ebpf,
        before: |rig| {
            rig.started_with(&["shop"]);
            rig.stop();
            fs::remove_dir_all(rig.sandbox.pins()).expect("remove the pins, as a boot does");
        },
        act: |rig| rig.command_at(Place::Shop, &["attach", "shop"]),
    },
    Scenario {
        name: "a service that is a container is enabled and disabled",
        with_systemd: false,
        applies: |mode| mode == Mode::Nftables,
        before: |rig| {
            rig.configure(rig.sandbox.mode.name(), "  web: { container: web }\n");
            rig.started_with(&["stock"]);
        },
        act: |rig| {
            rig.command(&["enable", "web"]);
            rig.command(&["disable", "web"]);
        },
    },
    Scenario {
        name: "a service that is a unit is enabled and disabled",
        with_systemd: true,
        applies: |mode| mode == Mode::Hosts,
        before: |rig| {
            rig.configure(rig.sandbox.mode.name(), TILL);
            rig.started_with(&["stock"]);
        },
        act: |rig| {
            rig.command(&["enable", "till"]);
            rig.command(&["disable", "till"]);
        },
    },
    Scenario {
        name: "a daemon starts when a service is another unit than it was",
        with_systemd: true,
        applies: |mode| mode == Mode::Hosts,
        before: |rig| {
            rig.configure(rig.sandbox.mode.name(), TILL);
            rig.started_with(&["till"]);
            rig.stop();
            rig.configure(rig.sandbox.mode.name(), "  till: { unit: register.service }\n");
        },
        act: |rig| rig.start(),
    },
    Scenario {
        name: "a command is run as a service",
        with_systemd: false,
        applies: |mode| mode == Mode::Nftables,
        before: |rig| rig.started_with(&["shop"]),
        act: |rig| {
            let service = format!("probe-{}", rig.sandbox.mark());
            rig.command(&["exec", &service, "--", "true"]);
            // What is made first is forgotten last.
            let journal = rig.sandbox.path("state/journal.json");
            let is_noted = || fs::read_to_string(&journal).is_ok_and(|text| text.contains(&service));
            wait_for(SOON, || (!is_noted() || !rig.is_running()).then_some(()));
        },
    },
    Scenario {
        name: "the configuration is read anew",
        with_systemd: false,
        applies: |_| true,
        before: |rig| rig.started_with(&["shop"]),
        act: |rig| {
            rig.configure(rig.sandbox.mode.name(), "failure: closed\ncapture: { exclude: [10.88.0.0/16] }\n");
            rig.command(&["reload"]);
        },
    },
    Scenario {
        name: "an agent of another ABI takes over",
        with_systemd: false,
        applies: |mode| mode == Mode::Ebpf,
        before: |rig| {
            rig.build = Build::ChangedAbi;
            rig.started_with(&["shop"]);
        },
        act: |rig| rig.take_over(Build::Plain),
    },
    Scenario {
        name: "an agent of another ABI takes over again",
        with_systemd: false,
        applies: |mode| mode == Mode::Ebpf,
        before: |rig| rig.started_with(&["shop"]),
        act: |rig| rig.take_over(Build::ChangedAbi),
    },
    Scenario {
        name: "cleanup",
        with_systemd: false,
        applies: |_| true,
        before: |rig| {
            rig.started_with(&["shop", "stock"]);
            rig.stop();
        },
        act: |rig| {
            if rig.daemon.is_some() {
                rig.stop();
            }
            rig.command(&["cleanup"]);
        },
    },
];

const TILL: &str = "  till: { unit: till.service }\n";

/// A scenario on a host.
struct Rig<'s> {
    sandbox: &'s Sandbox,
    scenario: &'s Scenario,
    daemon: Option<Process>,
    /// At which point the agent kills itself.
    kill: Option<usize>,
    build: Build,
    /// The host before everything.
    pristine: Snapshot,
}

impl<'s> Rig<'s> {
    fn new(sandbox: &'s Sandbox, scenario: &'s Scenario) -> Self {
        // Daemons open it before they confine themselves.
        fs::write(sandbox.path(LOG), "").expect("make the file of the points");
        Self {
            sandbox,
            scenario,
            daemon: None,
            kill: None,
            build: Build::Plain,
            pristine: Snapshot::of(sandbox),
        }
    }

    /// As many times as there are points in the undisturbed run.
    fn kill_at_every_point(mut self, distinct: &mut BTreeSet<String>, faults: &mut Vec<String>) -> usize {
        let begun = Instant::now();
        let (points, end) = self.undisturbed();
        assert!(
            !points.is_empty(),
            "{}: no point was passed: the agent was built without its feature `fault-points`",
            self.scenario.name
        );
        distinct.extend(points.iter().cloned());
        let mut kills = 0;
        for (number, point) in chosen(&points) {
            let at = format!("{}, killed at {number} of {}, {point}", self.scenario.name, points.len());
            kills += usize::from(self.disturb(number, &at));
            if number % 2 == 0 {
                faults.extend(self.go_on(&end).into_iter().map(|fault| format!("{at}, restarted: {fault}")));
            }
            faults.extend(self.clean_up().into_iter().map(|fault| format!("{at}, cleaned up: {fault}")));
        }
        println!("{}: {} points, {kills} kills in {:?}", self.scenario.name, points.len(), begun.elapsed());
        kills
    }

    /// The points that are passed, and what is there in the end.
    fn undisturbed(&mut self) -> (Vec<String>, Snapshot) {
        self.begin(None);
        (self.scenario.act)(self);
        let points = self.passed();
        self.disarm();
        self.run_on();
        let end = self.settled();
        let left = self.clean_up();
        assert!(left.is_empty(), "{}: {left:#?}", self.scenario.name);
        (points, end)
    }

    /// Kills whoever passes a point. False where nobody came so far: what is done again and again is not done as often each time.
    fn disturb(&mut self, number: usize, at: &str) -> bool {
        self.begin(Some(number));
        (self.scenario.act)(self);
        let passed = self.passed().len();
        assert!(passed <= number, "{at}: nobody was killed");
        self.disarm();
        // A daemon may not have come by this time.
        if let Some(mut daemon) = self.daemon.take() {
            if daemon.is_running() {
                daemon.signal(nix::sys::signal::Signal::SIGKILL);
            }
            daemon.ended();
        }
        passed == number
    }

    fn begin(&mut self, kill: Option<usize>) {
        self.configure(self.sandbox.mode.name(), "");
        self.build = Build::Plain;
        self.kill = kill;
        (self.scenario.before)(self);
        fs::write(self.log(), ARMED).expect("arm the points");
    }

    fn disarm(&mut self) {
        self.kill = None;
        fs::write(self.log(), "").expect("disarm the points");
    }

    /// A daemon goes on from there, and does in the end what was asked for. What is not as it shall be then.
    fn go_on(&mut self, end: &Snapshot) -> Vec<String> {
        self.start();
        (self.scenario.act)(self);
        self.run_on();
        wait_for(SOON, || self.settled().differences(end).is_empty().then_some(()));
        self.settled().differences(end)
    }

    /// What is left then.
    fn clean_up(&mut self) -> Vec<String> {
        self.daemon = None;
        let finished = self.program(Place::Outside, &["cleanup"]).run();
        let left = Snapshot::of(self.sandbox).differences(&self.pristine);
        if finished.succeeded() { left } else { [vec![finished.stderr], left].concat() }
    }

    /// What is there, but for who wrote it and when.
    fn settled(&self) -> Snapshot {
        Snapshot::of(self.sandbox).with(|name, what| {
            if name == "nft list ruleset" {
                // In which order chains were made makes no difference.
                let mut lines: Vec<&str> = what.lines().collect();
                lines.sort_unstable();
                *what = lines.join("\n");
            }
            if name.ends_with("agent.lock") {
                what.truncate(6);
            }
            if name.ends_with("enabled.json") {
                *what = without_numbers_after("since", what);
            }
        })
    }

    /// Which points were.
    fn passed(&self) -> Vec<String> {
        let said = fs::read_to_string(self.log()).expect("the file of the points");
        said.lines().skip(1).map(str::to_owned).collect()
    }

    fn log(&self) -> PathBuf {
        self.sandbox.path(LOG)
    }

    fn configure(&self, mode: &str, settings: &str) {
        let yaml = Agent::yaml(self.sandbox, settings);
        let own = format!("mode: {}\n", self.sandbox.mode.name());
        let yaml = yaml.replacen(&own, &format!("mode: {mode}\n"), 1);
        fs::write(self.sandbox.path("agent.yaml"), yaml).expect("write agent.yaml");
    }

    fn started_with(&mut self, services: &[&str]) {
        self.start();
        self.command(&[&["enable"], services].concat());
    }

    fn is_running(&mut self) -> bool {
        self.daemon.as_mut().is_some_and(Process::is_running)
    }

    /// Starts the daemon unless it runs, and waits until it is ready, or killed.
    fn start(&mut self) {
        if self.is_running() {
            return;
        }
        let mut daemon = self.program(Place::Outside, &["run"]).serve(self.sandbox.path("agent.log"));
        let socket = self.sandbox.path("run/agent.sock");
        let ready = || UnixStream::connect(&socket).is_ok();
        let settled = wait_for(SOON, || (ready() || !daemon.is_running()).then_some(()));
        assert!(settled.is_some(), "the daemon neither got ready nor ended: {}", daemon.log());
        self.daemon = Some(daemon);
    }

    /// A daemon runs, whether or not it did.
    fn run_on(&mut self) {
        self.start();
        let log = fs::read_to_string(self.sandbox.path("agent.log")).unwrap_or_default();
        assert!(self.is_running(), "{}: the daemon has ended: {log}", self.scenario.name);
    }

    fn stop(&mut self) {
        let mut daemon = self.daemon.take().expect("a daemon");
        daemon.signal(nix::sys::signal::Signal::SIGTERM);
        assert!(daemon.ended().success());
    }

    /// The daemon gives way to one of another build, or of the same: until nothing of the other one is left.
    fn take_over(&mut self, build: Build) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.signal(nix::sys::signal::Signal::SIGTERM);
            daemon.ended();
        }
        self.build = build;
        self.start();
        let pins = self.sandbox.pins().to_owned();
        let is_alone = || fs::read_dir(&pins).is_ok_and(|versions| versions.count() == 1);
        wait_for(RETIRED, || (is_alone() || !self.is_running()).then_some(()));
    }

    /// It may be killed, or find the daemon killed.
    fn command(&mut self, args: &[&str]) {
        self.command_at(Place::Outside, args);
    }

    fn command_at(&mut self, place: Place, args: &[&str]) {
        self.program(place, args).run();
    }

    fn program(&self, place: Place, args: &[&str]) -> tests::Program<'s> {
        let config = self.sandbox.path("agent.yaml").display().to_string();
        let agent = self.build.binary();
        let program = match self.scenario.with_systemd {
            true => self.sandbox.with_systemd(place, agent),
            false => self.sandbox.program(place, agent),
        };
        let program =
            program.args(["--config", &config]).args(args).env("MESH_REDIRECT_FAULT_LOG", self.log());
        match self.kill {
            Some(number) => program.env("MESH_REDIRECT_FAULT_KILL", number.to_string()),
            None => program,
        }
    }
}

/// Every point with its number. What is done again for each program, link or rule is chosen when it is done first and last.
fn chosen(points: &[String]) -> Vec<(usize, &String)> {
    let mut numbers: BTreeMap<&String, Vec<usize>> = BTreeMap::new();
    for (number, point) in (1..).zip(points) {
        numbers.entry(point).or_default().push(number);
    }
    let mut chosen: Vec<_> = numbers
        .into_iter()
        .flat_map(|(point, numbers)| {
            let last = numbers.len() - 1;
            BTreeSet::from([0, last]).into_iter().map(move |index| (numbers[index], point))
        })
        .collect();
    chosen.sort_unstable();
    chosen
}

fn without_numbers_after(word: &str, text: &str) -> String {
    let mut parts = text.split(word);
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| {
        let rest = part.trim_start_matches(|c: char| !c.is_ascii_digit());
        text + word + rest.trim_start_matches(|c: char| c.is_ascii_digit())
    })
}
