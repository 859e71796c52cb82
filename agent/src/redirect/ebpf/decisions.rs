//! What the hooks tell of their decisions while somebody watches. Linux 5.8.

use super::{Error, maps::failed, pins::Pins};
use agent_ebpf::{Event, Limit, Watch, maps};
use aya::maps::{Array, Map, MapData, MapError, MapInfo, PerCpuArray, RingBuf};
use nix::time::{ClockId, clock_gettime};
use std::{collections::BTreeSet, path::PathBuf, time::Duration};

/// The maps between the hooks and the one who reads.
pub(crate) struct Decisions {
    pins: Pins,
    ring: RingBuf<MapData>,
    watch: Array<MapData, Watch>,
    limits: PerCpuArray<MapData, Limit>,
    /// The kernel's id of the map that says who watches: another one when everything was removed and made anew.
    id: u32,
    /// What had been told before is somebody else's.
    since: Duration,
    /// Over all CPUs, when it was read last.
    dropped: u64,
}

impl Decisions {
    /// Over the pins at a directory; none while nothing is loaded.
    pub(crate) fn open(pins: PathBuf) -> Result<Option<Self>, Error> {
        let pins = Pins::new(pins);
        if !pins.are_complete() {
            return Ok(None);
        }
        let watch = open(&pins, maps::WATCH)?;
        let id = watch.info().map_err(failed("read", maps::WATCH))?.id();
        let mut decisions = Self {
            ring: typed(maps::DECISIONS, open(&pins, maps::DECISIONS)?)?,
            limits: typed(maps::LIMITS, open(&pins, maps::LIMITS)?)?,
            watch: typed(maps::WATCH, watch)?,
            id,
            since: monotonic(),
            dropped: 0,
            pins,
        };
        decisions.dropped()?;
        Ok(Some(decisions))
    }

    /// Whether the hooks that run now write here.
    pub(crate) fn are_current(&self) -> bool {
        MapInfo::from_pin(self.pins.map(maps::WATCH)).is_ok_and(|info| info.id() == self.id)
    }

    /// Has the hooks tell decisions on these services, or on all, for so long: so many on each CPU in a second.
    pub(crate) fn watch(
        &mut self,
        services: Option<&BTreeSet<u32>>,
        rate: u32,
        time: Duration,
    ) -> Result<(), Error> {
        let until_ns = nanoseconds(monotonic() + time);
        let watch = Watch { until_ns, rate, ..Watch::NOBODY };
        self.set(match services {
            Some(services) => services.iter().fold(watch, |watch, service| watch.with(*service)),
            None => watch.all(),
        })
    }

    /// Has them tell nothing.
    pub(crate) fn end(&mut self) -> Result<(), Error> {
        self.set(Watch::NOBODY)
    }

    fn set(&mut self, watch: Watch) -> Result<(), Error> {
        self.watch.set(0, watch, 0).map_err(failed("write", maps::WATCH))
    }

    /// The next decision that was told since this was opened, if there is one now.
    pub(crate) fn next(&mut self) -> Option<Event> {
        let since = nanoseconds(self.since);
        loop {
            let event = Event::from_bytes(&self.ring.next()?);
            if let Some(event) = event.filter(|event| event.time_ns >= since) {
                return Some(event);
            }
        }
    }

    /// How many decisions were not told since this was asked last.
    pub(crate) fn dropped(&mut self) -> Result<u64, Error> {
        let each = self.limits.get(&0, 0).map_err(failed("read", maps::LIMITS))?;
        let dropped: u64 = each.iter().map(|limit| limit.dropped).sum();
        Ok(dropped.saturating_sub(std::mem::replace(&mut self.dropped, dropped)))
    }
}

/// The hooks' clock (`CLOCK_MONOTONIC`).
pub(crate) fn monotonic() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default()
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn open(pins: &Pins, name: &'static str) -> Result<MapData, Error> {
    MapData::from_pin(pins.map(name)).map_err(failed("open", name))
}

fn typed<T: TryFrom<Map, Error = MapError>>(name: &'static str, map: MapData) -> Result<T, Error> {
    Map::from_map_data(map).and_then(T::try_from).map_err(failed("open", name))
}
