//! Finding out what the packs hold: LIST, then the footers.
//!
//! *Bounds*: at most [`MAX_PACKS`] packs and [`MAX_NOTES`] notes; `concurrency` footers at once; a round ends within its
//! deadline, and the next one goes on with the footers not read yet. *Invariants*: objects that are not ours, and packs
//! that cannot be read whole, are left alone and noted; of several records of one shard the newest sequence wins, the
//! others are dead.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry as MapEntry;
use std::sync::Arc;

use futures::StreamExt;
use kvtier_types::ShardKey;
use object_store::ObjectMeta;

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

/// What was read so far, kept from one round to the next.
#[derive(Debug, Default)]
pub(super) struct Progress {
    packs: BTreeMap<PackName, Footer>,
}

/// A footer, or why it is none.
#[derive(Debug)]
struct Footer {
    pack_bytes: u64,
    entries: Result<Vec<Entry>, Malformed>,
}

/// One listing.
#[derive(Debug, Default)]
struct Listing {
    packs: BTreeMap<PackName, u64>,
    foreign: usize,
    more: bool,
}

/// One round: lists the packs, reads the footers not read yet and fills the index.
///
/// # Errors
/// [`StorageError::Unavailable`]: another round may succeed. The caller bounds the time.
pub(super) async fn round(shared: &Arc<Shared>) -> Result<Recovered, StorageError> {
    let listing = list(shared).await?;
    let missing: Vec<(PackName, u64)> = {
        let mut progress = shared.progress.lock();
        progress.packs.retain(|name, _| listing.packs.contains_key(name));
        let unread = listing.packs.iter().filter(|(name, _)| !progress.packs.contains_key(name));
        unread.map(|(name, bytes)| (*name, *bytes)).collect()
    };
    let reads = missing.into_iter().map(|(name, pack_bytes)| async move {
        let wanted = Wanted { path: &name.path(&shared.root), name: &name, pack_bytes, max_footer_bytes: u64::MAX };
        match footer::read(&shared.remote, &wanted).await {
            Ok(entries) => {
                shared.progress.lock().packs.insert(name, Footer { pack_bytes, entries });
                Ok(())
            }
            // Deleted since it was listed.
            Err(StorageError::NotFound) => Ok(()),
            Err(error) => Err(error),
        }
    });
    let mut reads = futures::stream::iter(reads).buffer_unordered(shared.config.recovery.concurrency);
    while let Some(read) = reads.next().await {
        read?;
    }
    let progress = std::mem::take(&mut *shared.progress.lock());
    Ok(install(&mut shared.index.lock(), progress, &listing))
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
    let mut packs = Vec::new();
    for (name, footer) in progress.packs {
        match footer.entries {
            Ok(entries) => packs.push((name, footer.pack_bytes, entries)),
            Err(malformed) => notes.add(format!("pack {} is left alone: {malformed}", hex::encode(name.0))),
        }
    }
    if listing.foreign > 0 {
        notes.add(format!("{} objects that are not packs are left alone", listing.foreign));
    }
    if listing.more {
        notes.add(format!("there are more than {MAX_PACKS} objects: the rest was not looked at"));
    }
    let newest = newest_of(&packs);
    let mut recovered = Recovered { complete: true, ..Recovered::default() };
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
