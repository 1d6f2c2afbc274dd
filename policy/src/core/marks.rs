//! Types and taints: given with a block, changed by verb, kept wherever the block goes.
//!
//! A change by verb is a [`Mark`] in the journal, keyed by block: it overrules what records written before it say, at
//! recovery and when the block comes back from another node's pack.

use std::ops::Bound;

use kvtier_types::{BlockKey, Effect, Instant, Outcome, SemanticType, Taint, Toleration};

use super::Core;
use crate::catalog::BlockId;
use crate::entry::{Entry, Flags, NEVER};
use crate::limits::MAX_MARKS;

/// What a block means and is marked with, from some moment on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mark {
    /// Its type.
    pub semantic: SemanticType,
    /// Its taints.
    pub taints: Vec<Taint>,
    /// When it is gone, in milliseconds since the Unix epoch.
    pub expires_ms: Option<u64>,
    /// Records of at most that sequence say something older.
    pub up_to_sequence: u64,
}

/// Taints that go: those of that key, and value and effect where given.
pub type TaintPattern = Toleration;

/// A change of blocks' types and taints.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MarkChange {
    /// What is not here is marked too, for when it comes: who says it answers for every tenant's blocks.
    pub absent: bool,
    /// Taints that come; one of the same key, value and effect takes the other's place.
    pub add: Vec<Taint>,
    /// Taints that go.
    pub remove: Vec<TaintPattern>,
    /// The new type.
    pub semantic: Option<SemanticType>,
}

/// Marks of one step of a sweep.
const SWEEP_STEP: usize = 256;
const TOO_MANY: &str = "it would have more than 8 taints: remove some first";

/// What a change did.
#[derive(Debug, Clone, Default)]
pub struct MarkPlan {
    /// One outcome a key.
    pub outcomes: Vec<(Outcome, &'static str)>,
    /// To be journaled before the change is acknowledged.
    pub journal: Vec<(BlockKey, Mark)>,
}

/// Room for so many more marks: of blocks that are not here, what was said longest ago is forgotten first.
#[derive(Debug)]
pub struct MarkSweep {
    more: usize,
    seen: Option<BlockKey>,
    absent: Vec<(u64, BlockKey)>,
    going: Option<Vec<BlockKey>>,
    forgot: bool,
}

impl MarkSweep {
    /// For so many more.
    #[must_use]
    pub const fn new(more: usize) -> Self {
        Self { more, seen: None, absent: Vec::new(), going: None, forgot: false }
    }

    /// Whether something was forgotten: the journal is to have it no more either.
    #[must_use]
    pub const fn forgot(&self) -> bool {
        self.forgot
    }
}

/// The `most` of which something was said longest ago.
fn oldest(mut absent: Vec<(u64, BlockKey)>, most: usize) -> Vec<BlockKey> {
    if absent.len() > most {
        absent.select_nth_unstable(most);
        absent.truncate(most);
    }
    absent.into_iter().map(|(_, key)| key).collect()
}

impl MarkChange {
    fn apply(&self, taints: &[Taint]) -> Vec<Taint> {
        let gone = |t: &&Taint| !self.remove.iter().any(|pattern| pattern.tolerates(t));
        let replaced = |t: &&Taint| !self.add.iter().any(|new| same_mark(new, t));
        let mut out: Vec<Taint> = taints.iter().filter(gone).filter(replaced).cloned().collect();
        out.extend(self.add.iter().cloned());
        out.sort_unstable();
        out.dedup();
        out
    }
}

/// The taints of either: where they are too many, those stay that keep a block from readers.
pub(super) fn union(a: &[Taint], b: &[Taint]) -> Vec<Taint> {
    let mut all: Vec<Taint> = a.iter().chain(b).cloned().collect();
    all.sort_unstable();
    all.dedup();
    if all.len() > Taint::MAX_PER_BLOCK {
        all.sort_by_key(|t| t.effect != Effect::NoServe);
        all.truncate(Taint::MAX_PER_BLOCK);
        all.sort_unstable();
    }
    all
}

/// Whether two taints differ in their span at most.
fn same_mark(a: &Taint, b: &Taint) -> bool {
    (&a.key, &a.value, a.effect.index()) == (&b.key, &b.value, b.effect.index())
}

fn span(taints: &[Taint]) -> Option<std::time::Duration> {
    let spans = taints.iter().filter_map(|t| if let Effect::Ephemeral(span) = t.effect { Some(span) } else { None });
    spans.min()
}

impl Core {
    /// Changes types and taints of blocks. At most [`crate::limits::MAX_TOUCHES_PER_CALL`] keys a call, please. The caller
    /// journals what comes back before it acknowledges.
    pub fn mark(&mut self, now: Instant, keys: &[BlockKey], change: &MarkChange) -> MarkPlan {
        self.tell_time(now);
        let mut plan = MarkPlan::default();
        for key in keys {
            let (outcome, reason) = self.mark_one(key, change, &mut plan.journal);
            plan.outcomes.push((outcome, reason));
        }
        plan
    }

    fn mark_one(
        &mut self,
        key: &BlockKey,
        change: &MarkChange,
        journal: &mut Vec<(BlockKey, Mark)>,
    ) -> (Outcome, &'static str) {
        if self.marks.len() >= MAX_MARKS && !self.marks.contains_key(key) {
            return (Outcome::Rejected, "too many blocks are marked by verb: untaint some, or evict them");
        }
        let ids = self.markable(key);
        let Some(&first) = ids.first() else { return self.mark_absent(key, change, journal) };
        let mut former: Vec<Taint> = ids.iter().flat_map(|id| self.taints(self.catalog.get(*id)).to_vec()).collect();
        former.sort_unstable();
        former.dedup();
        let taints = change.apply(&former);
        if taints.len() > Taint::MAX_PER_BLOCK {
            return (Outcome::Rejected, TOO_MANY);
        }
        let semantic = change.semantic.unwrap_or_else(|| self.catalog.get(first).semantic);
        let same = |id: &BlockId| {
            let entry = self.catalog.get(*id);
            entry.semantic == semantic && self.taints(entry) == taints
        };
        if ids.iter().all(same) && span(&change.add).is_none() {
            return (Outcome::Duplicate, "");
        }
        let clipped = self.counts.clipped_keeps;
        for id in &ids {
            self.mark_entry(*id, semantic, &taints, change);
        }
        journal
            .extend(ids.iter().find(|id| self.catalog.try_get(**id).is_some()).map(|id| (*key, self.note_mark(*id))));
        if self.counts.clipped_keeps > clipped {
            return (
                Outcome::Clipped,
                "marked, but the tier's share for copies that stay is full: it may go to make room",
            );
        }
        (Outcome::Applied, "")
    }

    /// Marks a block of which nothing is here, for callers that may: it has no tenant that could be asked.
    fn mark_absent(
        &mut self,
        key: &BlockKey,
        change: &MarkChange,
        journal: &mut Vec<(BlockKey, Mark)>,
    ) -> (Outcome, &'static str) {
        let known = self.marks.get(key).cloned();
        if !change.absent || (known.is_none() && change.add.is_empty()) {
            return (Outcome::Missing, "nothing of it is here");
        }
        let mut mark = known.clone().unwrap_or_default();
        mark.taints = change.apply(&mark.taints);
        if mark.taints.len() > Taint::MAX_PER_BLOCK {
            return (Outcome::Rejected, TOO_MANY);
        }
        mark.semantic = change.semantic.unwrap_or(mark.semantic);
        let ends = span(&change.add).map(|span| self.unix_ms(self.clock + span));
        mark.expires_ms = mark.expires_ms.filter(|_| span(&mark.taints).is_some()).into_iter().chain(ends).min();
        mark.up_to_sequence = self.next_sequence - 1;
        if known.as_ref() == Some(&mark) {
            return (Outcome::Duplicate, "");
        }
        self.marks.insert(*key, mark.clone());
        journal.push((*key, mark));
        (Outcome::Deferred, "nothing of it is here: it is marked once it comes")
    }

    fn mark_entry(&mut self, id: BlockId, semantic: SemanticType, taints: &[Taint], change: &MarkChange) {
        let kept = self.catalog.ephemeral.remove(&id).filter(|_| span(taints).is_some());
        let new = span(&change.add).map(|span| self.clock + span);
        // Of a span that was there before and one that comes, the earlier end counts; one that is renewed begins anew.
        let retained = self.taints(self.catalog.get(id)).iter().any(|t| {
            matches!(t.effect, Effect::Ephemeral(_))
                && taints.contains(t)
                && !change.add.iter().any(|a| same_mark(a, t))
        });
        let hard = kept.filter(|_| retained).into_iter().chain(new).min();
        if let Some(at) = hard {
            self.catalog.ephemeral.insert(id, at);
        }
        self.set_taints(id, taints);
        self.catalog.update(id, |e| {
            e.semantic = semantic;
            // Worked out anew.
            e.expires = NEVER;
        });
        if !self.catalog.get(id).flags.has(Flags::RESERVED) {
            self.relive(id, None);
        }
    }

    /// Remembers what an entry is marked with now.
    pub(super) fn note_mark(&mut self, id: BlockId) -> Mark {
        let entry = self.catalog.get(id);
        let mark = Mark {
            semantic: entry.semantic,
            taints: self.taints(entry).to_vec(),
            expires_ms: self.expires_ms(entry),
            up_to_sequence: self.next_sequence - 1,
        };
        let key = entry.key;
        if self.marks.len() < MAX_MARKS || self.marks.contains_key(&key) {
            self.marks.insert(key, mark.clone());
        }
        mark
    }

    /// Takes in a mark that the journal kept. To be called before records are recovered.
    pub fn remember_mark(&mut self, key: BlockKey, mark: Mark) {
        self.marks.insert(key, mark);
    }

    /// Goes on to make room for marks. Answers whether something is left to do.
    pub fn sweep_marks(&mut self, sweep: &mut MarkSweep) -> bool {
        match &mut sweep.going {
            None if self.marks.len() + sweep.more <= MAX_MARKS => false,
            None => {
                let from = sweep.seen.map_or(Bound::Unbounded, Bound::Excluded);
                let page: Vec<_> = self.marks.range((from, Bound::Unbounded)).take(SWEEP_STEP).collect();
                let absent = page.iter().filter(|(key, _)| self.catalog.find_all(key).is_empty());
                sweep.absent.extend(absent.map(|(key, mark)| (mark.up_to_sequence, **key)));
                sweep.seen = page.last().map(|(key, _)| **key);
                if page.len() < SWEEP_STEP {
                    // An eighth more, so that the next sweep is not soon.
                    let over = (self.marks.len() + sweep.more).saturating_sub(MAX_MARKS) + MAX_MARKS / 8;
                    sweep.going = Some(oldest(std::mem::take(&mut sweep.absent), over));
                }
                true
            }
            Some(going) => {
                for _ in 0..SWEEP_STEP {
                    let Some(key) = going.pop() else { return false };
                    if self.catalog.find_all(&key).is_empty() {
                        sweep.forgot |= self.marks.remove(&key).is_some();
                    }
                }
                true
            }
        }
    }

    /// Whether something that was said of a block by verb is remembered.
    #[must_use]
    pub fn has_mark(&self, key: &BlockKey) -> bool {
        self.marks.contains_key(key)
    }

    /// Blocks whose marks an engine changed and that wait to be journaled.
    #[must_use]
    pub fn marks_waiting(&self) -> usize {
        self.remarked.len()
    }

    /// Blocks of which something that was said by verb is remembered.
    #[must_use]
    pub fn marks(&self) -> usize {
        self.marks.len()
    }

    /// What was said of a block by verb holds when it is written anew too, unless its time was over. Answers with all that
    /// it is marked with then.
    pub(super) fn marked_anew(&mut self, key: &BlockKey, semantic: SemanticType, taints: u32) -> (SemanticType, u32) {
        let over = |at: u64| self.instant_of(at) <= self.clock;
        let is_over = self.marks.get(key).is_some_and(|mark| mark.expires_ms.is_some_and(over));
        let Some(mark) = self.marks.get_mut(key) else { return (semantic, taints) };
        if is_over {
            // A new block has a new life; what else was said of it holds until it is taken back.
            mark.expires_ms = None;
            mark.taints.retain(|taint| !matches!(taint.effect, Effect::Ephemeral(_)));
        }
        let mark = &*mark;
        let semantic = semantic.more_durable(mark.semantic);
        let all = union(self.catalog.taints.get(taints), &mark.taints);
        let number = self.catalog.taints.acquire(&all);
        self.catalog.taints.release(taints);
        (semantic, number)
    }

    /// Marks of blocks whose type or taints an engine changed, to be journaled soon: nobody waits for it.
    pub fn poll_marks(&mut self) -> Vec<(BlockKey, Mark)> {
        let keys = std::mem::take(&mut self.remarked);
        let of = |core: &mut Self, key: &BlockKey| core.markable(key).first().map(|id| (*key, core.note_mark(*id)));
        keys.iter().filter_map(|key| of(self, key)).collect()
    }

    /// An engine changed what a sealed block is marked with.
    pub(super) fn remarked(&mut self, id: BlockId) {
        let key = self.catalog.get(id).key;
        if self.remarked.len() < crate::limits::MAX_TOUCHES_PER_CALL {
            self.remarked.insert(key);
        }
    }

    /// Entries of a block that can be marked.
    fn markable(&self, key: &BlockKey) -> Vec<BlockId> {
        let mut ids = self.catalog.find_all(key);
        ids.retain(|id| {
            let entry = self.catalog.get(*id);
            entry.visible() || entry.flags.has(Flags::RESERVED)
        });
        ids
    }

    /// Gives an entry other taints; what follows from them is for [`Self::relive`].
    pub(super) fn set_taints(&mut self, id: BlockId, taints: &[Taint]) {
        let number = self.catalog.taints.acquire(&taints.to_vec());
        let former = self.catalog.get(id).taints;
        self.catalog.update(id, |e| e.taints = number);
        self.catalog.taints.release(former);
    }

    /// The taints of an entry with those of others that keep it from readers or places; `None` where it has all of those.
    pub(super) fn confined_by(&self, id: BlockId, others: u32) -> Option<Vec<Taint>> {
        if others == 0 {
            return None;
        }
        let confines = |t: &&Taint| matches!(t.effect, Effect::NoServe | Effect::NoOffload | Effect::NoReplicate);
        let own = self.taints(self.catalog.get(id));
        let said: Vec<Taint> = self.catalog.taints.get(others).iter().filter(confines).cloned().collect();
        let all = union(own, &said);
        (all != own).then_some(all)
    }

    /// Whether a reader that tolerates this much may not have it.
    #[inline]
    pub(super) fn denies(&self, entry: &Entry, tolerations: &[Toleration]) -> bool {
        entry.taints != 0 && self.taints_deny(entry, tolerations)
    }

    #[cold]
    fn taints_deny(&self, entry: &Entry, tolerations: &[Toleration]) -> bool {
        let refuses = |t: &Taint| t.effect == Effect::NoServe && !tolerations.iter().any(|known| known.tolerates(t));
        self.taints(entry).iter().any(refuses)
    }

    /// Whether a reader that tolerates this much may have it: it is here or elsewhere, its time is not over, and no taint
    /// forbids it.
    pub(super) fn may_have(&self, entry: &Entry, tolerations: &[Toleration]) -> bool {
        entry.offered() && entry.expires > self.clock && !self.denies(entry, tolerations)
    }

    /// Whether no taint of a block forbids copies on other nodes, those in the object store included.
    #[must_use]
    pub fn may_replicate(&self, key: &BlockKey) -> bool {
        self.catalog.find_all(key).into_iter().all(|id| self.may_leave(self.catalog.get(id)))
    }

    pub(super) fn may_leave(&self, entry: &Entry) -> bool {
        entry.taints == 0 || !self.taints(entry).iter().any(|t| t.effect == Effect::NoReplicate)
    }
}
