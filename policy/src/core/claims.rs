//! Claims and the catalog: what holding a block means for its copies, and when it ends.
//!
//! Work on many blocks is done in steps: the shell calls [`Core::settle_claims`] until nothing is left.

use std::time::Duration;

use kvtier_types::{BlockKey, ClaimBlock, ClaimKind, ClaimName, Instant, Outcome, TenantId, Tier};
use rustc_hash::FxHashSet;

use super::claiming::CLAIM_STEP;
use super::{Core, MoveEnd};
use crate::catalog::BlockId;
use crate::claims::{Claim, Wanted};
use crate::entry::{Entry, Flags, Kept};
use crate::limits::{MAX_KEYS_PER_CALL, MAX_TOUCHES_PER_CALL};

/// Claims in one page of a listing.
pub const MAX_CLAIMS_PAGE: usize = 100;

/// A claim as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimView {
    /// Its name.
    pub name: ClaimName,
    /// Its revision.
    pub revision: u64,
    /// What it asks for.
    pub kind: ClaimKind,
    /// Until it ends; the longest there is for one that lasts as long as what made it.
    pub remaining: Duration,
    /// Its blocks, in prefix order.
    pub blocks: Vec<ClaimBlock>,
}

/// Counts of claims that only grow, for metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ClaimCounts {
    /// Made or replaced.
    pub made: u64,
    /// Of those, cut to a budget.
    pub clipped: u64,
    /// Refused.
    pub rejected: u64,
    /// Ended by their time.
    pub expired: u64,
    /// Ended by a verb.
    pub released: u64,
}

impl Core {
    pub(super) fn unclaimable(&self, kind: ClaimKind) -> Option<&'static str> {
        match kind {
            ClaimKind::Pin(Tier::Device) if !self.has_devices() => Some("this node has no device tier"),
            ClaimKind::Pin(Tier::Object) => Some("packs are emptied as a whole: pin blocks in host memory or on disk"),
            ClaimKind::Pin(Tier::Disk) if !self.config.disk => Some("this node has no disk tier"),
            ClaimKind::Pin(_) | ClaimKind::Retain(_) => None,
        }
    }

    /// Ends claims whoever made them: of an owner, of a tenant, by id, as far as each is given. Answers with their names.
    pub fn release_claims(&mut self, tenant: Option<&TenantId>, owner: &str, ids: &[String]) -> Vec<ClaimName> {
        let ids: FxHashSet<&String> = ids.iter().collect();
        let asked = |name: &ClaimName| {
            tenant.is_none_or(|t| name.tenant == *t)
                && (owner.is_empty() || name.owner == owner)
                && (ids.is_empty() || ids.contains(&name.id))
        };
        let names: Vec<ClaimName> = self.claims.after(None).map(|(n, _)| n).filter(|n| asked(n)).cloned().collect();
        for name in &names {
            let revision = self.claims.get(name).map_or(0, |c| c.revision);
            self.claims.end_for_good(name, revision);
        }
        self.claim_counts.released += names.len() as u64;
        names
    }

    /// Brings entries in step with what is said of them. Answers whether some are left.
    pub fn settle_claims(&mut self) -> bool {
        if self.claims.let_go_some(CLAIM_STEP) {
            return true;
        }
        for _ in 0..CLAIM_STEP {
            let arrived = if self.claims.making { None } else { self.claims.arrived.pop_front() };
            if let Some(key) = arrived {
                self.charge_arrived(&key);
                continue;
            }
            let Some(key) = self.claims.unsettled.pop_front() else { break };
            for id in self.catalog.find_all(&key) {
                self.restand(id);
            }
        }
        self.pump();
        !self.claims.unsettled.is_empty() || (!self.claims.making && !self.claims.arrived.is_empty())
    }

    fn charge_arrived(&mut self, key: &BlockKey) {
        let ids = self.catalog.find_all(key);
        self.claims.grow(key, self.room_of(&ids));
        for id in ids {
            self.restand(id);
        }
    }

    /// Claims that ended by themselves since the last call: to be journaled.
    pub fn take_expired_claims(&mut self) -> Vec<ClaimName> {
        std::mem::take(&mut self.expired_claims)
    }

    pub(super) fn expire_claims(&mut self, now: Instant) {
        let ended = self.claims.expire(now);
        self.claim_counts.expired += ended.len() as u64;
        self.expired_claims.extend(ended);
        let hinted = self.claims.hinted.expire(now, MAX_TOUCHES_PER_CALL);
        self.claims.unsettled.extend(hinted);
        let again = std::mem::take(&mut self.failed_upholds);
        self.upholds.extend(again);
        self.settle_claims();
    }

    /// Takes in a claim of a former life, before the tiers are recovered. What does not fit today's budgets is left out.
    pub fn recover_claim(&mut self, now: Instant, claim: ClaimView) {
        let expires = now + claim.remaining;
        let ClaimView { name, revision, kind, mut blocks, .. } = claim;
        let mut seen = FxHashSet::default();
        blocks.retain(|block| seen.insert(block.key));
        let ends = (1..=blocks.len()).collect();
        if self.unclaimable(kind).is_some() || self.claims.len() >= self.claims.config.max_claims {
            self.claim_counts.rejected += 1;
            return;
        }
        let wanted = Wanted { name, revision, kind, expires, blocks, ends };
        let mut fitting = self.claims.fitting(&wanted);
        while self.claims.fit_some(&wanted, &mut fitting, usize::MAX) {}
        let fit = fitting.fit();
        self.claim_counts.clipped += u64::from(fit.short.is_some());
        self.claims.replace(&wanted.name);
        while self.claims.let_go_some(usize::MAX) {}
        let mut taking = self.claims.take(&wanted, fit, wanted.blocks.clone());
        while self.claims.take_some(&wanted, &mut taking, usize::MAX) {}
    }

    /// Takes a request's hint to retain blocks: soft, bounded in number, and lost with the process.
    pub fn retain_hint(&mut self, now: Instant, keys: &[BlockKey], priority: u8, ttl: Duration) -> Outcome {
        let expires = now + ttl.min(self.claims.config.max_ttl);
        let mut all = true;
        for key in keys {
            if self.claims.hinted.put(*key, priority.min(100), expires) {
                self.claims.unsettled.push_back(*key);
            } else {
                all = false;
            }
        }
        if all { Outcome::Applied } else { Outcome::Clipped }
    }

    /// Holds blocks that branches are about to read, in order, as far as there is room: answers with how many. What follows is
    /// for [`Self::settle_claims`].
    pub fn hold_stem(&mut self, keys: &[BlockKey]) -> usize {
        let held = keys.iter().take_while(|key| self.claims.stems.hold(**key)).count();
        self.claims.unsettled.extend(&keys[..held]);
        held
    }

    /// Lets go of blocks that were held so.
    pub fn let_stem_go(&mut self, keys: &[BlockKey]) {
        for key in keys {
            if self.claims.stems.let_go(key) {
                self.claims.unsettled.push_back(*key);
            }
        }
    }

    /// A claim as it is.
    #[must_use]
    pub fn claim_view(&self, now: Instant, name: &ClaimName) -> Option<ClaimView> {
        self.claims.get(name).map(|claim| view(now, name, claim))
    }

    /// A page of claims after a name, and whether there are more: of one tenant and one owner, where given.
    #[must_use]
    pub fn claims_after(
        &self,
        now: Instant,
        name: Option<&ClaimName>,
        (tenant, owner): (Option<&TenantId>, &str),
        limit: usize,
    ) -> (Vec<ClaimView>, bool) {
        let wanted =
            |name: &ClaimName| tenant.is_none_or(|t| name.tenant == *t) && (owner.is_empty() || name.owner == owner);
        let (mut page, mut blocks) = (Vec::new(), 0);
        for (name, claim) in self.claims.after(name).filter(|(name, _)| wanted(name)) {
            if page.len() >= limit.clamp(1, MAX_CLAIMS_PAGE) || blocks > MAX_KEYS_PER_CALL {
                return (page, true);
            }
            blocks += claim.blocks.len();
            page.push(view(now, name, claim));
        }
        (page, false)
    }

    /// Of these blocks, the bytes that lie in a tier. At most [`MAX_TOUCHES_PER_CALL`] count.
    #[must_use]
    pub fn resident_bytes(&self, tier: Tier, blocks: &[ClaimBlock]) -> u64 {
        let entries = blocks.iter().take(MAX_TOUCHES_PER_CALL).flat_map(|b| self.catalog.find_all(&b.key));
        let here = entries.map(|id| self.catalog.get(id)).filter(|e| e.resident(tier));
        here.map(|e| self.frames.class(u64::from(e.bytes))).sum()
    }

    /// Claimed bytes and the budget of the node's hard claims, of one tier.
    #[must_use]
    pub fn claimed(&self, tier: Tier) -> (u64, u64) {
        (self.claims.node_bytes()[tier.index()], self.claims.config.budgets[tier.index()].node_bytes)
    }

    /// Hard claims, soft claims, blocks retained by hints, and blocks held for branches.
    #[must_use]
    pub fn claims_held(&self) -> [(&'static str, u64); 4] {
        let hard = self.claims.after(None).filter(|(_, c)| matches!(c.kind, ClaimKind::Pin(_))).count();
        let soft = self.claims.len() - hard;
        [
            ("pin", hard as u64),
            ("retain", soft as u64),
            ("hint", self.claims.hinted.len() as u64),
            ("stem", self.claims.stems.len() as u64),
        ]
    }

    /// Counts of claims so far.
    #[must_use]
    pub const fn claim_counts(&self) -> &ClaimCounts {
        &self.claim_counts
    }

    /// What claims say of an entry: where its copies stay, and its priority.
    pub(super) fn said_by_claims(&self, id: BlockId) -> (Kept, Option<u8>) {
        let key = self.catalog.get(id).key;
        let (kept, charged, priority) = self.claims.held(&key);
        if kept == Kept::default() {
            return (kept, priority);
        }
        // Shards that came after the claim was made, and that no budget took, are not kept.
        let mut room = 0;
        for other in self.catalog.find_all(&key) {
            room += self.frames.class(u64::from(self.catalog.get(other).bytes));
            if other == id {
                break;
            }
        }
        (if room <= charged { kept } else { Kept::default() }, priority)
    }

    /// Names of the claims on a block.
    pub(super) fn claims_on(&self, key: &BlockKey) -> Vec<String> {
        self.claims.of_block(key)
    }

    /// An entry came into the catalog: what was said of its block before counts for it.
    pub(super) fn arrived(&mut self, id: BlockId) {
        let key = self.catalog.get(id).key;
        if !self.claims.holds(&key) {
            return;
        }
        if !self.claims.making {
            self.charge_arrived(&key);
        } else if self.claims.arrived.len() < MAX_KEYS_PER_CALL {
            self.claims.arrived.push_back(key);
        }
    }

    /// Brings a block to where claims want it, as far as it is here.
    pub(super) fn uphold(&mut self, id: BlockId) {
        let Some(entry) = self.catalog.try_get(id).filter(|e| e.kept != Kept::default() && e.visible()) else { return };
        if entry.resident(Tier::Host) {
            if self.config.disk && entry.kept.has(Tier::Disk) && entry.disk.is_none() {
                self.queue_offload_to(id, Tier::Disk);
            }
            if self.lacks_device(self.catalog.get(id)) {
                self.queue_device_copy(id, None);
            }
        } else if self.lacks(entry) {
            self.upholds.push_back(id);
        }
    }

    /// An onboard ended, perhaps of a block that a claim wants: it goes on to where else it is wanted, or is tried again.
    pub(super) fn upheld(&mut self, id: BlockId, end: MoveEnd) {
        match end {
            MoveEnd::Done(_) => self.uphold(id),
            MoveEnd::Failed if self.is_lost_to_claims(id) => self.failed_upholds.push(id),
            MoveEnd::Failed | MoveEnd::Corrupt | MoveEnd::Gone => {}
        }
    }

    /// Whether a claim lacks a block, and nothing brings it up: not even another copy than the one that failed.
    fn is_lost_to_claims(&self, id: BlockId) -> bool {
        self.catalog.try_get(id).is_some_and(|e| self.lacks(e) && !e.flags.has(Flags::TO_HOST))
    }

    /// Whether a claim wants a copy that has to come by way of host memory.
    pub(super) fn lacks(&self, entry: &Entry) -> bool {
        let disk = self.config.disk && entry.kept.has(Tier::Disk) && entry.disk.is_none();
        entry.host.is_none() && (entry.kept.has(Tier::Host) || disk || self.lacks_device(entry))
    }

    /// Onboards for claims: behind those that readers wait for, and at most half of those under way.
    pub(super) fn pump_upholds(&mut self) {
        while self.onboards.is_empty() && self.onboarding < self.config.max_onboards.div_ceil(2) {
            let Some(&id) = self.upholds.front() else { return };
            let busy = Flags::TO_HOST | Flags::DOOMED | Flags::RESERVED;
            let entry = self.catalog.try_get(id).filter(|e| self.lacks(e) && !e.flags.has(busy));
            let from = entry.and_then(|_| self.onboard_source(id));
            let (Some(entry), Some(from)) = (entry, from) else {
                self.upholds.pop_front();
                self.uphold_on_device(id);
                continue;
            };
            let bytes = u64::from(entry.bytes);
            let Some(into) = self.host_frame(bytes) else { return };
            self.upholds.pop_front();
            self.catalog.update(id, |e| e.flags.set(Flags::TO_HOST, true));
            self.start_onboard(id, from, into);
        }
    }

    /// What a claim wants on a device is copied there once host memory has it.
    fn uphold_on_device(&mut self, id: BlockId) {
        if self.catalog.try_get(id).is_some_and(|e| self.lacks_device(e)) {
            self.queue_device_copy(id, None);
        }
    }

    /// A record that a claim or a mark keeps is not dropped to empty its log segment: it is to be rewritten.
    #[must_use]
    pub fn keeps_record(&self, key: &kvtier_types::ShardKey, at: kvtier_types::Location) -> bool {
        self.catalog
            .find_shard(key)
            .map(|id| self.catalog.get(id))
            .is_some_and(|e| e.disk == Some(at) && e.keeps(Tier::Disk))
    }
}

fn view(now: Instant, name: &ClaimName, claim: &Claim) -> ClaimView {
    ClaimView {
        name: name.clone(),
        revision: claim.revision,
        kind: claim.kind,
        remaining: claim.expires.since(now),
        blocks: claim.blocks.clone(),
    }
}
