//! Calls to a daemon from tests that are not async.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kvtier_proto::convert::block_targets;
use kvtier_proto::v1;
use kvtier_proto::v1::admin_client::AdminClient;
use kvtier_proto::v1::engine_client::EngineClient;
use kvtier_proto::v1::kv_cache_client::KvCacheClient;
use kvtier_proto::v1::programs_client::ProgramsClient;
use kvtier_types::BlockKey;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status, Streaming};
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
        self.evict_from(v1::EvictRequest { targets: vec![block_targets(keys)], dry_run, ..Default::default() })
    }

    /// Evicts by verb, as the request says.
    ///
    /// # Errors
    /// The call's.
    pub fn evict_from(&self, request: v1::EvictRequest) -> Result<Vec<v1::TargetOutcome>, Status> {
        self.evict_everywhere(request).map(|reply| reply.outcomes)
    }

    /// Evicts by verb, as the request says, with what other nodes answered.
    ///
    /// # Errors
    /// The call's.
    pub fn evict_everywhere(&self, request: v1::EvictRequest) -> Result<v1::EvictReply, Status> {
        self.block_on(async { Ok(KvCacheClient::new(self.channel().await?).evict(request).await?.into_inner()) })
    }

    /// Claims blocks hard.
    ///
    /// # Errors
    /// The call's.
    pub fn pin(&self, request: v1::PinRequest) -> Result<v1::ClaimReply, Status> {
        self.block_on(async { Ok(KvCacheClient::new(self.channel().await?).pin(request).await?.into_inner()) })
    }

    /// Claims blocks softly.
    ///
    /// # Errors
    /// The call's.
    pub fn retain(&self, request: v1::RetainRequest) -> Result<v1::ClaimReply, Status> {
        self.block_on(async { Ok(KvCacheClient::new(self.channel().await?).retain(request).await?.into_inner()) })
    }

    /// Ends a claim, or a part of it.
    ///
    /// # Errors
    /// The call's.
    pub fn unpin(&self, request: v1::UnpinRequest) -> Result<v1::ClaimReply, Status> {
        self.block_on(async { Ok(KvCacheClient::new(self.channel().await?).unpin(request).await?.into_inner()) })
    }

    /// One page of claims.
    ///
    /// # Errors
    /// The call's.
    pub fn list_claims(&self, request: v1::ListClaimsRequest) -> Result<v1::ListClaimsReply, Status> {
        self.block_on(async { Ok(KvCacheClient::new(self.channel().await?).list_claims(request).await?.into_inner()) })
    }

    /// Ends all claims of an owner.
    ///
    /// # Errors
    /// The call's.
    pub fn release_claims(&self, owner: &str) -> Result<v1::ReleaseClaimsReply, Status> {
        let request = v1::ReleaseClaimsRequest { owner: owner.to_owned(), ..Default::default() };
        self.block_on(async {
            Ok(KvCacheClient::new(self.channel().await?).release_claims(request).await?.into_inner())
        })
    }

    /// Calls the KV-cache API.
    ///
    /// # Errors
    /// The call's.
    pub fn kv<T>(
        &self,
        call: impl AsyncFnOnce(KvCacheClient<Channel>) -> Result<Response<T>, Status>,
    ) -> Result<T, Status> {
        self.block_on(async { Ok(call(KvCacheClient::new(self.channel().await?)).await?.into_inner()) })
    }

    /// Moves blocks, and waits for the end.
    ///
    /// # Errors
    /// The calls'.
    pub fn move_to(&self, keys: &[BlockKey], to: v1::Tier) -> Result<Worked, Status> {
        let request = v1::MoveRequest { targets: vec![block_targets(keys)], to: to.into(), dry_run: false };
        self.work(async |mut client| client.r#move(request).await)
    }

    /// Prefetches what targets name, and waits for the end.
    ///
    /// # Errors
    /// The calls'.
    pub fn prefetch(&self, targets: Vec<v1::Target>, deadline_ms: u32) -> Result<Worked, Status> {
        let request = v1::PrefetchRequest { targets, deadline_ms, ..Default::default() };
        self.work(async |mut client| client.prefetch(request).await)
    }

    /// Begins an operation and waits for its end.
    ///
    /// # Errors
    /// The calls'.
    pub fn work(
        &self,
        call: impl AsyncFnOnce(KvCacheClient<Channel>) -> Result<Response<v1::OperationReply>, Status>,
    ) -> Result<Worked, Status> {
        let reply = self.kv(call)?;
        let outcomes = reply.outcomes.iter().map(v1::TargetOutcome::outcome).collect();
        if reply.operation_id.is_empty() {
            return Ok(Worked { outcomes, reasons: reply.outcomes, operation: None });
        }
        let request = v1::OperationRequest { operation_id: reply.operation_id, wait_ms: 15_000 };
        let operation = self.kv(async |mut client| client.wait_operation(request).await)?;
        Ok(Worked { outcomes, reasons: reply.outcomes, operation: Some(operation) })
    }

    /// Says what a program does.
    ///
    /// # Errors
    /// The call's.
    pub fn signal(&self, request: v1::SignalRequest) -> Result<v1::SignalReply, Status> {
        self.block_on(async { Ok(ProgramsClient::new(self.channel().await?).signal(request).await?.into_inner()) })
    }

    /// Calls the programs' API.
    ///
    /// # Errors
    /// The call's.
    pub fn of_programs<T>(
        &self,
        call: impl AsyncFnOnce(ProgramsClient<Channel>) -> Result<Response<T>, Status>,
    ) -> Result<T, Status> {
        self.block_on(async { Ok(call(ProgramsClient::new(self.channel().await?)).await?.into_inner()) })
    }

    /// Where to run a program's next step.
    ///
    /// # Errors
    /// The call's.
    pub fn place(&self, request: v1::PlaceRequest) -> Result<v1::PlaceReply, Status> {
        self.block_on(async { Ok(ProgramsClient::new(self.channel().await?).place(request).await?.into_inner()) })
    }

    /// The programs and sessions that the node knows.
    ///
    /// # Errors
    /// The call's.
    pub fn programs(&self) -> Result<Vec<v1::Program>, Status> {
        self.block_on(async {
            let mut client = ProgramsClient::new(self.channel().await?);
            let (mut programs, mut page_token) = (Vec::new(), Default::default());
            loop {
                let request = v1::ListProgramsRequest { page_size: 2, page_token };
                let page = client.list_programs(request).await?.into_inner();
                programs.extend(page.programs);
                page_token = page.next_page_token;
                if page_token.is_empty() {
                    return Ok(programs);
                }
            }
        })
    }

    /// A stream of block events.
    ///
    /// # Errors
    /// The call's.
    pub fn watch(&self, request: v1::WatchRequest) -> Result<Watch<'_>, Status> {
        let stream = self.kv(async |mut client| client.watch(request).await)?;
        Ok(Watch { control: self, stream })
    }

    /// What the node can do.
    ///
    /// # Errors
    /// The call's.
    pub fn capabilities(&self) -> Result<v1::CapabilitiesReply, Status> {
        self.kv(async |mut client| client.capabilities(v1::CapabilitiesRequest {}).await)
    }

    /// Adds taints, or says what blocks mean.
    ///
    /// # Errors
    /// The call's.
    pub fn taint(&self, request: v1::TaintRequest) -> Result<v1::TaintReply, Status> {
        self.block_on(async { Ok(KvCacheClient::new(self.channel().await?).taint(request).await?.into_inner()) })
    }

    /// Takes taints away.
    ///
    /// # Errors
    /// The call's.
    pub fn untaint(&self, request: v1::TaintRequest) -> Result<v1::TaintReply, Status> {
        self.block_on(async { Ok(KvCacheClient::new(self.channel().await?).untaint(request).await?.into_inner()) })
    }

    /// The rules in force.
    ///
    /// # Errors
    /// The call's.
    pub fn rules(&self) -> Result<v1::RulesReply, Status> {
        self.block_on(async {
            Ok(AdminClient::new(self.channel().await?).rules(v1::RulesRequest {}).await?.into_inner())
        })
    }

    /// Has the rules file read again.
    ///
    /// # Errors
    /// The call's.
    pub fn reload_rules(&self) -> Result<v1::RulesReply, Status> {
        let request = v1::ReloadRulesRequest {};
        self.block_on(async { Ok(AdminClient::new(self.channel().await?).reload_rules(request).await?.into_inner()) })
    }

    /// Which rule decided what of a block.
    ///
    /// # Errors
    /// The call's.
    pub fn explain_rules(&self, key: &BlockKey) -> Result<v1::ExplainRulesReply, Status> {
        let request = v1::ExplainRulesRequest { key: key.as_bytes().to_vec().into() };
        self.block_on(async { Ok(AdminClient::new(self.channel().await?).explain_rules(request).await?.into_inner()) })
    }

    /// Where blocks lie.
    ///
    /// # Errors
    /// The call's.
    pub fn locate(&self, keys: &[BlockKey]) -> Result<Vec<v1::BlockInfo>, Status> {
        let keys = keys.iter().map(|k| k.as_bytes().to_vec().into()).collect();
        let request = v1::LocateRequest { keys, ..Default::default() };
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

/// What came of a verb of movement.
#[derive(Debug)]
pub struct Worked {
    /// Outcomes at once.
    pub outcomes: Vec<v1::Outcome>,
    /// The same, with their reasons.
    pub reasons: Vec<v1::TargetOutcome>,
    /// The operation as it was after the wait, if there was one.
    pub operation: Option<v1::Operation>,
}

impl Worked {
    /// Blocks done and failed, of an operation that came to its end.
    ///
    /// # Panics
    /// When there was none, or it did not.
    #[must_use]
    pub fn done(&self) -> (u64, u64) {
        let operation = self.operation.as_ref().expect("an operation was begun");
        assert_eq!(operation.state(), v1::OperationState::Done, "{self:?}");
        (operation.done, operation.failed)
    }
}

/// A stream of block events.
#[derive(Debug)]
pub struct Watch<'a> {
    control: &'a Control,
    stream: Streaming<v1::WatchReply>,
}

impl Watch<'_> {
    /// The next answer, `None` at the stream's end.
    ///
    /// # Errors
    /// The stream's.
    pub fn next_reply(&mut self) -> Result<Option<v1::WatchReply>, Status> {
        let stream = &mut self.stream;
        self.control.block_on(async move { stream.message().await })
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
