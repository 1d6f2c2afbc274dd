//! Draining: finds another home for what only this node holds, the object store first, then the roomiest peers.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kvtier_policy::directory::{NodeState, Replica};
use kvtier_policy::{Core, ExportRequest};
use kvtier_proto::v1;
use kvtier_types::{BlockKey, NodeNumber, RecordMeta, ShardKey, Tier};
use tokio::time::{Instant, timeout, timeout_at};

use super::{Cluster, peers};
use crate::node::Node;

/// Shards found a home for together: small enough that all of them fit into memory.
const PAGE: usize = 64;
/// Keys named for each reason of failure.
const MAX_NAMED: usize = 16;
/// Longest that one peer may take for one page.
const PUSH_LIMIT: Duration = Duration::from_secs(20);
/// Peers tried for one page.
const MAX_PEERS: usize = 3;

/// What a drain did so far.
#[derive(Debug, Clone, Default)]
pub struct DrainReport {
    /// Shards looked at.
    pub examined: u64,
    /// Those that have another home already.
    pub safe: u64,
    /// Those written to the object store.
    pub to_object: u64,
    /// Those that peers took.
    pub to_peers: u64,
    /// Those without another home: how many by reason, and the first few.
    pub failures: BTreeMap<String, (u64, Vec<BlockKey>)>,
}

impl DrainReport {
    fn fail(&mut self, reason: &str, metas: &[RecordMeta]) {
        if metas.is_empty() {
            return;
        }
        let (count, named) = self.failures.entry(reason.to_owned()).or_default();
        *count += metas.len() as u64;
        named.extend(metas.iter().map(|m| m.key.block).take(MAX_NAMED.saturating_sub(named.len())));
    }

    /// Shards without another home.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.failures.values().map(|(count, _)| count).sum()
    }
}

/// Gives everything a second home until the deadline; `progress` hears of every page. The node takes nothing new from
/// then on.
pub async fn drain(node: &Arc<Node>, limit: Duration, mut progress: impl FnMut(&DrainReport)) -> DrainReport {
    let deadline = Instant::now() + limit;
    let mut report = DrainReport::default();
    node.start_draining();
    let Some(cluster) = node.cluster.clone() else { return report };
    cluster.beating.notify_one();
    let mut from = Some(0);
    while let Some(at) = from {
        let (metas, next) = node.read_core(|core| core.holdings(at, PAGE));
        report.examined += metas.len() as u64;
        if Instant::now() >= deadline {
            report.fail("the drain's deadline passed", &metas);
        } else {
            page(node, &cluster, metas, (deadline, &mut report)).await;
        }
        progress(&report);
        from = next;
    }
    report
}

async fn page(
    node: &Arc<Node>,
    cluster: &Arc<Cluster>,
    metas: Vec<RecordMeta>,
    (deadline, report): (Instant, &mut DrainReport),
) {
    let keys: Vec<ShardKey> = metas.iter().map(|m| m.key).collect();
    let replicas = super::locate::replicas(node, cluster, &keys, Duration::from_secs(2)).await;
    let in_packs = cluster.floor.as_ref().map(|f| f.find(&keys)).unwrap_or_default();
    let mut sole = Vec::new();
    for (at, meta) in metas.into_iter().enumerate() {
        let elsewhere = replicas.get(at).is_some_and(|r| node.read_core(|core| has_home(core, r)));
        if elsewhere || in_packs.get(at).is_some_and(Option::is_some) {
            report.safe += 1;
        } else {
            sole.push(meta);
        }
    }
    if sole.is_empty() {
        return;
    }
    let left = to_object_store(node, sole, (deadline, report)).await;
    let left = to_peers(node, left, (deadline, report)).await;
    if !left.is_empty() {
        let alone = node.read_core(|core| core.members().roomiest(node.now(), &[]).is_none());
        let reason = if Instant::now() >= deadline {
            "the drain's deadline passed"
        } else if alone && node.stores.get(Tier::Object).is_none() {
            "there is neither an object store nor another node that is ready"
        } else {
            "neither the object store nor a peer took it: see the log"
        };
        report.fail(reason, &left);
    }
}

/// Whether another node that stays has it.
fn has_home(core: &Core, replicas: &[Replica]) -> bool {
    let stays = |r: &Replica| core.members().get(r.node).is_some_and(|m| m.record.state == NodeState::Ready);
    replicas.iter().any(|r| core.members().current(r) && stays(r) && !r.tiers.is_empty())
}

/// Writes shards behind; answers with those that did not get there.
async fn to_object_store(
    node: &Arc<Node>,
    metas: Vec<RecordMeta>,
    (deadline, report): (Instant, &mut DrainReport),
) -> Vec<RecordMeta> {
    if node.stores.get(Tier::Object).is_none() {
        return metas;
    }
    let keys: Vec<ShardKey> = metas.iter().map(|m| m.key).collect();
    let Some(own) = node.cluster.as_ref().map(|c| c.id.number()) else { return metas };
    // Held as if exported to ourselves: what is on disk only comes up, and nothing leaves meanwhile.
    let incarnation = node.read_core(Core::incarnation);
    let left = deadline.saturating_duration_since(Instant::now());
    let hold = ExportRequest { peer: own, peer_incarnation: incarnation, incarnation, keys: keys.clone(), ttl: left };
    let Ok(lease) = node.with_core(|core, now| core.export(now, &hold)) else { return metas };
    loop {
        let moved = node.movement.notified();
        tokio::pin!(moved);
        moved.as_mut().enable();
        node.with_core(|core, _| core.write_behind(&keys));
        let busy = node.read_core(|core| {
            let missing = keys.iter().any(|k| !core.in_object_store(k));
            missing && (core.export_waiting(lease) > 0 || core.pending_offloads() > 0)
        });
        if !busy || timeout_at(deadline, moved).await.is_err() {
            break;
        }
    }
    node.with_core(|core, _| core.release_export(lease));
    let stored = |meta: &RecordMeta| node.read_core(|core| core.in_object_store(&meta.key));
    let (done, left): (Vec<_>, Vec<_>) = metas.into_iter().partition(stored);
    report.to_object += done.len() as u64;
    left
}

/// Asks peers to take shards over; answers with those that none took.
async fn to_peers(
    node: &Arc<Node>,
    mut metas: Vec<RecordMeta>,
    (deadline, report): (Instant, &mut DrainReport),
) -> Vec<RecordMeta> {
    let mut tried: Vec<NodeNumber> = Vec::new();
    while !metas.is_empty() && tried.len() < MAX_PEERS && Instant::now() < deadline {
        let roomiest = |core: &Core| core.members().roomiest(node.now(), &tried).map(|(number, _)| number);
        let Some(peer) = node.read_core(roomiest) else { break };
        tried.push(peer);
        let limit = PUSH_LIMIT.min(deadline.saturating_duration_since(Instant::now()));
        match timeout(limit, push(node, peer, &metas, limit)).await {
            Ok(Ok(outcomes)) => {
                let applied = i32::from(v1::Outcome::Applied);
                let mut at = 0;
                metas.retain(|_| {
                    at += 1;
                    outcomes.get(at - 1).is_none_or(|o| o.outcome != applied)
                });
                let taken = outcomes.iter().filter(|o| o.outcome == applied).count();
                report.to_peers += taken as u64;
            }
            Ok(Err(error)) => tracing::warn!(%peer, %error, "a peer did not take this node's blocks"),
            Err(_) => tracing::warn!(%peer, "a peer did not take this node's blocks in time"),
        }
    }
    metas
}

async fn push(
    node: &Arc<Node>,
    peer: NodeNumber,
    metas: &[RecordMeta],
    limit: Duration,
) -> anyhow::Result<Vec<v1::PushOutcome>> {
    let mut client = peers::client(node, peer, limit).await?;
    let request = v1::PushRequest {
        node_id: node.config.node_id.clone(),
        node_incarnation: node.read_core(Core::incarnation),
        shards: metas.iter().map(Into::into).collect(),
        // The answer takes a moment too.
        deadline_ms: u32::try_from((limit * 9 / 10).as_millis()).unwrap_or(u32::MAX),
    };
    Ok(client.push(request).await?.into_inner().outcomes)
}
