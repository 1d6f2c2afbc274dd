//! Where the floor looks, how much of it is kept in mind, and how patient it is.

use std::time::Duration;

use kvtier_types::NodeId;
use object_store::path::Path;

use crate::object::config::{ObjectPlace, RetryPolicy};
use crate::store::StorageError;

/// Configuration of [`super::Floor`].
#[derive(Debug, Clone)]
pub struct FloorConfig {
    /// Which store.
    pub place: ObjectPlace,
    /// The path that all writers share; each has a folder of its id below it, the prefix of its
    /// [`crate::object::ObjectStoreTier`].
    pub prefix: String,
    /// This node.
    pub own: NodeId,
    /// Whether the own folder is left out: its records are in this node's catalog already.
    pub skip_own: bool,
    /// Most records in the index, at most 2^30. The oldest packs beyond are left out.
    pub max_records: usize,
    /// Most bytes being read; at least one record is let through.
    pub max_inflight_bytes: u64,
    /// Footers read, and packs deleted, at once.
    pub concurrency: usize,
    /// How often [`super::Floor::keep_fresh`] lists the store.
    pub list_every: Duration,
    /// Longest listing with its footers, and longest collection; the next one goes on.
    pub round: Duration,
    /// How long files of tombstones stay that became part of another: whoever began to list before must have ended.
    pub keep_merged: Duration,
    /// How long calls try.
    pub retry: RetryPolicy,
}

impl FloorConfig {
    /// The defaults for `place` as seen by `own`: four million records, a listing every five minutes.
    #[must_use]
    pub fn new(place: ObjectPlace, own: NodeId) -> Self {
        Self {
            place,
            prefix: "kvtier".into(),
            own,
            skip_own: true,
            max_records: 4_000_000,
            max_inflight_bytes: 64 << 20,
            concurrency: 16,
            list_every: Duration::from_secs(300),
            round: Duration::from_secs(300),
            keep_merged: Duration::from_secs(1800),
            retry: RetryPolicy::default(),
        }
    }

    /// The path below which the writers' folders lie.
    pub(super) fn root(&self) -> Result<Path, StorageError> {
        Path::parse(self.prefix.trim_matches('/'))
            .map_err(|e| StorageError::Open { what: format!("prefix {:?}", self.prefix), reason: e.to_string() })
    }

    /// # Errors
    /// [`StorageError::Open`], naming the field that is out of bounds.
    pub(super) fn check(&self) -> Result<(), StorageError> {
        let bounds = [
            ("max_records is 0 or above 2^30", self.max_records == 0 || self.max_records > 1 << 30),
            ("max_inflight_bytes is 0 or above 1 TiB", !(1..=1 << 40).contains(&self.max_inflight_bytes)),
            ("concurrency is 0 or above 1024", !(1..=1024).contains(&self.concurrency)),
            ("retry.attempts is 0", self.retry.attempts == 0),
        ];
        match bounds.into_iter().find(|(_, broken)| *broken) {
            None => Ok(()),
            Some((what, _)) => Err(StorageError::Open { what: "the floor".into(), reason: what.to_owned() }),
        }
    }
}
