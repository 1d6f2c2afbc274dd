//! What operators ask: where a block is, what there is, and to drop it.

use kvtier_types::{BlockKey, LayoutId, NamespaceId, Outcome, SemanticType, ShardKey, TenantId, Tier};

use super::Core;
use crate::catalog::{BlockId, Catalog};
use crate::entry::{Entry, Flags};
use crate::ledger::MissReason;
use crate::limits::MAX_LIST_PAGE;

/// One copy of one shard.
#[derive(Debug, Clone)]
pub struct ReplicaView {
    /// The shard.
    pub shard: u16,
    /// The layout.
    pub layout: LayoutId,
    /// Where.
    pub tier: Tier,
    /// How long.
    pub bytes: u64,
    /// CRC-64/NVME.
    pub checksum: u64,
    /// Place within the tier, for people.
    pub place: String,
}

/// A block as operators see it.
#[derive(Debug, Clone)]
pub struct BlockView {
    /// The block.
    pub key: BlockKey,
    /// Its copies.
    pub replicas: Vec<ReplicaView>,
    /// Its namespace.
    pub namespace: NamespaceId,
    /// Its model's display name.
    pub model: String,
    /// Its owner.
    pub tenant: TenantId,
    /// The program that wrote it.
    pub program_id: String,
    /// What it means.
    pub semantic: SemanticType,
    /// Leases on it.
    pub leases: u32,
    /// Blocks before it in its prefix.
    pub depth_blocks: u32,
}

/// What an eviction by verb is about to do.
#[derive(Debug, Clone, Default)]
pub struct EvictPlan {
    /// One outcome a key.
    pub outcomes: Vec<(BlockKey, Outcome, &'static str)>,
    /// Shards to record in the journal, with the last sequence given out, before the eviction is acknowledged.
    pub journal: Vec<(ShardKey, u64)>,
}

/// How full a tier is, by the catalog.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TierUse {
    /// Copies.
    pub copies: u64,
    /// Their payload bytes.
    pub bytes: u64,
}

/// Most shards of a block in any layout, for searches that know no layout.
const ANY_SHARD: u16 = 64;

impl Core {
    /// Where a block lies, `None` when nothing of it is visible.
    #[must_use]
    pub fn locate(&self, key: &BlockKey) -> Option<BlockView> {
        let ids = self.catalog.find_all(key, ANY_SHARD);
        let visible: Vec<&Entry> = ids.iter().map(|id| self.catalog.get(*id)).filter(|e| e.visible()).collect();
        let first = visible.first()?;
        let mut view = self.view(first);
        view.replicas = visible.iter().flat_map(|e| self.replicas(e)).collect();
        Some(view)
    }

    fn view(&self, entry: &Entry) -> BlockView {
        let scope = self.catalog.scopes.get(entry.scope);
        BlockView {
            key: entry.key,
            replicas: self.replicas(entry),
            namespace: scope.namespace,
            model: scope.model.clone(),
            tenant: scope.tenant.clone(),
            program_id: self.catalog.programs.get(entry.program).clone(),
            semantic: entry.semantic,
            leases: entry.leases,
            depth_blocks: entry.depth_blocks,
        }
    }

    fn replicas(&self, entry: &Entry) -> Vec<ReplicaView> {
        let here = |tier: Tier| entry.resident(tier).then(|| Catalog::place(entry, tier)).flatten();
        let view = |tier: Tier| {
            here(tier).map(|place| ReplicaView {
                shard: entry.shard,
                layout: *self.catalog.layout_id(entry.layout),
                tier,
                bytes: u64::from(entry.bytes),
                checksum: entry.checksum,
                place,
            })
        };
        Tier::ALL.into_iter().filter_map(view).collect()
    }

    /// Every layout seen since start.
    #[must_use]
    pub fn layouts(&self) -> Vec<LayoutId> {
        self.catalog.layouts().to_vec()
    }

    /// A page of visible shards from slab index `from` on, and where the next page starts.
    #[must_use]
    pub fn list(&self, from: u32, limit: usize, tier: Option<Tier>, model: &str) -> (Vec<BlockView>, Option<u32>) {
        let limit = limit.clamp(1, MAX_LIST_PAGE);
        let mut out = Vec::new();
        for (id, entry) in self.catalog.iter_from(from) {
            let wanted = entry.visible()
                && tier.is_none_or(|t| entry.resident(t))
                && self.catalog.scopes.get(entry.scope).model.contains(model);
            if !wanted {
                continue;
            }
            if out.len() == limit {
                return (out, Some(id.index()));
            }
            out.push(self.view(entry));
        }
        (out, None)
    }

    /// What evicting `keys` from `tiers` (all when empty) would do. Changes nothing.
    #[must_use]
    pub fn plan_evict(&self, keys: &[BlockKey], tiers: &[Tier]) -> EvictPlan {
        let mut plan = EvictPlan::default();
        for key in keys {
            let ids = self.evictable_by_verb(key, tiers);
            let in_use = ids.iter().any(|id| self.catalog.get(*id).in_use());
            let (outcome, reason) = match (ids.is_empty(), in_use, tiers.is_empty()) {
                (true, _, _) => (Outcome::Missing, "no copy in those tiers"),
                (_, true, true) => (Outcome::Deferred, "in use: hidden now, dropped when its lease or movement ends"),
                (_, true, false) => (Outcome::Rejected, "in use: try again, or evict it from all tiers"),
                (_, false, _) => (Outcome::Applied, ""),
            };
            plan.outcomes.push((*key, outcome, reason));
            // Only what survives a restart can come back.
            let durable = tiers.is_empty() || tiers.iter().any(|t| matches!(t, Tier::Disk | Tier::Object));
            for id in ids.into_iter().filter(|_| durable && outcome != Outcome::Rejected) {
                // A movement under way may take any number given out so far.
                plan.journal.push((self.shard_key(self.catalog.get(id)), self.next_sequence - 1));
            }
        }
        plan
    }

    /// Carries out an eviction that [`Self::plan_evict`] announced, in the same step: no movement may begin in between.
    /// The caller journals the plan before it acknowledges.
    pub fn apply_evict(&mut self, keys: &[BlockKey], tiers: &[Tier]) {
        for key in keys {
            for id in self.evictable_by_verb(key, tiers) {
                if self.catalog.try_get(id).is_none() {
                    continue;
                }
                self.ghost.insert(key, MissReason::Evicted);
                match (self.catalog.get(id).in_use(), tiers.is_empty()) {
                    (true, true) => {
                        self.catalog.update(id, |e| e.flags.set(Flags::DOOMED, true));
                    }
                    (true, false) => {}
                    (false, true) => self.drop_all(id),
                    (false, false) => self.drop_from(id, tiers),
                }
            }
        }
    }

    fn drop_from(&mut self, id: BlockId, tiers: &[Tier]) {
        for tier in tiers {
            if self.catalog.try_get(id).is_some() {
                self.drop_copy(id, *tier);
            }
        }
    }

    fn evictable_by_verb(&self, key: &BlockKey, tiers: &[Tier]) -> Vec<BlockId> {
        let mut ids = self.catalog.find_all(key, ANY_SHARD);
        ids.retain(|id| {
            let entry = self.catalog.get(*id);
            entry.visible() && (tiers.is_empty() || tiers.iter().any(|t| entry.resident(*t)))
        });
        ids
    }

    /// How full a tier is. Walks the catalog: for status, not for hot paths.
    #[must_use]
    pub fn tier_use(&self, tier: Tier) -> TierUse {
        let of_tier = self.catalog.iter_from(0).filter(|(_, e)| e.resident(tier));
        of_tier.fold(TierUse::default(), |sum, (_, e)| TierUse {
            copies: sum.copies + 1,
            bytes: sum.bytes + u64::from(e.bytes),
        })
    }

    /// Offloads queued or under way.
    #[must_use]
    pub fn pending_offloads(&self) -> usize {
        self.offloads.len() + self.offloading
    }

    /// Onboards queued or under way.
    #[must_use]
    pub fn pending_onboards(&self) -> usize {
        self.onboards.len() + self.onboarding
    }

    /// Entries of the catalog, and bytes of its own memory.
    #[must_use]
    pub fn catalog_size(&self) -> (usize, usize) {
        (self.catalog.len(), self.catalog.memory_bytes())
    }

    /// The last sequence number given out.
    #[must_use]
    pub const fn last_sequence(&self) -> u64 {
        self.next_sequence - 1
    }

    /// Makes sure that sequence numbers given out from now on are above `floor`.
    pub fn sequence_floor(&mut self, floor: u64) {
        self.next_sequence = self.next_sequence.max(floor + 1);
    }
}
