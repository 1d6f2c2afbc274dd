//! Where a holder had tips that it outlived.

use std::collections::{BTreeMap, BTreeSet};

use crate::catalog::BlockId;

/// Blocks with their depths: the deepest goes first, so that children go before their parents.
#[derive(Debug, Default)]
pub(crate) struct Former {
    depths: BTreeMap<BlockId, u32>,
    order: BTreeSet<(u32, BlockId)>,
}

impl Former {
    pub(crate) fn insert(&mut self, id: BlockId, depth_blocks: u32) {
        self.remove(id);
        self.depths.insert(id, depth_blocks);
        self.order.insert((depth_blocks, id));
    }

    /// Whether it was there.
    pub(crate) fn remove(&mut self, id: BlockId) -> bool {
        let depth = self.depths.remove(&id);
        depth.is_some_and(|depth| self.order.remove(&(depth, id)))
    }

    pub(crate) fn pop_deepest(&mut self) -> Option<BlockId> {
        let (_, id) = self.order.pop_last()?;
        self.depths.remove(&id);
        Some(id)
    }

    /// Takes out the one that is the least deep.
    pub(crate) fn pop_first(&mut self) -> Option<BlockId> {
        let (_, id) = self.order.pop_first()?;
        self.depths.remove(&id);
        Some(id)
    }

    pub(crate) fn contains(&self, id: BlockId) -> bool {
        self.depths.contains_key(&id)
    }

    /// In the order of their numbers.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &BlockId> {
        self.depths.keys()
    }

    pub(crate) fn len(&self) -> usize {
        self.depths.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.depths.is_empty()
    }
}
