//! How another ABI version goes, once this one has taken its place.
//!
//! Its links are never given programs of this version: the kernel would let them read the other's cgroup storage. So both
//! are attached for a moment. Where both rewrite, the one that was attached first does, and the other then sees a
//! connection to loopback, which it leaves alone. Then the other one retires, in steps that may each be the last:
//!
//! 1. its programs lose their pins, so that nobody attaches them any more;
//! 2. it is detached from the hooks that rewrite: this version alone steers from then on;
//! 3. when the connections that it steered have ended, all of it goes. Until then it restores, and tells the proxy their
//!    origins.

use super::{Error, pins::Pins};
use crate::fault;
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

/// A connect that was under way when its hook went is seen as a connection a moment later.
const UNDER_WAY: Duration = Duration::from_secs(1);

/// Versions that retire, and since when, as far as this process knows.
#[derive(Debug, Default)]
pub(super) struct Retiring(BTreeMap<u32, Instant>);

impl Retiring {
    /// Goes on with every version but this one.
    pub(super) fn go_on(&mut self, others: &[Pins]) -> Result<(), Error> {
        self.0.retain(|version, _| others.iter().any(|pins| pins.version() == *version));
        others.iter().try_for_each(|pins| self.go_on_with(pins))
    }

    fn go_on_with(&mut self, pins: &Pins) -> Result<(), Error> {
        let version = pins.version();
        match self.0.get(&version) {
            Some(since) if !pins.are_complete() => {
                if since.elapsed() > UNDER_WAY && !pins.have_connections()? {
                    remove(pins)?;
                    tracing::info!(abi_version = version, "the other version is gone");
                }
            }
            _ => {
                pins.check()?;
                pins.remove_programs()?;
                fault::point("other version", "attached by nobody any more");
                pins.scopes()?.into_iter().try_for_each(|scope| pins.remove_rewriting(scope))?;
                fault::point("other version", "steers no more");
                self.0.insert(version, Instant::now());
                tracing::info!(
                    abi_version = version,
                    "another version has steered until now; it stays until the connections that it steered have ended"
                );
            }
        }
        Ok(())
    }
}

/// Removes everything of a version: first what is attached.
pub(super) fn remove(pins: &Pins) -> Result<(), Error> {
    pins.scopes()?.into_iter().try_for_each(|scope| pins.remove_scope(scope))?;
    pins.remove_all()
}
