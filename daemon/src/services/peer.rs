//! `Peer`: what other nodes ask of this one. Not encrypted: the cluster's own network only.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use kvtier_policy::limits::MAX_SHARDS_PER_EXPORT;
use kvtier_policy::{Core, ExportError, ExportRequest, Exported, LeaseId, MAX_EXPORT_TTL};
use kvtier_proto::{PROTOCOL_VERSION, convert, v1};
use kvtier_transport::{Exposure, Transport};
use kvtier_types::{RecordMeta, ShardKey};
use tokio::time::Instant;
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status};

use super::caller::Caller;
use super::{recovered, to_the_end, wire_status};
use crate::claims::unix_ms;
use crate::cluster::Cluster;
use crate::node::Node;
use crate::pool::frame_id;

/// Longest that a push may take, whatever the pusher asks.
const MAX_PUSH: Duration = Duration::from_secs(60);

/// The service over one node of a cluster.
#[derive(Debug, Clone)]
pub(crate) struct PeerService {
    pub(crate) node: Arc<Node>,
    pub(crate) cluster: Arc<Cluster>,
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl v1::peer_server::Peer for PeerService {
    async fn handshake(&self, request: Request<v1::HandshakeRequest>) -> Answer<v1::HandshakeReply> {
        let message = request.into_inner();
        if message.protocol_version != PROTOCOL_VERSION {
            tracing::warn!(
                peer = message.node_id,
                build = message.build,
                version = message.protocol_version,
                "refused a peer of another protocol version"
            );
            return Err(Status::failed_precondition(format!(
                "this node speaks protocol version {PROTOCOL_VERSION}, not {}: install one kvtier release on all nodes",
                message.protocol_version
            )));
        }
        convert::node(&message.node_id).map_err(wire_status)?;
        Ok(Response::new(v1::HandshakeReply {
            protocol_version: PROTOCOL_VERSION,
            node_id: self.node.config.node_id.clone(),
            incarnation: self.node.read_core(kvtier_policy::Core::incarnation),
            build: env!("CARGO_PKG_VERSION").to_owned(),
            transports: self.cluster.transports.offers(),
        }))
    }

    async fn export(&self, request: Request<v1::ExportRequest>) -> Answer<v1::ExportReply> {
        let message = request.into_inner();
        let transport = self.cluster.transports.get(&message.transport).cloned();
        let transport =
            transport.ok_or_else(|| Status::invalid_argument(format!("no transport {:?} here", message.transport)))?;
        let export = export_request(&message)?;
        let wait = Duration::from_millis(message.wait_ms.into()).min(MAX_EXPORT_TTL);
        let lease = self.node.with_core(|core, now| core.export(now, &export)).map_err(|e| export_status(&e))?;
        // Whoever asked may hang up while shards are brought up: the lease must not outlive the call then.
        let guard = LeaseGuard { node: &self.node, lease: Some(lease) };
        self.wait_for(lease, wait).await;
        let answers = self.node.with_core(|core, _| core.collect_export(lease));
        let answers = answers.ok_or_else(|| Status::deadline_exceeded("the lease ended before its answer"))?;
        let (shards, exposures) = self.expose(transport, answers).await?;
        self.cluster.exposures.keep(lease, exposures);
        guard.keep();
        Ok(Response::new(v1::ExportReply { lease: lease.get(), shards }))
    }

    async fn release(&self, request: Request<v1::ReleaseExportsRequest>) -> Answer<v1::ReleaseExportsReply> {
        let message = request.into_inner();
        if message.incarnation == self.node.read_core(kvtier_policy::Core::incarnation) {
            for lease in message.leases.into_iter().map(LeaseId::new) {
                self.cluster.exposures.end(lease);
                self.node.with_core(|core, _| core.release_export(lease));
            }
        }
        Ok(Response::new(v1::ReleaseExportsReply {}))
    }

    async fn push(&self, request: Request<v1::PushRequest>) -> Answer<v1::PushReply> {
        let message = request.into_inner();
        if self.node.is_draining() {
            return Err(Status::unavailable("this node is draining itself: push to another one"));
        }
        let from = convert::node(&message.node_id).map_err(wire_status)?;
        let now_ms = unix_ms();
        let metas: Vec<RecordMeta> = message
            .shards
            .iter()
            .map(|shard| convert::record_meta(shard, now_ms))
            .collect::<Result<_, _>>()
            .map_err(wire_status)?;
        let limit = Duration::from_millis(message.deadline_ms.into()).min(MAX_PUSH);
        let ahead = message.ahead.then(|| self.node.config.prefetch_budget());
        let from = (from.number(), message.node_incarnation);
        let adopted = self.node.with_core(|core, now| core.adopt(now, from, &metas, (limit, ahead)));
        let lease = adopted.map_err(|e| export_status(&e))?;
        let _guard = LeaseGuard { node: &self.node, lease: Some(lease) };
        self.wait_for(lease, limit).await;
        let outcomes = self.node.read_core(|core| core.adoption_outcomes(lease)).unwrap_or_default();
        let outcomes = outcomes.into_iter().map(|(outcome, reason)| v1::PushOutcome {
            outcome: v1::Outcome::from(outcome).into(),
            reason: reason.to_owned(),
        });
        Ok(Response::new(v1::PushReply { outcomes: outcomes.collect() }))
    }

    async fn describe(&self, request: Request<v1::DescribeRequest>) -> Answer<v1::DescribeReply> {
        let keys = convert::unpack_keys(&request.into_inner().keys).map_err(wire_status)?;
        if keys.len() > MAX_SHARDS_PER_EXPORT {
            let message = format!("{} keys in one call, at most {MAX_SHARDS_PER_EXPORT}", keys.len());
            return Err(Status::invalid_argument(message));
        }
        let (incarnation, metas) = self.node.read_core(|core| {
            let mut metas: Vec<RecordMeta> = Vec::new();
            for shards in keys.iter().map(|key| core.describe(key)) {
                if metas.len() + shards.len() > MAX_SHARDS_PER_EXPORT {
                    break;
                }
                metas.extend(shards);
            }
            (core.incarnation(), metas)
        });
        let shards = metas.iter().map(|meta| convert::shard_meta(meta, unix_ms())).collect();
        Ok(Response::new(v1::DescribeReply { incarnation, shards }))
    }

    async fn locate(&self, request: Request<v1::LocateRequest>) -> Answer<v1::LocateReply> {
        let message = v1::LocateRequest { local_only: true, ..request.into_inner() };
        super::kvcache::locate(&self.node, &message).await.map(Response::new)
    }

    async fn taint(&self, request: Request<v1::TaintRequest>) -> Answer<v1::TaintReply> {
        recovered(&self.node)?;
        let message = v1::TaintRequest { local_only: true, ..request.into_inner() };
        let node = Arc::clone(&self.node);
        let work = async move { super::kvcache::taint(&node, &Caller::operator(), &message).await };
        to_the_end(&self.node, true, work).await.map(Response::new)
    }

    async fn untaint(&self, request: Request<v1::TaintRequest>) -> Answer<v1::TaintReply> {
        recovered(&self.node)?;
        let message = v1::TaintRequest { local_only: true, ..request.into_inner() };
        let node = Arc::clone(&self.node);
        let work = async move { super::kvcache::untaint(&node, &Caller::operator(), &message).await };
        to_the_end(&self.node, true, work).await.map(Response::new)
    }

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Answer<BoxStream<v1::DrainEvent>> {
        let message = v1::DrainRequest { node_id: String::new(), ..request.into_inner() };
        super::admin::drain(&self.node, &message).await.map(Response::new)
    }

    async fn evict(&self, request: Request<v1::EvictRequest>) -> Answer<v1::EvictReply> {
        recovered(&self.node)?;
        let message = v1::EvictRequest { everywhere: false, ..request.into_inner() };
        let node = Arc::clone(&self.node);
        let work = async move { super::kvcache::evict(&node, &Caller::operator(), &message, true).await };
        to_the_end(&self.node, true, work).await.map(Response::new)
    }

    async fn signal(&self, request: Request<v1::SignalRequest>) -> Answer<v1::SignalReply> {
        recovered(&self.node)?;
        let message = v1::SignalRequest { local_only: true, ..request.into_inner() };
        super::programs::signal(&self.node, &Caller::operator(), message).await.map(Response::new)
    }

    async fn declare(&self, request: Request<v1::DeclareRequest>) -> Answer<v1::DeclareReply> {
        let message = v1::DeclareRequest { local_only: true, ..request.into_inner() };
        let node = Arc::clone(&self.node);
        let work = async move { super::graphs::declare(&node, &Caller::operator(), message).await };
        to_the_end(&self.node, true, work).await.map(Response::new)
    }

    async fn progress(&self, request: Request<v1::ProgressRequest>) -> Answer<v1::ProgressReply> {
        let message = v1::ProgressRequest { local_only: true, ..request.into_inner() };
        let node = Arc::clone(&self.node);
        let work = async move { super::graphs::progress(&node, &Caller::operator(), message).await };
        to_the_end(&self.node, true, work).await.map(Response::new)
    }

    async fn warmed(&self, request: Request<v1::WarmedRequest>) -> Answer<v1::WarmedReply> {
        let by = convert::node(&request.into_inner().node_id).map_err(wire_status)?;
        if self.cluster.warming.told(self.node.now(), by.number()) {
            self.cluster.beating.notify_one();
        }
        Ok(Response::new(v1::WarmedReply {}))
    }

    async fn context(&self, request: Request<v1::ContextRequest>) -> Answer<v1::ContextReply> {
        super::placing::of_peer(&self.node, &request.into_inner()).await.map(Response::new)
    }
}

impl PeerService {
    /// Waits until nothing of a lease is on its way any more, or the time is over.
    async fn wait_for(&self, lease: LeaseId, limit: Duration) {
        let arrived = |core: &Core| Ok::<_, Infallible>(core.export_waiting(lease) == 0);
        let Ok(()) = self.node.wait_until(Instant::now() + limit, arrived).await;
    }

    /// Makes frames readable, off the runtime where that takes a while.
    async fn expose(
        &self,
        transport: Arc<dyn Transport>,
        answers: Vec<Exported>,
    ) -> Result<(Vec<v1::ExportedShard>, Vec<Box<dyn Exposure>>), Status> {
        let arena = self.node.arena.clone();
        let waits = transport.expose_waits();
        let expose = move || {
            let mut exposures = Vec::new();
            let mut failure = None;
            let outcome = |outcome: v1::Outcome| v1::ExportedShard { outcome: outcome.into(), ..Default::default() };
            let shards = answers.into_iter().map(|answer| match answer {
                Exported::Missing => outcome(v1::Outcome::Missing),
                Exported::Late => outcome(v1::Outcome::Deferred),
                Exported::Ready(ready) => {
                    let (frame, meta) = *ready;
                    let Some(pin) = arena.pin(frame_id(frame, meta.bytes)) else {
                        return outcome(v1::Outcome::Missing);
                    };
                    match transport.expose(pin) {
                        Ok(exposure) => {
                            let descriptor = exposure.descriptor().as_bytes().clone();
                            exposures.push(exposure);
                            let meta = Some(convert::shard_meta(&meta, unix_ms()));
                            v1::ExportedShard { outcome: v1::Outcome::Applied.into(), descriptor, meta }
                        }
                        Err(error) => {
                            failure = Some(error.to_string());
                            outcome(v1::Outcome::Deferred)
                        }
                    }
                }
            });
            (shards.collect(), exposures, failure)
        };
        let (shards, exposures, failure): (Vec<_>, _, _) = if waits {
            tokio::task::spawn_blocking(expose).await.map_err(|_| Status::internal("exposing frames failed"))?
        } else {
            expose()
        };
        if let Some(error) = failure {
            tracing::warn!(error, "some frames could not be made readable for a peer");
        }
        Ok((shards, exposures))
    }
}

/// Ends a lease if the call that took it does not come to its end.
struct LeaseGuard<'a> {
    node: &'a Arc<Node>,
    lease: Option<LeaseId>,
}

impl LeaseGuard<'_> {
    fn keep(mut self) {
        self.lease = None;
    }
}

impl Drop for LeaseGuard<'_> {
    fn drop(&mut self) {
        if let Some(lease) = self.lease {
            self.node.with_core(|core, _| core.release_export(lease));
        }
    }
}

fn export_request(message: &v1::ExportRequest) -> Result<ExportRequest, Status> {
    let keys = message.keys.iter().map(ShardKey::try_from).collect::<Result<_, _>>().map_err(wire_status)?;
    Ok(ExportRequest {
        peer: convert::node(&message.node_id).map_err(wire_status)?.number(),
        peer_incarnation: message.node_incarnation,
        incarnation: message.incarnation,
        keys,
        ttl: Duration::from_millis(message.ttl_ms.into()),
    })
}

fn export_status(error: &ExportError) -> Status {
    match error {
        ExportError::Incarnation { .. } => Status::failed_precondition(error.to_string()),
        _ => Status::resource_exhausted(error.to_string()),
    }
}
