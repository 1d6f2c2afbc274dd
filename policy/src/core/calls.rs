//! Model calls as rankings see them: which blocks one used, of whose program, and what the guard is told of it.
//!
//! *Bounds*: the guard's queue holds [`MAX_QUEUED_CALLS`] calls with [`MAX_QUEUED_BLOCKS`] blocks; the oldest make room, and
//! are lost to it.

use std::collections::VecDeque;

use kvtier_types::{Instant, Origin, RequestHints, TenantId, Tier};

use super::lookup::Probed;
use super::{Core, LookupRequest};
use crate::catalog::BlockId;
use crate::evict::survival::{CallFacts, Pause, StopReason};
use crate::evict::{Call, Contender, EvictionConfig, SegmentId};
use crate::ghost::short;
use crate::holders::HolderName;

const MAX_QUEUED_CALLS: usize = 256;
const MAX_QUEUED_BLOCKS: usize = 65_536;

/// What the guard is told.
#[derive(Debug, Clone)]
pub enum GuardEvent {
    /// A call, and how many blocks like its own host memory has room for.
    Call(Call, u64),
    /// A program waits.
    Pause(u64, Pause),
    /// A program ended.
    End(u64),
}

/// What the guard is still to be told.
#[derive(Debug, Default)]
pub(super) struct GuardQueue {
    events: VecDeque<GuardEvent>,
    blocks: usize,
}

impl GuardQueue {
    fn push(&mut self, event: GuardEvent) {
        let weight = |event: &GuardEvent| if let GuardEvent::Call(call, _) = event { call.blocks.len() } else { 0 };
        self.blocks += weight(&event);
        self.events.push_back(event);
        while self.events.len() > MAX_QUEUED_CALLS || self.blocks > MAX_QUEUED_BLOCKS {
            let Some(oldest) = self.events.pop_front() else { break };
            self.blocks -= weight(&oldest);
        }
    }
}

fn facts(tenant: &TenantId, hints: &RequestHints, blocks: usize) -> CallFacts {
    let (program, session) = (&hints.block.program_id, &hints.session_id);
    let name = if program.is_empty() {
        (!session.is_empty()).then(|| HolderName::session(tenant, session))
    } else {
        Some(HolderName::program(tenant, program))
    };
    CallFacts {
        program: name.as_ref().map(HolderName::number),
        sub_agent: !hints.parent_program_id.is_empty(),
        blocks: u32::try_from(blocks).unwrap_or(u32::MAX),
        ..CallFacts::default()
    }
}

impl Core {
    /// A request's call begins, with these blocks of the group that stands for its prompt: what it uses is told by
    /// [`Self::use_entry`], until [`Self::end_call`].
    pub(super) fn begin_call(&mut self, now: Instant, request: &LookupRequest, probed: Option<&Probed>) {
        let facts = facts(&request.tenant, &request.hints, probed.map_or(0, |p| p.ids.len() / p.shards));
        self.catalog.segments.begin_call(now, facts);
        // A prompt of which the engine has the beginning is not one to the guard.
        if let Some(probed) = probed.filter(|p| p.first_block == 0 && self.config.eviction.is_guarded()) {
            self.tell_guard_of(now, facts, request, probed);
        }
    }

    fn tell_guard_of(&mut self, at: Instant, facts: CallFacts, request: &LookupRequest, probed: &Probed) {
        let Ok(attachment) = self.attached(request.attachment) else { return };
        let Some(range) = request.ranges.iter().find(|r| r.group == probed.group) else { return };
        let bytes = attachment.layout.block_bytes.get(range.group as usize).copied().unwrap_or(0);
        let of_block = self.frames.class(bytes) * u64::from(attachment.layout.shards);
        let room = self.frames.capacity_bytes() / of_block.max(1);
        let said = request.hints.block.semantic;
        let meaning = |id: Option<BlockId>| id.map_or(said, |id| self.catalog.get(id).semantic);
        let firsts = probed.ids.iter().step_by(probed.shards).copied();
        let blocks = range.keys.iter().map(short).zip(firsts.map(meaning)).collect();
        self.guard.push(GuardEvent::Call(Call { at, facts, blocks }, room));
    }

    /// What a request writes belongs to the call that its program made last.
    pub(super) fn continue_call(&mut self, now: Instant, (tenant, hints): (&TenantId, &RequestHints), blocks: usize) {
        self.catalog.segments.continue_call(now, facts(tenant, hints, blocks));
    }

    /// The open call takes a lease on an entry.
    pub(super) fn lease_entry(&mut self, id: BlockId, tick: u64) {
        let segment = self.segment_of(id);
        self.catalog.read_ahead(id);
        self.catalog.touch(id, |e| {
            e.leases += 1;
            (e.touched, e.segment) = (tick, segment);
        });
    }

    fn segment_of(&mut self, id: BlockId) -> SegmentId {
        let entry = self.catalog.get(id);
        let (former, semantic) = (entry.segment, entry.semantic);
        self.catalog.segments.use_block(former, semantic)
    }

    /// The open call uses an entry. Changes it as well.
    pub(super) fn use_entry(&mut self, id: BlockId, change: impl FnOnce(&mut crate::entry::Entry)) {
        let segment = self.segment_of(id);
        self.catalog.update(id, |e| {
            e.segment = segment;
            change(e);
        });
    }

    pub(super) fn end_call(&mut self) {
        self.catalog.segments.end_call();
    }

    /// A program waits: for a tool, or for its branches.
    pub(super) fn call_pauses(&mut self, name: &HolderName, stop: StopReason, returns_in: Option<std::time::Duration>) {
        let (number, pause) = (name.number(), Pause { stop, returns_in });
        self.catalog.segments.pause(number, pause);
        if self.config.eviction.is_guarded() {
            self.guard.push(GuardEvent::Pause(number, pause));
        }
    }

    /// A program ended.
    pub(super) fn calls_end(&mut self, name: &HolderName) {
        let number = name.number();
        self.catalog.segments.end_program(number);
        if self.config.eviction.is_guarded() {
            self.guard.push(GuardEvent::End(number));
        }
    }

    /// How it evicts.
    #[must_use]
    pub const fn eviction(&self) -> &EvictionConfig {
        &self.config.eviction
    }

    /// Segments of blocks, and classes of them, that eviction tells apart.
    #[must_use]
    pub fn segments(&self) -> (usize, usize) {
        self.catalog.segments.sizes()
    }

    /// A reload from a tier took so long.
    pub fn note_reload(&mut self, from: Tier, bytes: u64, took: std::time::Duration) {
        self.costs.measured(from, bytes, took);
        self.costs.loaded(Origin::Tier(from), bytes, (took, self.onboarding));
    }

    /// What the guard is to be told since, in order.
    pub fn take_guard_events(&mut self) -> Vec<GuardEvent> {
        self.guard.blocks = 0;
        std::mem::take(&mut self.guard.events).into()
    }

    /// The ranking that host memory follows.
    #[must_use]
    pub const fn leader(&self) -> Contender {
        self.catalog.leader()
    }

    /// Has host memory follow the ranking that leads.
    pub fn follow(&mut self, leader: Contender) {
        self.catalog.follow_leader(leader);
    }
}
