//! How often holders count in the blocks that they hold, gathered in steps: what of it nobody else holds.

use std::collections::BTreeMap;

use rustc_hash::FxHashMap;

use super::Holder;
use crate::catalog::{BlockId, Catalog, Place, Spot};
use crate::entry::{Entry, Flags};

/// Tips of some holders, counted in the blocks above them. Paths that meet go on as one, deepest first.
#[derive(Debug, Default)]
pub(crate) struct Counting {
    /// Blocks that are still to be counted, by their depth.
    pending: BTreeMap<(u32, Place), (Spot, u32)>,
    counts: FxHashMap<Place, Count>,
    exclusive: u64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Count {
    tips: u32,
    /// Nobody else held it when it was counted last.
    exclusive: bool,
}

impl Counting {
    /// Block shards that were counted, and those of them that nobody else holds.
    pub(crate) fn totals(&self) -> (u64, u64) {
        (self.counts.len() as u64, self.exclusive)
    }

    /// Whether nobody else than those counted held an entry when it was counted, or holds it now if it was not.
    pub(crate) fn owns(&self, place: &Place, entry: &Entry) -> bool {
        self.counts.get(place).map_or_else(|| is_own(entry, 0), |count| count.exclusive)
    }
}

fn is_own(entry: &Entry, tips: u32) -> bool {
    entry.held == tips && !entry.flags.has(Flags::COMMON)
}

impl Catalog {
    /// Counts a holder's tips too.
    pub(crate) fn count_tips(&self, counting: &mut Counting, holder: &Holder) {
        for (tip, at) in &holder.tips {
            self.await_count(counting, *tip, at.count);
        }
    }

    fn await_count(&self, counting: &mut Counting, id: BlockId, count: u32) {
        let spot = self.spot(id);
        counting.pending.entry((self.get(id).depth_blocks, spot.place)).or_insert((spot, 0)).1 += count;
    }

    /// Goes on to count, each block taken off `left`. Answers whether some are left.
    pub(crate) fn count_some(&self, counting: &mut Counting, left: &mut usize) -> bool {
        while let Some(((_, place), (spot, count))) = counting.pending.pop_last() {
            let Some(id) = self.at(&spot) else { continue };
            let entry = self.get(id);
            let here = counting.counts.entry(place).or_default();
            counting.exclusive -= u64::from(here.exclusive);
            here.tips += count;
            here.exclusive = is_own(entry, here.tips);
            counting.exclusive += u64::from(here.exclusive);
            if let Some(parent) = entry.parent {
                self.await_count(counting, parent, count);
            }
            *left = left.saturating_sub(1);
            if *left == 0 {
                return !counting.pending.is_empty();
            }
        }
        false
    }
}
