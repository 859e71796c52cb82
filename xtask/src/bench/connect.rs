//! What `connect()` costs, on loopback, where it includes the whole handshake and every hook on its way.

use super::{
    Output,
    report::{Report, Row},
};
use clap::Args;
use std::thread;
use tests::{Agent, Conversation, Counters, Mode, ORIGIN, Process, Program, Sandbox, binary};

/// Connects that one client makes before it is the next one's turn.
const BATCH: usize = 100;
/// Batches of each client that are not counted.
const WARM_UP: usize = 5;

#[derive(Debug, Args)]
pub(crate) struct Connect {
    /// Connects of each kind
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    connects: u32,
    #[command(flatten)]
    pub(super) output: Output,
}

/// An address of the namespace's own, which one service excludes.
const HERE: &str = "10.77.0.1";
const LOOPBACK: &str = "127.0.0.1:15001";
const PLAIN: &str = "plain, to 127.0.0.1";
const PLAIN_HERE: &str = "plain, to an own address";

/// How many entries a policy has, or how many services are enabled.
const SIZES: [usize; 3] = [1, 100, 10_000];
const SERVICES: [usize; 3] = [1, 100, 1_000];

/// A sandbox in which so many services are enabled, a listener of the proxy's, and somebody who says that it is ready.
struct World<'s> {
    sandbox: &'s Sandbox,
    agent: Agent<'s>,
    _proxy: [Process; 2],
}

/// One kind of connect.
struct Case<'s> {
    name: String,
    /// The name of the case that it is set against.
    compared_to: Option<String>,
    client: Conversation,
    /// Whose counters have to tell of it, and what.
    counted: Option<(&'s Agent<'s>, String, Counters)>,
    times: Vec<u32>,
}

impl Connect {
    pub(super) fn measure(&self) -> Report {
        let sandboxes = Mode::IN_KERNEL
            .map(|mode| SERVICES.map(|many| (many, Sandbox::new(&format!("bench-{many}"), mode))));
        let worlds = sandboxes
            .each_ref()
            .map(|of_mode| of_mode.each_ref().map(|(many, sandbox)| World::new(sandbox, *many)));
        let mut cases = plain(&worlds[0][0]);
        for of_mode in &worlds {
            cases.extend(of_mode[0].entries());
            cases.extend(of_mode.iter().zip(SERVICES).map(|(world, many)| world.among(many)));
            cases.push(of_mode[0].passing());
        }
        let batches = (self.connects as usize).div_ceil(BATCH);
        for batch in 0..WARM_UP + batches {
            cases.iter_mut().for_each(|case| case.turn(batch >= WARM_UP));
        }
        cases.iter().for_each(|case| case.verify(((WARM_UP + batches) * BATCH) as u64));
        report(cases)
    }
}

impl<'s> World<'s> {
    fn new(sandbox: &'s Sandbox, services: usize) -> Self {
        let cgroup = |name: &str| sandbox.cgroup_at(&format!("many/{name}"));
        let many: Vec<String> = (1..services).map(|number| format!("service{number}")).collect();
        let sized = SIZES.map(|size| (format!("entries{size}"), size));
        let settings = many.iter().map(|name| format!("  {name}: {{ cgroup: {} }}\n", cgroup(name)));
        let settings = settings.chain([format!(
            "  passing: {{ cgroup: {}, capture: {{ exclude: [{HERE}/32] }} }}\n",
            cgroup("passing")
        )]);
        let settings = settings.chain(sized.iter().map(|(name, size)| {
            format!("  {name}: {{ cgroup: {}, capture: {{ include: [{}] }} }}\n", cgroup(name), nets(*size))
        }));
        let agent = Agent::start(sandbox, &settings.collect::<String>());
        agent.enable_all(&[vec!["shop".to_owned()], many].concat());
        if services == 1 {
            agent.enable_all(&["passing".to_owned(), "entries*".to_owned()]);
        }
        // Opened after the hooks came, which then know it for the proxy's without a heartbeat.
        let listener = pinned(sandbox, "proxy", true, &["sink", "0.0.0.0:15001"]);
        let ready = pinned(sandbox, "proxy", true, &["http", "ready", "127.0.0.1:15000"]);
        let proxy = [("sink", listener), ("ready", ready)].map(|(name, program)| {
            let mut process = program.serve(sandbox.path(&format!("{name}.log")));
            process.wait_until(|process| process.log().contains("listening"));
            process
        });
        sandbox.settle();
        Self { sandbox, agent, _proxy: proxy }
    }

    /// With policies of more and more entries.
    fn entries(&self) -> [Case<'_>; 3] {
        SIZES.map(|size| {
            let service = format!("entries{size}");
            let name = format!("{}: steered, {size} entries", self.sandbox.mode.name());
            let against = format!("{}: steered, 1 entries", self.sandbox.mode.name());
            let compared_to = if size == 1 { PLAIN.to_owned() } else { against };
            self.steered(name, compared_to, &format!("many/{service}"), &service)
        })
    }

    /// Among so many services.
    fn among(&self, many: usize) -> Case<'_> {
        let name = format!("{}: steered, {many} services", self.sandbox.mode.name());
        let against = format!("{}: steered, 1 services", self.sandbox.mode.name());
        let compared_to = if many == 1 { PLAIN.to_owned() } else { against };
        self.steered(name, compared_to, "shop", "shop")
    }

    fn steered(&self, name: String, compared_to: String, cgroup: &str, service: &str) -> Case<'_> {
        let counted = |connects| Counters { steered: connects, ..Counters::default() };
        Case {
            name,
            compared_to: Some(compared_to),
            client: client(self.sandbox, cgroup, &format!("{ORIGIN}:80")),
            counted: Some((&self.agent, service.to_owned(), counted(1))),
            times: Vec::new(),
        }
    }

    /// Left alone because policy says so.
    fn passing(&self) -> Case<'_> {
        Case {
            name: format!("{}: passed by a rule", self.sandbox.mode.name()),
            compared_to: Some(PLAIN_HERE.to_owned()),
            client: client(self.sandbox, "many/passing", &format!("{HERE}:15001")),
            counted: Some((
                &self.agent,
                "passing".to_owned(),
                Counters { passed_by_rule: 1, ..Counters::default() },
            )),
            times: Vec::new(),
        }
    }
}

/// Connects of a service that is not enabled, to where the others end.
fn plain<'s>(world: &World<'s>) -> Vec<Case<'s>> {
    let case = |name: &str, target: String| Case {
        name: name.to_owned(),
        compared_to: None,
        client: client(world.sandbox, "outside", &target),
        counted: None,
        times: Vec::new(),
    };
    vec![case(PLAIN, LOOPBACK.to_owned()), case(PLAIN_HERE, format!("{HERE}:15001"))]
}

/// So many entries, of which the last one is where the client connects to.
fn nets(size: usize) -> String {
    let others = (1..size).map(|number| format!("100.64.{}.{}/32", number >> 8, number & 0xff));
    others.chain([format!("{ORIGIN}/32")]).collect::<Vec<_>>().join(", ")
}

/// Clients and listeners have a processor of their own where there are two.
fn pinned<'s>(sandbox: &'s Sandbox, cgroup: &str, last: bool, args: &[&str]) -> Program<'s> {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let processor = if last { processors - 1 } else { 0 };
    let peer = binary("peer").display().to_string();
    let taskset = sandbox.program_in(cgroup, "taskset").args(["--cpu-list", &processor.to_string(), &peer]);
    taskset.args(args)
}

fn client(sandbox: &Sandbox, cgroup: &str, target: &str) -> Conversation {
    pinned(sandbox, cgroup, false, &["time-connects", target]).converse()
}

impl Case<'_> {
    fn turn(&mut self, counts: bool) {
        let answer = self.client.ask(&BATCH.to_string());
        if counts {
            self.times.extend(answer.split_whitespace().filter_map(|time| time.parse::<u32>().ok()));
        }
    }

    /// What was measured must be what happened.
    fn verify(&self, connects: u64) {
        let Some((agent, service, one)) = &self.counted else { return };
        let expected = Counters {
            steered: one.steered * connects,
            passed_by_rule: one.passed_by_rule * connects,
            ..Counters::default()
        };
        assert_eq!(agent.counters(service), expected, "{}", self.name);
    }
}

fn report(mut cases: Vec<Case<'_>>) -> Report {
    cases.iter_mut().for_each(|case| case.times.sort_unstable());
    let mut rows = Vec::new();
    for (metric, part) in [("p50", 0.5), ("p99", 0.99)] {
        let of = |name: &str| {
            let found = cases.iter().find(|case| case.name == name);
            found.map_or(f64::NAN, |case| microseconds(&case.times, part))
        };
        rows.extend(cases.iter().map(|case| {
            let value = microseconds(&case.times, part);
            Row {
                name: case.name.clone(),
                metric,
                value,
                unit: "us",
                compared_to: case.compared_to.clone(),
                ratio: case.compared_to.as_ref().map(|other| value / of(other)),
            }
        }));
    }
    let connects = cases.first().map_or(0, |case| case.times.len());
    Report { about: format!("connect(), {connects} of each kind, in turns of {BATCH}"), rows }
}

/// A quantile of sorted nanoseconds.
fn microseconds(sorted: &[u32], part: f64) -> f64 {
    let index = (sorted.len() as f64 * part) as usize;
    sorted.get(index).map_or(f64::NAN, |time| f64::from(*time) / 1000.0)
}
