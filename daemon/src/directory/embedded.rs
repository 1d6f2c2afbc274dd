//! The directory within a process: one node's, or several's that share it in tests.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kvtier_policy::directory::{Batch, Digest, DirectoryKey, NodeRecord, Replica, Table};
use kvtier_types::{Edition, Instant, NodeId, NodeNumber};
use parking_lot::Mutex;

use super::{Cursor, Directory, DirectoryError};

/// Entries of a page of the walk; more only where one key has more.
const PAGE: usize = 1024;

/// A [`Table`] behind a mutex, on the real clock. Clones share it.
#[derive(Debug, Clone)]
pub struct EmbeddedDirectory {
    table: Arc<Mutex<Table>>,
    origin: std::time::Instant,
}

impl Default for EmbeddedDirectory {
    fn default() -> Self {
        Self { table: Arc::default(), origin: std::time::Instant::now() }
    }
}

impl EmbeddedDirectory {
    fn now(&self) -> Instant {
        Instant::ZERO + self.origin.elapsed()
    }
}

#[async_trait]
impl Directory for EmbeddedDirectory {
    async fn heartbeat(&self, record: &NodeRecord, ttl: Duration) -> Result<Vec<NodeRecord>, DirectoryError> {
        Ok(self.table.lock().heartbeat(self.now(), record, ttl))
    }

    async fn apply(
        &self,
        node: NodeNumber,
        edition: Edition,
        batches: &[Batch],
    ) -> Result<Vec<(Edition, Digest)>, DirectoryError> {
        Ok(batches.iter().map(|batch| self.table.lock().apply(node, edition, batch)).collect())
    }

    async fn locate(&self, keys: &[DirectoryKey]) -> Result<Vec<Vec<Replica>>, DirectoryError> {
        Ok(self.table.lock().locate(keys))
    }

    async fn digests(&self, node: NodeNumber, edition: Edition) -> Result<Vec<Option<Digest>>, DirectoryError> {
        Ok(self.table.lock().digests(node, edition))
    }

    async fn walk(
        &self,
        from: Option<Cursor>,
    ) -> Result<(Vec<(DirectoryKey, Replica)>, Option<Cursor>), DirectoryError> {
        let after = match from.as_deref().map(<[u8; 16]>::try_from) {
            None => None,
            Some(Ok(key)) => Some(DirectoryKey::new(key)),
            Some(Err(_)) => {
                let reason = "that is no position of its walk".to_owned();
                return Err(DirectoryError::Refused { place: "this process".to_owned(), reason });
            }
        };
        let page = whole_keys(&self.table.lock(), after);
        let next = page.last().map(|(key, _)| key.as_bytes().to_vec());
        Ok((page, next))
    }

    async fn reap(&self, entries: &[(DirectoryKey, Replica)]) -> Result<usize, DirectoryError> {
        let mut table = self.table.lock();
        Ok(entries.iter().filter(|(key, replica)| table.remove(key, replica)).count())
    }

    async fn leave(&self, node: &NodeId, edition: Edition) -> Result<(), DirectoryError> {
        self.table.lock().leave(node, edition);
        Ok(())
    }
}

/// About a page of entries beyond `after`, with all entries of each key: the position is a key.
fn whole_keys(table: &Table, after: Option<DirectoryKey>) -> Vec<(DirectoryKey, Replica)> {
    let mut limit = PAGE;
    loop {
        let mut page = table.page(after, limit);
        if page.len() < limit {
            return page;
        }
        let last = page.last().map(|(key, _)| *key);
        page.retain(|(key, _)| Some(*key) != last);
        if !page.is_empty() {
            return page;
        }
        limit *= 2;
    }
}
