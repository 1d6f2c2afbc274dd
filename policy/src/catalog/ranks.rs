//! Entries in the orders of eviction: each in those of the tiers where it may go.

use kvtier_types::Tier;

use super::{BlockId, Catalog};
use crate::entry::{Entry, Flags};
use crate::evict::{Contender, Facts, KnownId, Standing};
use crate::pools::is_held;

/// What becomes of a copy.
#[derive(Debug, Clone, Copy)]
pub(super) enum Known {
    Came,
    Used,
    Left,
}

fn block(id: KnownId) -> BlockId {
    BlockId::new(u32::try_from(id.index()).expect("numbers of blocks are of 32 bits"))
}

const fn facts(entry: &Entry) -> (Facts, Standing) {
    let facts = Facts { touched: entry.touched, depth_blocks: entry.depth_blocks, segment: entry.segment };
    (facts, entry.standing)
}

impl Catalog {
    /// Tells a tier's ranking what became of an entry there.
    pub(super) fn ranked_as(&mut self, id: BlockId, tier: Tier, what: Known) {
        let entry = self.slab[id.0 as usize].as_mut().expect("ranked entries are present");
        let (number, touched, fresh) = (KnownId::new(id.0), entry.touched, !entry.flags.has(Flags::known(tier)));
        entry.flags.set(Flags::known(tier), true);
        let ranking = self.pools.pool(tier, entry.bytes).ranking();
        match what {
            Known::Came => ranking.came(number, fresh, touched),
            Known::Used => ranking.used(number, touched),
            Known::Left => ranking.left(number, self.events.is_eviction()),
        }
    }

    pub(super) fn rank(&mut self, id: BlockId) {
        for tier in [Tier::Host, Tier::Disk, Tier::Object] {
            let entry = self.slab[id.0 as usize].as_mut().expect("ranked entries are present");
            if entry.evictable(tier) && !entry.flags.has(Flags::ranked(tier)) {
                entry.flags.set(Flags::ranked(tier), true);
                self.pools.pool(tier, entry.bytes).offer(KnownId::new(id.0), facts(entry), &self.segments);
            }
        }
    }

    pub(super) fn unrank(&mut self, id: BlockId) {
        for tier in [Tier::Host, Tier::Disk, Tier::Object] {
            let entry = self.slab[id.0 as usize].as_mut().expect("ranked entries are present");
            if entry.flags.has(Flags::ranked(tier)) {
                entry.flags.set(Flags::ranked(tier), false);
                self.pools.pool(tier, entry.bytes).withdraw(KnownId::new(id.0), facts(entry));
            }
        }
    }

    /// The first `most` blocks of the pool for frames of so many bytes, in the order in which they should go.
    pub(crate) fn victims(&mut self, tier: Tier, bytes: u32, most: usize) -> Vec<BlockId> {
        self.pools.settle(tier, &self.segments);
        self.pools.get(tier, bytes).into_iter().flat_map(|pool| pool.victims().take(most)).map(block).collect()
    }

    /// The first `each` in order of every pool of a tier.
    pub(crate) fn victims_of(&mut self, tier: Tier, each: usize) -> Vec<BlockId> {
        self.pools.settle(tier, &self.segments);
        self.pools.of_tier(tier).flat_map(move |pool| pool.victims().take(each)).map(block).collect()
    }

    /// What it is worth to have a block, in uses per second to be had: of blocks that go in another order than that all the
    /// same. What was said to go first is worth nothing, and what soft claims hold more than anything else.
    pub(crate) fn worth(&self, id: BlockId) -> f64 {
        let entry = self.get(id);
        match entry.standing {
            Standing::First => 0.0,
            Standing::Normal if self.leader() == Contender::Survival => self.segments.worth(entry.segment),
            Standing::Normal => 1.0,
            Standing::Retained(priority) if is_held(entry.standing) => 1e9 * f64::from(priority),
            Standing::Retained(_) => 1e-9,
        }
    }

    /// Whom host memory follows.
    pub(crate) const fn leader(&self) -> Contender {
        self.pools.leader()
    }

    /// Has rankings follow whoever leads.
    pub(crate) fn follow_leader(&mut self, leader: Contender) {
        self.pools.follow(leader);
    }
}
