//! The catalog: every shard this node knows, by key; the prefix tree between them; and which may go.
//!
//! Keys are interned once into a `u32` slab by a fixed-seed table. An entry without replicas stays while others name it
//! as their parent, so that the tree under it keeps its shape; then it goes.

use std::collections::VecDeque;

use hashbrown::HashTable;
use kvtier_types::{BlockKey, LayoutId, Location, NamespaceId, NodeNumber, RecordMeta, ShardKey, TenantId, Tier};
use rustc_hash::FxHashMap;

use crate::directory::Tiers;
use crate::entry::{Entry, Flags, child_index};
use crate::evict::Facts;
use crate::frame::FrameRef;
use crate::ghost::short;
use crate::intern::Interner;
use crate::pools::Pools;
use crate::publication::Publication;

/// Number of an entry in the catalog's slab.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(u32);

impl BlockId {
    #[cfg(test)]
    pub(crate) const fn new(index: u32) -> Self {
        Self(index)
    }

    /// The slab index.
    #[must_use]
    pub const fn index(self) -> u32 {
        self.0
    }
}

/// What many blocks share: whose they are and what they are blocks of.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Scope {
    /// Namespace digest.
    pub namespace: NamespaceId,
    /// Display name of the model.
    pub model: String,
    /// Owner.
    pub tenant: TenantId,
    /// Layout digest.
    pub layout: LayoutId,
}

impl Scope {
    /// Of a record.
    pub(crate) fn of(meta: &RecordMeta) -> Self {
        Self {
            namespace: meta.namespace,
            model: meta.model.clone(),
            tenant: meta.tenant.clone(),
            layout: meta.key.layout,
        }
    }
}

impl Default for Scope {
    fn default() -> Self {
        Self {
            namespace: NamespaceId::new([0; 32]),
            model: String::new(),
            tenant: TenantId::shared(),
            layout: LayoutId::new([0; 32]),
        }
    }
}

/// Where a shard's bytes can be had when this node has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// Another node, in the life it published the shard under.
    Peer {
        /// The node.
        node: NodeNumber,
        /// The number of its start.
        incarnation: u64,
    },
    /// What other nodes wrote to the object store.
    Floor,
}

/// The sources of one shard that were not tried yet, best first.
#[derive(Debug, Default)]
pub(crate) struct Remote {
    pub(crate) untried: VecDeque<Source>,
    /// It is given into this node's care: what arrives is its own.
    pub(crate) adopted: bool,
}

/// All entries.
#[derive(Debug)]
pub(crate) struct Catalog {
    slab: Vec<Option<Entry>>,
    free: Vec<u32>,
    index: HashTable<u32>,
    pub(crate) scopes: Interner<Scope>,
    pub(crate) programs: Interner<String>,
    layouts: Vec<LayoutId>,
    pools: Pools,
    /// Who else is said to have the shards that are flagged `REMOTE`.
    pub(crate) remotes: FxHashMap<BlockId, Remote>,
    /// What the directory is told; `None` where there is no cluster.
    pub(crate) publication: Option<Publication>,
}

impl Catalog {
    pub(crate) fn new(pools: Pools) -> Self {
        Self {
            slab: Vec::new(),
            free: Vec::new(),
            index: HashTable::new(),
            scopes: Interner::default(),
            programs: Interner::default(),
            layouts: Vec::new(),
            pools,
            remotes: FxHashMap::default(),
            publication: None,
        }
    }

    /// Number of a layout, `None` when there are too many.
    pub(crate) fn layout(&mut self, layout: &LayoutId) -> Option<u16> {
        if let Some(at) = self.layouts.iter().position(|l| l == layout) {
            return u16::try_from(at).ok();
        }
        let number = u16::try_from(self.layouts.len()).ok()?;
        self.layouts.push(*layout);
        Some(number)
    }

    /// Number of a layout seen before.
    pub(crate) fn find_layout(&self, layout: &LayoutId) -> Option<u16> {
        self.layouts.iter().position(|l| l == layout).and_then(|at| u16::try_from(at).ok())
    }

    pub(crate) fn find(&self, key: &BlockKey, layout: u16, shard: u16) -> Option<BlockId> {
        let same = |&at: &u32| {
            let entry = self.slab[at as usize].as_ref().expect("indexed entries are present");
            entry.key == *key && entry.layout == layout && entry.shard == shard
        };
        self.index.find(hash(key, layout, shard), same).map(|&at| BlockId(at))
    }

    /// Every entry of a block, whatever its layout or shard.
    pub(crate) fn find_all(&self, key: &BlockKey, shards: u16) -> Vec<BlockId> {
        let layouts = u16::try_from(self.layouts.len()).expect("layouts are numbered by u16");
        let pairs = (0..layouts).flat_map(|l| (0..shards).map(move |s| (l, s)));
        pairs.filter_map(|(l, s)| self.find(key, l, s)).collect()
    }

    pub(crate) fn get(&self, id: BlockId) -> &Entry {
        self.slab[id.0 as usize].as_ref().expect("block ids are held only while their entry is present")
    }

    pub(crate) fn try_get(&self, id: BlockId) -> Option<&Entry> {
        self.slab.get(id.0 as usize).and_then(Option::as_ref)
    }

    pub(crate) fn insert(&mut self, entry: Entry) -> BlockId {
        let hashed = hash(&entry.key, entry.layout, entry.shard);
        if let Some(parent) = entry.parent {
            self.slab[parent.0 as usize].as_mut().expect("a parent is present when its child comes").links += 1;
        }
        let at = self.free.pop().unwrap_or_else(|| {
            self.slab.push(None);
            u32::try_from(self.slab.len() - 1).expect("fewer than four billion blocks")
        });
        self.slab[at as usize] = Some(entry);
        let slab = &self.slab;
        self.index.insert_unique(hashed, at, |&other| {
            let e = slab[other as usize].as_ref().expect("indexed entries are present");
            hash(&e.key, e.layout, e.shard)
        });
        BlockId(at)
    }

    /// Changes an entry's state and keeps rankings, child counts and the tree in step. Returns whether it remains.
    pub(crate) fn update(&mut self, id: BlockId, change: impl FnOnce(&mut Entry)) -> bool {
        let before = Tier::ALL.map(|t| self.get(id).resident(t));
        self.unrank(id);
        change(self.slab[id.0 as usize].as_mut().expect("block ids are held only while their entry is present"));
        let parent = self.get(id).parent;
        for tier in [Tier::Host, Tier::Disk, Tier::Object] {
            match (before[tier.index()], self.get(id).resident(tier)) {
                (false, true) => self.count_child(parent, tier, 1),
                (true, false) => self.count_child(parent, tier, -1),
                _ => {}
            }
        }
        self.rank(id);
        self.note_change(id);
        self.drop_if_empty(id)
    }

    /// Queues an entry of which the directory was told something else than what is.
    fn note_change(&mut self, id: BlockId) {
        let Some(publication) = &mut self.publication else { return };
        let entry = self.slab[id.0 as usize].as_mut().expect("changed entries are present");
        let tiers = entry.tiers();
        if entry.flags.has(Flags::DIRTY) {
            publication.note_departed(tiers.is_empty());
            return;
        }
        if publication.told(entry.published) == tiers {
            return;
        }
        entry.flags.set(Flags::DIRTY, true);
        publication.enqueue(id, tiers.is_empty());
    }

    /// Ends an entry's wait in the queue of publication without telling anything of it.
    pub(crate) fn shed(&mut self, id: BlockId) {
        if let Some(entry) = self.slab[id.0 as usize].as_mut() {
            entry.flags.set(Flags::DIRTY, false);
            entry.published = 0;
            self.drop_if_empty(id);
        }
    }

    /// Ends an entry's wait in the queue of publication: what to tell of it, if anything, and what was told before.
    pub(crate) fn tell(&mut self, id: BlockId) -> Option<(ShardKey, Tiers, Tiers)> {
        let publication = self.publication.as_mut()?;
        let entry = self.slab[id.0 as usize].as_mut()?;
        let (old, new) = (publication.told(entry.published), entry.tiers());
        entry.flags.set(Flags::DIRTY, false);
        entry.published = publication.tell(new);
        let key = ShardKey { block: entry.key, layout: self.layouts[usize::from(entry.layout)], shard: entry.shard };
        self.drop_if_empty(id);
        (old != new).then_some((key, old, new))
    }

    fn count_child(&mut self, parent: Option<BlockId>, tier: Tier, by: i32) {
        let Some(parent) = parent else { return };
        self.unrank(parent);
        let entry = self.slab[parent.0 as usize].as_mut().expect("a parent outlives its resident children");
        let count = &mut entry.children[child_index(tier)];
        *count = count.checked_add_signed(by).expect("as many children leave as came");
        self.rank(parent);
    }

    /// Drops an entry that holds nothing, then its ancestors that were kept for its sake. Returns whether it remains.
    fn drop_if_empty(&mut self, id: BlockId) -> bool {
        if !self.is_empty(id) {
            return true;
        }
        let mut next = Some(id);
        while let Some(id) = next.filter(|id| self.is_empty(*id)) {
            next = self.remove(id);
        }
        false
    }

    fn is_empty(&self, id: BlockId) -> bool {
        let entry = self.get(id);
        let held = entry.in_use() || entry.host.is_some() || entry.disk.is_some() || entry.object.is_some();
        let awaited = Flags::QUEUED | Flags::DIRTY | Flags::REMOTE;
        !held && entry.links == 0 && !entry.flags.has(awaited)
    }

    /// Removes an entry and returns its parent.
    fn remove(&mut self, id: BlockId) -> Option<BlockId> {
        let entry = self.slab[id.0 as usize].take().expect("checked by the caller");
        if let Ok(found) = self.index.find_entry(hash(&entry.key, entry.layout, entry.shard), |&at| at == id.0) {
            found.remove();
        }
        self.free.push(id.0);
        self.remotes.remove(&id);
        self.scopes.release(entry.scope);
        self.programs.release(entry.program);
        let parent = entry.parent?;
        self.slab[parent.0 as usize].as_mut().expect("a parent outlives its children").links -= 1;
        Some(parent)
    }

    fn rank(&mut self, id: BlockId) {
        for tier in [Tier::Host, Tier::Disk, Tier::Object] {
            let entry = self.slab[id.0 as usize].as_mut().expect("ranked entries are present");
            if entry.evictable(tier) && !entry.flags.has(Flags::ranked(tier)) {
                entry.flags.set(Flags::ranked(tier), true);
                self.pools.ranking(tier, entry.bytes).insert(id, facts(entry));
            }
        }
    }

    fn unrank(&mut self, id: BlockId) {
        for tier in [Tier::Host, Tier::Disk, Tier::Object] {
            let entry = self.slab[id.0 as usize].as_mut().expect("ranked entries are present");
            if entry.flags.has(Flags::ranked(tier)) {
                entry.flags.set(Flags::ranked(tier), false);
                self.pools.ranking(tier, entry.bytes).remove(id, facts(entry));
            }
        }
    }

    /// Whether an entry waits in the queue of publication.
    pub(crate) fn is_dirty(&self, id: BlockId) -> bool {
        self.get(id).flags.has(Flags::DIRTY)
    }

    pub(crate) fn pools(&self) -> &Pools {
        &self.pools
    }

    /// Entries from slab index `from` on.
    pub(crate) fn iter_from(&self, from: u32) -> impl Iterator<Item = (BlockId, &Entry)> {
        // A page token may say anything; counting must not pass the last number.
        let from = from.min(u32::try_from(self.slab.len()).unwrap_or(u32::MAX - 1));
        let slots = (from..).zip(self.slab.iter().skip(from as usize));
        slots.filter_map(|(at, slot)| slot.as_ref().map(|entry| (BlockId(at), entry)))
    }

    pub(crate) fn len(&self) -> usize {
        self.slab.len() - self.free.len()
    }

    /// Bytes of the catalog's own memory, by capacity.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.slab.capacity() * size_of::<Option<Entry>>()
            + self.index.capacity() * (size_of::<u32>() + 1)
            + self.pools.len() * 32
    }

    pub(crate) fn layouts(&self) -> &[LayoutId] {
        &self.layouts
    }

    pub(crate) fn layout_id(&self, number: u16) -> &LayoutId {
        &self.layouts[usize::from(number)]
    }

    /// The replica's place in a tier, for people.
    pub(crate) fn place(entry: &Entry, tier: Tier) -> Option<String> {
        let at = |l: &Location, what: &str| format!("{what} {} page {}", l.segment, l.offset);
        match tier {
            Tier::Device => None,
            Tier::Host => entry.host.map(|FrameRef { extent, page, .. }| format!("extent {extent} page {page}")),
            Tier::Disk => entry.disk.as_ref().map(|l| at(l, "log segment")),
            Tier::Object => entry.object.as_ref().map(|l| at(l, "pack")),
        }
    }
}

const fn facts(entry: &Entry) -> Facts {
    Facts { touched: entry.touched, depth_blocks: entry.depth_blocks }
}

/// A key is a digest already: mixing in layout and shard is all that is left to do.
fn hash(key: &BlockKey, layout: u16, shard: u16) -> u64 {
    let place = (u64::from(layout) << 16) | u64::from(shard);
    short(key) ^ place.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}
