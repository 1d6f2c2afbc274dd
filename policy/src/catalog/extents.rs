//! Which blocks lie in which extent of host memory: what has to go before an extent can serve another size.
//!
//! *Invariant*: an entry with a frame of host memory is in the set of the frame's extent, and in no other.

use rustc_hash::{FxHashMap, FxHashSet};

use super::{BlockId, Catalog};
use crate::frame::FrameRef;

/// Blocks by extent.
#[derive(Debug, Default)]
pub(super) struct Extents(FxHashMap<u32, FxHashSet<BlockId>>);

impl Extents {
    /// A block's bytes went from one frame to another, came, or left.
    pub(super) fn moved(&mut self, id: BlockId, from: Option<FrameRef>, to: Option<FrameRef>) {
        if let Some(inside) = from.and_then(|frame| self.0.get_mut(&frame.extent)) {
            inside.remove(&id);
        }
        if let Some(frame) = to {
            self.0.entry(frame.extent).or_default().insert(id);
        }
    }

    /// Bytes of its own memory, by capacity.
    pub(super) fn memory_bytes(&self) -> usize {
        self.0.values().map(|inside| inside.capacity() * (size_of::<BlockId>() + 1)).sum()
    }
}

impl Catalog {
    /// The blocks in an extent of host memory, in the order of their numbers.
    pub(crate) fn in_host_extent(&self, extent: u32) -> Vec<BlockId> {
        let mut inside: Vec<BlockId> = self.extents.0.get(&extent).into_iter().flatten().copied().collect();
        inside.sort_unstable();
        inside
    }
}
