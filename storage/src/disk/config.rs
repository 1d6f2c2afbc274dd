//! Where and how a disk tier lies, with its bounds.

use std::path::PathBuf;

use crate::disk::record::PAGE_BYTES;
use crate::disk::segment::{MAX_SEGMENT_BYTES, MIN_SEGMENT_BYTES, page_number};
use crate::io::IoEngine;
use crate::store::StorageError;

/// Most segment files: one descriptor each, and a start-up that stays in the seconds.
pub const MAX_SEGMENTS: u64 = 16_384;

/// Where and how a disk tier lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskConfig {
    /// Directory of its own, created if need be (mode 0700).
    pub dir: PathBuf,
    /// Bytes of segment files at most; rounded down to whole segments, two at least.
    pub capacity_bytes: u64,
    /// Bytes of a segment, a multiple of 4096. Changing it wipes the tier.
    pub segment_bytes: u64,
    /// Which engine moves payloads.
    pub io: IoEngine,
    /// Transfers in the kernel at most.
    pub depth: u32,
    /// Bypass the page cache where the file system can.
    pub direct: bool,
}

impl DiskConfig {
    /// Default of [`Self::segment_bytes`].
    pub const SEGMENT_BYTES: u64 = 256 << 20;
    /// Default of [`Self::depth`]: bandwidth is reached at 4 to 16 records of 1 to 4 MiB.
    pub const DEPTH: u32 = 16;

    /// The defaults for a directory and a capacity.
    #[must_use]
    pub const fn new(dir: PathBuf, capacity_bytes: u64) -> Self {
        Self {
            dir,
            capacity_bytes,
            segment_bytes: Self::SEGMENT_BYTES,
            io: IoEngine::Auto,
            depth: Self::DEPTH,
            direct: true,
        }
    }

    /// Number of segments, after the bounds were checked.
    pub(crate) fn segments(&self) -> Result<u32, StorageError> {
        let refuse = |reason| StorageError::Open { what: self.dir.display().to_string(), reason };
        let bytes = self.segment_bytes;
        if !bytes.is_multiple_of(PAGE_BYTES as u64) || !(MIN_SEGMENT_BYTES..=MAX_SEGMENT_BYTES).contains(&bytes) {
            return Err(refuse(format!(
                "segment_bytes is {bytes}: it must be a multiple of {PAGE_BYTES} from {MIN_SEGMENT_BYTES} to {MAX_SEGMENT_BYTES}"
            )));
        }
        let segments = self.capacity_bytes / bytes;
        if !(2..=MAX_SEGMENTS).contains(&segments) {
            return Err(refuse(format!(
                "capacity_bytes {} makes {segments} segments of {bytes}: it must make 2 to {MAX_SEGMENTS}",
                self.capacity_bytes
            )));
        }
        Ok(page_number(segments))
    }
}
