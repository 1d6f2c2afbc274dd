//! Ranking: the order in which the evictable blocks of one pool go.
//!
//! A ranking is told of every block that comes, is used and leaves, and is offered those that may go (sealed, no lease,
//! no movement, no resident child): every ranking is leaf-first by construction. What a ranking learns (survival tables,
//! who won the duel of shadow caches) is the node's, not the pool's: [`Segments`].

mod arc;
mod config;
mod duel;
mod guard;
mod guarded;
mod keys;
mod known;
mod leaves;
mod lru;
mod order;
mod prefixes;
mod s3fifo;
pub mod survival;
#[cfg(test)]
mod tests;

use std::fmt::Debug;

pub use arc::{ArcOrder, LeafArc};
pub use config::EvictionConfig;
pub use duel::{Contender, Duel, DuelConfig};
pub use guard::{Call, Guard};
pub use guarded::Guarded;
pub use keys::RecentKeys;
pub use known::{Known, KnownId};
pub use leaves::Leaves;
pub use lru::LeafLru;
pub use order::{LeafOrder, Order};
pub use prefixes::{BlockUse, Found, PrefixCache};
pub use s3fifo::{LeafS3Fifo, S3Order};
pub use survival::{SegmentId, Segments, SurvivalRanking};

/// What a ranking may know of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// Order of the last touch: larger is later. Blocks of one call share it.
    pub touched: u64,
    /// Blocks before it in its prefix.
    pub depth_blocks: u32,
    /// The segment it belongs to.
    pub segment: SegmentId,
}

/// What verbs, taints and rules say of a block's place in the order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Standing {
    /// It goes before any other.
    First,
    /// As its ranking says.
    #[default]
    Normal,
    /// A soft claim holds it: priority 0 to 100.
    Retained(u8),
}

/// Orders the evictable blocks of one pool.
///
/// The caller offers a block at most once, and withdraws it with the facts it offered it with, before it is used or
/// leaves. Every method is O(log n), amortized.
pub trait Ranking: Debug + Send {
    /// A block came to the pool. A `fresh` number was another block's before, or nobody's.
    fn came(&mut self, id: KnownId, fresh: bool, touched: u64);
    /// A block of the pool was used.
    fn used(&mut self, id: KnownId, touched: u64);
    /// A block left the pool, `evicted` to make room.
    fn left(&mut self, id: KnownId, evicted: bool);
    /// The block may go from now on.
    fn offer(&mut self, id: KnownId, facts: Facts, segments: &Segments);
    /// The block may not go any more, or has gone.
    fn withdraw(&mut self, id: KnownId, facts: Facts);
    /// Follows whoever leads the duel, where it can.
    fn follow(&mut self, _leader: Contender) {}
    /// Takes in what happened since: to segments, and to blocks.
    fn settle(&mut self, segments: &Segments);
    /// The block that should go first, after [`Ranking::settle`].
    fn first(&self) -> Option<KnownId>;
    /// Blocks in the order in which they should go, after [`Ranking::settle`].
    fn victims(&self) -> Box<dyn Iterator<Item = KnownId> + '_>;
    /// Blocks that may go.
    fn len(&self) -> usize;
    /// Whether nothing may go.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
