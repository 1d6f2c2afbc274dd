//! The copy plan: which runs of an engine's memory make up one block's frame. Pure arithmetic on addresses.
//!
//! ```text
//! region 0   |.. block b ..|        region 1   |.. block b ..|
//!                run_bytes                         run_bytes
//! frame      | region 0's run | region 1's run | ...
//! ```
//! *Invariants*: every run lies inside its region's span and inside the frame, and the runs fill the frame exactly.

use std::ptr::{with_exposed_provenance, with_exposed_provenance_mut};

use crate::copy::{Direction, Run};
use crate::{MemoryError, size};

/// A part of an engine's KV memory that holds one run of every block: a layer, or its keys or values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Address of block 0's run, exposed by whoever owns the memory.
    pub base: usize,
    /// Blocks it holds.
    pub block_count: u64,
    /// Bytes from one block's run to the next one's.
    pub block_stride: u64,
    /// Bytes of one block's run.
    pub run_bytes: u64,
    /// Bytes of memory that belong to the region, from `base`.
    pub span: u64,
}

/// Where a frame lies in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameSpan {
    /// Its address, exposed by whoever mapped it.
    pub base: usize,
    /// Its bytes.
    pub bytes: u64,
}

impl FrameSpan {
    /// The frame of `bytes` that is mapped at `base` (see [`crate::MappedExtent::range_mut`]). Exposes the address.
    #[must_use]
    pub fn at(base: *const u8, bytes: u64) -> Self {
        Self { base: base.expose_provenance(), bytes }
    }
}

impl Region {
    /// Checks that all its blocks lie in its span and no two of them overlap. `index` is for the error.
    ///
    /// # Errors
    /// [`MemoryError::BadRegion`].
    pub fn check(&self, index: usize) -> Result<(), MemoryError> {
        let bad = |reason| Err(MemoryError::BadRegion { region: index, reason });
        if self.base == 0 || self.run_bytes == 0 || self.block_count == 0 {
            return bad("base, run_bytes and block_count must be positive");
        }
        if self.block_count > 1 && self.block_stride < self.run_bytes {
            return bad("blocks overlap: block_stride is less than run_bytes");
        }
        let last = (self.block_count - 1).checked_mul(self.block_stride);
        let end = last.and_then(|at| at.checked_add(self.run_bytes));
        if end.is_none_or(|end| end > self.span) {
            return bad("the last block ends beyond span");
        }
        if (self.base as u64).checked_add(self.span).is_none() {
            return bad("base + span is beyond the address space");
        }
        Ok(())
    }

    /// Address of a block's run.
    fn run(&self, index: usize, block: u64) -> Result<usize, MemoryError> {
        self.check(index)?;
        if block >= self.block_count {
            return Err(MemoryError::NoSuchBlock { region: index, block, block_count: self.block_count });
        }
        Ok(self.base + size(block * self.block_stride))
    }
}

/// Bytes of one block over all `regions`; `None` if they do not fit a u64.
#[must_use]
pub fn block_bytes(regions: &[Region]) -> Option<u64> {
    regions.iter().try_fold(0_u64, |sum, region| sum.checked_add(region.run_bytes))
}

/// The runs that copy block `block` between `regions`, in their order, and `frame`; adjacent runs are merged.
///
/// # Errors
/// [`MemoryError::FrameMismatch`], [`MemoryError::NoSuchBlock`], [`MemoryError::BadRegion`],
/// [`MemoryError::OutOfBounds`] if the frame's end is beyond the address space.
pub fn plan(regions: &[Region], block: u64, frame: FrameSpan, direction: Direction) -> Result<Vec<Run>, MemoryError> {
    let block_bytes = block_bytes(regions).unwrap_or(u64::MAX);
    if block_bytes != frame.bytes {
        return Err(MemoryError::FrameMismatch { block_bytes, frame_bytes: frame.bytes });
    }
    if frame.base == 0 || (frame.base as u64).checked_add(frame.bytes).is_none() {
        return Err(MemoryError::OutOfBounds { offset: frame.base as u64, bytes: frame.bytes, len: u64::MAX });
    }
    let mut pieces: Vec<Piece> = Vec::with_capacity(regions.len());
    let mut in_frame = frame.base;
    for (index, region) in regions.iter().enumerate() {
        let in_engine = region.run(index, block)?;
        let len = size(region.run_bytes);
        // The frame's side is always adjacent: runs fill it without gaps.
        match pieces.last_mut() {
            Some(last) if last.in_engine + last.len == in_engine => last.len += len,
            _ => pieces.push(Piece { in_engine, in_frame, len }),
        }
        in_frame += len;
    }
    Ok(pieces.into_iter().map(|piece| piece.run(direction)).collect())
}

/// A run before it has a direction.
struct Piece {
    in_engine: usize,
    in_frame: usize,
    len: usize,
}

impl Piece {
    fn run(&self, direction: Direction) -> Run {
        let (from, to) = match direction {
            Direction::IntoFrame => (self.in_engine, self.in_frame),
            Direction::FromFrame => (self.in_frame, self.in_engine),
        };
        Run { src: with_exposed_provenance(from), dst: with_exposed_provenance_mut(to), len: self.len }
    }
}

#[cfg(test)]
mod tests;
