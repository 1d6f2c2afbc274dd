//! Claims: which blocks somebody asked to be kept, within budgets of bytes.
//!
//! Pure bookkeeping over block keys: what a claim means for copies in tiers is [`crate::Core`]'s business. A hard claim on
//! a tier also keeps the disk's copy, which survives a restart, and is charged for both.
//!
//! *Invariants*
//! - The bytes charged to a tier, and to each owner in it, are the sum over the blocks that live hard claims hold there:
//!   each block once for the node and once for each owner (`budgets_hold_and_sums_agree_after_every_step`).
//! - No charge ever passes a budget: what does not fit is not claimed.
//!
//! *Bounds*: [`ClaimsConfig::max_claims`] claims with [`ClaimsConfig::max_blocks`] blocks in all,
//! [`MAX_CLAIMS_PER_BLOCK`] on one block, [`MAX_HINTED`] blocks held by hints, [`MAX_STEM_BLOCKS`] for branches, [`MAX_REMEMBERED`] ended claims.

mod hinted;
mod making;
mod stems;
mod usage;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;
use std::time::Duration;

use kvtier_types::{BlockKey, ClaimBlock, ClaimKind, ClaimName, Instant, Tier};
use rustc_hash::FxHashMap;

use crate::entry::Kept;
pub(crate) use hinted::Hinted;
pub use hinted::MAX_HINTED;
pub(crate) use making::{Cutting, Fitting, Taking};
pub use stems::MAX_STEM_BLOCKS;
use stems::Stems;
use usage::Usage;

/// Claims on one block at once.
pub const MAX_CLAIMS_PER_BLOCK: usize = 256;
/// Ended claims whose revision is remembered, so that a late call of an earlier one is refused.
pub const MAX_REMEMBERED: usize = 4096;

/// Budgets of one tier, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TierBudget {
    /// Of all hard claims together.
    pub node_bytes: u64,
    /// Of those of one owner.
    pub owner_bytes: u64,
}

/// What claims may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClaimsConfig {
    /// Budgets by tier; zero where nothing can be claimed.
    pub budgets: [TierBudget; Tier::ALL.len()],
    /// Longest time of a claim.
    pub max_ttl: Duration,
    /// Claims at once.
    pub max_claims: usize,
    /// Blocks of all claims together.
    pub max_blocks: usize,
}

impl Default for ClaimsConfig {
    fn default() -> Self {
        Self {
            budgets: [TierBudget::default(); Tier::ALL.len()],
            max_ttl: Duration::from_secs(24 * 3600),
            max_claims: 4096,
            max_blocks: 1 << 18,
        }
    }
}

/// A claim somebody wants.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    pub(crate) name: ClaimName,
    pub(crate) revision: u64,
    pub(crate) kind: ClaimKind,
    pub(crate) expires: Instant,
    /// Blocks in the order in which budgets are given out. Those of a unit are claimed together or not at all.
    pub(crate) blocks: Vec<ClaimBlock>,
    /// Where each unit ends among the blocks.
    pub(crate) ends: Vec<usize>,
}

/// What a revision means for the claim of that name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    Fresh,
    Replaces,
    Duplicate,
    Late,
}

/// Why a unit was not claimed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Short {
    Node,
    Owner,
    Blocks,
    PerBlock,
}

impl Short {
    pub(crate) const fn reason(self) -> &'static str {
        match self {
            Self::Node => "over the node's budget of claimed bytes",
            Self::Owner => "over the owner's budget of claimed bytes",
            Self::Blocks => "more blocks are claimed than claims.max_blocks allows",
            Self::PerBlock => "too many claims on this block",
        }
    }
}

/// How much of a wanted claim fits: so many units, and what stopped it there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fit {
    pub(crate) units: usize,
    pub(crate) short: Option<Short>,
}

/// A live claim.
#[derive(Debug, Clone)]
pub(crate) struct Claim {
    pub(crate) name: ClaimName,
    pub(crate) revision: u64,
    pub(crate) kind: ClaimKind,
    pub(crate) expires: Instant,
    pub(crate) blocks: Vec<ClaimBlock>,
    pub(crate) owner: u32,
}

/// What holds one block.
#[derive(Debug, Clone, Default)]
struct Holding {
    /// What is charged for it wherever it is held.
    bytes: u64,
    /// Numbers of claims.
    claims: Vec<u32>,
}

/// All claims.
#[derive(Debug)]
pub(crate) struct Claims {
    pub(crate) config: ClaimsConfig,
    /// The tier whose copies survive a restart, if there is one.
    pub(crate) durable: Option<Tier>,
    slab: Vec<Option<Claim>>,
    free: Vec<u32>,
    names: BTreeMap<ClaimName, u32>,
    /// Ended claims, and how many of their blocks they did not let go yet.
    leaving: VecDeque<(u32, usize)>,
    /// The one among them whose name another is about to take.
    replaced: Option<u32>,
    /// Whether one is being made. What comes of held blocks meanwhile waits to be charged: it was not counted when room for
    /// the claim was found.
    pub(crate) making: bool,
    pub(crate) arrived: VecDeque<BlockKey>,
    blocks: FxHashMap<BlockKey, Holding>,
    block_count: usize,
    usage: Usage,
    /// Of the node's budgets, what taints and rules take.
    pub(crate) aside: Sums,
    deadlines: BTreeSet<(Instant, u32)>,
    remembered: BTreeMap<ClaimName, u64>,
    forget: VecDeque<ClaimName>,
    pub(crate) hinted: Hinted,
    pub(crate) stems: Stems,
    /// Blocks of which something else is said now than their entries know.
    pub(crate) unsettled: VecDeque<BlockKey>,
}

impl Claims {
    pub(crate) fn new(config: ClaimsConfig, durable: Option<Tier>) -> Self {
        Self {
            config,
            durable,
            slab: Vec::new(),
            free: Vec::new(),
            names: BTreeMap::new(),
            leaving: VecDeque::new(),
            replaced: None,
            making: false,
            arrived: VecDeque::new(),
            blocks: FxHashMap::default(),
            block_count: 0,
            usage: Usage::default(),
            aside: Sums::default(),
            deadlines: BTreeSet::new(),
            remembered: BTreeMap::new(),
            forget: VecDeque::new(),
            hinted: Hinted::default(),
            stems: Stems::default(),
            unsettled: VecDeque::new(),
        }
    }

    /// The tiers in which a claim keeps copies.
    pub(crate) fn keeps(&self, kind: ClaimKind) -> Kept {
        match kind {
            ClaimKind::Pin(tier @ (Tier::Device | Tier::Host)) => {
                let here = Kept::default().with(tier);
                self.durable.map_or(here, |tier| here.with(tier))
            }
            ClaimKind::Pin(tier) => Kept::default().with(tier),
            ClaimKind::Retain(_) => Kept::default(),
        }
    }

    fn claim(&self, number: u32) -> &Claim {
        self.slab[number as usize].as_ref().expect("numbers of claims are kept only while they live")
    }

    /// The claim of a name.
    pub(crate) fn get(&self, name: &ClaimName) -> Option<&Claim> {
        self.names.get(name).map(|number| self.claim(*number))
    }

    /// What a call with this revision means.
    pub(crate) fn standing(&self, name: &ClaimName, revision: u64) -> Standing {
        match self.get(name) {
            Some(claim) if revision > claim.revision => Standing::Replaces,
            Some(claim) if revision == claim.revision => Standing::Duplicate,
            Some(_) => Standing::Late,
            None if self.remembered.get(name).is_some_and(|ended| revision < *ended) => Standing::Late,
            None => Standing::Fresh,
        }
    }

    /// Adds what a block would cost beside claims other than `former`. Answers with what is short, if anything is.
    fn charge(
        &self,
        block: &ClaimBlock,
        (former, owner, kept): (Option<u32>, Option<u32>, Kept),
        (node, own): (&mut Sums, &mut Sums),
    ) -> Option<Short> {
        let holding = self.blocks.get(&block.key);
        let others = holding.map_or(&[][..], |h| &h.claims);
        let others = others.iter().filter(|n| Some(**n) != former).map(|n| self.claim(*n));
        if others.clone().count() >= MAX_CLAIMS_PER_BLOCK {
            return Some(Short::PerBlock);
        }
        let bytes = holding.map_or(block.bytes, |h| h.bytes);
        for tier in Tier::ALL.into_iter().filter(|t| kept.has(*t)) {
            let mut held = others.clone().filter(|c| self.keeps(c.kind).has(tier)).peekable();
            let budget = self.config.budgets[tier.index()];
            let at = tier.index();
            if held.peek().is_none() {
                node[at] += bytes;
            }
            if !held.any(|c| Some(c.owner) == owner) {
                own[at] += bytes;
            }
            if own[at] > budget.owner_bytes {
                return Some(Short::Owner);
            }
            if node[at] + self.aside[at] > budget.node_bytes {
                return Some(Short::Node);
            }
        }
        None
    }

    /// Takes off what only claim `number` makes a block cost.
    fn uncharge_for(&self, block: &ClaimBlock, number: u32, (node, own): (&mut Sums, &mut Sums)) {
        let claim = self.claim(number);
        let Some(holding) = self.blocks.get(&block.key) else { return };
        for tier in Tier::ALL.into_iter().filter(|t| self.keeps(claim.kind).has(*t)) {
            let others = holding.claims.iter().filter(|n| **n != number).map(|n| self.claim(*n));
            let mut held = others.filter(|c| self.keeps(c.kind).has(tier)).peekable();
            if held.peek().is_none() {
                node[tier.index()] -= holding.bytes;
            }
            if !held.any(|c| c.owner == claim.owner) {
                own[tier.index()] -= holding.bytes;
            }
        }
    }

    /// Lets a live claim hold one more block.
    fn hold(&mut self, block: &ClaimBlock, number: u32) {
        let (owner, kept) = (self.claim(number).owner, self.keeps(self.claim(number).kind));
        let holding =
            self.blocks.entry(block.key).or_insert_with(|| Holding { bytes: block.bytes, claims: Vec::new() });
        if holding.claims.contains(&number) {
            return;
        }
        let bytes = holding.bytes;
        let others = self.blocks[&block.key].claims.iter().map(|n| self.claim(*n));
        let mut costs = Vec::new();
        for tier in Tier::ALL.into_iter().filter(|t| kept.has(*t)) {
            let mut held = others.clone().filter(|c| self.keeps(c.kind).has(tier)).peekable();
            costs.push((tier, held.peek().is_none(), !held.any(|c| c.owner == owner)));
        }
        for (tier, node, own) in costs {
            self.usage.add(tier, owner, (node, own), bytes);
        }
        if let Some(holding) = self.blocks.get_mut(&block.key) {
            holding.claims.push(number);
        }
        self.block_count += 1;
        self.unsettled.push_back(block.key);
    }

    /// Lets a live claim hold one block less.
    fn let_go(&mut self, block: &ClaimBlock, number: u32) {
        let owner = self.claim(number).owner;
        let (mut node, mut own) = (self.usage.node, self.usage.of_owner(owner));
        self.uncharge_for(block, number, (&mut node, &mut own));
        self.usage.set(owner, node, own);
        let Some(holding) = self.blocks.get_mut(&block.key) else { return };
        holding.claims.retain(|n| *n != number);
        if holding.claims.is_empty() {
            self.blocks.remove(&block.key);
        }
        self.block_count -= 1;
        self.unsettled.push_back(block.key);
    }

    /// Ends a claim and remembers its revision, so that what was said before does not come true later.
    pub(crate) fn end_for_good(&mut self, name: &ClaimName, revision: u64) {
        let Some(latest) = self.end(name) else { return };
        if self.remembered.insert(name.clone(), revision.max(latest)).is_none() {
            self.forget.push_back(name.clone());
        }
        while self.forget.len() > MAX_REMEMBERED {
            if let Some(oldest) = self.forget.pop_front() {
                self.remembered.remove(&oldest);
            }
        }
    }

    /// More of a block is here than was charged for: charges it, if that fits every budget.
    pub(crate) fn grow(&mut self, key: &BlockKey, bytes: u64) {
        let Some(holding) = self.blocks.get(key).filter(|h| h.bytes < bytes) else { return };
        let more = bytes - holding.bytes;
        let mut costs: Vec<(Tier, Vec<u32>)> = Vec::new();
        for tier in Tier::ALL {
            let held = holding.claims.iter().map(|n| self.claim(*n)).filter(|c| self.keeps(c.kind).has(tier));
            let mut owners: Vec<u32> = held.map(|c| c.owner).collect();
            owners.sort_unstable();
            owners.dedup();
            costs.push((tier, owners));
        }
        let fits = costs.iter().filter(|(_, owners)| !owners.is_empty()).all(|(tier, owners)| {
            let (at, budget) = (tier.index(), self.config.budgets[tier.index()]);
            self.usage.node[at] + more <= budget.node_bytes
                && owners.iter().all(|o| self.usage.of_owner(*o)[at] + more <= budget.owner_bytes)
        });
        if !fits {
            return;
        }
        for (tier, owners) in costs {
            for (n, owner) in owners.into_iter().enumerate() {
                self.usage.add(tier, owner, (n == 0, true), more);
            }
        }
        if let Some(holding) = self.blocks.get_mut(key) {
            holding.bytes = bytes;
        }
    }

    /// What is held of a block: tiers, bytes charged, and the priority of its strongest soft claim.
    pub(crate) fn held(&self, key: &BlockKey) -> (Kept, u64, Option<u8>) {
        let hint = self.hinted.priority(key).max(self.stems.priority(key));
        let Some(holding) = self.blocks.get(key) else { return (Kept::default(), 0, hint) };
        let mut priority = hint;
        let mut kept = Kept::default();
        for claim in holding.claims.iter().map(|n| self.claim(*n)) {
            kept = kept.or(self.keeps(claim.kind));
            if let ClaimKind::Retain(p) = claim.kind {
                priority = priority.max(Some(p));
            }
        }
        (kept, holding.bytes, priority)
    }

    /// Whether anything is held of a block.
    pub(crate) fn holds(&self, key: &BlockKey) -> bool {
        self.blocks.contains_key(key) || self.hinted.priority(key).is_some() || self.stems.priority(key).is_some()
    }

    /// Whether a claim that somebody named holds a block.
    pub(crate) fn is_named(&self, key: &BlockKey) -> bool {
        self.blocks.contains_key(key)
    }

    /// Names of the claims on a block.
    pub(crate) fn of_block(&self, key: &BlockKey) -> Vec<String> {
        let Some(holding) = self.blocks.get(key) else { return Vec::new() };
        let mut names: Vec<String> = holding.claims.iter().map(|n| self.claim(*n).name.id.clone()).collect();
        names.sort_unstable();
        names
    }

    /// Ends claims whose time is over.
    pub(crate) fn expire(&mut self, now: Instant) -> Vec<ClaimName> {
        let over = self.deadlines.iter().take_while(|(at, _)| *at <= now);
        let names: Vec<ClaimName> = over.map(|(_, number)| self.claim(*number).name.clone()).collect();
        for name in &names {
            self.end(name);
        }
        names
    }

    /// When the next claim ends.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let claim = self.deadlines.first().map(|(at, _)| *at);
        claim.into_iter().chain(self.hinted.next_deadline()).min()
    }

    /// Claims after a name, in order.
    pub(crate) fn after(&self, name: Option<&ClaimName>) -> impl Iterator<Item = (&ClaimName, &Claim)> {
        let from = name.map_or(Bound::Unbounded, Bound::Excluded);
        self.names.range::<ClaimName, _>((from, Bound::Unbounded)).map(|(name, number)| (name, self.claim(*number)))
    }

    pub(crate) fn len(&self) -> usize {
        self.names.len()
    }

    /// Bytes that hard claims hold, by tier.
    pub(crate) const fn node_bytes(&self) -> Sums {
        self.usage.node
    }

    /// Bytes that hard claims of one owner hold, by tier.
    pub(crate) fn owner_bytes(&self, name: &ClaimName) -> Sums {
        self.usage.owner_of(name).map_or([0; Tier::ALL.len()], |owner| self.usage.of_owner(owner))
    }
}

/// Bytes by tier.
pub(crate) type Sums = [u64; Tier::ALL.len()];
