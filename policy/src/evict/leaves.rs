//! The blocks that may go, in the order of their last use; among those of one call the deepest first.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use super::{Facts, KnownId};

/// Blocks that may go. O(log n) per operation.
#[derive(Debug, Default)]
pub struct Leaves {
    order: BTreeSet<(u64, Reverse<u32>, KnownId)>,
}

impl Leaves {
    /// The block may go.
    ///
    /// # Panics
    /// If it is there already.
    pub fn offer(&mut self, id: KnownId, facts: Facts) {
        let fresh = self.order.insert((facts.touched, Reverse(facts.depth_blocks), id));
        assert!(fresh, "a block is offered once");
    }

    /// The block may not go any more.
    ///
    /// # Panics
    /// If it was not offered with these facts.
    pub fn withdraw(&mut self, id: KnownId, facts: Facts) {
        let known = self.order.remove(&(facts.touched, Reverse(facts.depth_blocks), id));
        assert!(known, "a block is withdrawn with the facts it was offered with");
    }

    /// The one that was used first.
    #[must_use]
    pub fn first(&self) -> Option<KnownId> {
        self.order.first().map(|(_, _, id)| *id)
    }

    /// The deepest that this call was the last to use. If the call used a block that stays, it is one below that.
    #[must_use]
    pub fn of_call(&self, touched: u64) -> Option<KnownId> {
        let from = (touched, Reverse(u32::MAX), KnownId::new(0));
        self.order.range(from..).next().filter(|(t, _, _)| *t == touched).map(|(_, _, id)| *id)
    }

    /// All, in order.
    pub fn iter(&self) -> impl Iterator<Item = KnownId> {
        self.order.iter().map(|(_, _, id)| *id)
    }

    /// All, `first` before the others if it is one of them.
    pub fn from(&self, first: Option<KnownId>) -> impl Iterator<Item = KnownId> {
        first.into_iter().chain(self.iter().filter(move |id| Some(*id) != first))
    }

    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Whether none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }
}
