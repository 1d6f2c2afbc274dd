//! What a stored shard says of itself: enough to rebuild the catalog's entry from any medium alone.

use crate::key::{BlockKey, NamespaceId, ShardKey};
use crate::semantic::BlockHints;
use crate::tenant::TenantId;

/// Where a record lies within its store. Opaque to everyone but the store that made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Location {
    /// Log segment (disk) or pack (object): the unit in which space is given back.
    pub segment: u32,
    /// Offset in the segment or pack, in units of 4 KiB.
    pub offset: u32,
}

/// What a record says of its payload: enough to rebuild the catalog's entry from the medium alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordMeta {
    /// What is stored.
    pub key: ShardKey,
    /// Namespace of the block.
    pub namespace: NamespaceId,
    /// Owner of the block.
    pub tenant: TenantId,
    /// Program, semantic type and taints of the block.
    pub hints: BlockHints,
    /// The block before it in the prefix, `None` for the first.
    pub parent: Option<BlockKey>,
    /// Blocks before it in the prefix.
    pub depth_blocks: u32,
    /// Index of its group in the layout.
    pub group: u16,
    /// Whether it is useless without its ancestors.
    pub needs_ancestors: bool,
    /// Display name of the model, at most [`RecordMeta::MAX_MODEL_BYTES`].
    pub model: String,
    /// Length of the payload.
    pub bytes: u64,
    /// CRC-64/NVME of the payload.
    pub checksum: u64,
    /// Order of writing, unique within a node: a later record has a higher number, across restarts too.
    pub sequence: u64,
    /// When the block is gone everywhere: milliseconds since the Unix epoch, `None` for never. Between nodes the
    /// remaining time travels instead, since their clocks differ.
    pub expires_ms: Option<u64>,
}

impl RecordMeta {
    /// Longest model name that fits a record's header page with everything else at its longest.
    pub const MAX_MODEL_BYTES: usize = 1024;

    /// What a reader of this record expects to find.
    #[must_use]
    pub const fn expect(&self) -> Expect {
        Expect { bytes: self.bytes, checksum: self.checksum }
    }
}

/// What the reader knows of the payload: a read whose bytes differ from it fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expect {
    /// Length of the payload.
    pub bytes: u64,
    /// CRC-64/NVME of the payload.
    pub checksum: u64,
}
