//! Which endpoint is next.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Each in turn.
#[derive(Debug, Default)]
pub(crate) struct RoundRobin {
    next: AtomicUsize,
}

impl RoundRobin {
    /// All of `count` endpoints, each once, the one whose turn it is first.
    pub(crate) fn order(&self, count: usize) -> impl Iterator<Item = usize> + use<> {
        // Relaxed: turns need to differ, not to agree with anything else in memory.
        let first = self.next.fetch_add(1, Ordering::Relaxed);
        (0..count).map(move |step| first.wrapping_add(step) % count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_endpoint_gets_its_turn_and_the_rest_follow_for_a_second_try() {
        let balance = RoundRobin::default();
        let orders: Vec<Vec<usize>> = (0..4).map(|_| balance.order(3).collect()).collect();
        assert_eq!(orders, [vec![0, 1, 2], vec![1, 2, 0], vec![2, 0, 1], vec![0, 1, 2]]);
        assert_eq!(balance.order(0).count(), 0);
    }
}
