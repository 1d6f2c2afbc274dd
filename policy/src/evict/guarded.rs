//! Survival ranking over one pool, and whichever other ranking leads at the time.
//!
//! While survival leads, of the others is kept only when each block was last used: one that takes the lead begins with the
//! blocks that are here in the order of their last use, and without ghosts.

use super::{ArcOrder, Contender, Facts, KnownId, Leaves, Order, Ranking, S3Order, Segments, SurvivalRanking};

/// Survival ranking and who leads beside it. O(log n) per operation, amortized; O(n log n) when the lead changes.
#[derive(Debug)]
pub struct Guarded {
    capacity: usize,
    survival: SurvivalRanking,
    /// When each block that is here was last used, counted from one, by number; zero for others.
    here: Vec<u64>,
    /// That of the leader, where it is neither survival nor LRU.
    order: Option<Box<dyn Order>>,
    /// What may go, for those that need the order of last use.
    leaves: Leaves,
    leader: Contender,
    /// The next to go, where the leader is not survival.
    chosen: Option<KnownId>,
}

impl Guarded {
    /// Led by survival, for a pool of about so many blocks.
    #[must_use]
    pub fn new(capacity_blocks: usize) -> Self {
        Self {
            capacity: capacity_blocks,
            survival: SurvivalRanking::default(),
            here: Vec::new(),
            order: None,
            leaves: Leaves::default(),
            leader: Contender::Survival,
            chosen: None,
        }
    }

    fn note(&mut self, id: KnownId, last: u64) {
        if self.here.len() <= id.index() {
            self.here.resize(id.index() + 1, 0);
        }
        self.here[id.index()] = last;
    }

    /// The order of a ranking that takes the lead.
    fn begin(&self, leader: Contender) -> Option<Box<dyn Order>> {
        let mut order: Box<dyn Order> = match leader {
            Contender::Survival | Contender::Lru => return None,
            Contender::S3Fifo => Box::new(S3Order::new(self.capacity)),
            Contender::Arc => Box::new(ArcOrder::new(self.capacity)),
        };
        let numbered = (0_u32..).zip(&self.here);
        let mut blocks: Vec<(u64, u32)> =
            numbered.filter(|(_, last)| **last > 0).map(|(id, last)| (*last, id)).collect();
        blocks.sort_unstable();
        blocks.into_iter().for_each(|(last, id)| order.came(KnownId::new(id), true, last - 1));
        Some(order)
    }
}

impl Ranking for Guarded {
    fn came(&mut self, id: KnownId, fresh: bool, touched: u64) {
        self.note(id, touched + 1);
        if let Some(order) = &mut self.order {
            order.came(id, fresh, touched);
        }
    }

    fn used(&mut self, id: KnownId, touched: u64) {
        self.note(id, touched + 1);
        if let Some(order) = &mut self.order {
            order.used(id, touched);
        }
    }

    fn left(&mut self, id: KnownId, evicted: bool) {
        self.note(id, 0);
        if let Some(order) = &mut self.order {
            order.left(id, evicted);
        }
    }

    fn offer(&mut self, id: KnownId, facts: Facts, segments: &Segments) {
        self.survival.offer(id, facts, segments);
        self.leaves.offer(id, facts);
    }

    fn withdraw(&mut self, id: KnownId, facts: Facts) {
        self.survival.withdraw(id, facts);
        self.leaves.withdraw(id, facts);
        self.chosen = self.chosen.filter(|chosen| *chosen != id);
    }

    fn follow(&mut self, leader: Contender) {
        if self.leader != leader {
            self.leader = leader;
            self.order = self.begin(leader);
            self.chosen = None;
        }
    }

    fn settle(&mut self, segments: &Segments) {
        self.survival.settle(segments);
        self.chosen = self.order.as_mut().and_then(|order| order.choose(&self.leaves));
    }

    fn first(&self) -> Option<KnownId> {
        if self.leader == Contender::Survival {
            self.survival.first()
        } else {
            self.chosen.or_else(|| self.leaves.first())
        }
    }

    fn victims(&self) -> Box<dyn Iterator<Item = KnownId> + '_> {
        if self.leader == Contender::Survival {
            return self.survival.victims();
        }
        Box::new(self.leaves.from(self.chosen))
    }

    fn len(&self) -> usize {
        self.leaves.len()
    }
}
