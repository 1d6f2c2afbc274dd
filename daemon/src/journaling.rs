//! Entries on their way into the journal, written where waiting for the disk keeps nobody.

use std::sync::Arc;

use kvtier_storage::StorageError;
use kvtier_storage::journal::{Entry, batches};
use tokio::task::{JoinError, spawn_blocking};

use crate::node::Node;

/// Makes entries durable. What is begun goes on though the caller gives up waiting.
///
/// # Errors
/// The task died; within, the journal's own.
pub(crate) async fn append(node: &Arc<Node>, entries: Vec<Entry>) -> Result<Result<(), StorageError>, JoinError> {
    if entries.is_empty() {
        return Ok(Ok(()));
    }
    let journal = Arc::clone(&node.journal);
    spawn_blocking(move || batches(&entries).try_for_each(|batch| journal.append(batch))).await
}

/// The same for what nobody waits for: a failure is logged, with `what` is missing. Answers whether it is durable.
pub(crate) async fn append_or_warn(node: &Arc<Node>, entries: Vec<Entry>, what: &str) -> bool {
    match append(node, entries).await {
        Ok(Ok(())) => return true,
        Ok(Err(error)) => tracing::warn!(%error, "{what} is not in the journal"),
        Err(error) => tracing::error!(%error, "the journal's task died"),
    }
    false
}
