//! `Admin`: the state of the node.

use std::sync::Arc;

use kvtier_policy::Core;
use kvtier_proto::v1;
use kvtier_storage::BlockStore;
use kvtier_types::Tier;
use tonic::{Request, Response, Status};

use crate::node::Node;

/// The service over one node.
#[derive(Debug, Clone)]
pub(crate) struct AdminService(pub(crate) Arc<Node>);

#[tonic::async_trait]
impl v1::admin_server::Admin for AdminService {
    async fn status(&self, _request: Request<v1::StatusRequest>) -> Result<Response<v1::StatusReply>, Status> {
        Ok(Response::new(status(&self.0)))
    }
}

fn status(node: &Arc<Node>) -> v1::StatusReply {
    let count = |(name, value): (&str, u64)| v1::Count { name: name.to_owned(), value };
    let now = node.now();
    let uptime_ms = u64::try_from(node.uptime().as_millis()).unwrap_or(u64::MAX);
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
        blocks_loaded: Tier::ALL.into_iter().map(|t| count((t.name(), core.counts().loaded[t.index()]))).collect(),
        corrupt_blocks: core.counts().corrupt,
        notes: node.notes.clone(),
    })
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
            status.state = "absent".into();
            status.detail = "this build has no device tier".into();
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
