//! The background task of the tier: fills packs, uploads them, deletes dead ones, probes a store that stopped answering.
//!
//! *Bounds*: the open pack and all uploads together hold at most `max_inflight_bytes` (each staged record carries its
//! permits until it is settled); one deletion and one probe of each kind run at a time; every call ends within its
//! deadline. *Cancellation*: dropping the task aborts its uploads; records not acknowledged by then may or may not be in
//! the store, and are found at the next opening if they are.

use std::collections::BTreeSet;
use std::mem;
use std::sync::Arc;

use bytes::Bytes;
use object_store::PutPayload;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::Shared;
use super::index::NewPack;
use super::pack::{self, Entry, PackId, PackName};
use crate::store::{Location, RecordMeta, StorageError};

/// Packs deleted by one background round.
const DELETE_BATCH: usize = 64;

/// What the tier asks of the task.
#[derive(Debug)]
pub(super) enum Command {
    /// Put a record into the open pack.
    Stage(Box<Staged>),
    /// Seal the open pack; answer when every upload begun so far has ended, with the last failure if any.
    Flush(oneshot::Sender<Result<(), StorageError>>),
    /// Take no more commands, upload what is staged, end.
    Close,
}

/// A record on its way into a pack.
#[derive(Debug)]
pub(super) struct Staged {
    pub(super) meta: RecordMeta,
    pub(super) header_bytes: u32,
    /// Header and payload.
    pub(super) record: Bytes,
    pub(super) waiter: Waiter,
}

/// Who waits for a record, and what it holds meanwhile.
#[derive(Debug)]
pub(super) struct Waiter {
    pub(super) reply: oneshot::Sender<Result<Location, StorageError>>,
    pub(super) room: Reservation,
    pub(super) _memory: OwnedSemaphorePermit,
}

/// Capacity set aside for a record until it is in a pack or given up.
#[derive(Debug)]
pub(super) struct Reservation {
    shared: Arc<Shared>,
    bytes: u64,
}

impl Reservation {
    /// Reserves room; waits while enough of it is being freed. The caller bounds the wait.
    ///
    /// # Errors
    /// [`StorageError::Full`]; [`StorageError::Unavailable`] when there is room but for dead packs that the store does not
    /// delete, for which nothing living should go.
    pub(super) async fn new(shared: &Arc<Shared>, bytes: u64) -> Result<Self, StorageError> {
        loop {
            let freed = shared.freed.notified();
            {
                let mut index = shared.index.lock();
                match index.reserve(bytes) {
                    Ok(()) => return Ok(Self { shared: Arc::clone(shared), bytes }),
                    Err(full) if !index.will_fit(bytes) => return Err(full),
                    Err(_) => shared.remote.deletes.check()?,
                }
            }
            freed.await;
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.shared.index.lock().release(self.bytes);
    }
}

/// The pack being filled.
#[derive(Debug)]
struct OpenPack {
    entries: Vec<Entry>,
    records: Vec<Bytes>,
    bytes: u64,
    waiters: Vec<Waiter>,
    seal_at: Instant,
}

/// A pack being uploaded.
#[derive(Debug)]
struct SealedPack {
    name: PackName,
    ordinal: u64,
    entries: Vec<Entry>,
    payload: PutPayload,
    waiters: Vec<Waiter>,
}

/// How a background call ended.
#[derive(Debug)]
enum Done {
    Put {
        ordinal: u64,
        failure: Option<String>,
    },
    /// Whether packs were deleted, and why the others were not.
    Deleted {
        any: bool,
        failure: Option<String>,
    },
    ProbedReads,
    ProbedWrites,
}

#[derive(Debug)]
struct Flush {
    awaited: BTreeSet<u64>,
    failure: Option<String>,
    reply: oneshot::Sender<Result<(), StorageError>>,
}

/// The task's state.
#[derive(Debug)]
pub(super) struct Packer {
    shared: Arc<Shared>,
    life: [u8; 16],
    next_ordinal: u64,
    open: Option<OpenPack>,
    tasks: JoinSet<Done>,
    uploading: BTreeSet<u64>,
    flushes: Vec<Flush>,
    deleting: bool,
    delete_after: Option<Instant>,
    /// The last deletion failed, which the log says.
    deletion_fails: bool,
    probing_reads: bool,
    probing_writes: bool,
}

impl Packer {
    pub(super) fn new(shared: Arc<Shared>, life: [u8; 16]) -> Self {
        Self {
            shared,
            life,
            next_ordinal: 0,
            open: None,
            tasks: JoinSet::new(),
            uploading: BTreeSet::new(),
            flushes: Vec::new(),
            deleting: false,
            delete_after: None,
            deletion_fails: false,
            probing_reads: false,
            probing_writes: false,
        }
    }

    /// Runs until [`Command::Close`], or until the tier is gone.
    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        loop {
            let wake_at = self.begin_what_is_due();
            tokio::select! {
                command = commands.recv() => match command {
                    Some(Command::Stage(staged)) => self.stage(*staged),
                    Some(Command::Flush(reply)) => self.flush(reply),
                    Some(Command::Close) => commands.close(),
                    None => break,
                },
                Some(done) = self.tasks.join_next() => self.finish(done),
                () = self.shared.wake.notified() => {}
                () = sleep_until(wake_at.unwrap_or_else(Instant::now)), if wake_at.is_some() => {}
            }
        }
        self.seal();
        self.begin_deletion();
        while let Some(done) = self.tasks.join_next().await {
            self.finish(done);
        }
    }

    /// Begins what is due and returns when the next thing will be.
    fn begin_what_is_due(&mut self) -> Option<Instant> {
        let now = Instant::now();
        if self.open.as_ref().is_some_and(|open| open.seal_at <= now) {
            self.seal();
        }
        let reads_at = self.shared.remote.reads.probe_at().filter(|_| !self.probing_reads);
        if reads_at.is_some_and(|at| at <= now) {
            self.probing_reads = true;
            let shared = Arc::clone(&self.shared);
            self.tasks.spawn(async move {
                shared.remote.probe_reads(&shared.probe_path()).await;
                Done::ProbedReads
            });
        }
        let writes_at = self.shared.remote.writes.probe_at().filter(|_| !self.probing_writes);
        if writes_at.is_some_and(|at| at <= now) {
            self.probing_writes = true;
            let shared = Arc::clone(&self.shared);
            self.tasks.spawn(async move {
                shared.remote.probe_writes(&shared.probe_path()).await;
                Done::ProbedWrites
            });
        }
        if self.delete_after.is_some_and(|at| at <= now) {
            self.delete_after = None;
        }
        self.begin_deletion();
        let later = |at: &Instant| *at > now;
        let seal_at = self.open.as_ref().map(|open| open.seal_at);
        [seal_at, reads_at, writes_at, self.delete_after].into_iter().flatten().filter(later).min()
    }

    fn stage(&mut self, staged: Staged) {
        let limit = self.shared.config.pack_bytes;
        let len = staged.record.len() as u64;
        if self.open.as_ref().is_some_and(|open| open.bytes + len > limit) {
            self.seal();
        }
        let linger = self.shared.config.max_linger;
        let open = self.open.get_or_insert_with(|| OpenPack {
            entries: Vec::new(),
            records: Vec::new(),
            bytes: 0,
            waiters: Vec::new(),
            seal_at: Instant::now() + linger,
        });
        open.entries.push(Entry { offset: open.bytes, header_bytes: staged.header_bytes, meta: staged.meta });
        open.bytes += len;
        open.records.push(staged.record);
        open.waiters.push(staged.waiter);
        if open.bytes >= limit {
            self.seal();
        }
    }

    /// Begins the upload of the open pack, if there is one.
    fn seal(&mut self) {
        let Some(open) = self.open.take() else { return };
        let ordinal = self.next_ordinal;
        self.next_ordinal += 1;
        let footer = pack::encode_footer(PackId { life: self.life, ordinal }, &open.entries);
        let trailer = pack::encode_trailer(&footer, open.bytes);
        let name = PackName::of(&footer);
        let tail = [Bytes::from(footer), Bytes::from(trailer)];
        let payload: PutPayload = open.records.into_iter().chain(tail).collect();
        let sealed = SealedPack { name, ordinal, entries: open.entries, payload, waiters: open.waiters };
        self.uploading.insert(ordinal);
        self.tasks.spawn(upload(Arc::clone(&self.shared), sealed));
    }

    fn flush(&mut self, reply: oneshot::Sender<Result<(), StorageError>>) {
        self.seal();
        self.flushes.push(Flush { awaited: self.uploading.clone(), failure: None, reply });
        self.answer_flushes();
    }

    fn answer_flushes(&mut self) {
        let (ended, going) = mem::take(&mut self.flushes).into_iter().partition(|flush| flush.awaited.is_empty());
        self.flushes = going;
        let ended: Vec<Flush> = ended;
        for flush in ended {
            let result = flush.failure.map_or(Ok(()), |reason| Err(StorageError::Unavailable { reason, source: None }));
            // Who asked may have given up: nothing to do for them then.
            drop(flush.reply.send(result));
        }
    }

    fn begin_deletion(&mut self) {
        // A deletion that fails stops no upload; a store that takes no uploads is not asked to delete either.
        let remote = &self.shared.remote;
        let idle = !self.deleting && self.delete_after.is_none();
        let answers = remote.writes.check().is_ok() && remote.deletes.check().is_ok();
        if !idle || !answers || !self.shared.index.lock().has_dead() {
            return;
        }
        self.deleting = true;
        self.tasks.spawn(delete_dead(Arc::clone(&self.shared)));
    }

    /// Says in the log that packs are not deleted, once until some are.
    fn note_deletion(&mut self, any: bool, failure: Option<String>) {
        self.deletion_fails &= !any;
        if let Some(reason) = failure
            && !self.deletion_fails
        {
            self.deletion_fails = true;
            tracing::warn!(%reason, "dead packs are not deleted, and go on taking room");
        }
    }

    fn finish(&mut self, done: Result<Done, tokio::task::JoinError>) {
        match done {
            Ok(Done::Put { ordinal, failure }) => {
                self.uploading.remove(&ordinal);
                for flush in &mut self.flushes {
                    if flush.awaited.remove(&ordinal) && failure.is_some() {
                        flush.failure.clone_from(&failure);
                    }
                }
                self.answer_flushes();
            }
            Ok(Done::Deleted { any, failure }) => {
                self.deleting = false;
                self.delete_after = failure.is_some().then(|| Instant::now() + self.shared.config.retry.fail_fast);
                self.note_deletion(any, failure);
            }
            Ok(Done::ProbedReads) => self.probing_reads = false,
            Ok(Done::ProbedWrites) => self.probing_writes = false,
            Err(error) => {
                tracing::error!(%error, "a background call of the object tier panicked");
                (self.deleting, self.probing_reads, self.probing_writes) = (false, false, false);
            }
        }
    }
}

/// Uploads a pack, puts it into the index and tells who waits.
async fn upload(shared: Arc<Shared>, sealed: SealedPack) -> Done {
    let SealedPack { name, ordinal, entries, payload, mut waiters } = sealed;
    let bytes = payload.content_length() as u64;
    let result = shared.remote.put(&name.path(&shared.root), payload).await;
    // A failed upload may have arrived nevertheless: it enters the index without a living record, to be deleted.
    let number = {
        let mut index = shared.index.lock();
        // What was reserved turns into what is used in one step, so that together they never exceed the capacity.
        index.release(waiters.iter_mut().map(|waiter| mem::take(&mut waiter.room.bytes)).sum());
        index.insert(&NewPack { name, bytes, entries: &entries }, |_| result.is_ok())
    };
    let failure = result.err().map(|error| error.to_string());
    if failure.is_none() {
        shared.uploaded(name, bytes);
    }
    if let Some(reason) = &failure {
        tracing::warn!(pack = %hex::encode(name.0), records = entries.len(), %reason, "a pack was not stored");
    }
    for (offset, waiter) in (0..).zip(waiters) {
        let Waiter { reply, room: _, _memory } = waiter;
        let at = Location { segment: number, offset };
        let answer = match &failure {
            None => Ok(at),
            Some(reason) => Err(StorageError::Unavailable { reason: reason.clone(), source: None }),
        };
        if reply.send(answer).is_err() && failure.is_none() {
            shared.index.lock().forget(at);
        }
    }
    Done::Put { ordinal, failure }
}

/// Deletes a batch of dead packs, until one cannot be.
async fn delete_dead(shared: Arc<Shared>) -> Done {
    let dead = shared.index.lock().take_dead(DELETE_BATCH);
    let (mut any, mut failure) = (false, None);
    for (number, name) in dead {
        shared.recent.lock().retain(|(recent, _)| *recent != name);
        if failure.is_none() {
            match shared.remote.delete(&name.path(&shared.root)).await {
                Ok(()) => any = true,
                Err(error) => failure = Some(error.to_string()),
            }
        }
        let mut index = shared.index.lock();
        if failure.is_none() {
            index.deleted(number);
        } else {
            index.still_there(number);
        }
        shared.freed.notify_waiters();
    }
    Done::Deleted { any, failure }
}

/// What a record adds to a pack at most: itself, its footer entry, and a pack's fixed parts in case it is alone.
pub(super) fn charge(record_bytes: u64, header_bytes: u64) -> u64 {
    record_bytes + pack::entry_bytes(header_bytes) + pack::PACK_FIXED_BYTES
}
