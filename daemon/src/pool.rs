//! The arena as the core's frame pool.

use kvtier_memory::{Alloc, Arena, FrameId, PAGE_BYTES};
use kvtier_policy::{Allocation, FramePool, FrameRef};

/// Adapts [`Arena`] to [`FramePool`].
#[derive(Debug)]
pub(crate) struct ArenaPool(pub(crate) Arena);

const PAGE: u64 = PAGE_BYTES;

/// The arena's name of a frame of `bytes`.
pub(crate) fn frame_id(frame: FrameRef, bytes: u64) -> FrameId {
    FrameId { extent: frame.extent, offset: u64::from(frame.page) * PAGE, bytes, generation: frame.generation }
}

/// Bytes of the slot that serves `bytes`.
pub(crate) fn slot_bytes(bytes: u64) -> u64 {
    bytes.next_multiple_of(PAGE)
}

impl FramePool for ArenaPool {
    fn alloc(&mut self, bytes: u64) -> Allocation {
        match self.0.alloc(bytes) {
            Alloc::Granted(id) => {
                let page = u32::try_from(id.offset / PAGE).expect("an extent has fewer than 2^32 pages");
                Allocation::Granted(FrameRef { extent: id.extent, page, generation: id.generation })
            }
            Alloc::Growing => Allocation::Growing,
            Alloc::Full | Alloc::TooLarge { .. } => Allocation::Full,
        }
    }

    fn free(&mut self, frame: FrameRef, bytes: u64) {
        let known = self.0.free(frame_id(frame, bytes));
        assert!(known, "the core frees only frames it was granted");
    }

    fn class(&self, bytes: u64) -> u64 {
        slot_bytes(bytes)
    }

    fn victim_extents(&self, bytes: u64, most: usize) -> Vec<u32> {
        self.0.victim_extents(bytes, most)
    }

    fn capacity_bytes(&self) -> u64 {
        self.0.stats().capacity_bytes
    }
}
