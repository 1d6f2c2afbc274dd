//! Evicting from packs: tombstones written to the store, read from there, and taken away once they say nothing any more.
//!
//! ```text
//! bury      -> dead here at once -> waits -> one file in the own folder
//! announced -> LIST of the folder of who wrote a file that is not known -> its files -> dead here too
//! refresh   -> LIST -> files not known, before any footer -> dead here too
//!           -> own files become one; its parts go later, and all once every pack is newer
//! ```
//! *Invariants*: [`Floor::bury`] returns `Ok` only when all that was buried until then is durable; nothing is found in packs
//! while a file that is known of was not read; whoever lists while files become one sees the parts or the one.
//! *Cancellation*: what was not written when a call is dropped is written by the next one, or by the next refresh.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::StreamExt;
use futures::stream;
use kvtier_types::{BlockKey, NodeId, RecordMeta};
use object_store::PutPayload;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::listing::{Graves, MAX_TOMB_FILES};
use super::name::{TombAt, Writers, tombs_folder};
use super::refresh::now_ms;
use super::tomb_file::{self, MAX_FILE_BYTES, MAX_IN_FILE};
use super::tombstones::{Burial, Words, block_digest};
use super::{Floor, Shared};
use crate::object::breaker::is_untried;
use crate::object::within;
use crate::store::StorageError;

/// Refreshes that failed at a footer after which all others are known: each begins with those that did not fail before.
pub(super) const ROUNDS: u32 = 3;
/// Shortest time between two files: calls that come faster share one.
const WRITE_EVERY: Duration = Duration::from_millis(250);
/// Pause between two looks at whether something is known.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// Longest look at what one node evicted.
const LEARN_LIMIT: Duration = Duration::from_secs(10);

impl Floor {
    /// Which other writers' packs have living records of each block, as far as it is known, and up to which sequence.
    /// Does no I/O.
    #[must_use]
    pub fn writers_of(&self, blocks: &[BlockKey]) -> Vec<Vec<(NodeId, u64)>> {
        blocks.iter().map(|block| self.shared.index.read().writers_of(block).into_iter().collect()).collect()
    }

    /// Whether it is known what is dead: before that nothing is found.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.shared.index.read().tombs.is_ready()
    }

    /// Whether it is known what is dead and what is in packs, but for those whose footer cannot be read.
    fn is_whole(&self) -> bool {
        self.is_ready() && self.shared.rounds.load(Ordering::Relaxed) >= ROUNDS
    }

    /// Waits until both are known, for at most `limit`. Returns whether they are.
    pub async fn wait_whole(&self, limit: Duration) -> bool {
        let waiting = async {
            while !self.is_whole() {
                sleep(LOOK_AGAIN).await;
            }
        };
        timeout(limit, waiting).await.is_ok()
    }

    /// Whether packs of others than these are known.
    #[must_use]
    pub fn has_others(&self, than: &[NodeId]) -> bool {
        let index = self.shared.index.read();
        index.writers().any(|writer| *writer != self.shared.config.own && !than.contains(writer))
    }

    /// Refreshes unless that was done so lately; one that is under way is waited for instead.
    ///
    /// # Errors
    /// As [`Floor::refresh`].
    pub async fn refreshed_within(&self, time: Duration) -> Result<(), StorageError> {
        let lately = || self.shared.refreshed.lock().is_some_and(|at: Instant| at.elapsed() <= time);
        while !lately() && self.shared.listing.available_permits() == 0 {
            sleep(LOOK_AGAIN).await;
        }
        if lately() { Ok(()) } else { self.refresh().await.map(drop) }
    }

    /// Whether a record of a writer's pack was evicted, by its block.
    #[must_use]
    pub fn is_buried(&self, writer: &NodeId, meta: &RecordMeta) -> bool {
        self.shared.index.read().tombs.buries(writer, block_digest(&meta.key.block), meta.sequence)
    }

    /// Whether a record of a writer's pack was not evicted.
    #[must_use]
    pub fn lives(&self, writer: &NodeId, meta: &RecordMeta) -> bool {
        let (block, index) = (block_digest(&meta.key.block), self.shared.index.read());
        !index.tombs.is_shielded(block) && !index.tombs.covers(writer, block, meta.sequence)
    }

    /// The highest sequence of this node that was ever evicted from packs: what it stores must be above.
    #[must_use]
    pub fn own_sequence(&self) -> u64 {
        self.shared.index.read().tombs.newest_of(&self.shared.config.own)
    }

    /// Reads all that was evicted, without looking at packs, unless that is done.
    ///
    /// # Errors
    /// [`StorageError::Unavailable`]: the store did not answer, or not within `round`.
    pub async fn learn_dead(&self) -> Result<(), StorageError> {
        let learning = async {
            // A refresh has its turn until it has read all footers, and knows long before what is dead.
            while !self.is_ready() {
                match timeout(LOOK_AGAIN, self.shared.listing.acquire()).await {
                    Err(_elapsed) => {}
                    Ok(Err(_)) => return Err(StorageError::Closed),
                    Ok(Ok(_turn)) => return self.shared.list_and_learn().await.map(drop),
                }
            }
            Ok(())
        };
        within(self.shared.config.round, "reading what was evicted from packs", learning).await?
    }

    /// Has blocks not be found for a while, whoever wrote them: for as long as others say what they evict.
    pub fn shield(&self, blocks: &[BlockKey], time: Duration) {
        let blocks: Vec<u64> = blocks.iter().map(block_digest).collect();
        self.shared.index.write().tombs.shield(blocks, Instant::now(), time);
    }

    /// Evicts blocks from packs, for good and for every node: dead here on return, elsewhere once the file is read.
    ///
    /// # Errors
    /// [`StorageError::Full`]: too much is buried already, and nothing was. [`StorageError::Unavailable`]: dead here, but not
    /// durable and unknown to others; tried again by the next call, and by each refresh.
    pub async fn bury(&self, burials: &[Burial]) -> Result<(), StorageError> {
        self.shared.index.write().tombs.bury(burials)?;
        self.shared.write_waiting().await
    }

    /// The last file that [`Self::bury`] wrote, for [`Self::announced`] of the peers, which look for those before it.
    #[must_use]
    pub fn recent_tombstones(&self) -> Option<String> {
        self.shared.recent.lock().as_ref().map(TombAt::announce)
    }
}

impl Shared {
    /// Writes what waits. Calls wait for each other.
    async fn write_waiting(&self) -> Result<(), StorageError> {
        let mut last = self.burying.lock().await;
        loop {
            if self.index.read().tombs.waiting(1).is_empty() {
                return Ok(());
            }
            if let Some(last) = *last {
                sleep_until(last + WRITE_EVERY).await;
            }
            let words = Words { said_ms: now_ms(), sections: self.index.read().tombs.waiting(MAX_IN_FILE) };
            *last = Some(Instant::now());
            let at = self.write_file(&words).await?;
            let mut index = self.index.write();
            let listing = index.listing();
            index.tombs.written(at.clone(), listing, &words);
            *self.recent.lock() = Some(at);
        }
    }

    async fn write_file(&self, words: &Words) -> Result<TombAt, StorageError> {
        let (name, bytes) = tomb_file::encode(words);
        let at = TombAt { burier: self.config.own.clone(), name };
        self.remote.put(&at.path(&self.root), PutPayload::from(bytes)).await?;
        Ok(at)
    }

    /// Reads the files that a listing shows and that are not known, then lets go of those that it does not show. Returns
    /// whether each was there: one that is gone became part of another, which the listing may not show.
    pub(super) async fn learn_tombstones(&self, listing: u64, graves: &Graves) -> Result<bool, StorageError> {
        if graves.too_many {
            let reason =
                format!("more than {MAX_TOMB_FILES} files of tombstones: what they say cannot be told from packs");
            return Err(StorageError::Unavailable { reason, source: None });
        }
        self.set_unread(&graves.files);
        let all = self.learn_files(graves.files.iter().cloned()).await?;
        if all {
            let mut index = self.index.write();
            let gone = index.tombs.absent(listing, |at| graves.files.contains(at));
            index.tombs.remove(&gone);
            index.tombs.set_listed(listing);
            index.tombs.retain_given_up(|at| graves.files.contains(at));
        }
        Ok(all)
    }

    /// Reads those of some files that are not known. Returns whether each was there.
    async fn learn_files(&self, files: impl Iterator<Item = TombAt>) -> Result<bool, StorageError> {
        let unknown: Vec<TombAt> = {
            let index = self.index.read();
            files.filter(|at| !index.tombs.knows(at)).collect()
        };
        let reading = unknown.into_iter().map(|at| self.learn_file(at));
        let mut reading = stream::iter(reading).buffer_unordered(self.config.concurrency);
        let (mut all, mut failed) = (true, None);
        while let Some(there) = reading.next().await {
            match there {
                Ok(there) => all &= there,
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        failed.map_or(Ok(all), Err)
    }

    /// A node wrote a file: reads it and whatever else that node wrote. Until that is done nothing is found.
    pub(super) async fn learn_announced(&self, at: TombAt) -> Result<(), StorageError> {
        if self.index.read().tombs.knows(&at) {
            return Ok(());
        }
        self.set_unread([&at]);
        let learning = async {
            let (listed, _) = self.remote.list(&tombs_folder(&self.root, &at.burier), MAX_TOMB_FILES).await?;
            let mut writers = Writers::default();
            let listed = listed.iter().filter_map(|object| writers.tombs_at(&self.root, &object.location));
            let listed: BTreeSet<TombAt> = listed.collect();
            self.set_unread(&listed);
            let is_listed = listed.contains(&at);
            let all = self.learn_files(listed.into_iter()).await?;
            if !is_listed && !self.learn_files([at.clone()].into_iter()).await? {
                // It became part of one that the folder shows, or says nothing any more.
                self.index.write().tombs.forget_unread(&at);
            }
            Ok::<_, StorageError>(all)
        };
        let limit = self.config.round.min(LEARN_LIMIT);
        let learnt = within(limit, "reading what a node evicted from packs", learning).await;
        if !matches!(learnt, Ok(Ok(true))) {
            // The next listing says what became of them.
            self.wake_refresh.notify_one();
        }
        learnt?.map(drop)
    }

    fn set_unread<'a>(&self, files: impl IntoIterator<Item = &'a TombAt>) {
        let mut index = self.index.write();
        let listing = index.listing();
        files.into_iter().for_each(|at| index.tombs.set_unread(at.clone(), listing));
    }

    /// Reads a file. Returns whether it is there.
    ///
    /// # Errors
    /// [`StorageError::Unavailable`]: the store did not answer.
    async fn learn_file(&self, at: TombAt) -> Result<bool, StorageError> {
        let _turn = self.footers.acquire().await.map_err(|_| StorageError::Closed)?;
        let bytes = match self.remote.get(&at.path(&self.root), 0..MAX_FILE_BYTES).await {
            Ok(bytes) => bytes,
            Err(StorageError::NotFound) => return Ok(false),
            // One that was archived must not keep all packs from being found for ever.
            Err(error) => {
                let given_up = !is_untried(&error) && self.index.write().tombs.failed(&at);
                return if given_up { Ok(true) } else { Err(error) };
            }
        };
        let words = match tomb_file::decode(&at.name, &bytes) {
            Ok(words) => words,
            Err(what) => {
                tracing::error!(file = %at.announce(), %what, "what was evicted cannot be read: it may be found in packs");
                // It stays where it is, for whoever can mend it.
                Words { said_ms: u64::MAX, ..Words::default() }
            }
        };
        let mut index = self.index.write();
        let listing = index.listing();
        if !index.tombs.insert(at.clone(), listing, &words) {
            let file = at.announce();
            tracing::warn!(
                file,
                "more was evicted from packs than is kept in mind: all that its writers wrote until then is left out"
            );
        }
        Ok(true)
    }

    /// Keeps the own files few: writes what waits, makes one of many, and deletes those that say nothing any more.
    pub(super) async fn tend_tombstones(&self, graves: &Graves) -> Result<(), StorageError> {
        self.write_waiting().await?;
        let own = &self.config.own;
        let useless: Vec<TombAt> = {
            let index = self.index.read();
            let files = index.tombs.files_of(own).into_iter();
            files.filter(|at| index.tombs.is_useless(at, &graves.oldest_ms, now_ms())).collect()
        };
        self.delete_files(&useless).await?;
        let (parts, later): (Vec<_>, Vec<_>) = std::mem::take(&mut *self.parts.lock())
            .into_iter()
            .partition(|(_, merged_at): &(TombAt, Instant)| merged_at.elapsed() >= self.config.keep_merged);
        self.parts.lock().extend(later);
        let parts: Vec<TombAt> = parts.into_iter().map(|(at, _)| at).collect();
        // Those that are not deleted now are merged again.
        self.delete_files(&parts).await?;
        let merged: BTreeSet<TombAt> = self.parts.lock().iter().map(|(at, _)| at.clone()).collect();
        let mergeable = self.index.read().tombs.mergeable(own, MAX_IN_FILE, |at| !merged.contains(at));
        let Some((files, words)) = mergeable else { return Ok(()) };
        let at = self.write_file(&words).await?;
        // Whoever looks for the last one looks for all.
        *self.recent.lock() = Some(at.clone());
        self.parts.lock().extend(files.into_iter().filter(|part| *part != at).map(|part| (part, Instant::now())));
        let mut index = self.index.write();
        let listing = index.listing();
        index.tombs.insert(at, listing, &words);
        Ok(())
    }

    /// Deletes files that say nothing, or nothing that others do not.
    pub(super) async fn delete_files(&self, files: &[TombAt]) -> Result<(), StorageError> {
        for at in files {
            self.remote.delete(&at.path(&self.root)).await?;
            self.recent.lock().take_if(|recent| recent == at);
        }
        self.index.write().tombs.remove(files);
        Ok(())
    }
}
