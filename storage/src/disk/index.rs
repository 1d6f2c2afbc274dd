//! What lies in which log segment: the in-memory truth of the disk tier. No I/O: it tells the keeper thread what to do.
//!
//! ```text
//!            prepare              activate          full              last write ended          footer written
//! Absent/Free ------> Prepared ------------> Active ------> Draining ------------------> Sealing --------------> Sealed
//!      ^                                                                                                           |
//!      +------------------------------------- no live record and no read in flight -------------------------------+
//! ```
//! *Invariants*: a segment's records are in `live` from commit to forget; a segment is reused only without live records,
//! pending writes and pins; at most one segment is active and one prepared.
//! *Bounds*: one command per transition, so at most a few per segment wait for the keeper.
//! *Lock order*: the one mutex is a leaf.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use kvtier_types::ShardKey;
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};

use crate::disk::record::{PAGE_BYTES, record_pages};
use crate::disk::segment::{Entry, SegmentHeader, entry_bytes, page_number, tail_pages};
use crate::store::{Location, RecordMeta, StorageError, Usage};

/// After there was no room for a segment, how long until it is tried again.
const NO_SPACE_RETRY: Duration = Duration::from_secs(1);
/// The same for another file while segments are free: it would make the tier larger, and a refused one is an allocation in
/// vain, on a file system that others may need.
const GROW_RETRY: Duration = Duration::from_secs(60);

/// Work for the keeper thread, which does the blocking file operations.
#[derive(Debug)]
pub(crate) enum Command {
    /// Make a segment ready for a new life, then call [`Index::prepared`] or [`Index::prepare_failed`].
    Prepare(u32),
    /// Write a segment's footer, then call [`Index::sealed`].
    Seal(u32),
    /// Make what was written so far durable.
    Sync(oneshot::Sender<Result<(), StorageError>>),
    /// End.
    Stop,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// No file yet.
    Absent,
    /// A file whose content is dead.
    Free,
    /// Being made ready, or ready, for its next life.
    Prepared,
    /// Takes appends.
    Active,
    /// Takes no more appends; some are still being written.
    Draining,
    /// Its footer is being written.
    Sealing,
    /// Complete; only loses records from here on.
    Sealed,
}

/// A record that has not been forgotten.
#[derive(Debug)]
struct Live {
    key: ShardKey,
    bytes: u64,
    sequence: u64,
    /// Kept until the footer is written.
    meta: Option<Box<RecordMeta>>,
}

/// One log segment.
#[derive(Debug)]
pub(crate) struct Segment {
    state: State,
    epoch: u64,
    file: Option<Arc<File>>,
    /// Next free page.
    cursor: u64,
    /// Footer bytes of every record appended in this life, forgotten and failed ones included.
    footer_bytes: u64,
    live: BTreeMap<u32, Live>,
    live_bytes: u64,
    pending: u32,
    pins: u32,
}

impl Segment {
    pub(crate) fn absent() -> Self {
        Self::empty(State::Absent, None)
    }

    pub(crate) fn free(file: Arc<File>) -> Self {
        Self::empty(State::Free, Some(file))
    }

    fn empty(state: State, file: Option<Arc<File>>) -> Self {
        Self {
            state,
            epoch: 0,
            file,
            cursor: 1,
            footer_bytes: 0,
            live: BTreeMap::new(),
            live_bytes: 0,
            pending: 0,
            pins: 0,
        }
    }

    /// A sealed segment with the records that recovery found.
    pub(crate) fn recovered(file: Arc<File>, epoch: u64, entries: &[Entry]) -> Self {
        let mut this = Self { epoch, ..Self::empty(State::Sealed, Some(file)) };
        for (offset, meta) in entries {
            let live = Live { key: meta.key, bytes: meta.bytes, sequence: meta.sequence, meta: None };
            if this.live.insert(*offset, live).is_none() {
                this.live_bytes += record_bytes(meta.bytes);
            }
        }
        this
    }
}

/// Pages of a record, in bytes.
fn record_bytes(payload: u64) -> u64 {
    record_pages(payload) * PAGE_BYTES as u64
}

/// Room for a record, held from reservation to commit; dropped without a commit, it is given up.
#[derive(Debug)]
pub(crate) struct Reservation {
    pub(crate) at: Location,
    pub(crate) epoch: u64,
    pub(crate) file: Arc<File>,
    index: Arc<Index>,
    committed: bool,
}

/// Keeps a segment from being reused while a read of it is in flight.
#[derive(Debug)]
pub(crate) struct Pin {
    pub(crate) file: Arc<File>,
    pub(crate) epoch: u64,
    pub(crate) sequence: u64,
    segment: u32,
    index: Arc<Index>,
}

/// Answer to [`Index::reserve`].
#[derive(Debug)]
pub(crate) enum Reserve {
    Granted(Reservation),
    /// A segment is being prepared: wait for [`Index::changed`].
    Wait,
    /// Nothing is free.
    Full,
}

#[derive(Debug)]
struct Inner {
    segments: Vec<Segment>,
    active: Option<u32>,
    /// The next segment to become active, and whether it is ready.
    prepared: Option<(u32, bool)>,
    /// When there was last no room for another file; `None` once one was made since.
    no_file_since: Option<Instant>,
    /// When there was last no room to make a free segment ready; `None` once another became free since.
    no_space_since: Option<Instant>,
}

impl Inner {
    /// The segment to make ready next, if there is one: what is free, and another file while there is room for it.
    fn next_segment(&self) -> Option<usize> {
        let of_state = |state| self.segments.iter().position(|s| s.state == state);
        let waits = |since: Option<Instant>, retry: Duration| since.is_some_and(|since| since.elapsed() < retry);
        let free = of_state(State::Free).filter(|_| !waits(self.no_space_since, NO_SPACE_RETRY));
        let retry = if free.is_some() { GROW_RETRY } else { NO_SPACE_RETRY };
        let absent = of_state(State::Absent).filter(|_| !waits(self.no_file_since, retry));
        // Where spare segments are kept something is always free: what was refused comes first once its time has come.
        if self.no_file_since.is_some() { absent.or(free) } else { free.or(absent) }
    }

    /// Sealed segments with live records: their live bytes and numbers.
    fn reclaimable(&self) -> impl Iterator<Item = (u64, u32)> {
        let sealed = self.segments.iter().enumerate();
        let sealed = sealed.filter(|(_, s)| s.state == State::Sealed && !s.live.is_empty());
        sealed.map(|(n, s)| (s.live_bytes, page_number(n as u64)))
    }
}

/// All segments.
#[derive(Debug)]
pub(crate) struct Index {
    inner: Mutex<Inner>,
    /// Signalled whenever a waiting writer should look again.
    pub(crate) changed: Notify,
    commands: Sender<Command>,
    segment_bytes: u64,
}

impl Index {
    pub(crate) fn new(segments: Vec<Segment>, segment_bytes: u64, commands: Sender<Command>) -> Self {
        let inner = Inner { segments, active: None, prepared: None, no_file_since: None, no_space_since: None };
        let this = Self { inner: Mutex::new(inner), changed: Notify::new(), commands, segment_bytes };
        let mut inner = this.inner.lock();
        for segment in 0..inner.segments.len() {
            this.free_if_dead(&mut inner, page_number(segment as u64));
        }
        drop(inner);
        this
    }

    const fn pages(&self) -> u64 {
        self.segment_bytes / PAGE_BYTES as u64
    }

    /// Whether a record fits an empty segment.
    pub(crate) fn fits(&self, meta: &RecordMeta) -> bool {
        1 + record_pages(meta.bytes) + tail_pages(entry_bytes(meta) as u64) <= self.pages()
    }

    /// Room for a record that [`Self::fits`].
    pub(crate) fn reserve(self: &Arc<Self>, meta: &RecordMeta) -> Reserve {
        let (pages, entry) = (record_pages(meta.bytes), entry_bytes(meta) as u64);
        let mut guard = self.inner.lock();
        let inner = &mut *guard;
        loop {
            let Some(active) = inner.active else {
                match inner.prepared {
                    Some((next, true)) => {
                        inner.prepared = None;
                        inner.active = Some(next);
                        inner.segments[next as usize].state = State::Active;
                        self.prepare_next(inner);
                        continue;
                    }
                    Some((_, false)) => return Reserve::Wait,
                    None => return if self.prepare_next(inner) { Reserve::Wait } else { Reserve::Full },
                }
            };
            let segment = &mut inner.segments[active as usize];
            if segment.cursor + pages + tail_pages(segment.footer_bytes + entry) > self.pages() {
                self.retire(inner);
                continue;
            }
            let offset = page_number(segment.cursor);
            let file = segment.file.clone().expect("an active segment has a file");
            segment.cursor += pages;
            segment.footer_bytes += entry;
            segment.pending += 1;
            let at = Location { segment: active, offset };
            let epoch = segment.epoch;
            return Reserve::Granted(Reservation { at, epoch, file, index: Arc::clone(self), committed: false });
        }
    }

    /// Asks the keeper for the next segment, if one is free and none is on its way. Whether one is on its way now.
    fn prepare_next(&self, inner: &mut Inner) -> bool {
        if inner.prepared.is_some() {
            return true;
        }
        let Some(next) = inner.next_segment() else { return false };
        inner.segments[next].state = State::Prepared;
        let next = page_number(next as u64);
        inner.prepared = Some((next, false));
        self.tell(Command::Prepare(next));
        true
    }

    /// Takes the active segment out of use; its footer is written once its writes have ended.
    fn retire(&self, inner: &mut Inner) {
        if let Some(active) = inner.active.take() {
            inner.segments[active as usize].state = State::Draining;
            self.seal_if_drained(inner, active);
        }
    }

    fn seal_if_drained(&self, inner: &mut Inner, segment: u32) {
        let this = &mut inner.segments[segment as usize];
        if this.state == State::Draining && this.pending == 0 {
            this.state = State::Sealing;
            self.tell(Command::Seal(segment));
        }
    }

    fn free_if_dead(&self, inner: &mut Inner, segment: u32) {
        let this = &mut inner.segments[segment as usize];
        if this.state == State::Sealed && this.live.is_empty() && this.pins == 0 {
            let file = this.file.take();
            *this = Segment::empty(State::Free, file);
            // It is worth a try even if another could not be made ready.
            inner.no_space_since = None;
            self.changed.notify_waiters();
        }
    }

    pub(crate) fn tell(&self, command: Command) {
        // The keeper is gone only when the store is: then nobody waits for the work.
        let _stopped = self.commands.send(command);
    }

    /// Seals the active segment though it is not full.
    pub(crate) fn retire_active(&self) {
        self.retire(&mut self.inner.lock());
    }

    /// Whether every segment with records has its footer.
    pub(crate) fn all_sealed(&self) -> bool {
        let unsealed = [State::Active, State::Draining, State::Sealing];
        self.inner.lock().segments.iter().all(|s| !unsealed.contains(&s.state))
    }

    /// The keeper made `segment` ready for the life `epoch`.
    pub(crate) fn prepared(&self, segment: u32, epoch: u64, file: Arc<File>) {
        let mut inner = self.inner.lock();
        let this = &mut inner.segments[segment as usize];
        let is_new = this.file.is_none();
        *this = Segment { epoch, ..Segment::empty(State::Prepared, Some(file)) };
        if is_new {
            inner.no_file_since = None;
        }
        inner.prepared = Some((segment, true));
        drop(inner);
        self.changed.notify_waiters();
    }

    /// The keeper could not: `file` is what is left of it, if anything.
    pub(crate) fn prepare_failed(&self, segment: u32, file: Option<Arc<File>>) {
        let mut inner = self.inner.lock();
        let now = Some(Instant::now());
        let state = if file.is_some() {
            inner.no_space_since = now;
            State::Free
        } else {
            inner.no_file_since = now;
            State::Absent
        };
        inner.segments[segment as usize] = Segment::empty(state, file);
        inner.prepared = None;
        drop(inner);
        self.changed.notify_waiters();
    }

    /// The keeper wrote the footer of `segment`, or could not (then recovery will find its records by hopping).
    pub(crate) fn sealed(&self, segment: u32) {
        let mut inner = self.inner.lock();
        let this = &mut inner.segments[segment as usize];
        this.state = State::Sealed;
        for live in this.live.values_mut() {
            live.meta = None;
        }
        self.free_if_dead(&mut inner, segment);
        drop(inner);
        self.changed.notify_waiters();
    }

    /// What the footer of a segment in [`State::Sealing`] is to say, and its file.
    pub(crate) fn footer_of(&self, segment: u32) -> (SegmentHeader, Option<Arc<File>>, Vec<Entry>) {
        let inner = self.inner.lock();
        let this = &inner.segments[segment as usize];
        let header = SegmentHeader { epoch: this.epoch, segment, bytes: self.segment_bytes };
        let metas = this.live.iter().filter_map(|(at, live)| live.meta.as_deref().map(|m| (*at, m.clone())));
        (header, this.file.clone(), metas.collect())
    }

    /// The present file of a segment, for its next life.
    pub(crate) fn file_of(&self, segment: u32) -> Option<Arc<File>> {
        self.inner.lock().segments[segment as usize].file.clone()
    }

    /// Files that may hold records no footer covers.
    pub(crate) fn unsealed_files(&self) -> Vec<Arc<File>> {
        let unsealed = [State::Active, State::Draining, State::Sealing];
        let inner = self.inner.lock();
        inner.segments.iter().filter(|s| unsealed.contains(&s.state)).filter_map(|s| s.file.clone()).collect()
    }

    /// Finds a live record and keeps its segment from being reused.
    pub(crate) fn pin(self: &Arc<Self>, key: &ShardKey, at: Location) -> Option<Pin> {
        let mut inner = self.inner.lock();
        let segment = inner.segments.get_mut(at.segment as usize)?;
        let sequence = segment.live.get(&at.offset).filter(|live| live.key == *key)?.sequence;
        let file = segment.file.clone()?;
        segment.pins += 1;
        Some(Pin { file, epoch: segment.epoch, sequence, segment: at.segment, index: Arc::clone(self) })
    }

    pub(crate) fn forget(&self, at: Location) {
        let mut inner = self.inner.lock();
        let Some(segment) = inner.segments.get_mut(at.segment as usize) else { return };
        if let Some(live) = segment.live.remove(&at.offset) {
            segment.live_bytes -= record_bytes(live.bytes);
            self.free_if_dead(&mut inner, at.segment);
        }
    }

    pub(crate) fn usage(&self) -> Usage {
        let inner = self.inner.lock();
        let used = |s: &Segment| match s.state {
            State::Absent | State::Free | State::Prepared => 0,
            State::Active => s.cursor * PAGE_BYTES as u64,
            State::Draining | State::Sealing | State::Sealed => self.segment_bytes,
        };
        Usage {
            capacity_bytes: inner.segments.len() as u64 * self.segment_bytes,
            used_bytes: inner.segments.iter().map(used).sum(),
            live_bytes: inner.segments.iter().map(|s| s.live_bytes).sum(),
            pending_writes: 0,
        }
    }

    /// Bytes that can be written before a segment must be emptied. Segments without a file are room as long as none was
    /// refused one.
    pub(crate) fn room_bytes(&self) -> u64 {
        let inner = self.inner.lock();
        let room = |s: &Segment| match s.state {
            State::Absent if inner.no_file_since.is_some() => 0,
            State::Absent | State::Free | State::Prepared => self.segment_bytes,
            State::Active => self.segment_bytes - s.cursor * PAGE_BYTES as u64,
            State::Draining | State::Sealing | State::Sealed => 0,
        };
        inner.segments.iter().map(room).sum()
    }

    /// The sealed segment with the fewest live bytes.
    pub(crate) fn reclaim_candidate(&self) -> Option<u32> {
        let inner = self.inner.lock();
        inner.reclaimable().min().map(|(_, segment)| segment)
    }

    /// The sealed segments with the fewest live bytes, the emptiest first, at most so many.
    pub(crate) fn reclaim_candidates(&self, most: usize) -> Vec<u32> {
        let mut found: Vec<(u64, u32)> = self.inner.lock().reclaimable().collect();
        found.sort_unstable();
        found.into_iter().take(most).map(|(_, segment)| segment).collect()
    }

    /// Live records of a segment with their payload lengths, in the order of their offsets.
    pub(crate) fn live_records(&self, segment: u32) -> Vec<(ShardKey, Location, u64)> {
        let inner = self.inner.lock();
        let live = inner.segments.get(segment as usize).into_iter().flat_map(|s| &s.live);
        live.map(|(&offset, live)| (live.key, Location { segment, offset }, live.bytes)).collect()
    }

    fn end_write(&self, at: Location, meta: Option<RecordMeta>) {
        let mut inner = self.inner.lock();
        let segment = &mut inner.segments[at.segment as usize];
        segment.pending -= 1;
        if let Some(meta) = meta {
            segment.live_bytes += record_bytes(meta.bytes);
            let (key, bytes, sequence) = (meta.key, meta.bytes, meta.sequence);
            segment.live.insert(at.offset, Live { key, bytes, sequence, meta: Some(Box::new(meta)) });
        }
        self.seal_if_drained(&mut inner, at.segment);
    }
}

impl Reservation {
    /// The record is on the medium: it can be found from now on.
    pub(crate) fn commit(mut self, meta: RecordMeta) -> Location {
        self.committed = true;
        self.index.end_write(self.at, Some(meta));
        self.at
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.committed {
            self.index.end_write(self.at, None);
        }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut inner = self.index.inner.lock();
        inner.segments[self.segment as usize].pins -= 1;
        self.index.free_if_dead(&mut inner, self.segment);
    }
}

#[cfg(test)]
mod tests;
