//! A long lookup in parts: what the directory said of the first blocks is fetched while it is asked for the next.
//!
//! *Invariants*: what was begun is leased under its request, with the blocks before it, so that whatever ends the request ends
//! it and nothing of the prefix goes to make room for the rest; the lookup itself takes its place, and whatever is under way
//! by then goes on for that. A block that was begun counts as used once.

use std::ops::Range;

use kvtier_types::{Instant, Tier};

use super::{Core, CoreError, Located, Look, LookupRange, LookupRequest};
use crate::attachment::AttachmentId;
use crate::catalog::BlockId;
use crate::entry::Flags;
use crate::evict::SegmentId;
use crate::lease::{Begun, Lease, LeaseId, Leased};

impl Core {
    /// Starts bringing a part of a lookup's shards that others are said to have, up to the first block that is neither here
    /// nor there. More parts follow, in order, and then [`Core::lookup_located`] with what was located for the last.
    ///
    /// # Errors
    /// As [`Core::lookup`].
    pub fn begin_part(
        &mut self,
        now: Instant,
        request: &LookupRequest,
        (look, part, located): (&Look, Range<usize>, &Located),
    ) -> Result<(), CoreError> {
        self.check_lookup(request)?;
        self.clock = self.clock.max(now);
        let Some(range) = request.ranges.first() else { return Ok(()) };
        let (blocks, unknown) = look.blocks_of(&part);
        // With the block before them, which is the first one's parent.
        let before = unknown.saturating_sub(1);
        let first_block = range.first_block.saturating_add(u32::try_from(before).unwrap_or(u32::MAX));
        let of_part = LookupRange { group: range.group, first_block, keys: range.keys[before..blocks.end].to_vec() };
        let lease = match self.begun_lease(request.attachment, &request.request_id) {
            Some(lease) if part.start > 0 => lease,
            _ => self.begin_lease(now, request)?,
        };
        let interned = self.intern_remotes(request.attachment, &[of_part], located);
        let (held, begun) = self.begin_blocks(request, (look, blocks))?;
        let tick = self.next_tick();
        for leased in &held {
            let is_begun = begun.contains_key(&leased.id);
            self.catalog.touch(leased.id, |entry| {
                entry.leases += 1;
                entry.touched = if is_begun { tick } else { entry.touched };
            });
            if is_begun {
                self.waiters.entry(leased.id).or_default().push(lease);
                self.want_host(leased.id);
            }
        }
        if let Some(lease) = self.leases.get_mut(&lease) {
            lease.waiting += begun.len();
            lease.blocks.extend(held);
            lease.begun.get_or_insert_default().extend(begun);
        }
        self.forget_unwanted(&interned);
        self.pump();
        Ok(())
    }

    /// Shards of these blocks of the only range up to the first that is missing, and those of them that must be fetched.
    fn begin_blocks(
        &self,
        request: &LookupRequest,
        (look, blocks): (&Look, Range<usize>),
    ) -> Result<(Vec<Leased>, Begun), CoreError> {
        let attachment = self.attached(request.attachment)?;
        let (number, shards) = (attachment.layout_number, attachment.layout.shards);
        let tokens = attachment.layout.groups.first().map_or(0, |group| group.block_tokens);
        let (mut held, mut begun) = (Vec::new(), Begun::default());
        let Some(range) = request.ranges.first() else { return Ok((held, begun)) };
        let group = u16::try_from(range.group).unwrap_or(u16::MAX);
        let mut found = look.from(blocks.start * usize::from(shards));
        for at in blocks {
            let block = range.first_block.saturating_add(u32::try_from(at).unwrap_or(u32::MAX));
            let by_engine = block.saturating_add(1).saturating_mul(tokens) <= request.local_tokens;
            for shard in 0..shards {
                let known = self.catalog.find_again(found.next().flatten(), &range.keys[at], number, shard);
                if by_engine {
                    continue;
                }
                let Some(id) = known else { return Ok((held, begun)) };
                let entry = self.catalog.get(id);
                if entry.flags.has(Flags::REMOTE) && !entry.flags.has(Flags::DOOMED) {
                    begun.insert(id, self.origin(id));
                } else if !self.may_have(entry, &request.hints.tolerations) {
                    return Ok((held, begun));
                }
                held.push(Leased { id, group, shard, block, source: self.origin(id) });
            }
        }
        Ok((held, begun))
    }

    /// A lease of nothing yet, in the place of the request's former one.
    fn begin_lease(&mut self, now: Instant, request: &LookupRequest) -> Result<LeaseId, CoreError> {
        self.release_request(request.attachment, &request.request_id);
        let id = LeaseId(self.take_id());
        let attachment = self.attachments.get_mut(&request.attachment).ok_or(CoreError::UnknownAttachment)?;
        attachment.leases.insert(request.request_id.clone(), id);
        let lease = Lease {
            attachment: request.attachment,
            request_id: request.request_id.clone(),
            waiting: 0,
            local_tokens: request.local_tokens,
            asked: Vec::new(),
            reasons: Vec::new(),
            runs: Vec::new(),
            expires: now + self.config.lease_ttl,
            waits_since: None,
            of_program: false,
            corrupt: false,
            tolerations: Vec::new(),
            begun: Some(Begun::default()),
            blocks: Vec::new(),
        };
        self.leases.insert(id, lease);
        Ok(id)
    }

    fn begun_lease(&self, attachment: AttachmentId, request_id: &str) -> Option<LeaseId> {
        let lease = self.attachments.get(&attachment)?.leases.get(request_id)?;
        self.leases.get(lease)?.begun.is_some().then_some(*lease)
    }

    /// Ends a request's lease for the lookup that takes its place. Answers with what was begun for it: it is as if the first
    /// use of what came of that were still ahead.
    pub(super) fn take_begun(&mut self, attachment: AttachmentId, request_id: &str) -> Begun {
        let lease = self.begun_lease(attachment, request_id).and_then(|lease| self.leases.get_mut(&lease));
        let mut begun = lease.and_then(|lease| lease.begun.take()).unwrap_or_default();
        self.release_request(attachment, request_id);
        begun.retain(|id, _| self.catalog.try_get(*id).is_some());
        for id in begun.keys() {
            let segment = self.catalog.get(*id).segment;
            if segment != SegmentId::NONE && self.catalog.get(*id).resident(Tier::Host) {
                self.catalog.segments.leave(segment);
                self.catalog.touch(*id, |entry| entry.segment = SegmentId::NONE);
            }
        }
        begun
    }

    /// Whether a block is fetched for a lookup that is still being located, so that it is not known who reads it.
    pub(super) fn is_begun(&self, id: BlockId) -> bool {
        let is_begun = |lease: &LeaseId| self.leases.get(lease).is_some_and(|lease| lease.begun.is_some());
        self.waiters.get(&id).is_some_and(|leases| leases.iter().any(is_begun))
    }

    /// What came before its lookup, and that nobody holds now that this is known, is its writer's.
    pub(super) fn begun_came(&mut self, begun: &Begun) {
        for id in begun.keys() {
            let alone = |e: &crate::entry::Entry| e.resident(Tier::Host) && e.held == 0 && !e.flags.has(Flags::COMMON);
            if self.catalog.try_get(*id).is_some_and(alone) {
                self.held_by_writer(*id, u64::MAX);
            }
        }
    }
}
