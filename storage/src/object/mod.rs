//! The object tier: records in immutable packs, in an S3 bucket or a directory.
//!
//! ```text
//! write -> copied out of its frame, staged -> open pack (8 MiB, or late) -> PUT -> index -> answered
//! read  -> index -> ranged GET of one record -> header and checksum verified -> copied into its frame
//! forget-> index -> no record of the pack lives, nobody reads it -> DELETE
//! open  -> LIST, ranged GET of footers -> index
//! ```
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
mod index;
mod pack;
mod packer;
mod recover;
mod remote;

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use kvtier_memory::IoBuf;
use kvtier_types::ShardKey;
use object_store::ObjectStore;
use object_store::path::Path;
use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{sleep, timeout};

pub use self::config::{
    ObjectConfig, ObjectPlace, RecoveryLimits, RetryPolicy, S3CredentialNames, S3Place, UnknownPlace,
};
use self::index::{Found, Index};
use self::packer::{Command, Packer, Reservation, Staged, Waiter};
use self::remote::Remote;
use crate::codec::{Malformed, check_meta};
use crate::store::{BlockStore, Expect, Location, ReadBack, RecordMeta, StorageError, Usage, Written};

/// Longest record: what one PUT may carry everywhere is 5 GiB, what a permit count and a length can say is less.
const MAX_RECORD_BYTES: u64 = 1 << 30;
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
    /// Wakes writes that wait for room: a dead pack was deleted.
    freed: Notify,
}

impl Shared {
    /// An object that probes write: it is never read.
    fn probe_path(&self) -> Path {
        self.root.clone().join("probe")
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
        let recovered = this.recover_for(this.shared.config.recovery.open_wait).await.unwrap_or_else(|error| {
            let note = format!("nothing is known of what is stored, recovery goes on in the background: {error}");
            tracing::warn!(%note, "object tier");
            Recovered { notes: vec![note], ..Recovered::default() }
        });
        Ok((this, recovered))
    }

    /// Finds out what is stored, if opening could not: tries until the store answers or the tier is closed.
    ///
    /// # Errors
    /// [`StorageError::Closed`]; [`StorageError::Refused`] when the tier is recovered already, or another call is at it.
    pub async fn recover(&self) -> Result<Recovered, StorageError> {
        loop {
            match self.recover_for(self.shared.config.recovery.round).await {
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

    async fn recover_for(&self, deadline: Duration) -> Result<Recovered, StorageError> {
        self.check_open()?;
        let refused = |what: &str| StorageError::Refused { what: what.to_owned() };
        let _turn = self.shared.recovery.try_acquire().map_err(|_| refused("another recovery is running"))?;
        if self.is_recovered() {
            return Err(refused("the tier is recovered already"));
        }
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

    /// Checks that a record can be taken now, and sets room and memory aside for it.
    async fn admit(
        &self,
        meta: &RecordMeta,
        payload: &IoBuf,
    ) -> Result<(Reservation, OwnedSemaphorePermit), StorageError> {
        self.check_open()?;
        check_meta(meta)?;
        if meta.bytes > payload.len() as u64 || meta.bytes > MAX_RECORD_BYTES {
            let what = format!("a record of {} bytes from a buffer of {}", meta.bytes, payload.len());
            return Err(StorageError::Refused { what });
        }
        if !self.is_recovered() {
            let reason = "what the object store holds is not known yet".to_owned();
            return Err(StorageError::Unavailable { reason, source: None });
        }
        self.shared.remote.writes.check()?;
        let header_bytes = pack::record_header(meta).len() as u64;
        let room = Reservation::new(&self.shared, packer::charge(header_bytes + meta.bytes, header_bytes));
        let room = within(self.shared.config.retry.write_deadline, "deleting dead packs", room).await??;
        let permits = permits(header_bytes + meta.bytes, self.staging_bytes);
        let memory = Arc::clone(&self.staging).acquire_many_owned(permits);
        let memory = within(self.settle_deadline(), "room in flight", memory).await?;
        // It may have stopped answering while this record waited its turn.
        self.shared.remote.writes.check()?;
        Ok((room, memory.map_err(|_| StorageError::Closed)?))
    }

    async fn store(&self, meta: RecordMeta, payload: IoBuf) -> (Result<Location, StorageError>, IoBuf) {
        let _pending = PendingWrite::new(&self.shared);
        let (room, memory) = match self.admit(&meta, &payload).await {
            Ok(admitted) => admitted,
            Err(error) => return (Err(error), payload),
        };
        let copied = spawn_blocking(move || {
            let copied = copy_record(&meta, &payload);
            (copied, meta, payload)
        });
        let (copied, meta, payload) = match copied.await {
            Ok(done) => done,
            Err(_) => return (Err(StorageError::Closed), IoBuf::heap(0)),
        };
        let (record, header_bytes) = match copied {
            Ok(copied) => copied,
            Err(error) => return (Err(error), payload),
        };
        let (reply, answer) = oneshot::channel();
        let waiter = Waiter { reply, room, _memory: memory };
        let staged = Command::Stage(Box::new(Staged { meta, header_bytes, record, waiter }));
        (self.settled(staged, answer).await, payload)
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

    async fn fetch(&self, want: &Wanted<'_>) -> Result<(Bytes, usize), StorageError> {
        self.check_open()?;
        self.shared.remote.reads.check()?;
        let reading = Reading::begin(&self.shared, want)?;
        let found = &reading.found;
        let corrupt = |what: String| want.corrupt(what);
        if found.payload_bytes != want.expect.bytes {
            return Err(corrupt(format!("{} bytes where {} are expected", found.payload_bytes, want.expect.bytes)));
        }
        let len = found.range.end - found.range.start;
        let memory = self.reading.acquire_many(permits(len, self.staging_bytes));
        let deadline = self.shared.config.retry.read_deadline;
        let _memory = within(deadline, "a turn to read", memory).await?.map_err(|_| StorageError::Closed)?;
        let bytes = self.shared.remote.get(&found.pack.path(&self.shared.root), found.range.clone()).await?;
        if bytes.len() as u64 != len {
            return Err(corrupt(format!("the pack ends within the record: {} of {len} bytes", bytes.len())));
        }
        pack::check_record(&bytes[..found.header_bytes], want.key, want.expect.bytes, want.expect.checksum)
            .map_err(|Malformed(what)| corrupt(what.to_owned()))?;
        Ok((bytes, found.header_bytes))
    }
}

#[async_trait]
impl BlockStore for ObjectStoreTier {
    async fn write(&self, meta: RecordMeta, payload: IoBuf) -> Written {
        let (result, payload) = self.store(meta, payload).await;
        Written { result, payload }
    }

    async fn read(&self, key: &ShardKey, at: Location, expect: Expect, mut into: IoBuf) -> ReadBack {
        if expect.bytes > into.len() as u64 {
            let what = format!("{} bytes into a buffer of {}", expect.bytes, into.len());
            return ReadBack { result: Err(StorageError::Refused { what }), into };
        }
        let want = Wanted { key, at, expect };
        let (bytes, header_bytes) = match self.fetch(&want).await {
            Ok(fetched) => fetched,
            Err(error) => return ReadBack { result: Err(error), into },
        };
        let copied = spawn_blocking(move || {
            let checksum = into.copy_in(&bytes[header_bytes..]);
            (checksum, into)
        });
        let (checksum, into) = match copied.await {
            Ok(done) => done,
            Err(_) => return ReadBack { result: Err(StorageError::Closed), into: IoBuf::heap(0) },
        };
        let differs = || want.corrupt(format!("payload checksum {checksum:016x}, expected {:016x}", expect.checksum));
        let result = if checksum == expect.checksum { Ok(()) } else { Err(differs()) };
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

/// What a read asks for.
struct Wanted<'a> {
    key: &'a ShardKey,
    at: Location,
    expect: Expect,
}

impl Wanted<'_> {
    fn corrupt(&self, what: String) -> StorageError {
        StorageError::Corrupt { key: Box::new(*self.key), at: Some(self.at), what }
    }
}

/// A read: keeps its pack from being deleted.
struct Reading<'a> {
    shared: &'a Shared,
    segment: u32,
    found: Found,
}

impl<'a> Reading<'a> {
    fn begin(shared: &'a Shared, want: &Wanted<'_>) -> Result<Self, StorageError> {
        let found = shared.index.lock().begin_read(want.key, want.at)?;
        Ok(Self { shared, segment: want.at.segment, found })
    }
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        if self.shared.index.lock().end_read(self.segment) {
            self.shared.wake.notify_one();
        }
    }
}

/// Counts a write that has not returned.
struct PendingWrite<'a>(&'a Shared);

impl<'a> PendingWrite<'a> {
    fn new(shared: &'a Shared) -> Self {
        shared.index.lock().pending_writes += 1;
        Self(shared)
    }
}

impl Drop for PendingWrite<'_> {
    fn drop(&mut self) {
        self.0.index.lock().pending_writes -= 1;
    }
}

/// The record's header and payload in memory of its own, and the header's length; the payload is verified on the way.
fn copy_record(meta: &RecordMeta, payload: &IoBuf) -> Result<(Bytes, u32), StorageError> {
    let mut record = pack::record_header(meta);
    let header = record.len();
    let bytes = usize::try_from(meta.bytes).expect("admit bounds a record by its buffer");
    record.resize(header + bytes, 0);
    let checksum = payload.copy_out(&mut record[header..]);
    if checksum != meta.checksum {
        let what = format!("checksum {checksum:016x} of the bytes to write, expected {:016x}", meta.checksum);
        return Err(StorageError::Corrupt { key: Box::new(meta.key), at: None, what });
    }
    Ok((Bytes::from(record), u32::try_from(header).expect("a header is about a kilobyte")))
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
