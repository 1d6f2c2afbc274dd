//! The object tier: records in immutable packs, in an S3 bucket or a directory.
//!
//! ```text
//! write -> copied out of its frame, staged -> open pack (8 MiB, or late) -> PUT -> index -> answered
//! read  -> index -> ranged GET of one record -> header and checksum verified -> copied into its frame
//! forget-> index -> no record of the pack lives, nobody reads it -> DELETE
//! open  -> LIST, ranged GET of footers -> index
//! ```
//! What other daemons stored is read by the [`Floor`].
//!
//! Only PUT, ranged GET, LIST and DELETE are relied upon; names are digests of footers that never occur twice, so no
//! conditional request is needed and repeating any request is harmless. The format is in [`pack`].
//!
//! *Invariants*: a write returns `Ok` only after its pack was stored; a store that stopped answering costs a caller nothing
//! but an error (see [`breaker`]); one daemon writes below one prefix.
//! *Bounds*: `max_inflight_bytes` staged or uploading, as many being read; every call ends within its deadline; the index
//! takes about 100 bytes for each record.
//! *Cancellation*: a dropped write may store its record, which is then forgotten; a dropped read ends its GET.

mod breaker;
mod config;
mod floor;
mod footer;
mod index;
mod pack;
mod packer;
mod read;
mod recover;
mod remote;
mod write;

use std::collections::BTreeSet;
use std::collections::VecDeque;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use kvtier_memory::IoBuf;
use kvtier_types::{BlockKey, NodeId, ShardKey};
use object_store::ObjectStore;
use object_store::path::Path;
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore, SemaphorePermit, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

pub use self::config::{
    ObjectConfig, ObjectPlace, RecoveryLimits, RetryPolicy, S3CredentialNames, S3Place, UnknownPlace,
};
use self::floor::PackAt;
pub use self::floor::{
    Announced, Burial, Collected, Floor, FloorConfig, FloorRead, FloorRecord, FloorUsage, MAX_ANNOUNCED, Refreshed,
};
use self::index::Index;
use self::pack::PackName;
use self::packer::{Command, Packer};
use self::read::Wanted;
use self::remote::Remote;
use crate::store::{BlockStore, Expect, Location, ReadBack, RecordMeta, StorageError, Usage, Written};

/// Commands waiting for the background task; its senders wait beyond.
const COMMANDS: usize = 256;

/// What recovery found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Recovered {
    /// Whether the store answered. If not, call [`ObjectStoreTier::recover`] in the background: until it returned, writes
    /// are [`StorageError::Unavailable`].
    pub complete: bool,
    /// The living records, oldest first; of several of one shard the newest only.
    pub records: Vec<(RecordMeta, Location)>,
    /// One more than the highest sequence seen.
    pub next_sequence: u64,
    /// Whether something was passed over that may have records, and may be read by a later start.
    pub passed_over: bool,
    /// What was left alone, and why. Bounded.
    pub notes: Vec<String>,
}

/// What the tier and its background task share.
#[derive(Debug)]
struct Shared {
    config: ObjectConfig,
    root: Path,
    remote: Remote,
    index: Mutex<Index>,
    progress: Mutex<recover::Progress>,
    /// One permit: recoveries do not run side by side.
    recovery: Semaphore,
    recovered: AtomicBool,
    closed: AtomicBool,
    /// Wakes the background task: a breaker opened, or a pack died.
    wake: Arc<Notify>,
    /// Wakes writes that wait for room: a dead pack was deleted, or could not be.
    freed: Notify,
    /// The last packs uploaded and not deleted since, with their lengths, newest last.
    recent: Mutex<VecDeque<(PackName, u64)>>,
}

impl Shared {
    /// An object that probes write: it is never read.
    fn probe_path(&self) -> Path {
        self.root.clone().join("probe")
    }

    /// A pack was uploaded.
    fn uploaded(&self, name: PackName, bytes: u64) {
        let mut recent = self.recent.lock();
        if recent.len() == MAX_ANNOUNCED {
            recent.pop_front();
        }
        recent.push_back((name, bytes));
    }

    fn forget(&self, at: Location) {
        if self.index.lock().forget(at) {
            self.wake.notify_one();
        }
    }
}

/// A [`BlockStore`] over an object store. Locations are (number of the pack in this opening, index of the record).
///
/// Dropping it without [`BlockStore::close`] is a crash: what was not acknowledged may be lost.
#[derive(Debug)]
pub struct ObjectStoreTier {
    shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
    packer: Mutex<Option<JoinHandle<()>>>,
    staging: Arc<Semaphore>,
    staging_bytes: u64,
    reading: Arc<Semaphore>,
}

impl ObjectStoreTier {
    /// Opens the tier and looks for packs for at most `recovery.open_wait`. A store that does not answer is not an error:
    /// see [`Recovered::complete`]. Must be called within a tokio runtime with time and I/O.
    ///
    /// # Errors
    /// [`StorageError::Open`] when the configuration cannot work.
    pub async fn open(config: ObjectConfig) -> Result<(Self, Recovered), StorageError> {
        config.check()?;
        let store = config.place.connect(&config.retry)?;
        Self::open_with(config, store).await
    }

    /// As [`Self::open`], over a client that is there already.
    async fn open_with(config: ObjectConfig, store: Arc<dyn ObjectStore>) -> Result<(Self, Recovered), StorageError> {
        let wake = Arc::new(Notify::new());
        let shared = Arc::new(Shared {
            root: config.root()?,
            remote: Remote::new(store, config.retry, &wake),
            index: Mutex::new(Index::new(config.capacity_bytes)),
            progress: Mutex::default(),
            recovery: Semaphore::new(1),
            recovered: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            wake,
            freed: Notify::new(),
            recent: Mutex::default(),
            config,
        });
        let (commands, received) = mpsc::channel(COMMANDS);
        let packer = tokio::spawn(Packer::new(Arc::clone(&shared), new_life()).run(received));
        let inflight = usize::try_from(shared.config.max_inflight_bytes).unwrap_or(usize::MAX >> 3);
        let this = Self {
            commands,
            packer: Mutex::new(Some(packer)),
            staging: Arc::new(Semaphore::new(inflight)),
            staging_bytes: inflight as u64,
            reading: Arc::new(Semaphore::new(inflight)),
            shared,
        };
        let recovered = this.recovery_round(this.shared.config.recovery.open_wait).await.unwrap_or_else(|error| {
            let note = format!("nothing is known of what is stored, recovery goes on in the background: {error}");
            tracing::warn!(%note, "object tier");
            Recovered { notes: vec![note], ..Recovered::default() }
        });
        Ok((this, recovered))
    }

    /// Finds out what is stored, if opening could not: tries until the store answers or the tier is closed. Packs that it
    /// does not yield though it answers are left alone after a few rounds; they are not served until the next opening.
    ///
    /// # Errors
    /// [`StorageError::Closed`]; [`StorageError::Refused`] when the tier is recovered already, or another call is at it.
    pub async fn recover(&self) -> Result<Recovered, StorageError> {
        let _turn = self.recovery_turn()?;
        loop {
            match self.recovery_round(self.shared.config.recovery.round).await {
                Err(StorageError::Unavailable { reason, .. }) => {
                    tracing::info!(%reason, "object recovery will be tried again");
                    sleep(self.shared.config.retry.fail_fast).await;
                }
                other => return other,
            }
        }
    }

    /// Whether what is stored is known: whether the tier takes writes.
    #[must_use]
    pub fn is_recovered(&self) -> bool {
        self.shared.recovered.load(Ordering::Acquire)
    }

    /// The pack to give up when the tier is full: the one with the fewest living bytes. Forgetting its
    /// [`Self::live_records`] deletes it.
    #[must_use]
    pub fn reclaim_candidate(&self) -> Option<u32> {
        self.shared.index.lock().reclaim_candidate()
    }

    /// The living records of a pack, with their payload bytes.
    #[must_use]
    pub fn live_records(&self, pack: u32) -> Vec<(ShardKey, Location, u64)> {
        self.shared.index.lock().live_records(pack)
    }

    /// Which of some blocks have a record in a pack of this tier, those included that are forgotten: until the pack is
    /// deleted, a [`Floor`] finds them. Looks at each record once.
    #[must_use]
    pub fn blocks_in_packs(&self, blocks: &BTreeSet<BlockKey>) -> BTreeSet<BlockKey> {
        let (mut found, mut from) = (BTreeSet::new(), Some(0));
        while let Some(number) = from {
            from = self.shared.index.lock().find_blocks(number, blocks, &mut found);
        }
        found
    }

    /// Names of the last packs that this opening uploaded, at most [`MAX_ANNOUNCED`], newest last, as
    /// [`Floor::announced`] takes them. The writer is the last part of the configured prefix; none when that is no node id.
    #[must_use]
    pub fn recent_packs(&self) -> Vec<String> {
        let folder = self.shared.config.prefix.rsplit('/').next().unwrap_or_default();
        let Ok(writer) = NodeId::new(folder) else { return Vec::new() };
        let recent = self.shared.recent.lock().clone();
        recent.into_iter().map(|(name, bytes)| PackAt { writer: writer.clone(), name }.announce(bytes)).collect()
    }

    /// The right to recover, which one caller has at a time.
    fn recovery_turn(&self) -> Result<SemaphorePermit<'_>, StorageError> {
        let refused = |what: &str| StorageError::Refused { what: what.to_owned() };
        let turn = self.shared.recovery.try_acquire().map_err(|_| refused("another recovery is running"))?;
        if self.is_recovered() { Err(refused("the tier is recovered already")) } else { Ok(turn) }
    }

    async fn recovery_round(&self, deadline: Duration) -> Result<Recovered, StorageError> {
        self.check_open()?;
        let recovered = within(deadline, "recovery", recover::round(&self.shared)).await??;
        self.shared.recovered.store(true, Ordering::Release);
        self.shared.wake.notify_one();
        Ok(recovered)
    }

    fn check_open(&self) -> Result<(), StorageError> {
        if self.shared.closed.load(Ordering::Acquire) { Err(StorageError::Closed) } else { Ok(()) }
    }

    /// Longest a staged record or a flush waits: for the open pack, an upload before it in line, and its own.
    fn settle_deadline(&self) -> Duration {
        let config = &self.shared.config;
        config.max_linger + config.retry.write_deadline * 2 + config.retry.attempt_timeout
    }

    /// Sends a command and waits for its answer.
    async fn settled<T>(
        &self,
        command: Command,
        answer: oneshot::Receiver<Result<T, StorageError>>,
    ) -> Result<T, StorageError> {
        let settled = async {
            self.commands.send(command).await.map_err(|_| StorageError::Closed)?;
            answer.await.map_err(|_| StorageError::Closed)?
        };
        within(self.settle_deadline(), "the upload", settled).await?
    }
}

#[async_trait]
impl BlockStore for ObjectStoreTier {
    async fn write(&self, meta: RecordMeta, payload: IoBuf) -> Written {
        let (result, payload) = self.store(meta, payload).await;
        Written { result, payload }
    }

    async fn read(&self, key: &ShardKey, at: Location, expect: Expect, into: IoBuf) -> ReadBack {
        let (result, into) = self.load(&Wanted { key, at, expect }, into).await;
        ReadBack { result, into }
    }

    fn forget(&self, at: Location, _bytes: u64) {
        self.shared.forget(at);
    }

    fn usage(&self) -> Usage {
        self.shared.index.lock().usage()
    }

    /// Seals the open pack before its time. Records whose write returned are durable already.
    async fn flush(&self) -> Result<(), StorageError> {
        self.check_open()?;
        let (reply, answer) = oneshot::channel();
        self.settled(Command::Flush(reply), answer).await
    }

    async fn close(&self, deadline: Duration) -> Result<(), StorageError> {
        self.shared.closed.store(true, Ordering::Release);
        let Some(mut packer) = self.packer.lock().take() else { return Ok(()) };
        let everything = u32::try_from(self.staging_bytes).unwrap_or(u32::MAX);
        let ended = timeout(deadline, async {
            // A send that fails says that the task has ended already.
            drop(self.commands.send(Command::Close).await);
            drop((&mut packer).await);
            drop(self.reading.acquire_many(everything).await);
        });
        if ended.await.is_ok() {
            return Ok(());
        }
        packer.abort();
        let reason = "closing: uploads or reads did not end in time".to_owned();
        Err(StorageError::Unavailable { reason, source: None })
    }
}

impl Drop for ObjectStoreTier {
    fn drop(&mut self) {
        if let Some(packer) = self.packer.lock().take() {
            packer.abort();
        }
    }
}

/// The permits of a record: its bytes, or all there are, so that the longest record passes alone.
fn permits(bytes: u64, all: u64) -> u32 {
    u32::try_from(bytes.min(all)).unwrap_or(u32::MAX)
}

/// Something no other opening has. `RandomState` is seeded by the operating system; this needs no secrecy.
fn new_life() -> [u8; 16] {
    let draw = || RandomState::new().hash_one(std::process::id()).to_le_bytes();
    let mut life = [0; 16];
    life[..8].copy_from_slice(&draw());
    life[8..].copy_from_slice(&draw());
    life
}

async fn within<F: Future>(deadline: Duration, what: &str, call: F) -> Result<F::Output, StorageError> {
    timeout(deadline, call).await.map_err(|_| StorageError::Unavailable {
        reason: format!("{what} took longer than {deadline:?}"),
        source: None,
    })
}

#[cfg(test)]
mod tests;
