//! Copies on other nodes that taints and rules want, made in the background: a page of blocks at a time, behind everything
//! that somebody waits for.
//!
//! *Bounds*: [`PAGE`] shards offered at once; what was not taken is offered again after [`PAUSE`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use kvtier_policy::Core;
use kvtier_policy::directory::{NodeState, Replica};
use kvtier_types::rules::Copies;
use kvtier_types::{NodeNumber, RecordMeta, ShardKey};
use tokio::time::{Instant, interval, sleep};

use super::{Cluster, homes, locate};
use crate::node::Node;

/// How often it is looked for blocks that want copies.
const EVERY: Duration = Duration::from_millis(500);
/// Pause after a page that was not taken whole.
const PAUSE: Duration = Duration::from_secs(5);
/// Shards offered together.
const PAGE: usize = 64;
/// Longest that the directory may take to say who has copies.
const LOCATE_LIMIT: Duration = Duration::from_secs(2);
/// Longest that one peer may take for one page.
const PUSH_LIMIT: Duration = Duration::from_secs(20);

/// A shard, how many copies it shall have, and which other nodes have one.
struct Wanting {
    meta: RecordMeta,
    copies: Copies,
    on: BTreeSet<NodeNumber>,
}

impl Wanting {
    /// How many nodes are to be asked, of so many that are ready.
    fn lacks(&self, ready: usize) -> usize {
        let wanted = match self.copies {
            Copies::All => ready,
            Copies::Some(n) => usize::from(n).min(ready),
        };
        wanted.saturating_sub(self.on.len())
    }
}

/// Makes copies until this node stops.
pub(super) async fn run(node: Arc<Node>, cluster: Arc<Cluster>) {
    let mut ticks = interval(EVERY);
    loop {
        tokio::select! {
            () = node.stopping.cancelled() => return,
            _ = ticks.tick() => {}
        }
        while !node.is_draining() && cluster.directory_state().away.is_none() {
            let whole = tokio::select! {
                () = node.stopping.cancelled() => return,
                whole = page(&node, &cluster) => whole,
            };
            match whole {
                None => break,
                Some(true) => {}
                Some(false) => sleep(PAUSE).await,
            }
        }
    }
}

/// Offers one page. Answers whether all of it was taken, or with nothing when nothing is wanted or nobody is ready.
async fn page(node: &Arc<Node>, cluster: &Arc<Cluster>) -> Option<bool> {
    let ready = ready(node);
    if ready.is_empty() {
        return None;
    }
    let polled = node.with_core(|core, _| core.poll_replication(PAGE));
    if polled.is_empty() {
        return None;
    }
    let keys: Vec<ShardKey> = polled.iter().map(|(meta, _)| meta.key).collect();
    let replicas = locate::replicas(node, cluster, &keys, LOCATE_LIMIT).await;
    let on = |at: usize| {
        let replicas = replicas.get(at).into_iter().flatten();
        node.read_core(|core| replicas.filter(|r| counts(core, r, &ready)).map(|r| r.node).collect())
    };
    let mut shards: Vec<Wanting> =
        polled.into_iter().enumerate().map(|(at, (meta, copies))| Wanting { meta, copies, on: on(at) }).collect();
    for (peer, offered) in offers(&shards, &ready) {
        let metas: Vec<RecordMeta> = offered.iter().map(|at| shards[*at].meta.clone()).collect();
        for (at, taken) in
            offered.iter().zip(homes::push(node, peer, &metas, (Instant::now() + PUSH_LIMIT, false)).await)
        {
            if taken {
                shards[*at].on.insert(peer);
            }
        }
    }
    let (whole, left): (Vec<_>, Vec<_>) = shards.into_iter().partition(|s| s.lacks(ready.len()) == 0);
    tracing::debug!(made = whole.len(), left = left.len(), "copies that taints and rules want");
    node.with_core(|core, _| left.iter().for_each(|s| core.replicate_again(&s.meta.key)));
    Some(left.is_empty())
}

/// Nodes that take copies, the roomiest first.
pub(super) fn ready(node: &Node) -> Vec<NodeNumber> {
    node.read_core(|core| {
        let now = node.now();
        let mut ready: Vec<_> = core
            .members()
            .iter()
            .filter(|(_, m)| m.record.state == NodeState::Ready && !m.paused(now))
            .map(|(number, m)| (std::cmp::Reverse(m.record.free_host_bytes), number))
            .collect();
        ready.sort_unstable();
        ready.into_iter().map(|(_, number)| number).collect()
    })
}

fn counts(core: &Core, replica: &Replica, ready: &[NodeNumber]) -> bool {
    core.members().current(replica) && !replica.tiers.is_empty() && ready.contains(&replica.node)
}

/// What to offer to whom.
fn offers(shards: &[Wanting], ready: &[NodeNumber]) -> BTreeMap<NodeNumber, Vec<usize>> {
    let mut offers: BTreeMap<NodeNumber, Vec<usize>> = BTreeMap::new();
    for (at, shard) in shards.iter().enumerate() {
        let without = ready.iter().filter(|number| !shard.on.contains(number));
        for number in without.take(shard.lacks(ready.len())) {
            offers.entry(*number).or_default().push(at);
        }
    }
    offers
}

#[cfg(test)]
mod tests {
    use kvtier_storage::conformance::meta;

    use super::*;

    #[test]
    fn offers_go_to_those_that_lack_a_copy() {
        let number = |n: u64| NodeNumber::new(n);
        let ready = [number(1), number(2), number(3)];
        let shard =
            |copies, on: &[u64]| Wanting { meta: meta(1, b"x"), copies, on: on.iter().map(|n| number(*n)).collect() };
        let shards = [shard(Copies::All, &[2]), shard(Copies::Some(1), &[3]), shard(Copies::Some(9), &[])];
        let offers = offers(&shards, &ready);
        assert_eq!(offers[&number(1)], [0, 2]);
        assert_eq!(offers[&number(2)], [2]);
        assert_eq!(offers[&number(3)], [0, 2]);
        assert_eq!(shards[1].lacks(3), 0);
    }
}
