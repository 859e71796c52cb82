//! What watching costs a connect, when connections are made on every processor as fast as they can be.

use super::{
    Output,
    report::{Report, Row},
};
use clap::Args;
use std::{fs, thread};
use tests::{Agent, Conversation, Mode, ORIGIN, Place, Sandbox, binary};

/// Connects of each client that are not counted when it is a case's turn.
const WARM_UP: usize = 500;

#[derive(Debug, Args)]
pub(crate) struct Watch {
    /// Connects of each client in each turn
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u32).range(1000..=1_000_000))]
    connects: u32,
    /// Turns of each kind
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    turns: u32,
    #[command(flatten)]
    pub(super) output: Output,
}

/// Not at all, as it is by default, and each decision told.
const CASES: [(&str, Option<&str>); 3] = [
    ("unwatched", None),
    ("watched, 1000 a second", Some("1000")),
    ("watched, every decision", Some("100000")),
];

/// One way of watching, and what connects took meanwhile.
struct Case {
    name: String,
    rate: Option<&'static str>,
    turns: Vec<Turn>,
}

/// What the clients' connects took in one turn.
struct Turn {
    /// Of all clients together.
    connects_per_second: f64,
    /// Of the clients, for each connect.
    processor_us: f64,
    /// In order, of one connect.
    times: Vec<u32>,
}

impl Turn {
    fn p50_us(&self) -> f64 {
        self.times.get(self.times.len() / 2).map_or(f64::NAN, |time| f64::from(*time) / 1000.0)
    }
}

/// A name, a unit, and what it is of a turn.
type Metric = (&'static str, &'static str, fn(&Turn) -> f64);

impl Watch {
    pub(super) fn measure(&self) -> Report {
        let sandbox = Sandbox::new("bench-watch", Mode::Ebpf);
        let agent = Agent::start(&sandbox, "");
        agent.enable("shop");
        // Opened after the hooks came, which then know it for the proxy's without a heartbeat.
        let sink = sandbox.peer(Place::Proxy).args(["sink", "0.0.0.0:15001"]);
        let mut sink = sink.serve(sandbox.path("sink.log"));
        sink.wait_until(|sink| sink.log().contains("listening"));
        let processors = thread::available_parallelism().map_or(1, usize::from);
        let mut clients: Vec<_> = (0..processors).map(|processor| client(&sandbox, processor)).collect();
        let mut cases = CASES.map(|(name, rate)| Case { name: name.to_owned(), rate, turns: Vec::new() });
        for _ in 0..self.turns {
            for case in &mut cases {
                let turn = case.turn(&sandbox, &agent, &mut clients, self.connects as usize);
                case.turns.push(turn);
            }
        }
        let (turns, connects) = (self.turns, self.connects);
        let about = format!(
            "steered connect()s of {processors} clients at once, {turns} turns of {connects} of each, in each of which it is watched or not"
        );
        Report { about, rows: rows(&cases) }
    }
}

impl Case {
    fn turn(
        &self,
        sandbox: &Sandbox,
        agent: &Agent<'_>,
        clients: &mut [Conversation],
        connects: usize,
    ) -> Turn {
        let log = sandbox.path("watch.log");
        let watcher = self.rate.map(|rate| {
            let watch = Agent::program(sandbox, &["watch", "--json", "--rate", rate]);
            let mut watcher = watch.serve(log.clone());
            watcher.wait_until(|watcher| {
                at_once(clients, WARM_UP);
                !watcher.log().is_empty()
            });
            watcher
        });
        at_once(clients, WARM_UP);
        let before = agent.counters("shop").steered;
        let turn = at_once(clients, connects);
        let steered = agent.counters("shop").steered - before;
        assert_eq!(steered, (connects * clients.len()) as u64, "what was measured must be what happened");
        drop(watcher);
        let _absent_where_nobody_watched = fs::remove_file(log);
        turn
    }
}

/// A client with a processor of its own.
fn client(sandbox: &Sandbox, processor: usize) -> Conversation {
    let peer = binary("peer").display().to_string();
    let taskset = sandbox.program(Place::Shop, "taskset");
    let to = format!("{ORIGIN}:80");
    taskset.args(["--cpu-list", &processor.to_string(), &peer, "rush", &to]).converse()
}

/// Has every client connect so often.
fn at_once(clients: &mut [Conversation], connects: usize) -> Turn {
    let answers: Vec<String> = thread::scope(|scope| {
        let ask = |client| scope.spawn(move || Conversation::ask(client, &connects.to_string()));
        let asked: Vec<_> = clients.iter_mut().map(ask).collect();
        asked.into_iter().filter_map(|client| client.join().ok()).collect()
    });
    let mut turn = Turn { connects_per_second: 0.0, processor_us: 0.0, times: Vec::new() };
    for answer in &answers {
        let mut numbers = answer.split_whitespace().filter_map(|number| number.parse::<u64>().ok());
        let (wall, processor) = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
        turn.connects_per_second += connects as f64 / (wall as f64 / 1e9);
        turn.processor_us += processor as f64 / 1000.0 / (connects * answers.len()) as f64;
        turn.times.extend(numbers.map(|time| time as u32));
    }
    turn.times.sort_unstable();
    turn
}

/// Of every case the median of its turns, and of the ratios to the turn before in which nobody watched: what else the
/// machine does changes more from turn to turn than what is measured.
fn rows(cases: &[Case]) -> Vec<Row> {
    let metrics: [Metric; 3] = [
        ("p50", "us", Turn::p50_us),
        ("processor", "us", |turn| turn.processor_us),
        ("rate", "1/s", |turn| turn.connects_per_second),
    ];
    let mut rows = Vec::new();
    for (metric, unit, of) in metrics {
        for case in cases {
            let unwatched = cases.first().filter(|_| case.rate.is_some());
            let ratio = unwatched.map(|other| {
                median(
                    case.turns.iter().zip(&other.turns).map(|(turn, other)| of(turn) / of(other)).collect(),
                )
            });
            let value = median(case.turns.iter().map(of).collect());
            let compared_to = unwatched.map(|other| other.name.clone());
            rows.push(Row { name: case.name.clone(), metric, value, unit, compared_to, ratio });
        }
    }
    rows
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
