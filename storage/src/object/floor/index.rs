//! Which records lie in other writers' packs.
//!
//! A record is a [`Slot`] in its pack's slice and an entry of one ordered set, found by half a digest of its block key and
//! half a digest of its shard key; what is at the place is verified against the whole key when it is read. Records that
//! [`Tombstones`] cover are not found.
//!
//! *Bounds*: at most `max_records` records of 64 bytes (`a_record_takes_at_most_64_bytes`) and [`MAX_PACKS`] packs of about
//! 300 bytes. Beyond, the oldest packs are left out (an announced one counts as new until a listing tells its age).
//! *Lock order*: one lock in [`super::Shared`], never held while waiting, nor for more than a batch or a pack.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use kvtier_types::{BlockKey, NodeId, ShardKey};

use super::FloorRecord;
use super::listing::Listed;
use super::name::PackAt;
use super::tombstones::{MAX_TOMBSTONES, Tombstones, block_digest};
use crate::object::pack::{Entry, PackName};

/// Most packs known: 8 TiB of packs of the usual size.
pub(super) const MAX_PACKS: usize = 1 << 20;
/// Packs compared with a listing at a time, under one lock.
pub(super) const BATCH: usize = 1024;
/// Most records of a pack: more do not fit the longest footer.
pub(super) const MAX_PACK_RECORDS: usize = u16::MAX as usize + 1;
/// Copies of one shard that a lookup chooses from.
const MAX_COPIES: usize = 16;
/// A footer that failed so often is not read again.
const MAX_FAILURES: u8 = 2;

/// A record. Its 8-byte fields are split, so that no byte is lost to alignment.
#[derive(Debug, Clone, Copy)]
struct Slot {
    /// Of its block and of its shard key.
    digest: [u32; 2],
    checksum: [u32; 2],
    sequence: [u32; 2],
    offset: u32,
    bytes: u32,
    header_bytes: u32,
}

/// The records of a pack. Their digests take a while: made before the index is locked.
#[derive(Debug)]
pub(super) struct Slots {
    slots: Box<[Slot]>,
    /// The highest sequence among them.
    newest: u64,
}

impl Slots {
    /// Of a footer's entries, at most [`MAX_PACK_RECORDS`], whose offsets and lengths fit 32 bits since the pack's does.
    pub(super) fn of(entries: &[Entry]) -> Self {
        let newest = entries.iter().map(|entry| entry.meta.sequence).max().unwrap_or(0);
        Self { slots: entries.iter().filter_map(Slot::of).collect(), newest }
    }
}

/// The digest but for its last 16 bits, number of the pack, index in it.
type Place = (u32, u16, u32, u16);

#[derive(Debug)]
struct Pack {
    at: PackAt,
    bytes: u64,
    modified_ms: u64,
    /// The listing that was the latest when it was learnt: an older one says nothing about it.
    learnt_in: u64,
    slots: Box<[Slot]>,
}

/// What the floor knows.
#[derive(Debug)]
pub(super) struct Index {
    max_records: usize,
    records: usize,
    pack_bytes: u64,
    listings: u64,
    next: u32,
    places: BTreeSet<Place>,
    packs: BTreeMap<u32, Pack>,
    numbers: BTreeMap<PackAt, u32>,
    by_age: BTreeSet<(u64, u32)>,
    /// The highest sequence that each writer's packs showed.
    newest: BTreeMap<NodeId, u64>,
    pub(super) tombs: Tombstones,
    /// Packs whose footer failed its verification, and how often. Only listed ones, as below.
    failed: BTreeMap<PackAt, u8>,
    /// Packs whose footer the store did not yield, and how often.
    stalled: BTreeMap<PackAt, u32>,
    /// When the newest pack was made that was left out for want of room.
    left_out_ms: Option<u64>,
    left_out: usize,
    warned: bool,
}

/// How much an index holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FloorUsage {
    /// Packs in the index.
    pub packs: usize,
    /// Their bytes in the store.
    pub pack_bytes: u64,
    /// Their records.
    pub records: usize,
    /// Packs, at the last listing and since, whose records are left out for want of room.
    pub left_out_packs: usize,
    /// Packs whose footer failed its verification twice.
    pub unreadable_packs: usize,
    /// Tombstones: what was evicted of them.
    pub tombstones: usize,
}

impl Index {
    pub(super) fn new(max_records: usize) -> Self {
        Self {
            max_records,
            records: 0,
            pack_bytes: 0,
            listings: 0,
            next: 0,
            places: BTreeSet::new(),
            packs: BTreeMap::new(),
            numbers: BTreeMap::new(),
            by_age: BTreeSet::new(),
            newest: BTreeMap::new(),
            tombs: Tombstones::new(MAX_TOMBSTONES),
            failed: BTreeMap::new(),
            stalled: BTreeMap::new(),
            left_out_ms: None,
            left_out: 0,
            warned: false,
        }
    }

    /// The number of the latest listing.
    pub(super) const fn listing(&self) -> u64 {
        self.listings
    }

    /// The number of the listing that begins now.
    pub(super) fn begin_listing(&mut self) -> u64 {
        self.listings += 1;
        self.listings
    }

    /// Drops packs that listing `listing` did not show, of a batch that begins at number `from`. Returns how many, and
    /// where the next batch begins.
    pub(super) fn drop_absent(
        &mut self,
        from: u32,
        listing: u64,
        shown: impl Fn(&PackAt) -> bool,
    ) -> (usize, Option<u32>) {
        let batch: Vec<_> = self.packs.range(from..).take(BATCH).collect();
        let next = (batch.len() == BATCH).then(|| batch[BATCH - 1].0.saturating_add(1));
        let absent = batch.into_iter().filter(|(_, pack)| pack.learnt_in < listing && !shown(&pack.at));
        let gone: Vec<PackAt> = absent.map(|(_, pack)| pack.at.clone()).collect();
        gone.iter().for_each(|at| self.drop_pack(at));
        (gone.len(), next)
    }

    /// Forgets about failures of packs that are not there, and begins to count what is left out, `cut` so far.
    pub(super) fn begin_comparing(&mut self, cut: usize, shown: impl Fn(&PackAt) -> bool) {
        self.failed.retain(|at, _| shown(at));
        self.stalled.retain(|at, _| shown(at));
        self.left_out = cut;
    }

    /// Forgets about writers that have no packs any more.
    pub(super) fn forget_writers(&mut self, shown: impl Fn(&NodeId) -> bool) {
        let Self { newest, numbers, .. } = self;
        let first = |writer: &NodeId| PackAt { writer: writer.clone(), name: PackName([0; 32]) };
        let is_known =
            |writer: &NodeId| numbers.range(first(writer)..).next().is_some_and(|(at, _)| at.writer == *writer);
        newest.retain(|writer, _| shown(writer) || is_known(writer));
    }

    /// Whether the footer of a listed pack is to be read.
    pub(super) fn wants(&mut self, pack: &Listed) -> bool {
        if self.knows(&pack.at) {
            self.set_age(&pack.at, pack.modified_ms);
            return false;
        }
        let too_old = self.is_too_old(pack.modified_ms);
        self.left_out += usize::from(too_old);
        !too_old && !self.is_unreadable(&pack.at)
    }

    /// The store's word on a pack's age, which an announcement only guessed.
    fn set_age(&mut self, at: &PackAt, modified_ms: u64) {
        let Some((number, pack)) = self.numbers.get(at).and_then(|n| Some((*n, self.packs.get_mut(n)?))) else {
            return;
        };
        if pack.modified_ms == modified_ms {
            return;
        }
        self.by_age.remove(&(pack.modified_ms, number));
        pack.modified_ms = modified_ms;
        self.by_age.insert((modified_ms, number));
    }

    /// Whether packs as old as this are left out.
    pub(super) fn is_too_old(&self, modified_ms: u64) -> bool {
        self.left_out_ms.is_some_and(|newest| modified_ms <= newest)
    }

    pub(super) fn knows(&self, at: &PackAt) -> bool {
        self.numbers.contains_key(at)
    }

    /// Adds a pack with its records, for which older ones may have to go. Returns whether it is in the index now and was
    /// not before.
    pub(super) fn insert(&mut self, pack: Listed, Slots { slots, newest }: Slots) -> bool {
        if self.knows(&pack.at) {
            return false;
        }
        while self.records + slots.len() > self.max_records || self.packs.len() >= MAX_PACKS || self.next == u32::MAX {
            match self.by_age.first().copied() {
                Some((oldest_ms, number)) if oldest_ms < pack.modified_ms && self.next != u32::MAX => {
                    self.remove(number);
                    self.leave_out(oldest_ms);
                }
                _ => {
                    self.leave_out(pack.modified_ms);
                    return false;
                }
            }
        }
        let number = self.next;
        self.next += 1;
        self.records += slots.len();
        self.pack_bytes += pack.bytes;
        self.places.extend((0..).zip(&slots).map(|(n, slot)| slot.place(number, n)));
        let highest = self.newest.entry(pack.at.writer.clone()).or_default();
        *highest = (*highest).max(newest);
        self.failed.remove(&pack.at);
        self.stalled.remove(&pack.at);
        self.numbers.insert(pack.at.clone(), number);
        self.by_age.insert((pack.modified_ms, number));
        let Listed { modified_ms, at, bytes } = pack;
        self.packs.insert(number, Pack { at, bytes, modified_ms, learnt_in: self.listings, slots });
        true
    }

    fn leave_out(&mut self, modified_ms: u64) {
        self.left_out_ms = self.left_out_ms.max(Some(modified_ms));
        self.left_out += 1;
        if !self.warned {
            self.warned = true;
            let most = self.max_records;
            tracing::warn!(most, "the floor has more records than its index may hold: the oldest packs are left out");
        }
    }

    fn remove(&mut self, number: u32) {
        let Some(pack) = self.packs.remove(&number) else { return };
        for (n, slot) in (0..).zip(&pack.slots) {
            self.places.remove(&slot.place(number, n));
        }
        self.records -= pack.slots.len();
        self.pack_bytes -= pack.bytes;
        self.numbers.remove(&pack.at);
        self.by_age.remove(&(pack.modified_ms, number));
    }

    /// The pack is gone from the store. There may be room now for one that was left out.
    pub(super) fn drop_pack(&mut self, at: &PackAt) {
        if let Some(&number) = self.numbers.get(at) {
            self.remove(number);
            self.left_out_ms = None;
        }
    }

    /// A footer failed its verification: returns whether for the last time.
    pub(super) fn footer_failed(&mut self, at: &PackAt) -> bool {
        let times = self.failed.entry(at.clone()).or_default();
        *times = times.saturating_add(1);
        *times >= MAX_FAILURES
    }

    /// A footer could not be read: the pack is tried after others from now on.
    pub(super) fn footer_stalled(&mut self, at: PackAt) {
        let times = self.stalled.entry(at).or_default();
        *times = times.saturating_add(1);
    }

    /// How often [`Self::footer_stalled`] was said of which packs.
    pub(super) fn stalls(&self) -> BTreeMap<PackAt, u32> {
        self.stalled.clone()
    }

    pub(super) fn is_unreadable(&self, at: &PackAt) -> bool {
        self.failed.get(at).is_some_and(|times| *times >= MAX_FAILURES)
    }

    /// Packs whose footer failed too often.
    pub(super) fn unreadable(&self) -> impl Iterator<Item = &PackAt> {
        self.failed.iter().filter(|(_, times)| **times >= MAX_FAILURES).map(|(at, _)| at)
    }

    /// A record of the shard, once it is known what is dead: of several that live the one in the newest pack, which will be there longest.
    pub(super) fn find(&self, key: &ShardKey) -> Option<FloorRecord> {
        let (block, digest) = digests(key);
        if !self.tombs.is_ready() || self.tombs.is_shielded(block) {
            return None;
        }
        let (half, shard) = (digest[0], high(digest[1]));
        let copies = self.slots((half, shard)..=(half, shard)).filter(|(_, slot)| slot.digest == digest);
        let alive = copies.filter(|(pack, slot)| self.lives(block, pack, slot)).take(MAX_COPIES);
        let (pack, slot) = alive.max_by_key(|(pack, _)| pack.modified_ms)?;
        Some(slot.record(&pack.at))
    }

    /// Whose packs are known, or were.
    pub(super) fn writers(&self) -> impl Iterator<Item = &NodeId> {
        self.newest.keys()
    }

    /// Who wrote living records of a block that are known, and for each the highest sequence that it may have: of any
    /// layout. While packs are left out, everybody may have.
    pub(super) fn writers_of(&self, block: &BlockKey) -> BTreeMap<NodeId, u64> {
        let block = block_digest(block);
        let half = halves(block)[0];
        let known = |writer: &NodeId| Some((writer.clone(), *self.newest.get(writer)?));
        if self.left_out > 0 || !self.tombs.is_ready() {
            let all = self.newest.keys().filter_map(known);
            return all.filter(|(writer, newest)| !self.tombs.covers(writer, block, *newest)).collect();
        }
        let alive = self.slots((half, 0)..=(half, u16::MAX)).filter(|(pack, slot)| self.lives(block, pack, slot));
        alive.filter_map(|(pack, _)| known(&pack.at.writer)).collect()
    }

    fn lives(&self, block: u64, pack: &Pack, slot: &Slot) -> bool {
        !self.tombs.covers(&pack.at.writer, block, whole(slot.sequence))
    }

    /// The records with digests that begin so, and their packs.
    fn slots(&self, digests: RangeInclusive<(u32, u16)>) -> impl Iterator<Item = (&Pack, &Slot)> {
        let (from, to) = (*digests.start(), *digests.end());
        let places = (from.0, from.1, 0, 0)..=(to.0, to.1, u32::MAX, u16::MAX);
        self.places.range(places).filter_map(|&(_, _, number, n)| {
            let pack = self.packs.get(&number)?;
            Some((pack, pack.slots.get(usize::from(n))?))
        })
    }

    /// Takes a record out that is not what it was said to be.
    pub(super) fn drop_record(&mut self, key: &ShardKey, record: &FloorRecord) {
        let Some(&number) = self.numbers.get(&record.pack_at()) else { return };
        let Some(pack) = self.packs.get(&number) else { return };
        let (_, digest) = digests(key);
        for (n, slot) in (0..).zip(&pack.slots) {
            if slot.digest == digest && u64::from(slot.offset) == record.offset {
                self.places.remove(&slot.place(number, n));
            }
        }
    }

    pub(super) fn usage(&self) -> FloorUsage {
        FloorUsage {
            packs: self.packs.len(),
            pack_bytes: self.pack_bytes,
            records: self.records,
            left_out_packs: self.left_out,
            unreadable_packs: self.unreadable().count(),
            tombstones: self.tombs.len(),
        }
    }
}

impl Slot {
    fn of(entry: &Entry) -> Option<Self> {
        Some(Self {
            digest: digests(&entry.meta.key).1,
            checksum: halves(entry.meta.checksum),
            sequence: halves(entry.meta.sequence),
            offset: u32::try_from(entry.offset).ok()?,
            bytes: u32::try_from(entry.meta.bytes).ok()?,
            header_bytes: entry.header_bytes,
        })
    }

    fn place(&self, number: u32, n: u16) -> Place {
        (self.digest[0], high(self.digest[1]), number, n)
    }

    fn record(&self, at: &PackAt) -> FloorRecord {
        FloorRecord {
            writer: at.writer.clone(),
            pack: at.name.0,
            offset: u64::from(self.offset),
            header_bytes: self.header_bytes,
            bytes: u64::from(self.bytes),
            checksum: whole(self.checksum),
        }
    }
}

/// The high and the low half.
fn halves(n: u64) -> [u32; 2] {
    let bytes = n.to_be_bytes();
    let half = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    [half(0), half(4)]
}

/// The high 16 bits.
const fn high(n: u32) -> u16 {
    (n >> 16) as u16
}

/// What [`halves`] took apart.
fn whole([high, low]: [u32; 2]) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

/// The digest of a key's block, and the key's own: half of the block's and half of BLAKE3 of the whole.
fn digests(key: &ShardKey) -> (u64, [u32; 2]) {
    let mut hasher = blake3::Hasher::new();
    hasher.update(key.block.as_bytes()).update(key.layout.as_bytes()).update(&key.shard.to_le_bytes());
    let shard = hasher.finalize();
    let mut first = [0; 4];
    first.copy_from_slice(&shard.as_bytes()[..4]);
    let block = block_digest(&key.block);
    (block, [halves(block)[0], u32::from_be_bytes(first)])
}

#[cfg(test)]
mod tests;
