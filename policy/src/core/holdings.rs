//! Who holds what, as it is told: programs and sessions, their blocks and contexts.

use std::time::Duration;

use kvtier_types::{BlockKey, Instant, TenantId};
use rustc_hash::{FxHashMap, FxHashSet};

use super::{Core, HolderRecord, ProgramCounts};
use crate::catalog::BlockId;
use crate::entry::Flags;
use crate::events::Event;
use crate::holders::{Holder, HolderKind, HolderName, HolderState};
use crate::limits::{MAX_KEYS_PER_CALL, MAX_TOUCHES_PER_CALL};

/// Programs answered by one page of a listing.
pub const MAX_PROGRAMS_PAGE: usize = 256;

/// A program or session as it is.
#[derive(Debug, Clone)]
pub struct ProgramView {
    /// Its name.
    pub name: HolderName,
    /// Who started it.
    pub parent: Option<HolderName>,
    /// What it does.
    pub state: HolderState,
    /// How long it has been silent.
    pub idle: Duration,
    /// Block shards that it holds here.
    pub blocks: u64,
    /// Those that nobody else does.
    pub exclusive: u64,
}

/// What a program is to whoever schedules it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProgramTurn {
    /// Its name.
    pub name: HolderName,
    /// What engines took for it so far, as far as this node sees it.
    pub attained: Duration,
    /// Since when it said that it is about to call, and did not.
    pub waits: Option<Instant>,
    /// When it said that it is back from a tool.
    pub returns: Option<Instant>,
    /// Whether it ended.
    pub ended: bool,
}

impl Core {
    /// What a program is to whoever schedules it.
    #[must_use]
    pub fn program_turn(&self, name: &HolderName) -> Option<ProgramTurn> {
        self.catalog.holders.find(name).map(|id| turn(self.catalog.holders.get(id)))
    }

    /// Programs that said they are about to call, or when, after a name: of one tenant, or of all. Looks at
    /// [`MAX_TOUCHES_PER_CALL`] programs at most, and says after which to go on if there are more.
    #[must_use]
    pub fn programs_due(
        &self,
        after: Option<&HolderName>,
        tenant: Option<&TenantId>,
    ) -> (Vec<ProgramTurn>, Option<HolderName>) {
        let (mut due, mut last) = (Vec::new(), None);
        for (count, holder) in self.catalog.holders.after(after).enumerate() {
            // Sessions come after all programs.
            if holder.name.kind == HolderKind::Session {
                return (due, None);
            }
            if count == MAX_TOUCHES_PER_CALL {
                return (due, last);
            }
            last = Some(holder.name.clone());
            if tenant.is_none_or(|t| *t == holder.name.tenant) {
                due.extend(
                    Some(turn(holder)).filter(|turn| (turn.waits.is_some() || turn.returns.is_some()) && !turn.ended),
                );
            }
        }
        (due, None)
    }

    /// The programs or sessions of a name: of one tenant, or of all.
    #[must_use]
    pub fn holders_named(&self, kind: HolderKind, id: &str, tenant: Option<&TenantId>) -> Vec<HolderName> {
        let named = self.catalog.holders.named(kind, id);
        named.filter(|h| tenant.is_none_or(|t| h.name.tenant == *t)).map(|h| h.name.clone()).collect()
    }

    /// Blocks that a program holds, in prefix order: its children's too, or only those that no other holds, if so asked.
    #[must_use]
    pub fn program_blocks(&self, name: &HolderName, (descendants, exclusive): (bool, bool)) -> Vec<BlockKey> {
        let Some(id) = self.catalog.holders.find(name) else { return Vec::new() };
        let family = if descendants { self.catalog.holders.family(id) } else { vec![id] };
        let holders: Vec<&Holder> = family.iter().map(|id| self.catalog.holders.get(*id)).collect();
        let counts = self.catalog.counts_of(&holders);
        let mut seen = FxHashSet::default();
        let mut keys = Vec::new();
        let tips = holders.iter().flat_map(|h| h.tips.keys().chain(&h.former));
        for id in tips.flat_map(|tip| self.catalog.path_to(*tip)) {
            let entry = self.catalog.get(id);
            let own = counts.get(&id).copied().unwrap_or(0) == entry.held && !entry.flags.has(Flags::COMMON);
            if keys.len() < MAX_KEYS_PER_CALL && (own || !exclusive) && seen.insert(entry.key) {
                keys.push(entry.key);
            }
        }
        keys
    }

    /// Blocks of a session's latest context that overlap tokens `start` to `end` (to its end when that is zero), in prefix
    /// order. `None` when a block's length in tokens is not known: no engine was attached with its layout.
    #[must_use]
    pub fn session_blocks(&self, name: &HolderName, (start, end): (u32, u32)) -> Option<Vec<BlockKey>> {
        let Some(id) = self.catalog.holders.find(name) else { return Some(Vec::new()) };
        let whole = start == 0 && end == 0;
        let mut seen = FxHashSet::default();
        let mut keys = Vec::new();
        for tip in &self.catalog.holders.get(id).context {
            // Shards of one block have the same path above them.
            if seen.contains(&self.catalog.get(*tip).key) {
                continue;
            }
            for id in self.catalog.path_to(*tip) {
                let entry = self.catalog.get(id);
                let inside = whole || {
                    let tokens = self.catalog.block_tokens(entry.layout, entry.group)?;
                    let first = entry.depth_blocks.saturating_mul(tokens);
                    first.saturating_add(tokens) > start && (end == 0 || first < end)
                };
                if inside && keys.len() < MAX_KEYS_PER_CALL && seen.insert(entry.key) {
                    keys.push(entry.key);
                }
            }
        }
        Some(keys)
    }

    /// Prefixes that many calls share, by the key of their last block, the most used first, with uses per second.
    #[must_use]
    pub fn hottest(&self, now: Instant, most: usize) -> Vec<(BlockKey, f64)> {
        self.hot.hottest(now).take(most).collect()
    }

    /// The block before this one in the prefix, and the bytes of this one's shards. `None` where nothing of it is here, or it may
    /// not go to other nodes.
    #[must_use]
    pub fn step_up(&self, key: &BlockKey) -> Option<(Option<BlockKey>, u64)> {
        let shards = self.catalog.find_all(key);
        let entry = self.catalog.get(*shards.first()?);
        if !shards.iter().all(|id| self.may_leave(self.catalog.get(*id))) {
            return None;
        }
        let bytes = shards.iter().map(|id| u64::from(self.catalog.get(*id).bytes)).sum();
        Some((entry.parent.map(|parent| self.catalog.get(parent).key), bytes))
    }

    /// About how many bytes the latest context of a program or session has.
    #[must_use]
    pub fn context_bytes(&self, name: &HolderName) -> u64 {
        let Some(id) = self.catalog.holders.find(name) else { return 0 };
        let tips = self.catalog.holders.get(id).context.iter().map(|tip| self.catalog.get(*tip));
        tips.map(|tip| u64::from(tip.bytes) * (u64::from(tip.depth_blocks) + 1)).sum()
    }

    /// A page of programs and sessions after a name, and whether there are more: of one tenant, or of all.
    #[must_use]
    pub fn programs_after(
        &self,
        now: Instant,
        (after, tenant): (Option<&HolderName>, Option<&TenantId>),
        limit: usize,
    ) -> (Vec<ProgramView>, bool) {
        let all = self.catalog.holders.after(after).filter(|h| tenant.is_none_or(|t| h.name.tenant == *t));
        let mut page: Vec<&Holder> = all.take(limit.clamp(1, MAX_PROGRAMS_PAGE) + 1).collect();
        let more = page.len() > limit.clamp(1, MAX_PROGRAMS_PAGE);
        page.truncate(limit.clamp(1, MAX_PROGRAMS_PAGE));
        (page.into_iter().map(|holder| self.program_view(now, holder)).collect(), more)
    }

    fn program_view(&self, now: Instant, holder: &Holder) -> ProgramView {
        let counts = self.catalog.counts_of(&[holder]);
        let own = |(id, count): &(&BlockId, &u32)| {
            let entry = self.catalog.get(**id);
            entry.held == **count && !entry.flags.has(Flags::COMMON)
        };
        ProgramView {
            name: holder.name.clone(),
            parent: holder.parent.clone(),
            state: holder.state,
            idle: holder.idle(now),
            blocks: counts.len() as u64,
            exclusive: counts.iter().filter(own).count() as u64,
        }
    }

    /// What the programs of a name hold.
    pub(super) fn held_by_program(&self, program: &str) -> FxHashMap<BlockId, u32> {
        let holders: Vec<&Holder> = self.catalog.holders.named(HolderKind::Program, program).collect();
        self.catalog.counts_of(&holders)
    }

    /// What of a program or session outlives a restart, as it is now.
    #[must_use]
    pub fn holder_record(&self, name: &HolderName) -> Option<HolderRecord> {
        self.catalog.holders.find(name).map(|id| self.holder_as_is(id))
    }

    /// The number of the last event.
    #[must_use]
    pub const fn last_event(&self) -> u64 {
        self.catalog.events.last()
    }

    /// Events after a sequence, in pages, and whether some before them are lost.
    #[must_use]
    pub fn events_after(&self, sequence: u64) -> (Vec<Event>, bool) {
        self.catalog.events.after(sequence)
    }

    /// Programs and sessions known, and counts of their signals.
    #[must_use]
    pub fn program_counts(&self) -> (usize, ProgramCounts) {
        (self.catalog.holders.len(), self.program_counts)
    }
}

fn turn(holder: &Holder) -> ProgramTurn {
    let returns = if let HolderState::Waiting { until } = holder.state { until } else { None };
    ProgramTurn {
        name: holder.name.clone(),
        attained: holder.service.attained(),
        waits: holder.service.waits(),
        returns,
        ended: holder.state == HolderState::Ended,
    }
}
