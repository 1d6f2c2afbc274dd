//! A frame of one shard of one block, as lookups and reservations grant it.

use kvtier_proto::v1;
use kvtier_types::BlockKey;

/// Where a shard of a block lies in the daemon's memory, and what its bytes must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameRef {
    /// The block.
    pub key: BlockKey,
    /// Its group.
    pub group: u32,
    /// The shard.
    pub shard: u32,
    /// The extent.
    pub extent: u32,
    /// The tier the bytes came from, as the wire's number; zero when not known.
    pub source: u32,
    /// Byte offset in the extent.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// Generation under which the frame was granted.
    pub generation: u64,
    /// CRC-64/NVME of the bytes, zero for a frame yet to be written.
    pub checksum: u64,
}

impl FrameRef {
    /// A frame from the wire.
    #[must_use]
    pub fn from_wire(key: BlockKey, group: u32, shard: u32, wire: &v1::Frame) -> Self {
        Self {
            key,
            group,
            shard,
            extent: wire.extent,
            source: u32::try_from(wire.source).unwrap_or(0),
            offset: wire.offset,
            bytes: wire.bytes,
            generation: wire.generation,
            checksum: wire.checksum,
        }
    }

    /// The message that seals it with `checksum`.
    #[must_use]
    pub fn sealed(&self, checksum: u64) -> v1::SealedFrame {
        v1::SealedFrame {
            key: bytes::Bytes::copy_from_slice(self.key.as_bytes()),
            group: self.group,
            shard: self.shard,
            extent: self.extent,
            offset: self.offset,
            generation: self.generation,
            checksum,
            abandoned: false,
        }
    }

    /// The message that gives it up.
    #[must_use]
    pub fn abandoned(&self) -> v1::SealedFrame {
        v1::SealedFrame { abandoned: true, ..self.sealed(0) }
    }

    /// The message that tells what became of a load from it.
    #[must_use]
    pub fn loaded(&self, result: v1::LoadResult) -> v1::LoadedFrame {
        v1::LoadedFrame {
            key: bytes::Bytes::copy_from_slice(self.key.as_bytes()),
            shard: self.shard,
            source: i32::try_from(self.source).unwrap_or(0),
            result: result.into(),
            generation: self.generation,
        }
    }
}
