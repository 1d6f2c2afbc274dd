//! What rules make of blocks, and how blocks end on time.
//!
//! The core counts from its start; records and the journal know the Unix epoch. [`Core::set_epoch`] tells how the two
//! belong together.

use std::time::Duration;

use kvtier_types::rules::{Decision, OffloadRule, RuleSet, WriteWhen};
use kvtier_types::{BlockKey, Effect, Instant, RecordMeta, SemanticType, ShardKey, Taint, Tier};

use super::{Core, WriteBehind};
use crate::catalog::BlockId;
use crate::entry::{Entry, Flags, NEVER};
use crate::ledger::MissReason;
use crate::limits::MAX_TOUCHES_PER_CALL;
use crate::rules::subject;

/// Which rule decided what of a block.
#[derive(Debug, Clone)]
pub struct Explained {
    /// Its type.
    pub semantic: SemanticType,
    /// Its taints.
    pub taints: Vec<Taint>,
    /// Its model.
    pub model: String,
    /// Its owner.
    pub tenant: String,
    /// One decision a field.
    pub decisions: Vec<Decision>,
}

impl Core {
    /// Tells which time of the Unix epoch, in milliseconds, the core's origin is.
    pub const fn set_epoch(&mut self, unix_ms_at_origin: u64) {
        self.epoch_ms = unix_ms_at_origin;
    }

    /// Puts rules in force; blocks are looked at anew by [`Self::walk`].
    pub fn set_rules(&mut self, rules: RuleSet) {
        self.rules.replace(&mut self.catalog, rules);
        self.walk = Some(0);
    }

    /// Has all blocks looked at anew by [`Self::walk`]: a node that joined may want copies.
    pub const fn look_again(&mut self) {
        self.walk = Some(0);
    }

    /// The rules in force.
    #[must_use]
    pub const fn rules(&self) -> &RuleSet {
        self.rules.set()
    }

    /// Goes on looking at blocks anew after the rules changed. Answers whether there is more to look at.
    pub fn walk(&mut self) -> bool {
        let Some(from) = self.walk else { return false };
        let mut ids: Vec<BlockId> =
            self.catalog.iter_from(from).map(|(id, _)| id).take(MAX_TOUCHES_PER_CALL + 1).collect();
        self.walk = if ids.len() > MAX_TOUCHES_PER_CALL { ids.pop().map(BlockId::index) } else { None };
        for id in ids {
            if self.catalog.try_get(id).is_some_and(Entry::visible) {
                self.relive(id, None);
            }
        }
        self.pump();
        self.walk.is_some()
    }

    /// Which rule decided each field of a block's lifecycle; `None` when nothing of it is here.
    #[must_use]
    pub fn explain(&self, key: &BlockKey) -> Option<Explained> {
        let ids = self.catalog.find_all(key);
        let entry = ids.iter().map(|id| self.catalog.get(*id)).find(|e| e.visible())?;
        let subject = subject(&self.catalog, entry);
        Some(Explained {
            semantic: subject.semantic,
            taints: subject.taints.to_vec(),
            model: subject.model.to_owned(),
            tenant: subject.tenant.to_owned(),
            decisions: self.rules.set().explain(&subject),
        })
    }

    /// Works out what rules and taints make of a sealed block. `learnt` is an end that came with it. The entry may go: its
    /// only copies may lie where they may not.
    pub(super) fn relive(&mut self, id: BlockId, learnt: Option<Instant>) {
        let entry = self.catalog.get(id);
        let (former, expires) = (entry.life, entry.expires);
        let spans = self.taints(entry).iter().filter_map(|t| match t.effect {
            Effect::Ephemeral(span) => Some(span),
            _ => None,
        });
        let hard = spans.min().map(|span| {
            let known = self.catalog.ephemeral.get(&id).copied();
            known.or(learnt).unwrap_or(self.clock + span)
        });
        match hard {
            Some(at) => self.catalog.ephemeral.insert(id, at),
            None => self.catalog.ephemeral.remove(&id),
        };
        let life = self.rules.life(&mut self.catalog, id);
        let ttl = self.catalog.lives.get(life).lifecycle.ttl;
        let anew = expires == NEVER || life != former;
        let soft = if anew { ttl.map_or(NEVER, |ttl| self.clock + ttl) } else { expires };
        let expires = hard.into_iter().chain(learnt).fold(soft, Instant::min);
        if (former, self.catalog.get(id).expires) != (life, expires) {
            self.catalog.update(id, |e| {
                let written = e.sequence > 0 || e.flags.has(Flags::TO_DISK | Flags::TO_OBJECT);
                let earlier = expires < e.expires && written && learnt != Some(expires);
                e.flags.set(Flags::ENDS_EARLIER, earlier || e.flags.has(Flags::ENDS_EARLIER));
                (e.life, e.expires) = (life, expires);
            });
        }
        self.catalog.lives.release(former);
        self.restand(id);
        self.want_replicas(id);
        self.confine(id);
    }

    /// Drops copies that lie where rules do not allow them; what is in use stays until [`Self::finish_doomed`].
    pub(super) fn confine(&mut self, id: BlockId) {
        for tier in [Tier::Device, Tier::Disk, Tier::Object] {
            let Some(entry) = self.catalog.try_get(id) else { return };
            if entry.resident(tier) && !self.allowed_in(entry, tier) && !entry.in_use() {
                self.drop_copy(id, tier);
            }
        }
    }

    /// Whether a copy in a tier may be made at all.
    pub(super) fn allowed_in(&self, entry: &Entry, tier: Tier) -> bool {
        self.lifecycle(entry).tiers.has(tier) && (tier != Tier::Object || self.may_leave(entry))
    }

    /// Whether a copy in a slower tier is made on our own account.
    pub(super) fn offloads_to(&self, entry: &Entry, tier: Tier) -> bool {
        let named = match self.lifecycle(entry).offload {
            OffloadRule::Never => true,
            OffloadRule::To(tiers) => tiers.has(tier),
        };
        named && self.allowed_in(entry, tier)
    }

    /// When a block is written to the object store: as a rule says, else as configured.
    pub(super) fn write_behind_of(&self, entry: &Entry) -> WriteBehind {
        match self.lifecycle(entry).write_behind {
            None => self.config.write_behind,
            Some(WriteWhen::Read) => WriteBehind::Read,
            Some(WriteWhen::All) => WriteBehind::All,
            Some(WriteWhen::Nothing) => WriteBehind::Nothing,
        }
    }

    /// When an entry is gone, by the Unix epoch.
    pub(super) fn expires_ms(&self, entry: &Entry) -> Option<u64> {
        (entry.expires != NEVER).then(|| self.unix_ms(entry.expires))
    }

    /// A time as the Unix epoch counts it.
    pub(super) fn unix_ms(&self, at: Instant) -> u64 {
        let millis = u64::try_from(Duration::from_nanos(at.as_nanos()).as_millis()).unwrap_or(u64::MAX);
        self.epoch_ms.saturating_add(millis)
    }

    /// A time of the Unix epoch as the core counts it; what was over at its start is its start.
    pub(super) fn instant_of(&self, unix_ms: u64) -> Instant {
        Instant::ZERO + Duration::from_millis(unix_ms.saturating_sub(self.epoch_ms))
    }

    /// The end that a record tells of, and whether it has come.
    pub(super) fn end_of(&self, meta: &RecordMeta) -> (Option<Instant>, bool) {
        let end = meta.expires_ms.map(|at| self.instant_of(at));
        (end, end.is_some_and(|at| at <= self.clock))
    }

    /// Lets go of what has outlived its time; what remains is for the next call.
    pub(super) fn expire_blocks(&mut self, now: Instant) {
        for _ in 0..MAX_TOUCHES_PER_CALL {
            let Some((_, id)) = self.catalog.first_expiry().filter(|(at, _)| *at <= now) else { return };
            let entry = self.catalog.get(id);
            if entry.flags.has(Flags::ENDS_EARLIER) {
                self.expired_records.push((self.shard_key(entry), self.next_sequence - 1));
            }
            let (key, visible) = (self.catalog.get(id).key, self.catalog.get(id).visible());
            if visible {
                self.ghost.insert(&key, MissReason::Expired);
                self.counts.expired_blocks += 1;
            }
            let in_use = self.catalog.get(id).in_use();
            let remains = self.catalog.update(id, |e| {
                e.expires = NEVER;
                // Whoever holds it may finish; nobody else finds it.
                e.flags.set(Flags::DOOMED, in_use);
            });
            if remains && !in_use {
                self.drop_all(id);
            }
        }
    }

    /// Goes on where [`Self::expire`] left some for another call.
    pub fn expire_more(&mut self) {
        self.expire_blocks(self.clock);
        self.pump();
    }

    /// Records that may outlive their blocks, and up to which sequence: to be journaled as if evicted by verb.
    pub fn poll_expired_records(&mut self) -> Vec<(ShardKey, u64)> {
        std::mem::take(&mut self.expired_records)
    }

    /// Whether [`Self::expire`] left some for another call.
    #[must_use]
    pub fn has_expired(&self) -> bool {
        self.catalog.first_expiry().is_some_and(|(at, _)| at <= self.clock)
    }

    /// When the next block ends.
    pub(super) fn next_expiry(&self) -> Option<Instant> {
        self.catalog.first_expiry().map(|(at, _)| at)
    }
}
