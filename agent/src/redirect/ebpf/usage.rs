//! How full the maps are, and how many entries the kernel has evicted from those that it may evict from.

use super::{Error, maps::failed, pins::Pins};
use crate::sys::bpf;
use agent_ebpf::{RuleKey, Rules, Tracked, maps};
use aya::maps::{LpmTrie, Map, MapData, MapError, PerCpuArray};
use std::os::fd::AsFd as _;

/// How full a map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MapUsage {
    /// As the kernel knows it.
    pub(crate) name: &'static str,
    pub(crate) entries: u64,
    /// How many entries it has room for.
    pub(crate) capacity: u64,
    /// Entries that had to make room for others since the map was made; none of a map that refuses instead.
    pub(crate) evicted: Option<u64>,
}

/// What was evicted, as far as it was seen: the counts are read one after the other while connections come and go, and
/// what is told shall never become less.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Evicted {
    origins: u64,
    connections: u64,
}

impl Evicted {
    /// Reads how full each map is. `MR_COUNTERS` has an entry for each one of `MR_SERVICES`.
    pub(super) fn usage(&mut self, pins: &Pins) -> Result<Vec<MapUsage>, Error> {
        // What was added is read first and what was removed last, so that nothing counts as evicted that is on its way.
        let added = tracked(pins)?;
        let [origins, connections] = [maps::ORIGINS, maps::CONNECTIONS].map(|name| hash(pins, name));
        let (origins, connections) = (origins?, connections?);
        let removed = tracked(pins)?;
        let gone = missing(added.origins_added, removed.origins_removed, origins.entries);
        self.origins = self.origins.max(gone);
        let gone = missing(added.connections_added, removed.connections_removed, connections.entries);
        self.connections = self.connections.max(gone);
        Ok(vec![
            hash(pins, maps::SERVICES)?,
            rules(pins)?,
            hash(pins, maps::RESOLVERS)?,
            hash(pins, maps::VIRTUAL)?,
            MapUsage { evicted: Some(self.origins), ..origins },
            MapUsage { evicted: Some(self.connections), ..connections },
        ])
    }
}

fn missing(added: u64, removed: u64, present: u64) -> u64 {
    added.saturating_sub(removed).saturating_sub(present)
}

fn hash(pins: &Pins, name: &'static str) -> Result<MapUsage, Error> {
    let (map, capacity) = open(pins, name)?;
    let entries = map.info().and_then(|info| {
        let (key, value) = (info.key_size() as usize, info.value_size() as usize);
        Ok(bpf::count_entries(map.fd().as_fd(), key, value)?)
    });
    Ok(MapUsage { name, entries: entries.map_err(failed("read", name))?, capacity, evicted: None })
}

/// A trie is read entry by entry before Linux 5.13.
fn rules(pins: &Pins) -> Result<MapUsage, Error> {
    let name = maps::RULES;
    let (map, capacity) = open(pins, name)?;
    let trie: Result<LpmTrie<MapData, RuleKey, Rules>, MapError> =
        Map::from_map_data(map).and_then(TryInto::try_into);
    let entries = trie.and_then(|trie| trie.keys().try_fold(0, |entries, key| key.map(|_| entries + 1)));
    Ok(MapUsage { name, entries: entries.map_err(failed("read", name))?, capacity, evicted: None })
}

fn open(pins: &Pins, name: &'static str) -> Result<(MapData, u64), Error> {
    let map = MapData::from_pin(pins.map(name)).map_err(failed("open", name))?;
    let capacity = map.info().map_err(failed("read", name))?.max_entries();
    Ok((map, u64::from(capacity)))
}

/// Over all CPUs.
fn tracked(pins: &Pins) -> Result<Tracked, Error> {
    let (map, _) = open(pins, maps::TRACKED)?;
    let each = Map::from_map_data(map).and_then(|map| PerCpuArray::<_, Tracked>::try_from(map)?.get(&0, 0));
    let zero = Tracked { origins_added: 0, origins_removed: 0, connections_added: 0, connections_removed: 0 };
    Ok(each.map_err(failed("read", maps::TRACKED))?.iter().fold(zero, |sum, one| Tracked {
        origins_added: sum.origins_added + one.origins_added,
        origins_removed: sum.origins_removed + one.origins_removed,
        connections_added: sum.connections_added + one.connections_added,
        connections_removed: sum.connections_removed + one.connections_removed,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_added_and_is_neither_there_nor_removed_was_evicted() {
        assert_eq!(missing(100, 30, 50), 20);
        assert_eq!(missing(100, 50, 50), 0);
        assert_eq!(missing(100, 60, 50), 0, "removed while it was counted");
    }
}
