//! Claims made and cut: what is here of their targets, and how much of it fits.
//!
//! A claim of blocks that need their ancestors holds those too: leaf-first eviction would keep them anyway, and what is
//! kept is charged. Work on many blocks is done in steps of [`CLAIM_STEP`]: the shell calls [`Core::survey`],
//! [`Core::claim_some`], [`Core::unclaim_some`] and [`Core::settle_claims`] until nothing is left, and gives no other
//! claim a turn before that.

use std::time::Duration;

use kvtier_types::{BlockKey, ClaimBlock, ClaimKind, ClaimName, Instant, Outcome, Tier};
use rustc_hash::FxHashSet;

use super::{ClaimView, Core};
use crate::catalog::BlockId;
use crate::claims::{Cutting, Fit, Fitting, Short, Standing, Taking, Wanted};
use crate::entry::{Entry, Flags};
use crate::limits::MAX_KEYS_PER_CALL;

/// Blocks of one step.
pub(super) const CLAIM_STEP: usize = 64;

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
}

/// A claim that is being made.
#[derive(Debug)]
pub struct Claiming {
    request: ClaimRequest,
    found: Vec<Presence>,
    dry_run: bool,
    wanted: Wanted,
    step: Step,
    answer: Option<(Outcome, &'static str)>,
    outcomes: Vec<(Outcome, &'static str)>,
    claimed_bytes: u64,
    budget_bytes: u64,
    /// What is held, if anything is.
    held: Option<Fit>,
    /// A copy of the blocks, for the claim.
    blocks: Vec<ClaimBlock>,
}

#[derive(Debug)]
enum Step {
    Begin,
    Fit(Fitting),
    /// The claim that it replaces lets go.
    Replace(Fit),
    Take(Taking),
    Done,
}

impl Claiming {
    /// Of what was found. A dry run says what it would come to, and changes nothing.
    #[must_use]
    pub fn new(request: ClaimRequest, survey: Survey, dry_run: bool) -> Self {
        let Survey { found, blocks, ends, .. } = survey;
        let (name, revision, kind) = (request.name.clone(), request.revision, request.kind);
        let own = blocks.clone();
        let wanted = Wanted { name, revision, kind, expires: Instant::ZERO, blocks, ends };
        Self {
            request,
            found,
            dry_run,
            wanted,
            step: Step::Begin,
            answer: None,
            outcomes: Vec::new(),
            claimed_bytes: 0,
            budget_bytes: 0,
            held: None,
            blocks: own,
        }
    }

    /// The claim that was made, if one was: to be durable before that is acknowledged.
    #[must_use]
    pub fn live(&self, now: Instant) -> Option<ClaimView> {
        let end = self.held?.units.checked_sub(1).map_or(0, |last| self.wanted.ends[last]);
        let Wanted { name, revision, kind, expires, blocks, .. } = &self.wanted;
        let (name, revision, kind, remaining) = (name.clone(), *revision, *kind, expires.since(now));
        Some(ClaimView { name, revision, kind, remaining, blocks: blocks[..end].to_vec() })
    }

    /// What became of it, once nothing is left to do.
    #[must_use]
    pub fn answer(self) -> ClaimAnswer {
        let (outcome, reason) = self.answer.unwrap_or((Outcome::Rejected, "the claim was given up before it was made"));
        let outcomes = if self.outcomes.is_empty() { vec![(outcome, reason); self.found.len()] } else { self.outcomes };
        let Self { claimed_bytes, budget_bytes, .. } = self;
        ClaimAnswer { outcome, reason, outcomes, claimed_bytes, budget_bytes }
    }
}

/// A claim that is cut or ended.
#[derive(Debug)]
pub struct Unclaiming {
    name: ClaimName,
    revision: u64,
    keys: Option<Vec<BlockKey>>,
    cutting: Cutting,
    refused: Option<(Outcome, &'static str)>,
}

impl Unclaiming {
    /// Takes blocks out of a claim, or ends it where none are named.
    #[must_use]
    pub fn new(name: ClaimName, revision: u64, keys: Option<Vec<BlockKey>>) -> Self {
        let cutting = Cutting::new(keys.as_deref().unwrap_or_default());
        Self { name, revision, keys, cutting, refused: None }
    }

    /// The outcome of each block, or of the claim, once nothing is left to do.
    #[must_use]
    pub fn outcomes(&self) -> Vec<(Outcome, &'static str)> {
        let count = self.keys.as_ref().map_or(1, Vec::len);
        if let Some(refused) = self.refused {
            return vec![refused; count];
        }
        let was = |was| if was { (Outcome::Applied, "") } else { (Outcome::Missing, "the claim does not hold it") };
        let keys = self.keys.as_ref().map(|keys| keys.iter().map(|key| was(self.cutting.had(key))).collect());
        keys.unwrap_or_else(|| vec![(Outcome::Applied, "")])
    }
}

impl Core {
    /// Looks further for a claim's blocks. Answers whether some are left.
    pub fn survey(&self, survey: &mut Survey) -> bool {
        let mut touches = 0;
        while survey.found.len() < survey.keys.len() || survey.next.is_some() {
            if touches >= CLAIM_STEP {
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
    pub(super) fn room_of(&self, ids: &[BlockId]) -> u64 {
        ids.iter().map(|id| self.frames.class(u64::from(self.catalog.get(*id).bytes))).sum()
    }

    /// Makes a claim, or says what it would come to.
    pub fn claim(&mut self, now: Instant, request: &ClaimRequest, survey: Survey, dry_run: bool) -> ClaimAnswer {
        let mut claiming = Claiming::new(request.clone(), survey, dry_run);
        while self.claim_some(now, &mut claiming) {}
        claiming.answer()
    }

    /// Goes on with a claim. Answers whether something is left to do.
    pub fn claim_some(&mut self, now: Instant, claiming: &mut Claiming) -> bool {
        match std::mem::replace(&mut claiming.step, Step::Done) {
            Step::Begin => self.begin_claim(now, claiming),
            Step::Fit(mut fitting) => {
                claiming.step = if self.claims.fit_some(&claiming.wanted, &mut fitting, CLAIM_STEP) {
                    Step::Fit(fitting)
                } else {
                    self.fitted(claiming, fitting.fit())
                };
            }
            Step::Replace(fit) => {
                claiming.step = if self.claims.let_go_some(CLAIM_STEP) {
                    Step::Replace(fit)
                } else {
                    let blocks = std::mem::take(&mut claiming.blocks);
                    Step::Take(self.claims.take(&claiming.wanted, fit, blocks))
                };
            }
            Step::Take(mut taking) => {
                if self.claims.take_some(&claiming.wanted, &mut taking, CLAIM_STEP) {
                    claiming.step = Step::Take(taking);
                } else {
                    self.claims.making = false;
                }
            }
            Step::Done => {}
        }
        if matches!(claiming.step, Step::Done) {
            (claiming.claimed_bytes, claiming.budget_bytes) = self.charged(&claiming.request);
            return false;
        }
        true
    }

    fn begin_claim(&mut self, now: Instant, claiming: &mut Claiming) {
        // Ended claims have the budgets until they let go.
        if self.claims.let_go_some(CLAIM_STEP) {
            claiming.step = Step::Begin;
            return;
        }
        let Claiming { request, dry_run, .. } = claiming;
        if let Some(reason) = self.unclaimable(request.kind) {
            claiming.answer = Some((Outcome::Unsupported, reason));
            return;
        }
        let standing = self.claims.standing(&request.name, request.revision);
        if standing == Standing::Duplicate {
            claiming.answer = Some((Outcome::Duplicate, ""));
            return;
        }
        let refusal = match standing {
            Standing::Late => Some("a later revision of this claim was seen"),
            Standing::Fresh if self.claims.len() >= self.claims.config.max_claims => {
                Some("there are as many claims as claims.max_claims allows")
            }
            _ => None,
        };
        if let Some(reason) = refusal {
            self.claim_counts.rejected += u64::from(!*dry_run);
            claiming.answer = Some((Outcome::Rejected, reason));
            return;
        }
        let ttl = if request.ttl.is_zero() { self.claims.config.max_ttl } else { request.ttl };
        claiming.wanted.expires = now + ttl.min(self.claims.config.max_ttl);
        self.claims.aside = Tier::ALL.map(|t| self.catalog.census().kept(t).bytes);
        self.claims.making |= !*dry_run;
        claiming.step = Step::Fit(self.claims.fitting(&claiming.wanted));
    }

    /// It is known how much fits. Answers with what is next.
    fn fitted(&mut self, claiming: &mut Claiming, fit: Fit) -> Step {
        claiming.outcomes = outcomes(&claiming.found, fit);
        let overall = overall(&claiming.outcomes);
        claiming.answer = Some(overall);
        if claiming.dry_run {
            return Step::Done;
        }
        let holds = !matches!(overall.0, Outcome::Rejected | Outcome::Missing);
        claiming.held = holds.then_some(fit);
        self.claim_counts.made += u64::from(holds);
        self.claim_counts.clipped += u64::from(overall.0 == Outcome::Clipped);
        self.claim_counts.rejected += u64::from(overall.0 == Outcome::Rejected);
        if !holds {
            self.claims.making = false;
            return Step::Done;
        }
        self.claims.replace(&claiming.wanted.name);
        Step::Replace(fit)
    }

    /// Bytes of the owner's hard claims in a claim's tier, and the most they may be.
    fn charged(&self, request: &ClaimRequest) -> (u64, u64) {
        match request.kind {
            ClaimKind::Pin(tier) => (
                self.claims.owner_bytes(&request.name)[tier.index()],
                self.claims.config.budgets[tier.index()].owner_bytes,
            ),
            ClaimKind::Retain(_) => (0, 0),
        }
    }

    /// Goes on to cut or end a claim. Answers whether something is left to do; what was let go is yet to be settled.
    pub fn unclaim_some(&mut self, unclaiming: &mut Unclaiming) -> bool {
        let Unclaiming { name, revision, keys, cutting, refused } = unclaiming;
        let Some(claim) = self.claims.get(name) else {
            *refused = Some((Outcome::Missing, "there is no such claim"));
            return false;
        };
        if claim.revision > *revision {
            *refused = Some((Outcome::Rejected, "a later revision of this claim is live"));
            return false;
        }
        if keys.is_some() && self.claims.cut_some((name, *revision), cutting, CLAIM_STEP) {
            return true;
        }
        if keys.is_none() || self.claims.get(name).is_some_and(|c| c.blocks.is_empty()) {
            self.claims.end_for_good(name, *revision);
            self.claim_counts.released += 1;
        }
        false
    }
}

fn outcomes(found: &[Presence], fit: Fit) -> Vec<(Outcome, &'static str)> {
    let short = fit.short.map_or("more blocks than one claim may have", Short::reason);
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
