//! Programs and sessions: what their calls hold.
//!
//! What a call leaves behind is for [`Core::settle_holders`], which the shell calls until nothing is left.

use std::time::Duration;

use kvtier_types::{Instant, RequestHints, ShardKey, TenantId};

use super::Core;
use crate::catalog::BlockId;
use crate::entry::Flags;
use crate::evict::survival::StopReason;
use crate::holders::{HolderId, HolderName, HolderState, Service};

/// Blocks of one step of work on what programs hold.
pub(super) const HOLDER_STEP: usize = 256;

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
    /// It said that it goes on: it is about to call.
    GoesOn {
        /// Who.
        name: HolderName,
    },
    /// Its parent waits for its end from now on, or does not.
    Blocks {
        /// Who.
        name: HolderName,
        /// Who waits, or not.
        parent: HolderName,
        /// Whether it does.
        waits: bool,
        /// When.
        at: Instant,
    },
    /// It ended.
    Ended {
        /// Who.
        name: HolderName,
        /// What it said that it was for.
        role: String,
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
        let revived = if !program.is_empty() {
            let name = HolderName::program(tenant, program);
            self.note_back(now, &name);
            let revived = self.catalog.hold(now, &name, tips);
            self.note_parent(now, &name, &hints.parent_program_id);
            self.note_role(now, &name, hints);
            revived
        } else if !session.is_empty() {
            self.catalog.hold(now, &HolderName::session(tenant, session), tips)
        } else {
            self.catalog.hold_in_common(tips)
        };
        if !program.is_empty() && !session.is_empty() {
            self.catalog.follow_session(now, &HolderName::session(tenant, session), tips);
        }
        let named = [HolderName::program(tenant, program), HolderName::session(tenant, session)];
        for name in named.iter().filter(|name| !name.id.is_empty()) {
            if let Some(id) = self.catalog.holders.find(name) {
                self.catalog.holders.get_mut(id).called = Some(now);
            }
        }
        self.restand_all(revived);
    }

    /// A request's call begins.
    pub(super) fn note_call(&mut self, now: Instant, (tenant, hints): (&TenantId, &RequestHints)) {
        let took = self.served(tenant, hints, |service| service.begin(now));
        self.admission.observe(now, took.unwrap_or_default(), Duration::ZERO);
    }

    /// A request's call wrote blocks.
    pub(super) fn note_written(&mut self, now: Instant, (tenant, hints): (&TenantId, &RequestHints)) {
        self.served(tenant, hints, |service| service.goes_on(now));
    }

    fn served<R>(
        &mut self,
        tenant: &TenantId,
        hints: &RequestHints,
        change: impl FnOnce(&mut Service) -> R,
    ) -> Option<R> {
        let program = &hints.block.program_id;
        if program.is_empty() {
            return None;
        }
        let id = self.catalog.holders.find(&HolderName::program(tenant, program))?;
        Some(change(&mut self.catalog.holders.get_mut(id).service))
    }

    /// Takes some steps with what holders left behind: what nobody holds any more goes first, or is common. Answers whether
    /// something is left.
    pub fn settle_holders(&mut self) -> bool {
        let mut faded = Vec::new();
        let more = self.catalog.carry_on(&mut { HOLDER_STEP }, &mut faded);
        self.program_counts.faded += faded.len() as u64;
        self.restand_all(faded);
        more
    }

    /// Whether something is left for [`Self::settle_holders`].
    #[must_use]
    pub fn has_left_holdings(&self) -> bool {
        self.catalog.has_leaving()
    }

    pub(super) fn note_back(&mut self, at: Instant, name: &HolderName) {
        let known = self.catalog.holders.find(name).map(|id| self.catalog.holders.get(id).state);
        if matches!(known, Some(HolderState::Waiting { .. })) {
            self.note_program(ProgramEvent::Back { name: name.clone(), at });
        }
        if self.catalog.holders.take_awaited(name) {
            self.note_program(ProgramEvent::Called { name: name.clone(), at });
        }
    }

    pub(super) fn note_program(&mut self, event: ProgramEvent) {
        self.program_events.push_back(event);
        if self.program_events.len() > MAX_PROGRAM_EVENTS {
            self.program_events.pop_front();
        }
    }

    /// What programs did since, in order.
    pub fn take_program_events(&mut self) -> Vec<ProgramEvent> {
        std::mem::take(&mut self.program_events).into()
    }

    pub(super) fn restand_all(&mut self, ids: Vec<BlockId>) {
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

    /// What a program says of itself beside its name: what it is for, and whether its parent waits for it.
    fn note_role(&mut self, at: Instant, name: &HolderName, hints: &RequestHints) {
        let Some(id) = self.catalog.holders.find(name) else { return };
        let holder = self.catalog.holders.get_mut(id);
        if !hints.agent_role.is_empty() && holder.role != hints.agent_role {
            holder.role.clone_from(&hints.agent_role);
        }
        let (Some(waits), false) = (hints.blocks_parent, hints.parent_program_id.is_empty()) else { return };
        let is_news = holder.blocks_parent.replace(waits) != Some(waits);
        let parent = HolderName::program(&name.tenant, &hints.parent_program_id);
        // A parent that called since waits anew.
        if parent == *name || !(is_news || waits && !self.catalog.holders.is_awaited(&parent)) {
            return;
        }
        if waits {
            self.catalog.holders.await_call(&parent);
            self.call_pauses(&parent, StopReason::Join, None);
        }
        self.note_program(ProgramEvent::Blocks { name: name.clone(), parent, waits, at });
    }

    /// What a program says that it is for; empty where it did not.
    #[must_use]
    pub fn program_role(&self, name: &HolderName) -> &str {
        self.catalog.holders.find(name).map_or("", |id| &self.catalog.holders.get(id).role)
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
        if self.cancelled.up_to(&name).is_none_or(|up_to| sequence > up_to) {
            let revived = self.catalog.hold(self.clock, &name, &[id]);
            self.restand_all(revived);
        }
    }

    /// Takes in a program or session of a former life, once its blocks are recovered. May be told again.
    pub fn restore_holder(&mut self, now: Instant, record: &HolderRecord) {
        let find =
            |keys: &[ShardKey]| keys.iter().filter_map(|key| self.catalog.find_shard(key)).collect::<Vec<BlockId>>();
        let (tips, context) = (find(&record.tips), find(&record.context));
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
            while self.catalog.outlive_some(id, u64::MAX, &mut { HOLDER_STEP }) {}
            self.catalog.holders.get_mut(id).state = HolderState::Ended;
        }
        while self.settle_holders() {}
    }

    /// Programs and sessions that changed since the last call, as many as have about `limit` tips together, and those that are
    /// forgotten: to be journaled.
    pub fn take_holder_changes(&mut self, limit: usize) -> (Vec<HolderRecord>, Vec<HolderName>) {
        let (changed, gone) = self.catalog.holders.take_changes(limit);
        (changed.into_iter().map(|id| self.holder_as_is(id)).collect(), gone)
    }

    /// Whether there is more for [`Self::take_holder_changes`].
    #[must_use]
    pub fn has_holder_changes(&self) -> bool {
        self.catalog.holders.has_changes()
    }

    pub(super) fn holder_as_is(&self, id: HolderId) -> HolderRecord {
        let holder = self.catalog.holders.get(id);
        let key = |id: &BlockId| self.shard_key(self.catalog.get(*id));
        let ended = holder.state == HolderState::Ended;
        let former = holder.former.iter().filter(|id| self.catalog.get(**id).flags.has(Flags::FADED));
        let tips = if ended { former.map(key).collect() } else { holder.tips.keys().map(key).collect() };
        let context = holder.context.iter().map(key).collect();
        HolderRecord { name: holder.name.clone(), parent: holder.parent.clone(), ended, tips, context }
    }
}
