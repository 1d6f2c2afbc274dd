//! Keeping all writers' packs together within a budget, by deleting what dead writers left.
//!
//! Each node may do it, several at once too: they choose the same packs, and deleting twice is harmless.
//!
//! *Invariants*: a pack is deleted only if its writer is neither named alive nor this node, was not heard of and has not
//! stored a pack for `dead_after`, and the budget is exceeded; the oldest go first; a pack whose footer does not prove that
//! it is one is left alone.
//! *Bounds*: a round ends within `round`, and chooses from the oldest [`MAX_PACKS`] packs of writers not alive; one that
//! exceeds either is finished by the next.

use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::ops::ControlFlow;
use std::time::Duration;

use futures::future::try_join_all;
use kvtier_types::NodeId;
use object_store::ObjectMeta;
use tokio::time::Instant;

use super::index::MAX_PACKS;
use super::listing::{Graves, Listed};
use super::name::{TombAt, Writers};
use super::refresh::now_ms;
use super::{Floor, Shared};
use crate::object::within;
use crate::store::StorageError;

/// What [`Floor::collect`] found and did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Collected {
    /// Bytes of packs before it, by writer, this node among them.
    pub bytes_by_writer: BTreeMap<NodeId, u64>,
    /// Their sum.
    pub total_bytes: u64,
    /// Packs deleted, by this node or another at the same time.
    pub deleted_packs: usize,
    /// Their bytes.
    pub deleted_bytes: u64,
    /// Bytes by which the budget is still exceeded: living writers' packs, or more than one round could delete.
    pub excess_bytes: u64,
    /// Packs, at most 64 of them, whose footer failed its verification twice, as `writer/digest`. They are not deleted.
    pub unreadable: Vec<String>,
}

/// What a listing says of a writer.
#[derive(Debug, Default)]
struct Folder {
    bytes: u64,
    newest_ms: u64,
}

/// One listing.
#[derive(Debug, Default)]
struct Census {
    folders: BTreeMap<NodeId, Folder>,
    /// The oldest packs of writers that are not alive; the newest on top.
    oldest: BinaryHeap<Listed>,
    graves: Graves,
}

impl Floor {
    /// Says who is alive at the moment, to be called with every word from the cluster: the time without such a word counts
    /// against nobody.
    pub fn heard(&self, alive: impl IntoIterator<Item = NodeId>) {
        self.shared.presence.lock().heard(Instant::now(), alive);
    }

    /// Where all writers' packs together exceed `budget_bytes`: deletes the oldest packs of dead writers until they do not.
    /// A writer is dead if it is not in `alive`, its newest pack is older than `dead_after`, and for as long it was not
    /// [`Self::heard`] of; one that never was must have been seen here, by its packs, for as long. `dead_after` must be far
    /// more than clocks differ. Do not call it while it is not known who is alive: a writer may live and store nothing for
    /// long.
    ///
    /// # Errors
    /// [`StorageError::Unavailable`]: the store did not answer, or not within `round`; what was deleted stays deleted.
    pub async fn collect(
        &self,
        budget_bytes: u64,
        alive: &BTreeSet<String>,
        dead_after: Duration,
    ) -> Result<Collected, StorageError> {
        self.heard(alive.iter().filter_map(|id| NodeId::new(id).ok()));
        let collected = self.shared.collect(budget_bytes, alive, dead_after);
        within(self.shared.config.round, "collecting dead writers' packs", collected).await?
    }
}

impl Shared {
    async fn collect(
        &self,
        budget_bytes: u64,
        alive: &BTreeSet<String>,
        dead_after: Duration,
    ) -> Result<Collected, StorageError> {
        let lives = |writer: &NodeId| *writer == self.config.own || alive.contains(writer.as_str());
        let Census { folders, oldest, graves } = self.census(lives).await?;
        let total_bytes = folders.values().map(|folder| folder.bytes).sum::<u64>();
        let dead_after_ms = u64::try_from(dead_after.as_millis()).unwrap_or(u64::MAX);
        let newest_dead_ms = now_ms().saturating_sub(dead_after_ms);
        let mut dead = self.presence.lock().absent(&folders, dead_after);
        dead.retain(|writer| folders.get(writer).is_some_and(|folder| folder.newest_ms <= newest_dead_ms));
        let of_dead = |pack: &Listed| dead.contains(&pack.at.writer);
        let mut candidates = oldest.into_sorted_vec().into_iter().filter(of_dead).peekable();
        let mut collected = Collected { total_bytes, ..Collected::default() };
        let mut excess_bytes = total_bytes.saturating_sub(budget_bytes);
        while excess_bytes > 0 && candidates.peek().is_some() {
            let mut batch = Vec::new();
            let mut covered = 0u64;
            while covered < excess_bytes && batch.len() < self.config.concurrency {
                let Some(pack) = candidates.next() else { break };
                covered = covered.saturating_add(pack.bytes);
                batch.push(pack);
            }
            for deleted in self.delete_all(batch).await? {
                collected.deleted_packs += 1;
                collected.deleted_bytes += deleted;
                excess_bytes = excess_bytes.saturating_sub(deleted);
            }
        }
        if let Err(error) = self.delete_files(&self.useless(&graves, &dead)).await {
            tracing::warn!(%error, "tombstones of dead nodes were not deleted: at the next collection");
        }
        collected.excess_bytes = excess_bytes;
        collected.bytes_by_writer = folders.into_iter().map(|(writer, folder)| (writer, folder.bytes)).collect();
        collected.unreadable = self.unreadable();
        Ok(collected)
    }

    /// Tombstones of dead nodes that say nothing of any pack.
    fn useless(&self, graves: &Graves, dead: &BTreeSet<NodeId>) -> Vec<TombAt> {
        let index = self.index.read();
        let of_dead = |at: &&TombAt| dead.contains(&at.burier);
        let says_nothing = |at: &&TombAt| index.tombs.is_useless(at, &graves.oldest_ms, now_ms());
        graves.files.iter().filter(of_dead).filter(says_nothing).cloned().collect()
    }

    async fn census(&self, lives: impl Fn(&NodeId) -> bool) -> Result<Census, StorageError> {
        let mut writers = Writers::default();
        let take = |census: &mut Census, object: ObjectMeta| {
            let Some(at) = writers.pack_at(&self.root, &object.location) else {
                if let Some(at) = writers.tombs_at(&self.root, &object.location) {
                    census.folders.entry(at.burier.clone()).or_default();
                    census.graves.add_file(at);
                }
                return ControlFlow::Continue(());
            };
            let pack = Listed::new(at, &object);
            census.graves.add_pack(&pack.at.writer, pack.modified_ms);
            let folder = census.folders.entry(pack.at.writer.clone()).or_default();
            folder.bytes = folder.bytes.saturating_add(pack.bytes);
            folder.newest_ms = folder.newest_ms.max(pack.modified_ms);
            if !lives(&pack.at.writer) {
                census.oldest.push(pack);
                if census.oldest.len() > MAX_PACKS {
                    census.oldest.pop();
                }
            }
            ControlFlow::Continue(())
        };
        self.remote.fold_list(&self.root, take).await
    }

    /// Deletes packs at the same time, and returns the bytes of each that it deleted.
    async fn delete_all(&self, packs: Vec<Listed>) -> Result<Vec<u64>, StorageError> {
        let deleted = try_join_all(packs.iter().map(|pack| self.delete(pack))).await?;
        Ok(deleted.into_iter().flatten().collect())
    }

    /// Deletes a pack whose footer proves that it is one. Returns its bytes, `None` when it is left alone.
    async fn delete(&self, pack: &Listed) -> Result<Option<u64>, StorageError> {
        if self.index.read().is_unreadable(&pack.at) {
            return Ok(None);
        }
        if !self.index.read().knows(&pack.at) {
            match self.footer(pack).await {
                Ok(Ok(_)) => {}
                Ok(Err(malformed)) => {
                    self.footer_failed(&pack.at, malformed);
                    return Ok(None);
                }
                // Another node was faster.
                Err(StorageError::NotFound) => return Ok(Some(pack.bytes)),
                Err(error) => return Err(error),
            }
        }
        self.remote.delete(&pack.at.path(&self.root)).await?;
        self.index.write().drop_pack(&pack.at);
        tracing::debug!(pack = %pack.at.shown(), "deleted a dead writer's pack");
        Ok(Some(pack.bytes))
    }
}
