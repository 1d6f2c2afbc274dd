//! What a node holds: device, host and disk, each in the order of a ranking, every block in one of them.

use std::time::Duration;

use kvtier_policy::evict::survival::CallFacts;
use kvtier_policy::evict::{Duel, DuelConfig, Guarded, Known, KnownId, LeafLru, LeafS3Fifo, SegmentId, Segments};
use kvtier_types::{Instant, SemanticType};
use rustc_hash::FxHashMap;

use super::engine::seconds;
use super::pool::{self, Entry, Pool};
use super::tree::Tree;

/// Tiers of a node, fastest first.
pub(crate) const TIERS: usize = 3;
pub(crate) const DEVICE: usize = 0;
pub(crate) const HOST: usize = 1;
pub(crate) const DISK: usize = 2;
/// Kinds of meaning.
pub(crate) const TYPES: usize = SemanticType::ALL.len();
/// Writes to disk that may be behind by so much; what comes beyond is not written.
const WRITE_BEHIND: Duration = Duration::from_secs(2);

/// Which ranking a node's tiers are in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// By a key that is the time of the last use, or stands for one.
    Key,
    /// S3-FIFO.
    S3Fifo,
    /// Survival with its guard.
    Survival,
}

/// Where a block is, and since when it has been there or used.
#[derive(Debug, Clone, Copy)]
struct Place {
    tier: u8,
    since: Instant,
}

/// Block-seconds in device and host, by meaning: all, and those that ended in a use.
#[derive(Debug, Clone, Default)]
pub(crate) struct Occupancy {
    pub(crate) all: [f64; TYPES],
    pub(crate) useful: [f64; TYPES],
}

/// Blocks that left a tier for the next one, and that were dropped.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Written {
    pub(crate) to_host: u64,
    pub(crate) to_disk: u64,
    pub(crate) dropped: u64,
}

/// A node's tiers.
#[derive(Debug)]
pub(crate) struct Cache {
    known: Known<SegmentId>,
    blocks: Vec<u32>,
    places: FxHashMap<u32, Place>,
    pub(crate) segments: Segments,
    learns: bool,
    duel: Option<Duel>,
    pub(crate) pools: [Pool; TIERS],
    calls: u64,
    keys: Vec<u64>,
    in_segments: Vec<SegmentId>,
    disk_written: Instant,
    disk_block: Duration,
    pub(crate) occupancy: Occupancy,
    pub(crate) written: Written,
}

impl Cache {
    pub(crate) fn new(capacity: [usize; TIERS], order: Order, (block_bytes, disk_write): (u64, f64)) -> Self {
        let ranking = |blocks: usize| match order {
            Order::Key => pool::Order::One(Box::new(LeafLru::default())),
            Order::S3Fifo => pool::Order::One(Box::new(LeafS3Fifo::new(blocks))),
            Order::Survival => pool::Order::Guarded(Box::new(Guarded::new(blocks))),
        };
        let fast = capacity[DEVICE] + capacity[HOST];
        let learns = order == Order::Survival;
        Self {
            known: Known::new(if learns { 2 * fast } else { fast / 4 }),
            blocks: Vec::new(),
            places: FxHashMap::default(),
            segments: Segments::default(),
            learns,
            duel: learns.then(|| Duel::new(DuelConfig { capacity_blocks: fast as u64 })),
            pools: capacity.map(|blocks| Pool::new(blocks, ranking(blocks))),
            calls: 0,
            keys: Vec::new(),
            in_segments: Vec::new(),
            disk_written: Instant::ZERO,
            disk_block: seconds(block_bytes as f64 / disk_write),
            occupancy: Occupancy::default(),
            written: Written::default(),
        }
    }

    /// The tier that a block can be read from.
    pub(crate) fn tier(&self, block: u32) -> Option<usize> {
        self.places.get(&block).map(|place| usize::from(place.tier))
    }

    /// Numbers for the blocks of a prefix, kept until [`Cache::let_go`].
    pub(crate) fn number(&mut self, path: &[u32], ids: &mut Vec<KnownId>) {
        ids.clear();
        for block in path {
            let (id, _) = self.known.hold_key(u64::from(*block));
            if self.blocks.len() <= id.index() {
                self.blocks.resize(id.index() + 1, 0);
            }
            self.blocks[id.index()] = *block;
            ids.push(id);
        }
    }

    /// Numbers are needed no more.
    pub(crate) fn let_go(&mut self, ids: &[KnownId]) {
        ids.iter().for_each(|id| self.known.release(*id));
        while let Some((_, segment)) = self.known.forget() {
            if self.learns {
                self.segments.leave(segment);
            }
        }
    }

    /// A call uses a prefix: blocks that are here are ranked by it from now on. `key` stands for the time of the use where
    /// the order is by key.
    pub(crate) fn call(
        &mut self,
        now: Instant,
        facts: CallFacts,
        (path, ids): (&[u32], &[KnownId]),
        with: (u64, &Tree),
    ) {
        self.calls += 1;
        let (key, tree) = with;
        if !self.learns {
            for id in ids {
                self.touch(*id, (key, SegmentId::NONE));
            }
            return;
        }
        self.segments.begin_call(now, facts);
        self.in_segments.clear();
        for (block, id) in path.iter().zip(ids) {
            let segment = self.segments.use_block(self.known.value(*id), tree.semantic(*block));
            self.known.set(*id, segment);
            self.in_segments.push(segment);
            self.touch(*id, (self.calls, segment));
        }
        if let Some(duel) = &mut self.duel {
            self.keys.clear();
            self.keys.extend(path.iter().map(|block| u64::from(*block)));
            duel.call(self.calls, facts.program, (&self.keys, &self.in_segments), &self.segments);
        }
        self.segments.end_call();
    }

    fn touch(&mut self, id: KnownId, with: (u64, SegmentId)) {
        if let Some(pool) = self.pools.iter_mut().find(|pool| pool.has(id)) {
            pool.touch(id, with, &self.segments);
        }
    }

    /// The key of a block that is here.
    pub(crate) fn rekey(&mut self, block: u32, key: u64) {
        let Some(tier) = self.tier(block) else { return };
        let (id, _) = self.known.hold_key(u64::from(block));
        self.pools[tier].touch(id, (key, SegmentId::NONE), &self.segments);
        self.known.release(id);
    }

    /// The block can be read from the tier it was put into.
    pub(crate) fn publish(&mut self, now: Instant, block: u32) {
        self.publish_in(now, block, DEVICE);
    }

    /// The block can be read from a tier, unless it can be from another.
    pub(crate) fn publish_in(&mut self, now: Instant, block: u32, tier: usize) {
        let tier = u8::try_from(tier).expect("few tiers");
        self.places.entry(block).or_insert(Place { tier, since: now });
    }

    /// The time in memory until now of a block that is used now ended well.
    pub(crate) fn account(&mut self, now: Instant, block: u32, (used, semantic): (bool, SemanticType)) {
        let Some(place) = self.places.get_mut(&block) else { return };
        if usize::from(place.tier) != DISK {
            let held = now.since(place.since).as_secs_f64();
            self.occupancy.all[semantic as usize] += held;
            if used {
                self.occupancy.useful[semantic as usize] += held;
            }
        }
        place.since = now;
    }

    /// Puts a block into a tier, from another or as new, in use. `false`: there is no room.
    pub(crate) fn bring(&mut self, now: Instant, (id, entry): (KnownId, Entry), to: usize, tree: &Tree) -> bool {
        if self.pools[to].has(id) {
            self.pools[to].hold(id);
            return true;
        }
        let from = (0..TIERS).find(|tier| self.pools[*tier].has(id));
        if let Some(from) = from {
            self.pools[from].hold(id);
        }
        if !self.make_room(now, to, tree) {
            if let Some(from) = from {
                self.pools[from].release(id, &self.segments);
            }
            return false;
        }
        let block = self.blocks[id.index()];
        if let Some(from) = from {
            let entry = self.pools[from].entry(id);
            self.account(now, block, (false, tree.semantic(block)));
            self.pools[from].remove(id, false, &self.segments);
            self.pools[to].insert(entry, true, &self.segments);
            if let Some(place) = self.places.get_mut(&block) {
                place.tier = u8::try_from(to).expect("few tiers");
            }
        } else {
            self.known.hold(id);
            if let Some(parent) = entry.parent {
                self.known.hold(parent);
            }
            self.pools[to].insert(entry, true, &self.segments);
        }
        true
    }

    /// A block as it would be put in.
    pub(crate) fn entry(&self, (path, ids): (&[u32], &[KnownId]), at: usize) -> Entry {
        let parent = at.checked_sub(1).map(|before| ids[before]);
        let depth = u32::try_from(at).expect("paths are short");
        debug_assert_eq!(path.len(), ids.len());
        let touched = if self.learns { self.calls } else { 0 };
        Entry { id: ids[at], parent, depth, touched, segment: self.known.value(ids[at]) }
    }

    /// Makes room for one block.
    fn make_room(&mut self, now: Instant, tier: usize, tree: &Tree) -> bool {
        while self.pools[tier].used >= self.pools[tier].capacity {
            if self.learns
                && let Some(duel) = &self.duel
            {
                let leader = duel.leader();
                self.pools[tier].follow(leader);
            }
            let Some(victim) = self.pools[tier].victim(&self.segments) else { return false };
            self.offload(now, (victim, tier), tree);
        }
        true
    }

    /// A block goes to the next tier, or is dropped where there is none, no room, or no time to write it.
    fn offload(&mut self, now: Instant, (id, from): (KnownId, usize), tree: &Tree) {
        let entry = self.pools[from].entry(id);
        let block = self.blocks[id.index()];
        self.account(now, block, (false, tree.semantic(block)));
        self.pools[from].remove(id, true, &self.segments);
        let to = from + 1;
        let readable = self.places.contains_key(&block);
        let writes = to != DISK || self.disk_written.since(now) < WRITE_BEHIND;
        if to < TIERS && readable && writes && self.pools[to].capacity > 0 && self.make_room(now, to, tree) {
            self.pools[to].insert(entry, false, &self.segments);
            if to == DISK {
                self.disk_written = self.disk_written.max(now) + self.disk_block;
                self.written.to_disk += 1;
            } else {
                self.written.to_host += 1;
            }
            if let Some(place) = self.places.get_mut(&block) {
                place.tier = u8::try_from(to).expect("few tiers");
            }
            return;
        }
        self.written.dropped += 1;
        self.places.remove(&block);
        self.known.release(id);
        if let Some(parent) = entry.parent {
            self.known.release(parent);
        }
    }

    /// A block that nobody will use again goes, if nobody uses it and nothing below it is here.
    pub(crate) fn forget(&mut self, now: Instant, block: u32, semantic: SemanticType) {
        let Some(tier) = self.tier(block) else { return };
        let (id, _) = self.known.hold_key(u64::from(block));
        if self.pools[tier].may_go(id) {
            let entry = self.pools[tier].entry(id);
            self.account(now, block, (false, semantic));
            self.pools[tier].remove(id, false, &self.segments);
            self.places.remove(&block);
            self.known.release(id);
            if let Some(parent) = entry.parent {
                self.known.release(parent);
            }
        }
        self.let_go(&[id]);
    }

    /// A user of a block in a tier less.
    pub(crate) fn release(&mut self, id: KnownId, tier: usize) {
        if self.pools[tier].has(id) && self.pools[tier].in_use(id) {
            self.pools[tier].release(id, &self.segments);
        }
    }

    /// Blocks here.
    pub(crate) fn len(&self) -> usize {
        self.pools.iter().map(|pool| pool.used).sum()
    }
}
