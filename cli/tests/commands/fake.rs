//! A daemon that answers from a list of blocks, on a socket of its own, and remembers what it was asked.

mod admin;
mod cache;
mod long;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use kvtier_proto::v1::admin_server::AdminServer;
use kvtier_proto::v1::kv_cache_server::KvCacheServer;
use kvtier_proto::v1::programs_server::ProgramsServer;
use kvtier_proto::v1::{self, Outcome};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Code, Response, Status};

pub(crate) use admin::status;

pub(crate) type Answer<T> = Result<Response<T>, Status>;

/// What it was asked, of the verbs whose messages tests look at.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Asked {
    Locate(v1::LocateRequest),
    List(v1::ListRequest),
    Evict(v1::EvictRequest),
    Pin(v1::PinRequest),
    Unpin(v1::UnpinRequest),
    Retain(v1::RetainRequest),
    Release(v1::ReleaseClaimsRequest),
    Claims(v1::ListClaimsRequest),
    Move(v1::MoveRequest),
    Prefetch(v1::PrefetchRequest),
    Replicate(v1::ReplicateRequest),
    Commit(v1::CommitCheckpointRequest),
    Taint(v1::TaintRequest),
    Untaint(v1::TaintRequest),
    Hints(v1::ApplyHintsRequest),
    Signal(v1::SignalRequest),
    Declare(v1::DeclareRequest),
    Progress(v1::ProgressRequest),
    Next(v1::NextStepsRequest),
    Place(v1::PlaceRequest),
    Watch(v1::WatchRequest),
    Operation(&'static str, v1::OperationRequest),
}

/// Blocks by key; a page's token is the last key of the page before.
#[derive(Debug, Clone, Default)]
pub(crate) struct FakeDaemon {
    blocks: Arc<Mutex<BTreeMap<Vec<u8>, v1::BlockInfo>>>,
    leased: Vec<u8>,
    /// Largest page it hands out, so that tests see several.
    page: usize,
    asked: Arc<Mutex<Vec<Asked>>>,
    operations: Arc<Mutex<BTreeMap<String, v1::Operation>>>,
    /// It never answers Status.
    pub(crate) hangs: bool,
    /// It cannot make an eviction durable.
    pub(crate) journal_fails: bool,
    /// It answers so to every verb but Status.
    pub(crate) refuses: Option<Code>,
    /// Operations do not end by themselves.
    pub(crate) stuck: bool,
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
            ..Self::default()
        }
    }

    /// How many blocks are left.
    pub(crate) fn len(&self) -> usize {
        self.blocks.lock().expect("a fake works").len()
    }

    /// What it was asked so far, in order, but for the lists that complete prefixes.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.asked.lock().expect("a fake works").clone()
    }

    /// The last that it was asked.
    pub(crate) fn last(&self) -> Asked {
        self.asked().pop().expect("something was asked")
    }

    /// Remembers what was asked; refuses it where it refuses all.
    fn note(&self, asked: Asked) -> Result<(), Status> {
        self.asked.lock().expect("a fake works").push(asked);
        match self.refuses {
            Some(code) => Err(Status::new(code, "the fake refuses")),
            None => Ok(()),
        }
    }

    /// What becomes of each target: of block keys one by one, of others as a whole.
    fn outcomes(&self, targets: &[v1::Target]) -> Vec<v1::TargetOutcome> {
        let blocks = self.blocks.lock().expect("a fake works");
        let mut outcomes = Vec::new();
        for (index, target) in targets.iter().enumerate() {
            let keys = packed(std::slice::from_ref(target));
            let target = u32::try_from(index).expect("few targets");
            if keys.is_empty() {
                let outcome = Outcome::Applied.into();
                outcomes.push(v1::TargetOutcome { outcome, target, blocks: 2, bytes: 131_072, ..Default::default() });
            }
            for key in keys {
                let known = blocks.contains_key(key.as_ref());
                let outcome = if known { Outcome::Applied } else { Outcome::Missing };
                outcomes.push(v1::TargetOutcome { key, outcome: outcome.into(), target, ..Default::default() });
            }
        }
        outcomes
    }

    /// Serves on a fresh socket.
    pub(crate) fn serve(&self) -> Served {
        let dir = tempfile::tempdir().expect("a fake works");
        let socket = dir.path().join("kvtierd.sock");
        let task = self.serve_at(&socket);
        Served { socket, task, _dir: dir }
    }

    /// Serves on this socket, as long as the runtime lives.
    pub(crate) fn serve_at(&self, socket: &Path) -> tokio::task::JoinHandle<()> {
        let incoming = UnixListenerStream::new(UnixListener::bind(socket).expect("a fake works"));
        let server = tonic::transport::Server::builder()
            .add_service(KvCacheServer::new(self.clone()))
            .add_service(ProgramsServer::new(self.clone()))
            .add_service(AdminServer::new(self.clone()));
        tokio::spawn(async move { server.serve_with_incoming(incoming).await.expect("a fake works") })
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
        ..v1::BlockInfo::default()
    }
}

/// Keys of targets that are block keys.
fn packed(targets: &[v1::Target]) -> Vec<bytes::Bytes> {
    let keys = targets.iter().filter_map(|t| match &t.target {
        Some(v1::target::Target::Blocks(blocks)) => Some(blocks.keys.clone()),
        _ => None,
    });
    keys.flat_map(|keys| keys.chunks(32).map(|k| k.to_vec().into()).collect::<Vec<_>>()).collect()
}
