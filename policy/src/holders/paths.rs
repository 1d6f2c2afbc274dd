//! Tips and the paths above them: what counts in the blocks of the catalog.

use kvtier_types::Instant;

use super::{HolderId, HolderName, HolderState, MAX_TIPS_PER_HOLDER, Tip};
use crate::catalog::{BlockId, Catalog};
use crate::entry::{Entry, Flags};

impl Catalog {
    /// A call of a holder ended at these blocks, each the last of its group and shard. Answers with blocks that were faded
    /// and are not any more.
    pub(crate) fn hold(&mut self, now: Instant, name: &HolderName, tips: &[BlockId]) -> Vec<BlockId> {
        let id = self.hear(now, name);
        let touched = self.holders.touch();
        let mut revived = Vec::new();
        for tip in tips {
            self.put_tip(id, *tip, touched, &mut revived);
        }
        self.called(id, touched, tips);
        revived
    }

    /// A call of a holder ended at these blocks, and it has its tips there: what is older may be former, or too much.
    pub(crate) fn called(&mut self, id: HolderId, touched: u64, tips: &[BlockId]) {
        self.holders.get_mut(id).state = HolderState::Active;
        self.follow(id, tips);
        while self.holders.get(id).tips.len() > MAX_TIPS_PER_HOLDER {
            let oldest = self.holders.get(id).tips.iter().min_by_key(|(_, t)| t.touched).map(|(b, _)| *b);
            let Some(oldest) = oldest else { break };
            self.yield_tips(id, oldest);
        }
        // A call that found nothing says nothing yet of what it keeps.
        if !tips.is_empty() && std::mem::take(&mut self.holders.get_mut(id).rewritten) {
            self.outlive_some(id, touched, &mut { MAX_TIPS_PER_HOLDER });
        }
    }

    /// A holder was heard of. Another may have to make room.
    pub(crate) fn hear(&mut self, now: Instant, name: &HolderName) -> HolderId {
        if self.holders.find(name).is_none()
            && let Some(oldest) = self.holders.in_the_way()
        {
            self.let_go(oldest);
        }
        self.holders.hear(now, name)
    }

    /// A block has a parent from now on: whoever holds it holds what is above it.
    pub(crate) fn held_from_now_on(&mut self, id: BlockId, parent: BlockId) {
        let entry = self.get(id);
        let (held, common) = (entry.held, entry.flags.has(Flags::COMMON));
        let mut next = Some(parent);
        while let Some(block) = next.filter(|_| held > 0) {
            let entry = self.raw(block);
            entry.held += held;
            entry.flags.set(Flags::FADED, false);
            next = entry.parent;
        }
        if common {
            self.mark_common(parent, &mut Vec::new());
        }
    }

    /// Somebody used these blocks who did not say who he is. Answers with blocks that were faded and are not any more.
    pub(crate) fn hold_in_common(&mut self, tips: &[BlockId]) -> Vec<BlockId> {
        let mut revived = Vec::new();
        for tip in tips {
            self.mark_common(*tip, &mut revived);
        }
        revived
    }

    fn put_tip(&mut self, id: HolderId, tip: BlockId, touched: u64, revived: &mut Vec<BlockId>) {
        let holder = self.holders.get_mut(id);
        if let Some(here) = holder.tips.get_mut(&tip) {
            here.touched = touched;
            return;
        }
        let mut path = Vec::new();
        let mut next = Some(tip);
        let mut former = None;
        while let Some(block) = next {
            if self.holders.get(id).tips.contains_key(&block) {
                former = self.holders.take_tips(id, block);
                break;
            }
            path.push(block);
            next = self.get(block).parent;
        }
        let count = former.map_or(1, |tip| tip.count);
        for block in path {
            let entry = self.raw(block);
            entry.held += count;
            if entry.flags.has(Flags::FADED) {
                entry.flags.set(Flags::FADED, false);
                revived.push(block);
            }
        }
        self.holders.add_tips(id, tip, Tip { count, touched });
    }

    /// The latest call of a holder ended here: the ends of former calls in the same groups and shards give way.
    fn follow(&mut self, id: HolderId, tips: &[BlockId]) {
        let place = |entry: &Entry| (entry.layout, entry.group, entry.shard);
        for tip in tips {
            let of = place(self.get(*tip));
            let context = self.holders.get(id).context.iter().copied();
            let former: Vec<BlockId> = context.filter(|block| place(self.get(*block)) == of).collect();
            for block in former {
                self.holders.get_mut(id).context.remove(&block);
                self.holders.leave(id, block);
            }
            self.holders.get_mut(id).context.insert(*tip);
            self.holders.join(id, *tip);
        }
        self.holders.changed(id);
    }

    /// Marks a block and all above it as common.
    pub(crate) fn mark_common(&mut self, id: BlockId, revived: &mut Vec<BlockId>) {
        let mut next = Some(id);
        while let Some(block) = next.filter(|b| !self.get(*b).flags.has(Flags::COMMON)) {
            let entry = self.raw(block);
            if entry.flags.has(Flags::FADED) {
                revived.push(block);
            }
            entry.flags.set(Flags::FADED, false);
            entry.flags.set(Flags::COMMON, true);
            next = entry.parent;
        }
    }

    /// Forgets a holder that makes room for another.
    fn let_go(&mut self, id: HolderId) {
        for tip in self.holders.get(id).tips.keys().copied().collect::<Vec<_>>() {
            self.yield_tips(id, tip);
        }
        self.holders.remove(id);
    }

    /// Forgets a holder that holds nothing any more.
    pub(crate) fn forget_holder(&mut self, id: HolderId) {
        debug_assert!(self.holders.get(id).tips.is_empty(), "its tips were taken away");
        self.holders.remove(id);
    }

    /// Moves one of a holder's tips a block up. Answers with the block it left, if now nobody holds that; `None` when the
    /// holder has no tips left.
    pub(crate) fn lift(&mut self, id: HolderId) -> Option<Option<BlockId>> {
        // What faded lies below what is held: children go before their parents.
        if let Some(block) = self.holders.get_mut(id).former.pop_deepest() {
            return Some(self.lift_former(id, block));
        }
        let (&block, _) = self.holders.get(id).tips.last_key_value()?;
        let tip = self.holders.take_tips(id, block)?;
        self.holders.get_mut(id).left += 1;
        let entry = self.raw(block);
        entry.held -= tip.count;
        let exclusive = entry.held == 0 && !entry.flags.has(Flags::COMMON);
        if let Some(parent) = entry.parent {
            self.holders.add_tips(id, parent, tip);
        }
        Some(exclusive.then_some(block))
    }

    fn lift_former(&mut self, id: HolderId, block: BlockId) -> Option<BlockId> {
        self.holders.leave(id, block);
        let faded = |entry: &Entry| entry.flags.has(Flags::FADED) && entry.held == 0;
        let entry = self.get(block);
        if !faded(entry) {
            return None;
        }
        if let Some(parent) = entry.parent.filter(|p| faded(self.get(*p))) {
            let depth_blocks = self.get(parent).depth_blocks;
            self.holders.get_mut(id).former.insert(parent, depth_blocks);
            self.holders.join(id, parent);
        }
        Some(block)
    }

    /// A session's requests are a program's, which holds their blocks: only where its latest call ended is noted.
    pub(crate) fn follow_session(&mut self, now: Instant, name: &HolderName, tips: &[BlockId]) {
        let id = self.hear(now, name);
        self.follow(id, tips);
    }
}
