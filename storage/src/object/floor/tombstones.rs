//! What was evicted, while records of it lie in packs: those are found no more, by any node, whoever wrote them.
//!
//! A tombstone says of a writer and a block that every record up to a sequence is dead, in whatever layout and shard. A
//! later record has a higher sequence, and lives.
//!
//! *Invariants*: what is buried here is dead at once; [`Tombstones::covers`] never forgets one while the object that holds
//! it is in the store, or while it waits to be written.
//! *Bounds*: [`MAX_TOMBSTONES`] of 24 bytes in files and about 30 in the set that is asked. Of a file beyond that only each
//! writer's highest sequence is kept, and all that the writer wrote until then counts as dead: a miss, never a block that
//! somebody evicted.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kvtier_types::{BlockKey, NodeId};

use super::name::{MAX_WRITERS, TombAt};
use crate::store::StorageError;

/// Most tombstones in mind.
pub(super) const MAX_TOMBSTONES: usize = 1 << 20;
/// Files that a node has before they become one.
pub(super) const MERGE_FILES: usize = 32;
/// What a file says matters to packs that were made until so long after it: they may have been on their way.
const UPLOAD: Duration = Duration::from_secs(24 * 3600);

/// A block that was evicted: what a writer wrote of it up to a sequence is dead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Burial {
    /// Whose records.
    pub writer: NodeId,
    /// Of which block.
    pub block: BlockKey,
    /// The highest sequence that is dead.
    pub up_to_sequence: u64,
}

/// As a file tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Tomb {
    /// [`block_digest`] of the block.
    pub(super) block: u64,
    pub(super) up_to_sequence: u64,
}

/// The tombstones of one file, by writer.
pub(super) type Sections = BTreeMap<NodeId, Vec<Tomb>>;

#[derive(Debug, Clone, Copy)]
struct Numbered {
    writer: u32,
    tomb: Tomb,
}

/// An object with tombstones.
#[derive(Debug)]
struct File {
    /// When it was made, by the store's clock.
    modified_ms: u64,
    /// The listing that was the latest when it was learnt.
    learnt_in: u64,
    tombs: Box<[Numbered]>,
    /// In place of them where there are too many: the highest sequence of each writer.
    whole: Box<[(u32, u64)]>,
}

impl File {
    fn writers(&self) -> BTreeSet<u32> {
        self.tombs.iter().map(|t| t.writer).chain(self.whole.iter().map(|(writer, _)| *writer)).collect()
    }
}

/// All that is known to be dead.
#[derive(Debug)]
pub(super) struct Tombstones {
    most: usize,
    /// Every file that is known of was read: before that nothing can be said to live.
    ready: bool,
    numbers: BTreeMap<NodeId, u32>,
    files: BTreeMap<TombAt, File>,
    /// Buried here, and not in a file yet.
    waiting: BTreeMap<(u64, u32), u64>,
    in_files: usize,
    dead: BTreeMap<(u64, u32), u64>,
    whole: BTreeMap<u32, u64>,
}

impl Tombstones {
    /// At most `most` of them.
    pub(super) const fn new(most: usize) -> Self {
        Self {
            most,
            ready: false,
            numbers: BTreeMap::new(),
            files: BTreeMap::new(),
            waiting: BTreeMap::new(),
            in_files: 0,
            dead: BTreeMap::new(),
            whole: BTreeMap::new(),
        }
    }

    pub(super) const fn is_ready(&self) -> bool {
        self.ready
    }

    pub(super) const fn set_ready(&mut self, ready: bool) {
        self.ready = ready;
    }

    /// How many there are, in files or waiting for one.
    pub(super) fn len(&self) -> usize {
        self.in_files + self.waiting.len()
    }

    /// Whether a record is dead.
    pub(super) fn covers(&self, writer: &NodeId, block: u64, sequence: u64) -> bool {
        if self.dead.is_empty() && self.whole.is_empty() {
            return false;
        }
        let Some(number) = self.numbers.get(writer) else { return false };
        let up_to = self.dead.get(&(block, *number)).max(self.whole.get(number));
        up_to.is_some_and(|up_to| sequence <= *up_to)
    }

    /// Buries what is not yet, and keeps it for a file.
    ///
    /// # Errors
    /// [`StorageError::Full`], and nothing is buried.
    pub(super) fn bury(&mut self, burials: &[Burial]) -> Result<(), StorageError> {
        if self.len() + burials.len() > self.most {
            return Err(StorageError::Full);
        }
        for Burial { writer, block, up_to_sequence } in burials {
            let block = block_digest(block);
            if self.covers(writer, block, *up_to_sequence) {
                continue;
            }
            let Some(number) = self.number(writer) else { return Err(StorageError::Full) };
            self.waiting.insert((block, number), *up_to_sequence);
            raise(&mut self.dead, (block, number), *up_to_sequence);
        }
        Ok(())
    }

    /// The first of those that wait for a file, at most `most`.
    pub(super) fn waiting(&self, most: usize) -> Sections {
        let names = self.names();
        let mut sections = Sections::new();
        for (&(block, number), &up_to_sequence) in self.waiting.iter().take(most) {
            sections.entry(names[&number].clone()).or_default().push(Tomb { block, up_to_sequence });
        }
        sections
    }

    /// They are in a file now.
    pub(super) fn written(&mut self, sections: &Sections) {
        for (writer, tombs) in sections {
            let Some(&number) = self.numbers.get(writer) else { continue };
            for tomb in tombs {
                // A later word on the same block is not in it.
                if self.waiting.get(&(tomb.block, number)) == Some(&tomb.up_to_sequence) {
                    self.waiting.remove(&(tomb.block, number));
                }
            }
        }
    }

    pub(super) fn knows(&self, at: &TombAt) -> bool {
        self.files.contains_key(at)
    }

    /// Takes in a file. Returns whether each tombstone of it is kept in mind.
    pub(super) fn insert(&mut self, at: TombAt, modified_ms: u64, learnt_in: u64, sections: &Sections) -> bool {
        if self.knows(&at) {
            return true;
        }
        let count = sections.values().map(Vec::len).sum::<usize>();
        let fits = self.len() + count <= self.most;
        let (mut tombs, mut whole) = (Vec::new(), Vec::new());
        for (writer, of_writer) in sections {
            // Nothing of a writer beyond the bound is ever looked at.
            let Some(number) = self.number(writer) else { continue };
            if fits {
                tombs.extend(of_writer.iter().map(|&tomb| Numbered { writer: number, tomb }));
            } else if let Some(highest) = of_writer.iter().map(|tomb| tomb.up_to_sequence).max() {
                whole.push((number, highest));
            }
        }
        let file = File { modified_ms, learnt_in, tombs: tombs.into(), whole: whole.into() };
        self.in_files += file.tombs.len();
        Self::count_in(&mut self.dead, &mut self.whole, &file);
        self.files.insert(at, file);
        fits
    }

    /// Files that are not in the store any more, among those learnt before listing `listing` began.
    pub(super) fn absent(&self, listing: u64, shown: impl Fn(&TombAt) -> bool) -> Vec<TombAt> {
        let gone = self.files.iter().filter(|(at, file)| file.learnt_in < listing && !shown(at));
        gone.map(|(at, _)| at.clone()).collect()
    }

    /// Files are gone from the store, and what only they said with them.
    pub(super) fn remove(&mut self, gone: &[TombAt]) {
        let before = self.files.len();
        for at in gone {
            self.in_files -= self.files.remove(at).map_or(0, |file| file.tombs.len());
        }
        if self.files.len() == before {
            return;
        }
        (self.dead, self.whole) = (self.waiting.clone(), BTreeMap::new());
        for file in self.files.values() {
            Self::count_in(&mut self.dead, &mut self.whole, file);
        }
    }

    /// Whether a file says nothing of any pack that is there: `oldest_ms` is when each writer's oldest pack was made.
    pub(super) fn is_useless(&self, at: &TombAt, oldest_ms: &BTreeMap<NodeId, u64>, now_ms: u64) -> bool {
        let Some(file) = self.files.get(at) else { return false };
        let until_ms = file.modified_ms.saturating_add(u64::try_from(UPLOAD.as_millis()).unwrap_or(u64::MAX));
        let writers = file.writers();
        let mut packs = self.numbers.iter().filter(|(_, number)| writers.contains(number));
        now_ms > until_ms && packs.all(|(writer, _)| oldest_ms.get(writer).is_none_or(|oldest| *oldest > until_ms))
    }

    /// The files of a node.
    pub(super) fn files_of(&self, burier: &NodeId) -> Vec<TombAt> {
        self.files.keys().filter(|at| at.burier == *burier).cloned().collect()
    }

    /// Files of a node that one may take the place of, with all that they say.
    pub(super) fn mergeable(&self, burier: &NodeId, most: usize) -> Option<(Vec<TombAt>, Sections)> {
        let names = self.names();
        let mut merged: BTreeMap<(u32, u64), u64> = BTreeMap::new();
        let mut files = Vec::new();
        for (at, file) in self.files.iter().filter(|(at, file)| at.burier == *burier && file.whole.is_empty()) {
            if merged.len() + file.tombs.len() > most {
                continue;
            }
            files.push(at.clone());
            for Numbered { writer, tomb } in &file.tombs {
                raise(&mut merged, (*writer, tomb.block), tomb.up_to_sequence);
            }
        }
        let mut sections = Sections::new();
        for ((writer, block), up_to_sequence) in merged {
            sections.entry(names[&writer].clone()).or_default().push(Tomb { block, up_to_sequence });
        }
        (files.len() >= MERGE_FILES).then_some((files, sections))
    }

    fn count_in(dead: &mut BTreeMap<(u64, u32), u64>, whole: &mut BTreeMap<u32, u64>, file: &File) {
        for Numbered { writer, tomb } in &file.tombs {
            raise(dead, (tomb.block, *writer), tomb.up_to_sequence);
        }
        for (writer, up_to_sequence) in &file.whole {
            raise(whole, *writer, *up_to_sequence);
        }
    }

    fn number(&mut self, writer: &NodeId) -> Option<u32> {
        if let Some(number) = self.numbers.get(writer) {
            return Some(*number);
        }
        let number = u32::try_from(self.numbers.len()).ok().filter(|_| self.numbers.len() < MAX_WRITERS)?;
        self.numbers.insert(writer.clone(), number);
        Some(number)
    }

    fn names(&self) -> BTreeMap<u32, &NodeId> {
        self.numbers.iter().map(|(name, number)| (*number, name)).collect()
    }
}

/// Sets the value of a key to at least `value`.
fn raise<K: Ord>(map: &mut BTreeMap<K, u64>, key: K, value: u64) {
    let highest = map.entry(key).or_default();
    *highest = (*highest).max(value);
}

/// 64 bits of BLAKE3 of a block key: tests and hostile writers make block keys that differ in few places.
pub(super) fn block_digest(block: &BlockKey) -> u64 {
    let mut first = [0; 8];
    first.copy_from_slice(&blake3::hash(block.as_bytes()).as_bytes()[..8]);
    u64::from_be_bytes(first)
}

#[cfg(test)]
mod tests;
