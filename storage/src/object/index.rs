//! Which packs there are, which of their records live, and how many bytes that is.
//!
//! *Invariants*: `used` is the sum of the packs' bytes, of those left alone too, `dying` of those without a living record,
//! `live` that of living records; a pack is in `dead` when no record of it lives, nobody reads it and nobody is deleting
//! it; numbers are never given twice in one opening.
//! *Bounds*: about 100 bytes for each record, 150 for each pack. *Lock order*: one mutex in [`super::Shared`], never held
//! while waiting.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;

use kvtier_types::{BlockKey, ShardKey};

use super::pack::{Entry, PackName};
use crate::store::{Location, StorageError, Usage};

/// Records looked at in one hold of the index.
const RECORDS_PER_LOOK: usize = 4096;

/// The packs of a tier.
#[derive(Debug)]
pub(super) struct Index {
    capacity: u64,
    used: u64,
    live: u64,
    reserved: u64,
    /// Bytes of packs in which no record lives: freed once nobody reads them and the store has deleted them.
    dying: u64,
    pub(super) pending_writes: u64,
    next: u32,
    packs: BTreeMap<u32, Pack>,
    /// Packs with living records, fewest living bytes first.
    by_live: BTreeSet<(u64, u32)>,
    dead: VecDeque<u32>,
}

#[derive(Debug)]
struct Pack {
    name: PackName,
    bytes: u64,
    live_bytes: u64,
    readers: u32,
    records: Vec<Slot>,
}

#[derive(Debug)]
struct Slot {
    key: ShardKey,
    offset: u64,
    header_bytes: u32,
    bytes: u64,
    live: bool,
}

impl Slot {
    fn footprint(&self) -> u64 {
        footprint(self.header_bytes, self.bytes)
    }
}

/// What a record adds to a pack: itself and its footer entry.
fn footprint(header_bytes: u32, bytes: u64) -> u64 {
    let header = u64::from(header_bytes);
    header + bytes + super::pack::entry_bytes(header)
}

/// Where a record's bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) pack: PackName,
    pub(super) range: Range<u64>,
    pub(super) header_bytes: usize,
    pub(super) payload_bytes: u64,
}

/// A pack to put into the index.
#[derive(Debug)]
pub(super) struct NewPack<'a> {
    pub(super) name: PackName,
    pub(super) bytes: u64,
    pub(super) entries: &'a [Entry],
}

impl Index {
    pub(super) fn new(capacity: u64) -> Self {
        Self {
            capacity,
            used: 0,
            live: 0,
            reserved: 0,
            dying: 0,
            pending_writes: 0,
            next: 0,
            packs: BTreeMap::new(),
            by_live: BTreeSet::new(),
            dead: VecDeque::new(),
        }
    }

    /// Sets room aside for a record.
    ///
    /// # Errors
    /// [`StorageError::Full`].
    pub(super) fn reserve(&mut self, bytes: u64) -> Result<(), StorageError> {
        let wanted = self.used.saturating_add(self.reserved).saturating_add(bytes);
        if wanted > self.capacity || self.next == u32::MAX {
            return Err(StorageError::Full);
        }
        self.reserved += bytes;
        Ok(())
    }

    /// Whether [`Self::reserve`] may succeed once the dead packs are deleted.
    pub(super) fn will_fit(&self, bytes: u64) -> bool {
        let wanted = (self.used - self.dying).saturating_add(self.reserved).saturating_add(bytes);
        wanted <= self.capacity && self.next != u32::MAX
    }

    /// Gives up what [`Self::reserve`] set aside.
    pub(super) fn release(&mut self, bytes: u64) {
        self.reserved -= bytes;
    }

    /// Adds a pack, of whose records those live for which `lives` says so, and returns its number. A pack without a
    /// living record is up for deletion at once.
    pub(super) fn insert(&mut self, pack: &NewPack<'_>, lives: impl Fn(usize) -> bool) -> u32 {
        let number = self.next;
        self.next = self.next.checked_add(1).expect("reserve and recovery stop before the last number");
        let slot = |(n, entry): (usize, &Entry)| Slot {
            key: entry.meta.key,
            offset: entry.offset,
            header_bytes: entry.header_bytes,
            bytes: entry.meta.bytes,
            live: lives(n),
        };
        let records: Vec<Slot> = pack.entries.iter().enumerate().map(slot).collect();
        let live_bytes = records.iter().filter(|r| r.live).map(Slot::footprint).sum();
        self.used += pack.bytes;
        self.live += live_bytes;
        if live_bytes > 0 {
            self.by_live.insert((live_bytes, number));
        } else {
            self.dying += pack.bytes;
            self.dead.push_back(number);
        }
        self.packs.insert(number, Pack { name: pack.name, bytes: pack.bytes, live_bytes, readers: 0, records });
        number
    }

    /// Counts a pack that cannot be read: it takes its room, and is never up for deletion.
    pub(super) fn leave_alone(&mut self, pack_bytes: u64) {
        self.used = self.used.saturating_add(pack_bytes);
    }

    /// Marks a record dead. Returns whether its pack is up for deletion now.
    pub(super) fn forget(&mut self, at: Location) -> bool {
        let Some(pack) = self.packs.get_mut(&at.segment) else { return false };
        let Some(slot) = pack.records.get_mut(at.offset as usize).filter(|slot| slot.live) else { return false };
        slot.live = false;
        let bytes = slot.footprint();
        self.by_live.remove(&(pack.live_bytes, at.segment));
        pack.live_bytes -= bytes;
        self.live -= bytes;
        if pack.live_bytes > 0 {
            self.by_live.insert((pack.live_bytes, at.segment));
            return false;
        }
        self.dying += pack.bytes;
        if pack.readers == 0 {
            self.dead.push_back(at.segment);
        }
        pack.readers == 0
    }

    /// Finds a living record and keeps its pack from deletion until [`Self::end_read`].
    ///
    /// # Errors
    /// [`StorageError::NotFound`].
    pub(super) fn begin_read(&mut self, key: &ShardKey, at: Location) -> Result<Found, StorageError> {
        let pack = self.packs.get_mut(&at.segment).ok_or(StorageError::NotFound)?;
        let slot = pack.records.get(at.offset as usize).filter(|s| s.live && s.key == *key);
        let slot = slot.ok_or(StorageError::NotFound)?;
        pack.readers += 1;
        let header = u64::from(slot.header_bytes);
        Ok(Found {
            pack: pack.name,
            range: slot.offset..slot.offset + header + slot.bytes,
            header_bytes: slot.header_bytes as usize,
            payload_bytes: slot.bytes,
        })
    }

    /// Ends a read. Returns whether the pack is up for deletion now.
    pub(super) fn end_read(&mut self, number: u32) -> bool {
        let Some(pack) = self.packs.get_mut(&number) else { return false };
        pack.readers -= 1;
        let dead = pack.readers == 0 && pack.live_bytes == 0;
        if dead {
            self.dead.push_back(number);
        }
        dead
    }

    /// Takes up to `limit` dead packs. Each comes back by [`Self::deleted`] or [`Self::still_there`].
    pub(super) fn take_dead(&mut self, limit: usize) -> Vec<(u32, PackName)> {
        let count = limit.min(self.dead.len());
        let numbers: Vec<u32> = self.dead.drain(..count).collect();
        numbers.into_iter().filter_map(|n| self.packs.get(&n).map(|pack| (n, pack.name))).collect()
    }

    /// Whether a dead pack waits for deletion.
    pub(super) fn has_dead(&self) -> bool {
        !self.dead.is_empty()
    }

    /// The pack is gone from the store.
    pub(super) fn deleted(&mut self, number: u32) {
        if let Some(pack) = self.packs.remove(&number) {
            self.used -= pack.bytes;
            self.dying -= pack.bytes;
        }
    }

    /// The pack could not be deleted: to be tried again.
    pub(super) fn still_there(&mut self, number: u32) {
        self.dead.push_back(number);
    }

    /// The pack whose deletion would cost the fewest living bytes.
    pub(super) fn reclaim_candidate(&self) -> Option<u32> {
        self.by_live.first().map(|&(_, number)| number)
    }

    /// The living records of a pack: key, place, payload bytes.
    pub(super) fn live_records(&self, number: u32) -> Vec<(ShardKey, Location, u64)> {
        let Some(pack) = self.packs.get(&number) else { return Vec::new() };
        let records = (0..).zip(&pack.records).filter(|(_, slot)| slot.live);
        records.map(|(offset, slot)| (slot.key, Location { segment: number, offset }, slot.bytes)).collect()
    }

    /// Adds to `found` which of some blocks have a record, living or not, in some packs from number `from` on. Returns where
    /// to go on.
    pub(super) fn find_blocks(
        &self,
        from: u32,
        blocks: &BTreeSet<BlockKey>,
        found: &mut BTreeSet<BlockKey>,
    ) -> Option<u32> {
        let mut looked_at = 0;
        for (number, pack) in self.packs.range(from..) {
            if looked_at >= RECORDS_PER_LOOK {
                return Some(*number);
            }
            looked_at += pack.records.len();
            found.extend(pack.records.iter().map(|slot| slot.key.block).filter(|block| blocks.contains(block)));
        }
        None
    }

    /// How full it is. What is staged counts as used.
    pub(super) fn usage(&self) -> Usage {
        Usage {
            capacity_bytes: self.capacity,
            used_bytes: self.used + self.reserved,
            live_bytes: self.live,
            pending_writes: self.pending_writes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::meta;

    fn entries(count: u8) -> Vec<Entry> {
        (0..count).map(|n| Entry { offset: 0, header_bytes: 400, meta: meta(u64::from(n), b"payload") }).collect()
    }

    fn add(index: &mut Index, entries: &[Entry]) -> u32 {
        index.insert(&NewPack { name: PackName([1; 32]), bytes: 10_000, entries }, |_| true)
    }

    #[test]
    fn a_pack_dies_with_its_last_record_and_its_last_reader() {
        let mut index = Index::new(1 << 20);
        let entries = entries(2);
        let pack = add(&mut index, &entries);
        let at = |offset| Location { segment: pack, offset };
        assert!(!index.forget(at(0)));
        assert!(!index.forget(at(0)), "forgetting twice is harmless");
        index.begin_read(&entries[1].meta.key, at(1)).unwrap();
        assert!(!index.forget(at(1)), "it is being read");
        assert!(matches!(index.begin_read(&entries[1].meta.key, at(1)), Err(StorageError::NotFound)));
        assert!(index.end_read(pack));
        assert_eq!(index.take_dead(9).len(), 1);
        assert_eq!(index.usage().used_bytes, 10_000, "it is used until the store says it is gone");
        index.deleted(pack);
        assert_eq!(index.usage(), Usage { capacity_bytes: 1 << 20, ..Usage::default() });
    }

    #[test]
    fn blocks_are_found_in_packs_dead_records_included() {
        let mut index = Index::new(1 << 30);
        let (first, other) = (entries(2), entries(5));
        let pack = add(&mut index, &first);
        for _ in 0..2000 {
            add(&mut index, &other[2..]);
        }
        index.forget(Location { segment: pack, offset: 1 });
        let block = |n: u64| meta(n, b"payload").key.block;
        let (wanted, mut found) = ([1, 4, 9].map(block).into(), BTreeSet::new());
        let (mut from, mut looks) = (Some(0), 0);
        while let Some(number) = from {
            from = index.find_blocks(number, &wanted, &mut found);
            looks += 1;
        }
        assert_eq!((found, looks), ([1, 4].map(block).into(), 2));
    }

    #[test]
    fn the_candidate_has_the_fewest_living_bytes() {
        let mut index = Index::new(1 << 20);
        assert_eq!(index.reclaim_candidate(), None);
        let first = add(&mut index, &entries(3));
        let second = add(&mut index, &entries(2));
        assert_eq!(index.reclaim_candidate(), Some(second));
        for offset in 0..2 {
            index.forget(Location { segment: first, offset });
        }
        assert_eq!(index.reclaim_candidate(), Some(first));
        assert_eq!(index.live_records(first).len(), 1);
    }

    #[test]
    fn packs_left_alone_take_room_that_nothing_frees() {
        let mut index = Index::new(100);
        index.leave_alone(60);
        assert_eq!(index.usage().used_bytes, 60);
        assert!(matches!(index.reserve(60), Err(StorageError::Full)));
        assert!(!index.will_fit(60) && !index.has_dead() && index.reclaim_candidate().is_none());
        index.reserve(40).unwrap();
    }

    #[test]
    fn reservations_count_as_used() {
        let mut index = Index::new(100);
        index.reserve(60).unwrap();
        assert!(matches!(index.reserve(60), Err(StorageError::Full)));
        index.release(60);
        index.reserve(100).unwrap();
    }
}
