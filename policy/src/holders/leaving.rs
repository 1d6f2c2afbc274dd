//! Tips that holders left, on their way up: what nobody holds behind them is faded, or common.
//!
//! A call takes its tips off a holder and puts them where they are; the way up is gone in steps, by whoever calls
//! [`Catalog::carry_on`] until nothing is left. Tips that meet go on together. What fades goes first, so that what is left
//! behind by one that made room is common, whoever else left it.

use super::{HolderId, MAX_TIPS_PER_HOLDER};
use crate::catalog::{BlockId, Catalog};
use crate::entry::Flags;

impl Catalog {
    /// Some of the tips of a holder that are older than a touch become former ones. Answers whether such are left.
    pub(crate) fn outlive_some(&mut self, id: HolderId, touched: u64, left: &mut usize) -> bool {
        let old = self.holders.get(id).tips.iter().filter(|(_, tip)| tip.touched < touched).map(|(block, _)| *block);
        let old: Vec<BlockId> = old.take(*left + 1).collect();
        let more = old.len() > *left;
        for tip in old.into_iter().take(*left) {
            *left -= 1;
            self.hand_to(HolderId::FADING, id, tip);
            let depth_blocks = self.get(tip).depth_blocks;
            self.holders.get_mut(id).former.insert(tip, depth_blocks);
            self.holders.join(id, tip);
        }
        while self.holders.get(id).former.len() > MAX_TIPS_PER_HOLDER
            && let Some(first) = self.holders.get_mut(id).former.pop_first()
        {
            self.holders.leave(id, first);
        }
        more
    }

    /// Takes a holder's tips at a block away for want of room.
    pub(super) fn yield_tips(&mut self, id: HolderId, tip: BlockId) {
        self.hand_to(HolderId::YIELDING, id, tip);
    }

    fn hand_to(&mut self, bearer: HolderId, id: HolderId, tip: BlockId) {
        if let Some(taken) = self.holders.take_tips(id, tip) {
            self.holders.get_mut(id).left += 1;
            self.holders.add_tips(bearer, tip, taken);
        }
    }

    /// Whether something is left to carry on.
    pub(crate) fn has_leaving(&self) -> bool {
        let bearers = [HolderId::FADING, HolderId::MARKING, HolderId::YIELDING];
        bearers.iter().any(|bearer| !self.holders.get(*bearer).tips.is_empty()) || self.holders.has_orphans()
    }

    /// Carries on what holders left, each block taken off `left`; what fades is added to `faded`. Answers whether something
    /// is left.
    pub(crate) fn carry_on(&mut self, left: &mut usize, faded: &mut Vec<BlockId>) -> bool {
        for bearer in [HolderId::FADING, HolderId::MARKING, HolderId::YIELDING] {
            while let Some((&block, _)) = self.holders.get(bearer).tips.last_key_value() {
                if *left == 0 {
                    return true;
                }
                self.carry_up(bearer, block, left, faded);
            }
        }
        // Some may have begun to mark what is above.
        self.holders.orphan_some(left) || self.has_leaving()
    }

    fn carry_up(&mut self, bearer: HolderId, from: BlockId, left: &mut usize, faded: &mut Vec<BlockId>) {
        let Some(mut tip) = self.holders.take_tips(bearer, from) else { return };
        let mut marks = bearer == HolderId::MARKING;
        let mut next = Some(from);
        while let Some(block) = next {
            if *left == 0 {
                let bearer = if marks { HolderId::MARKING } else { bearer };
                self.holders.add_tips(bearer, block, tip);
                return;
            }
            *left -= 1;
            tip.count += self.holders.take_tips(bearer, block).map_or(0, |met| met.count);
            let entry = self.raw(block);
            entry.held -= tip.count;
            let nobodys = entry.held == 0 && !entry.flags.has(Flags::COMMON | Flags::FADED);
            if bearer == HolderId::FADING {
                if nobodys {
                    entry.flags.set(Flags::FADED, true);
                    faded.push(block);
                }
            } else if marks || nobodys {
                marks = true;
                entry.flags.set(Flags::COMMON, true);
            }
            next = entry.parent;
        }
    }
}
