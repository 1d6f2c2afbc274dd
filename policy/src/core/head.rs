//! The first blocks of a long lookup: fetched before the directory has said where the rest is.
//!
//! *Invariants*: a head is leased under its request, so that whatever ends the request ends it; the lookup itself takes its
//! place, and whatever is under way by then goes on for that.

use kvtier_types::{BlockKey, Instant, ShardKey};

use super::{Core, CoreError, Located, Look, LookupRange, LookupRequest};
use crate::attachment::AttachmentId;
use crate::entry::Flags;
use crate::lease::{Lease, LeaseId, Leased};

impl Core {
    /// Starts bringing the shards of a lookup that others are said to have, up to the first that is neither here nor there.
    /// [`Core::lookup_located`] follows, with these shards and more.
    ///
    /// # Errors
    /// As [`Core::lookup`].
    pub fn lookup_head(
        &mut self,
        now: Instant,
        request: &LookupRequest,
        (look, located): (&Look, &Located),
    ) -> Result<(), CoreError> {
        self.check_lookup(request)?;
        self.clock = self.clock.max(now);
        self.release_request(request.attachment, &request.request_id);
        let Some(range) = request.ranges.first() else { return Ok(()) };
        let attachment = self.attached(request.attachment)?;
        let (layout, number) = (*self.catalog.layout_id(attachment.layout_number), attachment.layout_number);
        let shards = attachment.layout.shards;
        let there = |key: &BlockKey, shard| located.get(&ShardKey { block: *key, layout, shard }).is_some();
        let here =
            |at: usize, shard| look.from(at * usize::from(shards) + usize::from(shard)).next().flatten().is_some();
        let lacks = |(at, key): (usize, &BlockKey)| (0..shards).any(|shard| !there(key, shard) && !here(at, shard));
        let end = range.keys.iter().enumerate().position(lacks).unwrap_or(range.keys.len());
        let range = LookupRange { keys: range.keys[..end].to_vec(), ..*range };
        let interned = self.intern_remotes(request.attachment, std::slice::from_ref(&range), located);
        let mut blocks = Vec::with_capacity(interned.len());
        for (block, key) in (range.first_block..).zip(&range.keys) {
            for shard in 0..shards {
                let found = self.catalog.find(key, number, shard);
                let Some(id) = found.filter(|id| self.catalog.get(*id).flags.has(Flags::REMOTE)) else { continue };
                let group = u16::try_from(range.group).unwrap_or(u16::MAX);
                blocks.push(Leased { id, group, shard, block, source: self.origin(id) });
            }
        }
        self.lease_head(now, request, blocks)?;
        self.forget_unwanted(&interned);
        self.pump();
        Ok(())
    }

    /// Leases shards that are to be fetched. They are not used by this: the lookup that follows uses them.
    fn lease_head(&mut self, now: Instant, request: &LookupRequest, blocks: Vec<Leased>) -> Result<(), CoreError> {
        let id = LeaseId(self.take_id());
        let attachment = self.attachments.get_mut(&request.attachment).ok_or(CoreError::UnknownAttachment)?;
        attachment.leases.insert(request.request_id.clone(), id);
        for leased in &blocks {
            self.catalog.touch(leased.id, |entry| entry.leases += 1);
            self.waiters.entry(leased.id).or_default().push(id);
            self.want_host(leased.id);
        }
        let lease = Lease {
            attachment: request.attachment,
            request_id: request.request_id.clone(),
            waiting: blocks.len(),
            local_tokens: request.local_tokens,
            asked: Vec::new(),
            reasons: Vec::new(),
            runs: Vec::new(),
            expires: now + self.config.lease_ttl,
            waits_since: None,
            of_program: false,
            corrupt: false,
            tolerations: Vec::new(),
            blocks,
        };
        self.leases.insert(id, lease);
        Ok(())
    }

    /// The shards that a request's head had fetched, if it has one.
    pub(super) fn head_of(&self, attachment: AttachmentId, request_id: &str) -> Vec<Leased> {
        let lease = self.attachments.get(&attachment).and_then(|a| a.leases.get(request_id));
        let head = lease.and_then(|lease| self.leases.get(lease)).filter(|lease| lease.asked.is_empty());
        head.map(|lease| lease.blocks.clone()).unwrap_or_default()
    }

    /// What the head had fetched came from elsewhere, even if it is here by now.
    pub(super) fn keep_sources(&mut self, lease: LeaseId, head: &[Leased]) {
        let Some(lease) = self.leases.get_mut(&lease) else { return };
        for fetched in head {
            let place = (fetched.group, fetched.block, fetched.shard);
            let at = lease.blocks.binary_search_by_key(&place, |l| (l.group, l.block, l.shard));
            if let Some(leased) = at.ok().and_then(|at| lease.blocks.get_mut(at)).filter(|l| l.id == fetched.id) {
                leased.source = fetched.source;
            }
        }
    }
}
