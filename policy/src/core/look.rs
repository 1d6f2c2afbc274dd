//! The first half of a lookup: what is known of its shards, some at a time, before anything is taken.
//!
//! A lookup of many blocks spends most of its time waiting for memory of the catalog. That is done here, in steps between
//! which the shell lets others in; the lookup itself then finds what was found again without searching. Nothing is held in
//! between: what has gone meanwhile is looked for anew.

use kvtier_types::ShardKey;

use super::lookup::{LookupRange, LookupRequest};
use super::{Core, CoreError};
use crate::catalog::BlockId;
use crate::entry::Flags;

/// Shards of one step.
const STEP: usize = 256;

/// What was found so far.
#[derive(Debug, Clone, Default)]
pub struct Look {
    /// Entries in the order of ranges, blocks and shards.
    found: Vec<Option<BlockId>>,
    unknown: Vec<ShardKey>,
    /// Whether no block is of use without all blocks before it.
    chained: bool,
}

impl Look {
    /// The shards that are not here and that nobody is bringing: what to ask the directory for.
    #[must_use]
    pub fn unknown(&self) -> &[ShardKey] {
        &self.unknown
    }

    /// [`Self::unknown`] in two: at most `most` shards without which nothing that follows is of use, and the rest. It is not
    /// divided where a block may be of use without those before it, nor for a rest that is shorter.
    #[must_use]
    pub fn head(&self, most: usize) -> (&[ShardKey], &[ShardKey]) {
        let divided = self.chained && self.unknown.len() > 2 * most;
        self.unknown.split_at(if divided { most } else { self.unknown.len() })
    }

    /// What was found of the shards from `start` on.
    pub(super) fn from(&self, start: usize) -> impl Iterator<Item = Option<BlockId>> {
        self.found.get(start..).unwrap_or_default().iter().copied().chain(std::iter::repeat(None))
    }
}

impl Core {
    /// Looks at some more of a lookup's shards. Answers whether some are left.
    ///
    /// # Errors
    /// [`CoreError`] as [`Core::lookup`].
    pub fn look(&self, request: &LookupRequest, look: &mut Look) -> Result<bool, CoreError> {
        let attachment = self.attached(request.attachment)?;
        if look.found.is_empty() {
            self.check_lookup(request)?;
            let groups = &attachment.layout.groups;
            look.chained = groups.len() == 1 && groups.iter().all(|group| group.kind.needs_ancestors());
        }
        let (layout, number) = (*self.catalog.layout_id(attachment.layout_number), attachment.layout_number);
        let shards = usize::from(attachment.layout.shards);
        let mut start = look.found.len();
        let mut left = STEP;
        for LookupRange { keys, .. } in &request.ranges {
            let of_range = keys.len() * shards;
            for at in (start.min(of_range)..of_range).take(left) {
                let (key, shard) = (&keys[at / shards], u16::try_from(at % shards).unwrap_or(u16::MAX));
                let id = self.catalog.find(key, number, shard);
                let entry = id.map(|id| self.catalog.get(id));
                if entry.is_none_or(|e| !e.offered() && !e.flags.has(Flags::RESERVED | Flags::DOOMED)) {
                    look.unknown.push(ShardKey { block: *key, layout, shard });
                }
                look.found.push(id);
                left -= 1;
            }
            start = start.saturating_sub(of_range);
        }
        let all: usize = request.ranges.iter().map(|range| range.keys.len() * shards).sum();
        Ok(look.found.len() < all)
    }

    /// Looks at all of a lookup's shards.
    ///
    /// # Errors
    /// [`CoreError`] as [`Core::lookup`].
    pub fn look_whole(&self, request: &LookupRequest) -> Result<Look, CoreError> {
        let mut look = Look::default();
        while self.look(request, &mut look)? {}
        Ok(look)
    }
}
