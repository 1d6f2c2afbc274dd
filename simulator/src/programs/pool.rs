//! A tier of a node: blocks in the order of a ranking, some of them in use.
//!
//! *Invariants*: what is in use stays; of the blocks of one prefix in this tier the deepest goes first. Whoever puts a
//! block in keeps its number and its parent's from being given to others until it is out.

use kvtier_policy::evict::{Contender, Facts, Guarded, KnownId, Ranking, SegmentId, Segments};

const NONE: u32 = u32::MAX;

#[derive(Debug, Clone, Copy)]
struct Slot {
    here: bool,
    users: u16,
    children: u16,
    parent: u32,
    depth: u32,
    touched: u64,
    segment: SegmentId,
}

impl Slot {
    const ABSENT: Self =
        Self { here: false, users: 0, children: 0, parent: NONE, depth: 0, touched: 0, segment: SegmentId::NONE };

    const fn facts(&self) -> Facts {
        Facts { touched: self.touched, depth_blocks: self.depth, segment: self.segment }
    }

    const fn may_go(&self) -> bool {
        self.here && self.users == 0 && self.children == 0
    }
}

/// A block to be put in.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entry {
    pub(crate) id: KnownId,
    pub(crate) parent: Option<KnownId>,
    pub(crate) depth: u32,
    pub(crate) touched: u64,
    pub(crate) segment: SegmentId,
}

/// The ranking of a tier.
#[derive(Debug)]
pub(crate) enum Order {
    One(Box<dyn Ranking>),
    Guarded(Box<Guarded>),
}

impl Order {
    fn get(&mut self) -> &mut dyn Ranking {
        match self {
            Self::One(ranking) => ranking.as_mut(),
            Self::Guarded(ranking) => ranking.as_mut(),
        }
    }
}

/// A tier.
#[derive(Debug)]
pub(crate) struct Pool {
    slots: Vec<Slot>,
    ranking: Order,
    pub(crate) capacity: usize,
    pub(crate) used: usize,
    /// Blocks in use.
    pub(crate) busy: usize,
}

impl Pool {
    pub(crate) fn new(capacity: usize, ranking: Order) -> Self {
        Self { slots: Vec::new(), ranking, capacity, used: 0, busy: 0 }
    }

    /// Follows another ranking, where several stand by.
    pub(crate) fn follow(&mut self, leader: Contender) {
        if let Order::Guarded(ranking) = &mut self.ranking {
            ranking.follow(leader);
        }
    }

    /// Whether a block may be taken out.
    pub(crate) fn may_go(&self, id: KnownId) -> bool {
        self.slots.get(id.index()).is_some_and(Slot::may_go)
    }

    pub(crate) fn has(&self, id: KnownId) -> bool {
        self.slots.get(id.index()).is_some_and(|slot| slot.here)
    }

    /// Whether somebody uses it.
    pub(crate) fn in_use(&self, id: KnownId) -> bool {
        self.slots.get(id.index()).is_some_and(|slot| slot.users > 0)
    }

    /// Blocks that could be put in besides what is in use.
    pub(crate) const fn room(&self) -> usize {
        self.capacity.saturating_sub(self.busy)
    }

    /// What a block was put in with, or touched with last.
    pub(crate) fn entry(&self, id: KnownId) -> Entry {
        let slot = self.slots[id.index()];
        let parent = (slot.parent != NONE).then(|| KnownId::new(slot.parent));
        Entry { id, parent, depth: slot.depth, touched: slot.touched, segment: slot.segment }
    }

    /// Puts a block in, in use if `used`. There must be room.
    pub(crate) fn insert(&mut self, entry: Entry, used: bool, segments: &Segments) {
        let index = entry.id.index();
        if self.slots.len() <= index {
            self.slots.resize(index + 1, Slot::ABSENT);
        }
        debug_assert!(!self.slots[index].here, "a block is put in once");
        if let Some(parent) = entry.parent {
            if self.slots.len() <= parent.index() {
                self.slots.resize(parent.index() + 1, Slot::ABSENT);
            }
            self.withdraw(parent);
            self.slots[parent.index()].children += 1;
        }
        let children = self.slots[index].children;
        self.slots[index] = Slot {
            here: true,
            users: u16::from(used),
            children,
            parent: entry.parent.map_or(NONE, raw),
            depth: entry.depth,
            touched: entry.touched,
            segment: entry.segment,
        };
        self.used += 1;
        self.busy += usize::from(used);
        self.ranking.get().came(entry.id, false, entry.touched);
        self.offer(entry.id, segments);
    }

    /// Takes a block out.
    pub(crate) fn remove(&mut self, id: KnownId, evicted: bool, segments: &Segments) {
        self.withdraw(id);
        let slot = self.slots[id.index()];
        // Children that stay count for when it comes back.
        self.slots[id.index()] = Slot { children: slot.children, ..Slot::ABSENT };
        self.used -= 1;
        self.busy -= usize::from(slot.users > 0);
        self.ranking.get().left(id, evicted);
        if slot.parent != NONE {
            let parent = KnownId::new(slot.parent);
            self.slots[parent.index()].children -= 1;
            self.offer(parent, segments);
        }
    }

    /// The block is in use once more.
    pub(crate) fn hold(&mut self, id: KnownId) {
        self.withdraw(id);
        let slot = &mut self.slots[id.index()];
        slot.users += 1;
        self.busy += usize::from(slot.users == 1);
    }

    /// One user less.
    pub(crate) fn release(&mut self, id: KnownId, segments: &Segments) {
        let slot = &mut self.slots[id.index()];
        slot.users -= 1;
        self.busy -= usize::from(slot.users == 0);
        self.offer(id, segments);
    }

    /// The block was used, or is to be ranked anew: `touched` and its segment from now on.
    pub(crate) fn touch(&mut self, id: KnownId, (touched, segment): (u64, SegmentId), segments: &Segments) {
        self.withdraw(id);
        let slot = &mut self.slots[id.index()];
        (slot.touched, slot.segment) = (touched, segment);
        self.ranking.get().used(id, touched);
        self.offer(id, segments);
    }

    /// The block that should go first.
    pub(crate) fn victim(&mut self, segments: &Segments) -> Option<KnownId> {
        let ranking = self.ranking.get();
        ranking.settle(segments);
        ranking.first()
    }

    fn offer(&mut self, id: KnownId, segments: &Segments) {
        let slot = self.slots[id.index()];
        if slot.may_go() {
            self.ranking.get().offer(id, slot.facts(), segments);
        }
    }

    fn withdraw(&mut self, id: KnownId) {
        let slot = self.slots[id.index()];
        if slot.may_go() {
            self.ranking.get().withdraw(id, slot.facts());
        }
    }
}

fn raw(id: KnownId) -> u32 {
    u32::try_from(id.index()).expect("numbers of blocks are of 32 bits")
}
