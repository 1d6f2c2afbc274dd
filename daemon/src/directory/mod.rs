//! The directory client: which nodes there are, and which node says it holds which shard.
//!
//! What an implementation must mean is written down in [`kvtier_policy::directory`], whose [`kvtier_policy::directory::Table`]
//! is the in-memory twin; one conformance suite runs over all.
//!
//! *Cancellation*: a dropped call may or may not have taken effect; batches carry sequence numbers, so that a repeat is
//! harmless. Every call ends within the client's own deadline.

pub mod conformance;
mod embedded;
mod valkey;

use std::fmt::Debug;
use std::time::Duration;

use async_trait::async_trait;
use kvtier_policy::directory::{Batch, Digest, DirectoryKey, NodeRecord, Replica};
use kvtier_types::{Edition, NodeId, NodeNumber};

pub use embedded::EmbeddedDirectory;
pub use valkey::{BadValkeyConfig, ValkeyConfig, ValkeyDirectory};

/// Why the directory did not do it. The node goes on with what it has itself.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DirectoryError {
    /// No answer in time, or no connection: try again later.
    #[error("the directory at {place} does not answer: {reason}")]
    Away {
        /// Where it should be.
        place: String,
        /// What happened.
        reason: String,
    },
    /// It answers, but not what it should: another program's data, another version, no permission.
    #[error("the directory at {place} refuses: {reason}")]
    Refused {
        /// Where it is.
        place: String,
        /// What it said, and what to do.
        reason: String,
    },
    /// It answers, but has no room for more. Heartbeats, removals, and batches that remove or replace as much as they add
    /// are taken all the same.
    #[error("the directory at {place} is full: {reason}")]
    Full {
        /// Where it is.
        place: String,
        /// What it said.
        reason: String,
    },
}

/// A position of [`Directory::walk`]; opaque.
pub type Cursor = Vec<u8>;

/// The cluster's directory.
#[async_trait]
pub trait Directory: Debug + Send + Sync {
    /// Writes this node's record for `ttl`, and answers with the records of all nodes that live.
    async fn heartbeat(&self, record: &NodeRecord, ttl: Duration) -> Result<Vec<NodeRecord>, DirectoryError>;

    /// Carries out batches of one node, each atomically, and answers for each with the edition and digest that then count.
    ///
    /// # Errors
    /// [`DirectoryError::Full`] where a batch adds what there is no room for; the others may have taken effect.
    async fn apply(
        &self,
        node: NodeNumber,
        edition: Edition,
        batches: &[Batch],
    ) -> Result<Vec<(Edition, Digest)>, DirectoryError>;

    /// Entries of each key, of whatever node and edition. At most 65,536 keys.
    async fn locate(&self, keys: &[DirectoryKey]) -> Result<Vec<Vec<Replica>>, DirectoryError>;

    /// What each bucket holds of a node's edition, `None` where it knows nothing of it.
    async fn digests(&self, node: NodeNumber, edition: Edition) -> Result<Vec<Option<Digest>>, DirectoryError>;

    /// Walks over all entries, a bounded page at a time, to find those of dead editions: `None` for the next position
    /// when the walk is over. Entries that come or go meanwhile may be missed or repeated.
    async fn walk(
        &self,
        from: Option<Cursor>,
    ) -> Result<(Vec<(DirectoryKey, Replica)>, Option<Cursor>), DirectoryError>;

    /// Removes entries, each only if it is still exactly the one given; answers how many went.
    async fn reap(&self, entries: &[(DirectoryKey, Replica)]) -> Result<usize, DirectoryError>;

    /// Removes this node's record: it is gone at once instead of after the record's time.
    async fn leave(&self, node: &NodeId, edition: Edition) -> Result<(), DirectoryError>;
}
