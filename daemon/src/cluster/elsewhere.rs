//! Finds blocks elsewhere by their keys alone, for whoever has no reader to say what they are.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kvtier_policy::limits::MAX_SHARDS_PER_EXPORT;
use kvtier_policy::{Scope, Source};
use kvtier_proto::convert::{pack_keys, record_meta};
use kvtier_proto::v1;
use kvtier_types::{BlockHints, BlockKey, NodeNumber, RecordMeta, ShardKey};
use tokio::time::timeout;

use super::{Cluster, peers};
use crate::claims::unix_ms;
use crate::node::Node;

/// Longest that a node may take to say what it has.
const ASK_LIMIT: Duration = Duration::from_secs(2);
/// Nodes asked at once for one flight of blocks.
const MAX_ASKED: usize = 64;

/// Shards with where they can be had.
pub(crate) type Wanted = Vec<(RecordMeta, Vec<Source>)>;

/// Where blocks that are not here can be had: what other nodes say they hold, then what lies in packs. In portions that
/// one hold takes.
pub(crate) async fn find_elsewhere(node: &Arc<Node>, keys: &[BlockKey]) -> Vec<Wanted> {
    let Some(cluster) = node.cluster.as_ref().filter(|_| !keys.is_empty()) else { return Vec::new() };
    let members: Vec<NodeNumber> =
        node.read_core(|core| core.members().iter().map(|(number, _)| number).take(MAX_ASKED).collect());
    let asked = members.iter().map(|number| ask(node, *number, keys));
    let mut found: BTreeMap<ShardKey, (RecordMeta, Vec<Source>)> = BTreeMap::new();
    for (node, answer) in members.iter().zip(futures::future::join_all(asked).await) {
        let Some((incarnation, metas)) = answer else { continue };
        for meta in metas.into_iter().filter(|meta| keys.contains(&meta.key.block)) {
            let known = found.entry(meta.key).or_insert_with(|| (meta, Vec::new()));
            known.1.push(Source::Peer { node: *node, incarnation });
        }
    }
    in_packs(node, cluster, keys, &mut found);
    let mut wanted: Wanted = found.into_values().collect();
    // Inner blocks before those that stand on them.
    wanted.sort_by_key(|(meta, _)| meta.depth_blocks);
    wanted.chunks(MAX_SHARDS_PER_EXPORT).map(<[_]>::to_vec).collect()
}

async fn ask(node: &Arc<Node>, number: NodeNumber, keys: &[BlockKey]) -> Option<(u64, Vec<RecordMeta>)> {
    let asked = async {
        let mut client = peers::client(node, number, ASK_LIMIT).await?;
        let reply = client.describe(v1::DescribeRequest { keys: pack_keys(keys) }).await?.into_inner();
        let metas = reply.shards.iter().filter_map(|shard| record_meta(shard, unix_ms()).ok());
        Ok::<_, anyhow::Error>((reply.incarnation, metas.collect()))
    };
    match timeout(ASK_LIMIT, asked).await {
        Ok(Ok(answer)) => Some(answer),
        Ok(Err(error)) => {
            tracing::debug!(peer = %number, %error, "a node did not say what it has");
            None
        }
        Err(_) => None,
    }
}

/// Adds what other nodes' packs hold, in the layouts that this node knows.
fn in_packs(
    node: &Arc<Node>,
    cluster: &Cluster,
    keys: &[BlockKey],
    found: &mut BTreeMap<ShardKey, (RecordMeta, Vec<Source>)>,
) {
    let Some(floor) = &cluster.floor else { return };
    for key in keys {
        let shards = node.read_core(|core| core.shard_keys(key));
        for (shard, record) in shards.iter().zip(floor.find(&shards)) {
            let Some(record) = record else { continue };
            let known = found.entry(*shard).or_insert_with(|| (nameless(*shard, record.bytes), Vec::new()));
            known.1.push(Source::Floor);
        }
    }
}

/// A shard of which only key and length are known; the record says the rest once it came.
fn nameless(key: ShardKey, bytes: u64) -> RecordMeta {
    let scope = Scope::default();
    RecordMeta {
        key,
        namespace: scope.namespace,
        tenant: scope.tenant,
        hints: BlockHints::default(),
        parent: None,
        depth_blocks: 0,
        group: 0,
        needs_ancestors: true,
        model: scope.model,
        bytes,
        checksum: 0,
        sequence: 0,
        expires_ms: None,
    }
}
