//! The way in: reserve frames, seal them.

use kvtier_types::{BlockKey, Instant, RequestHints, TenantId, Tier};

use super::marks::union;
use super::{Core, CoreError, Reserved};
use crate::attachment::AttachmentId;
use crate::catalog::{BlockId, Scope};
use crate::entry::{Entry, Flags, NEVER};
use crate::evict::SegmentId;
use crate::frame::FrameRef;
use crate::ledger::MissReason;
use crate::limits::{MAX_KEYS_PER_CALL, MAX_SCOPES};

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
    pub hints: RequestHints,
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
    taints: u32,
    bytes: u32,
    needs_ancestors: bool,
}

impl Core {
    /// Frames for blocks about to be written, evicting what may go to make room. One answer a block.
    ///
    /// # Errors
    /// [`CoreError`] when the attachment or group is unknown or a bound is passed; nothing is reserved then.
    pub fn reserve(&mut self, now: Instant, request: &ReserveRequest) -> Result<Vec<Reservation>, CoreError> {
        self.tell_time(now);
        let batch = self.batch(now, request)?;
        let mut parents: Vec<Option<BlockId>> = (0..batch.shards)
            .map(|shard| request.parent.as_ref().and_then(|p| self.catalog.find(p, batch.layout, shard)))
            .collect();
        let mut answers = Vec::with_capacity(request.keys.len());
        let mut ends = parents.clone();
        self.continue_call(now, (&request.tenant, &request.hints), request.keys.len());
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
            ends = parents.iter().zip(ends).map(|(here, before)| here.or(before)).collect();
        }
        self.end_call();
        // Making room for the later ones may have taken the earlier ones.
        let tips: Vec<BlockId> = ends.into_iter().flatten().filter(|id| self.catalog.try_get(*id).is_some()).collect();
        self.note_context(now, (&request.tenant, &request.hints), &tips);
        self.note_written(now, (&request.tenant, &request.hints));
        self.catalog.scopes.release(batch.scope);
        self.catalog.programs.release(batch.program);
        self.catalog.taints.release(batch.taints);
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
        let program = self.catalog.programs.acquire(&request.hints.block.program_id);
        let taints = self.catalog.taints.acquire(&request.hints.block.taints);
        let (tick, expires) = (self.next_tick(), now + self.config.reserve_ttl);
        Ok(Batch { tick, expires, layout: number, shards, engine, scope, program, taints, bytes, needs_ancestors })
    }

    /// All shards or none.
    fn reserve_block(&mut self, batch: &Batch, template: &Entry, parents: &[Option<BlockId>]) -> Reservation {
        let find = |core: &Self| -> Vec<Option<BlockId>> {
            (0..batch.shards).map(|s| core.catalog.find(&template.key, batch.layout, s)).collect()
        };
        let is_here = |core: &Self, known: &[Option<BlockId>]| {
            known.iter().all(|id| id.is_some_and(|id| core.catalog.get(id).readable()))
        };
        let mut known = find(self);
        if is_here(self, &known) {
            for id in known.into_iter().flatten() {
                self.reuse(id, template);
            }
            // What its writer says now may forbid the only tier that had it: then it is to be written.
            known = find(self);
            if is_here(self, &known) {
                return Reservation::Present;
            }
        }
        // Part of it is there (a shard was lost, or a copy waits to go): whoever has it may still be using it.
        if known.iter().flatten().any(|id| self.catalog.get(*id).in_use()) {
            return Reservation::Busy;
        }
        // Copies that could not be read a moment ago may be good: they go once there is room for what replaces them.
        let may_be_good = known.iter().flatten().any(|id| self.catalog.get(*id).flags.has(Flags::UNREAD));
        if !may_be_good {
            self.drop_each(&known);
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
        if may_be_good {
            // Making room may have taken some.
            let known = find(self);
            self.drop_each(&known);
        }
        let reserved = Reserved { engine: batch.engine, expires: batch.expires };
        for (shard, frame) in (0..).zip(&frames) {
            let parent = parents[usize::from(shard)].filter(|p| self.catalog.try_get(*p).is_some());
            let entry = Entry { shard, host: Some(*frame), parent, ..template.clone() };
            self.insert_reserved(entry, reserved);
        }
        Reservation::Granted(frames)
    }

    fn drop_each(&mut self, ids: &[Option<BlockId>]) {
        for id in ids.iter().flatten() {
            if self.catalog.try_get(*id).is_some() {
                self.drop_all(*id);
            }
        }
    }

    /// A block that is here already was written again. One that spans two types is of the more durable one, and what either
    /// writer said to keep it from readers and from other places holds.
    fn reuse(&mut self, id: BlockId, template: &Entry) {
        let former = self.catalog.get(id).semantic;
        let semantic = former.more_durable(template.semantic);
        let confined = self.confined_by(id, template.taints);
        self.use_entry(id, |e| {
            e.touched = template.touched;
            e.semantic = semantic;
        });
        if let Some(taints) = &confined {
            self.set_taints(id, taints);
        }
        if semantic != former || confined.is_some() {
            self.remarked(id);
            self.relive(id, None);
        }
    }

    fn insert_reserved(&mut self, mut entry: Entry, reserved: Reserved) {
        let scope = self.catalog.scopes.share(entry.scope);
        let program = self.catalog.programs.share(entry.program);
        let taints = self.catalog.taints.share(entry.taints);
        let (semantic, taints) = self.marked_anew(&entry.key, entry.semantic, taints);
        (entry.semantic, entry.taints) = (semantic, taints);
        let id = if let Some(id) = self.catalog.find(&entry.key, entry.layout, entry.shard) {
            // What is left of it keeps the tree below in shape.
            let former = self.catalog.get(id);
            let (old_scope, old_program, old_taints) = (former.scope, former.program, former.taints);
            self.catalog.ephemeral.remove(&id);
            self.use_entry(id, |e| {
                if e.bytes != entry.bytes {
                    // Another size class, whose ranking has not heard of it.
                    e.flags.set(Flags::KNOWN_HOST, false);
                }
                (e.touched, e.bytes, e.group, e.depth_blocks) =
                    (entry.touched, entry.bytes, entry.group, entry.depth_blocks);
                e.host = entry.host;
                (e.scope, e.program, e.taints) = (scope, program, taints);
                e.semantic = entry.semantic;
                e.expires = NEVER;
                e.engine = reserved.engine;
                e.flags.set(Flags::RESERVED, true);
                e.flags.set(Flags::DOOMED | Flags::FETCHED | Flags::READ, false);
            });
            self.catalog.scopes.release(old_scope);
            self.catalog.programs.release(old_program);
            self.catalog.taints.release(old_taints);
            id
        } else {
            entry.flags.set(Flags::RESERVED, true);
            entry.segment = self.catalog.segments.use_block(SegmentId::NONE, entry.semantic);
            let id = self.catalog.insert(entry);
            self.arrived(id);
            id
        };
        self.reserved.insert(id, reserved);
    }

    /// Drops a copy to make room, and remembers that the block was here if it was the last.
    pub(super) fn evict_copy(&mut self, id: BlockId, tier: Tier) {
        let key = self.catalog.get(id).key;
        self.counts.evicted[tier.index()] += 1;
        let former = self.catalog.events.because("evicted");
        self.drop_copy(id, tier);
        self.catalog.events.because(former);
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
        if self.catalog.get(id).flags.has(Flags::DOOMED) {
            // Its program was abandoned while it was written.
            self.finish_doomed(id);
            return SealOutcome::Applied;
        }
        self.relive(id, None);
        if self.config.eager_offload {
            self.queue_offload(id);
        }
        SealOutcome::Applied
    }

    /// What an engine says of a block later adds to what is known of it: the more durable type, further taints.
    fn annotate_one(&mut self, id: BlockId, hints: &RequestHints) {
        let entry = self.catalog.get(id);
        let semantic = entry.semantic.more_durable(hints.block.semantic);
        let taints = union(self.taints(entry), &hints.block.taints);
        if semantic == entry.semantic && taints == self.taints(entry) {
            return;
        }
        self.set_taints(id, &taints);
        self.catalog.update(id, |e| e.semantic = semantic);
        if self.catalog.get(id).visible() {
            self.remarked(id);
            self.relive(id, None);
        }
    }

    /// Stores hints for blocks written earlier. One answer a key: whether it is known.
    ///
    /// # Errors
    /// [`CoreError::UnknownAttachment`].
    pub fn annotate(
        &mut self,
        attachment: AttachmentId,
        keys: &[BlockKey],
        hints: &RequestHints,
    ) -> Result<Vec<bool>, CoreError> {
        let annotator = self.attached(attachment)?;
        let (layout, shards) = (annotator.layout_number, annotator.layout.shards);
        let mut known = Vec::with_capacity(keys.len());
        let mut tips: Vec<BlockId> = Vec::new();
        for key in keys {
            let ids: Vec<BlockId> = (0..shards).filter_map(|s| self.catalog.find(key, layout, s)).collect();
            for id in &ids {
                let program = self.catalog.programs.acquire(&hints.block.program_id);
                let former = self.catalog.get(*id).program;
                self.catalog.update(*id, |e| e.program = program);
                self.catalog.programs.release(former);
                self.annotate_one(*id, hints);
            }
            known.push(!ids.is_empty());
            if !ids.is_empty() {
                tips = ids;
            }
        }
        // What was said of one may have taken its last copy.
        tips.retain(|id| self.catalog.try_get(*id).is_some());
        if let Some(first) = tips.first() {
            let tenant = self.catalog.scopes.get(self.catalog.get(*first).scope).tenant.clone();
            self.note_context(self.clock, (&tenant, hints), &tips);
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
        semantic: request.hints.block.semantic,
        taints: batch.taints,
        ..Entry::bare(*key, (batch.layout, 0), group, batch.bytes, (batch.scope, batch.program, flags))
    }
}
