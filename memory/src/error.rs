//! What can go wrong with memory: one variant per thing a caller does differently.

use std::io;

use crate::fdpass::FdStatus;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The system refused a call: memory, descriptors or a deadline ran out.
    #[error("{call} failed")]
    System {
        /// The system call.
        call: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A configured size cannot work.
    #[error("{what} is {bytes} bytes: {rule}")]
    BadSize {
        /// Which size.
        what: &'static str,
        /// Its value.
        bytes: u64,
        /// What it must be.
        rule: &'static str,
    },
    /// A received descriptor would not be safe to map.
    #[error("descriptor refused: {reason}")]
    BadDescriptor {
        /// Which property it lacks.
        reason: &'static str,
    },
    /// A range lies outside its extent, frame or buffer.
    #[error("{bytes} bytes at {offset} lie outside of {len}")]
    OutOfBounds {
        /// Start of the range.
        offset: u64,
        /// Length of the range.
        bytes: u64,
        /// Length of what it should lie in.
        len: u64,
    },
    /// The extent is mapped read-only.
    #[error("the extent is mapped read-only")]
    ReadOnly,
    /// A region's numbers contradict each other.
    #[error("region {region} is malformed: {reason}")]
    BadRegion {
        /// Index of the region.
        region: usize,
        /// Which rule it breaks.
        reason: &'static str,
    },
    /// The block is not in the region.
    #[error("block {block} is not in region {region} of {block_count} blocks")]
    NoSuchBlock {
        /// Index of the region.
        region: usize,
        /// The block asked for.
        block: u64,
        /// Blocks the region has.
        block_count: u64,
    },
    /// The regions' runs do not add up to the frame.
    #[error("a block has {block_bytes} bytes, its frame {frame_bytes}")]
    FrameMismatch {
        /// Sum of the runs of one block.
        block_bytes: u64,
        /// Length of the frame.
        frame_bytes: u64,
    },
    /// The daemon answered the request for descriptors with a refusal.
    #[error("the daemon refused the extent: {status:?}")]
    Refused {
        /// Its answer.
        status: FdStatus,
    },
    /// The other side of the descriptor socket broke the protocol.
    #[error("descriptor socket: {reason}")]
    Protocol {
        /// What was wrong.
        reason: &'static str,
    },
}

impl MemoryError {
    /// For `map_err` on a system call.
    pub(crate) fn system<E: Into<io::Error>>(call: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System { call, source: source.into() }
    }
}
