//! What operators ask: where a block is, what there is, and to drop it.

use kvtier_types::{BlockKey, Effect, LayoutId, NamespaceId, Outcome, SemanticType, ShardKey, Taint, TenantId, Tier};

use super::movement::CLAIMED;
use super::{Core, Holdings};
use crate::catalog::BlockId;
use crate::entry::{Flags, Kept};
use crate::ledger::MissReason;
use crate::limits::{MAX_LIST_PAGE, MAX_LIST_SCAN};

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
    /// Ids of the claims on it.
    pub claims: Vec<String>,
    /// Branches of programs and sessions that lead through it.
    pub holders: u32,
    /// Its taints.
    pub taints: Vec<Taint>,
    /// The first rule that decided anything of its lifecycle; empty when none did.
    pub rule: String,
}

/// Which blocks a listing names.
#[derive(Debug, Clone, Default)]
pub struct ListFilter {
    /// With a copy in this tier.
    pub tier: Option<Tier>,
    /// Of models whose name contains this.
    pub model: String,
    /// Of this type.
    pub semantic: Option<SemanticType>,
    /// That a program of this name wrote or holds; all when empty.
    pub program: String,
    /// Of this tenant, and of none in particular.
    pub tenant: Option<TenantId>,
}

/// What an eviction by verb is about to do.
#[derive(Debug, Clone, Default)]
pub struct EvictPlan {
    /// One outcome a key.
    pub outcomes: Vec<(BlockKey, Outcome, &'static str)>,
    /// Shards to record in the journal, with the last sequence given out, before the eviction is acknowledged.
    pub journal: Vec<(ShardKey, u64)>,
    /// Blocks that lie in the object store or are on their way there: other nodes could read them.
    pub in_object: Vec<BlockKey>,
    /// The last sequence given out: of what may go, everything up to it is dead.
    pub up_to_sequence: u64,
}

/// How full a tier is, by the catalog.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TierUse {
    /// Copies.
    pub copies: u64,
    /// Their payload bytes.
    pub bytes: u64,
}

impl Core {
    /// Where a block lies, `None` when nothing of it is visible.
    #[must_use]
    pub fn locate(&self, key: &BlockKey) -> Option<BlockView> {
        let ids = self.catalog.find_all(key);
        let mut visible: Vec<BlockId> = ids;
        visible.retain(|id| self.catalog.get(*id).visible());
        let mut view = self.view(*visible.first()?);
        view.replicas = visible.iter().flat_map(|id| self.replicas(*id)).collect();
        Some(view)
    }

    /// Who owns a block, `None` when nothing of it is here.
    #[must_use]
    pub fn tenant_of(&self, key: &BlockKey) -> Option<&TenantId> {
        let ids = self.catalog.find_all(key);
        let first = ids.first().map(|id| self.catalog.get(*id))?;
        Some(&self.catalog.scopes.get(first.scope).tenant)
    }

    fn view(&self, id: BlockId) -> BlockView {
        let entry = self.catalog.get(id);
        let scope = self.catalog.scopes.get(entry.scope);
        BlockView {
            key: entry.key,
            replicas: self.replicas(id),
            namespace: scope.namespace,
            model: scope.model.clone(),
            tenant: scope.tenant.clone(),
            program_id: self.catalog.programs.get(entry.program).clone(),
            semantic: entry.semantic,
            leases: entry.leases,
            depth_blocks: entry.depth_blocks,
            claims: self.claims_on(&entry.key),
            holders: entry.held,
            taints: self.taints(entry).to_vec(),
            rule: self.catalog.lives.get(entry.life).rule.clone(),
        }
    }

    fn replicas(&self, id: BlockId) -> Vec<ReplicaView> {
        let entry = self.catalog.get(id);
        let here = |tier: Tier| entry.resident(tier).then(|| self.catalog.place((id, entry), tier)).flatten();
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

    /// A page of visible shards from slab index `from` on, and where the next page starts. A page may be short, or empty,
    /// where few of many shards pass the filter. `held` is what the programs hold that the filter names, if it names any.
    #[must_use]
    pub fn list(
        &self,
        from: u32,
        limit: usize,
        filter: &ListFilter,
        held: Option<&Holdings>,
    ) -> (Vec<BlockView>, Option<u32>) {
        let limit = limit.clamp(1, MAX_LIST_PAGE);
        let mut out = Vec::new();
        for (scanned, (id, entry)) in self.catalog.iter_from(from).enumerate() {
            if out.len() == limit || scanned == MAX_LIST_SCAN {
                return (out, Some(id.index()));
            }
            let of_program = || {
                let program = &filter.program;
                let holds = || held.is_some_and(|held| held.has(&self.catalog.place_of(id)));
                program.is_empty() || self.catalog.programs.get(entry.program) == program || holds()
            };
            let wanted = entry.visible()
                && filter.tier.is_none_or(|t| entry.resident(t))
                && filter.semantic.is_none_or(|s| entry.semantic == s)
                && self.catalog.scopes.get(entry.scope).model.contains(&filter.model)
                && filter.tenant.as_ref().is_none_or(|tenant| {
                    let of = &self.catalog.scopes.get(entry.scope).tenant;
                    of == tenant || *of == TenantId::shared()
                })
                && of_program();
            if wanted {
                out.push(self.view(id));
            }
        }
        (out, None)
    }

    /// What evicting `keys` from `tiers` (all when empty) would do. Changes nothing.
    #[must_use]
    pub fn plan_evict(&self, keys: &[BlockKey], tiers: &[Tier]) -> EvictPlan {
        // A movement under way may take any number given out so far.
        let up_to_sequence = self.next_sequence - 1;
        let mut plan = EvictPlan { up_to_sequence, ..EvictPlan::default() };
        for key in keys {
            let ids = self.evictable_by_verb(key, tiers);
            let in_use = ids.iter().any(|id| self.catalog.get(*id).in_use());
            let (outcome, reason) = match (ids.is_empty(), in_use, tiers.is_empty()) {
                (true, _, _) => (Outcome::Missing, "no copy in those tiers"),
                _ if self.held_in(&ids, tiers) => (Outcome::Rejected, CLAIMED),
                (_, true, true) => (Outcome::Deferred, "in use: hidden now, dropped when its lease or movement ends"),
                (_, true, false) => (Outcome::Rejected, "in use: try again, or evict it from all tiers"),
                (_, false, _) => (Outcome::Applied, ""),
            };
            plan.outcomes.push((*key, outcome, reason));
            // Only what survives a restart can come back.
            let durable = tiers.is_empty() || tiers.iter().any(|t| matches!(t, Tier::Disk | Tier::Object));
            if !durable || outcome == Outcome::Rejected {
                continue;
            }
            let stored = |e: &crate::entry::Entry| e.resident(Tier::Object) || e.flags.has(Flags::TO_OBJECT);
            if ids.iter().any(|id| stored(self.catalog.get(*id))) {
                plan.in_object.push(*key);
            }
            plan.journal.extend(ids.into_iter().map(|id| (self.shard_key(self.catalog.get(id)), up_to_sequence)));
        }
        plan
    }

    /// Carries out an eviction that [`Self::plan_evict`] announced, in the same step: no movement may begin in between.
    /// The caller journals the plan before it acknowledges.
    pub fn apply_evict(&mut self, keys: &[BlockKey], tiers: &[Tier]) {
        let former = self.catalog.events.because("verb");
        for key in keys {
            let ids = self.evictable_by_verb(key, tiers);
            if self.held_in(&ids, tiers) {
                continue;
            }
            for id in ids {
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
        self.catalog.events.because(former);
    }

    fn drop_from(&mut self, id: BlockId, tiers: &[Tier]) {
        for tier in tiers {
            if self.catalog.try_get(id).is_some() {
                self.drop_copy(id, *tier);
            }
        }
    }

    /// Whether a claim, or the taint `NoEvict`, keeps what lies in these tiers, all when empty.
    fn held_in(&self, ids: &[BlockId], tiers: &[Tier]) -> bool {
        ids.iter().map(|id| self.catalog.get(*id)).any(|entry| {
            let tainted = self.taints(entry).iter().any(|t| t.effect == Effect::NoEvict);
            tainted
                || match tiers {
                    [] => entry.kept != Kept::default(),
                    tiers => tiers.iter().any(|tier| entry.resident(*tier) && entry.kept.has(*tier)),
                }
        })
    }

    fn evictable_by_verb(&self, key: &BlockKey, tiers: &[Tier]) -> Vec<BlockId> {
        let mut ids = self.catalog.find_all(key);
        ids.retain(|id| {
            let entry = self.catalog.get(*id);
            // What is on its way here from another node would be a copy like any other.
            let coming = entry.flags.has(Flags::REMOTE) && entry.in_use();
            let gone = entry.flags.has(Flags::RESERVED | Flags::DOOMED);
            let here = entry.visible() && (tiers.is_empty() || tiers.iter().any(|t| entry.resident(*t)));
            here || (coming && !gone && tiers.is_empty())
        });
        ids
    }

    /// How full a tier is.
    #[must_use]
    pub fn tier_use(&self, tier: Tier) -> TierUse {
        self.catalog.census().tier(tier)
    }

    /// Copies of a type in a tier.
    #[must_use]
    pub const fn type_use(&self, semantic: SemanticType, tier: Tier) -> TierUse {
        self.catalog.census().of(semantic, tier)
    }

    /// Copies in a tier that taints and rules keep from making room.
    #[must_use]
    pub const fn kept_use(&self, tier: Tier) -> TierUse {
        self.catalog.census().kept(tier)
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
