//! Calls to a daemon from tests that are not async.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kvtier_proto::v1;
use kvtier_proto::v1::admin_client::AdminClient;
use kvtier_proto::v1::engine_client::EngineClient;
use kvtier_proto::v1::kv_cache_client::KvCacheClient;
use kvtier_types::BlockKey;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};

/// Longest that one call may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(20);

/// Connects anew for every call, so that it never mistakes a new daemon for the old one.
#[derive(Debug)]
pub struct Control {
    socket: PathBuf,
    runtime: Runtime,
}

impl Control {
    /// For the daemon at a socket.
    ///
    /// # Panics
    /// When the system has no more threads.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        Self { socket: socket.to_owned(), runtime: runtime.expect("a runtime") }
    }

    /// Runs a future to its end.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    async fn channel(&self) -> Result<Channel, Status> {
        let endpoint = Endpoint::new(format!("unix://{}", self.socket.display())).expect("a path makes a URI");
        let connecting = tokio::time::timeout(CALL_TIMEOUT, endpoint.timeout(CALL_TIMEOUT).connect()).await;
        let unavailable = |what: String| Status::unavailable(what);
        connecting.map_err(|_| unavailable("no answer".into()))?.map_err(|e| unavailable(e.to_string()))
    }

    /// Whether the daemon says that it serves.
    #[must_use]
    pub fn serves(&self) -> bool {
        self.block_on(async {
            let Ok(channel) = self.channel().await else { return false };
            let service = "kvtier.v1.Engine".to_owned();
            let checked = HealthClient::new(channel).check(HealthCheckRequest { service }).await;
            checked.is_ok_and(|reply| reply.into_inner().status == i32::from(ServingStatus::Serving))
        })
    }

    /// State of the node.
    ///
    /// # Errors
    /// The call's.
    pub fn status(&self) -> Result<v1::StatusReply, Status> {
        self.block_on(async {
            Ok(AdminClient::new(self.channel().await?).status(v1::StatusRequest {}).await?.into_inner())
        })
    }

    /// Evicts by verb, from all tiers.
    ///
    /// # Errors
    /// The call's.
    pub fn evict(&self, keys: &[BlockKey], dry_run: bool) -> Result<Vec<v1::TargetOutcome>, Status> {
        let keys = keys.iter().map(|k| k.as_bytes().to_vec().into()).collect();
        self.evict_from(v1::EvictRequest { keys, tiers: Vec::new(), dry_run })
    }

    /// Evicts by verb, as the request says.
    ///
    /// # Errors
    /// The call's.
    pub fn evict_from(&self, request: v1::EvictRequest) -> Result<Vec<v1::TargetOutcome>, Status> {
        self.block_on(async {
            Ok(KvCacheClient::new(self.channel().await?).evict(request).await?.into_inner().outcomes)
        })
    }

    /// Where blocks lie.
    ///
    /// # Errors
    /// The call's.
    pub fn locate(&self, keys: &[BlockKey]) -> Result<Vec<v1::BlockInfo>, Status> {
        let keys = keys.iter().map(|k| k.as_bytes().to_vec().into()).collect();
        let request = v1::LocateRequest { keys, local_only: false };
        self.block_on(async {
            Ok(KvCacheClient::new(self.channel().await?).locate(request).await?.into_inner().blocks)
        })
    }

    /// The nodes of the cluster.
    ///
    /// # Errors
    /// The call's.
    pub fn nodes(&self) -> Result<v1::NodesReply, Status> {
        self.block_on(async {
            Ok(AdminClient::new(self.channel().await?).nodes(v1::NodesRequest {}).await?.into_inner())
        })
    }

    /// Drains a node to the end.
    ///
    /// # Errors
    /// The call's.
    pub fn drain(&self, node_id: &str) -> Result<v1::DrainEvent, Status> {
        self.block_on(async {
            let request = v1::DrainRequest { node_id: node_id.to_owned(), deadline_ms: 20_000 };
            let mut events = AdminClient::new(self.channel().await?).drain(request).await?.into_inner();
            let mut last = v1::DrainEvent::default();
            while let Some(event) = events.message().await? {
                last = event;
            }
            Ok(last)
        })
    }

    /// One page of a listing.
    ///
    /// # Errors
    /// The call's.
    pub fn list(&self, request: v1::ListRequest) -> Result<v1::ListReply, Status> {
        self.block_on(async { Ok(KvCacheClient::new(self.channel().await?).list(request).await?.into_inner()) })
    }

    /// The engine's service, for calls that no connector would make.
    ///
    /// # Errors
    /// When there is no connection to be had.
    pub fn engine(&self) -> Result<EngineClient<Channel>, Status> {
        self.block_on(async { Ok(EngineClient::new(self.channel().await?)) })
    }

    /// Attaches by hand; the attachment lives as long as what is returned.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn attach(&self, request: v1::AttachRequest) -> Result<Attached<'_>, Status> {
        let mut client = self.engine()?;
        self.block_on(async move {
            let mut stream = client.attach(Request::new(request)).await?.into_inner();
            let first = stream.message().await?.and_then(|event| event.event);
            match first {
                Some(v1::attach_event::Event::Attached(said)) => Ok(Attached { control: self, client, said, stream }),
                other => Err(Status::internal(format!("the first event is {other:?}"))),
            }
        })
    }
}

/// An attachment made by hand.
#[derive(Debug)]
pub struct Attached<'a> {
    control: &'a Control,
    client: EngineClient<Channel>,
    /// What the daemon said.
    pub said: v1::Attached,
    stream: Streaming<v1::AttachEvent>,
}

impl Attached<'_> {
    /// Looks up.
    ///
    /// # Errors
    /// The call's.
    pub fn lookup(&self, mut request: v1::LookupRequest) -> Result<v1::LookupReply, Status> {
        request.attachment = self.said.attachment.clone();
        let mut client = self.client.clone();
        self.control.block_on(async move { Ok(client.lookup(request).await?.into_inner()) })
    }

    /// Reserves.
    ///
    /// # Errors
    /// The call's.
    pub fn reserve(&self, mut request: v1::ReserveRequest) -> Result<v1::ReserveReply, Status> {
        request.attachment = self.said.attachment.clone();
        let mut client = self.client.clone();
        self.control.block_on(async move { Ok(client.reserve(request).await?.into_inner()) })
    }

    /// Seals.
    ///
    /// # Errors
    /// The call's.
    pub fn seal(&self, frames: Vec<v1::SealedFrame>) -> Result<Vec<i32>, Status> {
        let request = v1::SealRequest { attachment: self.said.attachment.clone(), frames };
        let mut client = self.client.clone();
        self.control.block_on(async move { Ok(client.seal(request).await?.into_inner().outcomes) })
    }

    /// Reports loads.
    ///
    /// # Errors
    /// The call's.
    pub fn report_loads(&self, request_id: &str, frames: Vec<v1::LoadedFrame>) -> Result<(), Status> {
        let attachment = self.said.attachment.clone();
        let request = v1::ReportLoadsRequest { attachment, request_id: request_id.into(), frames };
        let mut client = self.client.clone();
        self.control.block_on(async move { client.report_loads(request).await.map(drop) })
    }

    /// The next event of the stream, `None` at its end.
    ///
    /// # Errors
    /// The stream's.
    pub fn event(&mut self) -> Result<Option<v1::attach_event::Event>, Status> {
        let stream = &mut self.stream;
        self.control.block_on(async move { Ok(stream.message().await?.and_then(|event| event.event)) })
    }
}
