//! `KvCache`: what operators and schedulers ask of blocks.

use std::sync::Arc;

use kvtier_policy::{BlockView, Core, ReplicaView};
use kvtier_proto::{convert, v1};
use kvtier_storage::journal::{Entry, MAX_BATCH};
use kvtier_storage::object::FloorRecord;
use kvtier_types::{BlockKey, NodeId, Outcome, ShardKey, Tier};
use tonic::{Request, Response, Status};

use super::wire_status;
use crate::cluster::Cluster;
use crate::node::Node;

/// Keys in one call.
const MAX_KEYS: usize = 4096;
/// Longest that one node may take to say what it holds.
const ASK_LIMIT: std::time::Duration = std::time::Duration::from_secs(2);
/// Shards of a block looked for in packs.
const MAX_SHARDS: u16 = 64;
/// Page size of a listing that names none.
const DEFAULT_PAGE: u32 = 100;

/// The service over one node.
#[derive(Debug, Clone)]
pub(crate) struct KvCacheService(pub(crate) Arc<Node>);

fn keys(wire: &[prost::bytes::Bytes]) -> Result<Vec<BlockKey>, Status> {
    if wire.len() > MAX_KEYS {
        return Err(Status::invalid_argument(format!("{} keys in one call, at most {MAX_KEYS}", wire.len())));
    }
    wire.iter().map(|k| convert::key("keys", k).map_err(wire_status)).collect()
}

fn replica(view: ReplicaView, node_id: &str) -> v1::Replica {
    v1::Replica {
        shard: view.shard.into(),
        layout_id: view.layout.as_bytes().to_vec().into(),
        tier: v1::Tier::from(view.tier).into(),
        bytes: view.bytes,
        checksum: view.checksum,
        place: view.place,
        node_id: node_id.to_owned(),
    }
}

fn block(view: BlockView, node_id: &str) -> v1::BlockInfo {
    v1::BlockInfo {
        key: view.key.as_bytes().to_vec().into(),
        outcome: v1::Outcome::Applied.into(),
        replicas: view.replicas.into_iter().map(|r| replica(r, node_id)).collect(),
        model: view.model,
        tenant: view.tenant.to_string(),
        program_id: view.program_id,
        semantic: v1::SemanticType::from(view.semantic).into(),
        leases: view.leases,
        depth_blocks: view.depth_blocks,
    }
}

/// Where blocks lie: here, and unless only that was asked, at every node that answers, and in packs of nodes that are gone.
pub(super) async fn locate(node: &Arc<Node>, message: &v1::LocateRequest) -> Result<v1::LocateReply, Status> {
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

#[tonic::async_trait]
impl v1::kv_cache_server::KvCache for KvCacheService {
    async fn locate(&self, request: Request<v1::LocateRequest>) -> Result<Response<v1::LocateReply>, Status> {
        locate(&self.0, &request.into_inner()).await.map(Response::new)
    }

    async fn list(&self, request: Request<v1::ListRequest>) -> Result<Response<v1::ListReply>, Status> {
        let message = request.into_inner();
        let tier = convert::tier("tier", message.tier).map_err(wire_status)?;
        let bad_token = |_| Status::invalid_argument("page_token is not one this daemon gave out");
        let from = match message.page_token.len() {
            0 => 0,
            _ => u32::from_le_bytes(message.page_token[..].try_into().map_err(bad_token)?),
        };
        let size = if message.page_size == 0 { DEFAULT_PAGE } else { message.page_size };
        let (views, next) = self.0.read_core(|core| core.list(from, size as usize, tier, &message.model_contains));
        Ok(Response::new(v1::ListReply {
            blocks: views.into_iter().map(|v| block(v, &self.0.config.node_id)).collect(),
            next_page_token: next.map(|n| n.to_le_bytes().to_vec()).unwrap_or_default().into(),
        }))
    }

    async fn evict(&self, request: Request<v1::EvictRequest>) -> Result<Response<v1::EvictReply>, Status> {
        let message = request.into_inner();
        let keys = keys(&message.keys)?;
        let tiers = message.tiers.iter().map(|t| convert::tier("tiers", *t).map_err(wire_status));
        let tiers: Vec<Tier> = tiers.filter_map(Result::transpose).collect::<Result<_, _>>()?;
        let plan = if message.dry_run {
            self.0.read_core(|core| core.plan_evict(&keys, &tiers))
        } else {
            // In one step: a movement that began in between would write a record that the journal's entry does not cover
            // (`a_block_on_its_way_to_disk_is_evicted_for_good`).
            self.0.with_core(|core, _| {
                let plan = core.plan_evict(&keys, &tiers);
                core.apply_evict(&keys, &tiers);
                plan
            })
        };
        if !message.dry_run {
            let entries: Vec<Entry> = plan
                .journal
                .iter()
                .map(|(key, sequence)| Entry::Evicted { key: *key, up_to_sequence: *sequence })
                .collect();
            self.make_durable(entries).await?;
        }
        let outcomes =
            plan.outcomes.into_iter().map(|(key, outcome, reason): (BlockKey, Outcome, _)| v1::TargetOutcome {
                key: key.as_bytes().to_vec().into(),
                outcome: v1::Outcome::from(outcome).into(),
                reason: reason.to_owned(),
            });
        Ok(Response::new(v1::EvictReply { outcomes: outcomes.collect() }))
    }
}

impl KvCacheService {
    async fn make_durable(&self, entries: Vec<Entry>) -> Result<(), Status> {
        if entries.is_empty() {
            return Ok(());
        }
        let journal = Arc::clone(&self.0.journal);
        let appended =
            tokio::task::spawn_blocking(move || entries.chunks(MAX_BATCH).try_for_each(|batch| journal.append(batch)))
                .await;
        match appended {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => {
                let text = "evicted now, but a restart may bring the blocks back: the journal cannot be written";
                Err(Status::unavailable(format!("{text}: {error}")))
            }
            Err(_) => Err(Status::internal("the journal's task died")),
        }
    }
}
