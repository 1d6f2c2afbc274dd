//! The disk tier: log segments on a local file system, written and read straight from and into frames.
//!
//! A record is appended to the active segment with one vectored write (header page and payload). A full segment is sealed
//! with a footer; space is given back by whole segments, so the caller picks one ([`DiskStore::reclaim_candidate`]),
//! moves or forgets what lives in it, and it is reused under a fresh epoch. See `segment` and `record` for the format,
//! `index` for the life of a segment, `recover` for the start.
//!
//! *Invariants*: capacity is never exceeded: the number of segment files is bounded, and each is allocated once, in full.
//! A failed write turns writes off, reads go on.
//! *Bounds*: [`MAX_READ_BYTES`] and [`MAX_WRITE_BYTES`] in flight; callers wait beyond that.
//! *Cancellation*: a dropped write leaves its record dead, a dropped read nothing; both end in the background.

mod config;
mod gate;
mod index;
mod keeper;
mod medium;
pub(crate) mod record;
mod recover;
mod segment;
mod verify;

use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use async_trait::async_trait;
use kvtier_memory::{AlignedBuf, IoBuf};
use kvtier_types::ShardKey;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::codec::check_meta;
use crate::disk::gate::{Gate, Ticket};
use crate::disk::index::{Command, Index, Pin, Reservation, Reserve};
use crate::disk::keeper::{Keeper, Poison};
use crate::disk::medium::{LOCK_FILE, Medium};
use crate::disk::record::{PAGE_BYTES, RecordHeader, payload_pages, record_pages};
use crate::disk::verify::verify;
use crate::io::{BlockIo, Direction, Part, Transfer, is_no_space};
use crate::lock::lock_dir;
use crate::store::{BlockStore, Expect, Location, ReadBack, RecordMeta, StorageError, Usage, Written};

pub use config::{DiskConfig, MAX_SEGMENTS};
pub use segment::{MAX_SEGMENT_BYTES, MIN_SEGMENT_BYTES};

/// Bytes of reads in the device's queue: more adds latency, not bandwidth.
pub const MAX_READ_BYTES: u64 = 32 << 20;
/// Bytes of writes in the device's queue. Apart from reads, so that an offload never delays an onboard by more.
pub const MAX_WRITE_BYTES: u64 = 32 << 20;
/// How long dropping a store waits for its keeper.
const DROP_WAIT: Duration = Duration::from_secs(10);

/// What a medium held at open.
#[derive(Debug)]
pub struct Recovered {
    /// Records that can be read, oldest first. A key may be there more than once: the last is the newest, forget the
    /// others. Payloads under a footer are not verified yet: every read does that.
    pub records: Vec<(RecordMeta, Location)>,
    /// One more than the highest sequence found.
    pub next_sequence: u64,
    /// What was cut, wiped or could not be had, for the log.
    pub cut: Vec<String>,
}

/// The disk tier.
#[derive(Debug)]
pub struct DiskStore {
    index: Arc<Index>,
    io: Arc<dyn BlockIo>,
    poison: Arc<Poison>,
    gate: Arc<Gate>,
    read_budget: Arc<Semaphore>,
    write_budget: Arc<Semaphore>,
    /// Disconnects when the keeper has ended.
    keeper_ended: Mutex<mpsc::Receiver<()>>,
    description: String,
}

/// What a write holds until the kernel is done; dropped there if nobody waits any more.
struct WriteHold {
    reservation: Reservation,
    _permit: OwnedSemaphorePermit,
    _ticket: Ticket,
}

/// What a read holds until the kernel is done.
struct ReadHold {
    pin: Pin,
    _permit: OwnedSemaphorePermit,
    _ticket: Ticket,
}

impl DiskStore {
    /// Locks the directory, recovers what it holds and starts the threads. Blocks on file operations.
    ///
    /// # Errors
    /// [`StorageError::Open`]: the configuration is out of bounds or another daemon has the directory.
    /// [`StorageError::Io`]: the directory cannot be read or written, or the I/O engine asked for cannot be had.
    pub fn open(config: &DiskConfig) -> Result<(Self, Recovered), StorageError> {
        Self::open_over(config, |io| io)
    }

    /// As [`Self::open`], with the engine wrapped: tests put faults there.
    pub(crate) fn open_over(
        config: &DiskConfig,
        wrap: impl FnOnce(Arc<dyn BlockIo>) -> Arc<dyn BlockIo>,
    ) -> Result<(Self, Recovered), StorageError> {
        let segments = config.segments()?;
        let lock = lock_dir(&config.dir, LOCK_FILE)?;
        let (medium, buffered) = Medium::probe(&config.dir, config.segment_bytes, config.direct)?;
        let scan = recover::scan(&medium, segments)?;
        let (io, refused) = crate::io::start(config.io, config.depth)
            .map_err(|source| StorageError::Io { action: "start the I/O engine".into(), source })?;
        let io = wrap(io);
        let description = format!(
            "{}, {}, {segments} segments of {} bytes in {}",
            io.describe(),
            medium.describe(),
            config.segment_bytes,
            config.dir.display()
        );
        let (commands, queue) = mpsc::channel();
        let index = Arc::new(Index::new(scan.segments, config.segment_bytes, commands));
        let poison = Arc::new(Poison::default());
        let keeper = Keeper { index: Arc::clone(&index), medium, poison: Arc::clone(&poison) };
        let (running, keeper_ended) = mpsc::channel::<()>();
        thread::Builder::new()
            .name("kvtier-keeper".into())
            .spawn(move || {
                let _running = running;
                keeper.work(&queue);
            })
            .map_err(|source| StorageError::Io { action: "start the keeper thread".into(), source })?;
        let this = Self {
            index,
            io,
            poison,
            gate: Arc::new(Gate::new(lock)),
            read_budget: budget(MAX_READ_BYTES),
            write_budget: budget(MAX_WRITE_BYTES),
            keeper_ended: Mutex::new(keeper_ended),
            description,
        };
        let next_sequence = scan.records.last().map_or(0, |(meta, _)| meta.sequence.saturating_add(1));
        let cut = scan.notes.into_iter().chain(buffered).chain(refused).collect();
        Ok((this, Recovered { records: scan.records, next_sequence, cut }))
    }

    /// The engine, the kind of I/O and the size, for logs and `doctor`.
    #[must_use]
    pub fn describe(&self) -> &str {
        &self.description
    }

    /// The sealed segment with the fewest live bytes: the cheapest to empty. `None` while nothing is sealed.
    #[must_use]
    pub fn reclaim_candidate(&self) -> Option<u32> {
        self.index.reclaim_candidate()
    }

    /// As [`Self::reclaim_candidate`], with those that are next to it: the cheapest first, at most so many.
    #[must_use]
    pub fn reclaim_candidates(&self, most: usize) -> Vec<u32> {
        self.index.reclaim_candidates(most)
    }

    /// Bytes that can be written before a segment must be emptied. Once another segment file was refused, by a file system
    /// smaller than the capacity or for want of descriptors, only files that exist count until one can be made again.
    #[must_use]
    pub fn room_bytes(&self) -> u64 {
        self.index.room_bytes()
    }

    /// The records of `segment` that are not forgotten, with their payload lengths.
    #[must_use]
    pub fn live_records(&self, segment: u32) -> Vec<(ShardKey, Location, u64)> {
        self.index.live_records(segment)
    }

    /// Why writes are off, if they are.
    ///
    /// # Errors
    /// [`StorageError::Poisoned`].
    pub fn health(&self) -> Result<(), StorageError> {
        self.poison.check()
    }

    fn check_write(&self, meta: &RecordMeta, payload: &IoBuf) -> Result<usize, StorageError> {
        self.poison.check()?;
        check_meta(meta)?;
        let refuse = |what: &str| StorageError::Refused { what: format!("a payload of {} bytes: {what}", meta.bytes) };
        if !self.index.fits(meta) {
            return Err(refuse("longer than a log segment holds"));
        }
        let len = usize::try_from(meta.bytes).map_err(|_| refuse("longer than memory"))?;
        if len > payload.len() {
            return Err(refuse(&format!("the buffer has {}", payload.len())));
        }
        let found = payload.checksum_at(0, len);
        if found != meta.checksum {
            let what = format!("the payload to write has checksum {found:#018x}, not {:#018x}", meta.checksum);
            return Err(StorageError::Corrupt { key: Box::new(meta.key), at: None, what });
        }
        Ok(len)
    }

    async fn reserve(&self, meta: &RecordMeta) -> Result<Reservation, StorageError> {
        loop {
            let mut changed = std::pin::pin!(self.index.changed.notified());
            changed.as_mut().enable();
            self.poison.check()?;
            match self.index.reserve(meta) {
                Reserve::Granted(reservation) => return Ok(reservation),
                Reserve::Full => return Err(StorageError::Full),
                Reserve::Wait => changed.await,
            }
        }
    }

    /// What a write needs before it starts, and the header page.
    async fn prepare_write(&self, meta: &RecordMeta, payload: &IoBuf) -> Result<(WriteHold, AlignedBuf), StorageError> {
        let ticket = self.gate.enter(Direction::Write)?;
        self.check_write(meta, payload)?;
        let permit = spend(&self.write_budget, record_pages(meta.bytes)).await?;
        let reservation = self.reserve(meta).await?;
        let header = RecordHeader { epoch: reservation.epoch, offset: reservation.at.offset, meta: meta.clone() };
        let page = AlignedBuf::from_slice(&*header.encode());
        Ok((WriteHold { reservation, _permit: permit, _ticket: ticket }, page))
    }

    fn failed_write(&self, at: Location, source: std::io::Error) -> StorageError {
        if is_no_space(&source) {
            return StorageError::Full;
        }
        let action = format!("write a record to segment {} at page {}", at.segment, at.offset);
        let error = StorageError::Io { action, source };
        self.poison.set(error.to_string());
        self.index.changed.notify_waiters();
        error
    }

    async fn prepare_read(
        &self,
        key: &ShardKey,
        at: Location,
        expect: Expect,
        into: &IoBuf,
    ) -> Result<ReadHold, StorageError> {
        let ticket = self.gate.enter(Direction::Read)?;
        if expect.bytes > into.len() as u64 {
            let what = format!("{} bytes into a buffer of {}", expect.bytes, into.len());
            return Err(StorageError::Refused { what });
        }
        let permit = spend(&self.read_budget, record_pages(expect.bytes)).await?;
        let pin = self.index.pin(key, at).ok_or(StorageError::NotFound)?;
        Ok(ReadHold { pin, _permit: permit, _ticket: ticket })
    }
}

/// A budget in pages.
fn budget(bytes: u64) -> Arc<Semaphore> {
    Arc::new(Semaphore::new(segment::page_number(bytes / PAGE_BYTES as u64) as usize))
}

/// Takes `pages` of a budget, or all of it for an operation that is larger.
async fn spend(budget: &Arc<Semaphore>, pages: u64) -> Result<OwnedSemaphorePermit, StorageError> {
    let most = segment::page_number(MAX_READ_BYTES.min(MAX_WRITE_BYTES) / PAGE_BYTES as u64);
    let pages = u32::try_from(pages).unwrap_or(most).min(most);
    Arc::clone(budget).acquire_many_owned(pages).await.map_err(|_| StorageError::Closed)
}

/// The header page and whole pages of the payload, to be moved in one call.
fn parts(page: AlignedBuf, payload: IoBuf, bytes: u64) -> Vec<Part> {
    let len = usize::try_from(payload_pages(bytes)).map_or(usize::MAX, |pages| pages * PAGE_BYTES);
    vec![Part { buf: IoBuf::Heap(page), len: PAGE_BYTES }, Part { buf: payload, len }]
}

/// The caller's buffer out of a transfer's parts; an empty one if the engine lost it.
fn take_payload(mut parts: Vec<Part>) -> IoBuf {
    parts.pop().map_or_else(|| IoBuf::heap(0), |part| part.buf)
}

#[async_trait]
impl BlockStore for DiskStore {
    async fn write(&self, meta: RecordMeta, mut payload: IoBuf) -> Written {
        let (hold, page) = match self.prepare_write(&meta, &payload).await {
            Ok(ready) => ready,
            Err(error) => return Written { result: Err(error), payload },
        };
        payload.zero_padding();
        let at = hold.reservation.at;
        let offset = u64::from(at.offset) * PAGE_BYTES as u64;
        let file = Arc::clone(&hold.reservation.file);
        let mut transfer = Transfer::new(file, Direction::Write, offset, parts(page, payload, meta.bytes));
        transfer.keep = Some(Box::new(hold));
        let finished = self.io.run(transfer).await;
        let payload = take_payload(finished.parts);
        let hold = finished.keep.and_then(|keep| keep.downcast::<WriteHold>().ok());
        let result = match (finished.result, hold) {
            (Ok(()), Some(hold)) => Ok(hold.reservation.commit(meta)),
            (Ok(()), None) => Err(self.failed_write(at, std::io::Error::other("the reservation did not come back"))),
            (Err(source), _) => Err(self.failed_write(at, source)),
        };
        Written { result, payload }
    }

    async fn read(&self, key: &ShardKey, at: Location, expect: Expect, into: IoBuf) -> ReadBack {
        let hold = match self.prepare_read(key, at, expect, &into).await {
            Ok(hold) => hold,
            Err(error) => return ReadBack { result: Err(error), into },
        };
        let offset = u64::from(at.offset) * PAGE_BYTES as u64;
        let file = Arc::clone(&hold.pin.file);
        let parts = parts(AlignedBuf::zeroed(PAGE_BYTES), into, expect.bytes);
        let mut transfer = Transfer::new(file, Direction::Read, offset, parts);
        transfer.keep = Some(Box::new(hold));
        let finished = self.io.run(transfer).await;
        let hold = finished.keep.and_then(|keep| keep.downcast::<ReadHold>().ok());
        let result = match (finished.result, hold) {
            (Ok(()), Some(hold)) => verify(key, at, expect, &finished.parts, &hold.pin),
            (Ok(()), None) => Err(StorageError::NotFound),
            (Err(source), _) => {
                let action = format!("read a record from segment {} at page {}", at.segment, at.offset);
                Err(StorageError::Io { action, source })
            }
        };
        ReadBack { result, into: take_payload(finished.parts) }
    }

    fn forget(&self, at: Location, _bytes: u64) {
        self.index.forget(at);
    }

    fn usage(&self) -> Usage {
        Usage { pending_writes: self.gate.pending_writes(), ..self.index.usage() }
    }

    async fn flush(&self) -> Result<(), StorageError> {
        let _ticket = self.gate.enter(Direction::Write)?;
        let (reply, done) = oneshot::channel();
        self.index.tell(Command::Sync(reply));
        done.await.map_err(|_| StorageError::Closed)?
    }

    async fn close(&self, deadline: Duration) -> Result<(), StorageError> {
        self.gate.close();
        let closing = async {
            self.gate.idle().await;
            self.index.retire_active();
            loop {
                let mut changed = std::pin::pin!(self.index.changed.notified());
                changed.as_mut().enable();
                if self.index.all_sealed() {
                    break;
                }
                changed.await;
            }
        };
        let ended = tokio::time::timeout(deadline, closing).await;
        ended.map_err(|_| StorageError::Unavailable {
            reason: format!("operations or footers were not written within {deadline:?}"),
            source: None,
        })?;
        self.index.tell(Command::Stop);
        self.gate.unlock();
        self.poison.check()
    }
}

impl Drop for DiskStore {
    fn drop(&mut self) {
        self.index.tell(Command::Stop);
        // Disconnected is the normal end; a timeout leaves the thread to a device that does not answer.
        let _ended = self.keeper_ended.lock().recv_timeout(DROP_WAIT);
    }
}

#[cfg(test)]
mod tests;
