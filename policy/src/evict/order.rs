//! Rankings that keep an order of their own over all blocks of a pool and choose the next to go among its leaves.

use std::fmt::Debug;

use super::{Facts, KnownId, Leaves, Ranking, Segments};

/// Such an order. Every method is O(log n), amortized.
pub trait Order: Debug + Send {
    /// Of a pool with room for about so many blocks.
    fn new(capacity_blocks: usize) -> Self
    where
        Self: Sized;
    /// As [`Ranking::came`].
    fn came(&mut self, id: KnownId, fresh: bool, touched: u64);
    /// As [`Ranking::used`].
    fn used(&mut self, id: KnownId, touched: u64);
    /// As [`Ranking::left`].
    fn left(&mut self, id: KnownId, evicted: bool);
    /// The next to go of the leaves.
    fn choose(&mut self, leaves: &Leaves) -> Option<KnownId>;
}

/// The leaf-first ranking of an order.
#[derive(Debug)]
pub struct LeafOrder<O> {
    order: O,
    leaves: Leaves,
    /// The next to go.
    chosen: Option<KnownId>,
}

impl<O: Order> LeafOrder<O> {
    /// For a pool of about so many blocks.
    #[must_use]
    pub fn new(capacity_blocks: usize) -> Self {
        Self { order: O::new(capacity_blocks), leaves: Leaves::default(), chosen: None }
    }
}

impl<O: Order> Ranking for LeafOrder<O> {
    fn came(&mut self, id: KnownId, fresh: bool, touched: u64) {
        self.order.came(id, fresh, touched);
    }

    fn used(&mut self, id: KnownId, touched: u64) {
        self.order.used(id, touched);
    }

    fn left(&mut self, id: KnownId, evicted: bool) {
        self.order.left(id, evicted);
    }

    fn offer(&mut self, id: KnownId, facts: Facts, _segments: &Segments) {
        self.leaves.offer(id, facts);
    }

    fn withdraw(&mut self, id: KnownId, facts: Facts) {
        self.leaves.withdraw(id, facts);
        self.chosen = self.chosen.filter(|chosen| *chosen != id);
    }

    fn settle(&mut self, _segments: &Segments) {
        self.chosen = self.order.choose(&self.leaves);
    }

    fn first(&self) -> Option<KnownId> {
        self.chosen.or_else(|| self.leaves.first())
    }

    fn victims(&self) -> Box<dyn Iterator<Item = KnownId> + '_> {
        Box::new(self.leaves.from(self.chosen))
    }

    fn len(&self) -> usize {
        self.leaves.len()
    }
}
