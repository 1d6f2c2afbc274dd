//! Finds elsewhere what a lookup misses here.

use std::sync::Arc;
use std::time::Duration;

use kvtier_policy::directory::{DirectoryKey, Replica};
use kvtier_policy::{Core, Located, Look};
use kvtier_types::ShardKey;
use tokio::time::timeout;

use super::Cluster;
use crate::node::Node;

/// Where the shards that a look missed here can be had. The directory gets at most half of the lookup's time; without an
/// answer only other nodes' packs are known.
pub async fn locate_missing(node: &Arc<Node>, look: &Look, deadline: Duration) -> Located {
    let (Some(cluster), unknown) = (&node.cluster, look.unknown()) else { return Located::default() };
    if unknown.is_empty() {
        return Located::default();
    }
    let replicas = replicas(node, cluster, unknown, deadline / 2).await;
    let floor: Vec<bool> = match &cluster.floor {
        Some(floor) => floor.find(unknown).iter().map(Option::is_some).collect(),
        None => Vec::new(),
    };
    let now = node.now();
    node.read_core(|core| core.located(now, unknown, &replicas, &floor))
}

/// What the directory says of shards; nothing when it does not answer in time, or nobody else is there to have them.
pub(crate) async fn replicas(
    node: &Arc<Node>,
    cluster: &Cluster,
    keys: &[ShardKey],
    limit: Duration,
) -> Vec<Vec<Replica>> {
    ask_directory(node, cluster, keys, limit).await.unwrap_or_default()
}

/// The same; `None` when the directory does not answer in time, and nothing at all when nobody else is there.
pub(crate) async fn ask_directory(
    node: &Arc<Node>,
    cluster: &Cluster,
    keys: &[ShardKey],
    limit: Duration,
) -> Option<Vec<Vec<Replica>>> {
    if cluster.directory_state().away.is_some() {
        return None;
    }
    let alone = |core: &Core| core.members().iter().next().is_none();
    if node.read_core(alone) {
        return Some(Vec::new());
    }
    let digests: Vec<DirectoryKey> = keys.iter().map(DirectoryKey::of).collect();
    match timeout(limit, cluster.directory.locate(&digests)).await {
        Ok(Ok(replicas)) => Some(replicas),
        Ok(Err(error)) => {
            tracing::debug!(%error, "a lookup goes on without the directory");
            None
        }
        Err(_) => None,
    }
}
