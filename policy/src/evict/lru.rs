//! Least recently used first; among blocks of one touch, the deepest first. O(log n) per operation.

use super::{Facts, KnownId, Leaves, Ranking, Segments};

/// Leaf-first LRU.
#[derive(Debug, Default)]
pub struct LeafLru {
    leaves: Leaves,
}

impl Ranking for LeafLru {
    fn came(&mut self, _id: KnownId, _fresh: bool, _touched: u64) {}

    fn used(&mut self, _id: KnownId, _touched: u64) {}

    fn left(&mut self, _id: KnownId, _evicted: bool) {}

    fn offer(&mut self, id: KnownId, facts: Facts, _segments: &Segments) {
        self.leaves.offer(id, facts);
    }

    fn withdraw(&mut self, id: KnownId, facts: Facts) {
        self.leaves.withdraw(id, facts);
    }

    fn settle(&mut self, _segments: &Segments) {}

    fn first(&self) -> Option<KnownId> {
        self.leaves.first()
    }

    fn victims(&self) -> Box<dyn Iterator<Item = KnownId> + '_> {
        Box::new(self.leaves.iter())
    }

    fn len(&self) -> usize {
        self.leaves.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evict::SegmentId;

    #[test]
    fn oldest_first_then_deepest() {
        let mut lru = LeafLru::default();
        let segments = Segments::default();
        let facts = |touched, depth_blocks| Facts { touched, depth_blocks, segment: SegmentId::NONE };
        lru.offer(KnownId::new(1), facts(5, 0), &segments);
        lru.offer(KnownId::new(2), facts(4, 1), &segments);
        lru.offer(KnownId::new(3), facts(4, 7), &segments);
        let order: Vec<usize> = lru.victims().map(KnownId::index).collect();
        assert_eq!(order, [3, 2, 1]);
        lru.withdraw(KnownId::new(3), facts(4, 7));
        assert_eq!(lru.len(), 2);
    }
}
