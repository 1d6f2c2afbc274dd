//! Fetches from the packs that other nodes wrote.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvtier_memory::IoBuf;
use kvtier_policy::FetchEnd;
use kvtier_storage::StorageError;
use tokio::time::timeout;

use super::{Cluster, Fetch};
use crate::node::Node;
use crate::pool::frame_id;

/// Begins a fetch. Returns at once.
pub(super) fn fetch(node: &Arc<Node>, cluster: &Arc<Cluster>, fetch: Fetch) {
    let (of_task, cluster) = (Arc::clone(node), Arc::clone(cluster));
    node.tasks.spawn(async move {
        let limit = fetch.deadline.since(of_task.now());
        let end = timeout(limit, read(&of_task, &cluster, &fetch)).await.unwrap_or(FetchEnd::Failed);
        of_task.with_core(|core, now| core.fetched(now, fetch.id, end));
        of_task.movement.notify_waiters();
    });
}

async fn read(node: &Arc<Node>, cluster: &Cluster, fetch: &Fetch) -> FetchEnd {
    let Some(floor) = &cluster.floor else { return FetchEnd::Gone };
    let Some(record) = floor.find(&[fetch.key]).pop().flatten() else { return FetchEnd::Gone };
    if record.bytes != fetch.bytes {
        return FetchEnd::Gone;
    }
    let Some(pin) = node.arena.pin(frame_id(fetch.into, fetch.bytes)) else { return FetchEnd::Failed };
    match floor.read(&fetch.key, &record, IoBuf::Frame(pin)).await.result {
        // Evicted meanwhile.
        Ok(meta) if !floor.lives(&record.writer, &meta) => FetchEnd::Gone,
        Ok(meta) => {
            cluster.floor_reads.fetch_add(1, Ordering::Relaxed);
            FetchEnd::Done(Box::new(meta))
        }
        Err(error @ StorageError::Corrupt { .. }) => {
            tracing::error!(key = %fetch.key, writer = %record.writer, %error, "corrupt record of another node's pack; it was not served");
            FetchEnd::Corrupt
        }
        Err(StorageError::NotFound) => FetchEnd::Gone,
        Err(error) => {
            tracing::warn!(key = %fetch.key, writer = %record.writer, %error, "a read from another node's pack failed");
            FetchEnd::Failed
        }
    }
}
