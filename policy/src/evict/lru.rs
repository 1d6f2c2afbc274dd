//! Least recently used first; among blocks of one touch, the deepest first. O(log n) per operation.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use super::{Facts, Ranking};
use crate::catalog::BlockId;

/// Leaf-first LRU.
#[derive(Debug, Default)]
pub struct LeafLru {
    order: BTreeSet<(u64, Reverse<u32>, BlockId)>,
}

impl Ranking for LeafLru {
    fn insert(&mut self, id: BlockId, facts: Facts) {
        let fresh = self.order.insert((facts.touched, Reverse(facts.depth_blocks), id));
        assert!(fresh, "a block is ranked once");
    }

    fn remove(&mut self, id: BlockId, facts: Facts) {
        let known = self.order.remove(&(facts.touched, Reverse(facts.depth_blocks), id));
        assert!(known, "a block is removed with the facts it was ranked with");
    }

    fn victims(&self) -> Box<dyn Iterator<Item = BlockId> + '_> {
        Box::new(self.order.iter().map(|(_, _, id)| *id))
    }

    fn len(&self) -> usize {
        self.order.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oldest_first_then_deepest() {
        let mut lru = LeafLru::default();
        let facts = |touched, depth_blocks| Facts { touched, depth_blocks };
        lru.insert(BlockId::new(1), facts(5, 0));
        lru.insert(BlockId::new(2), facts(4, 1));
        lru.insert(BlockId::new(3), facts(4, 7));
        let order: Vec<u32> = lru.victims().map(BlockId::index).collect();
        assert_eq!(order, [3, 2, 1]);
        lru.remove(BlockId::new(3), facts(4, 7));
        assert_eq!(lru.len(), 2);
    }
}
