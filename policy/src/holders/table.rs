//! The table of holders, and which of them have a tip at a block.

use std::collections::{BTreeMap, BTreeSet};

use kvtier_types::{Instant, TenantId};
use rustc_hash::FxHashMap;

use super::{Holder, HolderId, HolderKind, HolderName, MAX_HOLDERS, Tip};
use crate::catalog::BlockId;

/// All holders.
#[derive(Debug, Default)]
pub(crate) struct Holders {
    slab: Vec<Option<Holder>>,
    free: Vec<u32>,
    names: BTreeMap<HolderName, HolderId>,
    /// By when they were last heard of.
    order: BTreeSet<(u64, HolderId)>,
    /// Who has a tip, a former tip or the end of a context at a block; sorted.
    at: FxHashMap<BlockId, Vec<HolderId>>,
    /// Those that changed since they were last asked for.
    dirty: BTreeSet<HolderId>,
    /// Names of those that went since they were last asked for.
    gone: BTreeSet<HolderName>,
    touches: u64,
    limit: Option<usize>,
}

impl Holders {
    /// A table that holds fewer, for tests.
    #[cfg(test)]
    pub(super) fn limit(&mut self, limit: usize) {
        self.limit = Some(limit);
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

    /// Whether a holder's call was to be told of.
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

    /// Who must make room before another holder comes: the one silent for longest.
    pub(super) fn in_the_way(&self) -> Option<HolderId> {
        let full = self.names.len() >= self.limit.unwrap_or(MAX_HOLDERS);
        self.order.first().map(|(_, id)| *id).filter(|_| full)
    }

    /// The next number of a touch.
    pub(super) const fn touch(&mut self) -> u64 {
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
        self.order.remove(&(before, id));
        self.order.insert((touched, id));
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
        self.order.remove(&(holder.touched, id));
        self.dirty.remove(&id);
        for block in holder.tips.keys().chain(&holder.former).chain(&holder.context) {
            self.leave(id, *block);
        }
        let parent = holder.parent.as_ref().and_then(|p| self.find(p));
        if let Some(parent) = parent {
            self.get_mut(parent).children.remove(&holder.name);
        }
        for child in holder.children.iter().filter_map(|c| self.find(c)).collect::<Vec<_>>() {
            self.get_mut(child).parent = None;
            self.dirty.insert(child);
        }
        // Names that nobody asks for are bounded by how many there are at once.
        if self.gone.len() < MAX_HOLDERS {
            self.gone.insert(holder.name);
        }
    }

    /// Names a holder's parent, where it has none.
    pub(crate) fn adopt(&mut self, child: HolderId, parent: HolderId) {
        if child == parent || self.get(child).parent.is_some() || self.is_above(child, parent) {
            return;
        }
        let (child_name, parent_name) = (self.get(child).name.clone(), self.get(parent).name.clone());
        self.get_mut(parent).children.insert(child_name);
        self.get_mut(child).parent = Some(parent_name);
        self.dirty.insert(child);
    }

    /// Whether `above` is an ancestor of `below`.
    fn is_above(&self, above: HolderId, below: HolderId) -> bool {
        let parent = |id: &HolderId| self.get(*id).parent.as_ref().and_then(|p| self.find(p));
        // Chains have no circles, since none is ever closed here.
        std::iter::successors(Some(below), parent).any(|id| id == above)
    }

    /// The holder and all below it, itself first.
    pub(crate) fn family(&self, id: HolderId) -> Vec<HolderId> {
        let mut family = vec![id];
        let mut next = 0;
        while let Some(id) = family.get(next) {
            let children = self.get(*id).children.iter().filter_map(|c| self.find(c));
            family.extend(children.collect::<Vec<_>>());
            next += 1;
        }
        family
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
        self.dirty.insert(id);
        self.join(id, block);
    }

    /// Takes a holder's tips at a block.
    pub(super) fn take_tips(&mut self, id: HolderId, block: BlockId) -> Option<Tip> {
        let holder = self.get_mut(id);
        let tip = holder.tips.remove(&block)?;
        self.dirty.insert(id);
        self.leave(id, block);
        Some(tip)
    }

    /// A block is gone: whoever was there is at its parent now. Former tips stay only where all is former.
    pub(crate) fn removed(&mut self, block: BlockId, parent: Option<(BlockId, bool)>) {
        for id in self.at.remove(&block).unwrap_or_default() {
            let holder = self.get_mut(id);
            let tip = holder.tips.remove(&block);
            let former = holder.former.remove(&block);
            let context = holder.context.remove(&block);
            self.dirty.insert(id);
            let Some((parent, faded)) = parent else { continue };
            if let Some(tip) = tip {
                self.add_tips(id, parent, tip);
            }
            let holder = self.get_mut(id);
            if former && faded {
                holder.former.insert(parent);
            }
            if context {
                holder.context.insert(parent);
            }
            if holder.is_at(parent) {
                self.join(id, parent);
            }
        }
    }

    /// Something of a holder changed that outlives a restart.
    pub(crate) fn changed(&mut self, id: HolderId) {
        self.dirty.insert(id);
    }

    /// Holders that changed since they were last asked for, at most `limit`, and the names of those that went.
    pub(crate) fn take_changes(&mut self, limit: usize) -> (Vec<HolderId>, Vec<HolderName>) {
        let dirty = std::iter::from_fn(|| self.dirty.pop_first()).take(limit).collect();
        (dirty, std::mem::take(&mut self.gone).into_iter().collect())
    }
}
