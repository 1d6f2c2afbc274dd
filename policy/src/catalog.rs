//! The catalog: every shard this node knows, by key; the prefix tree between them; and which may go.
//!
//! Keys are interned once into a `u32` slab by a fixed-seed table. An entry without replicas stays while others name it
//! as their parent, so that the tree under it keeps its shape; then it goes.

mod extents;
mod layouts;
mod on_device;
mod ranks;
mod spot;
mod told;
mod unread;

use std::collections::{BTreeSet, VecDeque};

use hashbrown::HashTable;
use kvtier_types::{
    BlockKey, DeviceNumber, Instant, LayoutId, Location, MAX_DEVICE_EXTENTS, NamespaceId, NodeNumber, RecordMeta,
    Taint, TenantId, Tier,
};
use rustc_hash::FxHashMap;

use crate::census::{Census, Counted};
use crate::entry::{Entry, Flags, Kept, NEVER, child_index};
use crate::events::{EventKind, Events};
use crate::evict::{SegmentId, Segments};
use crate::frame::FrameRef;
use crate::ghost::short;
use crate::holders::Holders;
use crate::intern::Interner;
use crate::pools::{Pools, is_held};
use crate::publication::Publication;
use crate::rules::Life;
use extents::Extents;
use on_device::OnDevice;
pub(crate) use on_device::device_of;
use ranks::Known;
pub(crate) use spot::{Place, Spot};
pub use unread::SpreadCounts;

/// Number of an entry in the catalog's slab.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(u32);

impl BlockId {
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
    /// Another node has the copy made ahead of its use.
    pub(crate) ahead: bool,
}

/// All entries.
#[derive(Debug)]
pub(crate) struct Catalog {
    slab: Vec<Option<Entry>>,
    free: Vec<u32>,
    index: HashTable<u32>,
    pub(crate) scopes: Interner<Scope>,
    pub(crate) programs: Interner<String>,
    pub(crate) taints: Interner<Vec<Taint>>,
    pub(crate) lives: Interner<Life>,
    /// Ends by taint, which no rule puts off. Others end by rule.
    pub(crate) ephemeral: FxHashMap<BlockId, Instant>,
    expiries: BTreeSet<(Instant, BlockId)>,
    census: Census,
    layouts: Vec<LayoutId>,
    /// Shards that blocks of each layout had so far: the highest index plus one.
    shards: Vec<u16>,
    pools: Pools,
    /// What was used together, and how soon such was used again.
    pub(crate) segments: Segments,
    /// Who else is said to have the shards that are flagged `REMOTE`.
    pub(crate) remotes: FxHashMap<BlockId, Remote>,
    extents: Extents,
    /// Copies in the memory of devices.
    pub(crate) on_device: OnDevice,
    /// Who holds what.
    pub(crate) holders: Holders,
    /// What happened lately.
    pub(crate) events: Events,
    /// Tokens of a block, by layout and group, as engines were attached with them.
    block_tokens: FxHashMap<(u16, u16), u32>,
    /// What the directory is told; `None` where there is no cluster.
    pub(crate) publication: Option<Publication>,
    /// Copies that other nodes had made here ahead of their use.
    pub(crate) spread: SpreadCounts,
}

impl Catalog {
    pub(crate) fn new(pools: Pools) -> Self {
        Self {
            slab: Vec::new(),
            free: Vec::new(),
            index: HashTable::new(),
            scopes: Interner::default(),
            programs: Interner::default(),
            taints: Interner::default(),
            lives: Interner::default(),
            ephemeral: FxHashMap::default(),
            expiries: BTreeSet::new(),
            census: Census::default(),
            layouts: Vec::new(),
            shards: Vec::new(),
            pools,
            segments: Segments::default(),
            remotes: FxHashMap::default(),
            extents: Extents::default(),
            on_device: OnDevice::default(),
            holders: Holders::default(),
            events: Events::default(),
            spread: SpreadCounts::default(),
            block_tokens: FxHashMap::default(),
            publication: None,
        }
    }

    pub(crate) fn find(&self, key: &BlockKey, layout: u16, shard: u16) -> Option<BlockId> {
        let same = |&at: &u32| {
            let entry = self.slab[at as usize].as_ref().expect("indexed entries are present");
            entry.key == *key && entry.layout == layout && entry.shard == shard
        };
        self.index.find(hash(key, layout, shard), same).map(|&at| BlockId(at))
    }

    /// As [`Self::find`], of what was found before as `id`.
    pub(crate) fn find_again(&self, id: Option<BlockId>, key: &BlockKey, layout: u16, shard: u16) -> Option<BlockId> {
        let entry = id.and_then(|id| self.try_get(id));
        let same = entry.is_some_and(|e| e.key == *key && e.layout == layout && e.shard == shard);
        if same { id } else { self.find(key, layout, shard) }
    }

    /// Every entry of a block, whatever its layout or shard.
    pub(crate) fn find_all(&self, key: &BlockKey) -> Vec<BlockId> {
        let layouts = (0..).zip(&self.shards);
        let pairs = layouts.flat_map(|(layout, shards)| (0..*shards).map(move |shard| (layout, shard)));
        pairs.filter_map(|(layout, shard)| self.find(key, layout, shard)).collect()
    }

    /// Names an entry's parent where it has none. The entry has no children, so that no circle can come of it.
    pub(crate) fn set_parent(&mut self, id: BlockId, parent: BlockId) {
        let entry = self.get(id);
        if id == parent || entry.parent.is_some() || entry.links > 0 || entry.fastest().is_some() {
            return;
        }
        self.slab[parent.0 as usize].as_mut().expect("a parent is present when its child comes").links += 1;
        self.slab[id.0 as usize].as_mut().expect("checked above").parent = Some(parent);
        self.held_from_now_on(id, parent);
    }

    pub(crate) fn get(&self, id: BlockId) -> &Entry {
        self.slab[id.0 as usize].as_ref().expect("block ids are held only while their entry is present")
    }

    /// An entry, to change what neither rankings nor counts read.
    pub(crate) fn raw(&mut self, id: BlockId) -> &mut Entry {
        self.slab[id.0 as usize].as_mut().expect("block ids are held only while their entry is present")
    }

    pub(crate) fn try_get(&self, id: BlockId) -> Option<&Entry> {
        self.slab.get(id.0 as usize).and_then(Option::as_ref)
    }

    pub(crate) fn insert(&mut self, entry: Entry) -> BlockId {
        let hashed = hash(&entry.key, entry.layout, entry.shard);
        self.note_shards(entry.layout, entry.shard.saturating_add(1));
        if let Some(parent) = entry.parent {
            self.slab[parent.0 as usize].as_mut().expect("a parent is present when its child comes").links += 1;
        }
        let at = self.free.pop().unwrap_or_else(|| {
            self.slab.push(None);
            u32::try_from(self.slab.len() - 1).expect("fewer than four billion blocks")
        });
        let (expires, frame) = (entry.expires, entry.host);
        self.slab[at as usize] = Some(entry);
        self.extents.moved(BlockId(at), None, frame);
        self.await_expiry(BlockId(at), expires);
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
        let (unread, frame) = (SpreadCounts::of(self.get(id)), self.get(id).host);
        let counted = Counted::of(self.get(id), self.pools.class_of(self.get(id).bytes));
        let (expired, touched, held) = (self.get(id).expires, self.get(id).touched, is_held(self.get(id).standing));
        self.unrank(id);
        change(self.slab[id.0 as usize].as_mut().expect("block ids are held only while their entry is present"));
        self.find_segment(id);
        if self.get(id).host != frame {
            self.extents.moved(id, frame, self.get(id).host);
        }
        let entry = self.slab[id.0 as usize].as_mut().expect("changed entries are present");
        // A copy that comes back asks for its place anew.
        let stays = entry.stays;
        entry.stays = Kept::of(|t| stays.has(t) && entry.resident(t));
        self.spread.changed(unread, entry);
        let parent = entry.parent;
        let recounted = Counted::of(entry, self.pools.class_of(entry.bytes));
        let tenant = |of: &Counted| &self.scopes.get(of.scope).tenant;
        self.census.recount((counted, tenant(&counted)), (recounted, tenant(&recounted)));
        let entry = &*entry;
        if entry.expires != expired {
            let expires = entry.expires;
            self.expiries.remove(&(expired, id));
            self.await_expiry(id, expires);
        }
        let used = self.get(id).touched != touched;
        for tier in [Tier::Host, Tier::Disk, Tier::Object] {
            let holds = is_held(self.get(id).standing) && self.get(id).resident(tier);
            if holds != (held && before[tier.index()]) {
                let bytes = self.get(id).bytes;
                self.pools.pool(tier, bytes).hold(holds);
            }
        }
        for tier in [Tier::Host, Tier::Disk, Tier::Object] {
            match (before[tier.index()], self.get(id).resident(tier)) {
                (true, true) if used => self.ranked_as(id, tier, Known::Used),
                (false, true) => {
                    self.ranked_as(id, tier, Known::Came);
                    self.count_child(parent, tier, 1);
                    self.note_event(id, EventKind::Stored, Some(tier));
                }
                (true, false) => {
                    self.ranked_as(id, tier, Known::Left);
                    self.count_child(parent, tier, -1);
                    self.note_event(id, EventKind::Removed, Some(tier));
                }
                _ => {}
            }
        }
        // Copies on devices have an order of their own, and no children.
        let device = Tier::Device;
        match (before[device.index()], self.get(id).resident(device)) {
            (false, true) => self.note_event(id, EventKind::Stored, Some(device)),
            (true, false) => self.note_event(id, EventKind::Removed, Some(device)),
            _ => {}
        }
        self.rank(id);
        self.note_change(id);
        self.drop_if_empty(id)
    }

    /// A use of an entry begins or ends: its leases, its last use and its segment change, and nothing that is counted
    /// elsewhere. Returns whether it remains.
    pub(crate) fn touch(&mut self, id: BlockId, change: impl FnOnce(&mut Entry)) -> bool {
        if self.get(id).flags.has(Flags::RANKED) {
            self.unrank(id);
        }
        let entry = self.slab[id.0 as usize].as_mut().expect("block ids are held only while their entry is present");
        let before = entry.touched;
        change(entry);
        let (used, in_use) = (entry.touched != before, entry.in_use());
        let tiers = [Tier::Host, Tier::Disk, Tier::Object].map(|tier| (tier, entry.resident(tier)));
        let only_in_host = !tiers[1].1 && !tiers[2].1;
        for (tier, _) in tiers.into_iter().filter(|(_, resident)| used && *resident) {
            self.ranked_as(id, tier, Known::Used);
        }
        // What is in use may not go from host memory.
        if !(only_in_host && in_use) {
            self.rank(id);
        }
        in_use || self.drop_if_empty(id)
    }

    /// What came without a call (from a former life, from elsewhere) is as what it goes on from.
    fn find_segment(&mut self, id: BlockId) {
        let entry = self.get(id);
        if entry.segment == SegmentId::NONE && entry.fastest().is_some() {
            let (parent, semantic) = (entry.parent.map_or(SegmentId::NONE, |p| self.get(p).segment), entry.semantic);
            let segment = self.segments.beside(parent, semantic);
            self.slab[id.0 as usize].as_mut().expect("checked above").segment = segment;
        }
    }

    fn await_expiry(&mut self, id: BlockId, at: Instant) {
        if at != NEVER {
            self.expiries.insert((at, id));
        }
    }

    /// The entry that ends first, and when.
    pub(crate) fn first_expiry(&self) -> Option<(Instant, BlockId)> {
        self.expiries.first().copied()
    }

    /// Copies by type and tier.
    pub(crate) const fn census(&self) -> &Census {
        &self.census
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
        let awaited =
            Flags::QUEUED | Flags::DIRTY | Flags::REMOTE | Flags::REPLICATE | Flags::FOR_DEVICE | Flags::ON_DEVICE;
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
        let parent = entry.parent.map(|id| (id, self.get(id)));
        let parent = parent.map(|(id, entry)| (id, entry.depth_blocks, entry.flags.has(Flags::FADED)));
        self.holders.removed(id, parent);
        self.ephemeral.remove(&id);
        self.expiries.remove(&(entry.expires, id));
        self.segments.leave(entry.segment);
        self.scopes.release(entry.scope);
        self.programs.release(entry.program);
        self.taints.release(entry.taints);
        self.lives.release(entry.life);
        let parent = entry.parent?;
        self.slab[parent.0 as usize].as_mut().expect("a parent outlives its children").links -= 1;
        Some(parent)
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
            + self.on_device.memory_bytes()
            + self.extents.memory_bytes()
    }

    /// The replica's place in a tier, for people.
    pub(crate) fn place(&self, (id, entry): (BlockId, &Entry), tier: Tier) -> Option<String> {
        let at = |l: &Location, what: &str| format!("{what} {} page {}", l.segment, l.offset);
        match tier {
            Tier::Device => self.device_frame(id).map(|frame| {
                let (device, extent) =
                    (device_of(frame).map_or(0, DeviceNumber::index), frame.extent % MAX_DEVICE_EXTENTS);
                format!("device {device} extent {extent} page {}", frame.page)
            }),
            Tier::Host => entry.host.map(|FrameRef { extent, page, .. }| format!("extent {extent} page {page}")),
            Tier::Disk => entry.disk.as_ref().map(|l| at(l, "log segment")),
            Tier::Object => entry.object.as_ref().map(|l| at(l, "pack")),
        }
    }
}

/// A key is a digest already: mixing in layout and shard is all that is left to do.
fn hash(key: &BlockKey, layout: u16, shard: u16) -> u64 {
    let place = (u64::from(layout) << 16) | u64::from(shard);
    short(key) ^ place.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}
