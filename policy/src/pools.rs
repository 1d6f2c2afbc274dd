//! One ranking for each pool of interchangeable room: the host's size classes, the disk, the object store.

use std::collections::BTreeMap;
use std::fmt;

use kvtier_types::Tier;

use crate::evict::Ranking;

/// Makes an empty ranking.
pub(crate) type MakeRanking = Box<dyn Fn() -> Box<dyn Ranking> + Send>;
/// Which size class a frame of so many bytes comes from.
pub(crate) type ClassOf = Box<dyn Fn(u64) -> u64 + Send>;

/// Rankings by tier and size class. Disk and object store have one class.
pub(crate) struct Pools {
    make: MakeRanking,
    class_of: ClassOf,
    rankings: BTreeMap<(Tier, u64), Box<dyn Ranking>>,
}

impl Pools {
    pub(crate) fn new(make: MakeRanking, class_of: ClassOf) -> Self {
        Self { make, class_of, rankings: BTreeMap::new() }
    }

    fn slot(&self, tier: Tier, bytes: u32) -> (Tier, u64) {
        if tier == Tier::Host { (tier, (self.class_of)(u64::from(bytes))) } else { (tier, 0) }
    }

    pub(crate) fn ranking(&mut self, tier: Tier, bytes: u32) -> &mut Box<dyn Ranking> {
        let slot = self.slot(tier, bytes);
        self.rankings.entry(slot).or_insert_with(|| (self.make)())
    }

    pub(crate) fn get(&self, tier: Tier, bytes: u32) -> Option<&dyn Ranking> {
        self.rankings.get(&self.slot(tier, bytes)).map(|r| &**r)
    }

    /// The rankings of one tier, all classes.
    pub(crate) fn of_tier(&self, tier: Tier) -> impl Iterator<Item = &dyn Ranking> {
        self.rankings.iter().filter(move |((t, _), _)| *t == tier).map(|(_, r)| &**r)
    }

    pub(crate) fn len(&self) -> usize {
        self.rankings.values().map(|r| r.len()).sum()
    }
}

impl fmt::Debug for Pools {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pools").field("rankings", &self.rankings.len()).finish_non_exhaustive()
    }
}
