//! Soft claims from request hints: one priority and one deadline a block, bounded, lost with the process.

use std::collections::BTreeSet;

use kvtier_types::{BlockKey, Instant};
use rustc_hash::FxHashMap;

/// Blocks held by hints at once: beyond, hints are clipped.
pub const MAX_HINTED: usize = 1 << 17;

/// Blocks that requests asked to retain.
#[derive(Debug, Default)]
pub(crate) struct Hinted {
    blocks: FxHashMap<BlockKey, (u8, Instant)>,
    deadlines: BTreeSet<(Instant, BlockKey)>,
}

impl Hinted {
    /// Holds a block: the higher priority and the later deadline count. Answers whether there was room.
    pub(crate) fn put(&mut self, key: BlockKey, priority: u8, expires: Instant) -> bool {
        let former = self.blocks.get(&key).copied();
        if former.is_none() && self.blocks.len() >= MAX_HINTED {
            return false;
        }
        let (priority, expires) = former.map_or((priority, expires), |(p, e)| (p.max(priority), e.max(expires)));
        if let Some((_, until)) = former {
            self.deadlines.remove(&(until, key));
        }
        self.blocks.insert(key, (priority, expires));
        self.deadlines.insert((expires, key));
        true
    }

    pub(crate) fn priority(&self, key: &BlockKey) -> Option<u8> {
        self.blocks.get(key).map(|(priority, _)| *priority)
    }

    /// Lets go of at most `most` blocks whose time is over. Answers with them.
    pub(crate) fn expire(&mut self, now: Instant, most: usize) -> Vec<BlockKey> {
        let over: Vec<_> = self.deadlines.iter().take_while(|(at, _)| *at <= now).take(most).copied().collect();
        for (at, key) in &over {
            self.deadlines.remove(&(*at, *key));
            self.blocks.remove(key);
        }
        over.into_iter().map(|(_, key)| key).collect()
    }

    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    pub(crate) fn len(&self) -> usize {
        self.blocks.len()
    }
}
