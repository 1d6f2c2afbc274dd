//! The floor: reads what other writers stored, so that a block outlives its node.
//!
//! ```text
//! refresh    -> LIST of every writer's folder -> tombstones, then footers not known, newest first -> index
//! announced  -> tombstones and footers of the packs that a peer named                     -> index
//! find       -> index                                                                      no I/O
//! read       -> ranged GET of one record -> header and checksum verified -> copied into its frame
//! bury       -> tombstones -> index, and a file in the own folder: evicted for every node, whoever wrote it
//! heard      -> who is alive, for collect                                                  no I/O
//! collect    -> LIST -> DELETE of dead writers' oldest packs, where all writers' exceed the budget
//! ```
//! Nothing but the store is needed. It writes no packs: see [`super::ObjectStoreTier`] for the own folder, whose packs are
//! left out here.
//!
//! *Invariants*: a read returns `Ok` only for bytes whose header tells the whole key and whose checksum fits after they
//! arrived; what others wrote or said never makes it panic, wait longer than its deadlines or hold more than its bounds.
//! Everyone who may write to the store is trusted to have written the block that a key names.
//! *Bounds*: see [`index`] and [`tombstones`]; `max_inflight_bytes` being read; `concurrency` footers of at most 8 MiB at once.
//! *Cancellation*: every future may be dropped; what it learnt until then stays.

mod bury;
mod collect;
mod config;
mod index;
mod listing;
mod name;
mod presence;
mod read;
mod refresh;
mod tomb_file;
mod tombstones;

use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use kvtier_memory::IoBuf;
use kvtier_types::{Expect, NodeId, RecordMeta, ShardKey};
use object_store::ObjectStore;
use object_store::path::Path;
use parking_lot::{Mutex, RwLock};
use tokio::sync::{Mutex as AsyncMutex, Notify, Semaphore};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

pub use self::collect::Collected;
pub use self::config::FloorConfig;
pub use self::index::FloorUsage;
use self::index::Index;
use self::listing::Listed;
pub(super) use self::name::PackAt;
use self::name::TombAt;
use self::presence::Presence;
pub use self::refresh::{Announced, MAX_ANNOUNCED, Refreshed};
pub use self::tombstones::Burial;
use super::pack::PackName;
use super::remote::Remote;
use crate::store::StorageError;

/// Where a record of another writer lies. What [`Floor::find`] returns is good until the floor learns better; one that was
/// made up or changed reads as [`StorageError::Corrupt`] or [`StorageError::NotFound`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FloorRecord {
    /// Whose pack.
    pub writer: NodeId,
    /// The pack: the digest in its name.
    pub pack: [u8; 32],
    /// Byte offset of the record's header in the pack.
    pub offset: u64,
    /// Length of that header.
    pub header_bytes: u32,
    /// Length of the payload.
    pub bytes: u64,
    /// CRC-64/NVME of the payload.
    pub checksum: u64,
}

impl FloorRecord {
    /// What a reader of this record expects to find.
    #[must_use]
    pub const fn expect(&self) -> Expect {
        Expect { bytes: self.bytes, checksum: self.checksum }
    }

    fn pack_at(&self) -> PackAt {
        PackAt { writer: self.writer.clone(), name: PackName(self.pack) }
    }
}

/// The outcome of a read, with its buffer.
#[derive(Debug)]
pub struct FloorRead {
    /// What the record says of itself; `Ok` only when the buffer's first `bytes` bytes are verified.
    pub result: Result<RecordMeta, StorageError>,
    /// The caller's buffer; an empty one if the runtime is shutting down.
    pub into: IoBuf,
}

/// What the calls share.
#[derive(Debug)]
struct Shared {
    config: FloorConfig,
    root: Path,
    remote: Remote,
    index: RwLock<Index>,
    presence: Mutex<Presence>,
    /// Packs that were announced before it was known what is dead.
    early: Mutex<Vec<Listed>>,
    /// The last own file of tombstones.
    recent: Mutex<Option<TombAt>>,
    /// Own files that became part of another, and when.
    parts: Mutex<Vec<(TombAt, Instant)>>,
    /// When the last refresh ended that ended well.
    refreshed: Mutex<Option<Instant>>,
    /// Refreshes that got as far as the footers; as many as make it whole once one ended well.
    rounds: AtomicU32,
    /// Has [`Floor::keep_fresh`] refresh soon.
    wake_refresh: Notify,
    /// One permit: listings do not run side by side.
    listing: Semaphore,
    /// When the last file of tombstones was written: one after the other.
    burying: AsyncMutex<Option<Instant>>,
    /// A permit for each footer being read.
    footers: Semaphore,
    /// A permit for each byte being read.
    reading: Semaphore,
    reading_bytes: u64,
}

/// Other writers' packs. Dropping it ends its background task, which probes a store that stopped answering.
#[derive(Debug)]
pub struct Floor {
    shared: Arc<Shared>,
    probing: JoinHandle<()>,
}

impl Floor {
    /// Opens it, without network I/O: it knows nothing until [`Self::refresh`] or [`Self::announced`]. Must be called within
    /// a tokio runtime with time and I/O.
    ///
    /// # Errors
    /// [`StorageError::Open`] when the configuration cannot work.
    pub fn open(config: FloorConfig) -> Result<Self, StorageError> {
        config.check()?;
        let store = config.place.connect(&config.retry)?;
        Self::open_with(config, store)
    }

    /// As [`Self::open`], over a client that is there already.
    fn open_with(config: FloorConfig, store: Arc<dyn ObjectStore>) -> Result<Self, StorageError> {
        config.check()?;
        let wake = Arc::new(Notify::new());
        let root = config.root()?;
        let nowhere = name::folder(&root, &config.own).join("probe");
        let inflight = usize::try_from(config.max_inflight_bytes).unwrap_or(usize::MAX >> 3);
        let shared = Arc::new(Shared {
            remote: Remote::of_a_reader(store, config.retry, &wake),
            index: RwLock::new(Index::new(config.max_records)),
            presence: Mutex::default(),
            early: Mutex::default(),
            recent: Mutex::default(),
            listing: Semaphore::new(1),
            burying: AsyncMutex::default(),
            parts: Mutex::default(),
            refreshed: Mutex::default(),
            rounds: AtomicU32::new(0),
            wake_refresh: Notify::new(),
            footers: Semaphore::new(config.concurrency),
            reading: Semaphore::new(inflight),
            reading_bytes: inflight as u64,
            root,
            config,
        });
        let probed = Arc::clone(&shared);
        let probing = tokio::spawn(async move { probed.remote.keep_probing_reads(&wake, &nowhere).await });
        Ok(Self { shared, probing })
    }

    /// Where records of these shards lie, as far as it is known. Does no I/O.
    #[must_use]
    pub fn find(&self, keys: &[ShardKey]) -> Vec<Option<FloorRecord>> {
        keys.iter().map(|key| self.shared.index.read().find(key)).collect()
    }

    /// How much is known. Does no I/O.
    #[must_use]
    pub fn usage(&self) -> FloorUsage {
        self.shared.index.read().usage()
    }

    /// Refreshes every `list_every`, and sooner after a failure; never returns. Drop it to end it.
    pub async fn keep_fresh(&self) {
        let Shared { config, .. } = &*self.shared;
        let mut failing = false;
        loop {
            let pause = match self.refresh().await {
                Ok(found) => {
                    tracing::debug!(?found, "the floor is refreshed");
                    failing = false;
                    config.list_every
                }
                Err(error) => {
                    if !failing {
                        tracing::warn!(%error, "the floor could not be refreshed");
                    }
                    failing = true;
                    config.retry.fail_fast.min(config.list_every)
                }
            };
            tokio::select! {
                () = sleep(pause) => {}
                () = async {
                    self.shared.wake_refresh.notified().await;
                    sleep(config.retry.fail_fast.min(pause)).await;
                } => {}
            }
        }
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        self.probing.abort();
    }
}

#[cfg(test)]
mod tests;
