//! `KvCache`: what operators and schedulers ask of blocks.

use std::sync::Arc;

use kvtier_policy::{BlockView, ReplicaView};
use kvtier_proto::{convert, v1};
use kvtier_storage::journal::{Entry, MAX_BATCH};
use kvtier_types::{BlockKey, Outcome, Tier};
use tonic::{Request, Response, Status};

use super::wire_status;
use crate::node::Node;

/// Keys in one call.
const MAX_KEYS: usize = 4096;
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

fn replica(view: ReplicaView) -> v1::Replica {
    v1::Replica {
        shard: view.shard.into(),
        layout_id: view.layout.as_bytes().to_vec().into(),
        tier: v1::Tier::from(view.tier).into(),
        bytes: view.bytes,
        checksum: view.checksum,
        place: view.place,
    }
}

fn block(view: BlockView) -> v1::BlockInfo {
    v1::BlockInfo {
        key: view.key.as_bytes().to_vec().into(),
        outcome: v1::Outcome::Applied.into(),
        replicas: view.replicas.into_iter().map(replica).collect(),
        model: view.model,
        tenant: view.tenant.to_string(),
        program_id: view.program_id,
        semantic: v1::SemanticType::from(view.semantic).into(),
        leases: view.leases,
        depth_blocks: view.depth_blocks,
    }
}

#[tonic::async_trait]
impl v1::kv_cache_server::KvCache for KvCacheService {
    async fn locate(&self, request: Request<v1::LocateRequest>) -> Result<Response<v1::LocateReply>, Status> {
        let keys = keys(&request.into_inner().keys)?;
        let missing = |key: &BlockKey| v1::BlockInfo {
            key: key.as_bytes().to_vec().into(),
            outcome: v1::Outcome::Missing.into(),
            ..Default::default()
        };
        let blocks = keys.iter().map(|k| self.0.read_core(|core| core.locate(k)).map_or_else(|| missing(k), block));
        Ok(Response::new(v1::LocateReply { node_id: self.0.config.node_id.clone(), blocks: blocks.collect() }))
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
            blocks: views.into_iter().map(block).collect(),
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
