//! The first half of a lookup: what is known of its shards, some at a time, before anything is taken.
//!
//! A lookup of many blocks spends most of its time waiting for memory of the catalog. That is done here, in steps between
//! which the shell lets others in; the lookup itself then finds what was found again without searching. Nothing is held in
//! between ([`Core::begin_part`] holds what it has fetched): what has gone meanwhile is looked for anew.

use std::ops::Range;

use kvtier_types::ShardKey;

use super::lookup::{LookupRange, LookupRequest};
use super::{Core, CoreError};
use crate::catalog::BlockId;
use crate::entry::Flags;

/// Shards of one step.
const STEP: usize = 256;
/// Most shards of a part: its entries are made in one step.
const MAX_PART: usize = 4096;

/// What was found so far.
#[derive(Debug, Clone, Default)]
pub struct Look {
    /// Entries in the order of ranges, blocks and shards.
    found: Vec<Option<BlockId>>,
    unknown: Vec<ShardKey>,
    /// Where each of these stands in `found`.
    places: Vec<u32>,
    /// Shards of a block.
    shards: u16,
    /// Whether no block is of use without all blocks before it.
    chained: bool,
}

impl Look {
    /// The shards that the engine lacks, that are not here and that nobody is bringing: what to ask the directory for.
    #[must_use]
    pub fn unknown(&self) -> &[ShardKey] {
        &self.unknown
    }

    /// [`Self::unknown`] in the parts to ask for one after the other: `first` shards, then `second`, and then always twice as
    /// many up to [`MAX_PART`], each with what is left of its last block. Without all of a part nothing that follows is of use. All is one part
    /// where a block may be of use without those before it, or where it is not more than twice `first`.
    pub fn parts(&self, first: usize, second: usize) -> impl Iterator<Item = Range<usize>> {
        let all = self.unknown.len();
        let divided = self.chained && all > 2 * first;
        let (mut begin, mut next) = (0_usize, second.max(1));
        std::iter::from_fn(move || {
            let doubled = next.saturating_mul(2).min(MAX_PART);
            let least = if begin == 0 { first.max(1) } else { std::mem::replace(&mut next, doubled) };
            let mut end = if divided { begin.saturating_add(least).min(all) } else { all };
            while end > begin && end < all && self.block_of(end) == self.block_of(end - 1) {
                end += 1;
            }
            (begin < end).then(|| std::mem::replace(&mut begin, end)..end)
        })
    }

    /// The block of an unknown shard, counted from the beginning of the only range.
    fn block_of(&self, unknown: usize) -> usize {
        self.places.get(unknown).map_or(0, |place| *place as usize / usize::from(self.shards.max(1)))
    }

    /// Blocks of the only range from the one after what came before a part to its last, and the first with an unknown shard.
    pub(super) fn blocks_of(&self, part: &Range<usize>) -> (Range<usize>, usize) {
        let end = |unknown: usize| unknown.checked_sub(1).map_or(0, |last| self.block_of(last) + 1);
        (end(part.start)..end(part.end), self.block_of(part.start))
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
            look.shards = attachment.layout.shards;
            look.chained = groups.len() == 1 && groups.iter().all(|group| group.kind.needs_ancestors());
        }
        let (layout, number) = (*self.catalog.layout_id(attachment.layout_number), attachment.layout_number);
        let shards = usize::from(attachment.layout.shards);
        let mut start = look.found.len();
        let mut left = STEP;
        for LookupRange { keys, group, first_block } in &request.ranges {
            let tokens = attachment.layout.groups.get(*group as usize).map_or(0, |spec| spec.block_tokens);
            // Of its blocks the engine has so many itself.
            let by_engine = (request.local_tokens / tokens.max(1)).saturating_sub(*first_block) as usize;
            let of_range = keys.len() * shards;
            for at in (start.min(of_range)..of_range).take(left) {
                let (key, shard) = (&keys[at / shards], u16::try_from(at % shards).unwrap_or(u16::MAX));
                let id = self.catalog.find(key, number, shard);
                let entry = id.map(|id| self.catalog.get(id));
                let lacks = entry.is_none_or(|e| !e.offered() && !e.flags.has(Flags::RESERVED | Flags::DOOMED));
                if lacks && at / shards >= by_engine {
                    look.unknown.push(ShardKey { block: *key, layout, shard });
                    look.places.push(u32::try_from(look.found.len()).unwrap_or(u32::MAX));
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
