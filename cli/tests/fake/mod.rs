//! A daemon that answers from a list of blocks, on a socket of its own.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use kvtier_proto::v1::admin_server::{Admin, AdminServer};
use kvtier_proto::v1::kv_cache_server::{KvCache, KvCacheServer};
use kvtier_proto::v1::{self, Outcome};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

/// Blocks by key; a page's token is the last key of the page before.
#[derive(Debug, Clone, Default)]
pub(crate) struct FakeDaemon {
    blocks: Arc<Mutex<BTreeMap<Vec<u8>, v1::BlockInfo>>>,
    leased: Vec<u8>,
    /// Largest page it hands out, so that tests see several.
    page: usize,
    /// It never answers Status.
    pub(crate) hangs: bool,
    /// It cannot make an eviction durable.
    pub(crate) journal_fails: bool,
}

/// A daemon that serves while this lives.
#[derive(Debug)]
pub(crate) struct Served {
    /// Where.
    pub(crate) socket: PathBuf,
    task: tokio::task::JoinHandle<()>,
    _dir: tempfile::TempDir,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl FakeDaemon {
    /// With these blocks, each given as key and tier; `leased` cannot be evicted now.
    pub(crate) fn new(blocks: &[(String, v1::Tier)], leased: &str) -> Self {
        let blocks =
            blocks.iter().map(|(key, tier)| (hex::decode(key).expect("a fake works"), info(key, *tier))).collect();
        Self {
            blocks: Arc::new(Mutex::new(blocks)),
            leased: hex::decode(leased).expect("a fake works"),
            page: 3,
            hangs: false,
            journal_fails: false,
        }
    }

    /// How many blocks are left.
    pub(crate) fn len(&self) -> usize {
        self.blocks.lock().expect("a fake works").len()
    }

    /// Serves on a fresh socket.
    pub(crate) fn serve(&self) -> Served {
        let dir = tempfile::tempdir().expect("a fake works");
        let socket = dir.path().join("kvtierd.sock");
        let incoming = UnixListenerStream::new(UnixListener::bind(&socket).expect("a fake works"));
        let server = tonic::transport::Server::builder()
            .add_service(KvCacheServer::new(self.clone()))
            .add_service(AdminServer::new(self.clone()));
        let task = tokio::spawn(async move { server.serve_with_incoming(incoming).await.expect("a fake works") });
        Served { socket, task, _dir: dir }
    }
}

fn info(key: &str, tier: v1::Tier) -> v1::BlockInfo {
    let replica = v1::Replica {
        shard: 0,
        layout_id: vec![7; 32].into(),
        tier: tier.into(),
        bytes: 65_536,
        checksum: 0xfedc_ba98_7654_3210,
        place: "extent 0 offset 4096".to_owned(),
        node_id: "node-1".to_owned(),
    };
    v1::BlockInfo {
        key: hex::decode(key).expect("a fake works").into(),
        outcome: Outcome::Applied.into(),
        replicas: vec![replica],
        model: "tiny-llama".to_owned(),
        tenant: "shared".to_owned(),
        program_id: String::new(),
        semantic: v1::SemanticType::SystemPrompt.into(),
        leases: 0,
        depth_blocks: 1,
    }
}

#[tonic::async_trait]
impl KvCache for FakeDaemon {
    async fn locate(&self, request: Request<v1::LocateRequest>) -> Result<Response<v1::LocateReply>, Status> {
        let blocks = self.blocks.lock().expect("a fake works");
        let missing = |key: &[u8]| v1::BlockInfo {
            key: key.to_vec().into(),
            outcome: Outcome::Missing.into(),
            ..v1::BlockInfo::default()
        };
        let keys = request.into_inner().keys;
        let found = keys.iter().map(|key| blocks.get(key.as_ref()).cloned().unwrap_or_else(|| missing(key)));
        Ok(Response::new(v1::LocateReply { node_id: "node-1".to_owned(), blocks: found.collect() }))
    }

    async fn list(&self, request: Request<v1::ListRequest>) -> Result<Response<v1::ListReply>, Status> {
        let request = request.into_inner();
        let page = self.page.min(request.page_size as usize);
        let blocks = self.blocks.lock().expect("a fake works");
        let mut matching: Vec<v1::BlockInfo> = blocks
            .iter()
            .filter(|(key, _)| key.as_slice() > request.page_token.as_ref())
            .filter(|(_, b)| request.tier == 0 || b.replicas.iter().any(|r| r.tier == request.tier))
            .filter(|(_, b)| b.model.contains(&request.model_contains))
            .map(|(_, b)| b.clone())
            .take(page + 1)
            .collect();
        let more = matching.len() > page;
        matching.truncate(page);
        let next_page_token = matching.last().filter(|_| more).map(|b| b.key.clone()).unwrap_or_default();
        Ok(Response::new(v1::ListReply { blocks: matching, next_page_token }))
    }

    async fn evict(&self, request: Request<v1::EvictRequest>) -> Result<Response<v1::EvictReply>, Status> {
        let request = request.into_inner();
        if self.journal_fails {
            return Err(Status::unavailable("nothing was evicted: the journal cannot be written"));
        }
        let mut blocks = self.blocks.lock().expect("a fake works");
        let mut outcomes = Vec::new();
        for key in request.keys {
            let (outcome, reason) = if key.as_ref() == self.leased.as_slice() {
                (Outcome::Deferred, "1 lease")
            } else if blocks.contains_key(key.as_ref()) {
                if !request.dry_run {
                    blocks.remove(key.as_ref());
                }
                (Outcome::Applied, "")
            } else {
                (Outcome::Missing, "")
            };
            outcomes.push(v1::TargetOutcome { key, outcome: outcome.into(), reason: reason.to_owned() });
        }
        Ok(Response::new(v1::EvictReply { outcomes }))
    }
}

#[tonic::async_trait]
impl Admin for FakeDaemon {
    async fn nodes(&self, _: Request<v1::NodesRequest>) -> Result<Response<v1::NodesReply>, Status> {
        Err(Status::unimplemented("this daemon is alone"))
    }

    type DrainStream = std::pin::Pin<Box<dyn tokio_stream::Stream<Item = Result<v1::DrainEvent, Status>> + Send>>;

    async fn drain(&self, _: Request<v1::DrainRequest>) -> Result<Response<Self::DrainStream>, Status> {
        Err(Status::unimplemented("this daemon is alone"))
    }

    async fn status(&self, _request: Request<v1::StatusRequest>) -> Result<Response<v1::StatusReply>, Status> {
        if self.hangs {
            std::future::pending::<()>().await;
        }
        Ok(Response::new(status()))
    }
}

/// The status it gives.
pub(crate) fn status() -> v1::StatusReply {
    let count = |name: &str, value| v1::Count { name: name.to_owned(), value };
    v1::StatusReply {
        node_id: "node-1".to_owned(),
        version: "0.1.0".to_owned(),
        incarnation: 3,
        uptime_ms: 3_725_000,
        state: "serving".to_owned(),
        tiers: vec![
            v1::TierStatus {
                tier: v1::Tier::Host.into(),
                state: "ok".to_owned(),
                detail: "hugepages".to_owned(),
                capacity_bytes: 4 << 30,
                used_bytes: 1 << 30,
                blocks: 1_000,
                pending_writes: 0,
            },
            v1::TierStatus { tier: v1::Tier::Object.into(), state: "absent".to_owned(), ..v1::TierStatus::default() },
        ],
        attachments: vec![v1::AttachmentStatus {
            engine_id: "engine-a".to_owned(),
            role: "worker".to_owned(),
            rank: 0,
            pid: 42,
            model: "tiny-llama".to_owned(),
            leases: 2,
            reservations: 1,
            age_ms: 61_000,
        }],
        ledger: vec![count("host", 600), count("disk", 150), count("novel", 250)],
        looked_up_tokens: 1_000,
        blocks_loaded: vec![count("host", 40), count("disk", 10)],
        corrupt_blocks: 1,
        notes: vec!["disk: recovered 12 records".to_owned()],
        transports: Vec::new(),
        cluster: Vec::new(),
    }
}
