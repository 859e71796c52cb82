//! Waiting for what happens soon, with an end to it.

use std::thread::sleep;
use std::time::{Duration, Instant};

const STEP: Duration = Duration::from_millis(20);

/// Asks until there is an answer, or gives up after `limit`.
pub fn wait_for<T>(limit: Duration, mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + limit;
    loop {
        match ask() {
            Some(answer) => return Some(answer),
            None if Instant::now() >= end => return None,
            None => sleep(STEP),
        }
    }
}

/// Waits until `fact` holds.
///
/// # Panics
/// When it does not within `limit`; `what` names the fact.
#[track_caller]
pub fn eventually(what: &str, limit: Duration, mut fact: impl FnMut() -> bool) {
    let held = wait_for(limit, || fact().then_some(()));
    assert!(held.is_some(), "not within {limit:?}: {what}");
}
