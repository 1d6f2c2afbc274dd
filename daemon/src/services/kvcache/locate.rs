//! `Locate`: where blocks lie, here and elsewhere.

use std::sync::Arc;
use std::time::Duration;

use kvtier_policy::Core;
use kvtier_proto::{convert, v1};
use kvtier_storage::object::FloorRecord;
use kvtier_types::{BlockKey, NodeId, ShardKey, TenantId};
use tonic::Status;

use super::block;
use crate::cluster::Cluster;
use crate::node::Node;
use crate::services::caller::Caller;
use crate::services::targets::{self, Resolved};
use crate::services::wire_status;

/// Keys in one call.
const MAX_KEYS: usize = 4096;
/// Longest that one node may take to say what it holds.
const ASK_LIMIT: Duration = Duration::from_secs(2);
/// Shards of a block looked for in packs.
const MAX_SHARDS: u16 = 64;

fn keys(wire: &[prost::bytes::Bytes]) -> Result<Vec<BlockKey>, Status> {
    if wire.len() > MAX_KEYS {
        return Err(Status::invalid_argument(format!("{} keys in one call, at most {MAX_KEYS}", wire.len())));
    }
    wire.iter().map(|k| convert::key("keys", k).map_err(wire_status)).collect()
}

/// Where the blocks lie that a caller names, as far as it may know: its own tenant's, and those that all share.
pub(super) async fn locate_for(
    node: &Arc<Node>,
    caller: &Caller,
    mut message: v1::LocateRequest,
) -> Result<v1::LocateReply, Status> {
    let resolved = targets::resolve(node, caller, &message.targets)?;
    message.targets.clear();
    let of_targets = resolved.iter().flat_map(Resolved::keys).map(|key| key.as_bytes().to_vec().into());
    message.keys.extend(of_targets);
    let mut reply = locate(node, &message).await?;
    let known = |block: &v1::BlockInfo| {
        let own = TenantId::new(&block.tenant).is_ok_and(|tenant| caller.controls(&tenant));
        own || block.tenant.is_empty() || block.tenant == TenantId::shared().as_str()
    };
    for block in reply.blocks.iter_mut().filter(|block| !known(block)) {
        *block = v1::BlockInfo {
            key: std::mem::take(&mut block.key),
            outcome: v1::Outcome::Rejected.into(),
            ..v1::BlockInfo::default()
        };
    }
    Ok(reply)
}

/// Where blocks lie: here, and unless only that was asked, at every node that answers, and in packs of nodes that are gone.
pub(in crate::services) async fn locate(
    node: &Arc<Node>,
    message: &v1::LocateRequest,
) -> Result<v1::LocateReply, Status> {
    let keys = keys(&message.keys)?;
    let own = &node.config.node_id;
    let missing = |key: &BlockKey| v1::BlockInfo {
        key: key.as_bytes().to_vec().into(),
        outcome: v1::Outcome::Missing.into(),
        ..Default::default()
    };
    let here = |key| node.read_core(|core| core.locate(key)).map_or_else(|| missing(key), |view| block(view, own));
    let mut blocks: Vec<v1::BlockInfo> = keys.iter().map(here).collect();
    if let Some(cluster) = node.cluster.as_ref().filter(|_| !message.local_only) {
        let others: Vec<NodeId> = cluster.records().into_iter().map(|r| r.id).filter(|id| *id != cluster.id).collect();
        let asked = others.iter().map(|id| ask(node, cluster, id, message));
        for answer in futures::future::join_all(asked).await.into_iter().flatten() {
            blocks.iter_mut().zip(answer.blocks).for_each(|(block, theirs)| merge(block, theirs));
        }
        for (key, block) in keys.iter().zip(&mut blocks) {
            let packed = in_packs(node, cluster, key);
            // Those of a living node it named itself.
            let unnamed = |r: &v1::Replica| !block.replicas.iter().any(|b| b.node_id == r.node_id && b.tier == r.tier);
            let found: Vec<v1::Replica> = packed.into_iter().filter(unnamed).collect();
            if !found.is_empty() {
                block.outcome = v1::Outcome::Applied.into();
                block.replicas.extend(found);
            }
        }
    }
    Ok(v1::LocateReply { node_id: own.clone(), blocks })
}

async fn ask(node: &Arc<Node>, cluster: &Cluster, id: &NodeId, message: &v1::LocateRequest) -> Option<v1::LocateReply> {
    let asked = async {
        let mut client = cluster.peer_client(node, id).await?;
        Ok::<_, anyhow::Error>(client.locate(message.clone()).await?.into_inner())
    };
    match tokio::time::timeout(ASK_LIMIT, asked).await {
        Ok(Ok(reply)) => Some(reply),
        Ok(Err(error)) => {
            tracing::warn!(peer = %id, %error, "a node did not say what it holds");
            None
        }
        Err(_) => None,
    }
}

fn merge(block: &mut v1::BlockInfo, theirs: v1::BlockInfo) {
    if theirs.replicas.is_empty() {
        return;
    }
    if block.replicas.is_empty() {
        *block = theirs;
    } else {
        block.replicas.extend(theirs.replicas);
    }
}

/// Shards of a block in other nodes' packs, as far as this node knows the layouts it may have.
fn in_packs(node: &Arc<Node>, cluster: &Cluster, key: &BlockKey) -> Vec<v1::Replica> {
    let Some(floor) = &cluster.floor else { return Vec::new() };
    let layouts = node.read_core(Core::layouts);
    let shards =
        layouts.iter().flat_map(|layout| (0..MAX_SHARDS).map(|shard| ShardKey { block: *key, layout: *layout, shard }));
    let keys: Vec<ShardKey> = shards.collect();
    let found = floor.find(&keys).into_iter().zip(&keys);
    let replica = |(record, key): (Option<FloorRecord>, &ShardKey)| {
        let record = record?;
        Some(v1::Replica {
            shard: key.shard.into(),
            layout_id: key.layout.as_bytes().to_vec().into(),
            tier: v1::Tier::Object.into(),
            bytes: record.bytes,
            checksum: record.checksum,
            place: format!("pack {}", hex::encode(&record.pack[..8])),
            node_id: record.writer.to_string(),
        })
    };
    found.filter_map(replica).collect()
}
