//! Which decisions are told to those who watch: pure, and with few branches, since the verifier follows each.

use crate::{COMM_LEN, Event, Limit, WATCH_WORDS, Watch};

const SECOND_NS: u64 = 1_000_000_000;

impl Watch {
    /// Nobody watches.
    pub const NOBODY: Self = Self { until_ns: 0, services: [0; WATCH_WORDS], rate: 0, reserved: 0 };

    /// With every service watched.
    #[must_use]
    pub const fn all(self) -> Self {
        Self { services: [u64::MAX; WATCH_WORDS], ..self }
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
    (service / u64::BITS) as usize % WATCH_WORDS
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

impl Event {
    /// As it comes out of the ring buffer; nothing where the bytes are not those of an event.
    pub fn from_bytes(mut bytes: &[u8]) -> Option<Self> {
        let event = Self {
            time_ns: u64::from_ne_bytes(take(&mut bytes)?),
            addr: take(&mut bytes)?,
            comm: take::<COMM_LEN>(&mut bytes)?,
            service: u32::from_ne_bytes(take(&mut bytes)?),
            uid: u32::from_ne_bytes(take(&mut bytes)?),
            pid: u32::from_ne_bytes(take(&mut bytes)?),
            counter: u32::from_ne_bytes(take(&mut bytes)?),
            family: u16::from_ne_bytes(take(&mut bytes)?),
            port: u16::from_ne_bytes(take(&mut bytes)?),
            transport: u32::from_ne_bytes(take(&mut bytes)?),
        };
        bytes.is_empty().then_some(event)
    }
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(*taken)
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::mem::offset_of;

    #[test]
    fn an_event_is_read_field_by_field_from_where_it_was_written() {
        let mut bytes = [0; size_of::<Event>()];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(offset_of!(Event, time_ns), &1_u64.to_ne_bytes());
        put(offset_of!(Event, addr), &[2; 16]);
        put(offset_of!(Event, comm), &[3; COMM_LEN]);
        put(offset_of!(Event, service), &4_u32.to_ne_bytes());
        put(offset_of!(Event, uid), &5_u32.to_ne_bytes());
        put(offset_of!(Event, pid), &6_u32.to_ne_bytes());
        put(offset_of!(Event, counter), &7_u32.to_ne_bytes());
        put(offset_of!(Event, family), &8_u16.to_ne_bytes());
        put(offset_of!(Event, port), &9_u16.to_ne_bytes());
        put(offset_of!(Event, transport), &10_u32.to_ne_bytes());
        let expected = Event {
            time_ns: 1,
            addr: [2; 16],
            comm: [3; COMM_LEN],
            service: 4,
            uid: 5,
            pid: 6,
            counter: 7,
            family: 8,
            port: 9,
            transport: 10,
        };
        assert_eq!(Event::from_bytes(&bytes), Some(expected));
        assert_eq!(Event::from_bytes(&bytes[1..]), None);
        assert_eq!(Event::from_bytes(&[&bytes[..], &[0]].concat()), None);
    }

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
