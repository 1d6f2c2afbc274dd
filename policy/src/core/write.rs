//! The way in: reserve frames, seal them.

use kvtier_types::{BlockHints, BlockKey, Instant, TenantId, Tier};

use super::{Core, CoreError, Reserved};
use crate::attachment::AttachmentId;
use crate::catalog::{BlockId, Scope};
use crate::entry::{Entry, Flags};
use crate::frame::{Allocation, FrameRef};
use crate::ledger::MissReason;
use crate::limits::{MAX_KEYS_PER_CALL, MAX_SCOPES, VICTIM_SCAN};

/// Blocks an engine is about to write: consecutive blocks of one group.
#[derive(Debug, Clone)]
pub struct ReserveRequest {
    /// Who writes.
    pub attachment: AttachmentId,
    /// The block before the first, `None` at the start of a prefix.
    pub parent: Option<BlockKey>,
    /// Index of the group in the layout.
    pub group: u32,
    /// Index of the first block in the prefix.
    pub first_block: u32,
    /// Keys of the blocks.
    pub keys: Vec<BlockKey>,
    /// Who owns them.
    pub tenant: TenantId,
    /// What the request said of them.
    pub hints: BlockHints,
}

/// The answer for one block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reservation {
    /// Write these frames, one a shard, and seal them.
    Granted(Vec<FrameRef>),
    /// Every shard is stored already.
    Present,
    /// No room now, or somebody else is writing it: skip it.
    Busy,
}

/// One written frame, or one given up.
#[derive(Debug, Clone, Copy)]
pub struct SealRequest {
    /// The block.
    pub key: BlockKey,
    /// Its shard.
    pub shard: u16,
    /// The frame it was written to.
    pub frame: FrameRef,
    /// CRC-64/NVME of what was written.
    pub checksum: u64,
    /// The writer gave up.
    pub abandoned: bool,
}

/// What became of a seal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SealOutcome {
    /// Published, or freed when it was given up.
    Applied,
    /// It was sealed before.
    Duplicate,
    /// The reservation was reaped: the bytes are lost, which is a miss later.
    Missing,
    /// The frame is not this engine's reservation for that key.
    Rejected,
}

/// What a batch of reservations has in common.
struct Batch {
    tick: u64,
    expires: Instant,
    layout: u16,
    shards: u16,
    engine: u32,
    scope: u32,
    program: u32,
    bytes: u32,
    needs_ancestors: bool,
}

impl Core {
    /// Frames for blocks about to be written, evicting what may go to make room. One answer a block.
    ///
    /// # Errors
    /// [`CoreError`] when the attachment or group is unknown or a bound is passed; nothing is reserved then.
    pub fn reserve(&mut self, now: Instant, request: &ReserveRequest) -> Result<Vec<Reservation>, CoreError> {
        let batch = self.batch(now, request)?;
        let mut parents: Vec<Option<BlockId>> = (0..batch.shards)
            .map(|shard| request.parent.as_ref().and_then(|p| self.catalog.find(p, batch.layout, shard)))
            .collect();
        let mut answers = Vec::with_capacity(request.keys.len());
        for (index, key) in request.keys.iter().enumerate() {
            let depth = request.first_block.saturating_add(u32::try_from(index).unwrap_or(u32::MAX));
            let template = template(&batch, request, key, depth);
            let answer = self.reserve_block(&batch, &template, &parents);
            let slot = match &answer {
                Reservation::Granted(_) => 0,
                Reservation::Present => 1,
                Reservation::Busy => 2,
            };
            self.counts.reserved[slot] += 1;
            answers.push(answer);
            parents = (0..batch.shards).map(|shard| self.catalog.find(key, batch.layout, shard)).collect();
        }
        self.catalog.scopes.release(batch.scope);
        self.catalog.programs.release(batch.program);
        self.pump();
        Ok(answers)
    }

    fn batch(&mut self, now: Instant, request: &ReserveRequest) -> Result<Batch, CoreError> {
        let attachment = self.attached(request.attachment)?;
        let layout = &attachment.layout;
        let group = request.group as usize;
        let groups = layout.groups.len();
        let unknown = CoreError::UnknownGroup { group: request.group, groups };
        let spec = layout.groups.get(group).ok_or(unknown)?;
        if request.keys.len().saturating_mul(usize::from(layout.shards)) > MAX_KEYS_PER_CALL {
            return Err(CoreError::Limit { what: "shards in one reservation", max: MAX_KEYS_PER_CALL });
        }
        if self.catalog.scopes.len() > MAX_SCOPES {
            return Err(CoreError::Limit { what: "namespaces", max: MAX_SCOPES });
        }
        let bytes = u32::try_from(layout.block_bytes[group])
            .map_err(|_| CoreError::Limit { what: "bytes of a block", max: u32::MAX as usize })?;
        let scope = Scope {
            namespace: attachment.namespace,
            model: attachment.spec.namespace.model.clone(),
            tenant: request.tenant.clone(),
            layout: layout.id(),
        };
        let (number, shards, engine) = (attachment.layout_number, layout.shards, attachment.engine);
        let needs_ancestors = spec.kind.needs_ancestors();
        let scope = self.catalog.scopes.acquire(&scope);
        let program = self.catalog.programs.acquire(&request.hints.program_id);
        let (tick, expires) = (self.next_tick(), now + self.config.reserve_ttl);
        Ok(Batch { tick, expires, layout: number, shards, engine, scope, program, bytes, needs_ancestors })
    }

    /// All shards or none.
    fn reserve_block(&mut self, batch: &Batch, template: &Entry, parents: &[Option<BlockId>]) -> Reservation {
        let known: Vec<Option<BlockId>> =
            (0..batch.shards).map(|s| self.catalog.find(&template.key, batch.layout, s)).collect();
        if known.iter().all(|id| id.is_some_and(|id| self.catalog.get(id).visible())) {
            for id in known.into_iter().flatten() {
                self.catalog.update(id, |e| e.touched = template.touched);
            }
            return Reservation::Present;
        }
        // Part of it is there (a shard was lost, or a copy waits to go): whoever has it may still be using it.
        if known.iter().flatten().any(|id| self.catalog.get(*id).in_use()) {
            return Reservation::Busy;
        }
        for id in known.iter().flatten() {
            if self.catalog.try_get(*id).is_some() {
                self.drop_all(*id);
            }
        }
        let mut frames = Vec::with_capacity(usize::from(batch.shards));
        for _ in 0..batch.shards {
            if let Some(frame) = self.host_frame(u64::from(batch.bytes)) {
                frames.push(frame);
            } else {
                for frame in frames {
                    self.free_frame(frame, u64::from(batch.bytes));
                }
                return Reservation::Busy;
            }
        }
        let reserved = Reserved { engine: batch.engine, expires: batch.expires };
        for (shard, frame) in (0..).zip(&frames) {
            let parent = parents[usize::from(shard)].filter(|p| self.catalog.try_get(*p).is_some());
            let entry = Entry { shard, host: Some(*frame), parent, ..template.clone() };
            self.insert_reserved(entry, reserved);
        }
        Reservation::Granted(frames)
    }

    fn insert_reserved(&mut self, mut entry: Entry, reserved: Reserved) {
        let id = if let Some(id) = self.catalog.find(&entry.key, entry.layout, entry.shard) {
            // What is left of it keeps the tree below in shape.
            self.catalog.update(id, |e| {
                e.host = entry.host;
                e.engine = reserved.engine;
                e.flags.set(Flags::RESERVED, true);
                e.flags.set(Flags::DOOMED | Flags::FETCHED | Flags::READ, false);
            });
            id
        } else {
            let scope = self.catalog.scopes.get(entry.scope).clone();
            let program = self.catalog.programs.get(entry.program).clone();
            entry.scope = self.catalog.scopes.acquire(&scope);
            entry.program = self.catalog.programs.acquire(&program);
            entry.flags.set(Flags::RESERVED, true);
            self.catalog.insert(entry)
        };
        self.reserved.insert(id, reserved);
    }

    /// A frame of host memory, evicting if that is what it takes. `None`: no room now.
    pub(super) fn host_frame(&mut self, bytes: u64) -> Option<FrameRef> {
        // One victim frees one frame of its class. A third try covers an extent that first has to change its class.
        for _ in 0..3 {
            match self.frames.alloc(bytes) {
                Allocation::Granted(frame) => {
                    self.host_used_bytes += self.frames.class(bytes);
                    return Some(frame);
                }
                Allocation::Growing => return None,
                Allocation::Full => {
                    if !self.evict_host(bytes) && !self.empty_extent(bytes) {
                        return None;
                    }
                }
            }
        }
        None
    }

    /// Evicts one block of the size class of `bytes`: the first in rank with a lower copy among the first few, else
    /// the first.
    fn evict_host(&mut self, bytes: u64) -> bool {
        let class = u32::try_from(bytes).unwrap_or(u32::MAX);
        let victim = self.host_victim(class);
        if let Some(victim) = victim {
            self.evict_copy(victim, Tier::Host);
        }
        victim.is_some()
    }

    fn host_victim(&self, class: u32) -> Option<BlockId> {
        let has_lower_copy = |id: &BlockId| {
            let entry = self.catalog.get(*id);
            entry.disk.is_some() || entry.object.is_some()
        };
        let mut candidates = self.catalog.pools().get(Tier::Host, class)?.victims().take(VICTIM_SCAN);
        let first = candidates.next()?;
        if has_lower_copy(&first) { Some(first) } else { Some(candidates.find(has_lower_copy).unwrap_or(first)) }
    }

    /// Evicts everything in the extent of another class that holds least, if all of it may go.
    fn empty_extent(&mut self, bytes: u64) -> bool {
        let Some(extent) = self.frames.victim_extent(bytes) else { return false };
        let inside: Vec<BlockId> = self
            .catalog
            .iter_from(0)
            .filter(|(_, e)| e.host.is_some_and(|f| f.extent == extent))
            .map(|(id, _)| id)
            .collect();
        if inside.is_empty() || inside.iter().any(|id| self.catalog.get(*id).in_use()) {
            return false;
        }
        for id in inside {
            if self.catalog.try_get(id).is_some() {
                self.evict_copy(id, Tier::Host);
            }
        }
        true
    }

    /// Drops a copy to make room, and remembers that the block was here if it was the last.
    pub(super) fn evict_copy(&mut self, id: BlockId, tier: Tier) {
        let key = self.catalog.get(id).key;
        self.counts.evicted[tier.index()] += 1;
        self.drop_copy(id, tier);
        let gone = self.catalog.try_get(id).is_none_or(|e| e.key != key || e.fastest().is_none());
        if gone {
            self.ghost.insert(&key, MissReason::Evicted);
        }
    }

    /// Publishes written frames, or frees those given up. One outcome an entry.
    ///
    /// # Errors
    /// [`CoreError::UnknownAttachment`].
    pub fn seal(&mut self, attachment: AttachmentId, seals: &[SealRequest]) -> Result<Vec<SealOutcome>, CoreError> {
        let sealer = self.attached(attachment)?;
        let (layout, engine) = (sealer.layout_number, sealer.engine);
        let outcomes = seals.iter().map(|seal| self.seal_one(layout, engine, seal)).collect();
        self.pump();
        Ok(outcomes)
    }

    fn seal_one(&mut self, layout: u16, engine: u32, seal: &SealRequest) -> SealOutcome {
        let Some(id) = self.catalog.find(&seal.key, layout, seal.shard) else { return SealOutcome::Missing };
        let entry = self.catalog.get(id);
        if entry.host != Some(seal.frame) {
            return SealOutcome::Missing;
        }
        if !entry.flags.has(Flags::RESERVED) {
            return if seal.abandoned { SealOutcome::Rejected } else { SealOutcome::Duplicate };
        }
        if entry.engine != engine {
            return SealOutcome::Rejected;
        }
        if seal.abandoned {
            self.abandon(id);
            return SealOutcome::Applied;
        }
        self.reserved.remove(&id);
        self.counts.sealed += 1;
        self.catalog.update(id, |e| {
            e.checksum = seal.checksum;
            e.flags.set(Flags::RESERVED, false);
        });
        if self.config.eager_offload {
            self.queue_offload(id);
        }
        SealOutcome::Applied
    }

    /// Stores hints for blocks written earlier. One answer a key: whether it is known.
    ///
    /// # Errors
    /// [`CoreError::UnknownAttachment`].
    pub fn annotate(
        &mut self,
        attachment: AttachmentId,
        keys: &[BlockKey],
        hints: &BlockHints,
    ) -> Result<Vec<bool>, CoreError> {
        let annotator = self.attached(attachment)?;
        let (layout, shards) = (annotator.layout_number, annotator.layout.shards);
        let mut known = Vec::with_capacity(keys.len());
        for key in keys {
            let ids: Vec<BlockId> = (0..shards).filter_map(|s| self.catalog.find(key, layout, s)).collect();
            for id in &ids {
                let program = self.catalog.programs.acquire(&hints.program_id);
                let former = self.catalog.get(*id).program;
                self.catalog.update(*id, |e| {
                    e.semantic = hints.semantic;
                    e.program = program;
                });
                self.catalog.programs.release(former);
            }
            known.push(!ids.is_empty());
        }
        Ok(known)
    }
}

/// The entry of a block to be written, without shard, frame and parent.
fn template(batch: &Batch, request: &ReserveRequest, key: &BlockKey, depth: u32) -> Entry {
    let mut flags = Flags::default();
    flags.set(Flags::NEEDS_ANCESTORS, batch.needs_ancestors);
    let group = u16::try_from(request.group).expect("the group is in the layout");
    Entry {
        touched: batch.tick,
        engine: batch.engine,
        depth_blocks: depth,
        semantic: request.hints.semantic,
        ..Entry::bare(*key, (batch.layout, 0), group, batch.bytes, (batch.scope, batch.program, flags))
    }
}
