//! Copies that could not be read: another is tried, and when none is left the block counts as missing for a while, so that it
//! is looked for on other nodes, and written anew where it is computed again, instead of being recomputed by each who asks.
//!
//! *Bounds*: as many as there are blocks whose reads failed within [`PAUSE`].

use std::collections::VecDeque;
use std::time::Duration;

use kvtier_types::{Instant, Tier};
use rustc_hash::FxHashMap;

use super::Core;
use crate::catalog::BlockId;
use crate::entry::Flags;
use crate::ledger::MissReason;

/// How long copies that could not be read are not tried again.
const PAUSE: Duration = Duration::from_secs(10);

/// What is known of such copies.
#[derive(Debug, Default)]
pub(super) struct Unread {
    /// Of blocks being brought up: the slowest tier whose copy could not be read.
    failed: FxHashMap<BlockId, Tier>,
    /// Blocks without a readable copy, and when they are tried again.
    paused: VecDeque<(Instant, BlockId)>,
}

impl Unread {
    pub(super) fn failed(&mut self, id: BlockId, from: Tier) {
        self.failed.insert(id, from);
    }

    /// Sources are tried from the fastest on.
    pub(super) fn has_failed(&self, id: BlockId, tier: Tier) -> bool {
        self.failed.get(&id).is_some_and(|failed| tier <= *failed)
    }

    /// The block is not brought up any more.
    pub(super) fn settled(&mut self, id: BlockId) {
        self.failed.remove(&id);
    }

    /// When the next block is tried again.
    pub(super) fn next(&self) -> Option<Instant> {
        self.paused.front().map(|(until, _)| *until)
    }
}

impl Core {
    /// None of a block's copies could be read.
    pub(super) fn is_unread(&mut self, id: BlockId) {
        if !self.catalog.get(id).flags.has(Flags::UNREAD) {
            self.unread.paused.push_back((self.clock + PAUSE, id));
            let key = self.catalog.get(id).key;
            self.ghost.insert(&key, MissReason::Unavailable);
            self.catalog.update(id, |e| e.flags.set(Flags::UNREAD, true));
        }
    }

    /// Copies whose pause is over count again.
    pub(super) fn try_unread(&mut self) {
        while self.unread.next().is_some_and(|until| until <= self.clock) {
            let Some((_, id)) = self.unread.paused.pop_front() else { return };
            // The number may be another block's by now, of which nothing is lost by trying.
            if self.catalog.try_get(id).is_some_and(|entry| entry.flags.has(Flags::UNREAD)) {
                self.catalog.update(id, |e| e.flags.set(Flags::UNREAD, false));
            }
        }
    }
}
