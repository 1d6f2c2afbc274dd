//! Finds elsewhere what a lookup misses here.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvtier_policy::directory::{DirectoryKey, Replica};
use kvtier_policy::{Core, Located, Look, LookupRequest};
use kvtier_types::ShardKey;
use tokio::time::timeout;

use super::Cluster;
use crate::node::Node;

/// Shards that a long lookup asks the directory for first.
const HEAD: usize = 64;

/// Where the shards that a look missed here can be had. The directory gets at most half of the lookup's time; without an
/// answer only other nodes' packs are known.
///
/// A long prefix is asked for in two: its first blocks are fetched while the directory looks for the rest, which is not asked
/// for if some of the first are nowhere.
pub async fn locate_missing(node: &Arc<Node>, (request, look): (&LookupRequest, &Look), deadline: Duration) -> Located {
    let Some(cluster) = &node.cluster else { return Located::default() };
    let until = Instant::now() + deadline / 2;
    let (head, rest) = look.head(HEAD);
    let mut located = locate(node, cluster, head, until).await;
    if rest.is_empty() || head.iter().any(|key| located.get(key).is_none()) {
        return located;
    }
    if let Err(error) = node.with_core(|core, now| core.lookup_head(now, request, (look, &located))) {
        tracing::debug!(%error, "a lookup's first blocks wait for the others");
    }
    // Whoever has the first blocks fetched was woken just now, for this thread.
    tokio::task::yield_now().await;
    located.extend(locate(node, cluster, rest, until).await);
    located
}

async fn locate(node: &Arc<Node>, cluster: &Cluster, keys: &[ShardKey], until: Instant) -> Located {
    if keys.is_empty() {
        return Located::default();
    }
    let replicas = replicas(node, cluster, keys, until.saturating_duration_since(Instant::now())).await;
    let floor: Vec<bool> = match &cluster.floor {
        Some(floor) => floor.find(keys).iter().map(Option::is_some).collect(),
        None => Vec::new(),
    };
    let now = node.now();
    node.read_core(|core| core.located(now, keys, &replicas, &floor))
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
