//! Learning what other writers stored: from a listing, or from a peer's word.
//!
//! *Bounds*: a listing keeps the newest [`MAX_PACKS`] packs, and ends within `round` with the footers it needs; of an
//! announcement [`MAX_ANNOUNCED`] names are looked at; a report names [`MAX_NAMED`] packs; [`MAX_EARLY`] packs that were
//! announced wait for a listing.
//! *Invariants*: a pack that a listing did not show is dropped, unless it was learnt since that listing began; what was
//! learnt before a failure stays, so that the next round goes on where this one ended.

use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::ops::ControlFlow;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use futures::StreamExt;
use futures::stream;
use tokio::time::Instant;

use super::bury::ROUNDS;
use super::index::{BATCH, MAX_PACK_RECORDS, MAX_PACKS, Slots};
use super::listing::{Graves, Listed, Listing};
use super::name::{PackAt, TombAt, Writers};
use super::{Floor, Shared};
use crate::codec::Malformed;
use crate::object::footer::{self, Wanted};
use crate::object::pack::Entry;
use crate::object::within;
use crate::store::StorageError;

/// Most names that one announcement carries.
pub const MAX_ANNOUNCED: usize = 64;
/// Longest footer: that of a pack of 1 GiB with 32 KiB records.
const MAX_FOOTER_BYTES: u64 = 8 << 20;
/// Listings in one refresh, while files of tombstones go that they showed.
const MAX_LISTINGS: u32 = 4;
/// Most packs that wait for what is dead to be known.
const MAX_EARLY: usize = 4096;
/// Most packs that a report names.
pub(super) const MAX_NAMED: usize = 64;

/// What [`Floor::refresh`] found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Refreshed {
    /// Packs that it learnt.
    pub new_packs: usize,
    /// Packs that are not there any more.
    pub gone_packs: usize,
    /// Packs, at most 64 of them, whose footer failed its verification twice, as `writer/digest`.
    pub unreadable: Vec<String>,
}

/// What became of names that a peer told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Announced {
    /// Packs that it learnt.
    pub new_packs: usize,
    /// Packs that were known already, are this node's own, or are left out for want of room; and files of tombstones.
    pub known: usize,
    /// Packs that wait for the next listing: until then it is not known what is dead.
    pub waiting: usize,
    /// Names that are none, or that were too many.
    pub refused: usize,
    /// Packs that are not there or not what the name says.
    pub wrong: usize,
    /// Packs whose footer could not be read: the store did not answer.
    pub unavailable: usize,
}

/// What became of one footer.
enum Learnt {
    New,
    Known,
    Gone,
    Malformed(Malformed),
}

impl Floor {
    /// Lists every writer's folder, reads the footers of packs not known yet, newest first, and drops packs that are gone.
    /// Calls wait for each other. Needs nothing but the store.
    ///
    /// # Errors
    /// [`StorageError::Unavailable`]: the store did not answer, or not within `round`; call again.
    pub async fn refresh(&self) -> Result<Refreshed, StorageError> {
        within(self.shared.config.round, "refreshing the floor", self.shared.refresh()).await?
    }

    /// Reads the footers of packs that a peer says are new, without a listing. The names, from
    /// [`crate::object::ObjectStoreTier::recent_packs`] and [`Floor::recent_tombstones`] of the peer, are not trusted.
    pub async fn announced(&self, names: &[String]) -> Announced {
        let mut found = Announced { refused: names.len().saturating_sub(MAX_ANNOUNCED), ..Announced::default() };
        let (mut packs, mut files) = (Vec::new(), Vec::new());
        for name in names.iter().take(MAX_ANNOUNCED) {
            match (PackAt::parse(name), TombAt::parse(name)) {
                (None, None) => found.refused += 1,
                (None, Some(at)) => files.push(at),
                (Some((at, _)), _) if self.shared.skips(&at) || self.shared.index.read().knows(&at) => found.known += 1,
                (Some((at, bytes)), _) => packs.push(Listed { modified_ms: now_ms(), at, bytes }),
            }
        }
        // First what is dead, then what it may be dead in.
        for at in files {
            match self.shared.learn_announced(at).await {
                Ok(()) => found.known += 1,
                Err(_) => found.unavailable += 1,
            }
        }
        if !self.shared.index.read().tombs.is_ready() {
            let mut early = self.shared.early.lock();
            let room = MAX_EARLY.saturating_sub(early.len());
            found.waiting = packs.len();
            early.extend(packs.into_iter().take(room));
            return found;
        }
        packs.extend(mem::take(&mut *self.shared.early.lock()));
        let learning = packs.into_iter().map(|pack| self.shared.learn(pack));
        let mut learning = stream::iter(learning).buffer_unordered(self.shared.config.concurrency);
        while let Some(learnt) = learning.next().await {
            match learnt {
                Ok(Learnt::New) => found.new_packs += 1,
                Ok(Learnt::Known) => found.known += 1,
                // A name may lie about the length of a good pack: that says nothing about the pack.
                Ok(Learnt::Gone | Learnt::Malformed(_)) => found.wrong += 1,
                Err(_) => found.unavailable += 1,
            }
        }
        found
    }
}

impl Shared {
    /// Whether a pack is of the own folder, which the catalog knows better.
    fn skips(&self, at: &PackAt) -> bool {
        self.config.skip_own && at.writer == self.config.own
    }

    async fn refresh(&self) -> Result<Refreshed, StorageError> {
        let _turn = self.listing.acquire().await.map_err(|_| StorageError::Closed)?;
        let (number, listing, graves) = self.list_and_learn().await?;
        if let Err(error) = self.tend_tombstones(&graves).await {
            tracing::warn!(%error, "files of tombstones could not be written or deleted: at the next refresh");
        }
        let (gone_packs, mut wanted) = self.compare(number, listing, &graves);
        let told: BTreeSet<PackAt> = {
            let mut early = self.early.lock().clone();
            early.retain(|pack| wanted.iter().all(|w| w.at != pack.at));
            wanted.extend(early.iter().cloned());
            early.into_iter().map(|pack| pack.at).collect()
        };
        let mut refreshed = Refreshed { gone_packs, ..Refreshed::default() };
        let learning = wanted.into_iter().map(|pack| async {
            let at = pack.at.clone();
            (at, self.learn(pack).await)
        });
        let mut learning = stream::iter(learning).buffer_unordered(self.config.concurrency);
        while let Some((at, learnt)) = learning.next().await {
            let learnt = learnt.inspect_err(|_| {
                self.rounds.fetch_add(1, Ordering::Relaxed);
                self.index.write().footer_stalled(at.clone());
            })?;
            match learnt {
                Learnt::New => refreshed.new_packs += 1,
                Learnt::Known | Learnt::Gone => {}
                // A peer may have told a wrong length.
                Learnt::Malformed(_) if told.contains(&at) => {}
                Learnt::Malformed(what) => self.footer_failed(&at, what),
            }
        }
        // What was announced meanwhile waits for the next one.
        let index = self.index.read();
        self.early.lock().retain(|pack| !told.contains(&pack.at) && !index.knows(&pack.at));
        drop(index);
        self.rounds.store(ROUNDS, Ordering::Relaxed);
        *self.refreshed.lock() = Some(Instant::now());
        refreshed.unreadable = self.unreadable();
        Ok(refreshed)
    }

    pub(super) fn unreadable(&self) -> Vec<String> {
        self.index.read().unreadable().take(MAX_NAMED).map(PackAt::shown).collect()
    }

    /// Lists the store and reads what was evicted, until each file that the listing shows was there. Returns the number of
    /// the listing too.
    pub(super) async fn list_and_learn(&self) -> Result<(u64, Listing, Graves), StorageError> {
        for _ in 0..MAX_LISTINGS {
            let number = self.index.write().begin_listing();
            let mut listing = self.list().await?;
            let graves = mem::take(&mut listing.graves);
            if graves.too_many {
                // There is no other way to fewer.
                self.tend_tombstones(&graves).await?;
            }
            if self.learn_tombstones(number, &graves).await? {
                return Ok((number, listing, graves));
            }
        }
        let reason = "files of tombstones go faster than they are read".to_owned();
        Err(StorageError::Unavailable { reason, source: None })
    }

    async fn list(&self) -> Result<Listing, StorageError> {
        let mut writers = Writers::default();
        let take = |listing: &mut Listing, object: object_store::ObjectMeta| {
            if let Some(at) = writers.pack_at(&self.root, &object.location) {
                let pack = Listed::new(at, &object);
                listing.graves.add_pack(&pack.at.writer, pack.modified_ms);
                if !self.skips(&pack.at) {
                    listing.add(pack, MAX_PACKS);
                }
            } else if let Some(at) = writers.tombs_at(&self.root, &object.location) {
                listing.graves.add_file(at);
            }
            ControlFlow::Continue(())
        };
        self.remote.fold_list(&self.root, take).await
    }

    /// Drops packs that are gone. Returns how many, and the packs to be read, newest first but for those that stalled.
    fn compare(&self, number: u64, listing: Listing, graves: &Graves) -> (usize, Vec<Listed>) {
        let (packs, cut) = listing.newest_first();
        let shown: BTreeMap<&PackAt, ()> = packs.iter().map(|pack| (&pack.at, ())).collect();
        let shows = |at: &PackAt| shown.contains_key(at);
        let (mut gone, mut from) = (0, Some(0));
        while let Some(first) = from {
            let (dropped, next) = self.index.write().drop_absent(first, number, shows);
            (gone, from) = (gone + dropped, next);
        }
        self.index.write().begin_comparing(cut, shows);
        self.index.write().forget_writers(|writer| graves.oldest_ms.contains_key(writer));
        let mut wanted = Vec::new();
        for batch in packs.chunks(BATCH) {
            let mut index = self.index.write();
            wanted.extend(batch.iter().filter(|pack| index.wants(pack)).cloned());
        }
        // One object that cannot be read must not keep the others from being read.
        let stalls = self.index.read().stalls();
        wanted.sort_by_cached_key(|pack| stalls.get(&pack.at).copied());
        (gone, wanted)
    }

    /// Reads a footer and puts its records into the index.
    async fn learn(&self, pack: Listed) -> Result<Learnt, StorageError> {
        // Since it was asked for, a newer pack may have been left out, or a peer may have named it.
        if !self.index.write().wants(&pack) {
            return Ok(Learnt::Known);
        }
        let entries = match self.footer(&pack).await {
            Ok(Ok(entries)) => entries,
            Ok(Err(malformed)) => return Ok(Learnt::Malformed(malformed)),
            Err(StorageError::NotFound) => return Ok(Learnt::Gone),
            Err(error) => return Err(error),
        };
        if entries.len() > self.config.max_records.min(MAX_PACK_RECORDS) {
            return Ok(Learnt::Malformed(Malformed("the pack has more records than the index may hold")));
        }
        let slots = Slots::of(&entries);
        Ok(if self.index.write().insert(pack, slots) { Learnt::New } else { Learnt::Known })
    }

    /// Reads a footer. The outer error means that the store did not answer, the inner one that the pack is none.
    pub(super) async fn footer(&self, pack: &Listed) -> Result<Result<Vec<Entry>, Malformed>, StorageError> {
        if u32::try_from(pack.bytes).is_err() {
            return Ok(Err(Malformed("the pack is longer than 4 GiB")));
        }
        let _turn = self.footers.acquire().await.map_err(|_| StorageError::Closed)?;
        let wanted = Wanted {
            path: &pack.at.path(&self.root),
            name: &pack.at.name,
            pack_bytes: pack.bytes,
            max_footer_bytes: MAX_FOOTER_BYTES,
        };
        footer::read(&self.remote, &wanted).await
    }

    /// The footer of a listed pack failed its verification.
    pub(super) fn footer_failed(&self, at: &PackAt, what: Malformed) {
        let left_alone = self.index.write().footer_failed(at);
        tracing::warn!(pack = %at.shown(), %what, left_alone, "not a pack");
    }
}

/// Milliseconds of Unix time.
pub(super) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
