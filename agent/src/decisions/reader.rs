//! Reads what the hooks tell, in a thread of its own, while somebody watches.

use super::{Interest, Teller, Watchers};
use crate::redirect::ebpf::{Decisions, Error, monotonic};
use agent_ebpf::Event;
use std::{
    path::Path,
    thread,
    time::{Duration, Instant, SystemTime},
};

/// How often it is looked whether something was told: no connect pays for waking anybody up.
const ROUND: Duration = Duration::from_millis(20);
/// Decisions that are read before anything else is looked at.
const MOST: usize = 4096;
/// How long the hooks tell what they decide unless they hear that somebody still watches, and how often they do.
const LEASE: Duration = Duration::from_secs(3);
const RENEWAL: Duration = Duration::from_secs(1);

/// Serves who watches, until nobody will any more.
pub(crate) fn run(pins: &Path, watchers: &Watchers) {
    while watchers.wait() {
        let mut reader = Reader::new(pins, watchers);
        while let Some(interest) = watchers.interest() {
            if reader.round(interest) < MOST {
                thread::sleep(ROUND);
            }
        }
        reader.end();
    }
}

/// One time in which somebody watches.
struct Reader<'w> {
    pins: &'w Path,
    watchers: &'w Watchers,
    /// None while nothing is enabled.
    decisions: Option<Decisions>,
    teller: Teller,
    interest: Option<Interest>,
    next_renewal: Instant,
    healthy: bool,
}

impl<'w> Reader<'w> {
    fn new(pins: &'w Path, watchers: &'w Watchers) -> Self {
        Self {
            pins,
            watchers,
            decisions: None,
            teller: Teller::new(Default::default()),
            interest: None,
            next_renewal: Instant::now(),
            healthy: true,
        }
    }

    /// Hands on what was told; says how much it was.
    fn round(&mut self, interest: Interest) -> usize {
        let result = self.renew_when_due(interest);
        if let (Err(error), true) = (&result, self.healthy) {
            tracing::error!("{error}; decisions cannot be watched, which is tried again");
        }
        self.healthy = result.is_ok();
        let Some(decisions) = &mut self.decisions else { return 0 };
        let (mut count, clocks) = (0, Clocks::now());
        while count < MOST
            && let Some(event) = decisions.next()
        {
            count += 1;
            if let Some(decision) = self.teller.decision(&event, clocks.rfc3339(&event)) {
                self.watchers.tell(event.time_ns, decision);
            }
        }
        count
    }

    /// Once in a while, at once when other things are wanted, and every time while there is nothing to read from.
    fn renew_when_due(&mut self, interest: Interest) -> Result<(), Error> {
        let is_new = self.interest.as_ref() != Some(&interest);
        let is_due = Instant::now() >= self.next_renewal;
        if !is_new && !is_due && self.decisions.is_some() {
            return Ok(());
        }
        if is_new {
            self.teller = Teller::new(interest.snapshot.clone());
        }
        if self.decisions.as_ref().is_none_or(|decisions| !decisions.are_current()) {
            self.decisions = Decisions::open(self.pins.to_owned())?;
        }
        let mut dropped = 0;
        if let Some(decisions) = &mut self.decisions {
            decisions.watch(interest.services.as_ref(), interest.rate, LEASE)?;
            dropped = decisions.dropped()?;
        }
        if is_due {
            self.next_renewal = Instant::now() + RENEWAL;
        }
        self.watchers.tell_dropped(dropped);
        self.interest = Some(interest);
        Ok(())
    }

    /// Nobody is left. What cannot be written now runs out by itself.
    fn end(mut self) {
        if let Some(Err(error)) = self.decisions.as_mut().map(Decisions::end) {
            tracing::debug!("{error}");
        }
    }
}

/// The hooks' clock and the calendar's at one moment.
struct Clocks {
    monotonic: Duration,
    wall: SystemTime,
}

impl Clocks {
    fn now() -> Self {
        Self { monotonic: monotonic(), wall: SystemTime::now() }
    }

    fn rfc3339(&self, event: &Event) -> String {
        let ago = self.monotonic.saturating_sub(Duration::from_nanos(event.time_ns));
        humantime::format_rfc3339_micros(self.wall - ago).to_string()
    }
}
