//! A cache of prefixes with a ranking: what a shadow is, and what a trace is replayed on.
//!
//! *Invariants*: a block is here only while the one before it is; at most `capacity` is used; every block here is held in
//! the directory of known blocks.

use super::{Facts, Known, KnownId, Ranking, SegmentId, Segments};

const NONE: u32 = u32::MAX;

#[derive(Debug, Clone, Copy)]
struct Slot {
    here: bool,
    touched: u64,
    parent: u32,
    children: u32,
    depth: u32,
    weight: u32,
    segment: SegmentId,
}

impl Slot {
    const ABSENT: Self =
        Self { here: false, touched: 0, parent: NONE, children: 0, depth: 0, weight: 0, segment: SegmentId::NONE };

    const fn facts(&self) -> Facts {
        Facts { touched: self.touched, depth_blocks: self.depth, segment: self.segment }
    }
}

/// A block that a call uses.
#[derive(Debug, Clone, Copy)]
pub struct BlockUse {
    /// Its number in the directory.
    pub id: KnownId,
    /// Nothing was known of it before.
    pub fresh: bool,
    /// The segment it is in from now on.
    pub segment: SegmentId,
    /// How much of the capacity it takes.
    pub weight: u32,
}

/// What a call finds and does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Found {
    /// Blocks of its prefix that were here.
    pub hits: usize,
    /// Blocks that were here, wherever in it.
    pub here: usize,
    /// Blocks taken in.
    pub taken_in: usize,
}

/// A prefix-closed cache.
#[derive(Debug)]
pub struct PrefixCache<R> {
    slots: Vec<Slot>,
    ranking: R,
    capacity: u64,
    used: u64,
    evicted: u64,
}

impl<R: Ranking> PrefixCache<R> {
    /// An empty cache of so much weight.
    #[must_use]
    pub const fn new(capacity: u64, ranking: R) -> Self {
        Self { slots: Vec::new(), ranking, capacity, used: 0, evicted: 0 }
    }

    /// A call uses a prefix: what is here is used, the rest is taken in as far as there is room, evicting what is ranked
    /// lowest and not of this prefix.
    pub fn call<T: Copy + Default>(
        &mut self,
        touched: u64,
        prefix: &[BlockUse],
        segments: &Segments,
        known: &mut Known<T>,
    ) -> Found {
        let highest = prefix.iter().map(|block| block.id.index() + 1).max().unwrap_or(0);
        if self.slots.len() < highest {
            self.slots.resize(highest, Slot::ABSENT);
        }
        let mut tip = NONE;
        let follows = |block: &&BlockUse| {
            let slot = &self.slots[block.id.index()];
            let before = std::mem::replace(&mut tip, number(block.id));
            slot.here && slot.parent == before
        };
        let hits = prefix.iter().take_while(follows).count();
        let here = hits + prefix[hits..].iter().filter(|block| self.slots[block.id.index()].here).count();
        for block in &prefix[..hits] {
            self.touch(block, touched);
        }
        let mut tip = hits.checked_sub(1).map_or(NONE, |last| number(prefix[last].id));
        let mut found = Found { hits, here, taken_in: 0 };
        for (depth, block) in (0_u32..).zip(prefix).skip(hits) {
            if self.slots[block.id.index()].here {
                // Below another prefix: keys that are no chain.
                break;
            }
            while self.used + u64::from(block.weight) > self.capacity {
                if self.evict(tip, segments, known).is_none() {
                    self.close(tip, segments);
                    return found;
                }
            }
            self.take_in(block, (tip, depth), touched);
            known.hold(block.id);
            tip = number(block.id);
            found.taken_in += 1;
        }
        self.close(tip, segments);
        found
    }

    /// The call has ended: the last of its blocks may go.
    fn close(&mut self, tip: u32, segments: &Segments) {
        if tip != NONE && self.slots[tip as usize].children == 0 {
            self.ranking.offer(KnownId::new(tip), self.slots[tip as usize].facts(), segments);
        }
    }

    fn touch(&mut self, block: &BlockUse, touched: u64) {
        let slot = &mut self.slots[block.id.index()];
        if slot.children == 0 {
            self.ranking.withdraw(block.id, slot.facts());
        }
        self.used = self.used - u64::from(slot.weight) + u64::from(block.weight);
        (slot.touched, slot.segment, slot.weight) = (touched, block.segment, block.weight);
        self.ranking.used(block.id, touched);
    }

    fn take_in(&mut self, block: &BlockUse, (parent, depth): (u32, u32), touched: u64) {
        let (weight, segment) = (block.weight, block.segment);
        self.slots[block.id.index()] = Slot { here: true, touched, parent, children: 0, depth, weight, segment };
        self.used += u64::from(weight);
        if parent != NONE {
            self.slots[parent as usize].children += 1;
        }
        self.ranking.came(block.id, block.fresh, touched);
    }

    /// Evicts the block ranked lowest; `tip` is in use.
    fn evict<T: Copy + Default>(&mut self, tip: u32, segments: &Segments, known: &mut Known<T>) -> Option<()> {
        self.ranking.settle(segments);
        let victim = self.ranking.first()?;
        let slot = std::mem::replace(&mut self.slots[victim.index()], Slot::ABSENT);
        self.ranking.withdraw(victim, slot.facts());
        self.ranking.left(victim, true);
        known.release(victim);
        self.used -= u64::from(slot.weight);
        self.evicted += 1;
        if slot.parent != NONE {
            let parent = &mut self.slots[slot.parent as usize];
            parent.children -= 1;
            if parent.children == 0 && slot.parent != tip {
                self.ranking.offer(KnownId::new(slot.parent), parent.facts(), segments);
            }
        }
        Some(())
    }

    /// The ranking.
    pub const fn ranking_mut(&mut self) -> &mut R {
        &mut self.ranking
    }

    /// Whether a block is here.
    #[must_use]
    pub fn contains(&self, id: KnownId) -> bool {
        self.slots.get(id.index()).is_some_and(|slot| slot.here)
    }

    /// Weight of the blocks here.
    #[must_use]
    pub const fn used(&self) -> u64 {
        self.used
    }

    /// Blocks evicted so far.
    #[must_use]
    pub const fn evicted(&self) -> u64 {
        self.evicted
    }
}

fn number(id: KnownId) -> u32 {
    u32::try_from(id.index()).expect("numbers of blocks are of 32 bits")
}
