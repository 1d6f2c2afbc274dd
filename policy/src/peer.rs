//! A reader's session with one peer: shards wanted from it become exports of many shards, reads under their leases, and
//! releases. Sans-io: the shell sends messages and moves bytes.
//!
//! ```text
//! want -> [queue] -> Export -> granted -> Read .. Read -> Release
//!                       |          each read's end is told once: Ended
//!                       refused, silent -> Ended for all its shards, and for those queued if nothing else was granted
//! ```
//!
//! *Invariants*
//! - Every shard wanted ends exactly once, by its deadline at the latest (`every_shard_ends_once`).
//! - What was read counts only if it ended before the lease did, as the reader reckons it: from the time of asking, less a
//!   margin. The owner counts from a later time, so the reader's lease always ends first.
//! - A lease is released once nothing reads under it any more, not before.
//!
//! *Bounds*: at most [`SessionConfig::window_bytes`] are asked for at once (but always one shard), at most
//! [`SessionConfig::max_exports`] exports are open.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use kvtier_types::{Expect, Instant, RecordMeta, ShardKey};

use crate::core::{FetchEnd, MoveId};
use crate::limits::MAX_SHARDS_PER_EXPORT;

/// By how much each answered export of a session that begins lets the next be longer.
const GROWTH: usize = 4;
/// How long the first export of an idle session has the peer for itself: a few round trips. Its first bytes are waited for.
const HEAD_START: Duration = Duration::from_millis(5);

/// Bounds of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionConfig {
    /// Bytes asked for at once.
    pub window_bytes: u64,
    /// Exports open at once: while one is read, the next is being asked for.
    pub max_exports: usize,
    /// Shards in one export.
    pub max_shards: usize,
    /// Shards in the first exports of an idle session: their bytes come while the rest is asked for.
    pub first_shards: usize,
    /// How long leases are asked for.
    pub ttl: Duration,
    /// How much earlier than the owner the reader takes a lease for ended.
    pub margin: Duration,
    /// How long the answer to an export may take.
    pub answer: Duration,
}

impl Default for SessionConfig {
    fn default() -> Self {
        Self {
            window_bytes: 64 << 20,
            max_exports: 4,
            max_shards: 256,
            first_shards: 16,
            ttl: Duration::from_secs(15),
            margin: Duration::from_secs(1),
            answer: Duration::from_secs(3),
        }
    }
}

/// A shard wanted from the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// The core's movement.
    pub id: MoveId,
    /// The shard.
    pub key: ShardKey,
    /// Its length.
    pub bytes: u64,
    /// When it is given up.
    pub deadline: Instant,
}

/// Number of an export within a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExportNumber(pub u64);

/// The peer's answer for one shard: where its transport finds the bytes, and what they are.
pub type Granted<D> = Option<(D, RecordMeta)>;

/// What the shell shall do.
#[derive(Debug, Clone, PartialEq)]
pub enum SessionAction<D> {
    /// Ask the peer to export; report with [`PeerSession::granted`] or [`PeerSession::refused`].
    Export {
        /// Names the export.
        export: ExportNumber,
        /// The shards.
        keys: Vec<ShardKey>,
        /// For how long.
        ttl: Duration,
        /// How long the peer may take to bring them into memory.
        wait: Duration,
    },
    /// Read one shard; report with [`PeerSession::read_ended`].
    Read {
        /// Under which export.
        export: ExportNumber,
        /// The core's movement.
        id: MoveId,
        /// Where.
        at: D,
        /// What must arrive.
        expect: Expect,
        /// When the read ends at the latest: the lease's end or the shard's deadline.
        deadline: Instant,
    },
    /// Stop a read: its lease or its shard's time is over. Report its end as that of any read.
    Stop {
        /// The core's movement.
        id: MoveId,
    },
    /// Tell the peer that an export is over.
    Release {
        /// Which.
        export: ExportNumber,
    },
    /// Tell the core how a shard ended.
    Ended {
        /// The core's movement.
        id: MoveId,
        /// How.
        end: FetchEnd,
    },
    /// Tell the core that the peer did not answer or the link to it failed.
    Unreachable,
}

/// How a read ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadEnd {
    /// All bytes arrived; the checksum of what arrived.
    Arrived {
        /// CRC-64/NVME.
        checksum: u64,
    },
    /// The owner has nothing there any more.
    Gone,
    /// It was stopped, or failed for its own sake.
    Failed,
    /// The link is down.
    LinkDown,
}

#[derive(Debug)]
struct Reading {
    shard: Wanted,
    meta: Box<RecordMeta>,
    /// Its end was told already; what arrives is ignored.
    told: bool,
}

#[derive(Debug)]
struct Export {
    /// Shards of an export not yet answered, in the order asked; `None` for those given up meanwhile.
    asked: Vec<Option<Wanted>>,
    /// Reads under way.
    reading: BTreeMap<MoveId, Reading>,
    granted: bool,
    /// Until when an answer is waited for.
    answer_by: Instant,
    /// Until when what is read counts.
    lease_ends: Instant,
    bytes: u64,
}

impl Export {
    /// Whether somebody waits for its answer.
    fn is_awaited(&self) -> bool {
        !self.granted && self.asked.iter().any(Option::is_some)
    }
}

/// A session.
#[derive(Debug)]
pub struct PeerSession<D> {
    config: SessionConfig,
    queue: VecDeque<Wanted>,
    exports: BTreeMap<ExportNumber, Export>,
    actions: VecDeque<SessionAction<D>>,
    asked_bytes: u64,
    /// Shards that the next export may have: few at first, as many as are allowed once answers came.
    most: usize,
    /// Until when nothing is asked for beside the first export.
    head_start: Option<Instant>,
    next: u64,
}

impl<D> PeerSession<D> {
    /// A session with nothing under way.
    #[must_use]
    pub const fn new(config: SessionConfig) -> Self {
        Self {
            config,
            queue: VecDeque::new(),
            exports: BTreeMap::new(),
            actions: VecDeque::new(),
            asked_bytes: 0,
            most: config.first_shards,
            head_start: None,
            next: 1,
        }
    }

    /// The next thing to do, until there is none.
    pub fn poll_action(&mut self) -> Option<SessionAction<D>> {
        self.actions.pop_front()
    }

    /// When [`Self::expire`] wants to be called next.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let queued = self.queue.iter().map(|w| w.deadline);
        let open = self.exports.values().flat_map(|e| {
            let reads = e.reading.values().filter(|r| !r.told).map(|r| r.shard.deadline.min(e.lease_ends));
            reads.chain((!e.granted).then_some(e.answer_by))
        });
        let head_start = self.head_start.filter(|_| !self.queue.is_empty());
        queued.chain(open).chain(head_start).min()
    }

    /// Whether nothing is wanted or under way.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.exports.is_empty() && self.actions.is_empty()
    }

    /// Wants a shard.
    pub fn want(&mut self, now: Instant, shard: Wanted) {
        self.queue.push_back(shard);
        self.pump(now);
    }

    /// Wants many at once, so that they share exports.
    pub fn want_all(&mut self, now: Instant, shards: impl IntoIterator<Item = Wanted>) {
        self.queue.extend(shards);
        self.pump(now);
    }

    /// The core gave a shard up: its end need not be told.
    pub fn cancel(&mut self, now: Instant, id: MoveId) {
        self.queue.retain(|w| w.id != id);
        // It may have ended in the same instant.
        self.actions.retain(|a| !matches!(a, SessionAction::Ended { id: ended, .. } if *ended == id));
        for export in self.exports.values_mut() {
            for slot in &mut export.asked {
                slot.take_if(|w| w.id == id);
            }
            if let Some(reading) = export.reading.get_mut(&id)
                && !reading.told
            {
                reading.told = true;
                self.actions.push_back(SessionAction::Stop { id });
            }
        }
        self.pump(now);
    }

    fn pump(&mut self, now: Instant) {
        if self.exports.is_empty() {
            self.most = self.config.first_shards;
        }
        // At first nothing beside an export that is not answered, whose answer and bytes would wait; then only short ones.
        if self.head_start.is_some_and(|end| now < end) && self.exports.values().any(Export::is_awaited) {
            return;
        }
        self.head_start = None;
        while self.exports.len() < self.config.max_exports.max(1) {
            if self.head_start.is_some() {
                return;
            }
            let is_new = self.most < self.config.max_shards && self.exports.values().any(Export::is_awaited);
            let most = if is_new { self.config.first_shards } else { self.most };
            let mut shards = Vec::new();
            let mut bytes = 0;
            let limit = most.min(self.config.max_shards).clamp(1, MAX_SHARDS_PER_EXPORT);
            while let Some(next) = self.queue.front().filter(|_| shards.len() < limit) {
                let first = self.asked_bytes == 0 && shards.is_empty();
                if !first && self.asked_bytes + bytes + next.bytes > self.config.window_bytes {
                    break;
                }
                bytes += next.bytes;
                shards.extend(self.queue.pop_front());
            }
            if shards.is_empty() {
                return;
            }
            self.ask(now, shards, bytes);
        }
    }

    fn ask(&mut self, now: Instant, shards: Vec<Wanted>, bytes: u64) {
        let export = ExportNumber(self.next);
        self.next += 1;
        self.asked_bytes += bytes;
        if self.exports.is_empty() {
            self.head_start = Some(now + HEAD_START);
        }
        let keys = shards.iter().map(|w| w.key).collect();
        let latest = shards.iter().map(|w| w.deadline).max().unwrap_or(now);
        let answer = self.config.answer.min(latest.since(now));
        self.exports.insert(
            export,
            Export {
                asked: shards.into_iter().map(Some).collect(),
                reading: BTreeMap::new(),
                granted: false,
                answer_by: now + answer,
                lease_ends: now + self.config.ttl.saturating_sub(self.config.margin),
                bytes,
            },
        );
        // The peer's time to stage is a part of ours to wait.
        let wait = answer / 2;
        self.actions.push_back(SessionAction::Export { export, keys, ttl: self.config.ttl, wait });
    }

    /// The peer's answer to an export, one for each shard asked. A late one releases what it grants.
    pub fn granted(&mut self, now: Instant, export: ExportNumber, answers: Vec<Granted<D>>) {
        // A peer that answers with fewer than were asked has the others not.
        let mut answers = answers.into_iter();
        let Some(open) = self.exports.get_mut(&export).filter(|e| !e.granted) else {
            self.actions.push_back(SessionAction::Release { export });
            return;
        };
        open.granted = true;
        self.most = self.most.saturating_mul(GROWTH).min(self.config.max_shards);
        for shard in std::mem::take(&mut open.asked) {
            let answer = answers.next().flatten();
            let Some(shard) = shard else { continue };
            let fits = |meta: &RecordMeta| meta.key == shard.key && meta.bytes == shard.bytes;
            match answer.filter(|(_, meta)| fits(meta)) {
                Some((at, meta)) => {
                    let deadline = open.lease_ends.min(shard.deadline);
                    let expect = meta.expect();
                    open.reading.insert(shard.id, Reading { shard, meta: Box::new(meta), told: false });
                    self.actions.push_back(SessionAction::Read { export, id: shard.id, at, expect, deadline });
                }
                None => self.actions.push_back(SessionAction::Ended { id: shard.id, end: FetchEnd::Gone }),
            }
        }
        self.close_if_done(export);
        self.pump(now);
    }

    /// The peer refused an export (`gone`: it is another life of the node, what it held is void), or did not answer.
    pub fn refused(&mut self, now: Instant, export: ExportNumber, gone: bool) {
        if self.exports.get(&export).is_none_or(|e| e.granted) {
            return;
        }
        self.fail_asked(export, if gone { FetchEnd::Gone } else { FetchEnd::Failed });
        if !gone {
            self.actions.push_back(SessionAction::Unreachable);
            self.give_up_queue();
        }
        self.pump(now);
    }

    /// What is queued for a peer that does not answer is had elsewhere, if it can be, instead of being asked for in vain.
    fn give_up_queue(&mut self) {
        if self.exports.values().any(|e| e.granted) {
            return;
        }
        for shard in self.queue.drain(..) {
            self.actions.push_back(SessionAction::Ended { id: shard.id, end: FetchEnd::Failed });
        }
    }

    fn fail_asked(&mut self, export: ExportNumber, end: FetchEnd) {
        let Some(open) = self.exports.remove(&export) else { return };
        self.asked_bytes -= open.bytes;
        for shard in open.asked.into_iter().flatten() {
            self.actions.push_back(SessionAction::Ended { id: shard.id, end: end.clone() });
        }
    }

    /// A read ended.
    pub fn read_ended(&mut self, now: Instant, export: ExportNumber, id: MoveId, end: ReadEnd) {
        let Some(open) = self.exports.get_mut(&export) else { return };
        let Some(reading) = open.reading.remove(&id) else { return };
        let in_time = now < open.lease_ends;
        if !reading.told {
            let end = match end {
                ReadEnd::Arrived { checksum } if checksum == reading.meta.checksum && in_time => {
                    FetchEnd::Done(reading.meta)
                }
                ReadEnd::Arrived { .. } if in_time => FetchEnd::Corrupt,
                ReadEnd::Gone => FetchEnd::Gone,
                ReadEnd::Arrived { .. } | ReadEnd::Failed | ReadEnd::LinkDown => FetchEnd::Failed,
            };
            self.actions.push_back(SessionAction::Ended { id, end });
        }
        if end == ReadEnd::LinkDown {
            self.actions.push_back(SessionAction::Unreachable);
        }
        self.close_if_done(export);
        self.pump(now);
    }

    fn close_if_done(&mut self, export: ExportNumber) {
        if self.exports.get(&export).is_some_and(|e| e.granted && e.reading.is_empty()) {
            let bytes = self.exports.remove(&export).map_or(0, |e| e.bytes);
            self.asked_bytes -= bytes;
            self.actions.push_back(SessionAction::Release { export });
        }
    }

    /// Ends what has outlived its time. Reads that run on are stopped, and keep their lease until they have ended.
    pub fn expire(&mut self, now: Instant) {
        let overdue: Vec<Wanted> = self.queue.iter().filter(|w| w.deadline <= now).copied().collect();
        self.queue.retain(|w| w.deadline > now);
        for shard in overdue {
            self.actions.push_back(SessionAction::Ended { id: shard.id, end: FetchEnd::Failed });
        }
        let silent: Vec<ExportNumber> =
            self.exports.iter().filter(|(_, e)| !e.granted && e.answer_by <= now).map(|(n, _)| *n).collect();
        for export in &silent {
            self.fail_asked(*export, FetchEnd::Failed);
            self.actions.push_back(SessionAction::Unreachable);
            // It may have been granted all the same.
            self.actions.push_back(SessionAction::Release { export: *export });
        }
        if !silent.is_empty() {
            self.give_up_queue();
        }
        for export in self.exports.values_mut() {
            for (id, reading) in &mut export.reading {
                if !reading.told && export.lease_ends.min(reading.shard.deadline) <= now {
                    reading.told = true;
                    self.actions.push_back(SessionAction::Stop { id: *id });
                    self.actions.push_back(SessionAction::Ended { id: *id, end: FetchEnd::Failed });
                }
            }
        }
        self.pump(now);
    }
}

#[cfg(test)]
mod tests;
