//! Takes entries of dead editions out of the directory. They count for nobody; this is for the room they take.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kvtier_policy::Core;
use kvtier_policy::directory::{DirectoryKey, Replica};
use kvtier_types::{Edition, NodeNumber};
use tokio::time::timeout;

use super::Cluster;
use crate::node::Node;

/// Pause between two walks, as a multiple of heartbeats.
const BEATS_PER_WALK: u32 = 60;
/// Pause between two pages of a walk.
const PAGE_PAUSE: Duration = Duration::from_millis(20);

/// Walks now and then, if this is the node whose turn it is.
pub(super) async fn run(node: Arc<Node>, cluster: Arc<Cluster>) {
    let pause = node.config.cluster.heartbeat.0 * BEATS_PER_WALK;
    loop {
        if timeout(pause, node.stopping.cancelled()).await.is_ok() {
            return;
        }
        if is_our_turn(&cluster)
            && let Err(error) = walk(&node, &cluster).await
        {
            tracing::debug!(%error, "the directory was not reaped to the end");
        }
    }
}

/// One node walks: the one of the lowest name.
fn is_our_turn(cluster: &Cluster) -> bool {
    let records = cluster.records();
    cluster.directory_state().away.is_none() && records.iter().map(|r| &r.id).min() == Some(&cluster.id)
}

async fn walk(node: &Arc<Node>, cluster: &Cluster) -> Result<(), crate::directory::DirectoryError> {
    let (mut cursor, mut reaped) = (None, 0);
    loop {
        let (page, next) = cluster.directory.walk(cursor).await?;
        // Read anew for each page: who came meanwhile lives.
        let mut current: BTreeMap<NodeNumber, Edition> =
            cluster.records().iter().map(|r| (r.id.number(), r.edition)).collect();
        current.extend(node.read_core(Core::edition).map(|edition| (cluster.id.number(), edition)));
        // What is newer than we know is a node that started over a moment ago.
        let dead = |(_, r): &(DirectoryKey, Replica)| current.get(&r.node).is_none_or(|edition| r.edition < *edition);
        let dead: Vec<(DirectoryKey, Replica)> = page.into_iter().filter(dead).collect();
        if !dead.is_empty() {
            reaped += cluster.directory.reap(&dead).await?;
        }
        cursor = next;
        let stopped = timeout(PAGE_PAUSE, node.stopping.cancelled()).await.is_ok();
        if cursor.is_none() || stopped {
            break;
        }
    }
    if reaped > 0 {
        tracing::info!(reaped, "entries of dead nodes and former editions are out of the directory");
    }
    Ok(())
}
