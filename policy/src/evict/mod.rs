//! Ranking: the order in which the evictable blocks of one pool go.
//!
//! The core offers a ranking only blocks that may go (sealed, no lease, no movement, no resident child), so every
//! ranking is leaf-first by construction.

mod lru;

use std::fmt::Debug;

pub use lru::LeafLru;

use crate::catalog::BlockId;

/// What a ranking may know of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// Order of the last touch: larger is later. Blocks of one call share it.
    pub touched: u64,
    /// Blocks before it in its prefix.
    pub depth_blocks: u32,
}

/// Orders the evictable blocks of one pool.
///
/// The caller removes a block with the facts it inserted it with, and a block is in at most once.
pub trait Ranking: Debug + Send {
    /// The block may go from now on.
    fn insert(&mut self, id: BlockId, facts: Facts);
    /// The block may not go any more, or has gone.
    fn remove(&mut self, id: BlockId, facts: Facts);
    /// Blocks in the order in which they should go.
    fn victims(&self) -> Box<dyn Iterator<Item = BlockId> + '_>;
    /// Blocks that may go.
    fn len(&self) -> usize;
    /// Whether nothing may go.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
