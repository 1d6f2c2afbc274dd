//! Programs and sessions: what their calls hold, and what becomes of it when they say how they go on.
//!
//! What a program's end frees it frees in steps of [`MAX_TOUCHES_PER_CALL`]: the shell calls [`Core::abandon_program`] until nothing
//! is left, and journals each step before it acknowledges the signal.

use std::time::Duration;

use kvtier_types::{Instant, Outcome, RequestHints, ShardKey, TenantId};
use rustc_hash::FxHashSet;

use super::Core;
use crate::catalog::BlockId;
use crate::entry::{Entry, Flags};
use crate::evict::survival::StopReason;
use crate::holders::{HolderId, HolderName, HolderState, Service};
use crate::ledger::MissReason;
use crate::limits::{MAX_CANCELLED, MAX_TOUCHES_PER_CALL};

/// Children named in one signal.
pub const MAX_CHILDREN_PER_SIGNAL: usize = 1024;

/// What a program says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum SignalKind {
    /// It waits for a tool.
    ToolWait,
    /// It goes on.
    Continuation,
    /// It splits into children, which start with its latest context.
    Fork,
    /// Children came together in it: what only they hold is freed.
    Join,
    /// Its context was rewritten: what its next call does not use any more goes first.
    Compaction,
    /// It ended well: what only it and its children hold goes first.
    Completion,
    /// It was abandoned: what only it and its children hold is freed.
    Cancellation,
}

/// A signal.
#[derive(Debug, Clone)]
pub struct Signal {
    /// Who.
    pub program: HolderName,
    /// Who started it, where that is known.
    pub parent: Option<HolderName>,
    /// What.
    pub kind: SignalKind,
    /// Of a fork or a join.
    pub children: Vec<HolderName>,
    /// When it is back, of one that waits for a tool.
    pub returns_in: Option<Duration>,
}

/// What a signal came to, but for what is freed.
#[derive(Debug, Clone)]
pub struct SignalAnswer {
    /// The outcome.
    pub outcome: Outcome,
    /// Why.
    pub reason: &'static str,
    /// Whose blocks are to be freed now, by [`Core::abandon_program`].
    pub abandoned: Vec<HolderName>,
}

/// What a step of freeing came to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Freed {
    /// Shards.
    pub blocks: u64,
    /// Their bytes, each once.
    pub bytes: u64,
    /// To be journaled: these shards, which others wrote, stay dead up to a sequence.
    pub journal: Vec<(ShardKey, u64)>,
    /// To be journaled: what the program wrote up to this sequence comes back only where somebody else holds it.
    pub cancelled: Option<(HolderName, u64)>,
    /// There is more.
    pub more: bool,
}

/// Something that a program did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProgramEvent {
    /// It waits for a tool.
    Waits {
        /// Who.
        name: HolderName,
        /// For so long, it says.
        returns_in: Option<Duration>,
        /// Since when.
        at: Instant,
    },
    /// It called again, or said that it goes on.
    Back {
        /// Who.
        name: HolderName,
        /// When.
        at: Instant,
    },
    /// It split into branches.
    Forked {
        /// Who.
        name: HolderName,
        /// The branches.
        branches: Vec<HolderName>,
        /// When.
        at: Instant,
    },
    /// It made its first call since it forked, or was forked.
    Called {
        /// Who.
        name: HolderName,
        /// When.
        at: Instant,
    },
    /// It ended.
    Ended {
        /// Who.
        name: HolderName,
        /// When.
        at: Instant,
    },
}

/// Events of programs that wait to be taken; the oldest make room.
const MAX_PROGRAM_EVENTS: usize = 4096;

/// What of a program or session outlives a restart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HolderRecord {
    /// Its name.
    pub name: HolderName,
    /// Who started it.
    pub parent: Option<HolderName>,
    /// Whether it ended.
    pub ended: bool,
    /// Its tips.
    pub tips: Vec<ShardKey>,
    /// Where its latest call ended.
    pub context: Vec<ShardKey>,
}

/// Counts of signals and what they freed, for metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ProgramCounts {
    /// Signals, by kind, in the order of [`SignalKind`].
    pub signals: [u64; 7],
    /// Shards freed by ends.
    pub freed: u64,
    /// Their bytes.
    pub freed_bytes: u64,
    /// Shards that ends let go first.
    pub faded: u64,
}

impl Core {
    /// A request's call ended at these blocks, each the last of its group and shard.
    pub(super) fn note_context(&mut self, now: Instant, whose: (&TenantId, &RequestHints), tips: &[BlockId]) {
        let (tenant, hints) = whose;
        let (program, session) = (&hints.block.program_id, &hints.session_id);
        let mut touched = if !program.is_empty() {
            let name = HolderName::program(tenant, program);
            self.note_back(now, &name);
            let revived = self.catalog.hold(now, &name, tips);
            self.note_parent(now, &name, &hints.parent_program_id);
            revived
        } else if !session.is_empty() {
            self.catalog.hold(now, &HolderName::session(tenant, session), tips)
        } else {
            self.catalog.hold_in_common(tips)
        };
        if !program.is_empty() && !session.is_empty() {
            self.catalog.follow_session(now, &HolderName::session(tenant, session), tips);
        }
        touched.extend(self.catalog.take_faded());
        self.restand_all(touched);
    }

    /// A request's call begins.
    pub(super) fn note_call(&mut self, now: Instant, (tenant, hints): (&TenantId, &RequestHints)) {
        self.served(tenant, hints, |service| service.begin(now));
    }

    /// A request's call wrote blocks.
    pub(super) fn note_written(&mut self, now: Instant, (tenant, hints): (&TenantId, &RequestHints)) {
        self.served(tenant, hints, |service| service.goes_on(now));
    }

    fn served(&mut self, tenant: &TenantId, hints: &RequestHints, change: impl FnOnce(&mut Service)) {
        let program = &hints.block.program_id;
        if program.is_empty() {
            return;
        }
        if let Some(id) = self.catalog.holders.find(&HolderName::program(tenant, program)) {
            change(&mut self.catalog.holders.get_mut(id).service);
        }
    }

    fn note_back(&mut self, at: Instant, name: &HolderName) {
        let known = self.catalog.holders.find(name).map(|id| self.catalog.holders.get(id).state);
        if matches!(known, Some(HolderState::Waiting { .. })) {
            self.note_program(ProgramEvent::Back { name: name.clone(), at });
        }
        if self.catalog.holders.take_awaited(name) {
            self.note_program(ProgramEvent::Called { name: name.clone(), at });
        }
    }

    fn note_program(&mut self, event: ProgramEvent) {
        self.program_events.push_back(event);
        if self.program_events.len() > MAX_PROGRAM_EVENTS {
            self.program_events.pop_front();
        }
    }

    /// What programs did since, in order.
    pub fn take_program_events(&mut self) -> Vec<ProgramEvent> {
        std::mem::take(&mut self.program_events).into()
    }

    fn restand_all(&mut self, ids: Vec<BlockId>) {
        for id in ids {
            if self.catalog.try_get(id).is_some() {
                self.restand(id);
            }
        }
    }

    fn note_parent(&mut self, now: Instant, child: &HolderName, parent: &str) {
        if parent.is_empty() {
            return;
        }
        let parent = self.catalog.hear(now, &HolderName::program(&child.tenant, parent));
        if let Some(child) = self.catalog.holders.find(child) {
            self.catalog.holders.adopt(child, parent);
        }
    }

    /// A block came whose reader is not known: from a former life, or from another node. Its writer holds it.
    pub(super) fn held_by_writer(&mut self, id: BlockId, sequence: u64) {
        let entry = self.catalog.get(id);
        let program = self.catalog.programs.get(entry.program);
        if program.is_empty() {
            self.catalog.hold_in_common(&[id]);
            return;
        }
        let name = HolderName::program(&self.catalog.scopes.get(entry.scope).tenant, program);
        if self.cancelled.get(&name).is_none_or(|up_to| sequence > *up_to) {
            let revived = self.catalog.hold(self.clock, &name, &[id]);
            self.restand_all(revived);
        }
    }

    /// Takes a program's word on how it goes on. What is abandoned is still to be freed.
    pub fn signal(&mut self, now: Instant, signal: &Signal) -> SignalAnswer {
        self.clock = self.clock.max(now);
        self.program_counts.signals[signal.kind as usize] += 1;
        let answer = |outcome, reason| SignalAnswer { outcome, reason, abandoned: Vec::new() };
        let ends = matches!(signal.kind, SignalKind::Completion | SignalKind::Cancellation | SignalKind::Join);
        let known = self.catalog.holders.find(&signal.program);
        if known.is_none() && ends && signal.kind != SignalKind::Join {
            // What it wrote in a former life may still come up.
            let abandoned =
                if signal.kind == SignalKind::Cancellation { vec![signal.program.clone()] } else { Vec::new() };
            return SignalAnswer { abandoned, ..answer(Outcome::Missing, "this node knows no such program") };
        }
        let id = known.unwrap_or_else(|| self.catalog.hear(now, &signal.program));
        if let Some(parent) = &signal.parent {
            let parent = self.catalog.hear(now, parent);
            self.catalog.holders.adopt(id, parent);
        }
        // Room for another may have taken it.
        let Some(id) = self.catalog.holders.find(&signal.program) else {
            return answer(Outcome::Rejected, "too many programs at once");
        };
        let service = &mut self.catalog.holders.get_mut(id).service;
        match signal.kind {
            SignalKind::Continuation => service.wait(now),
            _ => service.end(now),
        }
        match signal.kind {
            SignalKind::ToolWait => {
                let until = signal.returns_in.map(|span| now + span);
                self.catalog.holders.get_mut(id).state = HolderState::Waiting { until };
                self.call_pauses(&signal.program, StopReason::ToolUse, signal.returns_in);
                let (name, returns_in) = (signal.program.clone(), signal.returns_in);
                self.note_program(ProgramEvent::Waits { name, returns_in, at: now });
                answer(Outcome::Applied, "")
            }
            SignalKind::Continuation => {
                self.note_back(now, &signal.program);
                self.catalog.holders.get_mut(id).state = HolderState::Active;
                answer(Outcome::Applied, "")
            }
            SignalKind::Fork => {
                self.call_pauses(&signal.program, StopReason::Join, signal.returns_in);
                self.fork(now, id, &signal.children)
            }
            SignalKind::Join => self.join_children(id, &signal.children),
            SignalKind::Compaction => {
                self.catalog.holders.get_mut(id).rewritten = true;
                answer(Outcome::Applied, "")
            }
            SignalKind::Completion => self.complete_program(id),
            SignalKind::Cancellation => SignalAnswer { abandoned: self.family(id), ..answer(Outcome::Applied, "") },
        }
    }

    fn fork(&mut self, now: Instant, parent: HolderId, children: &[HolderName]) -> SignalAnswer {
        let context: Vec<BlockId> = self.catalog.holders.get(parent).context.iter().copied().collect();
        let parent_name = self.catalog.holders.get(parent).name.clone();
        let mut fresh = false;
        let mut revived = Vec::new();
        for name in children.iter().filter(|name| **name != parent_name) {
            fresh |= self.catalog.holders.find(name).is_none();
            revived.extend(self.catalog.hold(now, name, &context));
            let ids = (self.catalog.holders.find(name), self.catalog.holders.find(&parent_name));
            if let (Some(child), Some(parent)) = ids {
                self.catalog.holders.adopt(child, parent);
            }
        }
        self.restand_all(revived);
        let branches: Vec<HolderName> = children.iter().filter(|name| **name != parent_name).cloned().collect();
        if !branches.is_empty() {
            branches.iter().chain([&parent_name]).for_each(|name| self.catalog.holders.await_call(name));
            self.note_program(ProgramEvent::Forked { name: parent_name, branches, at: now });
        }
        let outcome = if fresh || children.is_empty() { Outcome::Applied } else { Outcome::Duplicate };
        SignalAnswer { outcome, reason: "", abandoned: Vec::new() }
    }

    fn join_children(&mut self, parent: HolderId, children: &[HolderName]) -> SignalAnswer {
        let own = self.catalog.holders.get(parent);
        let named: Vec<HolderName> =
            if children.is_empty() { own.children.iter().cloned().collect() } else { children.to_vec() };
        let above: FxHashSet<&HolderName> = std::iter::successors(Some(&own.name), |name| {
            self.catalog.holders.find(name).and_then(|id| self.catalog.holders.get(id).parent.as_ref())
        })
        .collect();
        let ids = named.iter().filter(|n| !above.contains(n)).filter_map(|n| self.catalog.holders.find(n));
        let mut abandoned: Vec<HolderName> = ids.flat_map(|id| self.family(id)).collect();
        abandoned.dedup();
        let outcome = if abandoned.is_empty() { Outcome::Duplicate } else { Outcome::Applied };
        SignalAnswer { outcome, reason: "", abandoned }
    }

    fn family(&self, id: HolderId) -> Vec<HolderName> {
        self.catalog.holders.family(id).into_iter().map(|id| self.catalog.holders.get(id).name.clone()).collect()
    }

    fn complete_program(&mut self, id: HolderId) -> SignalAnswer {
        let before = self.catalog.holders.get(id).state;
        for id in self.catalog.holders.family(id) {
            let faded = self.catalog.fade(id);
            self.program_counts.faded += faded.len() as u64;
            self.restand_all(faded);
            self.catalog.holders.get_mut(id).state = HolderState::Ended;
            self.catalog.holders.changed(id);
            let name = self.catalog.holders.get(id).name.clone();
            self.calls_end(&name);
            self.note_program(ProgramEvent::Ended { name: name.clone(), at: self.clock });
            self.catalog.events.program_ended(&name, "completed");
        }
        let again = before == HolderState::Ended;
        let outcome = if again { Outcome::Duplicate } else { Outcome::Applied };
        SignalAnswer { outcome, reason: "", abandoned: Vec::new() }
    }

    /// Frees some of what only this program holds, on every tier. To be called until there is no more.
    pub fn abandon_program(&mut self, name: &HolderName) -> Freed {
        let mut freed = Freed::default();
        if let Some(id) = self.catalog.holders.find(name) {
            for _ in 0..MAX_TOUCHES_PER_CALL {
                let Some(exclusive) = self.catalog.lift(id) else { break };
                if let Some(block) = exclusive {
                    self.free_abandoned(name, block, &mut freed);
                }
            }
            let holder = self.catalog.holders.get(id);
            freed.more = !holder.tips.is_empty() || !holder.former.is_empty();
        }
        if !freed.more {
            if let Some(id) = self.catalog.holders.find(name) {
                self.catalog.forget_holder(id);
                self.calls_end(name);
                self.note_program(ProgramEvent::Ended { name: name.clone(), at: self.clock });
                self.catalog.events.program_ended(name, "abandoned");
            }
            let up_to = self.last_sequence();
            self.cancel_former(name.clone(), up_to);
            freed.cancelled = Some((name.clone(), up_to));
        }
        self.program_counts.freed += freed.blocks;
        self.program_counts.freed_bytes += freed.bytes;
        self.pump();
        freed
    }

    fn free_abandoned(&mut self, name: &HolderName, id: BlockId, freed: &mut Freed) {
        let entry = self.catalog.get(id);
        let key = entry.key;
        if self.claims.is_named(&key) {
            self.catalog.mark_common(id, &mut Vec::new());
            return;
        }
        if self.catalog.scopes.get(entry.scope).tenant != name.tenant {
            return;
        }
        let here = entry.visible();
        freed.blocks += u64::from(here);
        freed.bytes += if here { u64::from(entry.bytes) } else { 0 };
        // Records of it may lie on a tier that the catalog does not remember; a movement under way makes another. What the
        // program wrote itself is known by its name.
        if self.writer_of(entry) != *name {
            freed.journal.push((self.shard_key(entry), self.next_sequence - 1));
        }
        if here {
            self.ghost.insert(&key, MissReason::Evicted);
        }
        let former = self.catalog.events.because("abandoned");
        if self.catalog.get(id).in_use() {
            self.catalog.update(id, |e| e.flags.set(Flags::DOOMED, true));
        } else {
            self.drop_all(id);
        }
        self.catalog.events.because(former);
    }

    /// What a program wrote up to a sequence comes back only where somebody else holds it.
    pub fn cancel_former(&mut self, name: HolderName, up_to_sequence: u64) {
        if self.cancelled.len() >= MAX_CANCELLED && !self.cancelled.contains_key(&name) {
            let oldest = self.cancelled.iter().min_by_key(|(_, up_to)| **up_to).map(|(name, _)| name.clone());
            if let Some(oldest) = oldest {
                self.cancelled.remove(&oldest);
            }
        }
        let up_to = self.cancelled.entry(name).or_default();
        *up_to = (*up_to).max(up_to_sequence);
    }

    /// After a tier was recovered and the programs of the former life were told: drops what abandoned programs wrote and
    /// nobody holds. Answers with the programs of which something was found.
    pub fn sweep_cancelled(&mut self) -> Vec<HolderName> {
        if self.cancelled.is_empty() {
            return Vec::new();
        }
        let mut orphans: Vec<(u32, BlockId)> = Vec::new();
        let mut found = FxHashSet::default();
        for (id, entry) in self.catalog.iter_from(0) {
            if entry.program == 0 || entry.held > 0 || entry.flags.has(Flags::COMMON) {
                continue;
            }
            let name = self.writer_of(entry);
            if self.cancelled.get(&name).is_some_and(|up_to| entry.sequence <= *up_to) {
                orphans.push((entry.depth_blocks, id));
                found.insert(name);
            }
        }
        orphans.sort_unstable_by(|a, b| b.cmp(a));
        for (_, id) in orphans {
            let alone = |e: &Entry| e.children == [0; 3] && !e.in_use() && !self.claims.is_named(&e.key);
            if self.catalog.try_get(id).is_some_and(alone) {
                self.drop_all(id);
            }
        }
        let mut found: Vec<HolderName> = found.into_iter().collect();
        found.sort_unstable();
        found
    }

    fn writer_of(&self, entry: &Entry) -> HolderName {
        let tenant = &self.catalog.scopes.get(entry.scope).tenant;
        HolderName::program(tenant, self.catalog.programs.get(entry.program))
    }

    /// Takes in a program or session of a former life, once its blocks are recovered. May be told again.
    pub fn restore_holder(&mut self, now: Instant, record: &HolderRecord) {
        let find = |core: &Self, key: &ShardKey| {
            let layout = core.catalog.find_layout(&key.layout)?;
            core.catalog.find(&key.block, layout, key.shard)
        };
        let tips: Vec<BlockId> = record.tips.iter().filter_map(|key| find(self, key)).collect();
        let context: Vec<BlockId> = record.context.iter().filter_map(|key| find(self, key)).collect();
        let revived = self.catalog.hold(now, &record.name, &tips);
        self.restand_all(revived);
        self.catalog.follow_session(now, &record.name, &context);
        if let Some(parent) = &record.parent {
            let parent = self.catalog.hear(now, parent);
            if let Some(child) = self.catalog.holders.find(&record.name) {
                self.catalog.holders.adopt(child, parent);
            }
        }
        if let Some(id) = self.catalog.holders.find(&record.name).filter(|_| record.ended) {
            let faded = self.catalog.fade(id);
            self.restand_all(faded);
            self.catalog.holders.get_mut(id).state = HolderState::Ended;
        }
    }

    /// Programs and sessions that changed since the last call, and those that are forgotten: to be journaled.
    pub fn take_holder_changes(&mut self, limit: usize) -> (Vec<HolderRecord>, Vec<HolderName>) {
        let (changed, gone) = self.catalog.holders.take_changes(limit);
        (changed.into_iter().map(|id| self.holder_as_is(id)).collect(), gone)
    }

    pub(super) fn holder_as_is(&self, id: HolderId) -> HolderRecord {
        let holder = self.catalog.holders.get(id);
        let key = |id: &BlockId| self.shard_key(self.catalog.get(*id));
        let ended = holder.state == HolderState::Ended;
        let tips = if ended { holder.former.iter().map(key).collect() } else { holder.tips.keys().map(key).collect() };
        let context = holder.context.iter().map(key).collect();
        HolderRecord { name: holder.name.clone(), parent: holder.parent.clone(), ended, tips, context }
    }
}
