//! Touched frames in an arena of their own: what transports read from and into.

use anyhow::bail;
use kvtier_memory::{Alloc, Arena, ArenaConfig, FramePin, PageKind};

/// Bytes of an extent, and so of the longest frame.
const EXTENT_BYTES: u64 = 64 << 20;

/// So many frames of so many bytes, each touched.
///
/// # Errors
/// When the system has no memory.
pub(crate) fn frames(bytes: u64, count: usize) -> anyhow::Result<Vec<FramePin>> {
    let total = bytes.next_multiple_of(4096) * count as u64;
    let arena = Arena::new(ArenaConfig {
        capacity_bytes: total.next_multiple_of(EXTENT_BYTES) + EXTENT_BYTES,
        extent_bytes: EXTENT_BYTES,
        page_kind: PageKind::Plain,
        first_generation: 1,
    })?;
    let mut frames = Vec::with_capacity(count);
    while frames.len() < count {
        match arena.alloc(bytes) {
            Alloc::Granted(id) => frames.extend(arena.pin(id)),
            Alloc::Growing => drop(arena.grow()?),
            full => bail!("no frame: {full:?}"),
        }
    }
    frames.iter().for_each(|frame| frame.fill(0xa5));
    Ok(frames)
}
