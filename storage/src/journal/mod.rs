//! The control journal: the few facts that must survive a restart even if every cached byte is lost.
//!
//! *Invariants*: [`Journal::append`] returns only when its entries are durable, all or none of them. A torn tail (a crash
//! within an append that never returned) is cut. Damage before the tail never goes unnoticed: the file is kept aside as
//! `journal.corrupt-N`, and what can be read of it counts. Evictions may be missing then, and all of them are where there
//! is no file: the snapshot that takes its place says so for good, by [`JournalState::wiped_up_to`]
//! (`what_was_lost_is_said_for_good_and_with_the_first_snapshot`). A file of a newer build is refused, never wiped.
//! *Bounds*: [`MAX_EVICTED`] keys, [`MAX_CLAIMS`] claims with [`MAX_CLAIM_BLOCKS`] blocks, [`MAX_MARKS`] marked blocks,
//! [`MAX_PROGRAMS`] programs and [`MAX_ABANDONED`] abandoned ones, [`MAX_GRAPHS`] declared graphs of [`MAX_GRAPHS_BYTES`],
//! one frame per append; a file of at most [`COMPACT_FACTOR`] times its live entries.
//! *Lock order*: one mutex, held across the write: appends are rare and follow each other.

mod claims;
mod format;
mod graphs;
mod marks;
mod programs;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use kvtier_types::{BlockKey, ShardKey, Tier};
use parking_lot::Mutex;

use crate::lock::{DirLock, lock_dir};
use crate::store::{StorageError, io_error};

pub use claims::{ClaimPart, ClaimRecord, MAX_CLAIM_BLOCKS, MAX_CLAIMS};
pub use format::{Entry, batches};
use format::{Facts, MAX_FIXED_BYTES, MAX_FRAME_BYTES, encode_frame, encode_header, parse};
pub use graphs::{
    GraphKey, GraphPart, GraphProgress, GraphRecord, MAX_GRAPH_BYTES, MAX_GRAPH_STEPS, MAX_GRAPHS, MAX_GRAPHS_BYTES,
};
pub use marks::MarkRecord;
pub use programs::{MAX_ABANDONED, MAX_PROGRAM_TIPS, MAX_PROGRAMS, ProgramEnd, ProgramName, ProgramRecord};

/// Most keys that may be evicted by verb and not yet gone from every tier: 80 MB of journal.
pub const MAX_EVICTED: usize = 1 << 20;
/// Most blocks marked by verb.
pub const MAX_MARKS: usize = 262_144;
/// The file is rewritten when it is this many times larger than a snapshot.
pub const COMPACT_FACTOR: u64 = 4;
/// A file smaller than this is left alone.
const COMPACT_MIN_BYTES: u64 = 256 << 10;
/// Entries in one append at most, if all have a length that is always the same; [`batches`] cuts what has any length.
pub const MAX_BATCH: usize = MAX_FRAME_BYTES / MAX_FIXED_BYTES;

const FILE: &str = "journal";
const NEW_FILE: &str = "journal.new";
const LOCK_FILE: &str = "journal.lock";
/// Damaged files kept aside; beyond that the last one is overwritten.
const MAX_CORRUPT_FILES: u32 = 100;

/// What the journal said at open.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct JournalState {
    /// The highest incarnation journaled, zero when there is none.
    pub incarnation: u64,
    /// Keys evicted by verb, with the highest sequence covered.
    pub evicted: BTreeMap<ShardKey, u64>,
    /// Claims that did not end, those included whose time is over.
    pub claims: Vec<ClaimRecord>,
    /// Blocks that verbs marked.
    pub marks: BTreeMap<BlockKey, MarkRecord>,
    /// What programs and sessions held.
    pub programs: Vec<ProgramRecord>,
    /// Programs that were abandoned, with the last sequence that they wrote under.
    pub abandoned: Vec<(ProgramName, u64)>,
    /// What programs declared, and how far they were.
    pub graphs: Vec<GraphRecord>,
    /// Entries were lost. Told once; what follows from it is [`Self::wiped_up_to`].
    pub damaged: bool,
    /// There was no journal: the first start, or someone removed it. Told once; what follows is the same.
    pub created: bool,
    /// Records of at most this sequence are dead, whatever their keys: nothing says any more which of them were
    /// evicted. Kept for good; zero where nothing was lost and the journal was begun by a build that did not say it.
    pub wiped_up_to: u64,
    /// The highest sequence that an entry names: what is written from now on must have a higher one.
    pub last_sequence: u64,
    /// Tiers that may hold records above [`Self::wiped_up_to`]: while one is away, what is said of them must be kept.
    pub tiers: BTreeSet<Tier>,
    /// What was cut or kept aside, for the log.
    pub notes: Vec<String>,
}

impl JournalState {
    fn take_in(&mut self, facts: &Facts) {
        self.incarnation = facts.incarnation;
        self.evicted = facts.evicted.clone();
        self.claims = facts.claims.live.values().cloned().collect();
        self.marks = facts.marks.clone();
        self.programs = facts.programs.live.values().cloned().collect();
        self.abandoned = facts.programs.abandoned.iter().map(|(name, up_to)| (name.clone(), *up_to)).collect();
        self.graphs = facts.graphs.live.values().cloned().collect();
        self.wiped_up_to = facts.wiped_up_to;
        self.last_sequence = facts.last_sequence();
        self.tiers = facts.tiers.clone();
        if facts.wiped_up_to == 0 {
            // The build that began it did not say which tiers it used.
            self.tiers.insert(Tier::Disk);
        }
    }
}

/// The open journal. Its calls block on the disk.
#[derive(Debug)]
pub struct Journal {
    dir: PathBuf,
    inner: Mutex<Inner>,
    _lock: DirLock,
}

#[derive(Debug)]
struct Inner {
    file: File,
    bytes: u64,
    facts: Facts,
    /// Set when what lies at the file's end is unknown.
    poison: Option<String>,
}

impl Journal {
    /// Opens or creates the journal in `dir`, which is created (mode 0700) if need be.
    ///
    /// # Errors
    /// [`StorageError::Open`]: another process has it, or a newer build wrote it. [`StorageError::Io`].
    pub fn open(dir: &Path) -> Result<(Self, JournalState), StorageError> {
        let lock = lock_dir(dir, LOCK_FILE)?;
        let path = dir.join(FILE);
        let mut state = JournalState::default();
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                state.created = true;
                encode_header()
            }
            Err(error) => return Err(io_error("read", &path, error)),
        };
        let parsed = parse(&bytes)
            .map_err(|newer| StorageError::Open { what: path.display().to_string(), reason: newer.to_string() })?;
        if let Some(offset) = parsed.damaged_at {
            let aside = set_aside(dir, &path)?;
            state.damaged = true;
            state.notes.push(format!(
                "{}: damaged at byte {offset}, entries are lost; kept as {}",
                path.display(),
                aside.display()
            ));
        } else if parsed.whole_bytes < bytes.len() {
            let cut = bytes.len() - parsed.whole_bytes;
            state.notes.push(format!("{}: cut a torn tail of {cut} bytes", path.display()));
        }
        let mut facts = parsed.facts;
        if state.damaged || state.created {
            // In the snapshot that takes the lost file's place: before it the loss is found again, after it it is known.
            let up_to_sequence = facts.last_sequence().max(unix_micros());
            facts.apply(&Entry::Wiped { up_to_sequence });
        }
        // A snapshot at every open: it cuts, compacts, and shows at once whether the directory can be written to.
        let (file, bytes) = NewFile::write(dir, &facts)?.install(dir)?;
        state.take_in(&facts);
        let inner = Inner { file, bytes, facts, poison: None };
        Ok((Self { dir: dir.to_owned(), inner: Mutex::new(inner), _lock: lock }, state))
    }

    /// Makes the entries durable, all or none.
    ///
    /// # Errors
    /// [`StorageError::Refused`]: more than one frame holds, or a name or taint over its bound. [`StorageError::Full`]:
    /// more than [`MAX_EVICTED`] keys, [`MAX_CLAIMS`] claims, [`MAX_CLAIM_BLOCKS`] of their blocks, [`MAX_MARKS`] marks,
    /// [`MAX_GRAPHS`] graphs or [`MAX_GRAPHS_BYTES`] of them.
    /// [`StorageError::Io`]: they may or may not be durable, and from then on [`StorageError::Poisoned`].
    pub fn append(&self, entries: &[Entry]) -> Result<(), StorageError> {
        let mut inner = self.inner.lock();
        if let Some(reason) = &inner.poison {
            return Err(StorageError::Poisoned { reason: reason.clone() });
        }
        check(entries, &inner.facts)?;
        if entries.is_empty() {
            return Ok(());
        }
        let frame = encode_frame(entries);
        let written = inner.file.write_all(&frame).and_then(|()| inner.file.sync_data());
        if let Err(error) = written {
            let error = io_error("append to", &self.dir.join(FILE), error);
            inner.poison = Some(error.to_string());
            return Err(error);
        }
        inner.bytes += frame.len() as u64;
        entries.iter().for_each(|entry| inner.facts.apply(entry));
        if inner.bytes > COMPACT_MIN_BYTES && inner.bytes > COMPACT_FACTOR * inner.facts.snapshot_bytes() {
            let facts = inner.facts.clone();
            if let Err(error) = self.replace(&mut inner, facts) {
                // The entries are durable all the same.
                tracing::error!(%error, "journal: compaction failed");
            }
        }
        Ok(())
    }

    /// Drops evictions for which `keep` says no: no tier holds such a record any more. Durable on return.
    ///
    /// # Errors
    /// [`StorageError::Io`], [`StorageError::Poisoned`].
    pub fn retain_evicted(&self, mut keep: impl FnMut(&ShardKey, u64) -> bool) -> Result<(), StorageError> {
        self.retain(|facts| facts.evicted.retain(|key, sequence| keep(key, *sequence)), |facts| facts.evicted.len())
    }

    /// Drops marks for which `keep` says no: no tier holds a record that they are about. Durable on return.
    ///
    /// # Errors
    /// [`StorageError::Io`], [`StorageError::Poisoned`].
    pub fn retain_marks(&self, mut keep: impl FnMut(&BlockKey, &MarkRecord) -> bool) -> Result<(), StorageError> {
        self.retain(|facts| facts.marks.retain(|block, mark| keep(block, mark)), |facts| facts.marks.len())
    }

    /// Drops abandoned programs for which `keep` says no: no tier holds anything that they wrote. Durable on return.
    ///
    /// # Errors
    /// [`StorageError::Io`], [`StorageError::Poisoned`].
    pub fn retain_abandoned(&self, mut keep: impl FnMut(&ProgramName, u64) -> bool) -> Result<(), StorageError> {
        self.retain(
            |facts| facts.programs.abandoned.retain(|name, up_to| keep(name, *up_to)),
            |facts| facts.programs.abandoned.len(),
        )
    }

    fn retain(&self, drop: impl FnOnce(&mut Facts), count: impl Fn(&Facts) -> usize) -> Result<(), StorageError> {
        let mut inner = self.inner.lock();
        if let Some(reason) = &inner.poison {
            return Err(StorageError::Poisoned { reason: reason.clone() });
        }
        let mut facts = inner.facts.clone();
        drop(&mut facts);
        if count(&facts) < count(&inner.facts) {
            self.replace(&mut inner, facts)?;
        }
        Ok(())
    }

    /// Bytes of the file.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        self.inner.lock().bytes
    }

    /// Puts a snapshot of `facts` in the place of the file. Until the rename, a failure changes nothing; after it, the
    /// new file may or may not be the one that is read after a crash, so nothing can be appended to either.
    fn replace(&self, inner: &mut Inner, facts: Facts) -> Result<(), StorageError> {
        let new = NewFile::write(&self.dir, &facts)?;
        match new.install(&self.dir) {
            Ok((file, bytes)) => {
                *inner = Inner { file, bytes, facts, poison: None };
                Ok(())
            }
            Err(error) => {
                inner.poison = Some(error.to_string());
                Err(error)
            }
        }
    }
}

/// Whether a batch can be appended.
fn check(entries: &[Entry], facts: &Facts) -> Result<(), StorageError> {
    let bytes: usize = entries.iter().map(Entry::bytes).sum();
    let refused = |what: String| Err(StorageError::Refused { what });
    if bytes > MAX_FRAME_BYTES {
        return refused(format!("{} entries of {bytes} bytes, the most is {MAX_FRAME_BYTES} bytes", entries.len()));
    }
    for entry in entries {
        match entry {
            Entry::Claim(part) if !claims::is_writable(part.name()) => {
                return refused("a claim's name is longer than its bound".into());
            }
            Entry::ClaimEnded(name) if !claims::is_writable(name) => {
                return refused("a claim's name is longer than its bound".into());
            }
            Entry::Mark(_, mark) if !mark.is_writable() => {
                return refused("a mark has more or longer taints than a block may have".into());
            }
            Entry::Program(record) if !record.is_writable() => {
                return refused("a program has a longer name or more branches than an entry has room for".into());
            }
            Entry::ProgramEnded(end) if !end.name.is_writable() => {
                return refused("a program's name is longer than its bound".into());
            }
            Entry::Graph(part) if !part.key().is_writable() => {
                return refused("a program's name is longer than its bound".into());
            }
            Entry::GraphProgress(progress) if !progress.is_writable() => {
                return refused("a graph's name or progress is longer than its bound".into());
            }
            Entry::GraphEnded(key) if !key.is_writable() => {
                return refused("a program's name is longer than its bound".into());
            }
            _ => {}
        }
    }
    let more = entries.iter().filter(|e| matches!(e, Entry::Evicted { key, .. } if !facts.evicted.contains_key(key)));
    let parts = entries.iter().filter_map(|e| if let Entry::Claim(part) = e { Some(part) } else { None });
    let claims_fit = parts.clone().next().is_none() || facts.claims.has_room(parts);
    let marks = entries.iter().filter(|e| matches!(e, Entry::Mark(block, _) if !facts.marks.contains_key(block)));
    let marks_fit = facts.marks.len() + marks.count() <= MAX_MARKS;
    let graphs = entries.iter().filter_map(|e| if let Entry::Graph(part) = e { Some(part) } else { None });
    let graphs_fit = graphs.clone().next().is_none() || facts.graphs.has_room(graphs);
    if facts.evicted.len() + more.count() > MAX_EVICTED || !claims_fit || !marks_fit || !graphs_fit {
        return Err(StorageError::Full);
    }
    Ok(())
}

/// A snapshot that is durable under its own name.
struct NewFile {
    file: File,
    bytes: u64,
}

impl NewFile {
    fn write(dir: &Path, facts: &Facts) -> Result<Self, StorageError> {
        let new = dir.join(NEW_FILE);
        let mut bytes = encode_header();
        let entries: Vec<Entry> = facts.entries().collect();
        for batch in batches(&entries) {
            bytes.extend(encode_frame(batch));
        }
        let write = || {
            let mut options = OpenOptions::new();
            let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            Ok(file)
        };
        let file = write().map_err(|error| io_error("write", &new, error))?;
        Ok(Self { file, bytes: bytes.len() as u64 })
    }

    fn install(self, dir: &Path) -> Result<(File, u64), StorageError> {
        let path = dir.join(FILE);
        let renamed = std::fs::rename(dir.join(NEW_FILE), &path).and_then(|()| File::open(dir)?.sync_all());
        renamed.map_err(|error| io_error("replace", &path, error))?;
        Ok((self.file, self.bytes))
    }
}

/// Microseconds since 1970. As a sequence it is above all that were given out before: they are counted up from one, or
/// from such a moment, and no node writes a million records a second all the time.
fn unix_micros() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or_default()
}

/// Keeps a damaged journal under the first free name. It is copied, so that a crash before the next snapshot is in its
/// place finds the damage again.
fn set_aside(dir: &Path, path: &Path) -> Result<PathBuf, StorageError> {
    let name = |n: u32| dir.join(format!("{FILE}.corrupt-{n}"));
    let free = (0..MAX_CORRUPT_FILES - 1).map(name).find(|aside| !aside.exists());
    let aside = free.unwrap_or_else(|| name(MAX_CORRUPT_FILES - 1));
    let copy = || {
        let mut bytes = Vec::new();
        File::open(path)?.read_to_end(&mut bytes)?;
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&aside)?;
        file.write_all(&bytes)?;
        file.sync_all()
    };
    copy().map_err(|error| io_error("keep a damaged journal as", &aside, error))?;
    Ok(aside)
}

#[cfg(test)]
mod tests;
