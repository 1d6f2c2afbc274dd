//! `KvCache`: what operators, schedulers and agents ask of blocks. A file for each family of verbs.

mod capabilities;
mod checkpoint;
mod claims;
mod evict;
mod hints;
mod in_packs;
mod list;
mod locate;
mod movement;
mod operations;
mod taints;
mod watch;

use std::sync::Arc;

use kvtier_policy::{BlockView, ReplicaView};
use kvtier_proto::v1;
use kvtier_storage::StorageError;
use kvtier_storage::journal::Entry;
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status};

use super::caller::Caller;
use super::{recovered, to_the_end};
use crate::journaling;
use crate::node::Node;

pub(super) use evict::evict;
pub(super) use locate::locate;
pub(super) use taints::{taint, untaint};
pub(crate) use watch::watchers;

/// The service over one node.
#[derive(Debug, Clone)]
pub(crate) struct KvCacheService(pub(crate) Arc<Node>);

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl v1::kv_cache_server::KvCache for KvCacheService {
    async fn locate(&self, request: Request<v1::LocateRequest>) -> Answer<v1::LocateReply> {
        let caller = Caller::of(&self.0, &request)?;
        locate::locate_for(&self.0, &caller, request.into_inner()).await.map(Response::new)
    }

    async fn list(&self, request: Request<v1::ListRequest>) -> Answer<v1::ListReply> {
        let caller = Caller::of(&self.0, &request)?;
        list::list(&self.0, &caller, &request.into_inner()).await.map(Response::new)
    }

    async fn capabilities(&self, request: Request<v1::CapabilitiesRequest>) -> Answer<v1::CapabilitiesReply> {
        Caller::of(&self.0, &request)?;
        Ok(Response::new(capabilities::capabilities(&self.0)))
    }

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Answer<BoxStream<v1::WatchReply>> {
        let caller = Caller::of(&self.0, &request)?;
        watch::watch(&self.0, &caller, request.into_inner()).map(Response::new)
    }

    async fn apply_hints(&self, request: Request<v1::ApplyHintsRequest>) -> Answer<v1::ApplyHintsReply> {
        let caller = Caller::of(&self.0, &request)?;
        hints::apply(&self.0, &caller, &request.into_inner()).await.map(Response::new)
    }

    async fn evict(&self, request: Request<v1::EvictRequest>) -> Answer<v1::EvictReply> {
        let caller = Caller::of(&self.0, &request)?;
        recovered(&self.0)?;
        let message = v1::EvictRequest { tombstones: Vec::new(), ..request.into_inner() };
        let node = Arc::clone(&self.0);
        let work = async move { evict(&node, &caller, &message, false).await };
        to_the_end(&self.0, false, work).await.map(Response::new)
    }

    async fn pin(&self, request: Request<v1::PinRequest>) -> Answer<v1::ClaimReply> {
        let caller = Caller::of(&self.0, &request)?;
        let (node, message) = (Arc::clone(&self.0), request.into_inner());
        let work = async move { claims::pin(&node, &caller, &message).await };
        to_the_end(&self.0, false, work).await.map(Response::new)
    }

    async fn unpin(&self, request: Request<v1::UnpinRequest>) -> Answer<v1::ClaimReply> {
        let caller = Caller::of(&self.0, &request)?;
        let (node, message) = (Arc::clone(&self.0), request.into_inner());
        let work = async move { claims::unpin(&node, &caller, &message).await };
        to_the_end(&self.0, false, work).await.map(Response::new)
    }

    async fn retain(&self, request: Request<v1::RetainRequest>) -> Answer<v1::ClaimReply> {
        let caller = Caller::of(&self.0, &request)?;
        let (node, message) = (Arc::clone(&self.0), request.into_inner());
        let work = async move { claims::retain(&node, &caller, &message).await };
        to_the_end(&self.0, false, work).await.map(Response::new)
    }

    async fn taint(&self, request: Request<v1::TaintRequest>) -> Answer<v1::TaintReply> {
        let caller = Caller::of(&self.0, &request)?;
        recovered(&self.0)?;
        let (node, message) = (Arc::clone(&self.0), request.into_inner());
        let work = async move { taints::taint(&node, &caller, &message).await };
        to_the_end(&self.0, false, work).await.map(Response::new)
    }

    async fn untaint(&self, request: Request<v1::TaintRequest>) -> Answer<v1::TaintReply> {
        let caller = Caller::of(&self.0, &request)?;
        recovered(&self.0)?;
        let (node, message) = (Arc::clone(&self.0), request.into_inner());
        let work = async move { taints::untaint(&node, &caller, &message).await };
        to_the_end(&self.0, false, work).await.map(Response::new)
    }

    async fn list_claims(&self, request: Request<v1::ListClaimsRequest>) -> Answer<v1::ListClaimsReply> {
        let caller = Caller::of(&self.0, &request)?;
        claims::list(&self.0, &caller, &request.into_inner()).await.map(Response::new)
    }

    async fn release_claims(&self, request: Request<v1::ReleaseClaimsRequest>) -> Answer<v1::ReleaseClaimsReply> {
        let caller = Caller::of(&self.0, &request)?;
        let (node, message) = (Arc::clone(&self.0), request.into_inner());
        let work = async move { claims::release(&node, &caller, &message).await };
        to_the_end(&self.0, false, work).await.map(Response::new)
    }

    async fn r#move(&self, request: Request<v1::MoveRequest>) -> Answer<v1::OperationReply> {
        let caller = Caller::of(&self.0, &request)?;
        movement::move_to(&self.0, &caller, &request.into_inner()).map(Response::new)
    }

    async fn prefetch(&self, request: Request<v1::PrefetchRequest>) -> Answer<v1::OperationReply> {
        let caller = Caller::of(&self.0, &request)?;
        movement::prefetch(&self.0, &caller, &request.into_inner()).map(Response::new)
    }

    async fn replicate(&self, request: Request<v1::ReplicateRequest>) -> Answer<v1::OperationReply> {
        let caller = Caller::of(&self.0, &request)?;
        movement::replicate(&self.0, &caller, &request.into_inner()).map(Response::new)
    }

    async fn commit_checkpoint(&self, request: Request<v1::CommitCheckpointRequest>) -> Answer<v1::OperationReply> {
        let caller = Caller::of(&self.0, &request)?;
        checkpoint::commit(&self.0, &caller, &request.into_inner()).await.map(Response::new)
    }

    async fn get_operation(&self, request: Request<v1::OperationRequest>) -> Answer<v1::Operation> {
        let caller = Caller::of(&self.0, &request)?;
        operations::get(&self.0, &caller, &request.into_inner()).map(Response::new)
    }

    async fn wait_operation(&self, request: Request<v1::OperationRequest>) -> Answer<v1::Operation> {
        let caller = Caller::of(&self.0, &request)?;
        operations::wait(&self.0, &caller, &request.into_inner()).await.map(Response::new)
    }

    async fn cancel_operation(&self, request: Request<v1::OperationRequest>) -> Answer<v1::Operation> {
        let caller = Caller::of(&self.0, &request)?;
        operations::cancel(&self.0, &caller, &request.into_inner()).await.map(Response::new)
    }

    async fn list_operations(&self, request: Request<v1::ListOperationsRequest>) -> Answer<v1::ListOperationsReply> {
        let caller = Caller::of(&self.0, &request)?;
        Ok(Response::new(operations::list(&self.0, &caller)))
    }
}

/// Makes entries durable; `else_what` says what is not when it fails.
pub(super) async fn durable(node: &Arc<Node>, entries: Vec<Entry>, else_what: &str) -> Result<(), Status> {
    match appended(node, entries).await? {
        Ok(()) => Ok(()),
        Err(error) => Err(Status::unavailable(format!("{else_what}: the journal cannot be written: {error}"))),
    }
}

/// What came of writing entries to the journal.
pub(super) async fn appended(node: &Arc<Node>, entries: Vec<Entry>) -> Result<Result<(), StorageError>, Status> {
    journaling::append(node, entries).await.map_err(|_| Status::internal("the journal's task died"))
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
        claims: view.claims,
        holders: view.holders,
        taints: view.taints.iter().map(Into::into).collect(),
        rule: view.rule,
    }
}
