//! Lookups: from keys to leased frames.

use std::sync::Arc;

use kvtier_types::{
    BlockKey, GroupSpec, Instant, Layout, RequestHints, SemanticType, TenantId, Tier, Toleration, usable_prefix,
};

use super::readers::Readers;
use super::{Core, CoreError, Located, Look};
use crate::attachment::AttachmentId;
use crate::catalog::BlockId;
use crate::entry::Flags;
use crate::lease::{Begun, Lease, LeaseId, Leased};
use crate::ledger::MissReason;
use crate::limits::{MAX_KEYS_PER_CALL, MAX_LEASES_PER_ATTACHMENT, MAX_REQUEST_ID_BYTES};

/// Consecutive blocks of one group.
#[derive(Debug, Clone)]
pub struct LookupRange {
    /// Index of the group in the layout.
    pub group: u32,
    /// Index of the first block in the prefix.
    pub first_block: u32,
    /// Keys of the blocks.
    pub keys: Vec<BlockKey>,
}

/// What a request wants to load.
#[derive(Debug, Clone)]
pub struct LookupRequest {
    /// Who asks.
    pub attachment: AttachmentId,
    /// The request; a second lookup of one request replaces the first.
    pub request_id: String,
    /// Blocks in question, at most one range a group.
    pub ranges: Vec<LookupRange>,
    /// Tokens the engine holds itself.
    pub local_tokens: u32,
    /// Whose request it is.
    pub tenant: TenantId,
    /// What it said of itself.
    pub hints: RequestHints,
}

/// Shards of the blocks of one range, `None` where a shard is not visible.
pub(super) struct Probed {
    pub(super) group: u32,
    pub(super) first_block: u32,
    pub(super) shards: usize,
    pub(super) ids: Vec<Option<BlockId>>,
}

impl Probed {
    fn block(&self, index: u32) -> Option<&[Option<BlockId>]> {
        let at = index.checked_sub(self.first_block)? as usize * self.shards;
        self.ids.get(at..at + self.shards)
    }
}

impl Core {
    /// Finds what is usable of a request's prefix, leases it, and starts bringing up what lies on slower tiers.
    ///
    /// # Errors
    /// [`CoreError`] when the attachment is unknown or a bound is passed; nothing is leased then.
    pub fn lookup(&mut self, now: Instant, request: LookupRequest) -> Result<LeaseId, CoreError> {
        self.lookup_located(now, request, (&Look::default(), &Located::default()))
    }

    /// As [`Self::lookup`], after a look at its shards: some that were not here may have been found elsewhere. What was begun
    /// before with [`Self::begin_part`] need not be among them.
    ///
    /// # Errors
    /// As [`Self::lookup`].
    pub fn lookup_located(
        &mut self,
        now: Instant,
        request: LookupRequest,
        (look, located): (&Look, &Located),
    ) -> Result<LeaseId, CoreError> {
        self.check_lookup(&request)?;
        self.clock = self.clock.max(now);
        let begun = self.take_begun(request.attachment, &request.request_id);
        let interned = self.intern_remotes(request.attachment, &request.ranges, located);
        let leased = self.lease_prefix(now, request, (look, &begun));
        self.begun_came(&begun);
        self.forget_unwanted(&interned);
        self.pump();
        leased
    }

    fn lease_prefix(
        &mut self,
        now: Instant,
        request: LookupRequest,
        (look, begun): (&Look, &Begun),
    ) -> Result<LeaseId, CoreError> {
        let attachment = self.attached(request.attachment)?;
        let (layout, number) = (Arc::clone(&attachment.layout), attachment.layout_number);
        let readers = self.readers(attachment.engine);
        let mut probed: Vec<Probed> = Vec::with_capacity(request.ranges.len());
        let mut start = 0;
        for range in &request.ranges {
            let found = look.from(start);
            probed.push(self.probe(range, (number, layout.shards), &request.hints.tolerations, found));
            start += range.keys.len() * usize::from(layout.shards);
        }
        let max_tokens = prefix_end(&layout, &probed);
        let present = |g: usize, b: u32| {
            probed.iter().any(|p| p.group as usize == g && p.block(b).is_some_and(|s| s.iter().all(Option::is_some)))
        };
        let usable = usable_prefix(&layout.groups, request.local_tokens, max_tokens, present);
        let reasons = self.reasons(&request, &layout, &probed);
        let mut blocks = self.leasable(&probed, &layout.groups, (request.local_tokens, usable), &readers);
        if !begun.is_empty() {
            // What came meanwhile came from elsewhere, even if it is here by now.
            blocks
                .iter_mut()
                .for_each(|leased| leased.source = begun.get(&leased.id).copied().unwrap_or(leased.source));
        }
        let tips = ends(&probed, &layout.groups, usable);
        self.note_context(now, (&request.tenant, &request.hints), &tips);
        self.note_call(now, (&request.tenant, &request.hints));
        self.begin_call(now, &request, probed.iter().find(|p| p.group as usize == reference_group(&layout.groups)));
        let id = LeaseId(self.take_id());
        let lease = Lease {
            attachment: request.attachment,
            request_id: request.request_id.clone(),
            waiting: 0,
            local_tokens: request.local_tokens,
            asked: probed.iter().map(|p| (to_u16(p.group), p.first_block, to_u32(p.ids.len() / p.shards))).collect(),
            reasons,
            runs: Vec::new(),
            expires: now + self.config.lease_ttl,
            waits_since: None,
            of_program: !request.hints.block.program_id.is_empty(),
            corrupt: false,
            tolerations: request.hints.tolerations,
            begun: None,
            blocks,
        };
        let shared = self.shared_prefix(&lease.blocks, reference_group(&layout.groups));
        if let Some(last) = shared {
            self.hot.used(now, self.catalog.get(last).key);
            self.promote_shared((&lease.blocks, last), &layout.groups, &readers);
        }
        self.take_lease(id, lease, (&readers, begun));
        self.end_call();
        let attachment = self.attachments.get_mut(&request.attachment).ok_or(CoreError::UnknownAttachment)?;
        attachment.leases.insert(request.request_id, id);
        Ok(id)
    }

    pub(super) fn check_lookup(&self, request: &LookupRequest) -> Result<(), CoreError> {
        let attachment = self.attached(request.attachment)?;
        let keys: usize = request.ranges.iter().map(|r| r.keys.len()).sum();
        let limit = |what, max| Err(CoreError::Limit { what, max });
        if keys.saturating_mul(usize::from(attachment.layout.shards)) > MAX_KEYS_PER_CALL {
            return limit("shards in one lookup", MAX_KEYS_PER_CALL);
        }
        let is_another = !attachment.leases.contains_key(&request.request_id);
        if attachment.leases.len() >= MAX_LEASES_PER_ATTACHMENT && is_another {
            return limit("leases of one attachment", MAX_LEASES_PER_ATTACHMENT);
        }
        if request.request_id.len() > MAX_REQUEST_ID_BYTES {
            return limit("bytes of a request id", MAX_REQUEST_ID_BYTES);
        }
        let groups = &attachment.layout.groups;
        for (index, range) in request.ranges.iter().enumerate() {
            let unknown = CoreError::UnknownGroup { group: range.group, groups: groups.len() };
            let spec = groups.get(range.group as usize).ok_or(unknown)?;
            let end = range.first_block.checked_add(to_u32(range.keys.len()));
            if end.and_then(|end| end.checked_mul(spec.block_tokens)).is_none() {
                return Err(CoreError::BadRange { what: "it ends beyond the tokens that 32 bits count" });
            }
            if request.ranges[..index].iter().any(|r| r.group == range.group) {
                return Err(CoreError::BadRange { what: "its group is asked for twice" });
            }
        }
        Ok(())
    }

    fn probe(
        &self,
        range: &LookupRange,
        (layout, shards): (u16, u16),
        tolerations: &[Toleration],
        found: impl Iterator<Item = Option<BlockId>>,
    ) -> Probed {
        let may_have = |id: &BlockId| self.may_have(self.catalog.get(*id), tolerations);
        let keys = range.keys.iter().flat_map(|key| (0..shards).map(move |shard| (key, shard)));
        let visible = |((key, shard), id)| self.catalog.find_again(id, key, layout, shard).filter(may_have);
        let mut ids = Vec::with_capacity(range.keys.len() * usize::from(shards));
        ids.extend(keys.zip(found).map(visible));
        Probed { group: range.group, first_block: range.first_block, shards: usize::from(shards), ids }
    }

    /// Why each block of the reference group is missing, should it not be offered.
    fn reasons(&self, request: &LookupRequest, layout: &Layout, probed: &[Probed]) -> Vec<MissReason> {
        let reference = reference_group(&layout.groups);
        let Some(range) = request.ranges.iter().find(|r| r.group as usize == reference) else { return Vec::new() };
        let Some(probed) = probed.iter().find(|p| p.group as usize == reference) else { return Vec::new() };
        let Ok(attachment) = self.attached(request.attachment) else { return Vec::new() };
        let mut carried = MissReason::Novel;
        let mut out = Vec::with_capacity(range.keys.len());
        for (key, ids) in range.keys.iter().zip(probed.ids.chunks(probed.shards)) {
            if ids.iter().all(Option::is_some) {
                out.push(carried);
                continue;
            }
            let shards = (0..layout.shards).filter_map(|s| self.catalog.find(key, attachment.layout_number, s));
            let missing = shards.clone().find(|id| !self.catalog.get(*id).offered());
            let any = self.catalog.find(key, attachment.layout_number, 0);
            let over = |id: BlockId| self.catalog.get(id).expires <= self.clock;
            let denied = |id: BlockId| self.denies(self.catalog.get(id), &request.hints.tolerations);
            carried = match (missing, any) {
                (None, Some(_)) if shards.clone().any(over) => MissReason::Expired,
                (None, Some(_)) if shards.clone().any(denied) => MissReason::Denied,
                (Some(id), _) if self.catalog.get(id).flags.has(Flags::RESERVED) => MissReason::Busy,
                (Some(_), _) | (None, None) => self.miss_reason(key),
                // It is here: if it is not offered, that is because of what came before it.
                (None, Some(_)) => carried,
            };
            out.push(carried);
        }
        out
    }

    fn leasable(
        &self,
        probed: &[Probed],
        groups: &[GroupSpec],
        (local, usable): (u32, u32),
        readers: &Readers,
    ) -> Vec<Leased> {
        let mut out = Vec::with_capacity(probed.iter().map(|range| range.ids.len()).sum());
        for range in probed {
            let spec = &groups[range.group as usize];
            for block in spec.needed_blocks(usable) {
                let held_by_engine = (block + 1) * spec.block_tokens <= local;
                let Some(ids) = range.block(block).filter(|_| !held_by_engine) else { continue };
                for (shard, id) in ids.iter().enumerate() {
                    let Some(id) = *id else { continue };
                    let (group, shard) = (to_u16(range.group), to_u16(to_u32(shard)));
                    let source = self.origin_for(id, (shard, readers));
                    out.push(Leased { id, group, shard, block, source });
                }
            }
        }
        out.sort_unstable_by_key(|l| (l.group, l.block, l.shard));
        out
    }

    /// The last of the leading blocks that others are likely to use too: system prompts, tools, and what more than one program
    /// holds.
    fn shared_prefix(&self, blocks: &[Leased], reference: usize) -> Option<BlockId> {
        let of_group = blocks.iter().filter(|l| usize::from(l.group) == reference && l.shard == 0);
        let is_shared = |id: &BlockId| {
            let entry = self.catalog.get(*id);
            matches!(entry.semantic, SemanticType::SystemPrompt | SemanticType::ToolDefinition) || entry.held > 1
        };
        of_group.map(|l| l.id).take_while(is_shared).last()
    }

    fn take_lease(&mut self, id: LeaseId, mut lease: Lease, (readers, begun): (&Readers, &Begun)) {
        let now = self.next_tick();
        for leased in &lease.blocks {
            // That it was begun was its use.
            let tick = if begun.contains_key(&leased.id) { self.catalog.get(leased.id).touched } else { now };
            self.lease_entry(leased.id, tick);
            let on_device = self.readable(leased.id, (leased.shard, readers)).is_some();
            if self.catalog.get(leased.id).host.is_none() && !on_device {
                lease.waiting += 1;
                self.waiters.entry(leased.id).or_default().push(id);
                self.want_host(leased.id);
            }
        }
        // Of requests without a program nothing else is known that it could be compared with.
        lease.waits_since = (lease.of_program && lease.waiting > 0).then_some(self.clock);
        self.leases.insert(id, lease);
    }

    pub(super) fn in_host(&self, id: BlockId) -> bool {
        let entry = self.catalog.get(id);
        entry.resident(Tier::Host) && !entry.flags.has(Flags::DOOMED)
    }
}

/// The group whose blocks stand for the prefix's tokens in the ledger.
pub(super) fn reference_group(groups: &[GroupSpec]) -> usize {
    groups.iter().position(|g| g.kind.needs_ancestors()).unwrap_or(0)
}

/// The last blocks of what is usable, of each group and shard: where the request's context ends so far.
fn ends(probed: &[Probed], groups: &[GroupSpec], usable: u32) -> Vec<BlockId> {
    let of_range = |range: &Probed| {
        let last = groups[range.group as usize].needed_blocks(usable).next_back();
        last.and_then(|block| range.block(block)).unwrap_or_default().iter().flatten().copied().collect::<Vec<_>>()
    };
    probed.iter().flat_map(of_range).collect()
}

fn prefix_end(layout: &Layout, probed: &[Probed]) -> u32 {
    let end = |p: &Probed| {
        let blocks = p.first_block.saturating_add(to_u32(p.ids.len() / p.shards));
        blocks.saturating_mul(layout.groups[p.group as usize].block_tokens)
    };
    probed.iter().map(end).max().unwrap_or(0)
}

/// Counts here are bounded by [`MAX_KEYS_PER_CALL`].
pub(super) fn to_u32(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

pub(super) fn to_u16(n: u32) -> u16 {
    u16::try_from(n).unwrap_or(u16::MAX)
}
