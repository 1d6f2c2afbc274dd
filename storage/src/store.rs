//! [`BlockStore`]: what every tier that holds bytes promises, and the vocabulary of its calls.
//!
//! A store keeps immutable *records*: the bytes of one sealed shard of a block plus everything needed to put it back
//! into the catalog after a restart. It never decides what to keep: the policy does, and tells it by
//! [`BlockStore::forget`].
//!
//! *Invariants* (pinned for every implementation by [`crate::conformance`])
//! - A read that returns `Ok` filled exactly the bytes that were written under that key, checksum verified after they
//!   arrived in the caller's buffer. Anything else is an error, and then the buffer's content is unspecified.
//! - Buffers given to a call are owned by it until the device is done with them, even if the future is dropped.
//! - Losing a record (crash before [`BlockStore::flush`], torn write, fault) is allowed; altering one is not.

use std::fmt::Debug;
use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use kvtier_memory::IoBuf;
use kvtier_types::ShardKey;
pub use kvtier_types::{Expect, Location, RecordMeta};

/// How full a store is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Bytes it may hold at most, overhead included; never exceeded.
    pub capacity_bytes: u64,
    /// Bytes that cannot be written without reclaiming first.
    pub used_bytes: u64,
    /// Bytes of records not forgotten, overhead included.
    pub live_bytes: u64,
    /// Calls of [`BlockStore::write`] that have not returned.
    pub pending_writes: u64,
}

/// The outcome of a write, with its buffer.
#[derive(Debug)]
pub struct Written {
    /// Where the record lies, or why it does not.
    pub result: Result<Location, StorageError>,
    /// The caller's buffer; an empty one if the I/O engine died with the operation in flight.
    pub payload: IoBuf,
}

/// The outcome of a read, with its buffer.
#[derive(Debug)]
pub struct ReadBack {
    /// `Ok` only when the buffer's first `expect.bytes` bytes are verified.
    pub result: Result<(), StorageError>,
    /// The caller's buffer; an empty one if the I/O engine died with the operation in flight.
    pub into: IoBuf,
}

/// A tier that holds bytes.
///
/// Every method may be called from several tasks at once. Implementations bound what is in flight and make callers
/// wait, so a caller needs a bound (or a deadline) of its own on how many calls it has outstanding.
#[async_trait]
pub trait BlockStore: Send + Sync + Debug {
    /// Stores `payload`'s first `meta.bytes` bytes and returns where. The record can be read at once; it survives a
    /// crash once a later [`Self::flush`] has returned. The payload is checked against `meta.checksum`.
    ///
    /// # Errors
    /// [`StorageError::Full`]: forget something first. [`StorageError::Corrupt`]: the payload does not have the
    /// checksum. [`StorageError::Refused`]: `meta` and the payload do not fit each other or the format.
    /// [`StorageError::Poisoned`], [`StorageError::Unavailable`], [`StorageError::Io`], [`StorageError::Closed`].
    async fn write(&self, meta: RecordMeta, payload: IoBuf) -> Written;

    /// Reads the record of `key` at `at` into the first `expect.bytes` bytes of `into`, and verifies that it is that
    /// key's record, of the medium's present life, with that length and checksum.
    ///
    /// # Errors
    /// [`StorageError::NotFound`]: there is no such record (any more). [`StorageError::Corrupt`]: what was found is not
    /// what was expected; forget it. [`StorageError::Refused`]: `into` is too short. [`StorageError::Unavailable`],
    /// [`StorageError::Io`], [`StorageError::Closed`].
    async fn read(&self, key: &ShardKey, at: Location, expect: Expect, into: IoBuf) -> ReadBack;

    /// Says that the record at `at` (of `bytes` payload bytes) is dead: it is not found from now on, and its space is
    /// reused once every record of its segment or pack is dead and no read of it is in flight. Forgetting twice is
    /// harmless. A forgotten record may come back at the next open: what must stay gone is the journal's business.
    fn forget(&self, at: Location, bytes: u64);

    /// How full it is. Never waits for I/O.
    fn usage(&self) -> Usage;

    /// Makes every record whose write returned before the call durable.
    ///
    /// # Errors
    /// As for [`Self::write`], except `Full` and `Refused`.
    async fn flush(&self) -> Result<(), StorageError>;

    /// Stops accepting calls (they return [`StorageError::Closed`]), lets those in flight end, and makes everything
    /// durable. Closing twice is harmless.
    ///
    /// # Errors
    /// [`StorageError::Unavailable`] when the deadline passed first: what was not durable by then may be lost.
    async fn close(&self, deadline: Duration) -> Result<(), StorageError>;
}

/// Why a store's call failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StorageError {
    /// No room: reclaim, then write again.
    #[error("the store is full")]
    Full,
    /// Bytes differ from what was written or expected. They were not returned as good.
    #[error("corrupt record of {key} at {at:?}: {what}")]
    Corrupt {
        /// The shard that was asked for.
        key: Box<ShardKey>,
        /// Where; `None` when the bytes to write were already wrong.
        at: Option<Location>,
        /// Which check failed, with the values.
        what: String,
    },
    /// No record there: never written, forgotten, or its space was reused.
    #[error("no such record")]
    NotFound,
    /// The arguments cannot be stored: a caller's mistake.
    #[error("refused: {what}")]
    Refused {
        /// Which argument, and its bound.
        what: String,
    },
    /// The medium failed a write: no more writes until the daemon restarts. Reads go on.
    #[error("no more writes are taken until kvtierd is restarted, check the disk first: {reason}")]
    Poisoned {
        /// The first failure.
        reason: String,
    },
    /// The operating system refused an operation.
    #[error("{action}: {source}")]
    Io {
        /// What was being done, and to which file.
        action: String,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
    /// Cannot be opened: the configuration, or what lies on the medium, does not allow it.
    #[error("cannot open {what}: {reason}")]
    Open {
        /// The directory, file or bucket.
        what: String,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// It did not answer in time, retries included; it may later.
    #[error("unavailable: {reason}")]
    Unavailable {
        /// What was tried.
        reason: String,
        /// The last failure, if there was one.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// The store was closed.
    #[error("the store is closed")]
    Closed,
}

/// An I/O error with what was being done to which file.
pub(crate) fn io_error(action: &str, path: &Path, source: std::io::Error) -> StorageError {
    StorageError::Io { action: format!("{action} {}", path.display()), source }
}
