//! Attachments: who is connected, and what becomes of what they held when they go.

use std::collections::BTreeMap;
use std::sync::Arc;

use kvtier_types::{BlockKey, DeviceNumber, Instant, LayoutId, Namespace, NamespaceId};

use super::{Core, CoreError};
use crate::attachment::{AttachSpec, Attachment, AttachmentId, AttachmentInfo};
use crate::catalog::BlockId;
use crate::entry::Flags;
use crate::ledger::MissReason;
use crate::limits::MAX_ATTACHMENTS;

impl Core {
    /// Admits an engine's process.
    ///
    /// # Errors
    /// [`CoreError::Limit`] when there are too many; [`CoreError::EngineMismatch`] when another process of the same
    /// engine has another layout.
    pub fn attach(&mut self, now: Instant, spec: AttachSpec) -> Result<AttachmentId, CoreError> {
        if self.attachments.len() >= MAX_ATTACHMENTS {
            return Err(CoreError::Limit { what: "attachments", max: MAX_ATTACHMENTS });
        }
        let layout_id = spec.layout.id();
        let sibling = self.attachments.values().find(|a| a.spec.engine == spec.engine);
        if sibling.is_some_and(|s| s.layout.id() != layout_id) {
            return Err(CoreError::EngineMismatch { engine: spec.engine, what: "layout" });
        }
        let too_many = CoreError::Limit { what: "layouts", max: usize::from(u16::MAX) };
        let layout_number = self.catalog.layout(&layout_id).ok_or(too_many)?;
        self.catalog.note_shards(layout_number, spec.layout.shards);
        self.catalog.note_block_tokens(layout_number, &spec.layout.groups);
        let engine = self.engines.acquire(&spec.engine);
        let id = AttachmentId(self.take_id());
        let attachment = Attachment {
            namespace: spec.namespace.id(),
            layout: Arc::new(spec.layout.clone()),
            layout_number,
            engine,
            since: now,
            seen: now,
            device_losses: [0; DeviceNumber::MAX],
            leases: BTreeMap::new(),
            spec,
        };
        self.spaces.note(&attachment.spec.namespace, &attachment.layout);
        self.attachments.insert(id, attachment);
        Ok(id)
    }

    /// Renews an attachment and its leases.
    ///
    /// # Errors
    /// [`CoreError::UnknownAttachment`].
    pub fn heartbeat(&mut self, now: Instant, id: AttachmentId) -> Result<(), CoreError> {
        let attachment = self.attachments.get_mut(&id).ok_or(CoreError::UnknownAttachment)?;
        attachment.seen = now;
        for lease in attachment.leases.values() {
            if let Some(lease) = self.leases.get_mut(lease) {
                lease.expires = now + self.config.lease_ttl;
            }
        }
        Ok(())
    }

    /// Moves an attachment to another namespace revision; blocks of the old one stay for whoever else has it.
    ///
    /// # Errors
    /// [`CoreError::UnknownAttachment`].
    pub fn switch_namespace(&mut self, id: AttachmentId, namespace: Namespace) -> Result<NamespaceId, CoreError> {
        let attachment = self.attachments.get_mut(&id).ok_or(CoreError::UnknownAttachment)?;
        attachment.namespace = namespace.id();
        self.spaces.note(&namespace, &attachment.layout);
        attachment.spec.namespace = namespace;
        Ok(attachment.namespace)
    }

    /// Lets a process go: its leases end at once, its engine's reservations with the engine's last process.
    pub fn detach(&mut self, id: AttachmentId) {
        let Some(attachment) = self.attachments.remove(&id) else { return };
        self.counts.reaped += 1;
        for lease in attachment.leases.into_values() {
            self.end_lease(lease, MissReason::Unavailable);
        }
        let engine_lives = self.attachments.values().any(|a| a.engine == attachment.engine);
        if !engine_lives {
            let orphans: Vec<BlockId> =
                self.reserved.iter().filter(|(_, r)| r.engine == attachment.engine).map(|(id, _)| *id).collect();
            for orphan in orphans {
                self.abandon(orphan);
                self.counts.reaped_reservations += 1;
            }
        }
        self.engines.release(attachment.engine);
        self.pump();
    }

    /// Reaps what has outlived its time. Returns the attachments that were reaped.
    pub fn expire(&mut self, now: Instant) -> Vec<AttachmentId> {
        self.tell_time(now);
        self.catalog.segments.rest(now);
        let ttl = self.config.attachment_ttl;
        let silent: Vec<AttachmentId> =
            self.attachments.iter().filter(|(_, a)| a.seen + ttl <= now).map(|(id, _)| *id).collect();
        for id in &silent {
            self.detach(*id);
        }
        let stale: Vec<_> = self.leases.iter().filter(|(_, l)| l.expires <= now).map(|(id, _)| *id).collect();
        for lease in stale {
            self.counts.expired_leases += 1;
            self.end_lease(lease, MissReason::Unavailable);
        }
        let overdue: Vec<BlockId> = self.reserved.iter().filter(|(_, r)| r.expires <= now).map(|(id, _)| *id).collect();
        for id in overdue {
            self.counts.reaped_reservations += 1;
            self.abandon(id);
        }
        self.expire_claims(now);
        self.expire_exports(now);
        self.expire_fetches(now);
        self.expire_blocks(now);
        self.try_unread();
        self.walk();
        self.pump();
        silent
    }

    /// Frees a reservation that will not be sealed.
    pub(super) fn abandon(&mut self, id: BlockId) {
        self.reserved.remove(&id);
        let entry = self.catalog.get(id);
        debug_assert!(entry.flags.has(Flags::RESERVED), "only reservations are abandoned");
        let (frame, bytes) = (entry.host, u64::from(entry.bytes));
        if let Some(frame) = frame {
            self.free_frame(frame, bytes);
        }
        self.catalog.update(id, |e| {
            e.host = None;
            e.flags.set(Flags::RESERVED, false);
        });
    }

    /// Attachments, oldest first.
    #[must_use]
    pub fn attachments(&self) -> Vec<AttachmentInfo> {
        let reservations = |engine: u32| self.reserved.values().filter(|r| r.engine == engine).count();
        let info = |(id, a): (&AttachmentId, &Attachment)| AttachmentInfo {
            id: *id,
            spec: a.spec.clone(),
            leases: a.leases.len(),
            reservations: reservations(a.engine),
            since: a.since,
        };
        self.attachments.iter().map(info).collect()
    }

    /// Digests of an attachment's namespace and layout.
    #[must_use]
    pub fn identity(&self, id: AttachmentId) -> Option<(NamespaceId, LayoutId)> {
        self.attachments.get(&id).map(|a| (a.namespace, *self.catalog.layout_id(a.layout_number)))
    }

    /// Bytes of a block shard of a group, `None` for an unknown attachment or group.
    #[must_use]
    pub fn block_bytes(&self, id: AttachmentId, group: u32) -> Option<u64> {
        self.attachments.get(&id).and_then(|a| a.layout.block_bytes.get(group as usize)).copied()
    }

    /// Tokens of a block of a group, `None` for an unknown attachment or group.
    #[must_use]
    pub fn block_tokens(&self, id: AttachmentId, group: u32) -> Option<u32> {
        self.attachments.get(&id).and_then(|a| a.layout.groups.get(group as usize)).map(|spec| spec.block_tokens)
    }

    /// Whether an attachment's engine has an unsealed reservation in an extent, and so may write there.
    #[must_use]
    pub fn reserves_in(&self, id: AttachmentId, extent: u32) -> bool {
        let Some(attachment) = self.attachments.get(&id) else { return false };
        let here = |id: &BlockId| self.catalog.get(*id).host.is_some_and(|f| f.extent == extent);
        self.reserved.iter().any(|(id, r)| r.engine == attachment.engine && here(id))
    }

    pub(super) fn attached(&self, id: AttachmentId) -> Result<&Attachment, CoreError> {
        self.attachments.get(&id).ok_or(CoreError::UnknownAttachment)
    }

    /// Why a key without a visible entry is missing.
    pub(super) fn miss_reason(&self, key: &BlockKey) -> MissReason {
        self.ghost.get(key).unwrap_or(MissReason::Novel)
    }
}
