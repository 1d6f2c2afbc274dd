//! Claims and the catalog: what is here of a claim's targets, what holding it means for copies, and when it ends.
//!
//! A claim of blocks that need their ancestors holds those too: leaf-first eviction would keep them anyway, and what is
//! kept is charged. Work on many blocks is done in steps of [`MAX_TOUCHES_PER_CALL`]: the shell calls [`Core::survey`] and
//! [`Core::settle_claims`] until nothing is left.

use std::time::Duration;

use kvtier_types::{BlockKey, ClaimBlock, ClaimKind, ClaimName, Instant, Outcome, TenantId, Tier};
use rustc_hash::FxHashSet;

use super::{Core, MoveEnd};
use crate::catalog::BlockId;
use crate::claims::{Claim, Fit, Standing, Wanted};
use crate::entry::{Entry, Flags, Kept};
use crate::limits::{MAX_KEYS_PER_CALL, MAX_TOUCHES_PER_CALL};

/// Claims in one page of a listing.
pub const MAX_CLAIMS_PAGE: usize = 100;

/// What is here of a claim's targets, gathered over several calls.
#[derive(Debug)]
pub struct Survey {
    kind: ClaimKind,
    keys: Vec<BlockKey>,
    found: Vec<Presence>,
    blocks: Vec<ClaimBlock>,
    ends: Vec<usize>,
    seen: FxHashSet<BlockKey>,
    /// The named block and those of its ancestors that were not seen yet, deepest first.
    chain: Vec<ClaimBlock>,
    next: Option<BlockKey>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Presence {
    /// In the claim's tier.
    Here,
    /// In another tier.
    Away,
    /// Being written, or on its way from elsewhere.
    Coming,
    Missing,
}

impl Survey {
    /// Of these blocks, for a claim of this kind. [`MAX_KEYS_PER_CALL`] of them count.
    #[must_use]
    pub fn new(kind: ClaimKind, mut keys: Vec<BlockKey>) -> Self {
        keys.truncate(MAX_KEYS_PER_CALL);
        Self {
            kind,
            found: Vec::with_capacity(keys.len()),
            keys,
            blocks: Vec::new(),
            ends: Vec::new(),
            seen: FxHashSet::default(),
            chain: Vec::new(),
            next: None,
        }
    }

    fn is_full(&self) -> bool {
        self.blocks.len() + self.chain.len() >= MAX_KEYS_PER_CALL
    }

    /// Ends the unit of the current key.
    fn close(&mut self) {
        if !self.is_full() {
            self.blocks.extend(self.chain.drain(..).rev());
            self.ends.push(self.blocks.len());
        }
        self.chain.clear();
        self.next = None;
    }
}

/// A claim to be made.
#[derive(Debug, Clone)]
pub struct ClaimRequest {
    /// Its name.
    pub name: ClaimName,
    /// A later one replaces the claim; the same is a duplicate; an earlier one is refused.
    pub revision: u64,
    /// What it asks for.
    pub kind: ClaimKind,
    /// For how long; the longest there is when zero or longer than that.
    pub ttl: Duration,
}

/// What became of a claim.
#[derive(Debug, Clone)]
pub struct ClaimAnswer {
    /// Of the call.
    pub outcome: Outcome,
    /// Why, where it was not simply applied.
    pub reason: &'static str,
    /// Of each block named.
    pub outcomes: Vec<(Outcome, &'static str)>,
    /// The owner's hard claims in the claim's tier, after the call.
    pub claimed_bytes: u64,
    /// The most they may have.
    pub budget_bytes: u64,
    /// What to journal before it is acknowledged.
    pub live: Option<ClaimView>,
}

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
    /// Looks further for a claim's blocks. Answers whether some are left.
    pub fn survey(&self, survey: &mut Survey) -> bool {
        let mut touches = 0;
        while survey.found.len() < survey.keys.len() || survey.next.is_some() {
            if touches >= MAX_TOUCHES_PER_CALL {
                return true;
            }
            touches += self.survey_one(survey);
        }
        false
    }

    fn survey_one(&self, survey: &mut Survey) -> usize {
        let named = survey.next.is_none();
        let key = survey.next.take().unwrap_or_else(|| survey.keys[survey.found.len()]);
        let ids = self.catalog.find_all(&key);
        if named {
            let found = self.presence(&ids, survey.kind);
            survey.found.push(found);
            if found == Presence::Missing {
                survey.close();
                return ids.len() + 1;
            }
        }
        let fresh = survey.seen.insert(key);
        if fresh {
            survey.chain.push(ClaimBlock { key, bytes: self.room_of(&ids) });
        }
        let hard = matches!(survey.kind, ClaimKind::Pin(_));
        let parent = ids.iter().map(|id| self.catalog.get(*id)).find_map(|e| {
            let parent = e.parent.filter(|_| e.flags.has(Flags::NEEDS_ANCESTORS))?;
            Some(self.catalog.get(parent).key)
        });
        survey.next = parent.filter(|p| hard && fresh && !survey.seen.contains(p) && !survey.is_full());
        if survey.next.is_none() {
            survey.close();
        }
        ids.len() + 1
    }

    fn presence(&self, ids: &[BlockId], kind: ClaimKind) -> Presence {
        let mut entries = ids.iter().map(|id| self.catalog.get(*id)).filter(|e| !e.flags.has(Flags::DOOMED)).peekable();
        if entries.peek().is_none() {
            return Presence::Missing;
        }
        let of = |e: &Entry| match kind {
            _ if e.flags.has(Flags::RESERVED) => Presence::Coming,
            ClaimKind::Pin(tier) if e.resident(tier) => Presence::Here,
            ClaimKind::Retain(_) if e.visible() => Presence::Here,
            _ if e.visible() => Presence::Away,
            _ if e.flags.has(Flags::REMOTE) => Presence::Coming,
            _ => Presence::Missing,
        };
        let all: Vec<Presence> = entries.map(of).collect();
        // The shards of a block go together; a lost one does not make the others less claimable.
        let has = |p| all.contains(&p);
        match () {
            () if has(Presence::Coming) => Presence::Coming,
            () if has(Presence::Away) => Presence::Away,
            () if has(Presence::Here) => Presence::Here,
            () => Presence::Missing,
        }
    }

    /// The room that shards take, as budgets count it.
    fn room_of(&self, ids: &[BlockId]) -> u64 {
        ids.iter().map(|id| self.frames.class(u64::from(self.catalog.get(*id).bytes))).sum()
    }

    /// Makes a claim, or says what it would come to.
    pub fn claim(&mut self, now: Instant, request: &ClaimRequest, survey: Survey, dry_run: bool) -> ClaimAnswer {
        let Survey { keys, found, blocks, ends, .. } = survey;
        let all = |outcome, reason| vec![(outcome, reason); keys.len()];
        if let Some(reason) = self.unclaimable(request.kind) {
            return self.answer(request, (Outcome::Unsupported, reason), all(Outcome::Unsupported, reason));
        }
        let standing = self.claims.standing(&request.name, request.revision);
        if standing == Standing::Duplicate {
            return self.answer(request, (Outcome::Duplicate, ""), all(Outcome::Duplicate, ""));
        }
        let refusal = match standing {
            Standing::Late => Some("a later revision of this claim was seen"),
            Standing::Fresh if self.claims.len() >= self.claims.config.max_claims => {
                Some("there are as many claims as claims.max_claims allows")
            }
            _ => None,
        };
        if let Some(reason) = refusal {
            self.claim_counts.rejected += u64::from(!dry_run);
            return self.answer(request, (Outcome::Rejected, reason), all(Outcome::Rejected, reason));
        }
        let ttl = if request.ttl.is_zero() { self.claims.config.max_ttl } else { request.ttl };
        let expires = now + ttl.min(self.claims.config.max_ttl);
        let name = request.name.clone();
        let wanted = Wanted { name, revision: request.revision, kind: request.kind, expires, blocks, ends };
        self.claims.aside = Tier::ALL.map(|t| self.catalog.census().kept(t).bytes);
        let fit = self.claims.fit(&wanted);
        let outcomes = outcomes(&found, fit);
        let overall = overall(&outcomes);
        let holds = !matches!(overall.0, Outcome::Rejected | Outcome::Missing);
        if !dry_run {
            self.claim_counts.made += u64::from(holds);
            self.claim_counts.clipped += u64::from(overall.0 == Outcome::Clipped);
            self.claim_counts.rejected += u64::from(overall.0 == Outcome::Rejected);
        }
        if holds && !dry_run {
            self.claims.put(wanted, fit);
        }
        let mut answer = self.answer(request, overall, outcomes);
        answer.live = if holds && !dry_run { self.claim_view(now, &request.name) } else { None };
        answer
    }

    fn answer(
        &self,
        request: &ClaimRequest,
        (outcome, reason): (Outcome, &'static str),
        outcomes: Vec<(Outcome, &'static str)>,
    ) -> ClaimAnswer {
        let (claimed_bytes, budget_bytes) = match request.kind {
            ClaimKind::Pin(tier) => (
                self.claims.owner_bytes(&request.name)[tier.index()],
                self.claims.config.budgets[tier.index()].owner_bytes,
            ),
            ClaimKind::Retain(_) => (0, 0),
        };
        ClaimAnswer { outcome, reason, outcomes, claimed_bytes, budget_bytes, live: None }
    }

    const fn unclaimable(&self, kind: ClaimKind) -> Option<&'static str> {
        match kind {
            ClaimKind::Pin(Tier::Device) => Some("this build has no device tier"),
            ClaimKind::Pin(Tier::Object) => Some("packs are emptied as a whole: pin blocks in host memory or on disk"),
            ClaimKind::Pin(Tier::Disk) if !self.config.disk => Some("this node has no disk tier"),
            ClaimKind::Pin(_) | ClaimKind::Retain(_) => None,
        }
    }

    /// Takes blocks out of a claim, or ends it when none are named. Answers with the outcome of each, or of the claim, and
    /// with the claim as it is then.
    pub fn unclaim(
        &mut self,
        now: Instant,
        (name, revision): (&ClaimName, u64),
        keys: Option<&[BlockKey]>,
    ) -> (Vec<(Outcome, &'static str)>, Option<ClaimView>) {
        let count = keys.map_or(1, <[BlockKey]>::len);
        let live = self.claims.get(name).map(|c| (c.revision, c.blocks.len()));
        let refused = match live {
            None => Some((Outcome::Missing, "there is no such claim")),
            Some((newer, _)) if newer > revision => Some((Outcome::Rejected, "a later revision of this claim is live")),
            Some(_) => None,
        };
        if let Some(refused) = refused {
            return (vec![refused; count], self.claim_view(now, name));
        }
        let Some(keys) = keys else {
            self.claims.end_for_good(name, revision);
            self.claim_counts.released += 1;
            return (vec![(Outcome::Applied, "")], None);
        };
        let was = |was| if was { (Outcome::Applied, "") } else { (Outcome::Missing, "the claim does not hold it") };
        let outcomes = self.claims.drop_blocks(name, revision, keys).into_iter().map(was).collect();
        if self.claims.get(name).is_some_and(|c| c.blocks.is_empty()) {
            self.claims.end_for_good(name, revision);
            self.claim_counts.released += 1;
        }
        (outcomes, self.claim_view(now, name))
    }

    /// Ends claims whoever made them: of an owner, of a tenant, by id, as far as each is given. Answers with their names.
    pub fn release_claims(&mut self, tenant: Option<&TenantId>, owner: &str, ids: &[String]) -> Vec<ClaimName> {
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
        for _ in 0..MAX_TOUCHES_PER_CALL {
            let Some(key) = self.claims.unsettled.pop_front() else { break };
            for id in self.catalog.find_all(&key) {
                self.restand(id);
            }
        }
        self.pump();
        !self.claims.unsettled.is_empty()
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
        let ends = (1..=claim.blocks.len()).collect();
        let ClaimView { name, revision, kind, blocks, .. } = claim;
        if self.unclaimable(kind).is_some() || self.claims.len() >= self.claims.config.max_claims {
            self.claim_counts.rejected += 1;
            return;
        }
        let wanted = Wanted { name, revision, kind, expires, blocks, ends };
        let fit = self.claims.fit(&wanted);
        self.claim_counts.clipped += u64::from(fit.short.is_some());
        self.claims.put(wanted, fit);
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

    /// Hard claims, soft claims, and blocks retained by hints.
    #[must_use]
    pub fn claims_held(&self) -> [(&'static str, u64); 3] {
        let hard = self.claims.after(None).filter(|(_, c)| matches!(c.kind, ClaimKind::Pin(_))).count();
        let soft = self.claims.len() - hard;
        [("pin", hard as u64), ("retain", soft as u64), ("hint", self.claims.hinted.len() as u64)]
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
        let ids = self.catalog.find_all(&key);
        self.claims.grow(&key, self.room_of(&ids));
        for id in ids {
            self.restand(id);
        }
    }

    /// Brings a block to where claims want it, as far as it is here.
    pub(super) fn uphold(&mut self, id: BlockId) {
        let Some(entry) = self.catalog.try_get(id).filter(|e| e.kept != Kept::default() && e.visible()) else { return };
        if entry.resident(Tier::Host) {
            if self.config.disk && entry.kept.has(Tier::Disk) && entry.disk.is_none() {
                self.queue_offload_to(id, Tier::Disk);
            }
        } else if self.lacks(entry) {
            self.upholds.push_back(id);
        }
    }

    /// An onboard ended, perhaps of a block that a claim wants: it goes on to where else it is wanted, or is tried again.
    pub(super) fn upheld(&mut self, id: BlockId, end: MoveEnd) {
        match end {
            MoveEnd::Done(_) => self.uphold(id),
            MoveEnd::Failed if self.catalog.try_get(id).is_some_and(|e| self.lacks(e)) => self.failed_upholds.push(id),
            MoveEnd::Failed | MoveEnd::Corrupt | MoveEnd::Gone => {}
        }
    }

    /// Whether a claim wants a copy that has to come by way of host memory.
    pub(super) fn lacks(&self, entry: &Entry) -> bool {
        let disk = self.config.disk && entry.kept.has(Tier::Disk) && entry.disk.is_none();
        entry.host.is_none() && (entry.kept.has(Tier::Host) || disk)
    }

    /// Onboards for claims: behind those that readers wait for, and at most half of those under way.
    pub(super) fn pump_upholds(&mut self) {
        while self.onboards.is_empty() && self.onboarding < self.config.max_onboards.div_ceil(2) {
            let Some(&id) = self.upholds.front() else { return };
            let busy = Flags::TO_HOST | Flags::DOOMED | Flags::RESERVED;
            let entry = self.catalog.try_get(id).filter(|e| self.lacks(e) && !e.flags.has(busy));
            let from = entry.and_then(|e| [Tier::Disk, Tier::Object].into_iter().find(|t| e.resident(*t)));
            let (Some(entry), Some(from)) = (entry, from) else {
                self.upholds.pop_front();
                continue;
            };
            let bytes = u64::from(entry.bytes);
            let Some(into) = self.host_frame(bytes) else { return };
            self.upholds.pop_front();
            self.catalog.update(id, |e| e.flags.set(Flags::TO_HOST, true));
            self.start_onboard(id, from, into);
        }
    }

    /// A record that a claim or a mark keeps is not dropped to empty its log segment: it is to be rewritten.
    #[must_use]
    pub fn keeps_record(&self, key: &kvtier_types::ShardKey, at: kvtier_types::Location) -> bool {
        let layout = self.catalog.find_layout(&key.layout);
        let id = layout.and_then(|l| self.catalog.find(&key.block, l, key.shard));
        id.map(|id| self.catalog.get(id)).is_some_and(|e| e.disk == Some(at) && e.keeps(Tier::Disk))
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

fn outcomes(found: &[Presence], fit: Fit) -> Vec<(Outcome, &'static str)> {
    let short = fit.short.map_or("more blocks than one claim may have", crate::claims::Short::reason);
    let of = |(unit, found): (usize, &Presence)| match found {
        Presence::Missing => (Outcome::Missing, "nothing of it is here"),
        _ if unit >= fit.units => (Outcome::Clipped, short),
        Presence::Here => (Outcome::Applied, ""),
        Presence::Away => (Outcome::Accepted, "on its way to that tier"),
        Presence::Coming => (Outcome::Deferred, "it is being written or fetched, and is held once it is here"),
    };
    found.iter().enumerate().map(of).collect()
}

/// One outcome for all blocks.
fn overall(outcomes: &[(Outcome, &'static str)]) -> (Outcome, &'static str) {
    let clipped = outcomes.iter().find(|(o, _)| *o == Outcome::Clipped);
    let held = outcomes.iter().any(|(o, _)| matches!(o, Outcome::Applied | Outcome::Accepted | Outcome::Deferred));
    match (clipped, held) {
        (Some((_, reason)), true) => (Outcome::Clipped, reason),
        (Some((_, reason)), false) => (Outcome::Rejected, reason),
        (None, true) => (Outcome::Applied, ""),
        (None, false) => (Outcome::Missing, "nothing of it is here"),
    }
}
