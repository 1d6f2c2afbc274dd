//! Movement by verb: what a block's copies are, where its fastest one shall lie, and copies brought here for nobody in
//! particular. Work is done in flights: hold some blocks, step until all of them have come to their end, let go.
//!
//! *Invariants*: a faster copy is dropped only once the copy in the tier asked for exists; what a claim keeps is not
//! dropped. *Bounds*: a flight holds at most [`MAX_SHARDS_PER_EXPORT`](crate::limits::MAX_SHARDS_PER_EXPORT) shards.

use kvtier_types::{BlockKey, Expect, Instant, Location, NodeNumber, Outcome, RecordMeta, ShardKey, Tier};

use super::export::{ExportError, ExportRequest};
use super::{Core, MAX_EXPORT_TTL};
use crate::catalog::{BlockId, Source};
use crate::entry::{Entry, Flags};
use crate::lease::LeaseId;

/// Why a copy that a claim keeps is not dropped.
pub(super) const CLAIMED: &str = "something keeps it there: unpin it, or remove the taint that holds it";

/// What a verb of movement would do with a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MovePlan {
    /// ACCEPTED when there is something to do.
    pub outcome: Outcome,
    /// Why it is another one.
    pub reason: &'static str,
    /// Bytes of one copy of all its shards that are here.
    pub bytes: u64,
}

/// A block whose movement came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moved {
    /// The block.
    pub key: BlockKey,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it is not APPLIED.
    pub reason: &'static str,
    /// Bytes of one copy.
    pub bytes: u64,
}

/// What one step of a flight did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MoveStep {
    /// Blocks that came to their end.
    pub ended: Vec<Moved>,
    /// Blocks of which a copy was queued in this step: each time counts as a try.
    pub queued: Vec<BlockKey>,
}

/// How a shard stands after one step.
enum Stand {
    There,
    Waits,
    Queued,
    Kept,
}

impl Core {
    /// The visible shards of a block.
    pub(super) fn visible_shards(&self, key: &BlockKey) -> Vec<BlockId> {
        let mut ids = self.catalog.find_all(key);
        ids.retain(|id| self.catalog.get(*id).visible());
        ids
    }

    /// Whether a hard claim, or a taint, holds an entry's copy in a tier.
    pub(super) fn claimed_in(&self, id: BlockId, tier: Tier) -> bool {
        let entry = self.catalog.get(id);
        entry.kept.has(tier) || (entry.stays.has(tier) && self.is_marked_to_stay(entry))
    }

    fn bytes_of(&self, ids: &[BlockId]) -> u64 {
        ids.iter().map(|id| u64::from(self.catalog.get(*id).bytes)).sum()
    }

    /// What moving blocks to a tier would do. Changes nothing.
    #[must_use]
    pub fn plan_move(&self, keys: &[BlockKey], to: Tier) -> Vec<MovePlan> {
        let plan = |key: &BlockKey| {
            let ids = self.visible_shards(key);
            let plan = |outcome, reason| MovePlan { outcome, reason, bytes: self.bytes_of(&ids) };
            let faster = |tier: &Tier| *tier < to;
            let kept = |id: &BlockId| {
                let entry = self.catalog.get(*id);
                Tier::ALL.into_iter().filter(faster).any(|t| entry.resident(t) && self.claimed_in(*id, t))
            };
            if ids.is_empty() {
                plan(Outcome::Missing, "nothing of it is on this node")
            } else if ids.iter().any(|id| !self.allowed_in(self.catalog.get(*id), to)) {
                plan(Outcome::Rejected, "a rule, or the taint NoReplicate, allows no copy there")
            } else if ids.iter().all(|id| self.catalog.get(*id).fastest() == Some(to)) {
                plan(Outcome::Duplicate, "its fastest copy lies there already")
            } else if ids.iter().any(kept) {
                plan(Outcome::Rejected, CLAIMED)
            } else {
                plan(Outcome::Accepted, "")
            }
        };
        keys.iter().map(plan).collect()
    }

    /// Whether everything that is here of a block lies in a tier, and how many bytes that is; `None` when nothing is here.
    #[must_use]
    pub fn lies_in(&self, key: &BlockKey, tier: Tier) -> Option<(bool, u64)> {
        let ids = self.visible_shards(key);
        if ids.is_empty() {
            return None;
        }
        Some((ids.iter().all(|id| self.catalog.get(*id).resident(tier)), self.bytes_of(&ids)))
    }

    /// How many shards of a block are here, and the bytes of one copy of them.
    #[must_use]
    pub fn weigh(&self, key: &BlockKey) -> (usize, u64) {
        let ids = self.visible_shards(key);
        (ids.len(), self.bytes_of(&ids))
    }

    /// What there is to say of a block's shards here, one after the other.
    #[must_use]
    pub fn describe(&self, key: &BlockKey) -> Vec<RecordMeta> {
        let ids = self.visible_shards(key);
        let entry = |id: &BlockId| {
            let entry = self.catalog.get(*id);
            self.meta(entry, entry.sequence)
        };
        ids.iter().map(entry).collect()
    }

    /// Where a shard's record lies in a lower tier, and what it must be.
    #[must_use]
    pub fn record_of(&self, key: &ShardKey, tier: Tier) -> Option<(Location, Expect)> {
        let entry = self.catalog.get(self.catalog.find_shard(key)?);
        let at = match tier {
            Tier::Disk => entry.disk,
            Tier::Object => entry.object,
            Tier::Device | Tier::Host => None,
        };
        Some((at?, Expect { bytes: u64::from(entry.bytes), checksum: entry.checksum }))
    }

    /// The layouts seen so far, each with the shards that its blocks had: what a block whose layout is not known may be
    /// looked for under.
    #[must_use]
    pub fn shard_keys(&self, key: &BlockKey) -> Vec<ShardKey> {
        let shapes = self.catalog.shapes();
        let shards = shapes.flat_map(|(layout, shards)| (0..shards).map(move |shard| (*layout, shard)));
        shards.map(|(layout, shard)| ShardKey { block: *key, layout, shard }).collect()
    }

    /// Holds what is here of some blocks, or of it what is not in the tier `lacking`, and brings it into host memory: as an
    /// export to nobody. End it with [`Core::release_export`]; it ends by itself after [`MAX_EXPORT_TTL`] unless renewed.
    ///
    /// # Errors
    /// [`ExportError::Limit`]: fewer blocks at once.
    pub fn hold_blocks(
        &mut self,
        now: Instant,
        keys: &[BlockKey],
        lacking: Option<Tier>,
    ) -> Result<LeaseId, ExportError> {
        self.tell_time(now);
        let mut ids: Vec<BlockId> = keys.iter().flat_map(|key| self.visible_shards(key)).collect();
        ids.retain(|id| lacking.is_none_or(|tier| !self.catalog.get(*id).resident(tier)));
        let keys = ids.iter().map(|id| self.shard_key(self.catalog.get(*id))).collect();
        let mut ids = ids.into_iter();
        self.hold(now, &for_nobody(keys), |_, _| ids.next())
    }

    /// Fetches shards that others are said to have, without a reader: as an export to nobody, to be awaited and released.
    ///
    /// # Errors
    /// [`ExportError::Limit`]: fewer shards at once.
    pub fn pull(&mut self, now: Instant, shards: &[(RecordMeta, Vec<Source>)]) -> Result<LeaseId, ExportError> {
        self.tell_time(now);
        let keys = shards.iter().map(|(meta, _)| meta.key).collect();
        let mut shards = shards.iter();
        self.hold(now, &for_nobody(keys), |core, _| {
            let (meta, sources) = shards.next()?;
            core.intern_wanted(meta, sources.clone(), false)
        })
    }

    /// Gives a hold another [`MAX_EXPORT_TTL`].
    pub fn renew_hold(&mut self, now: Instant, lease: LeaseId) {
        self.extend_export(lease, now + MAX_EXPORT_TTL);
    }

    /// Goes on with moving held blocks to a tier: asks for copies there, and drops faster ones where that copy exists.
    pub fn step_move(&mut self, lease: LeaseId, keys: &[BlockKey], to: Tier) -> MoveStep {
        let mut step = MoveStep::default();
        for key in keys {
            let ids = self.visible_shards(key);
            let bytes = self.bytes_of(&ids);
            let end = |outcome, reason| Moved { key: *key, outcome, reason, bytes };
            if ids.is_empty() {
                step.ended.push(end(Outcome::Missing, "it was evicted meanwhile"));
                continue;
            }
            let stands: Vec<Stand> = ids.into_iter().map(|id| self.step_shard(lease, id, to)).collect();
            if stands.iter().any(|s| matches!(s, Stand::Queued)) {
                step.queued.push(*key);
            }
            if stands.iter().any(|s| matches!(s, Stand::Kept)) {
                step.ended.push(end(Outcome::Rejected, CLAIMED));
            } else if stands.iter().all(|s| matches!(s, Stand::There)) {
                step.ended.push(end(Outcome::Applied, ""));
            }
        }
        self.pump();
        step
    }

    fn step_shard(&mut self, lease: LeaseId, id: BlockId, to: Tier) -> Stand {
        let entry = self.catalog.get(id);
        if !entry.resident(to) {
            let queued = match to {
                Tier::Device => self.queue_device_copy(id, None),
                // It comes by being held.
                Tier::Host => false,
                Tier::Disk | Tier::Object => self.queue_offload_to(id, to),
            };
            return if queued { Stand::Queued } else { Stand::Waits };
        }
        self.leave_hold(lease, id);
        let Some(entry) = self.catalog.try_get(id) else { return Stand::There };
        let above: Vec<Tier> = Tier::ALL.into_iter().filter(|t| *t < to && entry.resident(*t)).collect();
        if above.iter().any(|tier| self.claimed_in(id, *tier)) {
            return Stand::Kept;
        }
        if !above.is_empty() && self.catalog.get(id).in_use() {
            return Stand::Waits;
        }
        for tier in above {
            self.drop_copy(id, tier);
        }
        Stand::There
    }

    /// What a fetched record says of a shard that was asked for without knowing what it is.
    pub(super) fn complete(&mut self, id: BlockId, meta: &RecordMeta) {
        let parent =
            meta.parent.as_ref().and_then(|p| self.catalog.find(p, self.catalog.get(id).layout, meta.key.shard));
        if let Some(parent) = parent {
            self.catalog.set_parent(id, parent);
        }
        let complete = |entry: &mut Entry| {
            entry.group = meta.group;
            entry.depth_blocks = meta.depth_blocks;
            entry.flags.set(Flags::NEEDS_ANCESTORS, meta.needs_ancestors);
        };
        self.catalog.update(id, complete);
    }
}

/// An export request of this node to itself. No node has this number's last incarnation, so it never counts as over.
fn for_nobody(keys: Vec<ShardKey>) -> ExportRequest {
    let peer = NodeNumber::new(0);
    ExportRequest { peer, peer_incarnation: u64::MAX, incarnation: 0, keys, ttl: MAX_EXPORT_TTL }
}
