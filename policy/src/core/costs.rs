//! What it costs to have a block in host memory again once its copy there is gone: learnt from what movements took.

use std::time::Duration;

use kvtier_types::{Origin, Tier};

use crate::entry::Entry;

/// Nanoseconds a byte from each tier, until some were measured: a disk of 1 GB/s, a store of 100 MB/s.
const FIRST: [f64; Tier::ALL.len()] = [0.0, 0.0, 1.0, 10.0];
/// Nanoseconds a byte that loads take where many are under way at once, until some were measured: as above, copies between
/// memories of 20 GB/s, and a network of 10 Gbit/s.
const FIRST_LOADS: [f64; Origin::ALL.len()] = [0.0, 0.05, 1.0, 10.0, 1.0];
/// Share of a new measurement.
const LEARN: f64 = 0.05;
/// Computing a block again is dearer than any reload: it is the engine's time.
const RECOMPUTE: f64 = 4.0;

/// Costs a byte.
#[derive(Debug, Clone, Copy)]
pub(super) struct Costs {
    reload: [f64; Tier::ALL.len()],
    loads: [f64; Origin::ALL.len()],
}

impl Default for Costs {
    fn default() -> Self {
        Self { reload: FIRST, loads: FIRST_LOADS }
    }
}

impl Costs {
    /// A reload of so many bytes took so long.
    pub(super) fn measured(&mut self, from: Tier, bytes: u64, took: Duration) {
        let known = &mut self.reload[from.index()];
        let seen = took.as_secs_f64() * 1e9 / bytes.max(1) as f64;
        *known = LEARN.mul_add(seen, (1.0 - LEARN) * *known);
    }

    /// A load took so long while so many, this one included, were under way: together they had the link.
    pub(super) fn loaded(&mut self, from: Origin, bytes: u64, (took, at_once): (Duration, usize)) {
        let known = &mut self.loads[from.index()];
        let seen = took.as_secs_f64() * 1e9 / bytes.max(1) as f64 / at_once.max(1) as f64;
        *known = LEARN.mul_add(seen, (1.0 - LEARN) * *known);
    }

    /// Nanoseconds a byte from each place, as [`Self::loaded`] learnt them.
    pub(super) const fn loads(&self) -> [f64; Origin::ALL.len()] {
        self.loads
    }

    /// Nanoseconds a byte from a tier.
    pub(super) const fn of(&self, tier: Tier) -> f64 {
        self.reload[tier.index()]
    }

    /// Nanoseconds until a block is in host memory again, if its copy there goes.
    pub(super) fn again(&self, entry: &Entry) -> f64 {
        let below = [Tier::Disk, Tier::Object].into_iter().filter(|t| entry.resident(*t)).map(|t| self.of(t));
        let slowest = self.of(Tier::Disk).max(self.of(Tier::Object));
        let a_byte = below.min_by(f64::total_cmp).unwrap_or(RECOMPUTE * slowest);
        a_byte * f64::from(entry.bytes)
    }
}

#[cfg(test)]
mod tests {
    use kvtier_types::{BlockKey, Location};

    use super::*;
    use crate::entry::Flags;

    #[test]
    fn the_cheapest_copy_below_counts_and_none_is_dearest() {
        let mut costs = Costs::default();
        let mut entry = Entry::bare(BlockKey::new([1; 32]), (0, 0), 0, 1000, (0, 0, Flags::default()));
        let nowhere = costs.again(&entry);
        entry.object = Some(Location { segment: 0, offset: 0 });
        let object = costs.again(&entry);
        entry.disk = Some(Location { segment: 0, offset: 0 });
        let disk = costs.again(&entry);
        assert!(disk < object && object < nowhere);
        // A disk that turns out to be slower than the store.
        (0..200).for_each(|_| costs.measured(Tier::Disk, 1000, Duration::from_millis(1)));
        assert!((costs.again(&entry) - object).abs() < 1e-6);
    }

    #[test]
    fn loads_that_share_a_link_took_their_share_of_the_time() {
        let mut costs = Costs::default();
        (0..200).for_each(|_| costs.loaded(Origin::Peer, 1000, (Duration::from_micros(80), 10)));
        assert!((costs.loads()[Origin::Peer.index()] - 8.0).abs() < 0.1, "{costs:?}");
        assert!((costs.loads()[Origin::Tier(Tier::Disk).index()] - 1.0).abs() < 1e-9);
    }
}
