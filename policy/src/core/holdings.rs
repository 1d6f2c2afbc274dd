//! The blocks that a program holds, or a session's latest context, gathered in steps.
//!
//! Between two steps programs call and blocks go: what is gone ends its path, and nothing is reached but by the tips of who was
//! named. What nobody else holds is known by counting all tips, so a program that left some meanwhile is counted anew.

use kvtier_types::{BlockKey, TenantId};
use rustc_hash::FxHashSet;

use super::Core;
use super::programs::HOLDER_STEP;
use crate::catalog::{BlockId, Place, Spot};
use crate::entry::{Entry, Flags};
use crate::events::Event;
use crate::holders::{Counting, HolderKind, HolderName, Kin};
use crate::limits::MAX_KEYS_PER_CALL;

/// Times that blocks are counted anew because a program left some meanwhile; after that it has none to itself.
const MAX_COUNTS: u32 = 4;

/// Blocks of programs or of a session, as far as they were gathered: at most [`MAX_KEYS_PER_CALL`] keys.
#[derive(Debug)]
pub struct Holdings {
    wish: Wish,
    stage: Stage,
    members: Vec<HolderName>,
    /// The tips of the current member that come next, last first.
    tips: Vec<Spot>,
    /// The path above the current tip as far as it is new, deepest first.
    path: Vec<(Place, bool)>,
    above: Option<Spot>,
    visited: FxHashSet<Place>,
    seen: FxHashSet<BlockKey>,
    keys: Vec<BlockKey>,
    /// A block's length in tokens is not known.
    unknown: bool,
}

/// What is asked for.
#[derive(Debug, Clone, Copy)]
enum Wish {
    /// What programs hold, and what they held and nobody holds now.
    Held,
    /// Those of them that nobody else holds.
    Exclusive,
    /// Where they lie, but for what they only held.
    Places,
    /// Blocks of the latest context that overlap tokens from here to there; to its end when that is zero.
    Context(u32, u32),
}

#[derive(Debug)]
enum Stage {
    Family(Kin),
    Count(Count),
    /// Whether the members from this one on left no tips since they were counted.
    Verify(usize, Count),
    /// What this member has is gathered next.
    List(usize, Counting),
    Done,
}

/// Tips of all members, counted.
#[derive(Debug, Default)]
struct Count {
    counting: Counting,
    /// How often each member had left tips when its own were counted.
    left: Vec<u64>,
    /// Times that it was begun anew.
    tries: u32,
}

impl Holdings {
    /// Of a program, in prefix order: its children's too, or only those blocks that no other holds, if so asked.
    #[must_use]
    pub fn of_program(name: &HolderName, (descendants, exclusive): (bool, bool)) -> Self {
        let wish = if exclusive { Wish::Exclusive } else { Wish::Held };
        Self::of(wish, vec![name.clone()], descendants)
    }

    /// Of a session's latest context: blocks that overlap tokens `start` to `end` (to its end when that is zero), in prefix
    /// order.
    #[must_use]
    pub fn of_session(name: &HolderName, (start, end): (u32, u32)) -> Self {
        Self::of(Wish::Context(start, end), vec![name.clone()], false)
    }

    /// Of programs, to know of blocks whether these hold them: see [`Core::list`].
    #[must_use]
    pub fn of_programs(names: Vec<HolderName>) -> Self {
        Self::of(Wish::Places, names, false)
    }

    fn of(wish: Wish, names: Vec<HolderName>, descendants: bool) -> Self {
        let (stage, members) =
            if descendants { (Stage::Family(Kin::of(names)), Vec::new()) } else { (begin(wish), names) };
        Self {
            wish,
            stage,
            members,
            tips: Vec::new(),
            path: Vec::new(),
            above: None,
            visited: FxHashSet::default(),
            seen: FxHashSet::default(),
            keys: Vec::new(),
            unknown: false,
        }
    }

    /// The blocks, once all are gathered. `None` when a block's length in tokens is not known and was needed: no engine was
    /// attached with its layout.
    #[must_use]
    pub fn keys(self) -> Option<Vec<BlockKey>> {
        (!self.unknown).then_some(self.keys)
    }

    /// Whether a shard is among those gathered.
    pub(super) fn has(&self, place: &Place) -> bool {
        self.visited.contains(place)
    }

    fn is_full(&self) -> bool {
        self.keys.len() >= MAX_KEYS_PER_CALL
    }
}

fn begin(wish: Wish) -> Stage {
    match wish {
        Wish::Exclusive => Stage::Count(Count::default()),
        _ => Stage::List(0, Counting::default()),
    }
}

impl Core {
    /// The programs or sessions of a name: of one tenant, or of all.
    #[must_use]
    pub fn holders_named(&self, kind: HolderKind, id: &str, tenant: Option<&TenantId>) -> Vec<HolderName> {
        let named = self.catalog.holders.named(kind, id);
        named.filter(|h| tenant.is_none_or(|t| h.name.tenant == *t)).map(|h| h.name.clone()).collect()
    }

    /// All that [`Holdings::of_program`] comes to.
    #[cfg(test)]
    pub(crate) fn program_blocks(&self, name: &HolderName, which: (bool, bool)) -> Vec<BlockKey> {
        let mut holdings = Holdings::of_program(name, which);
        while self.gather(&mut holdings) {}
        holdings.keys().unwrap_or_default()
    }

    /// All that [`Holdings::of_session`] comes to.
    #[cfg(test)]
    pub(crate) fn session_blocks(&self, name: &HolderName, tokens: (u32, u32)) -> Option<Vec<BlockKey>> {
        let mut holdings = Holdings::of_session(name, tokens);
        while self.gather(&mut holdings) {}
        holdings.keys()
    }

    /// Gathers some more. Answers whether something is left.
    pub fn gather(&self, holdings: &mut Holdings) -> bool {
        let left = &mut { HOLDER_STEP };
        holdings.stage = match std::mem::replace(&mut holdings.stage, Stage::Done) {
            Stage::Family(mut kin) => {
                if self.catalog.holders.kin_some(&mut kin, left) {
                    Stage::Family(kin)
                } else {
                    holdings.members = kin.into_members();
                    begin(holdings.wish)
                }
            }
            Stage::Count(count) => self.count_holdings(&holdings.members, count, left),
            Stage::Verify(from, count) => self.verify_count(&holdings.members, (from, count), left),
            Stage::List(member, counting) => match self.list_holdings(holdings, member, &counting, left) {
                Some(member) => Stage::List(member, counting),
                None => Stage::Done,
            },
            Stage::Done => Stage::Done,
        };
        !matches!(holdings.stage, Stage::Done)
    }

    fn count_holdings(&self, members: &[HolderName], mut count: Count, left: &mut usize) -> Stage {
        while let Some(name) = members.get(count.left.len()) {
            if *left == 0 {
                return Stage::Count(count);
            }
            let holder = self.catalog.holders.find(name).map(|id| self.catalog.holders.get(id));
            count.left.push(holder.map_or(0, |holder| holder.left));
            if let Some(holder) = holder {
                *left = left.saturating_sub(1 + holder.tips.len());
                self.catalog.count_tips(&mut count.counting, holder);
            }
        }
        if *left == 0 || self.catalog.count_some(&mut count.counting, left) {
            return Stage::Count(count);
        }
        Stage::Verify(0, count)
    }

    /// Tips that were left meanwhile may have been counted in the place of somebody else's.
    fn verify_count(&self, members: &[HolderName], (from, count): (usize, Count), left: &mut usize) -> Stage {
        for (at, (name, before)) in members.iter().zip(&count.left).enumerate().skip(from) {
            if *left == 0 {
                return Stage::Verify(at, count);
            }
            *left -= 1;
            let now = self.catalog.holders.find(name).map_or(0, |id| self.catalog.holders.get(id).left);
            if now == *before {
                continue;
            }
            let tries = count.tries + 1;
            return if tries < MAX_COUNTS { Stage::Count(Count { tries, ..Count::default() }) } else { Stage::Done };
        }
        Stage::List(0, count.counting)
    }

    /// Answers with the member that is next.
    fn list_holdings(
        &self,
        holdings: &mut Holdings,
        mut member: usize,
        counting: &Counting,
        left: &mut usize,
    ) -> Option<usize> {
        while *left > 0 {
            *left -= 1;
            if holdings.is_full() {
                return None;
            }
            if let Some(spot) = holdings.above.take() {
                self.climb(holdings, spot, counting);
            } else if let Some((place, wanted)) = holdings.path.pop() {
                if wanted && holdings.seen.insert(place.key) {
                    holdings.keys.push(place.key);
                }
            } else if let Some(tip) = holdings.tips.pop() {
                // Shards of one block have the same path above them.
                let is_known = matches!(holdings.wish, Wish::Context(..)) && holdings.seen.contains(&tip.place.key);
                holdings.above = (!is_known).then_some(tip);
            } else {
                let name = holdings.members.get(member)?;
                member += 1;
                holdings.tips = self.tips_of(name, holdings.wish);
                *left = left.saturating_sub(holdings.tips.len());
            }
        }
        Some(member)
    }

    /// The tips whose paths are gathered, last first.
    fn tips_of(&self, name: &HolderName, wish: Wish) -> Vec<Spot> {
        let Some(id) = self.catalog.holders.find(name) else { return Vec::new() };
        let holder = self.catalog.holders.get(id);
        let faded = |id: &&BlockId| self.catalog.get(**id).flags.has(Flags::FADED);
        let ids: Vec<BlockId> = match wish {
            Wish::Held | Wish::Exclusive => {
                holder.tips.keys().chain(holder.former.iter().filter(faded)).copied().collect()
            }
            Wish::Places => holder.tips.keys().copied().collect(),
            Wish::Context(..) => holder.context.iter().copied().collect(),
        };
        ids.into_iter().rev().map(|id| self.catalog.spot(id)).collect()
    }

    /// Looks at a block, and says which is next on the way up: none where the rest is known, or the block is gone.
    fn climb(&self, holdings: &mut Holdings, spot: Spot, counting: &Counting) {
        let Some(id) = self.catalog.at(&spot) else { return };
        if !holdings.visited.insert(spot.place) {
            return;
        }
        let entry = self.catalog.get(id);
        let wanted = match holdings.wish {
            Wish::Held => true,
            Wish::Exclusive => counting.owns(&spot.place, entry),
            Wish::Places => false,
            Wish::Context(start, end) => {
                let inside = self.is_inside(entry, (start, end));
                holdings.unknown |= inside.is_none();
                inside.unwrap_or(false)
            }
        };
        // Where a block lies is all that is asked for: nothing is to be put in order.
        if !matches!(holdings.wish, Wish::Places) {
            holdings.path.push((spot.place, wanted));
        }
        holdings.above = entry.parent.map(|parent| self.catalog.spot(parent));
    }

    fn is_inside(&self, entry: &Entry, (start, end): (u32, u32)) -> Option<bool> {
        if start == 0 && end == 0 {
            return Some(true);
        }
        let tokens = self.catalog.block_tokens(entry.layout, entry.group)?;
        let first = entry.depth_blocks.saturating_mul(tokens);
        Some(first.saturating_add(tokens) > start && (end == 0 || first < end))
    }

    /// About how many bytes the latest context of a program or session has.
    #[must_use]
    pub fn context_bytes(&self, name: &HolderName) -> u64 {
        let Some(id) = self.catalog.holders.find(name) else { return 0 };
        let tips = self.catalog.holders.get(id).context.iter().map(|tip| self.catalog.get(*tip));
        tips.map(|tip| u64::from(tip.bytes) * (u64::from(tip.depth_blocks) + 1)).sum()
    }

    /// The number of the last event.
    #[must_use]
    pub const fn last_event(&self) -> u64 {
        self.catalog.events.last()
    }

    /// Events after a sequence, turns only if asked for, in pages, and the number of the last of them that is lost, if any is.
    #[must_use]
    pub fn events_after(&self, sequence: u64, with_turns: bool) -> (Vec<Event>, Option<u64>) {
        self.catalog.events.after(sequence, with_turns)
    }
}
