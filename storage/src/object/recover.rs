//! Finding out what the packs hold: LIST, then the footers.
//!
//! *Bounds*: at most [`MAX_PACKS`] packs and [`MAX_NOTES`] notes; `concurrency` footers at once; a round ends within its
//! deadline, and the next one goes on with the footers not read yet; a footer that the store does not yield is asked for in
//! [`PATIENCE`] rounds, or [`PATIENCE_WITH_ALL`]. *Invariants*: objects that are not ours, and packs that cannot be read
//! whole, are left alone and noted; a round counts against a pack only if the store listed the packs before it and still
//! answers after it (`a_store_that_dies_while_it_is_read_is_not_taken_for_recovered`); of several records of one shard the
//! newest sequence wins, the others are dead.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry as MapEntry;
use std::sync::Arc;

use futures::StreamExt;
use kvtier_types::ShardKey;
use object_store::ObjectMeta;

use super::breaker::is_untried;
use super::footer::{self, Wanted};
use super::index::{Index, NewPack};
use super::pack::{Entry, PackName};
use super::{Recovered, Shared};
use crate::codec::Malformed;
use crate::store::{Location, StorageError};

/// Most packs listed: 8 TiB of packs of the usual size.
const MAX_PACKS: usize = 1 << 20;
/// Most notes kept; a summary counts the rest.
const MAX_NOTES: usize = 64;
/// Rounds without a pack's footer after which the pack is passed over.
const PATIENCE: u32 = 3;
/// The same while not one footer could be read: the fault may be the store's, and would pass.
const PATIENCE_WITH_ALL: u32 = 30;

/// What was read so far, kept from one round to the next.
#[derive(Debug, Default)]
pub(super) struct Progress {
    packs: BTreeMap<PackName, Seen>,
    /// In how many rounds the store did not yield the footers of packs that are not in `packs`.
    failures: BTreeMap<PackName, u32>,
}

/// A pack of which all is known that will be.
#[derive(Debug)]
struct Seen {
    pack_bytes: u64,
    footer: Footer,
}

/// A footer, or why there is none.
#[derive(Debug)]
enum Footer {
    Read(Vec<Entry>),
    Malformed(Malformed),
    /// The store does not yield it.
    Unread(StorageError),
}

/// A pack whose footer the store did not yield in one round.
#[derive(Debug)]
struct Unread {
    name: PackName,
    pack_bytes: u64,
    error: StorageError,
}

/// One listing.
#[derive(Debug, Default)]
struct Listing {
    packs: BTreeMap<PackName, u64>,
    foreign: usize,
    more: bool,
}

impl Progress {
    /// The listed packs not read yet; those that failed come last, so that they keep no other from being read.
    fn missing(&mut self, listing: &Listing) -> Vec<(PackName, u64)> {
        self.packs.retain(|name, _| listing.packs.contains_key(name));
        self.failures.retain(|name, _| listing.packs.contains_key(name));
        let unread = listing.packs.iter().filter(|(name, _)| !self.packs.contains_key(name));
        let mut missing: Vec<(PackName, u64)> = unread.map(|(name, bytes)| (*name, *bytes)).collect();
        missing.sort_by_key(|(name, _)| self.failures.get(name).copied());
        missing
    }

    /// How many rounds a pack may fail in.
    fn patience(&self) -> u32 {
        let yielded = self.packs.values().any(|seen| !matches!(seen.footer, Footer::Unread(_)));
        if yielded { PATIENCE } else { PATIENCE_WITH_ALL }
    }

    /// A pack failed in one round more: passes it over when its time is up, gives the error back when it is not.
    fn failed(&mut self, unread: Unread, patience: u32) -> Option<StorageError> {
        let Unread { name, pack_bytes, error } = unread;
        let rounds = self.failures.entry(name).or_default();
        *rounds += 1;
        if *rounds < patience {
            return Some(error);
        }
        self.failures.remove(&name);
        self.packs.insert(name, Seen { pack_bytes, footer: Footer::Unread(error) });
        None
    }
}

/// One round: lists the packs, reads the footers not read yet and fills the index.
///
/// # Errors
/// [`StorageError::Unavailable`]: another round may succeed. The caller bounds the time.
pub(super) async fn round(shared: &Arc<Shared>) -> Result<Recovered, StorageError> {
    let listing = list(shared).await?;
    let missing = shared.progress.lock().missing(&listing);
    let unread = read_footers(shared, missing).await;
    judge(shared, unread).await?;
    let progress = std::mem::take(&mut *shared.progress.lock());
    Ok(install(&mut shared.index.lock(), progress, &listing))
}

/// Reads the footers of packs, and returns those that the store did not yield.
async fn read_footers(shared: &Arc<Shared>, missing: Vec<(PackName, u64)>) -> Vec<Unread> {
    let reads = missing.into_iter().map(|(name, pack_bytes)| async move {
        let wanted = Wanted { path: &name.path(&shared.root), name: &name, pack_bytes, max_footer_bytes: u64::MAX };
        let footer = match footer::read(&shared.remote, &wanted).await {
            Ok(Ok(entries)) => Footer::Read(entries),
            Ok(Err(malformed)) => Footer::Malformed(malformed),
            // Deleted since it was listed.
            Err(StorageError::NotFound) => return None,
            Err(error) => return Some(Unread { name, pack_bytes, error }),
        };
        shared.progress.lock().packs.insert(name, Seen { pack_bytes, footer });
        None
    });
    let mut reads = futures::stream::iter(reads).buffer_unordered(shared.config.recovery.concurrency);
    let mut unread = Vec::new();
    while let Some(read) = reads.next().await {
        unread.extend(read);
    }
    unread
}

/// Tells packs that cannot be read from a store that does not answer, and passes those over that failed for too long.
///
/// # Errors
/// Why one that is not passed over could not be read: another round is needed.
async fn judge(shared: &Arc<Shared>, unread: Vec<Unread>) -> Result<(), StorageError> {
    if unread.is_empty() {
        return Ok(());
    }
    let answers = shared.remote.probe_reads(&shared.probe_path()).await;
    let mut progress = shared.progress.lock();
    let patience = progress.patience();
    let mut first = None;
    for pack in unread {
        let told = answers && !is_untried(&pack.error);
        let error = if told { progress.failed(pack, patience) } else { Some(pack.error) };
        first = first.or(error);
    }
    first.map_or(Ok(()), Err)
}

async fn list(shared: &Arc<Shared>) -> Result<Listing, StorageError> {
    let (objects, more) = shared.remote.list(&shared.root, MAX_PACKS).await?;
    let mut listing = Listing { more, ..Listing::default() };
    let probe = shared.probe_path();
    for ObjectMeta { location, size, .. } in objects {
        match PackName::parse(&shared.root, &location) {
            Some(name) => {
                listing.packs.insert(name, size);
            }
            None if location == probe => {}
            None => listing.foreign += 1,
        }
    }
    Ok(listing)
}

/// Puts the readable packs into the index and says what was found.
fn install(index: &mut Index, progress: Progress, listing: &Listing) -> Recovered {
    let mut notes = Notes::default();
    let (mut packs, mut passed_over) = (Vec::new(), listing.more);
    for (name, Seen { pack_bytes, footer }) in progress.packs {
        let why = match footer {
            Footer::Read(entries) => {
                packs.push((name, pack_bytes, entries));
                continue;
            }
            Footer::Malformed(malformed) => malformed.to_string(),
            Footer::Unread(error) => {
                passed_over = true;
                format!("the store lists it, but its footer cannot be read: {error}")
            }
        };
        index.leave_alone(pack_bytes);
        notes.add(format!("pack {} of {pack_bytes} bytes is left alone: {why}", hex::encode(name.0)));
    }
    if listing.foreign > 0 {
        notes.add(format!("{} objects that are not packs are left alone", listing.foreign));
    }
    if listing.more {
        notes.add(format!("there are more than {MAX_PACKS} objects: the rest was not looked at"));
    }
    let newest = newest_of(&packs);
    let mut recovered = Recovered { complete: true, passed_over, ..Recovered::default() };
    let mut stale = 0usize;
    for (p, (name, bytes, entries)) in packs.iter().enumerate() {
        let lives = |n: usize| newest.get(&entries[n].meta.key).is_some_and(|&(_, pack, slot)| (pack, slot) == (p, n));
        let segment = index.insert(&NewPack { name: *name, bytes: *bytes, entries }, lives);
        for (offset, entry) in (0..).zip(entries) {
            recovered.next_sequence = recovered.next_sequence.max(entry.meta.sequence.saturating_add(1));
            if lives(offset as usize) {
                recovered.records.push((entry.meta.clone(), Location { segment, offset }));
            } else {
                stale += 1;
            }
        }
    }
    if stale > 0 {
        notes.add(format!("{stale} records are superseded by newer ones"));
    }
    recovered.records.sort_by_key(|(meta, at)| (meta.sequence, *at));
    recovered.notes = notes.finish();
    recovered
}

/// For every shard: the highest sequence, and the pack and record that hold it. Of equals the first pack wins.
fn newest_of(packs: &[(PackName, u64, Vec<Entry>)]) -> BTreeMap<ShardKey, (u64, usize, usize)> {
    let mut newest = BTreeMap::new();
    for (p, (_, _, entries)) in packs.iter().enumerate() {
        for (n, entry) in entries.iter().enumerate() {
            let found = (entry.meta.sequence, p, n);
            match newest.entry(entry.meta.key) {
                MapEntry::Vacant(vacant) => {
                    vacant.insert(found);
                }
                MapEntry::Occupied(mut known) if known.get().0 < found.0 => {
                    known.insert(found);
                }
                MapEntry::Occupied(_) => {}
            }
        }
    }
    newest
}

/// A bounded list of notes.
#[derive(Debug, Default)]
struct Notes {
    kept: Vec<String>,
    dropped: usize,
}

impl Notes {
    fn add(&mut self, note: String) {
        tracing::warn!(%note, "object recovery");
        if self.kept.len() < MAX_NOTES { self.kept.push(note) } else { self.dropped += 1 }
    }

    fn finish(mut self) -> Vec<String> {
        if self.dropped > 0 {
            self.kept.push(format!("and {} more", self.dropped));
        }
        self.kept
    }
}
