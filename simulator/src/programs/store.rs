//! The storage that nodes share: what was written last stays.

use kvtier_policy::evict::{KnownId, LeafLru, SegmentId, Segments};

use super::pool::{Entry, Order, Pool};
use super::tree::Tree;

/// The storage: LRU, leaf first, whatever the policy.
#[derive(Debug)]
pub(crate) struct Store {
    pool: Pool,
    segments: Segments,
    uses: u64,
    written: u64,
}

impl Store {
    pub(crate) fn new(blocks: usize) -> Self {
        let pool = Pool::new(blocks, Order::One(Box::new(LeafLru::default())));
        Self { pool, segments: Segments::default(), uses: 0, written: 0 }
    }

    pub(crate) fn has(&self, block: u32) -> bool {
        self.pool.has(KnownId::new(block))
    }

    /// A prefix was used: what is not there is written. Returns how many blocks.
    pub(crate) fn write(&mut self, path: &[u32], tree: &Tree) -> u64 {
        if self.pool.capacity == 0 {
            return 0;
        }
        self.uses += 1;
        let mut written = 0;
        for (depth, block) in (0..).zip(path) {
            let id = KnownId::new(*block);
            if self.pool.has(id) {
                self.pool.touch(id, (self.uses, SegmentId::NONE), &self.segments);
                continue;
            }
            while self.pool.used >= self.pool.capacity {
                let Some(victim) = self.pool.victim(&self.segments) else { return written };
                self.pool.remove(victim, true, &self.segments);
            }
            let parent = (depth > 0).then(|| KnownId::new(tree.parent(*block)));
            let entry = Entry { id, parent, depth, touched: self.uses, segment: SegmentId::NONE };
            self.pool.insert(entry, false, &self.segments);
            written += 1;
        }
        self.written += written;
        written
    }

    pub(crate) const fn written(&self) -> u64 {
        self.written
    }
}
