//! Draining: finds another home for what only this node holds, the object store first, then the roomiest peers.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kvtier_policy::Core;
use kvtier_policy::directory::{NodeState, Replica};
use kvtier_types::{BlockKey, Effect, RecordMeta, ShardKey, Tier};
use tokio::time::Instant;

use super::{Cluster, homes};
use crate::node::Node;

/// Shards found a home for together: small enough that all of them fit into memory.
const PAGE: usize = 64;
/// Keys named for each reason of failure.
const MAX_NAMED: usize = 16;

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
    let stays = |meta: &RecordMeta| meta.hints.taints.iter().any(|t| t.effect == Effect::NoReplicate);
    let (staying, metas): (Vec<_>, Vec<_>) = metas.into_iter().partition(stays);
    report.fail("tainted NoReplicate: no other node may have it", &staying);
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
    let sole_count = sole.len();
    let left = homes::to_object_store(node, sole, deadline).await;
    report.to_object += (sole_count - left.len()) as u64;
    let for_peers = left.len();
    let left = homes::to_peers(node, left, deadline).await;
    report.to_peers += (for_peers - left.len()) as u64;
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
