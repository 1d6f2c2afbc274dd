//! Movement between tiers: what waits, what is under way, what became of it.

use kvtier_types::{BlockHints, Location, RecordMeta, ShardKey, Tier};

use super::host_room::WithoutRoom;
use super::{Action, Core, MoveId, Movement, WriteBehind};
use crate::catalog::BlockId;
use crate::entry::{Entry, Flags};
use crate::events::EventKind;
use crate::frame::FrameRef;
use crate::lease::LeaseId;
use crate::ledger::MissReason;
use crate::limits::VICTIM_SCAN;

/// How a movement ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MoveEnd {
    /// Done; the place of the new record when the target has places.
    Done(Option<Location>),
    /// The source's bytes do not match their checksum.
    Corrupt,
    /// The source has no such record.
    Gone,
    /// It failed, and the source is as it was: it may be tried again.
    Failed,
}

/// Blocks that may wait to be written where the rate is bounded.
const MAX_QUEUED_OFFLOADS: usize = 65_536;
/// Offloads to the disk that are passed over at once when the budget is spent, for what goes elsewhere.
const MAX_HELD_BACK: usize = 64;

impl Core {
    /// Starts what there is room to start.
    pub(super) fn pump(&mut self) {
        self.watch_watermark();
        self.pump_onboards();
        self.pump_upholds();
        self.pump_fetches();
        self.pump_offloads();
        self.pump_devices();
    }

    /// Tells the core that the pool has more room than it said last.
    pub fn frames_grew(&mut self) {
        self.pump();
    }

    fn watch_watermark(&mut self) {
        let capacity = self.frames.capacity_bytes();
        let high = capacity / 100 * u64::from(self.config.high_watermark_percent);
        if self.config.eager_offload || self.host_used_bytes <= high || self.offloads.len() >= self.config.max_offloads
        {
            return;
        }
        let first = self.catalog.victims_of(Tier::Host, VICTIM_SCAN);
        let bare = |id: &BlockId| {
            let e = self.catalog.get(*id);
            // What was written below once, and had to go there, is not written again and again: a lower tier smaller than
            // what waits above would never come to rest.
            e.sequence == 0 && e.disk.is_none() && e.object.is_none() && !e.flags.has(Flags::QUEUED)
        };
        let next: Vec<BlockId> = first.into_iter().filter(bare).collect();
        for id in next {
            self.queue_offload(id);
        }
    }

    /// Puts a block in the queue of its next lower tier without a copy.
    pub(super) fn queue_offload(&mut self, id: BlockId) {
        let entry = self.catalog.get(id);
        if entry.flags.has(Flags::QUEUED) || !entry.resident(Tier::Host) {
            return;
        }
        if entry.flags.has(Flags::FETCHED) {
            return;
        }
        let to = if self.config.disk && entry.disk.is_none() && self.offloads_to(entry, Tier::Disk) {
            Tier::Disk
        } else if self.object_store_is_due(entry) {
            Tier::Object
        } else {
            return;
        };
        self.queue_offload_to(id, to);
    }

    /// Puts a block in the queue for a tier. Answers whether it is there now.
    pub(super) fn queue_offload_to(&mut self, id: BlockId, to: Tier) -> bool {
        let entry = self.catalog.get(id);
        let (copied, moving) = match to {
            Tier::Disk => (entry.disk.is_some(), Flags::TO_DISK),
            _ => (entry.object.is_some(), Flags::TO_OBJECT),
        };
        // One movement at a time to one tier: what ends first must not end the other.
        let busy = entry.flags.has(Flags::QUEUED | Flags::DOOMED | moving);
        if busy || copied || !entry.resident(Tier::Host) || !self.allowed_in(entry, to) {
            return false;
        }
        // What a slow disk does not keep up with is not written, rather than waiting for ever.
        if self.config.disk_write_rate.is_some() && self.offloads.len() >= MAX_QUEUED_OFFLOADS {
            return false;
        }
        self.catalog.update(id, |e| e.flags.set(Flags::QUEUED, true));
        self.offloads.push_back((id, to));
        true
    }

    fn object_store_is_due(&self, entry: &Entry) -> bool {
        let wanted = match self.write_behind_of(entry) {
            WriteBehind::All => true,
            // Without a disk the object store is all there is to outlive a restart.
            WriteBehind::Read => entry.flags.has(Flags::READ) || !self.config.disk,
            WriteBehind::Nothing => false,
        };
        self.config.object && entry.object.is_none() && wanted && self.offloads_to(entry, Tier::Object)
    }

    /// A block was read: from now on it may be worth a copy that outlives the node.
    pub(super) fn note_read(&mut self, id: BlockId) {
        if self.catalog.try_get(id).is_some_and(|e| !e.flags.has(Flags::READ)) {
            self.catalog.update(id, |e| e.flags.set(Flags::READ, true));
            let entry = self.catalog.get(id);
            let next = self.object_store_is_due(entry) && !entry.flags.has(Flags::FETCHED);
            if next
                && self.write_behind_of(self.catalog.get(id)) == WriteBehind::Read
                && (self.config.eager_offload || entry.disk.is_some())
            {
                self.queue_offload(id);
            }
        }
    }

    fn pump_offloads(&mut self) {
        let mut held_back = Vec::new();
        while self.offloading < self.config.max_offloads && held_back.len() < MAX_HELD_BACK {
            let Some((id, to)) = self.offloads.pop_front() else { break };
            // What waits in the queue is in the catalog.
            let entry = self.catalog.get(id);
            let copied = if to == Tier::Disk { entry.disk.is_some() } else { entry.object.is_some() };
            let is_wanted = entry.resident(Tier::Host) && !copied && !entry.flags.has(Flags::DOOMED);
            let frame = entry.host.filter(|_| is_wanted);
            if frame.is_some() && to == Tier::Disk && !self.disk_writes.take(self.clock, entry.bytes.into()) {
                held_back.push((id, to));
                continue;
            }
            let stays = self.catalog.update(id, |e| e.flags.set(Flags::QUEUED, false));
            let Some(frame) = frame.filter(|_| stays) else { continue };
            let sequence = self.next_sequence;
            self.next_sequence += 1;
            let meta = self.meta(self.catalog.get(id), sequence);
            let move_id = MoveId(self.take_id());
            let flag = if to == Tier::Disk { Flags::TO_DISK } else { Flags::TO_OBJECT };
            self.catalog.update(id, |e| e.flags.set(flag, true));
            self.moves.insert(move_id, (id, Movement::Offload { to, sequence, from: frame }));
            self.offloading += 1;
            self.actions.push_back(Action::Offload { id: move_id, to, meta, frame });
        }
        held_back.into_iter().rev().for_each(|waits| self.offloads.push_front(waits));
    }

    /// Asks for a copy in host memory.
    pub(super) fn want_host(&mut self, id: BlockId) {
        if !self.catalog.get(id).flags.has(Flags::TO_HOST) {
            self.catalog.update(id, |e| e.flags.set(Flags::TO_HOST, true));
            let below = self.catalog.get(id).readable();
            let queue = if below { &mut self.onboards } else { &mut self.fetches };
            queue.push_back(id);
        }
    }

    fn pump_onboards(&mut self) {
        let mut pass = WithoutRoom::default();
        while self.onboarding < self.config.max_onboards && !pass.is_full() {
            let Some(id) = self.onboards.pop_front() else { break };
            let entry = self.catalog.get(id);
            let from = self.onboard_source(id);
            let wanted = (self.waiters.contains_key(&id) || self.lacks(entry)) && !entry.flags.has(Flags::DOOMED);
            let Some(from) = from.filter(|_| wanted && entry.host.is_none()) else {
                self.onboard_ended(id);
                continue;
            };
            let Some(into) = self.frame_in_pass(id, &mut pass) else { continue };
            self.start_onboard(id, from, into);
        }
        pass.last_first().for_each(|id| self.onboards.push_front(id));
    }

    pub(super) fn start_onboard(&mut self, id: BlockId, from: Tier, into: FrameRef) {
        if from == Tier::Device {
            return self.start_staging(id, into);
        }
        let entry = self.catalog.get(id);
        let key = self.shard_key(entry);
        let expect = kvtier_types::Expect { bytes: u64::from(entry.bytes), checksum: entry.checksum };
        let at = if from == Tier::Disk { entry.disk } else { entry.object };
        let at = at.expect("the source was chosen for having a copy");
        let move_id = MoveId(self.take_id());
        self.moves.insert(move_id, (id, Movement::Onboard { from, at, into }));
        self.onboarding += 1;
        self.actions.push_back(Action::Onboard { id: move_id, key, from, at, expect, into });
    }

    /// Takes note of a movement's end.
    pub fn moved(&mut self, id: MoveId, end: MoveEnd) {
        let Some((block, movement)) = self.moves.remove(&id) else { return };
        match movement {
            Movement::Offload { to, sequence, from } => self.offload_ended(block, (to, sequence, from), end),
            Movement::Onboard { from, at, into } => {
                self.fill_frame(block, into, end);
                self.onboard_moved(block, from, at, end);
                self.upheld(block, end);
            }
            Movement::ToDevice { from, into } => self.device_copy_ended(block, (from, into), end),
            Movement::FromDevice { from, into } => {
                self.fill_frame(block, into, end);
                self.staged(block, from, end);
                self.upheld(block, end);
            }
            // Fetches report elsewhere.
            Movement::Fetch { .. } => {
                self.moves.insert(id, (block, movement));
            }
        }
        self.pump();
    }

    fn offload_ended(&mut self, id: BlockId, (to, sequence, from): (Tier, u64, FrameRef), end: MoveEnd) {
        self.offloading -= 1;
        let flag = if to == Tier::Disk { Flags::TO_DISK } else { Flags::TO_OBJECT };
        let place = if let MoveEnd::Done(place) = end { place } else { None };
        let counts = if place.is_some() { &mut self.counts.moved } else { &mut self.counts.move_failures };
        counts[to.index()] += 1;
        self.catalog.update(id, |e| {
            if let Some(at) = place {
                if to == Tier::Disk {
                    e.disk = Some(at)
                } else {
                    e.object = Some(at)
                }
                e.sequence = e.sequence.max(sequence);
            }
            e.flags.set(flag, false);
        });
        if end == MoveEnd::Corrupt {
            self.host_was_corrupt(id, from);
        }
        if self.catalog.try_get(id).is_some() {
            self.finish_doomed(id);
        }
        if place.is_some() && self.catalog.try_get(id).is_some() {
            self.restand_copy(id);
        }
        if place.is_some() && self.catalog.try_get(id).is_some() {
            self.queue_offload_after(id, to);
        }
    }

    /// What is on disk goes on to the object store, where there is one.
    fn queue_offload_after(&mut self, id: BlockId, done: Tier) {
        if done == Tier::Disk && self.config.object {
            self.queue_offload(id);
        }
    }

    /// Takes in the frame of an onboard, or gives it back.
    fn fill_frame(&mut self, id: BlockId, into: FrameRef, end: MoveEnd) {
        let done = matches!(end, MoveEnd::Done(_));
        let counts = if done { &mut self.counts.moved } else { &mut self.counts.move_failures };
        counts[Tier::Host.index()] += 1;
        if done {
            self.catalog.update(id, |e| e.host = Some(into));
            self.restand_copy(id);
        } else {
            let bytes = u64::from(self.catalog.get(id).bytes);
            self.free_frame(into, bytes);
        }
    }

    fn onboard_moved(&mut self, id: BlockId, from: Tier, at: Location, end: MoveEnd) {
        self.onboarding -= 1;
        match end {
            MoveEnd::Corrupt | MoveEnd::Gone => self.lose_record(id, from, at, end),
            MoveEnd::Failed => self.unread.failed(id, from),
            MoveEnd::Done(_) => return self.onboard_ended(id),
        }
        if self.onboard_source(id).is_some() {
            // Another copy may be good; the block keeps its place among those wanted.
            self.onboards.push_back(id);
            return;
        }
        if end == MoveEnd::Failed {
            self.is_unread(id);
        }
        self.onboard_ended(id);
    }

    fn lose_record(&mut self, id: BlockId, from: Tier, at: Location, end: MoveEnd) {
        if end == MoveEnd::Corrupt {
            self.counts.corrupt += 1;
            let key = self.catalog.get(id).key;
            self.ghost.insert(&key, MissReason::Corrupt);
            self.catalog.note_event(id, EventKind::Corrupt, Some(from));
        }
        let entry = self.catalog.get(id);
        let current = if from == Tier::Disk { entry.disk } else { entry.object };
        if current == Some(at) {
            self.drop_copy(id, from);
        }
    }

    /// Nobody waits for this block's movement upwards any more, however it ended.
    pub(super) fn onboard_ended(&mut self, id: BlockId) {
        for lease in self.waiters.remove(&id).unwrap_or_default() {
            if let Some(lease) = self.leases.get_mut(&lease) {
                lease.waiting -= 1;
            } else if let Some(hold) = self.exports.get_mut(&lease) {
                hold.waiting -= 1;
            }
        }
        self.unread.settled(id);
        self.catalog.remotes.remove(&id);
        let here_or_gone = |e: &mut Entry| e.flags.set(Flags::TO_HOST | Flags::REMOTE, false);
        if self.catalog.update(id, here_or_gone) {
            self.finish_doomed(id);
        }
    }

    /// A lease does not wait for a block any more.
    pub(super) fn stop_waiting(&mut self, id: BlockId, lease: LeaseId) {
        if let Some(waiting) = self.waiters.get_mut(&id) {
            waiting.retain(|l| *l != lease);
            if waiting.is_empty() {
                self.waiters.remove(&id);
            }
        }
    }

    /// Drops what was evicted by verb or lies where it may not, once nothing uses it.
    pub(super) fn finish_doomed(&mut self, id: BlockId) {
        let entry = self.catalog.get(id);
        if entry.in_use() {
            return;
        }
        if entry.flags.has(Flags::DOOMED) {
            self.drop_all(id);
        } else if entry.taints != 0 || entry.life != 0 {
            self.confine(id);
        }
    }

    pub(super) fn shard_key(&self, entry: &Entry) -> ShardKey {
        ShardKey { block: entry.key, layout: *self.catalog.layout_id(entry.layout), shard: entry.shard }
    }

    pub(super) fn meta(&self, entry: &Entry, sequence: u64) -> RecordMeta {
        let scope = self.catalog.scopes.get(entry.scope);
        let parent = entry.parent.and_then(|p| self.catalog.try_get(p)).map(|p| p.key);
        RecordMeta {
            key: self.shard_key(entry),
            namespace: scope.namespace,
            tenant: scope.tenant.clone(),
            hints: BlockHints {
                program_id: self.catalog.programs.get(entry.program).clone(),
                semantic: entry.semantic,
                taints: self.taints(entry).to_vec(),
            },
            parent,
            depth_blocks: entry.depth_blocks,
            group: entry.group,
            needs_ancestors: entry.flags.has(Flags::NEEDS_ANCESTORS),
            model: scope.model.clone(),
            bytes: u64::from(entry.bytes),
            checksum: entry.checksum,
            sequence,
            expires_ms: self.expires_ms(entry),
        }
    }
}
