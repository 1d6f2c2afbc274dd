//! Keeps dead records from coming back with the tiers that a start finds.
//!
//! *Invariants*: neither what a verb evicted nor what was written before the journal was lost or damaged reaches the
//! core, in this start or a later one, whichever tiers are away in between. What the journal says of records is dropped
//! only in a start that read every tier that may hold them.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context;
use kvtier_policy::Core;
use kvtier_storage::StorageError;
use kvtier_storage::journal::{Entry, Journal, JournalState};
use kvtier_types::{BlockKey, Location, RecordMeta, ShardKey, Tier};

use crate::marks;
use crate::node::Stores;
use crate::programs::Former;

/// Keys evicted by verb, with the last sequence each eviction covers.
type Tombstones = BTreeMap<ShardKey, u64>;

/// A record that a tier had at the start.
pub(super) type Record = (RecordMeta, Location);

/// What is dead of the records found, and what is still said of the others.
#[derive(Debug)]
pub(super) struct Sieve {
    tombstones: Tombstones,
    /// Tombstones that still have a record to keep away.
    kept: Tombstones,
    /// Records of at most this sequence are dead: nothing says any more which of them were evicted.
    wiped_up_to: u64,
    /// What became of the journal before this start: then all that this start finds is dead.
    lost: Option<&'static str>,
    /// Tiers that may hold records which are not dead.
    tiers: BTreeSet<Tier>,
    /// Blocks that verbs evicted of which a record lies in packs, with the last sequence that an eviction covers, and the
    /// lowest sequence of a living record there.
    evicted_in_packs: BTreeMap<BlockKey, u64>,
    living_in_packs: BTreeMap<BlockKey, u64>,
    /// Blocks that verbs had marked, and those of which a record was found.
    marked: BTreeSet<BlockKey>,
    found: marks::Marked,
    /// Who held what, and what was abandoned.
    pub(super) former: Former,
}

impl Sieve {
    /// Of what the journal said. Takes what it keeps.
    pub(super) fn of(state: &mut JournalState, former: Former) -> Self {
        let (marked, found) = marks::Marked::new(state.marks.keys().copied());
        let lost = if state.damaged {
            Some("the journal was damaged")
        } else {
            state.created.then_some("there was no journal")
        };
        Self {
            tombstones: std::mem::take(&mut state.evicted),
            kept: Tombstones::new(),
            wiped_up_to: state.wiped_up_to,
            lost,
            tiers: std::mem::take(&mut state.tiers),
            evicted_in_packs: BTreeMap::new(),
            living_in_packs: BTreeMap::new(),
            marked,
            found,
            former,
        }
    }

    /// To be called before a tier takes records: has the journal know that it may hold some.
    pub(super) fn uses(&mut self, tier: Tier, journal: &Journal) -> anyhow::Result<()> {
        if self.tiers.insert(tier) {
            journal.append(&[Entry::TierUsed(tier)]).context("cannot write the journal")?;
        }
        Ok(())
    }

    /// To be called before a tier's records are fed. What the journal is to say first, where the clock was behind when it
    /// was lost, so that records of before are above what it says already.
    pub(super) fn wipe_found(&mut self, next_sequence: u64) -> Option<Entry> {
        let up_to_sequence = next_sequence.saturating_sub(1);
        if self.lost.is_none() || up_to_sequence <= self.wiped_up_to {
            return None;
        }
        self.wiped_up_to = up_to_sequence;
        Some(Entry::Wiped { up_to_sequence })
    }

    /// Feeds a tier's records, which are [`in_order`], to the core, but for those that are dead. Answers how many of
    /// these are older than the journal.
    pub(super) fn feed(
        &mut self,
        core: &mut Core,
        stores: &Stores,
        tier: Tier,
        records: impl IntoIterator<Item = Record>,
    ) -> usize {
        let mut wiped = 0;
        for (meta, at) in records {
            if meta.sequence <= self.wiped_up_to {
                wiped += 1;
                stores.forget(tier, at, meta.bytes);
                continue;
            }
            if self.marked.contains(&meta.key.block) {
                self.found.found(&meta);
            }
            let evicted = self.tombstones.get(&meta.key).copied().filter(|up_to| meta.sequence <= *up_to);
            if let Some(up_to) = evicted {
                self.kept.insert(meta.key, up_to);
                if tier == Tier::Object {
                    let highest = self.evicted_in_packs.entry(meta.key.block).or_default();
                    *highest = (*highest).max(up_to);
                }
                stores.forget(tier, at, meta.bytes);
            } else {
                if tier == Tier::Object {
                    let lowest = self.living_in_packs.entry(meta.key.block).or_insert(u64::MAX);
                    *lowest = (*lowest).min(meta.sequence);
                }
                core.recover(tier, &meta, at);
            }
        }
        wiped
    }

    /// What other nodes are to know too: blocks that verbs evicted, with the last sequence that an eviction covers. Not those
    /// of which another layout's record lives that this would cover.
    pub(super) fn evicted_in_packs(&self) -> impl Iterator<Item = (BlockKey, u64)> {
        let living = |block: &BlockKey| self.living_in_packs.get(block).copied();
        let evicted =
            self.evicted_in_packs.iter().filter(move |(block, up_to)| living(block).is_none_or(|at| at > **up_to));
        evicted.map(|(block, up_to)| (*block, *up_to))
    }

    /// Whether this start is the first after the loss.
    pub(super) const fn is_first(&self) -> bool {
        self.lost.is_some()
    }

    /// What to tell of a tier's records that are older than the journal, if there were some.
    pub(super) fn tell(&self, tier: Tier, wiped: usize) -> Option<String> {
        let why = self.lost.unwrap_or("the journal was lost or damaged at an earlier start");
        let what =
            || format!("{tier} tier: {why}: {wiped} records of before are dropped, evicted ones may be among them");
        (wiped > 0).then(what)
    }

    /// Drops what the journal says of records that are no more, unless a tier is away that may bring one back. What was
    /// said later stays. To be called once every tier that is not away was fed.
    pub(super) fn compact(&self, journal: &Journal, stores: &Stores) -> Result<(), StorageError> {
        if self.tiers.iter().any(|tier| stores.get(*tier).is_none()) {
            return Ok(());
        }
        self.former.compact(journal);
        let idle = |key: &ShardKey, up_to| self.tombstones.get(key) == Some(&up_to) && !self.kept.contains_key(key);
        journal.retain_evicted(|key, up_to| !idle(key, up_to))?;
        self.found.compact(&self.marked, journal)
    }
}

/// Parents before their children, and of one key the oldest first.
pub(super) fn in_order(mut records: Vec<Record>) -> Vec<Record> {
    records.sort_unstable_by_key(|(meta, at)| (meta.depth_blocks, meta.sequence, *at));
    records
}
