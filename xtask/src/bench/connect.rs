//! What `connect()` costs, on loopback, where it includes the whole handshake and every hook on its way.

use super::{
    Output,
    report::{Report, Row},
};
use clap::Args;
use std::thread;
use tests::{Agent, Conversation, Counters, Mode, ORIGIN, Place, Process, Sandbox, binary};

/// Connects that one client makes before it is the next one's turn.
const BATCH: usize = 100;
/// Batches of each client that are not counted.
const WARM_UP: usize = 5;

#[derive(Debug, Args)]
pub(crate) struct Connect {
    /// Connects of each kind
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    connects: u32,
    #[command(flatten)]
    pub(super) output: Output,
}

/// One kind of connect.
struct Case {
    name: &'static str,
    /// The name of the case without a hook that ends at the same address.
    compared_to: Option<&'static str>,
    /// In which cgroup the client runs.
    place: Place,
    target: String,
}

/// All but the first end at the same listener, in the proxy's cgroup.
fn cases() -> [Case; 5] {
    let case = |name, compared_to, place, target: String| Case { name, compared_to, place, target };
    let plain = "plain, to 127.0.0.1";
    let plain_here = "plain, to an own address";
    [
        case("no hook at either end", Some(plain), Place::Outside, "127.0.0.1:15002".to_owned()),
        case(plain, None, Place::Outside, "127.0.0.1:15001".to_owned()),
        case("hook steers", Some(plain), Place::Shop, format!("{ORIGIN}:80")),
        case(plain_here, None, Place::Outside, format!("{HERE}:15001")),
        case("hook passes", Some(plain_here), Place::Cart, format!("{HERE}:15001")),
    ]
}

/// An address of the namespace's own, which `cart` excludes.
const HERE: &str = "10.77.0.1";

impl Connect {
    pub(super) fn measure(&self) -> Report {
        let sandbox = Sandbox::new("bench", Mode::Ebpf);
        let cart = sandbox.cgroup(Place::Cart);
        let settings = format!("  cart: {{ cgroup: {cart}, capture: {{ exclude: [{HERE}/32] }} }}\n");
        let agent = Agent::start(&sandbox, &settings);
        ["shop", "cart"].into_iter().for_each(|service| agent.enable(service));
        let _listeners = [(Place::Proxy, "0.0.0.0:15001"), (Place::Outside, "127.0.0.1:15002")]
            .map(|at| listener(&sandbox, at));

        let cases = cases();
        let mut clients = cases.each_ref().map(|case| client(&sandbox, case));
        let batches = (self.connects as usize).div_ceil(BATCH);
        let mut times = cases.each_ref().map(|_| Vec::new());
        for batch in 0..WARM_UP + batches {
            for (client, times) in clients.iter_mut().zip(&mut times) {
                let answer = client.ask(&BATCH.to_string());
                if batch >= WARM_UP {
                    times.extend(answer.split_whitespace().filter_map(|time| time.parse::<u32>().ok()));
                }
            }
        }
        verify(&agent, (WARM_UP + batches) * BATCH);
        report(&cases, &mut times)
    }
}

/// Clients and listeners have a processor of their own where there are two.
fn pinned<'s>(sandbox: &'s Sandbox, place: Place, last: bool, args: [&str; 2]) -> tests::Program<'s> {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let processor = if last { processors - 1 } else { 0 };
    let peer = binary("peer").display().to_string();
    sandbox.program(place, "taskset").args(["--cpu-list", &processor.to_string(), &peer]).args(args)
}

fn listener(sandbox: &Sandbox, (place, address): (Place, &str)) -> Process {
    let log = sandbox.path(&format!("{address}.log"));
    let mut listener = pinned(sandbox, place, true, ["sink", address]).serve(log);
    listener.wait_until(|listener| listener.log().contains("listening"));
    listener
}

fn client(sandbox: &Sandbox, case: &Case) -> Conversation {
    pinned(sandbox, case.place, false, ["time-connects", &case.target]).converse()
}

/// What was measured must be what happened.
fn verify(agent: &Agent<'_>, connects: usize) {
    let connects = connects as u64;
    assert_eq!(agent.counters("shop"), Counters { steered: connects, ..Counters::default() });
    assert_eq!(agent.counters("cart"), Counters { passed_by_rule: connects, ..Counters::default() });
}

fn report(cases: &[Case], times: &mut [Vec<u32>]) -> Report {
    times.iter_mut().for_each(|times| times.sort_unstable());
    let measured = || cases.iter().zip(times.iter());
    let mut rows = Vec::new();
    for (metric, part) in [("p50", 0.5), ("p99", 0.99)] {
        let of = |name: &str| {
            let found = measured().find(|(case, _)| case.name == name);
            found.map_or(f64::NAN, |(_, times)| microseconds(times, part))
        };
        rows.extend(measured().map(|(case, times)| {
            let value = microseconds(times, part);
            Row {
                name: case.name.to_owned(),
                metric,
                value,
                unit: "us",
                compared_to: case.compared_to.map(str::to_owned),
                ratio: case.compared_to.map(|plain| value / of(plain)),
            }
        }));
    }
    let connects = times.first().map_or(0, Vec::len);
    Report { about: format!("connect(), {connects} of each kind, in turns of {BATCH}"), rows }
}

/// A quantile of sorted nanoseconds.
fn microseconds(sorted: &[u32], part: f64) -> f64 {
    let index = (sorted.len() as f64 * part) as usize;
    sorted.get(index).map_or(f64::NAN, |time| f64::from(*time) / 1000.0)
}
