//! Models of what lies below host memory: a disk of each node, and an object store that all share.

use std::collections::{BTreeMap, BTreeSet};

use kvtier_types::{Instant, Location, RecordMeta, ShardKey};

use crate::memory::Words;
use crate::rng::Rng;

/// A stored block.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    pub(crate) meta: RecordMeta,
    pub(crate) words: Words,
    /// From when on it survives a crash.
    pub(crate) durable: Instant,
}

/// A node's disk: it outlives the node's daemon.
#[derive(Debug, Default)]
pub(crate) struct Disk {
    pub(crate) records: BTreeMap<Location, Record>,
    next: u32,
    pub(crate) capacity: usize,
}

impl Disk {
    pub(crate) fn new(capacity: usize) -> Self {
        Self { capacity, ..Self::default() }
    }

    pub(crate) fn is_full(&self) -> bool {
        self.records.len() >= self.capacity
    }

    /// Writes a record.
    pub(crate) fn put(&mut self, record: Record) -> Location {
        self.next += 1;
        let at = Location { segment: self.next / 8, offset: self.next };
        self.records.insert(at, record);
        at
    }

    /// The daemon died: what was not made durable may be lost.
    pub(crate) fn crash(&mut self, now: Instant, rng: &mut Rng) {
        self.records.retain(|_, record| record.durable <= now || rng.chance(500));
    }

    pub(crate) fn wipe(&mut self) {
        self.records.clear();
    }

    /// Flips a bit of some record.
    pub(crate) fn rot(&mut self, rng: &mut Rng) -> bool {
        if self.records.is_empty() {
            return false;
        }
        let at = rng.index(self.records.len());
        if let Some(record) = self.records.values_mut().nth(at) {
            record.words[1] ^= 1 << rng.below(64);
        }
        true
    }
}

/// What every node wrote to the object store.
#[derive(Debug, Default)]
pub(crate) struct ObjectStore {
    records: BTreeMap<(usize, Location), Record>,
    by_key: BTreeMap<ShardKey, BTreeSet<(usize, Location)>>,
    next: u32,
    pub(crate) away: bool,
}

impl ObjectStore {
    pub(crate) fn put(&mut self, owner: usize, record: Record) -> Location {
        self.next += 1;
        let at = Location { segment: self.next / 4, offset: self.next };
        self.by_key.entry(record.meta.key).or_default().insert((owner, at));
        self.records.insert((owner, at), record);
        at
    }

    pub(crate) fn get(&self, owner: usize, at: Location) -> Option<&Record> {
        self.records.get(&(owner, at))
    }

    pub(crate) fn forget(&mut self, owner: usize, at: Location) {
        let Some(record) = self.records.remove(&(owner, at)) else { return };
        if let Some(places) = self.by_key.get_mut(&record.meta.key) {
            places.remove(&(owner, at));
            if places.is_empty() {
                self.by_key.remove(&record.meta.key);
            }
        }
    }

    /// What others than `reader` wrote of a shard.
    pub(crate) fn of_others(&self, reader: usize, key: &ShardKey) -> Option<&Record> {
        let places = self.by_key.get(key)?;
        let place = places.iter().find(|(owner, _)| *owner != reader)?;
        self.records.get(place)
    }

    /// A node's own records.
    pub(crate) fn of(&self, owner: usize) -> Vec<(RecordMeta, Location)> {
        let own = self.records.iter().filter(|((of, _), _)| *of == owner);
        own.map(|((_, at), record)| (record.meta.clone(), *at)).collect()
    }
}
