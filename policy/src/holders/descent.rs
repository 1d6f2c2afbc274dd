//! The way down to a block, along which a fork brings its children's tips.
//!
//! First the path is gathered upwards; then the tips go down from its first block, held by a bearer. They count in every block
//! above them at any time, so that nothing is undone when a block goes between two steps: the way ends above it.

use rustc_hash::FxHashSet;

use super::{HolderId, Tip};
use crate::catalog::{BlockId, Catalog, Place, Spot};
use crate::entry::Flags;

/// Tips on their way down.
#[derive(Debug)]
pub(crate) struct Descent {
    count: u32,
    /// From the end to the first block.
    path: Vec<Spot>,
    places: FxHashSet<Place>,
    /// What is above the path gathered so far.
    above: Option<Spot>,
    /// The tips are at or above this block of the path; `None` before they have begun.
    at: Option<usize>,
}

impl Descent {
    /// Brings so many tips to a block.
    pub(crate) fn new(to: Spot, count: u32) -> Self {
        Self { count, path: Vec::new(), places: FxHashSet::default(), above: Some(to), at: None }
    }
}

impl Catalog {
    /// Goes on with tips on their way down, each block taken off `left`; what was faded and is not any more is added to
    /// `revived`. Answers whether they are to go further.
    pub(crate) fn descend_some(&mut self, descent: &mut Descent, left: &mut usize, revived: &mut Vec<BlockId>) -> bool {
        if descent.at.is_none() && self.gather_path(descent, left) {
            return true;
        }
        if descent.at.is_none() {
            self.begin_descent(descent, revived);
        }
        let Some((mut at, mut block)) = self.where_is(descent) else { return false };
        let took = self.holders.take_count(HolderId::COMING, block, descent.count);
        debug_assert!(took, "they were found there");
        let mut more = false;
        while let Some(below) = at.checked_sub(1).and_then(|below| self.at(&descent.path[below])) {
            if self.get(below).parent != Some(block) {
                break;
            }
            if *left == 0 {
                more = true;
                break;
            }
            *left -= 1;
            (at, block) = (at - 1, below);
            self.count_in(block, descent.count, revived);
        }
        descent.at = Some(at);
        self.holders.add_tips(HolderId::COMING, block, Tip { count: descent.count, touched: 0 });
        more
    }

    fn gather_path(&self, descent: &mut Descent, left: &mut usize) -> bool {
        let parent = |spot: &Spot| self.get(self.at(spot)?).parent.map(|parent| self.spot(parent));
        // The first block may have got a parent since.
        descent.above = descent.above.or_else(|| descent.path.last().and_then(parent));
        while let Some(spot) = descent.above {
            if *left == 0 {
                return true;
            }
            *left -= 1;
            descent.places.insert(spot.place);
            descent.path.push(spot);
            // What is gone has nothing below it: there is no way.
            descent.above = parent(&spot);
        }
        false
    }

    /// Puts the tips at the first block of the path, if it is still there.
    fn begin_descent(&mut self, descent: &mut Descent, revived: &mut Vec<BlockId>) {
        if let Some(block) = descent.path.last().and_then(|first| self.at(first)) {
            descent.at = Some(descent.path.len() - 1);
            self.count_in(block, descent.count, revived);
            self.holders.add_tips(HolderId::COMING, block, Tip { count: descent.count, touched: 0 });
        }
    }

    fn count_in(&mut self, block: BlockId, count: u32, revived: &mut Vec<BlockId>) {
        let entry = self.raw(block);
        entry.held += count;
        if entry.flags.has(Flags::FADED) {
            entry.flags.set(Flags::FADED, false);
            revived.push(block);
        }
    }

    /// Where the tips are: where they were put, or above that when it is gone. `None` when nothing of the path is left.
    fn where_is(&self, descent: &Descent) -> Option<(usize, BlockId)> {
        let coming = &self.holders.get(HolderId::COMING).tips;
        let is_there = |id: &BlockId| coming.get(id).is_some_and(|tip| tip.count >= descent.count);
        let rest = descent.path.iter().enumerate().skip(descent.at?);
        rest.filter_map(|(at, spot)| Some((at, self.at(spot)?))).find(|(_, id)| is_there(id))
    }

    /// Gives one of the tips that came down to a holder. What it has above on the same path makes way. Answers where it is
    /// now.
    pub(crate) fn give_tip(&mut self, descent: &mut Descent, to: HolderId, touched: u64) -> Option<BlockId> {
        let (_, block) = self.where_is(descent)?;
        let taken = self.holders.take_count(HolderId::COMING, block, 1);
        debug_assert!(taken, "it was found there");
        descent.count -= 1;
        let one = Tip { count: 1, touched };
        if let Some(here) = self.holders.get_mut(to).tips.get_mut(&block) {
            here.touched = touched;
            self.holders.add_tips(HolderId::YIELDING, block, one);
            return Some(block);
        }
        let own = self.holders.get(to).tips.keys().copied();
        let above: Vec<BlockId> = own.filter(|id| descent.places.contains(&self.place_of(*id))).collect();
        self.holders.add_tips(to, block, one);
        above.into_iter().for_each(|above| self.yield_tips(to, above));
        Some(block)
    }

    /// The tips that nobody took make way.
    pub(crate) fn give_back(&mut self, descent: &mut Descent) {
        if let Some((_, block)) = self.where_is(descent).filter(|_| descent.count > 0) {
            self.holders.take_count(HolderId::COMING, block, descent.count);
            let tip = Tip { count: descent.count, touched: 0 };
            self.holders.add_tips(HolderId::YIELDING, block, tip);
            descent.count = 0;
        }
    }
}
