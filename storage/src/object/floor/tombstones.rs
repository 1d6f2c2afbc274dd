//! What was evicted, while records of it lie in packs: those are found no more, by any node, whoever wrote them.
//!
//! A tombstone says of a writer and a block that every record up to a sequence is dead, in whatever layout and shard. A
//! later record has a higher sequence, and lives.
//!
//! *Invariants*: what is buried here is dead at once; [`Tombstones::covers`] never forgets one while a file that names its
//! writer and block is in mind, or while it waits to be written; nothing is [`Tombstones::is_ready`] to be found while a
//! file is known of and was not read.
//! *Bounds*: [`MAX_TOMBSTONES`], and twice as many in files, of 24 bytes there and about 40 in the set that is asked. Of a
//! file beyond that only each writer's highest sequence is kept, and all that the writer wrote until then counts as dead: a
//! miss, never a block that somebody evicted. [`MAX_SHIELDED`] blocks.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kvtier_types::{BlockKey, NodeId};
use tokio::time::Instant;

use super::name::{MAX_WRITERS, TombAt};
use crate::store::StorageError;

/// Most tombstones in mind.
pub(super) const MAX_TOMBSTONES: usize = 1 << 20;
/// A file that could not be read for so long does not keep packs from being found any more.
const GIVE_UP: Duration = Duration::from_secs(600);
/// Files of a node and a week that become one.
pub(super) const MERGE_FILES: usize = 32;
/// Files are merged with those of the same week only, so that what is old can go.
const WEEK_MS: u64 = 7 * 24 * 3600 * 1000;
/// Most blocks that are not found for a while.
const MAX_SHIELDED: usize = 1 << 18;
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

/// What a file says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Words {
    /// When the last of it was said, in milliseconds of Unix time.
    pub(super) said_ms: u64,
    pub(super) sections: Sections,
}

#[derive(Debug, Clone, Copy)]
struct Numbered {
    writer: u32,
    tomb: Tomb,
}

/// An object with tombstones.
#[derive(Debug)]
struct File {
    said_ms: u64,
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

#[derive(Debug, Clone, Copy)]
struct Unread {
    /// The latest listing when it was heard of.
    known_in: u64,
    since: Instant,
}

/// Up to which sequence something is dead, and how many files, and whatever waits for one, say so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Dead {
    up_to_sequence: u64,
    said: u32,
}

impl Dead {
    fn say<K: Ord>(map: &mut BTreeMap<K, Self>, key: K, up_to_sequence: u64) {
        let dead = map.entry(key).or_default();
        dead.up_to_sequence = dead.up_to_sequence.max(up_to_sequence);
        dead.said += 1;
    }

    /// One says so no more. While another does, it is dead as far as anybody ever said.
    fn unsay<K: Ord>(map: &mut BTreeMap<K, Self>, key: &K) {
        if let Some(dead) = map.get_mut(key) {
            dead.said -= 1;
            if dead.said == 0 {
                map.remove(key);
            }
        }
    }
}

/// All that is known to be dead.
#[derive(Debug)]
pub(super) struct Tombstones {
    most: usize,
    /// Every file of some listing was read.
    listed: bool,
    /// Files that are known of and could not be read since.
    unread: BTreeMap<TombAt, Unread>,
    /// Those that it was too long: tried again with every listing.
    given_up: BTreeSet<TombAt>,
    numbers: BTreeMap<NodeId, u32>,
    files: BTreeMap<TombAt, File>,
    /// Buried here, and not in a file yet.
    waiting: BTreeMap<(u64, u32), u64>,
    in_files: usize,
    dead: BTreeMap<(u64, u32), Dead>,
    whole: BTreeMap<u32, Dead>,
    /// Blocks that are not found until then, whoever wrote them.
    shields: BTreeMap<u64, Instant>,
}

impl Tombstones {
    /// At most `most` of them.
    pub(super) const fn new(most: usize) -> Self {
        Self {
            most,
            listed: false,
            unread: BTreeMap::new(),
            given_up: BTreeSet::new(),
            numbers: BTreeMap::new(),
            files: BTreeMap::new(),
            waiting: BTreeMap::new(),
            in_files: 0,
            dead: BTreeMap::new(),
            whole: BTreeMap::new(),
            shields: BTreeMap::new(),
        }
    }

    /// Whether all that is dead is known, as far as anybody said.
    pub(super) fn is_ready(&self) -> bool {
        self.listed && self.unread.is_empty()
    }

    /// Every file that a listing showed was read. Those that it did not show, and that were known of before, are part of
    /// one of these.
    pub(super) fn set_listed(&mut self, listing: u64) {
        self.listed = true;
        self.unread.retain(|_, unread| unread.known_in >= listing);
    }

    /// Lets go of what was given up and is not there any more.
    pub(super) fn retain_given_up(&mut self, shown: impl Fn(&TombAt) -> bool) {
        self.given_up.retain(shown);
    }

    /// A file is there and was not read: nothing is found until it was. `listing` is the latest.
    pub(super) fn set_unread(&mut self, at: TombAt, listing: u64) {
        if !self.knows(&at) && !self.given_up.contains(&at) {
            let unread = self.unread.entry(at).or_insert_with(|| Unread { known_in: listing, since: Instant::now() });
            unread.known_in = listing;
        }
    }

    /// A file that was heard of is gone, and what it said is known or says nothing any more.
    pub(super) fn forget_unread(&mut self, at: &TombAt) {
        self.unread.remove(at);
    }

    /// A file could not be read. Returns whether it is given up, now or before.
    pub(super) fn failed(&mut self, at: &TombAt) -> bool {
        if self.unread.get(at).is_some_and(|unread| unread.since.elapsed() >= GIVE_UP) {
            self.unread.remove(at);
            self.given_up.insert(at.clone());
            tracing::error!(file = %at.announce(), "what was evicted cannot be read for long: it may be found in packs");
        }
        self.given_up.contains(at)
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.dead.len()
    }

    /// Whether a record is dead.
    pub(super) fn covers(&self, writer: &NodeId, block: u64, sequence: u64) -> bool {
        let whole = || self.whole.get(self.numbers.get(writer)?);
        let all = !self.whole.is_empty() && whole().is_some_and(|dead| sequence <= dead.up_to_sequence);
        all || self.buries(writer, block, sequence)
    }

    /// Whether a record is dead because somebody said so of its block.
    pub(super) fn buries(&self, writer: &NodeId, block: u64, sequence: u64) -> bool {
        let dead = || self.dead.get(&(block, *self.numbers.get(writer)?));
        !self.dead.is_empty() && dead().is_some_and(|dead| sequence <= dead.up_to_sequence)
    }

    /// Has blocks not be found for a while.
    pub(super) fn shield(&mut self, blocks: impl IntoIterator<Item = u64>, now: Instant, time: Duration) {
        self.shields.retain(|_, until| *until > now);
        let room = MAX_SHIELDED.saturating_sub(self.shields.len());
        self.shields.extend(blocks.into_iter().take(room).map(|block| (block, now + time)));
    }

    pub(super) fn is_shielded(&self, block: u64) -> bool {
        !self.shields.is_empty() && self.shields.get(&block).is_some_and(|until| *until > Instant::now())
    }

    /// The highest sequence of a writer that is said to be dead.
    pub(super) fn newest_of(&self, writer: &NodeId) -> u64 {
        let Some(number) = self.numbers.get(writer) else { return 0 };
        let dead = self.dead.iter().filter(|((_, of), _)| of == number).map(|(_, dead)| dead.up_to_sequence);
        dead.chain(self.whole.get(number).map(|dead| dead.up_to_sequence)).max().unwrap_or(0)
    }

    /// Buries what is not yet, and keeps it for a file.
    ///
    /// # Errors
    /// [`StorageError::Full`], and nothing is buried.
    pub(super) fn bury(&mut self, burials: &[Burial]) -> Result<(), StorageError> {
        let mut wanted = Vec::new();
        for Burial { writer, block, up_to_sequence } in burials {
            let Some(number) = self.number(writer) else { return Err(StorageError::Full) };
            let key = (block_digest(block), number);
            if self.dead.get(&key).is_none_or(|dead| dead.up_to_sequence < *up_to_sequence) {
                wanted.push((key, *up_to_sequence));
            }
        }
        if !wanted.is_empty() && self.dead.len() + wanted.len() > self.most {
            return Err(StorageError::Full);
        }
        for (key, up_to_sequence) in wanted {
            let before = self.waiting.get(&key).copied();
            self.waiting.insert(key, before.unwrap_or(0).max(up_to_sequence));
            Dead::say(&mut self.dead, key, up_to_sequence);
            if before.is_some() {
                Dead::unsay(&mut self.dead, &key);
            }
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

    /// They are in this file now.
    pub(super) fn written(&mut self, at: TombAt, learnt_in: u64, words: &Words) {
        let mut done = Vec::new();
        for (writer, tombs) in &words.sections {
            let Some(&number) = self.numbers.get(writer) else { continue };
            for tomb in tombs {
                let key = (tomb.block, number);
                // A later word on the same block is not in it.
                if self.waiting.get(&key) == Some(&tomb.up_to_sequence) {
                    self.waiting.remove(&key);
                    done.push(key);
                }
            }
        }
        self.insert(at, learnt_in, words);
        done.iter().for_each(|key| Dead::unsay(&mut self.dead, key));
    }

    pub(super) fn knows(&self, at: &TombAt) -> bool {
        self.files.contains_key(at)
    }

    /// Takes in a file. Returns whether each tombstone of it is kept in mind.
    pub(super) fn insert(&mut self, at: TombAt, learnt_in: u64, words: &Words) -> bool {
        self.unread.remove(&at);
        self.given_up.remove(&at);
        if self.knows(&at) {
            return true;
        }
        let count = words.sections.values().map(Vec::len).sum::<usize>();
        let fits = self.in_files + count <= self.most.saturating_mul(2);
        let (mut tombs, mut whole) = (Vec::new(), Vec::new());
        for (writer, of_writer) in &words.sections {
            // Nothing of a writer beyond the bound is ever looked at.
            let Some(number) = self.number(writer) else { continue };
            if fits {
                tombs.extend(of_writer.iter().map(|&tomb| Numbered { writer: number, tomb }));
            } else if let Some(highest) = of_writer.iter().map(|tomb| tomb.up_to_sequence).max() {
                whole.push((number, highest));
            }
        }
        for Numbered { writer, tomb } in &tombs {
            Dead::say(&mut self.dead, (tomb.block, *writer), tomb.up_to_sequence);
        }
        for (writer, up_to_sequence) in &whole {
            Dead::say(&mut self.whole, *writer, *up_to_sequence);
        }
        self.in_files += tombs.len();
        let file = File { said_ms: words.said_ms, learnt_in, tombs: tombs.into(), whole: whole.into() };
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
        for at in gone {
            let Some(file) = self.files.remove(at) else { continue };
            self.in_files -= file.tombs.len();
            for Numbered { writer, tomb } in &file.tombs {
                Dead::unsay(&mut self.dead, &(tomb.block, *writer));
            }
            for (writer, _) in &file.whole {
                Dead::unsay(&mut self.whole, writer);
            }
        }
    }

    /// Whether a file says nothing of any pack that is there: `oldest_ms` is when each writer's oldest pack was made.
    pub(super) fn is_useless(&self, at: &TombAt, oldest_ms: &BTreeMap<NodeId, u64>, now_ms: u64) -> bool {
        let Some(file) = self.files.get(at) else { return false };
        let until_ms = file.said_ms.saturating_add(u64::try_from(UPLOAD.as_millis()).unwrap_or(u64::MAX));
        let writers = file.writers();
        let mut packs = self.numbers.iter().filter(|(_, number)| writers.contains(number));
        now_ms > until_ms && packs.all(|(writer, _)| oldest_ms.get(writer).is_none_or(|oldest| *oldest > until_ms))
    }

    /// The files of a node.
    pub(super) fn files_of(&self, burier: &NodeId) -> Vec<TombAt> {
        self.files.keys().filter(|at| at.burier == *burier).cloned().collect()
    }

    /// Files of a node and a week, of those for which `may` says so, that one may take the place of, with all that they
    /// say.
    pub(super) fn mergeable(
        &self,
        burier: &NodeId,
        most: usize,
        may: impl Fn(&TombAt) -> bool,
    ) -> Option<(Vec<TombAt>, Words)> {
        let own = self.files.iter().filter(|(at, file)| at.burier == *burier && file.whole.is_empty() && may(at));
        let mut weeks: BTreeMap<u64, Vec<(&TombAt, &File)>> = BTreeMap::new();
        own.for_each(|(at, file)| weeks.entry(file.said_ms / WEEK_MS).or_default().push((at, file)));
        let many = weeks.into_values().find(|files| files.len() >= MERGE_FILES)?;
        let mut merged: BTreeMap<(u32, u64), u64> = BTreeMap::new();
        let (mut files, mut words) = (Vec::new(), Words::default());
        for (at, file) in many {
            if merged.len() + file.tombs.len() > most {
                continue;
            }
            files.push(at.clone());
            words.said_ms = words.said_ms.max(file.said_ms);
            for Numbered { writer, tomb } in &file.tombs {
                let up_to = merged.entry((*writer, tomb.block)).or_default();
                *up_to = (*up_to).max(tomb.up_to_sequence);
            }
        }
        let names = self.names();
        for ((writer, block), up_to_sequence) in merged {
            words.sections.entry(names[&writer].clone()).or_default().push(Tomb { block, up_to_sequence });
        }
        let fits = self.in_files + words.sections.values().map(Vec::len).sum::<usize>() <= self.most.saturating_mul(2);
        (files.len() > 1 && fits).then_some((files, words))
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

/// 64 bits of BLAKE3 of a block key: tests and hostile writers make block keys that differ in few places.
pub(super) fn block_digest(block: &BlockKey) -> u64 {
    let mut first = [0; 8];
    first.copy_from_slice(&blake3::hash(block.as_bytes()).as_bytes()[..8]);
    u64::from_be_bytes(first)
}

#[cfg(test)]
mod tests;
