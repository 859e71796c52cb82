//! Waiting for connections to end by themselves. The command waits, not the daemon: whoever interrupts it leaves alone what is
//! still open.

use crate::{api, client, config::Config, output::Output, present};
use std::{
    thread,
    time::{Duration, Instant},
};

/// How often the daemon is asked what is still open.
const ROUND: Duration = Duration::from_millis(500);

/// Waits until these connections have ended, for so long, and has the rest closed.
pub(crate) fn drain(
    config: &Config,
    existing: &mut [api::OfService],
    patience: Duration,
    output: Output,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + patience;
    let Some(steered) = existing.iter().find(|of| of.count > 0).map(|of| of.steered) else { return Ok(()) };
    output.aside(&api::Found { existing: existing.to_vec() }, |found| present::draining(found, patience));
    let services = existing.iter().map(|of| of.service.clone()).collect();
    let mut asked = api::Connections { services, steered, reset: false };
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        asked.reset = left.is_zero();
        let found: api::Found = client::post(&config.paths.run, "/v1/connections", Some(&asked))?;
        for (of, now) in existing.iter_mut().zip(&found.existing) {
            (of.reset, of.open) = (now.reset, now.open);
        }
        if asked.reset || found.existing.iter().all(|of| of.open == 0) {
            return Ok(());
        }
        thread::sleep(left.min(ROUND));
    }
}
