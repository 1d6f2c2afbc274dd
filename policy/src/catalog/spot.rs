//! Blocks that work in steps goes on from: between two steps an entry may go, and its number be given to another block.

use kvtier_types::BlockKey;

use super::{BlockId, Catalog};

/// Names a shard as long as the node runs, whatever becomes of its entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Place {
    pub(crate) key: BlockKey,
    layout: u16,
    shard: u16,
}

/// An entry that is to be found again in a later step, if it is still there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spot {
    id: BlockId,
    pub(crate) place: Place,
}

impl Catalog {
    /// Which shard an entry is.
    pub(crate) fn place_of(&self, id: BlockId) -> Place {
        let entry = self.get(id);
        Place { key: entry.key, layout: entry.layout, shard: entry.shard }
    }

    /// An entry as a later step finds it.
    pub(crate) fn spot(&self, id: BlockId) -> Spot {
        Spot { id, place: self.place_of(id) }
    }

    /// The entry of a spot now; `None` when it is gone. Never that of another shard.
    pub(crate) fn at(&self, spot: &Spot) -> Option<BlockId> {
        let Place { key, layout, shard } = &spot.place;
        self.find_again(Some(spot.id), key, *layout, *shard)
    }
}
