//! The owner's side of peer reads: export leases, and copies taken over from a node on its way out.
//!
//! *Invariants*: an exported frame is not given back before its lease was released or ran out; a lease is granted only to
//! a reader that knows this node's present incarnation.
//!
//! *Bounds*: [`MAX_EXPORTS`] leases of at most [`MAX_SHARDS_PER_EXPORT`] shards; every lease has an end.

use std::time::Duration;

use kvtier_types::{Instant, NodeNumber, Outcome, RecordMeta, ShardKey, Tier};

use super::Core;
use crate::catalog::{BlockId, Remote, Scope, Source, SpreadCounts};
use crate::entry::{Entry, Flags};
use crate::frame::FrameRef;
use crate::lease::LeaseId;
use crate::limits::{MAX_EXPORTS, MAX_SCOPES, MAX_SHARDS_PER_EXPORT};

/// Longest an export lease may be asked for.
pub const MAX_EXPORT_TTL: Duration = Duration::from_secs(60);

/// What a peer wants to read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportRequest {
    /// Who asks.
    pub peer: NodeNumber,
    /// The asker's start.
    pub peer_incarnation: u64,
    /// The start of this node that the asker knows of.
    pub incarnation: u64,
    /// The shards.
    pub keys: Vec<ShardKey>,
    /// How long the frames stay in place, at most [`MAX_EXPORT_TTL`].
    pub ttl: Duration,
}

/// The owner's answer for one shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exported {
    /// It lies in this frame until the lease ends.
    Ready(Box<(FrameRef, RecordMeta)>),
    /// It is not here.
    Missing,
    /// It is here, but did not come into host memory in time.
    Late,
}

/// Why an export is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// The reader knows a former life of this node.
    #[error("this node was restarted since: its incarnation is {current}")]
    Incarnation {
        /// The present one.
        current: u64,
    },
    /// A bound was reached: ask another replica, or later.
    #[error("too many {what}")]
    Limit {
        /// Of what.
        what: &'static str,
    },
}

/// Shards held for a peer.
#[derive(Debug)]
pub(crate) struct Hold {
    peer: NodeNumber,
    peer_incarnation: u64,
    /// In the order asked, `None` where there is nothing.
    blocks: Vec<Option<BlockId>>,
    /// Shards still on their way into host memory.
    pub(crate) waiting: usize,
    expires: Instant,
    /// Bytes on their way ahead of their use.
    coming_bytes: u64,
}

impl Core {
    /// The number of this start, as peers know it.
    #[must_use]
    pub fn incarnation(&self) -> u64 {
        self.edition().map_or(self.incarnation, kvtier_types::Edition::incarnation)
    }

    /// Leases shards to a peer and starts bringing into host memory what is not. Collect when nothing waits any more, or
    /// when waiting any longer would help nobody.
    ///
    /// # Errors
    /// [`ExportError`].
    pub fn export(&mut self, now: Instant, request: &ExportRequest) -> Result<LeaseId, ExportError> {
        self.clock = self.clock.max(now);
        if request.incarnation != self.incarnation() {
            return Err(ExportError::Incarnation { current: self.incarnation() });
        }
        self.hold(now, request, |core, key| {
            let id = core.catalog.find_shard(key)?;
            core.catalog.get(id).readable().then_some(id)
        })
    }

    pub(super) fn hold(
        &mut self,
        now: Instant,
        request: &ExportRequest,
        mut find: impl FnMut(&mut Self, &ShardKey) -> Option<BlockId>,
    ) -> Result<LeaseId, ExportError> {
        if self.exports.len() >= MAX_EXPORTS {
            return Err(ExportError::Limit { what: "export leases: ask again later, or another node" });
        }
        if request.keys.len() > MAX_SHARDS_PER_EXPORT {
            return Err(ExportError::Limit { what: "shards in one export" });
        }
        let lease = LeaseId(self.take_id());
        let tick = self.next_tick();
        let mut hold = Hold {
            peer: request.peer,
            peer_incarnation: request.peer_incarnation,
            blocks: Vec::with_capacity(request.keys.len()),
            waiting: 0,
            expires: now + request.ttl.min(MAX_EXPORT_TTL),
            coming_bytes: 0,
        };
        for key in &request.keys {
            let found = find(self, key);
            hold.blocks.push(found);
            let Some(id) = found else { continue };
            self.catalog.update(id, |e| {
                e.leases += 1;
                e.touched = tick;
            });
            if self.catalog.get(id).host.is_none() {
                hold.waiting += 1;
                self.waiters.entry(id).or_default().push(lease);
                self.want_host(id);
            }
        }
        self.exports.insert(lease, hold);
        self.pump();
        Ok(lease)
    }

    /// Shards of an export or adoption still on their way; zero too when it ended meanwhile.
    #[must_use]
    pub fn export_waiting(&self, lease: LeaseId) -> usize {
        self.exports.get(&lease).map_or(0, |h| h.waiting)
    }

    /// The answer to an export as it stands; what is not ready is let go. `None` when the lease ended meanwhile.
    pub fn collect_export(&mut self, lease: LeaseId) -> Option<Vec<Exported>> {
        let blocks = self.exports.get(&lease)?.blocks.clone();
        let mut answers = Vec::with_capacity(blocks.len());
        let mut late = Vec::new();
        for (at, block) in blocks.into_iter().enumerate() {
            let answer = match block {
                None => Exported::Missing,
                Some(id) if self.in_host(id) => {
                    let entry = self.catalog.get(id);
                    let frame = entry.host.expect("checked by in_host");
                    let meta = self.meta(entry, entry.sequence);
                    Exported::Ready(Box::new((frame, meta)))
                }
                Some(id) => {
                    late.push((at, id));
                    Exported::Late
                }
            };
            answers.push(answer);
        }
        for (at, id) in late {
            if let Some(hold) = self.exports.get_mut(&lease) {
                hold.blocks[at] = None;
            }
            self.let_go(id, lease);
        }
        self.note_exported(lease);
        self.pump();
        Some(answers)
    }

    /// What was handed to a peer counts as read.
    fn note_exported(&mut self, lease: LeaseId) {
        let ids: Vec<BlockId> =
            self.exports.get(&lease).into_iter().flat_map(|h| h.blocks.iter().flatten()).copied().collect();
        self.counts.exported += ids.len() as u64;
        for id in ids {
            self.note_read(id);
        }
    }

    /// Ends an export or adoption. Ending it twice is no fault.
    pub fn release_export(&mut self, lease: LeaseId) {
        let Some(hold) = self.exports.remove(&lease) else { return };
        self.coming_ahead -= hold.coming_bytes;
        for id in hold.blocks.into_iter().flatten() {
            self.let_go(id, lease);
        }
        self.pump();
    }

    /// Lets go of one shard of a hold, if it holds it.
    pub(super) fn leave_hold(&mut self, lease: LeaseId, id: BlockId) {
        let held = self.exports.get_mut(&lease).and_then(|hold| hold.blocks.iter_mut().find(|b| **b == Some(id)));
        if let Some(block) = held {
            *block = None;
            self.let_go(id, lease);
        }
    }

    pub(super) fn extend_export(&mut self, lease: LeaseId, until: Instant) {
        if let Some(hold) = self.exports.get_mut(&lease) {
            hold.expires = hold.expires.max(until);
        }
    }

    fn let_go(&mut self, id: BlockId, lease: LeaseId) {
        self.stop_waiting(id, lease);
        if self.catalog.touch(id, |e| e.leases -= 1) {
            self.finish_doomed(id);
        }
        if self.catalog.try_get(id).is_some() {
            self.forget_unwanted_one(id);
        }
    }

    /// Whether an export lease has not ended.
    #[must_use]
    pub fn has_export(&self, lease: LeaseId) -> bool {
        self.exports.contains_key(&lease)
    }

    /// Export leases held by peers.
    #[must_use]
    pub fn exports(&self) -> usize {
        self.exports.len()
    }

    pub(super) fn expire_exports(&mut self, now: Instant) {
        let over: Vec<LeaseId> = self.exports.iter().filter(|(_, h)| h.expires <= now).map(|(id, _)| *id).collect();
        for lease in over {
            self.counts.expired_exports += 1;
            self.release_export(lease);
        }
    }

    pub(super) fn next_export_timeout(&self) -> Option<Instant> {
        self.exports.values().map(|h| h.expires).min()
    }

    /// What a node's former lives had leased: it cannot be reading it any more.
    pub(super) fn drop_exports_of_former_lives(&mut self) {
        let dead = |hold: &Hold| self.members.is_over(hold.peer, hold.peer_incarnation);
        let over: Vec<LeaseId> = self.exports.iter().filter(|(_, h)| dead(h)).map(|(id, _)| *id).collect();
        for lease in over {
            self.release_export(lease);
        }
    }

    /// Takes shards into this node's care that `from` is about to lose, or has copied ahead of their use: they are fetched
    /// from it and kept as this node's own. Of copies ahead of their use as many are taken as leave no more than `ahead` bytes
    /// unread in host memory. Wait and collect as for an export, then release.
    ///
    /// # Errors
    /// [`ExportError::Limit`].
    pub fn adopt(
        &mut self,
        now: Instant,
        from: (NodeNumber, u64),
        metas: &[RecordMeta],
        (ttl, ahead): (Duration, Option<u64>),
    ) -> Result<LeaseId, ExportError> {
        self.clock = self.clock.max(now);
        let (node, incarnation) = from;
        let keys: Vec<ShardKey> = metas.iter().map(|m| m.key).collect();
        let request = ExportRequest { peer: node, peer_incarnation: incarnation, incarnation: 0, keys, ttl };
        let mut metas = metas.iter();
        let mut coming = 0;
        let lease = self.hold(now, &request, |core, _| {
            let meta = metas.next()?;
            let is_new = ahead.is_some() && !core.is_here(&meta.key);
            let lies = core.catalog.spread.unread_bytes + core.coming_ahead + coming;
            if is_new && ahead.is_some_and(|budget| lies + meta.bytes > budget) {
                core.catalog.spread.refused_bytes += meta.bytes;
                return None;
            }
            let id = core.intern_wanted(meta, vec![Source::Peer { node, incarnation }], true)?;
            if let Some(remote) = core.catalog.remotes.get_mut(&id).filter(|_| is_new) {
                remote.ahead = true;
                coming += meta.bytes;
            }
            Some(id)
        })?;
        if let Some(hold) = self.exports.get_mut(&lease) {
            hold.coming_bytes = coming;
            self.coming_ahead += coming;
        }
        Ok(lease)
    }

    fn is_here(&self, key: &ShardKey) -> bool {
        self.catalog.find_shard(key).is_some_and(|id| self.catalog.get(id).visible())
    }

    /// What became of copies that other nodes had made here ahead of their use.
    #[must_use]
    pub const fn spread_counts(&self) -> SpreadCounts {
        self.catalog.spread
    }

    /// The entry of a shard to be fetched without a reader: taken into this node's care when `adopted`, else as a copy of
    /// another node's block. `None` when it cannot be had now.
    pub(super) fn intern_wanted(&mut self, meta: &RecordMeta, sources: Vec<Source>, adopted: bool) -> Option<BlockId> {
        let layout = self.catalog.layout(&meta.key.layout)?;
        if let Some(id) = self.catalog.find(&meta.key.block, layout, meta.key.shard) {
            let entry = self.catalog.get(id);
            if entry.visible() {
                if adopted {
                    self.keep_as_own(id);
                }
                return Some(id);
            }
            if !adopted && entry.offered() {
                // A reader is having it fetched already.
                return Some(id);
            }
            if entry.in_use() || entry.flags.has(Flags::DOOMED | Flags::REMOTE) {
                return None;
            }
            self.catalog.update(id, |e| e.flags.set(Flags::REMOTE, true));
            self.catalog.remotes.insert(id, Remote { untried: sources.into(), adopted, ahead: false });
            return Some(id);
        }
        if self.catalog.scopes.len() > MAX_SCOPES {
            return None;
        }
        let scope = Scope::of(meta);
        let mut flags = Flags::default();
        flags.set(Flags::NEEDS_ANCESTORS, meta.needs_ancestors);
        flags.set(Flags::REMOTE, true);
        let bytes = u32::try_from(meta.bytes).ok()?;
        let scope = self.catalog.scopes.acquire(&scope);
        let program = self.catalog.programs.acquire(&meta.hints.program_id);
        let entry = Entry {
            depth_blocks: meta.depth_blocks,
            parent: meta.parent.as_ref().and_then(|p| self.catalog.find(p, layout, meta.key.shard)),
            ..Entry::bare(meta.key.block, (layout, meta.key.shard), meta.group, bytes, (scope, program, flags))
        };
        let id = self.catalog.insert(entry);
        self.catalog.remotes.insert(id, Remote { untried: sources.into(), adopted, ahead: false });
        Some(id)
    }

    /// A copy of another node's block becomes this node's own.
    fn keep_as_own(&mut self, id: BlockId) {
        if self.catalog.get(id).flags.has(Flags::FETCHED) {
            self.catalog.update(id, |e| e.flags.set(Flags::FETCHED, false));
            self.queue_offload(id);
            self.want_replicas(id);
        }
    }

    /// What became of each shard of an adoption.
    #[must_use]
    pub fn adoption_outcomes(&self, lease: LeaseId) -> Option<Vec<(Outcome, &'static str)>> {
        let hold = self.exports.get(&lease)?;
        let outcome = |block: &Option<BlockId>| match block {
            None => {
                (Outcome::Rejected, "it is being written or fetched there already, or no more may lie there unread")
            }
            Some(id) if self.catalog.get(*id).visible() => (Outcome::Applied, ""),
            Some(_) => (Outcome::Missing, "it could not be fetched in time"),
        };
        Some(hold.blocks.iter().map(outcome).collect())
    }

    /// A page of what goes with this node, from slab index `from` on, and where the next page starts: what a drain must find
    /// another home for. What is in the object store stays, if the store does (`store_stays`).
    #[must_use]
    pub fn holdings(&self, from: u32, limit: usize, store_stays: bool) -> (Vec<RecordMeta>, Option<u32>) {
        let mut out = Vec::new();
        for (id, entry) in self.catalog.iter_from(from) {
            if out.len() == limit {
                return (out, Some(id.index()));
            }
            if entry.visible() && !(store_stays && entry.resident(Tier::Object)) {
                out.push(self.meta(entry, entry.sequence));
            }
        }
        (out, None)
    }

    /// Queues shards for the object store, whatever the rule, and takes out of `keys` those that are queued or there already:
    /// what is left waits for its bytes to come to host memory, or for another movement of its own. Answers how many were
    /// queued.
    pub fn write_behind(&mut self, keys: &mut Vec<ShardKey>) -> usize {
        let mut queued = 0;
        if self.config.object {
            keys.retain(|key| {
                let Some(id) = self.catalog.find_shard(key) else { return false };
                let is_queued = self.queue_offload_to(id, Tier::Object);
                queued += usize::from(is_queued);
                !is_queued && !self.catalog.get(id).resident(Tier::Object)
            });
        }
        self.pump();
        queued
    }

    /// Whether a shard is queued for a lower tier, or on its way there.
    #[must_use]
    pub fn is_going_down(&self, key: &ShardKey) -> bool {
        let going = Flags::QUEUED | Flags::TO_DISK | Flags::TO_OBJECT;
        self.catalog.find_shard(key).is_some_and(|id| self.catalog.get(id).flags.has(going))
    }

    /// Whether a shard has a copy in the object store.
    #[must_use]
    pub fn in_object_store(&self, key: &ShardKey) -> bool {
        self.catalog.find_shard(key).is_some_and(|id| self.catalog.get(id).resident(Tier::Object))
    }
}
