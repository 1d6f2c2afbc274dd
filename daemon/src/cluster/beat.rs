//! Heartbeats: this node's word that it lives, and the directory's word on who else does.

use std::sync::Arc;
use std::time::Duration;

use kvtier_policy::directory::{NodeRecord, NodeState, record_ttl};
use kvtier_policy::{Core, Verdict};
use kvtier_storage::object::MAX_ANNOUNCED;
use tokio::time::{Instant, interval};

use super::Cluster;
use crate::node::Node;

/// Heartbeats between two audits of what the directory holds of this node.
const BEATS_PER_AUDIT: u64 = 10;
/// Heartbeats between two rounds of collecting what dead nodes left in the object store.
const BEATS_PER_COLLECTION: u64 = 300;
/// How long a node's packs are left alone after this node heard of it last.
const DEAD_AFTER: Duration = Duration::from_secs(3600);

/// Beats until the node stops, then takes its record away.
pub(super) async fn run(node: Arc<Node>, cluster: Arc<Cluster>) {
    let mut ticks = interval(node.config.cluster.heartbeat.0);
    let mut beats = 0_u64;
    loop {
        tokio::select! {
            () = node.stopping.cancelled() => break,
            _ = ticks.tick() => {}
            () = cluster.beating.notified() => {}
        }
        beat(&node, &cluster).await;
        beats += 1;
        if beats.is_multiple_of(BEATS_PER_AUDIT) {
            audit(&node, &cluster).await;
        }
        if beats.is_multiple_of(BEATS_PER_COLLECTION) {
            collect(&node, &cluster);
        }
    }
    if let Some(edition) = node.read_core(Core::edition)
        && let Err(error) = cluster.directory.leave(&cluster.id, edition).await
    {
        tracing::debug!(%error, "the directory was not told that this node leaves");
    }
}

fn record(node: &Arc<Node>, cluster: &Cluster) -> Option<NodeRecord> {
    let stats = node.arena.stats();
    Some(NodeRecord {
        id: cluster.id.clone(),
        edition: node.read_core(Core::edition)?,
        state: if node.is_draining() { NodeState::Draining } else { NodeState::Ready },
        warming: !node.is_draining() && cluster.warming.is_on(node.now()),
        peer: node.peer_address().unwrap_or_default(),
        free_host_bytes: stats.capacity_bytes.saturating_sub(stats.used_bytes),
        packs: news_of_packs(node, cluster),
    })
}

/// What this node stored lately and what it evicted from packs: others read the latter first, so that nothing dead lives in
/// what they learn.
fn news_of_packs(node: &Node, cluster: &Cluster) -> Vec<String> {
    let mut news: Vec<String> = cluster.floor.iter().filter_map(|floor| floor.recent_tombstones()).collect();
    let packs = node.stores.object.as_ref().map(|o| o.recent_packs()).unwrap_or_default();
    let left_out = (news.len() + packs.len()).saturating_sub(MAX_ANNOUNCED);
    news.extend(packs.into_iter().skip(left_out));
    news
}

async fn beat(node: &Arc<Node>, cluster: &Arc<Cluster>) {
    let Some(record) = record(node, cluster) else { return };
    let asked = Instant::now();
    let ttl = record_ttl(node.config.cluster.heartbeat.0);
    match cluster.directory.heartbeat(&record, ttl).await {
        Ok(records) => {
            tracing::trace!(nodes = records.len(), took_us = asked.elapsed().as_micros(), "heartbeat");
            cluster.note_directory(node.now(), None);
            node.with_core(|core, now| core.heard(now, &records));
            learn_packs(node, cluster, &records);
            if let Some(floor) = &cluster.floor {
                floor.heard(records.iter().map(|r| r.id.clone()));
            }
            if cluster.warming.heard(node.now(), cluster.id.number(), &records) {
                cluster.beating.notify_one();
            }
            *cluster.records.lock() = records;
        }
        Err(error) => cluster.note_directory(node.now(), Some(error.to_string())),
    }
}

/// Others' new packs are read at once instead of at the next listing.
fn learn_packs(node: &Arc<Node>, cluster: &Arc<Cluster>, records: &[NodeRecord]) {
    let Some(floor) = cluster.floor.clone() else { return };
    let known = cluster.records.lock();
    let before = |r: &NodeRecord| known.iter().find(|k| k.id == r.id).map(|k| k.packs.as_slice()).unwrap_or_default();
    let news: Vec<Vec<String>> = records
        .iter()
        .filter(|r| r.id != cluster.id)
        .map(|r| r.packs.iter().filter(|p| !before(r).contains(p)).cloned().collect())
        .filter(|news: &Vec<String>| !news.is_empty())
        .collect();
    drop(known);
    if !news.is_empty() {
        node.tasks.spawn(async move {
            let learning = news.iter().map(|names| floor.announced(names));
            let learnt = futures::future::join_all(learning).await;
            tracing::debug!(?learnt, "packs that peers told of");
        });
    }
}

async fn audit(node: &Arc<Node>, cluster: &Arc<Cluster>) {
    let mark = |core: &Core| core.publication_settled().then(|| (core.edition(), core.publication_state().1.changes));
    let Some((Some(edition), changes)) = node.read_core(mark) else { return };
    let digests = match cluster.directory.digests(cluster.id.number(), edition).await {
        Ok(digests) => digests,
        Err(error) => return cluster.note_directory(node.now(), Some(error.to_string())),
    };
    let verdict = node.with_core(|core, _| {
        // What was published meanwhile makes the digests neither right nor wrong.
        let same = mark(core) == Some((Some(edition), changes));
        if same { core.audited(edition, &digests) } else { Verdict::Whole }
    });
    judge(cluster, verdict, "an audit found that the directory lost entries of this node");
}

/// Says in the log what a verdict means, and has the next steps taken at once.
pub(super) fn judge(cluster: &Cluster, verdict: Verdict, why: &str) {
    match verdict {
        Verdict::Whole => return,
        Verdict::Anew => tracing::warn!(why, "everything is published anew"),
        Verdict::Superseded(_) => tracing::error!(
            "the directory knows a later life of this node: if another daemon runs under the same node_id, give it one of \
             its own; else this node's journal was lost, and it goes on under a later number"
        ),
    }
    cluster.beating.notify_one();
    cluster.publishing.notify_one();
}

fn collect(node: &Arc<Node>, cluster: &Arc<Cluster>) {
    let Some(floor) = cluster.floor.clone() else { return };
    // Without the directory nobody can say who is dead.
    if cluster.directory_state().away.is_some() {
        return;
    }
    let alive = cluster.records().into_iter().map(|r| r.id.to_string()).collect();
    let budget = node.config.object.cluster_capacity.0;
    node.tasks.spawn(async move {
        match floor.collect(budget, &alive, DEAD_AFTER).await {
            Ok(done) if done.deleted_packs > 0 => tracing::info!(?done, "deleted packs that dead nodes left"),
            Ok(done) => tracing::debug!(?done, "the object store is within its budget, or only the living use it"),
            Err(error) => tracing::warn!(%error, "packs of dead nodes were not collected"),
        }
    });
}
