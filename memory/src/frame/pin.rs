//! A guard of a frame's memory, through which the daemon reads and writes it.
//!
//! *Invariants*: while it lives, the mapping stays and the slot is granted to nobody else, even if the frame is freed.

use std::sync::Arc;

use super::{FrameId, Shared};
use crate::buffer::Span;
use crate::checksum::EMPTY;
use crate::slab::Pinned;
use crate::{Extent, size};

/// A pinned frame: plain memory of [`FramePin::len`] bytes, 4 KiB-aligned, in a slot of [`FramePin::capacity`] bytes.
///
/// It guards against reuse, not against other users of the same frame: a frame has one writer until it is sealed and
/// is not written after, which is the holder's business. An engine with a writable mapping can break that; checksums and
/// generations are made to notice.
#[derive(Debug)]
pub struct FramePin {
    shared: Arc<Shared>,
    extent: Arc<Extent>,
    frame: FrameId,
    span: Span,
}

impl FramePin {
    pub(super) fn new(shared: Arc<Shared>, pinned: Pinned<Extent>, frame: FrameId) -> Self {
        let base = pinned.extent.range(frame.offset, pinned.slot_bytes).expect("slots lie inside of their extent");
        let span = Span::of_slot(base, size(frame.bytes), size(pinned.slot_bytes));
        Self { shared, extent: pinned.extent, frame, span }
    }

    /// The frame.
    #[must_use]
    pub fn frame(&self) -> FrameId {
        self.frame
    }

    /// The extent it lies in.
    #[must_use]
    pub fn extent(&self) -> &Arc<Extent> {
        &self.extent
    }

    /// Bytes of the block it is for.
    #[must_use]
    pub fn len(&self) -> usize {
        self.span.len()
    }

    /// Whether it is for a block of no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.span.len() == 0
    }

    /// Bytes of its slot, a multiple of 4096: what direct I/O may transfer.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.span.capacity()
    }

    /// First byte, for reading while the pin lives.
    #[must_use]
    pub fn as_ptr(&self) -> *const u8 {
        self.span.base()
    }

    /// First byte, for writing while the pin lives.
    #[must_use]
    pub fn as_mut_ptr(&self) -> *mut u8 {
        self.span.base()
    }

    /// Writes `bytes` to the start; returns their CRC-64/NVME.
    ///
    /// # Panics
    /// If they are longer than the frame.
    pub fn copy_in(&self, bytes: &[u8]) -> u64 {
        self.span.write(0, bytes)
    }

    /// Reads from the start, as many bytes as fit `into`; returns the CRC-64/NVME of what was delivered.
    ///
    /// # Panics
    /// If `into` is longer than the frame.
    pub fn copy_out(&self, into: &mut [u8]) -> u64 {
        self.span.read(0, into)
    }

    /// CRC-64/NVME of the frame's bytes.
    #[must_use]
    pub fn checksum(&self) -> u64 {
        self.span.checksum(EMPTY, 0, self.len())
    }

    /// Sets every byte.
    pub fn fill(&self, byte: u8) {
        self.span.fill(0, self.len(), byte);
    }

    pub(crate) fn span(&self) -> &Span {
        &self.span
    }
}

impl Clone for FramePin {
    /// Another pin of the same frame, even if it was freed meanwhile.
    fn clone(&self) -> Self {
        let pinned = self.shared.state.lock().slab.pin(self.frame, true).expect("a pinned slot stays taken");
        Self::new(Arc::clone(&self.shared), pinned, self.frame)
    }
}

impl Drop for FramePin {
    fn drop(&mut self) {
        self.shared.state.lock().slab.unpin(self.frame);
    }
}
