//! Finds elsewhere what a lookup misses here.

use std::sync::Arc;
use std::time::Duration;

use kvtier_policy::directory::{DirectoryKey, Replica};
use kvtier_policy::{Core, Located, Look, LookupRequest};
use kvtier_types::ShardKey;
use tokio::time::{Instant, timeout};

use super::Cluster;
use crate::node::Node;

/// Shards that a long lookup asks the directory for first, so that their bytes move soon.
const FIRST: usize = 64;
/// Shards that it asks for after those; then it asks for twice as many each time.
const SECOND: usize = 256;

/// Where the shards that a look missed here can be had. Each time the directory is asked it gets half of what is left of the
/// lookup's time; without an answer only other nodes' packs are known.
///
/// A long prefix is asked for in parts: what one says is being fetched while the next is asked for, and is not in the answer.
/// If some of a part are nowhere, what follows is of no use and is not asked for.
pub async fn locate_missing(node: &Arc<Node>, (request, look): (&LookupRequest, &Look), until: Instant) -> Located {
    let Some(cluster) = &node.cluster else { return Located::default() };
    let (unknown, mut answers) = (look.unknown(), true);
    for part in look.parts(FIRST, SECOND) {
        let (keys, limit) = (&unknown[part.clone()], until.saturating_duration_since(Instant::now()) / 2);
        // One that did not answer is not asked again.
        let replicas = if answers { ask_directory(node, cluster, keys, limit).await } else { None };
        answers = replicas.is_some();
        let located = located(node, cluster, keys, &replicas.unwrap_or_default());
        if part.end == unknown.len() || located.is_empty() {
            return located;
        }
        match node.with_core(|core, now| core.begin_part(now, request, (look, part, &located))) {
            // Whoever has them fetched was woken just now, for this thread.
            Ok(true) => tokio::task::yield_now().await,
            Ok(false) => return located,
            Err(error) => {
                tracing::debug!(%error, "nothing of a lookup is fetched before it");
                return located;
            }
        }
    }
    Located::default()
}

fn located(node: &Arc<Node>, cluster: &Cluster, keys: &[ShardKey], replicas: &[Vec<Replica>]) -> Located {
    let floor: Vec<bool> = match &cluster.floor {
        Some(floor) => floor.find(keys).iter().map(Option::is_some).collect(),
        None => Vec::new(),
    };
    let now = node.now();
    node.read_core(|core| core.located(now, keys, replicas, &floor))
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
