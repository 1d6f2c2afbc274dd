//! `Admin`: the state of the node.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use kvtier_policy::directory::{NodeRecord, NodeState};
use kvtier_policy::{Core, TierUse};
use kvtier_proto::{convert, v1};
use kvtier_storage::BlockStore;
use kvtier_transport::Transport;
use kvtier_types::{BlockKey, Origin, SemanticType, Tier};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status};

use super::caller::Caller;
use super::{rules, wire_status};
use crate::cluster::{self, DrainReport};
use crate::node::Node;

/// Progress reports of a drain that wait for their listener.
const DRAIN_EVENTS: usize = 16;

/// The service over one node.
#[derive(Debug, Clone)]
pub(crate) struct AdminService(pub(crate) Arc<Node>);

#[tonic::async_trait]
impl v1::admin_server::Admin for AdminService {
    async fn status(&self, request: Request<v1::StatusRequest>) -> Result<Response<v1::StatusReply>, Status> {
        Caller::of(&self.0, &request)?;
        Ok(Response::new(status(&self.0)))
    }

    async fn nodes(&self, request: Request<v1::NodesRequest>) -> Result<Response<v1::NodesReply>, Status> {
        Caller::of(&self.0, &request)?;
        Ok(Response::new(nodes(&self.0)))
    }

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Result<Response<BoxStream<v1::DrainEvent>>, Status> {
        Caller::operator_of(&self.0, &request)?;
        drain(&self.0, &request.into_inner()).await.map(Response::new)
    }

    async fn rules(&self, request: Request<v1::RulesRequest>) -> Result<Response<v1::RulesReply>, Status> {
        // They name other tenants.
        Caller::operator_of(&self.0, &request)?;
        Ok(Response::new(rules::in_force(&self.0)))
    }

    async fn reload_rules(&self, request: Request<v1::ReloadRulesRequest>) -> Result<Response<v1::RulesReply>, Status> {
        Caller::operator_of(&self.0, &request)?;
        Ok(Response::new(rules::reload(&self.0).await))
    }

    async fn explain_rules(
        &self,
        request: Request<v1::ExplainRulesRequest>,
    ) -> Result<Response<v1::ExplainRulesReply>, Status> {
        let caller = Caller::of(&self.0, &request)?;
        rules::explain(&self.0, &caller, &request.into_inner()).map(Response::new)
    }
}

/// Drains this node, or has another one drain itself.
pub(crate) async fn drain(node: &Arc<Node>, request: &v1::DrainRequest) -> Result<BoxStream<v1::DrainEvent>, Status> {
    let other = !request.node_id.is_empty() && request.node_id != node.config.node_id;
    if other {
        let id = convert::node(&request.node_id).map_err(wire_status)?;
        let cluster = node.cluster.as_ref().ok_or_else(|| Status::unavailable("this node is in no cluster"))?;
        let client = cluster.peer_client(node, &id).await;
        let mut client = client.map_err(|e| Status::unavailable(format!("{id} cannot be asked to drain: {e}")))?;
        let events = client.drain(request.clone()).await?.into_inner();
        return Ok(Box::pin(events));
    }
    let limit = match request.deadline_ms {
        0 => node.config.limits.drain.0,
        millis => Duration::from_millis(millis.into()),
    };
    let (events, queue) = mpsc::channel(DRAIN_EVENTS);
    let of_task = Arc::clone(node);
    node.tasks.spawn(async move {
        // A slow listener misses some progress, but not the end.
        let report = cluster::drain(&of_task, limit, |report| drop(events.try_send(Ok(event(report, false))))).await;
        tracing::info!(?report, "drained");
        drop(events.send(Ok(event(&report, true))).await);
    });
    Ok(Box::pin(ReceiverStream::new(queue)))
}

fn event(report: &DrainReport, done: bool) -> v1::DrainEvent {
    let failure = |(reason, (shards, keys)): (&String, &(u64, Vec<BlockKey>))| v1::DrainFailure {
        reason: reason.clone(),
        shards: *shards,
        keys: keys.iter().map(|k| k.as_bytes().to_vec().into()).collect(),
    };
    v1::DrainEvent {
        examined: report.examined,
        safe: report.safe,
        to_object: report.to_object,
        to_peers: report.to_peers,
        failures: report.failures.iter().map(failure).collect(),
        done,
    }
}

fn nodes(node: &Arc<Node>) -> v1::NodesReply {
    let Some(cluster) = &node.cluster else { return v1::NodesReply::default() };
    let now = node.now();
    let state = match cluster.directory_state().away {
        None => "ok".to_owned(),
        Some((since, reason)) => format!("away for {} s: {reason}", now.since(since).as_secs()),
    };
    let info = |record: NodeRecord| {
        let number = record.id.number();
        let paused = node.read_core(|core| core.members().get(number).is_some_and(|m| m.paused(now)));
        let (transport, read_bytes) = cluster.link_of(number);
        v1::NodeInfo {
            node_id: record.id.to_string(),
            incarnation: record.edition.incarnation(),
            state: match record.state {
                NodeState::Draining => "draining",
                NodeState::Ready if paused => "paused",
                NodeState::Ready if record.warming => "warming",
                NodeState::Ready => "ready",
            }
            .to_owned(),
            peer: record.peer,
            free_host_bytes: record.free_host_bytes,
            this: record.id == cluster.id,
            transport,
            read_bytes,
        }
    };
    v1::NodesReply {
        directory: node.config.cluster.directory.clone(),
        directory_state: state,
        nodes: cluster.records().into_iter().map(info).collect(),
        unpublished: node.read_core(|core| core.publication_state().0 as u64),
    }
}

fn transports(node: &Node) -> Vec<v1::TransportStatus> {
    let status = |(kind, transport): (&'static str, Result<&Arc<dyn Transport>, &str>)| {
        let stats = transport.map(|t| t.stats()).unwrap_or_default();
        v1::TransportStatus {
            kind: kind.to_owned(),
            state: transport.err().unwrap_or("ok").to_owned(),
            read_bytes: stats.read_bytes,
            served_bytes: stats.served_bytes,
            failed_reads: stats.failed_reads,
            links: stats.links,
        }
    };
    node.cluster.as_ref().map(|c| c.transports.iter().map(status).collect()).unwrap_or_default()
}

fn status(node: &Arc<Node>) -> v1::StatusReply {
    let count = |(name, value): (&str, u64)| v1::Count { name: name.to_owned(), value };
    let now = node.now();
    let uptime_ms = u64::try_from(node.uptime().as_millis()).unwrap_or(u64::MAX);
    // Behind a lock that is taken before the core's.
    let ahead = node.ahead.counts();
    node.read_core(|core| v1::StatusReply {
        node_id: node.config.node_id.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        incarnation: node.incarnation,
        uptime_ms,
        state: if node.is_draining() { "draining" } else { "serving" }.to_owned(),
        tiers: Tier::ALL.into_iter().map(|tier| tier_status(node, core, tier)).collect(),
        attachments: core
            .attachments()
            .into_iter()
            .map(|a| v1::AttachmentStatus {
                engine_id: a.spec.engine,
                role: a.spec.role.name().to_owned(),
                rank: a.spec.rank,
                pid: a.spec.pid,
                model: a.spec.namespace.model,
                leases: u32::try_from(a.leases).unwrap_or(u32::MAX),
                reservations: u32::try_from(a.reservations).unwrap_or(u32::MAX),
                age_ms: u64::try_from(now.since(a.since).as_millis()).unwrap_or(u64::MAX),
            })
            .collect(),
        ledger: core.ledger().rows().map(count).collect(),
        looked_up_tokens: core.ledger().looked_up(),
        blocks_loaded: Origin::ALL.into_iter().map(|o| count((o.name(), core.counts().loaded[o.index()]))).collect(),
        corrupt_blocks: core.counts().corrupt,
        notes: node.notes.clone(),
        transports: transports(node),
        cluster: cluster_counts(node, core).map(count).to_vec(),
        types: types(core),
        policy: claim_counts(core)
            .chain(mark_counts(node, core))
            .chain(node.hints.counts.sums())
            .chain(ahead)
            .chain(spread_counts(core))
            .map(count)
            .collect(),
    })
}

/// What became of copies that other nodes had made here ahead of their use.
fn spread_counts(core: &Core) -> [(&'static str, u64); 5] {
    let counts = core.spread_counts();
    [
        ("spread_useful_bytes", counts.useful_bytes),
        ("spread_late_bytes", counts.late_bytes),
        ("spread_wasted_bytes", counts.wasted_bytes),
        ("spread_refused_bytes", counts.refused_bytes),
        ("spread_unread_bytes", counts.unread_bytes),
    ]
}

/// Claims and what became of calls for them.
pub(crate) fn claim_counts(core: &Core) -> impl Iterator<Item = (&'static str, u64)> {
    let [pins, retains, hints, stems] = core.claims_held().map(|(_, count)| count);
    let counts = core.claim_counts();
    [
        ("claims_pin", pins),
        ("claims_retain", retains),
        ("claims_hint_blocks", hints),
        ("claims_stem_blocks", stems),
        ("claims_made", counts.made),
        ("claims_clipped", counts.clipped),
        ("claims_rejected", counts.rejected),
        ("claims_expired", counts.expired),
        ("claims_released", counts.released),
        ("claimed_host_bytes", core.claimed(Tier::Host).0),
        ("claimed_disk_bytes", core.claimed(Tier::Disk).0),
    ]
    .into_iter()
}

/// Copies by type and tier.
fn types(core: &Core) -> Vec<v1::TypeUse> {
    let pairs = SemanticType::ALL.into_iter().flat_map(|semantic| Tier::ALL.map(|tier| (semantic, tier)));
    let rows = pairs.map(|(semantic, tier)| (semantic, tier, core.type_use(semantic, tier)));
    let row = |(semantic, tier, use_): (SemanticType, Tier, TierUse)| v1::TypeUse {
        semantic: v1::SemanticType::from(semantic).into(),
        tier: v1::Tier::from(tier).into(),
        copies: use_.copies,
        bytes: use_.bytes,
    };
    rows.filter(|(_, _, use_)| use_.copies > 0).map(row).collect()
}

/// Taints, rules, and what became of blocks by them.
pub(crate) fn mark_counts(node: &Node, core: &Core) -> [(&'static str, u64); 7] {
    let (counts, rules) = (core.counts(), node.rules.state());
    [
        ("marked_blocks", core.marks() as u64),
        ("kept_host_bytes", core.kept_use(Tier::Host).bytes),
        ("kept_disk_bytes", core.kept_use(Tier::Disk).bytes),
        ("keeps_clipped", counts.clipped_keeps),
        ("expired_blocks", counts.expired_blocks),
        ("rules_generation", rules.generation),
        ("rules_refused", u64::from(!rules.refused.is_empty())),
    ]
}

/// What this node did for and with others.
pub(crate) fn cluster_counts(node: &Node, core: &Core) -> [(&'static str, u64); 4] {
    let counts = core.counts();
    let floor_reads = node.cluster.as_ref().map_or(0, |c| c.floor_reads.load(Ordering::Relaxed));
    [
        ("exported", counts.exported),
        ("expired_exports", counts.expired_exports),
        ("fetches_given_up", counts.fetches_given_up),
        ("read_from_others_packs", floor_reads),
    ]
}

fn tier_status(node: &Arc<Node>, core: &Core, tier: Tier) -> v1::TierStatus {
    let usage = core.tier_use(tier);
    let mut status = v1::TierStatus {
        tier: v1::Tier::from(tier).into(),
        state: "ok".into(),
        used_bytes: usage.bytes,
        blocks: usage.copies,
        ..Default::default()
    };
    match tier {
        Tier::Device => {
            let stats = node.devices.stats();
            status.capacity_bytes = stats.capacity_bytes;
            status.used_bytes = stats.used_bytes;
            status.pending_writes = core.pending_device_copies() as u64;
            let absent = node.devices.why_absent();
            if absent.is_some() {
                status.state = "absent".into();
            }
            status.detail = absent.unwrap_or_else(|| node.devices.describe());
        }
        Tier::Host => {
            let stats = node.arena.stats();
            status.capacity_bytes = stats.capacity_bytes;
            status.used_bytes = stats.used_bytes;
            let pages = stats.bytes_by_page_kind.iter().map(|(kind, bytes)| format!("{kind} {} MiB", bytes >> 20));
            status.detail = pages.collect::<Vec<_>>().join(", ");
            status.pending_writes = core.pending_onboards() as u64;
        }
        Tier::Disk => store_status(&mut status, node, node.stores.disk.as_deref().map(|d| d as &dyn BlockStore), tier),
        Tier::Object => {
            store_status(&mut status, node, node.stores.object.as_deref().map(|o| o as &dyn BlockStore), tier);
        }
    }
    if tier == Tier::Disk
        && let Some(disk) = &node.stores.disk
    {
        disk.describe().clone_into(&mut status.detail);
        status.pending_writes = core.pending_offloads() as u64;
        if let Err(error) = disk.health() {
            status.state = "poisoned".into();
            status.detail = error.to_string();
        }
    }
    status
}

fn store_status(status: &mut v1::TierStatus, node: &Node, store: Option<&dyn BlockStore>, tier: Tier) {
    if let Some(store) = store {
        let usage = store.usage();
        status.capacity_bytes = usage.capacity_bytes;
        status.used_bytes = usage.used_bytes;
        status.pending_writes = usage.pending_writes;
    } else {
        status.state = "absent".into();
        status.detail = node.stores.absent.get(&tier).cloned().unwrap_or_default();
    }
}
