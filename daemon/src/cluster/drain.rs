//! Draining: finds another home for what only this node holds, the object store first, then the roomiest peers.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kvtier_policy::Core;
use kvtier_policy::directory::{NodeState, Replica};
use kvtier_types::{BlockKey, Effect, RecordMeta, ShardKey};
use tokio::time::{Instant, sleep};

use super::{Cluster, homes};
use crate::node::Node;

/// Shards found a home for together: small enough that all of them fit into memory.
const PAGE: usize = 64;
/// Pages in a row after which an object store that takes nothing is not asked again.
const MAX_REFUSED_PAGES: u32 = 2;
/// Longest wait for the directory to know that this node drains.
const TELL_LIMIT: Duration = Duration::from_secs(2);
/// Pause between two looks at whether it does.
const TELL_PAUSE: Duration = Duration::from_millis(20);
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
    let mut state = State { others_know: tell(node, &cluster, deadline).await, refused_pages: 0 };
    let mut from = Some(0);
    while let Some(at) = from {
        let (metas, next) = node.read_core(|core| core.holdings(at, PAGE, node.has_outer_store()));
        report.examined += metas.len() as u64;
        if Instant::now() >= deadline {
            report.fail("the drain's deadline passed", &metas);
        } else {
            page(node, &cluster, metas, (deadline, &mut state, &mut report)).await;
        }
        progress(&report);
        from = next;
    }
    report
}

/// What a drain learnt on its way.
struct State {
    /// Whether the directory knew that this node drains before it was asked who else has what: of two nodes that drain at
    /// once, one then knows of the other.
    others_know: bool,
    /// Pages in a row of which the object store took nothing.
    refused_pages: u32,
}

/// Waits until the directory's answer to a heartbeat shows that this node drains; whether it did in time.
async fn tell(node: &Arc<Node>, cluster: &Cluster, deadline: Instant) -> bool {
    let until = deadline.min(Instant::now() + TELL_LIMIT);
    let is_known = || cluster.records().iter().any(|r| r.id == cluster.id && r.state == NodeState::Draining);
    cluster.beating.notify_one();
    loop {
        sleep(TELL_PAUSE).await;
        if is_known() {
            return true;
        }
        if Instant::now() >= until || node.stopping.is_cancelled() {
            tracing::warn!("the directory was not told that this node drains: what others have is moved as well");
            return false;
        }
    }
}

async fn page(
    node: &Arc<Node>,
    cluster: &Arc<Cluster>,
    metas: Vec<RecordMeta>,
    (deadline, state, report): (Instant, &mut State, &mut DrainReport),
) {
    let stays = |meta: &RecordMeta| meta.hints.taints.iter().any(|t| t.effect == Effect::NoReplicate);
    let (staying, metas): (Vec<_>, Vec<_>) = metas.into_iter().partition(stays);
    report.fail("tainted NoReplicate: no other node may have it", &staying);
    let keys: Vec<ShardKey> = metas.iter().map(|m| m.key).collect();
    let replicas = super::locate::replicas(node, cluster, &keys, Duration::from_secs(2)).await;
    let in_packs = cluster.floor.as_ref().map(|f| f.find(&keys)).unwrap_or_default();
    let mut sole = Vec::new();
    for (at, meta) in metas.into_iter().enumerate() {
        let elsewhere = state.others_know && replicas.get(at).is_some_and(|r| node.read_core(|core| has_home(core, r)));
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
    // A store that takes nothing is not asked again: peers may still have the time.
    let left = if state.refused_pages >= MAX_REFUSED_PAGES {
        sole
    } else {
        let written = homes::to_object_store(node, sole, deadline).await;
        state.refused_pages = if written.fails { state.refused_pages + 1 } else { 0 };
        written.left
    };
    report.to_object += (sole_count - left.len()) as u64;
    let for_peers = left.len();
    let left = homes::to_peers(node, left, deadline).await;
    report.to_peers += (for_peers - left.len()) as u64;
    if !left.is_empty() {
        let alone = node.read_core(|core| core.members().roomiest(node.now(), &[]).is_none());
        let reason = if Instant::now() >= deadline {
            "the drain's deadline passed"
        } else if alone && !node.has_outer_store() {
            "there is neither an object store off this node nor another node that is ready"
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
