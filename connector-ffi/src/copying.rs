//! The wall around copies between frames and engine memory: the only place that touches either.
//!
//! # Invariants
//! A copy into the engine counts only if its checksum is right and the frame's generation was the granted one before and
//! after. A copy into a frame counts only if the generation still was the granted one after it.
#![expect(unsafe_code, reason = "engine memory is reachable only by the addresses the engine registered")]

pub(crate) mod device;

use kvtier_memory::MappedExtent;
use kvtier_memory::copy::{Direction, copy_checksummed};
use kvtier_memory::plan::{FrameSpan, Region, plan};

use crate::frame::FrameRef;

/// What became of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Copied {
    /// All bytes are where they belong; their checksum.
    Whole(u64),
    /// The bytes are not those that were sealed.
    Corrupt,
    /// The frame is not there anymore.
    Lost,
}

/// Copies a frame into block `block` of `regions`.
///
/// The addresses in `regions` are the engine's promise (`kvtier_register_regions`): memory that stays mapped until the
/// session is closed, and blocks that nobody else uses while a job names them.
#[must_use]
pub(crate) fn load(extent: &MappedExtent, frame: &FrameRef, regions: &[Region], block: u32) -> Copied {
    let Some(checksum) = copy(extent, frame, (regions, block), Direction::FromFrame) else { return Copied::Lost };
    if extent.generation(frame.offset) != frame.generation {
        return Copied::Lost;
    }
    if checksum == frame.checksum { Copied::Whole(checksum) } else { Copied::Corrupt }
}

/// Copies block `block` of `regions` into a frame. Promises as for [`load`].
#[must_use]
pub(crate) fn save(extent: &MappedExtent, frame: &FrameRef, regions: &[Region], block: u32) -> Copied {
    let Some(checksum) = copy(extent, frame, (regions, block), Direction::IntoFrame) else { return Copied::Lost };
    if extent.generation(frame.offset) == frame.generation { Copied::Whole(checksum) } else { Copied::Lost }
}

/// The checksum of the bytes copied; `None` when nothing was, because frame and extent or block do not fit.
fn copy(extent: &MappedExtent, frame: &FrameRef, block: (&[Region], u32), direction: Direction) -> Option<u64> {
    if frame.generation == kvtier_memory::NO_GENERATION || extent.generation(frame.offset) != frame.generation {
        return None;
    }
    let at = match direction {
        Direction::FromFrame => extent.range(frame.offset, frame.bytes).ok()?.expose_provenance(),
        Direction::IntoFrame => extent.range_mut(frame.offset, frame.bytes).ok()?.expose_provenance(),
    };
    // Populating costs one call where faulting costs one a page; where it fails, the copy faults.
    drop(extent.populate_range(frame.offset, frame.bytes));
    let span = FrameSpan { base: at, bytes: frame.bytes };
    let runs = plan(block.0, u64::from(block.1), span, direction).ok()?;
    // SAFETY: the plan keeps every run inside the extent, which is mapped as the direction needs while `extent` is
    // borrowed, and inside the registered regions, which the engine keeps mapped and leaves to this block's only job.
    let checksum = unsafe { copy_checksummed(&runs, direction) };
    Some(checksum)
}
