//! Evicting from packs: tombstones written to the store, read from there, and taken away once they say nothing any more.
//!
//! ```text
//! bury     -> dead here at once -> waits -> one file in the own folder
//! refresh  -> LIST -> files not known yet, before any footer -> dead here too
//!          -> own files become one, and go when all packs are newer
//! ```
//! *Invariants*: [`Floor::bury`] returns `Ok` only when all that was buried until then is durable; a pack is found only after
//! every file was read that the listing showed with it.
//! *Cancellation*: what was not written when a call is dropped is written by the next one, or by the next refresh.

use bytes::Bytes;
use futures::StreamExt;
use futures::stream;
use kvtier_types::{BlockKey, NodeId};
use object_store::PutPayload;

use super::listing::{Graves, MAX_TOMB_FILES};
use super::name::TombAt;
use super::refresh::now_ms;
use super::tomb_file::{self, MAX_FILE_BYTES, MAX_IN_FILE};
use super::tombstones::{Burial, Sections};
use super::{Floor, Shared};
use crate::store::StorageError;

/// Names of own files that peers are told of.
pub(super) const MAX_RECENT: usize = 8;

impl Floor {
    /// Which other writers' packs have living records of each block, as far as it is known, and up to which sequence.
    /// Does no I/O.
    #[must_use]
    pub fn writers_of(&self, blocks: &[BlockKey]) -> Vec<Vec<(NodeId, u64)>> {
        blocks.iter().map(|block| self.shared.index.read().writers_of(block).into_iter().collect()).collect()
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

    /// Names of the last files that [`Self::bury`] wrote, newest last, for [`Self::announced`] of the peers.
    #[must_use]
    pub fn recent_tombstones(&self) -> Vec<String> {
        self.shared.recent.lock().iter().map(TombAt::announce).collect()
    }
}

impl Shared {
    /// Writes what waits. Calls wait for each other.
    async fn write_waiting(&self) -> Result<(), StorageError> {
        let _turn = self.burying.acquire().await.map_err(|_| StorageError::Closed)?;
        loop {
            let sections = self.index.read().tombs.waiting(MAX_IN_FILE);
            if sections.is_empty() {
                return Ok(());
            }
            let at = self.write_file(&sections).await?;
            self.wrote(at, &sections);
        }
    }

    fn wrote(&self, at: TombAt, sections: &Sections) {
        let mut index = self.index.write();
        let listing = index.listing();
        index.tombs.insert(at.clone(), now_ms(), listing, sections);
        index.tombs.written(sections);
        drop(index);
        let mut recent = self.recent.lock();
        if recent.len() == MAX_RECENT {
            recent.pop_front();
        }
        recent.push_back(at);
    }

    async fn write_file(&self, sections: &Sections) -> Result<TombAt, StorageError> {
        let (name, bytes) = tomb_file::encode(sections);
        let at = TombAt { burier: self.config.own.clone(), name };
        self.remote.put(&at.path(&self.root), PutPayload::from(bytes)).await?;
        Ok(at)
    }

    /// Reads the files that a listing shows and that are not known, and lets go of those that it does not show. Returns
    /// whether each was there: one that is gone became part of another, which the listing may not show yet.
    pub(super) async fn learn_tombstones(&self, listing: u64, graves: &Graves) -> Result<bool, StorageError> {
        if graves.too_many {
            let reason =
                format!("more than {MAX_TOMB_FILES} files of tombstones: what they say cannot be told from packs");
            return Err(StorageError::Unavailable { reason, source: None });
        }
        let unknown: Vec<TombAt> = {
            let mut index = self.index.write();
            let gone = index.tombs.absent(listing, |at| graves.files.contains_key(at));
            index.tombs.remove(&gone);
            let unknown = graves.files.keys().filter(|at| !index.tombs.knows(at));
            unknown.cloned().collect()
        };
        let reading = unknown.into_iter().map(|at| async {
            let modified_ms = graves.files.get(&at).map_or(0, |(modified_ms, _)| *modified_ms);
            self.learn_file(at, modified_ms).await
        });
        let mut reading = stream::iter(reading).buffer_unordered(self.config.concurrency);
        let mut all = true;
        while let Some(there) = reading.next().await {
            all &= there?;
        }
        Ok(all)
    }

    /// Reads a file, unless it is known. Returns whether it is there.
    ///
    /// # Errors
    /// [`StorageError::Unavailable`]: the store did not answer.
    pub(super) async fn learn_file(&self, at: TombAt, modified_ms: u64) -> Result<bool, StorageError> {
        if self.index.read().tombs.knows(&at) {
            return Ok(true);
        }
        let _turn = self.footers.acquire().await.map_err(|_| StorageError::Closed)?;
        let bytes: Bytes = match self.remote.get(&at.path(&self.root), 0..MAX_FILE_BYTES).await {
            Ok(bytes) => bytes,
            Err(StorageError::NotFound) => return Ok(false),
            Err(error) => return Err(error),
        };
        let sections = match tomb_file::decode(&at.name, &bytes) {
            Ok(sections) => sections,
            Err(what) => {
                tracing::error!(file = %at.announce(), %what, "what was evicted cannot be read: it may be found in packs");
                return Ok(true);
            }
        };
        let mut index = self.index.write();
        let listing = index.listing();
        if !index.tombs.insert(at.clone(), modified_ms, listing, &sections) {
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
        let mergeable = self.index.read().tombs.mergeable(own, MAX_IN_FILE);
        let Some((mut files, sections)) = mergeable else { return Ok(()) };
        let merged = self.write_file(&sections).await?;
        files.retain(|at| *at != merged);
        {
            let mut index = self.index.write();
            let listing = index.listing();
            index.tombs.insert(merged, now_ms(), listing, &sections);
        }
        self.delete_files(&files).await
    }

    /// Deletes files that say nothing, or nothing that others do not.
    pub(super) async fn delete_files(&self, files: &[TombAt]) -> Result<(), StorageError> {
        for at in files {
            self.remote.delete(&at.path(&self.root)).await?;
            self.recent.lock().retain(|recent| recent != at);
        }
        self.index.write().tombs.remove(files);
        Ok(())
    }
}
