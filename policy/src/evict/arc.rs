//! ARC, leaf-first (Megiddo and Modha, FAST'03): blocks used once and blocks used again, each least recently used first, and
//! ghosts that move the border between the two.
//!
//! For the least recently used block of the list that is to give, the leaf goes that its call left, and becomes a ghost of
//! that list. Blocks used once and their ghosts are at most as many as the pool has blocks, all together twice as many.

use std::collections::{BTreeMap, VecDeque};

use super::{KnownId, LeafOrder, Leaves, Order};

/// Calls looked at for a leaf that may go; then whatever was used first goes.
const MAX_LOOKED_AT: usize = 64;

#[derive(Debug, Clone, Copy, Default)]
struct Use {
    touched: u64,
    /// It was used again since it came.
    again: bool,
    /// It left: its place among the ghosts of its kind. Zero: it is none.
    ghost: u64,
}

/// How many blocks each call was the last to use. Blocks of one call come in a row: counts are put in at once.
#[derive(Debug, Default)]
struct ByCall {
    counts: BTreeMap<u64, u32>,
    gained: (u64, u32),
    lost: (u64, u32),
}

impl ByCall {
    fn gain(&mut self, touched: u64) {
        if self.gained.0 != touched {
            self.flush();
            self.gained.0 = touched;
        }
        self.gained.1 += 1;
    }

    fn lose(&mut self, touched: u64) {
        if self.lost.0 != touched {
            self.flush();
            self.lost.0 = touched;
        }
        self.lost.1 += 1;
    }

    fn flush(&mut self) {
        let (touched, gained) = std::mem::take(&mut self.gained);
        if gained > 0 {
            *self.counts.entry(touched).or_default() += gained;
        }
        let (touched, lost) = std::mem::take(&mut self.lost);
        if let Some(count) = self.counts.get_mut(&touched).filter(|_| lost > 0) {
            *count -= lost;
            if *count == 0 {
                self.counts.remove(&touched);
            }
        }
    }
}

/// What left of one kind, in order; what came back since is passed over.
#[derive(Debug, Default)]
struct Ghosts {
    line: VecDeque<(KnownId, u64)>,
    count: usize,
}

/// The lists of ARC. Which block goes is found with the leaves at hand.
#[derive(Debug)]
pub struct ArcOrder {
    uses: Vec<Use>,
    /// Blocks used once, and used again.
    counts: [usize; 2],
    by_call: [ByCall; 2],
    ghosts: [Ghosts; 2],
    next_ghost: u64,
    /// How many blocks used once to keep.
    target: f64,
    capacity: usize,
    /// What was chosen to go, and the list it goes for.
    chosen: Option<(KnownId, bool)>,
}

impl Order for ArcOrder {
    fn new(capacity_blocks: usize) -> Self {
        Self {
            uses: Vec::new(),
            counts: [0; 2],
            by_call: [ByCall::default(), ByCall::default()],
            ghosts: [Ghosts::default(), Ghosts::default()],
            next_ghost: 0,
            target: 0.0,
            capacity: capacity_blocks,
            chosen: None,
        }
    }

    fn came(&mut self, id: KnownId, fresh: bool, touched: u64) {
        if self.uses.len() <= id.index() {
            self.uses.resize(id.index() + 1, Use::default());
        }
        let last = self.uses[id.index()];
        let mut seen = false;
        if last.ghost > 0 {
            let (once, again) = (self.ghosts[0].count as f64, self.ghosts[1].count as f64);
            self.ghosts[usize::from(last.again)].count -= 1;
            seen = !fresh;
            if seen && last.again {
                self.target = (self.target - (once / again).max(1.0)).max(0.0);
            } else if seen {
                self.target = (self.target + (again / once).max(1.0)).min(self.capacity as f64);
            }
        }
        self.count(id, Use { touched, again: seen, ghost: 0 });
    }

    fn used(&mut self, id: KnownId, touched: u64) {
        self.uncount(id);
        self.count(id, Use { touched, again: true, ghost: 0 });
    }

    fn left(&mut self, id: KnownId, evicted: bool) {
        self.uncount(id);
        if !evicted {
            return;
        }
        self.next_ghost += 1;
        let last = &mut self.uses[id.index()];
        last.ghost = self.next_ghost;
        if let Some((_, again)) = self.chosen.take().filter(|(chosen, _)| *chosen == id) {
            last.again = again;
        }
        let ghosts = &mut self.ghosts[usize::from(last.again)];
        ghosts.count += 1;
        ghosts.line.push_back((id, self.next_ghost));
        self.forget(0, self.capacity.saturating_sub(self.counts[0]));
        let all = self.counts[0] + self.counts[1] + self.ghosts[0].count;
        self.forget(1, (2 * self.capacity).saturating_sub(all));
    }

    /// The next to go of the leaves.
    fn choose(&mut self, leaves: &Leaves) -> Option<KnownId> {
        self.by_call.iter_mut().for_each(ByCall::flush);
        let giving = usize::from(self.counts[0] == 0 || self.counts[0] as f64 <= self.target);
        let leaf = |kind: usize| {
            let calls = self.by_call[kind].counts.keys().take(MAX_LOOKED_AT);
            calls.filter_map(|touched| leaves.of_call(*touched)).next()
        };
        let chosen = leaf(giving).or_else(|| leaf(1 - giving));
        self.chosen = chosen.map(|id| (id, giving == 1));
        chosen
    }
}

impl ArcOrder {
    fn count(&mut self, id: KnownId, new: Use) {
        self.uses[id.index()] = new;
        self.counts[usize::from(new.again)] += 1;
        self.by_call[usize::from(new.again)].gain(new.touched);
    }

    fn uncount(&mut self, id: KnownId) {
        let old = self.uses[id.index()];
        self.counts[usize::from(old.again)] -= 1;
        self.by_call[usize::from(old.again)].lose(old.touched);
    }

    /// Forgets ghosts of a kind down to so many.
    fn forget(&mut self, kind: usize, keep: usize) {
        let (uses, ghosts) = (&mut self.uses, &mut self.ghosts[kind]);
        while ghosts.count > keep {
            let Some((id, stamp)) = ghosts.line.pop_front() else { break };
            let last = &mut uses[id.index()];
            if last.ghost == stamp {
                last.ghost = 0;
                ghosts.count -= 1;
            }
        }
        if ghosts.line.len() > 2 * ghosts.count + 64 {
            ghosts.line.retain(|(id, stamp)| uses[id.index()].ghost == *stamp);
        }
    }
}

/// Leaf-first ARC. O(log n) per operation.
pub type LeafArc = LeafOrder<ArcOrder>;
