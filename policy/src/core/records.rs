//! Records of lower tiers: those that go to make room, those that are written anew elsewhere, those found at start.

use kvtier_types::{Location, RecordMeta, ShardKey, Tier};

use super::{Action, Core};
use crate::catalog::{BlockId, Scope};
use crate::entry::{Entry, Flags, NEVER};
use crate::ledger::MissReason;

/// What became of a request to reclaim room on a lower tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reclaimed {
    /// Copies dropped.
    pub copies: usize,
    /// Their payload bytes.
    pub bytes: u64,
}

impl Core {
    /// Drops copies from a lower tier, least valuable first, until `bytes` are freed or nothing more may go.
    pub fn reclaim(&mut self, tier: Tier, bytes: u64) -> Reclaimed {
        let mut done = Reclaimed::default();
        while done.bytes < bytes {
            let victim = self.catalog.victims_of(tier, 1).first().copied();
            let Some(victim) = victim else { break };
            done.bytes += u64::from(self.catalog.get(victim).bytes);
            done.copies += 1;
            self.evict_copy(victim, tier);
        }
        done
    }

    /// Drops one record to make room, whatever its rank: its log segment or pack is to be emptied.
    pub fn drop_record(&mut self, tier: Tier, key: &ShardKey, at: Location) {
        let Some(id) = self.catalog.find_shard(key) else { return };
        let entry = self.catalog.get(id);
        let current = if tier == Tier::Disk { entry.disk } else { entry.object };
        if current == Some(at) {
            self.evict_copy(id, tier);
        }
    }

    /// A record that lies in a log segment to be reused: what to write to keep it, `None` when it may go.
    pub fn relocate(&mut self, key: &ShardKey, at: Location) -> Option<RecordMeta> {
        let id = self.catalog.find_shard(key)?;
        let entry = self.catalog.get(id);
        if entry.disk != Some(at) || entry.flags.has(Flags::DOOMED | Flags::RELOCATING) {
            return None;
        }
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        let meta = self.meta(self.catalog.get(id), sequence);
        self.catalog.update(id, |e| e.flags.set(Flags::RELOCATING, true));
        Some(meta)
    }

    /// Ends a relocation: `to` is the new place, `None` when it was lost.
    pub fn relocated(&mut self, key: &ShardKey, from: Location, to: Option<(Location, u64)>) {
        let Some(id) = self.catalog.find_shard(key) else { return };
        let entry = self.catalog.get(id);
        let bytes = u64::from(entry.bytes);
        let still = entry.disk == Some(from);
        self.catalog.update(id, |e| {
            if still {
                e.disk = to.map(|(at, _)| at);
                e.sequence = to.map_or(e.sequence, |(_, sequence)| e.sequence.max(sequence));
            }
            e.flags.set(Flags::RELOCATING, false);
        });
        if still {
            self.actions.push_back(Action::Forget { tier: Tier::Disk, at: from, bytes });
        } else if let Some((at, _)) = to {
            self.actions.push_back(Action::Forget { tier: Tier::Disk, at, bytes });
        }
        if self.catalog.try_get(id).is_some() {
            self.finish_doomed(id);
        }
    }

    /// Ends a relocation that there was no room for: the record stays where it lies.
    pub fn not_relocated(&mut self, key: &ShardKey) {
        let Some(id) = self.catalog.find_shard(key) else { return };
        if self.catalog.update(id, |e| e.flags.set(Flags::RELOCATING, false)) {
            self.finish_doomed(id);
        }
    }

    /// Takes in a record found on a lower tier at start. Call in order of sequence: a later record of one key replaces
    /// an earlier one.
    pub fn recover(&mut self, tier: Tier, meta: &RecordMeta, at: Location) {
        let forget = |bytes| Action::Forget { tier, at, bytes };
        let (Some(layout), Ok(bytes)) = (self.catalog.layout(&meta.key.layout), u32::try_from(meta.bytes)) else {
            self.actions.push_back(forget(meta.bytes));
            return;
        };
        self.next_sequence = self.next_sequence.max(meta.sequence + 1);
        let meta = &self.marked(meta.clone());
        let (end, over) = self.end_of(meta);
        if over {
            self.ghost.insert(&meta.key.block, MissReason::Expired);
            self.actions.push_back(forget(meta.bytes));
            return;
        }
        if let Some(id) = self.catalog.find(&meta.key.block, layout, meta.key.shard) {
            self.recover_again(id, tier, meta, at);
            return;
        }
        let scope = Scope::of(meta);
        let mut flags = Flags::default();
        flags.set(Flags::NEEDS_ANCESTORS, meta.needs_ancestors);
        let parent = meta.parent.as_ref().and_then(|p| self.catalog.find(p, layout, meta.key.shard));
        let bare = Entry::bare(
            meta.key.block,
            (layout, meta.key.shard),
            meta.group,
            bytes,
            (self.catalog.scopes.acquire(&scope), self.catalog.programs.acquire(&meta.hints.program_id), flags),
        );
        let taints = self.catalog.taints.acquire(&meta.hints.taints);
        let entry = Entry {
            checksum: meta.checksum,
            sequence: meta.sequence,
            parent,
            depth_blocks: meta.depth_blocks,
            semantic: meta.hints.semantic,
            taints,
            ..bare
        };
        let id = self.catalog.insert(entry);
        let tick = self.next_tick();
        self.catalog.update(id, |e| {
            e.touched = tick;
            if tier == Tier::Disk { e.disk = Some(at) } else { e.object = Some(at) }
        });
        // An entry without a copy would not outlive being told what is said of it.
        self.arrived(id);
        self.held_by_writer(id, meta.sequence);
        self.relive(id, end);
    }

    /// A record's meta with what was said of its block later.
    fn marked(&self, mut meta: RecordMeta) -> RecordMeta {
        if let Some(mark) = self.marks.get(&meta.key.block).filter(|m| meta.sequence <= m.up_to_sequence) {
            meta.hints.semantic = mark.semantic;
            meta.hints.taints.clone_from(&mark.taints);
            meta.expires_ms = mark.expires_ms;
        }
        meta
    }

    fn recover_again(&mut self, id: BlockId, tier: Tier, meta: &RecordMeta, at: Location) {
        let entry = self.catalog.get(id);
        let same_bytes = entry.checksum == meta.checksum && u64::from(entry.bytes) == meta.bytes;
        let older = if tier == Tier::Disk { entry.disk } else { entry.object };
        if let Some(older) = older.filter(|_| same_bytes) {
            self.actions.push_back(Action::Forget { tier, at: older, bytes: meta.bytes });
        } else if !same_bytes {
            // Another sealing of the key: one read takes all its bytes from one replica, so only one may stay.
            self.actions.push_back(Action::Forget { tier, at, bytes: meta.bytes });
            return;
        }
        // What was written later says what was known later.
        let later = meta.sequence > self.catalog.get(id).sequence;
        self.catalog.update(id, |e| {
            if tier == Tier::Disk {
                e.disk = Some(at)
            } else {
                e.object = Some(at)
            }
            e.sequence = e.sequence.max(meta.sequence);
            if later {
                e.semantic = meta.hints.semantic;
                e.expires = NEVER;
            }
        });
        if later {
            self.catalog.ephemeral.remove(&id);
            self.set_taints(id, &meta.hints.taints);
            self.relive(id, self.end_of(meta).0);
        } else {
            self.restand_copy(id);
        }
    }
}
