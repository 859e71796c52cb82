//! Which decisions are told to those who watch: pure, and with few branches, since the verifier follows each.

use crate::{Limit, Watch};

const SECOND_NS: u64 = 1_000_000_000;

impl Watch {
    /// Nobody watches.
    pub const NOBODY: Self = Self { until_ns: 0, services: [0; crate::WATCH_WORDS], rate: 0, reserved: 0 };

    /// With everybody's services watched.
    #[must_use]
    pub const fn all(self) -> Self {
        Self { services: [u64::MAX; crate::WATCH_WORDS], ..self }
    }

    /// With a service watched; others of the same bit, if there are any, are too.
    #[must_use]
    pub fn with(mut self, service: u32) -> Self {
        self.services[word(service)] |= bit(service);
        self
    }

    /// Whether anybody may be watching: all that is asked while nobody does.
    #[inline(always)]
    pub fn is_on(&self) -> bool {
        self.until_ns != 0
    }

    /// Whether somebody watches a service now.
    #[inline(always)]
    pub fn covers(&self, service: u32, now_ns: u64) -> bool {
        now_ns < self.until_ns && self.services[word(service)] & bit(service) != 0
    }
}

#[inline(always)]
fn word(service: u32) -> usize {
    (service / u64::BITS) as usize % crate::WATCH_WORDS
}

#[inline(always)]
fn bit(service: u32) -> u64 {
    1 << (service % u64::BITS)
}

impl Limit {
    /// Whether one more may be told, of so many in a second.
    #[inline(always)]
    pub fn allows(&mut self, rate: u32, now_ns: u64) -> bool {
        if now_ns.wrapping_sub(self.since_ns) >= SECOND_NS {
            (self.since_ns, self.told) = (now_ns, 0);
        }
        self.told += 1;
        self.told <= u64::from(rate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_watches_after_the_end_and_only_what_was_asked_for() {
        let watch = Watch { until_ns: 100, ..Watch::NOBODY }.with(1).with(64).with(4095);
        for service in [1, 64, 4095] {
            assert!(watch.covers(service, 99) && !watch.covers(service, 100), "{service}");
        }
        for service in [0, 2, 63, 65, 4094] {
            assert!(!watch.covers(service, 99), "{service}");
            assert!(watch.all().covers(service, 99), "{service}");
        }
        assert!(watch.is_on() && !Watch::NOBODY.is_on());
        assert!(!Watch::NOBODY.all().covers(1, 0));
    }

    #[test]
    fn ids_beyond_the_words_share_a_bit() {
        let watch = Watch { until_ns: 1, ..Watch::NOBODY }.with(4096 + 7);
        assert!(watch.covers(7, 0) && watch.covers(4096 + 7, 0));
    }

    #[test]
    fn so_many_are_told_in_each_second() {
        let mut limit = Limit { since_ns: 0, told: 0, dropped: 0 };
        let begun = 5 * SECOND_NS;
        let told = |limit: &mut Limit, now_ns| (0..10).filter(|_| limit.allows(3, now_ns)).count();
        assert_eq!(told(&mut limit, begun), 3);
        assert_eq!(told(&mut limit, begun + SECOND_NS - 1), 0);
        assert_eq!(told(&mut limit, begun + SECOND_NS), 3);
        assert_eq!(told(&mut limit, begun + 60 * SECOND_NS), 3);
        assert!(!Limit { since_ns: 0, told: 0, dropped: 0 }.allows(0, begun));
    }
}
