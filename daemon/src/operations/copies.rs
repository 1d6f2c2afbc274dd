//! Copies of blocks on other nodes.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use kvtier_policy::directory::{NodeState, Replica};
use kvtier_policy::{Core, limits::MAX_SHARDS_PER_EXPORT};
use kvtier_types::{NodeNumber, Outcome, RecordMeta, ShardKey};
use tokio::time::Instant;

use super::{FLIGHT_LIMIT, Goal, Job, Operation};
use crate::cluster::{self, Cluster};
use crate::node::Node;

/// Longest that the directory may take to say who has copies.
const LOCATE_LIMIT: Duration = Duration::from_secs(2);
/// Nodes that one flight's blocks are offered to at most.
const MAX_OFFERS: usize = 16;

/// The copies that there shall be.
#[derive(Debug, Clone)]
pub(crate) struct Wish {
    /// How many on other nodes.
    pub(crate) copies: usize,
    /// On which; the roomiest when empty.
    pub(crate) nodes: Vec<NodeNumber>,
    /// Whether they are made before anybody asks for them there.
    pub(crate) ahead: bool,
}

/// A shard and the other nodes that have it.
struct Copied {
    goal: usize,
    meta: RecordMeta,
    on: BTreeSet<NodeNumber>,
}

impl Copied {
    fn suffices(&self, wish: &Wish) -> bool {
        self.counted(wish) >= wish.copies
    }

    fn counted(&self, wish: &Wish) -> usize {
        self.on.iter().filter(|node| wish.nodes.is_empty() || wish.nodes.contains(node)).count()
    }
}

/// Makes copies of all of `goals`.
pub(crate) async fn replicate(node: Arc<Node>, operation: Arc<Operation>, goals: Vec<Goal>, wish: Wish) {
    let job = Job { node, operation };
    let Some(cluster) = job.node.cluster.clone() else {
        return job.fail(&goals, Outcome::Unsupported, "this node is in no cluster");
    };
    let mut rest = &goals[..];
    while !rest.is_empty() {
        let (flight, later) = rest.split_at(job.flight(rest));
        rest = later;
        fly(&job, &cluster, flight, &wish).await;
    }
}

async fn fly(job: &Job, cluster: &Arc<Cluster>, flight: &[Goal], wish: &Wish) {
    let node = &job.node;
    let mut shards: Vec<Copied> = node.read_core(|core| {
        let of = |(goal, (_, key)): (usize, &Goal)| {
            core.describe(key).into_iter().map(move |meta| Copied { goal, meta, on: BTreeSet::new() })
        };
        flight.iter().enumerate().flat_map(of).collect()
    });
    find_copies(node, cluster, &mut shards).await;
    let before: Vec<bool> = shards.iter().map(|shard| shard.suffices(wish)).collect();
    let until = Instant::now() + FLIGHT_LIMIT;
    let mut offered: Vec<NodeNumber> = Vec::new();
    while shards.iter().any(|shard| !shard.suffices(wish)) && offered.len() < MAX_OFFERS && Instant::now() < until {
        let Some(peer) = node.read_core(|core| next_node(core, node, wish, &offered)) else { break };
        offered.push(peer);
        offer(node, peer, &mut shards, (wish, until)).await;
    }
    for (at, goal) in flight.iter().enumerate() {
        let own: Vec<usize> = (0..shards.len()).filter(|index| shards[*index].goal == at).collect();
        let bytes = own.iter().map(|index| shards[*index].meta.bytes).sum();
        let least = own.iter().map(|index| shards[*index].counted(wish)).min();
        let (outcome, reason) = match least {
            None => (Outcome::Missing, "nothing of it is on this node".to_owned()),
            Some(_) if own.iter().all(|index| before[*index]) => (Outcome::Duplicate, String::new()),
            Some(least) if least >= wish.copies => (Outcome::Applied, String::new()),
            Some(0) => (Outcome::Rejected, "no other node that is ready took it: see the log".to_owned()),
            Some(least) => (Outcome::Clipped, format!("{least} of {} copies: no further node took it", wish.copies)),
        };
        job.operation.note(*goal, outcome, &reason, bytes);
    }
}

/// Takes note of which other nodes that stay have each shard.
async fn find_copies(node: &Arc<Node>, cluster: &Cluster, shards: &mut [Copied]) {
    let keys: Vec<ShardKey> = shards.iter().map(|shard| shard.meta.key).collect();
    let replicas = cluster::replicas(node, cluster, &keys, LOCATE_LIMIT).await;
    node.read_core(|core| {
        let ready = |r: &&Replica| core.members().get(r.node).is_some_and(|m| m.record.state == NodeState::Ready);
        let counts = |r: &&Replica| core.members().current(r) && !r.tiers.is_empty();
        for (shard, replicas) in shards.iter_mut().zip(&replicas) {
            shard.on.extend(replicas.iter().filter(ready).filter(counts).map(|r| r.node));
        }
    });
}

fn next_node(core: &Core, node: &Node, wish: &Wish, offered: &[NodeNumber]) -> Option<NodeNumber> {
    if wish.nodes.is_empty() {
        return core.members().roomiest(node.now(), offered).map(|(number, _)| number);
    }
    let ready = |number: &NodeNumber| core.members().get(*number).is_some_and(|m| m.record.state == NodeState::Ready);
    wish.nodes.iter().find(|number| !offered.contains(number) && ready(number)).copied()
}

/// Offers a node what is to have a copy there.
async fn offer(node: &Arc<Node>, peer: NodeNumber, shards: &mut [Copied], (wish, until): (&Wish, Instant)) {
    let wanting = |shard: &Copied| !shard.suffices(wish) && !shard.on.contains(&peer);
    let at: Vec<usize> = (0..shards.len()).filter(|index| wanting(&shards[*index])).collect();
    for portion in at.chunks(MAX_SHARDS_PER_EXPORT) {
        let metas: Vec<RecordMeta> = portion.iter().map(|index| shards[*index].meta.clone()).collect();
        let taken = cluster::push(node, peer, &metas, (until, wish.ahead)).await;
        for (index, _) in portion.iter().zip(taken).filter(|(_, taken)| *taken) {
            shards[*index].on.insert(peer);
        }
    }
}
