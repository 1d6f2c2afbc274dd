//! Types and constants of the C interface; cbindgen makes `include/kvtier.h` of them and of the functions beside.

use std::ffi::c_char;
use std::sync::Arc;

use kvtier_types::BlockKey;
use parking_lot::RwLock;

use crate::frame::FrameRef;
use crate::session::Session;

/// Version of this interface: a caller refuses a library that answers another one.
pub const KVTIER_ABI_VERSION: u32 = 3;

/// Done, or the answer is there.
pub const KVTIER_OK: i32 = 0;
/// Not yet: ask again.
pub const KVTIER_PENDING: i32 = 1;
/// No such thing, or not anymore.
pub const KVTIER_MISS: i32 = 2;
/// An argument is null, misaligned, malformed or out of range.
pub const KVTIER_INVALID_ARGUMENT: i32 = -1;
/// The session belongs to the process before the fork: open another one.
pub const KVTIER_FORKED: i32 = -2;
/// The session is closed.
pub const KVTIER_CLOSED: i32 = -3;
/// A bug in this library.
pub const KVTIER_PANIC: i32 = -4;
/// The daemon refuses the session.
pub const KVTIER_REFUSED: i32 = -5;
/// A bound of the session is reached.
pub const KVTIER_LIMIT: i32 = -6;
/// The buffer is too small for the answer.
pub const KVTIER_BUFFER_TOO_SMALL: i32 = -7;
/// The system refused something.
pub const KVTIER_IO: i32 = -8;

/// `kvtier_session_state`: no daemon, or not yet.
pub const KVTIER_STATE_ABSENT: i32 = 0;
/// `kvtier_session_state`: attached.
pub const KVTIER_STATE_ATTACHED: i32 = 1;
/// `kvtier_session_state`: the daemon refuses the session.
pub const KVTIER_STATE_REFUSED: i32 = 2;

/// `kvtier_reserve_poll`: the frames are there to be written.
pub const KVTIER_BLOCK_GRANTED: u8 = 1;
/// `kvtier_reserve_poll`: the block is stored already.
pub const KVTIER_BLOCK_PRESENT: u8 = 2;
/// `kvtier_reserve_poll`: no room, or somebody else writes it.
pub const KVTIER_BLOCK_BUSY: u8 = 3;

/// `kvtier_job_wait`: copied.
pub const KVTIER_TRANSFER_DONE: u8 = 1;
/// `kvtier_job_wait`: the bytes are not those that were sealed.
pub const KVTIER_TRANSFER_CORRUPT: u8 = 2;
/// `kvtier_job_wait`: the frame is gone, its extent could not be mapped, or the transfer was late or cancelled.
pub const KVTIER_TRANSFER_LOST: u8 = 3;

/// A status: zero or positive for answers, negative for errors; one of the constants above.
pub type Status = i32;

/// A session, opaque. Any thread may use it. Its memory stays valid after `kvtier_session_close`, so that a call that comes
/// late is answered `KVTIER_CLOSED`.
#[derive(Debug)]
pub struct Handle {
    /// Process that opened it. Read before anything else: a lock taken at the fork stays locked in the child.
    pub(super) pid: u32,
    pub(super) session: RwLock<Option<Arc<Session>>>,
}

/// Question of `kvtier_lookup_submit`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct LookupRequest {
    /// Bytes of this struct.
    pub size: u32,
    /// Bytes of one hash, 16 to 32.
    pub hash_len: u32,
    /// Names the request and its lease; a lookup of the same name replaces it.
    pub request_id: *const c_char,
    /// `hash_count` hashes of `hash_len` bytes: one for each `hash_block_tokens` tokens, from the first token on.
    pub hashes: *const u8,
    /// Number of hashes.
    pub hash_count: u32,
    /// Tokens the engine holds itself.
    pub local_tokens: u32,
    /// Salt of the request, or null.
    pub cache_salt: *const c_char,
    /// What the request's client said, as JSON: `hints_len` bytes, or null.
    pub hints: *const u8,
    /// Bytes of `hints`, at most 65,536.
    pub hints_len: u32,
    /// When to answer zero.
    pub deadline_ms: u32,
}

/// Answer of `kvtier_lookup_poll`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HitInfo {
    /// Bytes of this struct; set by the caller.
    pub size: u32,
    /// Usable prefix in tokens from the first token, or 0 when nothing beyond the computed tokens is usable.
    pub tokens: u32,
    /// Of the part beyond the computed tokens, what came from memory,
    pub host_tokens: u32,
    /// from disk,
    pub disk_tokens: u32,
    /// from the object store,
    pub object_tokens: u32,
    /// from another node,
    pub peer_tokens: u32,
    /// and what lies in a device's memory.
    pub device_tokens: u32,
}

/// One shard of one block in the daemon's memory. An all-zero key means: no frame.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// The block.
    pub key: [u8; 32],
    /// Its group.
    pub group: u32,
    /// The shard.
    pub shard: u32,
    /// The extent.
    pub extent: u32,
    /// 1 device, 2 host, 3 disk, 4 object.
    pub source: u32,
    /// Byte offset in the extent.
    pub offset: u64,
    /// Bytes of the shard.
    pub bytes: u64,
    /// Generation under which it was granted.
    pub generation: u64,
    /// CRC-64/NVME of the bytes; 0 before they are written.
    pub checksum: u64,
}

/// Wish of `kvtier_reserve_submit`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ReserveRequest {
    /// Bytes of this struct.
    pub size: u32,
    /// Bytes of one hash, 16 to 32.
    pub hash_len: u32,
    /// Group of the blocks.
    pub group: u32,
    /// Index of the first block.
    pub first_block: u32,
    /// `count` hashes of `hash_len` bytes, one for each block: that of its last token.
    pub hashes: *const u8,
    /// Number of blocks.
    pub count: u32,
    /// Bytes of `hints`, at most 65,536.
    pub hints_len: u32,
    /// Hash of the block before the first, or null for the first of a prefix.
    pub parent_hash: *const u8,
    /// Salt of the request, or null.
    pub cache_salt: *const c_char,
    /// What the request's client said, as JSON: `hints_len` bytes, or null.
    pub hints: *const u8,
}

/// A part of the engine's memory that holds one run of every block of a group.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct RegionInfo {
    /// Bytes of this struct.
    pub size: u32,
    /// The group.
    pub group: u32,
    /// Address of block 0's run.
    pub base: u64,
    /// Bytes of memory from `base` that belong to the region.
    pub span_bytes: u64,
    /// Bytes from one block's run to the next one's.
    pub block_stride: u64,
    /// Bytes of one block's run.
    pub run_bytes: u64,
    /// Blocks in the region.
    pub block_count: u64,
}

/// A frame and the engine's block it is copied to or from.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct TransferInfo {
    /// The frame.
    pub frame: Frame,
    /// The engine's block.
    pub block_id: u32,
    /// Zero.
    pub reserved: u32,
}

// Callers in other languages hold these layouts too; `tests/c/abi.c` checks them against the header.
const _: () = assert!(size_of::<Frame>() == 80);
const _: () = assert!(size_of::<TransferInfo>() == 88);
const _: () = assert!(size_of::<HitInfo>() == 28);
const _: () = assert!(size_of::<RegionInfo>() == 48);
const _: () = assert!(size_of::<LookupRequest>() == 56);
const _: () = assert!(size_of::<ReserveRequest>() == 56);

impl Frame {
    /// No frame.
    pub const NONE: Self = Self {
        key: [0; 32],
        group: 0,
        shard: 0,
        extent: 0,
        source: 0,
        offset: 0,
        bytes: 0,
        generation: 0,
        checksum: 0,
    };
}

impl From<Option<FrameRef>> for Frame {
    fn from(frame: Option<FrameRef>) -> Self {
        frame.map_or(Self::NONE, |frame| Self {
            key: *frame.key.as_bytes(),
            group: frame.group,
            shard: frame.shard,
            extent: frame.extent,
            source: frame.source,
            offset: frame.offset,
            bytes: frame.bytes,
            generation: frame.generation,
            checksum: frame.checksum,
        })
    }
}

impl From<&Frame> for FrameRef {
    fn from(frame: &Frame) -> Self {
        Self {
            key: BlockKey::new(frame.key),
            group: frame.group,
            shard: frame.shard,
            extent: frame.extent,
            source: frame.source,
            offset: frame.offset,
            bytes: frame.bytes,
            generation: frame.generation,
            checksum: frame.checksum,
        }
    }
}
