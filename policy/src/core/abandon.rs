//! What abandoned programs leave: it is freed on every tier, and what of it comes back after a restart is swept.
//!
//! A program's blocks are freed in steps of [`HOLDER_STEP`]: the shell calls [`Core::abandon_program`] until nothing is left, and
//! journals what each step says before it acknowledges the signal.

use kvtier_types::ShardKey;
use rustc_hash::FxHashSet;

use super::Core;
use super::programs::{HOLDER_STEP, ProgramEvent};
use crate::catalog::BlockId;
use crate::entry::{Entry, Flags};
use crate::holders::HolderName;
use crate::ledger::MissReason;
use crate::limits::MAX_TOUCHES_PER_CALL;

/// What a step of freeing came to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Freed {
    /// Shards.
    pub blocks: u64,
    /// Their bytes, each once.
    pub bytes: u64,
    /// To be journaled: these shards, which others wrote, stay dead up to a sequence.
    pub journal: Vec<(ShardKey, u64)>,
    /// To be journaled: what the program wrote up to this sequence comes back only where somebody else holds it.
    pub cancelled: Option<(HolderName, u64)>,
    /// There is more.
    pub more: bool,
}

impl Core {
    /// Frees some of what only this program holds, on every tier. To be called until there is no more.
    pub fn abandon_program(&mut self, name: &HolderName) -> Freed {
        // What it left before is faded first: that goes too.
        let mut freed = Freed { more: self.settle_holders(), ..Freed::default() };
        if freed.more {
            return freed;
        }
        if let Some(id) = self.catalog.holders.find(name) {
            let moved = self.catalog.holders.moved();
            for _ in 0..HOLDER_STEP {
                // Who else was at a block moves on when it goes: that is work too.
                if self.catalog.holders.moved().wrapping_sub(moved) > MAX_TOUCHES_PER_CALL {
                    break;
                }
                let Some(exclusive) = self.catalog.lift(id) else { break };
                if let Some(block) = exclusive {
                    self.free_abandoned(name, block, &mut freed);
                }
            }
            let holder = self.catalog.holders.get(id);
            freed.more = !holder.tips.is_empty() || !holder.former.is_empty();
        }
        if !freed.more {
            if let Some(id) = self.catalog.holders.find(name) {
                let role = std::mem::take(&mut self.catalog.holders.get_mut(id).role);
                self.catalog.forget_holder(id);
                self.calls_end(name);
                self.note_program(ProgramEvent::Ended { name: name.clone(), role, at: self.clock });
                self.catalog.events.program_ended(name, "abandoned");
            }
            let up_to = self.last_sequence();
            self.cancel_former(name.clone(), up_to);
            freed.cancelled = Some((name.clone(), up_to));
        }
        self.program_counts.freed += freed.blocks;
        self.program_counts.freed_bytes += freed.bytes;
        self.pump();
        freed
    }

    fn free_abandoned(&mut self, name: &HolderName, id: BlockId, freed: &mut Freed) {
        let entry = self.catalog.get(id);
        let key = entry.key;
        if self.claims.is_named(&key) {
            self.catalog.mark_common(id, &mut Vec::new());
            return;
        }
        if self.catalog.scopes.get(entry.scope).tenant != name.tenant {
            return;
        }
        let here = entry.visible();
        freed.blocks += u64::from(here);
        freed.bytes += if here { u64::from(entry.bytes) } else { 0 };
        // Records of it may lie on a tier that the catalog does not remember; a movement under way makes another. What the
        // program wrote itself is known by its name.
        if self.writer_of(entry) != *name {
            freed.journal.push((self.shard_key(entry), self.next_sequence - 1));
        }
        if here {
            self.ghost.insert(&key, MissReason::Evicted);
        }
        let former = self.catalog.events.because("abandoned");
        if self.catalog.get(id).in_use() {
            self.catalog.update(id, |e| e.flags.set(Flags::DOOMED, true));
        } else {
            self.drop_all(id);
        }
        self.catalog.events.because(former);
    }

    /// What a program wrote up to a sequence comes back only where somebody else holds it.
    pub fn cancel_former(&mut self, name: HolderName, up_to_sequence: u64) {
        self.cancelled.insert(name, up_to_sequence);
    }

    /// After a tier was recovered and the programs of the former life were told: drops what abandoned programs wrote and
    /// nobody holds. Answers with the programs of which something was found.
    pub fn sweep_cancelled(&mut self) -> Vec<HolderName> {
        if self.cancelled.is_empty() {
            return Vec::new();
        }
        let mut orphans: Vec<(u32, BlockId)> = Vec::new();
        let mut found = FxHashSet::default();
        for (id, entry) in self.catalog.iter_from(0) {
            if entry.program == 0 || entry.held > 0 || entry.flags.has(Flags::COMMON) {
                continue;
            }
            let name = self.writer_of(entry);
            if self.cancelled.up_to(&name).is_some_and(|up_to| entry.sequence <= up_to) {
                orphans.push((entry.depth_blocks, id));
                found.insert(name);
            }
        }
        orphans.sort_unstable_by(|a, b| b.cmp(a));
        for (_, id) in orphans {
            let alone = |e: &Entry| e.children == [0; 3] && !e.in_use() && !self.claims.is_named(&e.key);
            if self.catalog.try_get(id).is_some_and(alone) {
                self.drop_all(id);
            }
        }
        let mut found: Vec<HolderName> = found.into_iter().collect();
        found.sort_unstable();
        found
    }

    fn writer_of(&self, entry: &Entry) -> HolderName {
        let tenant = &self.catalog.scopes.get(entry.scope).tenant;
        HolderName::program(tenant, self.catalog.programs.get(entry.program))
    }
}
