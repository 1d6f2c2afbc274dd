//! The unsafe wall of memory: extents shared with engines, frames in them, descriptor passing, checksummed copies, copy plans.
//!
//! Other crates read and write frames through [`FramePin`], [`IoBuf`] and [`MappedExtent`] without `unsafe`; only raw
//! runs of engine memory ([`copy::Run`]) need it.
//!
//! *Invariants*: memory received from another process is sealed against shrinking before it is mapped, so no access to it
//! faults; a slot is reused only after its generation was cleared and its last pin dropped; a checksum covers exactly the
//! bytes that were written.

mod buffer;
pub mod checksum;
pub mod copy;
mod error;
mod extent;
pub mod fdpass;
mod frame;
mod generations;
mod mapping;
pub mod plan;
pub mod polynomial;
pub mod slab;

pub use buffer::{AlignedBuf, IoBuf};
pub use error::MemoryError;
pub use extent::{Extent, ExtentFds, MappedExtent, PageKind, UnknownPageKind};
pub use frame::{Alloc, Arena, ArenaConfig, ArenaStats, ClassStats, FrameId, FramePin};
pub use generations::{GenerationTable, MappedGenerations};

/// Granularity of slots, of the generation table and of direct I/O, in bytes.
pub const PAGE_BYTES: u64 = 4096;
/// log2 of [`PAGE_BYTES`]: the entry of a frame in its extent's generation table is at `offset >> SLOT_SHIFT`.
pub const SLOT_SHIFT: u32 = 12;
/// The generation no frame ever has: the slot starts no readable frame.
pub const NO_GENERATION: u64 = 0;

const _: () = assert!(usize::BITS == 64, "extents are mapped whole: kvtier needs a 64-bit address space");

/// A byte count as a length in memory.
#[expect(clippy::cast_possible_truncation, reason = "usize has 64 bits, asserted above")]
pub(crate) const fn size(bytes: u64) -> usize {
    bytes as usize
}
