//! Bytes from elsewhere: shards that other nodes, or the packs they left behind, are said to have.
//!
//! A shard that a reader wants and nobody here has gets an entry flagged `REMOTE` with the sources to try, best first.
//! Sources are tried one after the other, each with all of the shard's bytes (replicas are never mixed); a slow one is
//! given up when another is left. However many readers want the shard, one transfer is under way for it.

use std::time::Duration;

use kvtier_types::{BlockKey, Effect, Instant, Origin, RecordMeta, SemanticType, ShardKey, Taint, Tier};

use super::host_room::WithoutRoom;
use super::{Action, Core, MoveId, Movement};
use crate::attachment::AttachmentId;
use crate::catalog::{BlockId, Remote, Scope, Source};
use crate::core::marks::union;
use crate::core::publish::Located;
use crate::core::{Fetching, LookupRange};
use crate::entry::{Entry, Flags, NEVER};
use crate::ledger::MissReason;
use crate::limits::MAX_SCOPES;

/// How a fetch ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FetchEnd {
    /// All bytes arrived and match; what their owner says of them.
    Done(Box<RecordMeta>),
    /// The bytes do not match their checksum.
    Corrupt,
    /// The source does not have it.
    Gone,
    /// It failed for another reason.
    Failed,
}

/// Bounds of fetching.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FetchConfig {
    /// Fetches under way at once.
    pub max_fetches: usize,
    /// Their bytes.
    pub max_bytes: u64,
    /// How long one source may take before another one is tried, if there is one.
    pub patience: Duration,
    /// How long one source may take at all.
    pub deadline: Duration,
}

impl Default for FetchConfig {
    fn default() -> Self {
        Self {
            max_fetches: 1024,
            max_bytes: 256 << 20,
            patience: Duration::from_secs(2),
            deadline: Duration::from_secs(10),
        }
    }
}

impl Core {
    /// Gives entries to the shards of a lookup that others are said to have. Answers with them.
    pub(super) fn intern_remotes(
        &mut self,
        attachment: AttachmentId,
        ranges: &[LookupRange],
        located: &Located,
    ) -> Vec<BlockId> {
        let mut interned = Vec::new();
        if located.is_empty() || self.catalog.scopes.len() > MAX_SCOPES {
            return interned;
        }
        for range in ranges {
            let Some(template) = self.remote_template(attachment, range) else { continue };
            let layout = *self.catalog.layout_id(template.layout);
            let shards = self.attachments[&attachment].layout.shards;
            for (at, key) in (0u32..).zip(&range.keys) {
                for shard in 0..shards {
                    let Some(sources) = located.get(&ShardKey { block: *key, layout, shard }) else { continue };
                    let before = (at as usize).checked_sub(1).and_then(|i| range.keys.get(i));
                    let depth_blocks = range.first_block.saturating_add(at);
                    let entry = Entry { key: *key, shard, depth_blocks, ..template.clone() };
                    interned.extend(self.intern_remote(entry, before, sources.to_vec()));
                }
            }
            self.catalog.scopes.release(template.scope);
            self.catalog.programs.release(template.program);
        }
        interned
    }

    /// What the remote shards of a range have in common. The caller gives its scope and program back.
    fn remote_template(&mut self, attachment: AttachmentId, range: &LookupRange) -> Option<Entry> {
        let attachment = self.attachments.get(&attachment)?;
        let group = range.group as usize;
        let spec = attachment.layout.groups.get(group)?;
        let bytes = u32::try_from(*attachment.layout.block_bytes.get(group)?).ok()?;
        let scope = Scope {
            namespace: attachment.namespace,
            model: attachment.spec.namespace.model.clone(),
            tenant: kvtier_types::TenantId::shared(),
            layout: *self.catalog.layout_id(attachment.layout_number),
        };
        let mut flags = Flags::default();
        flags.set(Flags::NEEDS_ANCESTORS, spec.kind.needs_ancestors());
        flags.set(Flags::REMOTE, true);
        let (layout, group) = (attachment.layout_number, u16::try_from(range.group).ok()?);
        let scope = self.catalog.scopes.acquire(&scope);
        let program = self.catalog.programs.acquire(&String::new());
        Some(Entry::bare(BlockKey::new([0; 32]), (layout, 0), group, bytes, (scope, program, flags)))
    }

    fn intern_remote(&mut self, mut entry: Entry, before: Option<&BlockKey>, sources: Vec<Source>) -> Option<BlockId> {
        let known = self.catalog.find(&entry.key, entry.layout, entry.shard);
        let id = if let Some(id) = known {
            let state = self.catalog.get(id);
            if state.offered() || state.in_use() || state.flags.has(Flags::DOOMED) {
                return None;
            }
            self.catalog.update(id, |e| e.flags.set(Flags::REMOTE, true));
            id
        } else {
            let scope = self.catalog.scopes.get(entry.scope).clone();
            let program = self.catalog.programs.get(entry.program).clone();
            entry.scope = self.catalog.scopes.acquire(&scope);
            entry.program = self.catalog.programs.acquire(&program);
            entry.parent = before.and_then(|key| self.catalog.find(key, entry.layout, entry.shard));
            let id = self.catalog.insert(entry);
            self.arrived(id);
            id
        };
        self.catalog.remotes.insert(id, Remote { untried: sources.into(), adopted: false, ahead: false });
        Some(id)
    }

    /// Drops remote entries that nobody came to want.
    pub(super) fn forget_unwanted(&mut self, ids: &[BlockId]) {
        // Children before their parents, so that each finds its entry present.
        for id in ids.iter().rev() {
            self.forget_unwanted_one(*id);
        }
    }

    pub(super) fn forget_unwanted_one(&mut self, id: BlockId) {
        let idle = self.catalog.try_get(id).is_some_and(|e| e.flags.has(Flags::REMOTE) && !e.in_use());
        if idle {
            self.catalog.remotes.remove(&id);
            self.catalog.update(id, |e| e.flags.set(Flags::REMOTE, false));
        }
    }

    pub(super) fn pump_fetches(&mut self) {
        let limits = self.config.fetch;
        let mut pass = WithoutRoom::default();
        while self.fetching.count < limits.max_fetches && self.fetching.bytes < limits.max_bytes && !pass.is_full() {
            let Some(id) = self.fetches.pop_front() else { break };
            self.skip_former_lives(id);
            let entry = self.catalog.get(id);
            let wanted =
                self.waiters.contains_key(&id) && entry.flags.has(Flags::REMOTE) && !entry.flags.has(Flags::DOOMED);
            let next = self.catalog.remotes.get(&id).and_then(|r| r.untried.front()).copied();
            let Some(source) = next.filter(|_| wanted && entry.host.is_none()) else {
                self.onboard_ended(id);
                continue;
            };
            let bytes = u64::from(entry.bytes);
            let Some(into) = self.frame_in_pass(id, &mut pass) else { continue };
            if let Some(remote) = self.catalog.remotes.get_mut(&id) {
                remote.untried.pop_front();
            }
            let key = self.shard_key(self.catalog.get(id));
            let move_id = MoveId(self.take_id());
            let started = self.clock;
            let from = if source == Source::Floor { Origin::Tier(Tier::Object) } else { Origin::Peer };
            self.moves.insert(move_id, (id, Movement::Fetch { from, into, started }));
            self.fetching.start(bytes);
            let deadline = started + limits.deadline;
            self.actions.push_back(Action::Fetch { id: move_id, key, from: source, into, bytes, deadline });
        }
        pass.last_first().for_each(|id| self.fetches.push_front(id));
    }

    /// A source that was restarted since it was found has nothing under that name any more.
    fn skip_former_lives(&mut self, id: BlockId) {
        let members = &self.members;
        let over = |source: &Source| match source {
            Source::Floor => false,
            Source::Peer { node, incarnation } => members.is_over(*node, *incarnation),
        };
        if let Some(remote) = self.catalog.remotes.get_mut(&id) {
            while remote.untried.front().is_some_and(over) {
                remote.untried.pop_front();
            }
        }
    }

    /// Takes note of a fetch's end.
    pub fn fetched(&mut self, now: Instant, id: MoveId, end: FetchEnd) {
        self.clock = self.clock.max(now);
        let movement = self.moves.get(&id).map(|(b, m)| (*b, *m));
        let Some((block, Movement::Fetch { from, into, started })) = movement else { return };
        self.moves.remove(&id);
        let entry = self.catalog.get(block);
        let (key, bytes) = (self.shard_key(entry), u64::from(entry.bytes));
        let at_once = self.fetching.count;
        self.fetching.end(bytes);
        match end {
            FetchEnd::Done(meta) if meta.key == key && meta.bytes == bytes && !self.is_over(&meta) => {
                self.costs.loaded(from, bytes, (self.clock.since(started), at_once));
                self.counts.moved[Tier::Host.index()] += 1;
                self.take_in(block, into, &meta);
                self.onboard_ended(block);
            }
            failed => {
                self.counts.move_failures[Tier::Host.index()] += 1;
                if failed == FetchEnd::Corrupt {
                    self.counts.corrupt += 1;
                    self.ghost.insert(&key.block, MissReason::Corrupt);
                }
                self.free_frame(into, bytes);
                self.try_next_source(block);
            }
        }
        self.pump();
    }

    /// A fetched shard is here now.
    fn take_in(&mut self, id: BlockId, into: crate::frame::FrameRef, meta: &RecordMeta) {
        let entry = self.catalog.get(id);
        let (old_scope, old_program) = (entry.scope, entry.program);
        let mut scope = self.catalog.scopes.get(old_scope).clone();
        if scope.namespace == Scope::default().namespace {
            // Asked for by its key alone.
            self.complete(id, meta);
            scope = Scope::of(meta);
        }
        scope.tenant = meta.tenant.clone();
        let scope = self.catalog.scopes.acquire(&scope);
        let program = self.catalog.programs.acquire(&meta.hints.program_id);
        let (semantic, taints, end) = self.arriving(meta);
        self.catalog.ephemeral.remove(&id);
        let remote = self.catalog.remotes.remove(&id).unwrap_or_default();
        let (adopted, is_late) = (remote.adopted, remote.ahead && self.is_awaited_by_reader(id));
        let is_early = remote.ahead && !is_late;
        if self.catalog.get(id).checksum != meta.checksum {
            // Copies that could not be read are of another sealing, and all of a block is of one.
            self.drop_copy(id, Tier::Disk);
            self.drop_copy(id, Tier::Object);
        }
        self.catalog.update(id, |e| {
            e.host = Some(into);
            e.checksum = meta.checksum;
            e.scope = scope;
            e.program = program;
            e.semantic = semantic;
            e.expires = NEVER;
            e.flags.set(Flags::REMOTE, false);
            e.flags.set(Flags::FETCHED, !adopted);
            e.flags.set(Flags::SPREAD, is_early);
        });
        if is_late {
            self.catalog.spread.late_bytes += u64::from(self.catalog.get(id).bytes);
        }
        self.catalog.scopes.release(old_scope);
        self.catalog.programs.release(old_program);
        self.set_taints(id, &taints);
        let entry = self.catalog.get(id);
        if entry.held == 0 && !entry.flags.has(Flags::COMMON) && !self.is_begun(id) {
            // It came without a reader.
            self.held_by_writer(id, u64::MAX);
        }
        self.relive(id, end);
        if adopted {
            self.queue_offload(id);
        }
    }

    fn is_awaited_by_reader(&self, id: BlockId) -> bool {
        self.waiters.get(&id).is_some_and(|leases| leases.iter().any(|lease| self.leases.contains_key(lease)))
    }

    /// What a block that comes from elsewhere is marked with: what it came with, and what this node was told of it while
    /// whoever has it may not have been.
    fn arriving(&self, meta: &RecordMeta) -> (SemanticType, Vec<Taint>, Option<Instant>) {
        let mut taints = meta.hints.taints.clone();
        taints.sort_unstable();
        let (mut semantic, mut expires) = (meta.hints.semantic, self.end_of(meta).0);
        if let Some(mark) = self.marks.get(&meta.key.block) {
            semantic = semantic.more_durable(mark.semantic);
            taints = union(&taints, &mark.taints);
            // Without a taint that says so it is what a rule gave the block here, which is not the one that comes.
            let ends = mark.expires_ms.filter(|_| mark.taints.iter().any(|t| matches!(t.effect, Effect::Ephemeral(_))));
            expires = expires.into_iter().chain(ends.map(|at| self.instant_of(at))).min();
        }
        (semantic, taints, expires)
    }

    /// Whether the time of a block that comes from elsewhere is over.
    fn is_over(&mut self, meta: &RecordMeta) -> bool {
        let over = self.arriving(meta).2.is_some_and(|at| at <= self.clock);
        if over {
            self.ghost.insert(&meta.key.block, MissReason::Expired);
        }
        over
    }

    fn try_next_source(&mut self, id: BlockId) {
        if self.catalog.remotes.get(&id).is_some_and(|r| !r.untried.is_empty()) {
            self.fetches.push_front(id);
        } else {
            self.onboard_ended(id);
        }
    }

    /// Gives up fetches that take too long: for another source's sake after the configured patience, else at their
    /// deadline.
    pub(super) fn expire_fetches(&mut self, now: Instant) {
        let late = |block: &BlockId, started: Instant| self.given_up_at(*block, started) <= now;
        let given_up: Vec<(MoveId, BlockId, crate::frame::FrameRef)> = self
            .moves
            .iter()
            .filter_map(|(id, (block, movement))| match movement {
                Movement::Fetch { into, started, .. } if late(block, *started) => Some((*id, *block, *into)),
                _ => None,
            })
            .collect();
        for (id, block, into) in given_up {
            self.moves.remove(&id);
            self.actions.push_back(Action::CancelFetch { id });
            let bytes = u64::from(self.catalog.get(block).bytes);
            self.fetching.end(bytes);
            self.free_frame(into, bytes);
            self.counts.move_failures[Tier::Host.index()] += 1;
            self.counts.fetches_given_up += 1;
            self.try_next_source(block);
        }
    }

    /// When a fetch is given up next.
    pub(super) fn next_fetch_timeout(&self) -> Option<Instant> {
        let times = self.moves.values().filter_map(|(block, movement)| match movement {
            Movement::Fetch { started, .. } => Some(self.given_up_at(*block, *started)),
            _ => None,
        });
        times.min()
    }

    fn given_up_at(&self, block: BlockId, started: Instant) -> Instant {
        let limits = self.config.fetch;
        let others = self.catalog.remotes.get(&block).is_some_and(|r| !r.untried.is_empty());
        started + if others { limits.patience.min(limits.deadline) } else { limits.deadline }
    }

    /// Where a leased shard comes from.
    pub(super) fn origin(&self, id: BlockId) -> Origin {
        let entry = self.catalog.get(id);
        if let Some(tier) = entry.fastest() {
            return Origin::Tier(tier);
        }
        let first = self.catalog.remotes.get(&id).and_then(|r| r.untried.front());
        if first == Some(&Source::Floor) { Origin::Tier(Tier::Object) } else { Origin::Peer }
    }
}

impl Fetching {
    pub(super) const fn start(&mut self, bytes: u64) {
        self.count += 1;
        self.bytes += bytes;
    }

    pub(super) const fn end(&mut self, bytes: u64) {
        self.count -= 1;
        self.bytes -= bytes;
    }
}
