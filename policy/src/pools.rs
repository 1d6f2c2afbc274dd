//! One order of eviction for each pool of interchangeable room: the host's size classes, the disk, the object store.
//!
//! What was said to go first is before all others; soft claims hold what they are about behind what nobody spoke for, or
//! before it where their priority is below [`COMMON_PRIORITY`]; the ranking orders the rest. What is held behind the rest may
//! take half of a pool's room: beyond, it goes before the rest.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::fmt;

use kvtier_types::Tier;

use crate::evict::{Contender, Facts, KnownId, Leaves, Ranking, Segments, Standing};

/// Makes an empty ranking for a tier's pool of about so many blocks.
pub(crate) type MakeRanking = Box<dyn Fn(Tier, usize) -> Box<dyn Ranking> + Send>;
/// Which size class a frame of so many bytes comes from.
pub(crate) type ClassOf = Box<dyn Fn(u64) -> u64 + Send>;

/// The priority of what no soft claim is about, as TensorRT-LLM has it.
pub const COMMON_PRIORITY: u8 = 35;

/// The order of one pool.
pub(crate) struct Pool {
    first: Leaves,
    /// By priority, then as LRU does.
    retained: BTreeSet<(u8, u64, Reverse<u32>, KnownId)>,
    rest: Box<dyn Ranking>,
    /// Blocks that the pool has room for, about.
    room: usize,
    /// Blocks here that are held behind the rest, whether they may go or not.
    held: usize,
}

/// Whether soft claims hold a block behind those that nobody spoke for.
pub(crate) const fn is_held(standing: Standing) -> bool {
    matches!(standing, Standing::Retained(COMMON_PRIORITY..))
}

const fn retained(id: KnownId, facts: Facts, priority: u8) -> (u8, u64, Reverse<u32>, KnownId) {
    (priority, facts.touched, Reverse(facts.depth_blocks), id)
}

impl Pool {
    fn new(rest: Box<dyn Ranking>, room: usize) -> Self {
        Self { first: Leaves::default(), retained: BTreeSet::new(), rest, room, held: 0 }
    }

    /// One more block is held behind the rest, or one less.
    pub(crate) fn hold(&mut self, more: bool) {
        self.held = if more { self.held + 1 } else { self.held.saturating_sub(1) };
    }

    /// The block may go from now on.
    pub(crate) fn offer(&mut self, id: KnownId, (facts, standing): (Facts, Standing), segments: &Segments) {
        match standing {
            Standing::First => self.first.offer(id, facts),
            Standing::Normal => self.rest.offer(id, facts, segments),
            Standing::Retained(priority) => drop(self.retained.insert(retained(id, facts, priority))),
        }
    }

    /// The block may not go any more. To be told as it was offered.
    pub(crate) fn withdraw(&mut self, id: KnownId, (facts, standing): (Facts, Standing)) {
        match standing {
            Standing::First => self.first.withdraw(id, facts),
            Standing::Normal => self.rest.withdraw(id, facts),
            Standing::Retained(priority) => {
                let known = self.retained.remove(&retained(id, facts, priority));
                assert!(known, "a block is withdrawn with the facts it was offered with");
            }
        }
    }

    /// The ranking of what nobody spoke for.
    pub(crate) fn ranking(&mut self) -> &mut dyn Ranking {
        &mut *self.rest
    }

    /// Blocks in the order in which they should go, after the ranking settled.
    pub(crate) fn victims(&self) -> impl Iterator<Item = KnownId> {
        let common = (COMMON_PRIORITY, 0, Reverse(u32::MAX), KnownId::new(0));
        let of = |(_, _, _, id): &(u8, u64, Reverse<u32>, KnownId)| *id;
        let low = self.retained.range(..common).map(of);
        let high = self.retained.range(common..).map(of);
        let (early, late) = if self.held > self.room / 2 { (usize::MAX, 0) } else { (0, usize::MAX) };
        let (early, late) = (high.clone().take(early), high.take(late));
        self.first.iter().chain(low).chain(early).chain(self.rest.victims()).chain(late)
    }

    fn len(&self) -> usize {
        self.first.len() + self.retained.len() + self.rest.len()
    }
}

/// Pools by tier and size class. Disk and object store have one class.
pub(crate) struct Pools {
    make: MakeRanking,
    class_of: ClassOf,
    /// Bytes that each tier has room for.
    capacities: [u64; 4],
    /// Whom the host's rankings follow, where they can.
    leader: Contender,
    /// In order of tier and class.
    pools: Vec<((Tier, u64), Pool)>,
    /// Of each tier, the pool that was asked for last: most often the next as well.
    last: [usize; 4],
}

impl Pools {
    pub(crate) fn new(make: MakeRanking, class_of: ClassOf, (capacities, leader): ([u64; 4], Contender)) -> Self {
        Self { make, class_of, capacities, leader, pools: Vec::new(), last: [0; 4] }
    }

    /// The room that a frame of so many bytes takes.
    pub(crate) fn class_of(&self, bytes: u32) -> u64 {
        (self.class_of)(u64::from(bytes))
    }

    fn slot(&self, tier: Tier, bytes: u32) -> (Tier, u64) {
        if tier == Tier::Host { (tier, (self.class_of)(u64::from(bytes))) } else { (tier, 0) }
    }

    pub(crate) fn pool(&mut self, tier: Tier, bytes: u32) -> &mut Pool {
        let slot = self.slot(tier, bytes);
        let last = self.last[tier.index()];
        if self.pools.get(last).is_none_or(|(known, _)| *known != slot) {
            self.last[tier.index()] = self.place(slot, bytes);
        }
        &mut self.pools[self.last[tier.index()]].1
    }

    /// Where the pool is: one that was not there is made.
    fn place(&mut self, slot: (Tier, u64), bytes: u32) -> usize {
        let at = match self.pools.binary_search_by_key(&slot, |(known, _)| *known) {
            Ok(at) => return at,
            Err(at) => at,
        };
        let tier = slot.0;
        let blocks = self.capacities[tier.index()] / u64::from(bytes.max(1));
        let blocks = usize::try_from(blocks).unwrap_or(usize::MAX).max(1);
        let mut ranking = (self.make)(tier, blocks);
        if tier == Tier::Host {
            ranking.follow(self.leader);
        }
        self.pools.insert(at, (slot, Pool::new(ranking, blocks)));
        at
    }

    pub(crate) fn get(&self, tier: Tier, bytes: u32) -> Option<&Pool> {
        let at = self.pools.binary_search_by_key(&self.slot(tier, bytes), |(known, _)| *known).ok()?;
        Some(&self.pools[at].1)
    }

    /// The pools of one tier, all classes.
    pub(crate) fn of_tier(&self, tier: Tier) -> impl Iterator<Item = &Pool> {
        self.pools.iter().filter(move |((t, _), _)| *t == tier).map(|(_, pool)| pool)
    }

    /// Lets the rankings of one tier take in what happened since.
    pub(crate) fn settle(&mut self, tier: Tier, segments: &Segments) {
        let pools = self.pools.iter_mut().filter(|((t, _), _)| *t == tier);
        pools.for_each(|(_, pool)| pool.rest.settle(segments));
    }

    /// Whom host memory follows.
    pub(crate) const fn leader(&self) -> Contender {
        self.leader
    }

    /// Has the host's rankings follow whoever leads.
    pub(crate) fn follow(&mut self, leader: Contender) {
        self.leader = leader;
        let pools = self.pools.iter_mut().filter(|((tier, _), _)| *tier == Tier::Host);
        pools.for_each(|(_, pool)| pool.rest.follow(leader));
    }

    pub(crate) fn len(&self) -> usize {
        self.pools.iter().map(|(_, pool)| pool.len()).sum()
    }
}

impl fmt::Debug for Pools {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pools").field("pools", &self.pools.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evict::{LeafLru, SegmentId};

    #[test]
    fn standings_come_before_the_ranking() {
        let mut pool = Pool::new(Box::<LeafLru>::default(), 100);
        let segments = Segments::default();
        let facts = |touched| Facts { touched, depth_blocks: 0, segment: SegmentId::NONE };
        let said = [
            Standing::Normal,
            Standing::Retained(90),
            Standing::Retained(10),
            Standing::First,
            Standing::Retained(COMMON_PRIORITY),
            Standing::Normal,
        ];
        for (id, standing) in (0_u32..).zip(said) {
            pool.offer(KnownId::new(id), (facts(u64::from(id)), standing), &segments);
        }
        let order: Vec<usize> = pool.victims().map(KnownId::index).collect();
        assert_eq!(order, [3, 2, 0, 5, 4, 1]);
        // More than half of the room is held.
        (0..51).for_each(|_| pool.hold(true));
        let order: Vec<usize> = pool.victims().map(KnownId::index).collect();
        assert_eq!(order, [3, 2, 4, 1, 0, 5]);
        pool.hold(false);
        assert_eq!(pool.victims().map(KnownId::index).nth(2), Some(0));
        for (id, standing) in (0_u32..).zip(said) {
            pool.withdraw(KnownId::new(id), (facts(u64::from(id)), standing));
        }
        assert_eq!(pool.len(), 0);
    }
}
