//! A long lookup in parts: what the directory said of the first blocks is fetched while it is asked for the next.
//!
//! *Invariants*: what was begun is leased under its request, with all that is here of the prefix, so that whatever ends the
//! request ends it and nothing of the prefix goes to make room for the rest; the lookup itself takes its place, and whatever
//! is under way by then goes on for that. A block that was begun counts as used once.

use std::ops::Range;

use kvtier_types::{Instant, Tier};

use super::lookup::{to_u16, to_u32};
use super::{Core, CoreError, Located, Look, LookupRange, LookupRequest};
use crate::attachment::AttachmentId;
use crate::catalog::BlockId;
use crate::entry::{Entry, Flags};
use crate::evict::SegmentId;
use crate::lease::{Begun, Lease, LeaseId, Leased};

impl Core {
    /// Starts bringing a part of a lookup's shards that others are said to have, up to the first block that is neither here
    /// nor there. Answers whether there was no such block: then the next part may follow, and after the last but one
    /// [`Core::lookup_located`] with what was located for the last; otherwise that follows now, with what was located for
    /// this part.
    ///
    /// # Errors
    /// As [`Core::lookup`].
    pub fn begin_part(
        &mut self,
        now: Instant,
        request: &LookupRequest,
        (look, part, located): (&Look, Range<usize>, &Located),
    ) -> Result<bool, CoreError> {
        self.check_lookup(request)?;
        self.clock = self.clock.max(now);
        let Some(range) = request.ranges.first() else { return Ok(false) };
        let attachment = self.attached(request.attachment)?;
        let (number, shards) = (attachment.layout_number, attachment.layout.shards);
        let tokens = attachment.layout.groups.first().map_or(0, |group| group.block_tokens);
        let is_first = part.start == 0;
        let lease = match self.begun_lease(request.attachment, &request.request_id) {
            _ if is_first => self.begin_lease(now, request)?,
            Some(lease) if self.is_coming(lease) => lease,
            // It was ended meanwhile, or what was begun did not come.
            _ => return Ok(false),
        };
        let (blocks, unknown) = look.blocks_of(&part);
        // With the block before them, which is the first one's parent.
        let before = unknown.saturating_sub(1);
        let first_block = range.first_block.saturating_add(to_u32(before));
        let of_part = LookupRange { group: range.group, first_block, keys: range.keys[before..blocks.end].to_vec() };
        let interned = self.intern_remotes(request.attachment, &[of_part], located);
        let tick = self.next_tick();
        let (mut held, mut begun, mut whole) = (Vec::new(), Begun::default(), true);
        // What is here is held with the first part, what came since with its own.
        let end = if is_first { range.keys.len() } else { blocks.end };
        let mut known = look.from(blocks.start * usize::from(shards));
        for at in blocks.start..end {
            let block = range.first_block.saturating_add(to_u32(at));
            let by_engine = block.saturating_add(1).saturating_mul(tokens) <= request.local_tokens;
            for (shard, known) in (0..shards).zip(&mut known) {
                if by_engine {
                    continue;
                }
                let found = self.catalog.find_again(known, &range.keys[at], number, shard);
                let to_be_had = found.filter(|id| self.may_have(self.catalog.get(*id), &request.hints.tolerations));
                let Some(id) = to_be_had else {
                    whole &= at >= blocks.end;
                    continue;
                };
                let source = self.origin(id);
                if self.catalog.get(id).flags.has(Flags::REMOTE) {
                    if !whole || at >= blocks.end {
                        continue;
                    }
                    begun.insert(id, source);
                }
                held.push(Leased { id, group: to_u16(range.group), shard, block, source });
            }
        }
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
            lease.waiting += held.iter().filter(|leased| begun.contains_key(&leased.id)).count();
            lease.blocks.extend(held);
            lease.begun.get_or_insert_default().extend(begun);
        }
        self.forget_unwanted(&interned);
        self.pump();
        Ok(whole)
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

    /// Whether all that was begun under a lease is here or on its way.
    fn is_coming(&self, lease: LeaseId) -> bool {
        let begun = self.leases.get(&lease).and_then(|lease| lease.begun.as_ref());
        begun.is_some_and(|begun| begun.keys().all(|id| self.catalog.get(*id).offered()))
    }

    /// Ends a request's lease for the lookup that takes its place. Answers with what was begun for it: it is as if the first
    /// use of what came of that were still ahead.
    pub(super) fn take_begun(&mut self, attachment: AttachmentId, request_id: &str) -> Begun {
        let lease = self.begun_lease(attachment, request_id).and_then(|lease| self.leases.get_mut(&lease));
        let mut begun = lease.and_then(|lease| lease.begun.take()).unwrap_or_default();
        self.release_request(attachment, request_id);
        begun.retain(|id, _| self.catalog.try_get(*id).is_some());
        for id in begun.keys() {
            let (segment, unused) = (self.catalog.get(*id).segment, is_nobodys(self.catalog.get(*id)));
            if segment != SegmentId::NONE && unused {
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
        let entry = |id: &BlockId| self.catalog.try_get(*id).filter(|entry| is_nobodys(entry));
        let mut came: Vec<_> = begun.keys().filter_map(|id| Some((entry(id)?.depth_blocks, *id))).collect();
        // Each goes on from the one before.
        came.sort_unstable();
        came.into_iter().for_each(|(_, id)| self.held_by_writer(id, u64::MAX));
    }
}

/// Whether it is here and nobody has used it yet.
fn is_nobodys(entry: &Entry) -> bool {
    entry.resident(Tier::Host) && entry.held == 0 && !entry.flags.has(Flags::COMMON)
}
