//! How long `enable` takes, as the one who types it sees it, and how long a daemon takes to be ready again.

use super::{
    Output,
    report::{Report, Row},
};
use clap::Args;
use std::time::Instant;
use tests::{Agent, Mode, Proxy, Sandbox};

#[derive(Debug, Args)]
pub(crate) struct Enable {
    /// Services that are enabled at once
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(2..=4000))]
    services: u32,
    /// How often each is done; the median is shown
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    times: u32,
    #[command(flatten)]
    pub(super) output: Output,
}

impl Enable {
    pub(super) fn measure(&self) -> Report {
        let rows = Mode::IN_KERNEL.into_iter().flat_map(|mode| self.of(mode)).collect();
        let about = format!("milliseconds of wall time, median of {}", self.times);
        Report { about, rows }
    }

    fn of(&self, mode: Mode) -> Vec<Row> {
        let sandbox = Sandbox::new("bench-enable", mode);
        let names: Vec<String> = (0..self.services).map(|number| format!("service{number}")).collect();
        let service = |name: &String| {
            format!("  {name}: {{ cgroup: {} }}\n", sandbox.cgroup_at(&format!("many/{name}")))
        };
        let mut agent = Agent::start(&sandbox, &names.iter().map(service).collect::<String>());
        let _proxy = Proxy::start(&sandbox);
        let many = self.services;
        let mut samples = [
            (format!("{}: enable one service, the first", mode.name()), Vec::new()),
            (format!("{}: enable one more", mode.name()), Vec::new()),
            (format!("{}: enable all of {many}", mode.name()), Vec::new()),
            (format!("{}: enable one beside {many}", mode.name()), Vec::new()),
            (format!("{}: start the daemon with {many} enabled", mode.name()), Vec::new()),
        ];
        for _ in 0..self.times {
            samples[0].1.push(timed(|| agent.enable("shop")));
            samples[1].1.push(timed(|| agent.enable("stock")));
            agent.disable("stock");
            samples[2].1.push(timed(|| agent.enable_all(&names)));
            samples[3].1.push(timed(|| agent.enable("stock")));
            agent.stop();
            let begun = Instant::now();
            agent = Agent::restart(&sandbox);
            samples[4].1.push(begun.elapsed().as_secs_f64() * 1000.0);
            agent.disable_all(&["*".to_owned()]);
        }
        samples.into_iter().map(|(name, times)| row(name, times)).collect()
    }
}

fn timed(what: impl FnOnce()) -> f64 {
    let begun = Instant::now();
    what();
    begun.elapsed().as_secs_f64() * 1000.0
}

fn row(name: String, mut times: Vec<f64>) -> Row {
    times.sort_unstable_by(f64::total_cmp);
    let value = times.get(times.len() / 2).copied().unwrap_or(f64::NAN);
    Row { name, metric: "p50", value, unit: "ms", compared_to: None, ratio: None }
}
