//! The table of holders, and which of them have a tip at a block.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use kvtier_types::{Instant, TenantId};
use rustc_hash::FxHashMap;

use super::shares::Shares;
use super::{Holder, HolderId, HolderKind, HolderName, MAX_GENERATIONS, MAX_HOLDERS, Tip};
use crate::catalog::BlockId;

/// All holders.
#[derive(Debug)]
pub(crate) struct Holders {
    slab: Vec<Option<Holder>>,
    free: Vec<u32>,
    names: BTreeMap<HolderName, HolderId>,
    /// By when they were last heard of.
    shares: Shares<HolderId>,
    /// Who has a tip, a former tip or the end of a context at a block; sorted.
    at: FxHashMap<BlockId, Vec<HolderId>>,
    /// Those that changed since they were last asked for.
    dirty: BTreeSet<HolderId>,
    /// Names of those that went since they were last asked for.
    gone: BTreeSet<HolderName>,
    /// Children whose parent went, and does not know them if it came back: they are yet to forget it.
    orphans: VecDeque<(HolderName, BTreeSet<HolderName>)>,
    touches: u64,
    /// Times that somebody moved on because a block went.
    moved: usize,
    limit: usize,
}

impl Default for Holders {
    fn default() -> Self {
        let nobody = || Holder::new(HolderName::program(&TenantId::shared(), ""), Instant::ZERO, 0);
        Self {
            slab: (0..HolderId::BEARERS).map(|_| Some(nobody())).collect(),
            free: Vec::new(),
            names: BTreeMap::new(),
            shares: Shares::default(),
            at: FxHashMap::default(),
            dirty: BTreeSet::new(),
            gone: BTreeSet::new(),
            orphans: VecDeque::new(),
            touches: 0,
            moved: 0,
            limit: MAX_HOLDERS,
        }
    }
}

impl Holders {
    /// A table that holds fewer, for tests.
    #[cfg(test)]
    pub(super) const fn limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    pub(crate) fn find(&self, name: &HolderName) -> Option<HolderId> {
        self.names.get(name).copied()
    }

    /// A holder's next call is to be told of.
    pub(crate) fn await_call(&mut self, name: &HolderName) {
        if let Some(id) = self.find(name) {
            self.get_mut(id).awaited = true;
        }
    }

    /// Whether a holder's next call is to be told of.
    pub(crate) fn is_awaited(&self, name: &HolderName) -> bool {
        self.find(name).is_some_and(|id| self.get(id).awaited)
    }

    /// Whether a holder's call was to be told of, which it is now.
    pub(crate) fn take_awaited(&mut self, name: &HolderName) -> bool {
        self.find(name).is_some_and(|id| std::mem::take(&mut self.get_mut(id).awaited))
    }

    pub(crate) fn get(&self, id: HolderId) -> &Holder {
        self.slab[id.0 as usize].as_ref().expect("holder ids are held only while their holder is present")
    }

    pub(crate) fn get_mut(&mut self, id: HolderId) -> &mut Holder {
        self.slab[id.0 as usize].as_mut().expect("holder ids are held only while their holder is present")
    }

    pub(crate) fn len(&self) -> usize {
        self.names.len()
    }

    /// Those after a name, in the order of names.
    pub(crate) fn after(&self, name: Option<&HolderName>) -> impl Iterator<Item = &Holder> {
        let start = name.map_or(std::ops::Bound::Unbounded, std::ops::Bound::Excluded);
        self.names.range((start, std::ops::Bound::Unbounded)).map(|(_, id)| self.get(*id))
    }

    /// Those of a kind and name, of whatever tenant.
    pub(crate) fn named(&self, kind: HolderKind, id: &str) -> impl Iterator<Item = &Holder> {
        // No id of a tenant comes before this one.
        let tenant = TenantId::new("-").expect("it has only good characters");
        let from = self.names.range(HolderName { kind, id: id.to_owned(), tenant }..);
        from.map(|(_, number)| self.get(*number)).take_while(move |h| h.name.kind == kind && h.name.id == id)
    }

    /// Who must make room before another holder comes: of the tenant that has most, the one silent for longest.
    pub(super) fn in_the_way(&self) -> Option<HolderId> {
        self.shares.first_to_go().copied().filter(|_| self.names.len() >= self.limit)
    }

    /// The next number of a touch.
    pub(crate) const fn touch(&mut self) -> u64 {
        self.touches += 1;
        self.touches
    }

    /// A holder was heard of; it is known from now on.
    pub(super) fn hear(&mut self, now: Instant, name: &HolderName) -> HolderId {
        let touched = self.touch();
        let id = self.find(name).unwrap_or_else(|| self.insert(Holder::new(name.clone(), now, touched)));
        let holder = self.get_mut(id);
        let before = std::mem::replace(&mut holder.touched, touched);
        holder.seen = holder.seen.max(now);
        self.shares.remove(&name.tenant, before, id);
        self.shares.insert(&name.tenant, touched, id);
        id
    }

    fn insert(&mut self, holder: Holder) -> HolderId {
        let at = self.free.pop().unwrap_or_else(|| {
            self.slab.push(None);
            u32::try_from(self.slab.len() - 1).expect("holders are bounded")
        });
        self.gone.remove(&holder.name);
        self.names.insert(holder.name.clone(), HolderId(at));
        self.slab[at as usize] = Some(holder);
        self.dirty.insert(HolderId(at));
        HolderId(at)
    }

    /// Takes a holder out, with what is noted of it at blocks. Its tips are to be taken away first.
    pub(super) fn remove(&mut self, id: HolderId) {
        let Some(holder) = self.slab[id.0 as usize].take() else { return };
        self.free.push(id.0);
        self.names.remove(&holder.name);
        self.shares.remove(&holder.name.tenant, holder.touched, id);
        self.dirty.remove(&id);
        for block in holder.tips.keys().chain(holder.former.iter()).chain(&holder.context) {
            self.leave(id, *block);
        }
        let parent = holder.parent.as_ref().and_then(|p| self.find(p));
        if let Some(parent) = parent {
            self.get_mut(parent).children.remove(&holder.name);
        }
        if !holder.children.is_empty() {
            self.orphans.push_back((holder.name.clone(), holder.children));
        }
        // Names that nobody asks for are bounded by how many there are at once.
        if self.gone.len() < MAX_HOLDERS {
            self.gone.insert(holder.name);
        }
    }

    /// Some of those whose parent went forget it, each taken off `left`. Answers whether some are left.
    pub(super) fn orphan_some(&mut self, left: &mut usize) -> bool {
        while let Some((parent, mut children)) = self.orphans.pop_front() {
            // It may be there again under its name, and know some of them.
            let knows = |holders: &Self, child: &HolderName| {
                holders.find(&parent).is_some_and(|id| holders.get(id).children.contains(child))
            };
            while let Some(child) = children.first().filter(|_| *left > 0) {
                *left -= 1;
                let forgets = |id: &HolderId| self.get(*id).parent.as_ref() == Some(&parent) && !knows(self, child);
                if let Some(id) = self.find(child).filter(forgets) {
                    self.get_mut(id).parent = None;
                    self.changed(id);
                }
                children.pop_first();
            }
            if !children.is_empty() {
                self.orphans.push_front((parent, children));
                return true;
            }
        }
        false
    }

    /// Whether some have yet to forget their parent.
    pub(super) fn has_orphans(&self) -> bool {
        !self.orphans.is_empty()
    }

    /// Names a holder's parent, where it has none. Beyond [`MAX_GENERATIONS`] nobody is known to be anybody's child.
    pub(crate) fn adopt(&mut self, child: HolderId, parent: HolderId) {
        if child == parent || self.get(child).parent.is_some() || self.may_be_above(child, parent) {
            return;
        }
        let (child_name, parent_name) = (self.get(child).name.clone(), self.get(parent).name.clone());
        self.get_mut(parent).children.insert(child_name);
        self.get_mut(child).parent = Some(parent_name);
        self.changed(child);
    }

    /// Whether `above` is an ancestor of `below`, or that would take too long to say.
    fn may_be_above(&self, above: HolderId, below: HolderId) -> bool {
        let parent = |id: &HolderId| self.get(*id).parent.as_ref().and_then(|p| self.find(p));
        let mut line = std::iter::successors(Some(below), parent);
        line.by_ref().take(MAX_GENERATIONS).any(|id| id == above) || line.next().is_some()
    }

    /// A holder is noted at a block.
    pub(super) fn join(&mut self, id: HolderId, block: BlockId) {
        let at = self.at.entry(block).or_default();
        if let Err(place) = at.binary_search(&id) {
            at.insert(place, id);
        }
    }

    /// A holder may have left a block.
    pub(super) fn leave(&mut self, id: HolderId, block: BlockId) {
        if self.slab[id.0 as usize].as_ref().is_some_and(|h| h.is_at(block)) {
            return;
        }
        let Some(at) = self.at.get_mut(&block) else { return };
        if let Ok(place) = at.binary_search(&id) {
            at.remove(place);
        }
        if at.is_empty() {
            self.at.remove(&block);
        }
    }

    /// Adds tips of a holder at a block, or touches those that are there.
    pub(super) fn add_tips(&mut self, id: HolderId, block: BlockId, tip: Tip) {
        let holder = self.get_mut(id);
        let here = holder.tips.entry(block).or_insert(Tip { count: 0, touched: 0 });
        here.count += tip.count;
        here.touched = here.touched.max(tip.touched);
        self.changed(id);
        self.join(id, block);
    }

    /// Takes a holder's tips at a block.
    pub(super) fn take_tips(&mut self, id: HolderId, block: BlockId) -> Option<Tip> {
        let holder = self.get_mut(id);
        let tip = holder.tips.remove(&block)?;
        self.changed(id);
        self.leave(id, block);
        Some(tip)
    }

    /// Takes some of a holder's tips at a block. Answers whether there were as many.
    pub(super) fn take_count(&mut self, id: HolderId, block: BlockId, count: u32) -> bool {
        let Some(here) = self.get_mut(id).tips.get_mut(&block).filter(|here| here.count >= count) else { return false };
        here.count -= count;
        if here.count == 0 {
            self.take_tips(id, block);
        }
        true
    }

    /// A block is gone: whoever was there is at its parent now, of which its depth is told and whether it is faded. Former tips stay only where all is former.
    pub(crate) fn removed(&mut self, block: BlockId, parent: Option<(BlockId, u32, bool)>) {
        for id in self.at.remove(&block).unwrap_or_default() {
            self.moved = self.moved.wrapping_add(1);
            let holder = self.get_mut(id);
            let tip = holder.tips.remove(&block);
            let former = holder.former.remove(block);
            let context = holder.context.remove(&block);
            self.changed(id);
            let Some((parent, depth_blocks, faded)) = parent else { continue };
            if let Some(tip) = tip {
                self.add_tips(id, parent, tip);
            }
            // Bearers come first: what fades is at the parent by now.
            let fades = faded || self.get(HolderId::FADING).tips.contains_key(&parent);
            let holder = self.get_mut(id);
            if former && fades {
                holder.former.insert(parent, depth_blocks);
            }
            if context {
                holder.context.insert(parent);
            }
            if holder.is_at(parent) {
                self.join(id, parent);
            }
        }
    }

    /// How often somebody moved on because a block went, over all.
    pub(crate) const fn moved(&self) -> usize {
        self.moved
    }

    /// Something of a holder changed that outlives a restart.
    pub(crate) fn changed(&mut self, id: HolderId) {
        if !id.is_bearer() {
            self.dirty.insert(id);
        }
    }

    /// Holders that changed since they were last asked for, as many as have about `limit` tips together, and the names of
    /// those that went.
    pub(crate) fn take_changes(&mut self, limit: usize) -> (Vec<HolderId>, Vec<HolderName>) {
        let mut changed = Vec::new();
        let mut left = limit;
        while left > 0
            && let Some(id) = self.dirty.pop_first()
        {
            let holder = self.get(id);
            left = left.saturating_sub(1 + holder.tips.len() + holder.former.len() + holder.context.len());
            changed.push(id);
        }
        let gone = std::iter::from_fn(|| self.gone.pop_first()).take(limit).collect();
        (changed, gone)
    }

    /// Whether there are changes that were not taken.
    pub(crate) fn has_changes(&self) -> bool {
        !self.dirty.is_empty() || !self.gone.is_empty()
    }
}
