//! Where the blocks of a context lie: here by this node's own catalog, elsewhere by the directory's word, and in packs.

use std::sync::Arc;

use kvtier_policy::directory::{Replica, Tiers};
use kvtier_policy::limits::MAX_TOUCHES_PER_CALL;
use kvtier_policy::programs::{BlockPlaces, ShardPlaces};
use kvtier_types::{ShardKey, Tier};
use tokio::time::Instant;

use super::context::Context;
use super::nodes::Nodes;
use crate::cluster::{self, Cluster};
use crate::node::Node;
use crate::services::targets::KEYS_PER_CORE_CALL;

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Places {
    /// The context's blocks, in its order.
    pub(super) blocks: Vec<BlockPlaces>,
    /// The directory did not answer in time, so that nothing is known of other nodes.
    pub(super) directory_is_away: bool,
}

/// Looks for the blocks of a context, until the deadline.
pub(super) async fn look(node: &Arc<Node>, context: &Context, nodes: &Nodes, until: Instant) -> Places {
    let shards = context.layout.shards;
    let of = |block: &super::context::Block| {
        let (block, layout) = (block.key, context.layout_id);
        (0..shards).map(move |shard| ShardKey { block, layout, shard })
    };
    let keys: Vec<ShardKey> = context.blocks.iter().flat_map(of).collect();
    let mut found: Vec<ShardPlaces> = Vec::with_capacity(keys.len());
    for portion in keys.chunks(KEYS_PER_CORE_CALL) {
        let here = node.read_core(|core| core.tiers_of(portion));
        found.extend(here.into_iter().map(|tiers| of_tiers(nodes.own_number, tiers)));
        tokio::task::yield_now().await;
    }
    let mut directory_is_away = false;
    if let Some(cluster) = &node.cluster {
        let left = until.saturating_duration_since(Instant::now());
        match cluster::ask_directory(node, cluster, &keys, left).await {
            None => directory_is_away = true,
            Some(replicas) => {
                found.iter_mut().zip(&replicas).for_each(|(shard, replicas)| elsewhere(shard, replicas, nodes));
            }
        }
        in_packs(cluster, &keys, &mut found).await;
    }
    let mut found = found.into_iter();
    let blocks = context.blocks.iter().map(|block| BlockPlaces {
        group: usize::from(block.group),
        block: block.block,
        shards: found.by_ref().take(usize::from(shards)).collect(),
    });
    Places { blocks: blocks.collect(), directory_is_away }
}

/// A shard that a node has in these tiers. A pack is for all to read where they share a store, which [`in_packs`] says.
fn of_tiers(node: u32, tiers: Tiers) -> ShardPlaces {
    let on = tiers.iter().next().map(|tier| (node, tier)).into_iter().collect();
    ShardPlaces { on, packed: tiers.has(Tier::Object) }
}

fn elsewhere(shard: &mut ShardPlaces, replicas: &[Replica], nodes: &Nodes) {
    for replica in replicas {
        let Some(number) = nodes.holder(replica) else { continue };
        shard.on.extend(replica.tiers.iter().next().map(|tier| (number, tier)));
        shard.packed |= replica.tiers.has(Tier::Object);
    }
}

/// Packs count for nodes other than their writer where all of them share a store.
async fn in_packs(cluster: &Cluster, keys: &[ShardKey], found: &mut [ShardPlaces]) {
    let Some(floor) = &cluster.floor else {
        found.iter_mut().for_each(|shard| shard.packed = false);
        return;
    };
    for (keys, found) in keys.chunks(MAX_TOUCHES_PER_CALL).zip(found.chunks_mut(MAX_TOUCHES_PER_CALL)) {
        for (record, shard) in floor.find(keys).iter().zip(found) {
            shard.packed |= record.is_some();
        }
        tokio::task::yield_now().await;
    }
}
