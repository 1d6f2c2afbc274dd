//! `Engine`: the data path's control messages. Unix socket only.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use kvtier_memory::PAGE_BYTES;
use kvtier_policy::{
    AnswerFrame, AttachSpec, AttachmentId, CoreError, FrameRef, LoadReport, LoadResult, Look, LookupAnswer,
    LookupRange, LookupRequest, ReleaseReport, Reservation, ReserveRequest, Role, SealOutcome, SealRequest,
};
use kvtier_proto::{PROTOCOL_VERSION, convert, v1};
use kvtier_types::{DeviceId, DeviceNumber, Namespace, Origin, TenantId};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use tokio_stream::Stream;
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status};

use super::caller::Caller;
use super::{attachment, core_status, hinting, wire_status};
use crate::cluster;
use crate::node::{Node, Token};

/// Longest engine id, in bytes.
const MAX_ENGINE_ID_BYTES: usize = 256;
/// How long a reservation waits for memory that is being made ready.
const GROWTH_WAIT: Duration = Duration::from_millis(500);
/// Heartbeats in the time after which an attachment is dead.
const HEARTBEATS_PER_TTL: u32 = 5;

/// The service over one node.
#[derive(Debug, Clone)]
pub(crate) struct EngineService(pub(crate) Arc<Node>);

/// The stream of an attachment: it detaches when it is dropped, which is when the client's connection is gone.
pub(crate) struct AttachStream {
    first: Option<v1::AttachEvent>,
    events: mpsc::Receiver<String>,
    node: Arc<Node>,
    token: Token,
}

impl Stream for AttachStream {
    type Item = Result<v1::AttachEvent, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(first)));
        }
        let detach = |reason| v1::AttachEvent { event: Some(v1::attach_event::Event::Detach(v1::Detach { reason })) };
        self.events.poll_recv(cx).map(|reason| reason.map(|r| Ok(detach(r))))
    }
}

impl Drop for AttachStream {
    fn drop(&mut self) {
        self.node.shut_door(&self.token);
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl v1::engine_server::Engine for EngineService {
    async fn attach(&self, request: Request<v1::AttachRequest>) -> Answer<BoxStream<v1::AttachEvent>> {
        let node = &self.0;
        let caller = Caller::of(node, &request)?;
        let tenant = (!caller.operator).then_some(caller.tenant);
        let message = request.into_inner();
        if node.is_draining() {
            return Err(Status::unavailable("the daemon is stopping; attach again later"));
        }
        let spec = attach_spec(node, &message)?;
        let (model, layout) = (spec.namespace.model.clone(), spec.layout.clone());
        let id = node.with_core(|core, now| core.attach(now, spec)).map_err(|e| core_status(&e))?;
        let opened = node.open_door(id, tenant);
        let Ok((token, events)) = opened else {
            node.with_core(|core, _| core.detach(id));
            return Err(Status::internal("no random bytes for an attachment's name"));
        };
        let differences = node.note_layout(&model, &layout);
        let notes = if differences.is_empty() {
            Vec::new()
        } else {
            vec![format!(
                "another layout than the one last seen for {model}: no blocks in common ({})",
                differences.join("; ")
            )]
        };
        notes.iter().for_each(|note| tracing::warn!(engine = message.engine_id, "{note}"));
        let (namespace, layout) =
            node.read_core(|core| core.identity(id)).ok_or_else(|| core_status(&CoreError::UnknownAttachment))?;
        tracing::info!(engine = message.engine_id, role = message.role, rank = message.rank, pid = message.pid, %namespace, "attached");
        let limits = &node.config.limits;
        let attached = v1::Attached {
            attachment: token.to_vec().into(),
            namespace_id: namespace.as_bytes().to_vec().into(),
            layout_id: layout.as_bytes().to_vec().into(),
            fd_socket: node.config.fd_socket().to_string_lossy().into_owned(),
            heartbeat_ms: millis(limits.attachment_ttl.0 / HEARTBEATS_PER_TTL),
            lease_ttl_ms: millis(limits.lease_ttl.0),
            node_id: node.config.node_id.clone(),
            incarnation: node.incarnation,
            notes,
        };
        let first = v1::AttachEvent { event: Some(v1::attach_event::Event::Attached(attached)) };
        Ok(Response::new(Box::pin(AttachStream { first: Some(first), events, node: Arc::clone(node), token })))
    }

    async fn heartbeat(&self, request: Request<v1::HeartbeatRequest>) -> Answer<v1::HeartbeatReply> {
        let id = attachment(&self.0, &request.into_inner().attachment)?;
        self.0.with_core(|core, now| core.heartbeat(now, id)).map_err(|e| core_status(&e))?;
        Ok(Response::new(v1::HeartbeatReply {}))
    }

    async fn switch_namespace(&self, request: Request<v1::SwitchNamespaceRequest>) -> Answer<v1::SwitchNamespaceReply> {
        let message = request.into_inner();
        let id = attachment(&self.0, &message.attachment)?;
        let wire = message.namespace.as_ref().ok_or_else(|| Status::invalid_argument("field namespace is missing"))?;
        let namespace = Namespace::try_from(wire).map_err(wire_status)?;
        let switched = self.0.with_core(|core, _| core.switch_namespace(id, namespace)).map_err(|e| core_status(&e))?;
        Ok(Response::new(v1::SwitchNamespaceReply { namespace_id: switched.as_bytes().to_vec().into() }))
    }

    async fn lookup(&self, request: Request<v1::LookupRequest>) -> Answer<v1::LookupReply> {
        let message = request.into_inner();
        let id = attachment(&self.0, &message.attachment)?;
        let ranges = message.ranges.iter().map(lookup_range).collect::<Result<_, _>>()?;
        let deadline = Duration::from_millis(message.deadline_ms.into()).min(self.0.config.limits.lookup.0);
        let tenant = self.0.tenant_of_salt(&message.attachment, &message.cache_salt);
        let heard = hinting::hear(&self.0, &message.client_hints, &tenant);
        let own = convert::hints(message.hints.as_ref()).map_err(wire_status)?;
        let lookup = LookupRequest {
            attachment: id,
            request_id: message.request_id,
            ranges,
            local_tokens: message.local_tokens,
            tenant,
            hints: hinting::of_request(own, heard.as_ref()),
        };
        let (holds, tenant) = (hinting::lookup_holds(&self.0, heard.as_ref(), &lookup), lookup.tenant.clone());
        let until = Instant::now() + deadline;
        let mut look = Look::default();
        self.0.read_core_in_steps(|core| core.look(&lookup, &mut look)).map_err(|e| core_status(&e))?;
        let located = cluster::locate_missing(&self.0, (&lookup, &look), until).await;
        let leased = self.0.with_core(|core, now| core.lookup_located(now, lookup, (&look, &located)));
        let lease = leased.map_err(|e| core_status(&e))?;
        hinting::hold(&self.0, &tenant, heard.as_ref(), holds);
        let arrived = self.0.wait_until(until, |core| core.waiting(lease).map(|waiting| waiting == 0)).await;
        arrived.map_err(|e| core_status(&e))?;
        let answer = self.0.with_core(|core, _| core.collect(lease)).map_err(|e| core_status(&e))?;
        Ok(Response::new(lookup_reply(&answer)))
    }

    async fn release(&self, request: Request<v1::ReleaseRequest>) -> Answer<v1::ReleaseReply> {
        let message = request.into_inner();
        let id = attachment(&self.0, &message.attachment)?;
        let report = ReleaseReport {
            local_tokens: message.local_tokens,
            claimed_tokens: message.claimed_tokens,
            lost_tokens: message.lost_tokens,
        };
        self.0.with_core(|core, _| core.release(id, &message.request_id, report));
        Ok(Response::new(v1::ReleaseReply {}))
    }

    async fn reserve(&self, request: Request<v1::ReserveRequest>) -> Answer<v1::ReserveReply> {
        let message = request.into_inner();
        let id = attachment(&self.0, &message.attachment)?;
        let tenant = self.0.tenant_of_salt(&message.attachment, &message.cache_salt);
        let reserve = reserve_request(id, tenant, &message)?;
        let bytes = self.0.read_core(|core| core.block_bytes(id, reserve.group)).unwrap_or(0);
        if self.0.is_draining() {
            return Ok(Response::new(reserve_reply(vec![Reservation::Busy; reserve.keys.len()], bytes)));
        }
        let heard = hinting::hear(&self.0, &message.client_hints, &reserve.tenant);
        let block_tokens = self.0.read_core(|core| core.block_tokens(id, reserve.group)).unwrap_or(0);
        let of = (reserve.first_block, &reserve.keys[..]);
        let holds = heard.as_ref().map(|heard| hinting::holds(heard, of, block_tokens)).unwrap_or_default();
        let tenant = reserve.tenant.clone();
        let deadline = Instant::now() + GROWTH_WAIT;
        let mut all = Vec::with_capacity(reserve.keys.len());
        for run in hinting::by_hints(reserve, block_tokens, heard.as_ref()) {
            let mut answers = self.0.with_core(|core, now| core.reserve(now, &run)).map_err(|e| core_status(&e))?;
            self.reserve_rest(run, &mut answers, deadline).await?;
            all.append(&mut answers);
        }
        hinting::hold(&self.0, &tenant, heard.as_ref(), holds);
        Ok(Response::new(reserve_reply(all, bytes)))
    }

    async fn seal(&self, request: Request<v1::SealRequest>) -> Answer<v1::SealReply> {
        let message = request.into_inner();
        let id = attachment(&self.0, &message.attachment)?;
        let seals: Vec<SealRequest> = message.frames.iter().map(seal_request).collect::<Result<_, _>>()?;
        let outcomes = self.0.with_core(|core, _| core.seal(id, &seals)).map_err(|e| core_status(&e))?;
        let wire = |outcome: &SealOutcome| match outcome {
            SealOutcome::Applied => v1::Outcome::Applied,
            SealOutcome::Duplicate => v1::Outcome::Duplicate,
            SealOutcome::Missing => v1::Outcome::Missing,
            SealOutcome::Rejected => v1::Outcome::Rejected,
        };
        Ok(Response::new(v1::SealReply { outcomes: outcomes.iter().map(|o| wire(o).into()).collect() }))
    }

    async fn report_loads(&self, request: Request<v1::ReportLoadsRequest>) -> Answer<v1::ReportLoadsReply> {
        let message = request.into_inner();
        let id = attachment(&self.0, &message.attachment)?;
        let reports: Vec<LoadReport> = message.frames.iter().map(load_report).collect::<Result<_, _>>()?;
        for report in reports.iter().filter(|r| r.result == LoadResult::Corrupt) {
            tracing::error!(key = %report.key, shard = report.shard, "an engine found a corrupt frame; it was not used");
        }
        self.0
            .with_core(|core, _| core.report_loads(id, &message.request_id, &reports))
            .map_err(|e| core_status(&e))?;
        Ok(Response::new(v1::ReportLoadsReply {}))
    }

    async fn hint(&self, request: Request<v1::HintRequest>) -> Answer<v1::HintReply> {
        let message = request.into_inner();
        attachment(&self.0, &message.attachment)?;
        let tenant = self.0.tenant_of_salt(&message.attachment, &message.cache_salt);
        Ok(Response::new(hinting::hint(&self.0, &message.client_hints, &tenant).await))
    }

    async fn annotate(&self, request: Request<v1::AnnotateRequest>) -> Answer<v1::AnnotateReply> {
        let message = request.into_inner();
        let id = attachment(&self.0, &message.attachment)?;
        let keys = convert::unpack_keys(&message.keys).map_err(wire_status)?;
        let hints = convert::hints(message.hints.as_ref()).map_err(wire_status)?;
        let known = self.0.with_core(|core, _| core.annotate(id, &keys, &hints)).map_err(|e| core_status(&e))?;
        let wire = |known: bool| if known { v1::Outcome::Applied } else { v1::Outcome::Missing };
        Ok(Response::new(v1::AnnotateReply { outcomes: known.into_iter().map(|k| wire(k).into()).collect() }))
    }
}

impl EngineService {
    /// Asks again for the blocks at the end that found no room while memory is being made ready. The engine does not
    /// wait for this answer: it copies when it has it.
    async fn reserve_rest(
        &self,
        mut reserve: ReserveRequest,
        answers: &mut Vec<Reservation>,
        deadline: Instant,
    ) -> Result<(), Status> {
        loop {
            let grown = self.0.grown.notified();
            tokio::pin!(grown);
            grown.as_mut().enable();
            let kept = answers.iter().rposition(|a| *a != Reservation::Busy).map_or(0, |at| at + 1);
            if kept == answers.len() || !self.0.arena.needs_growth() || timeout_at(deadline, grown).await.is_err() {
                return Ok(());
            }
            let asked = answers.len() - reserve.keys.len();
            let rest = reserve.keys.split_off(kept - asked);
            reserve.parent = reserve.keys.last().copied().or(reserve.parent);
            reserve.first_block = reserve.first_block.saturating_add(u32::try_from(kept - asked).unwrap_or(u32::MAX));
            reserve.keys = rest;
            let more = self.0.with_core(|core, now| core.reserve(now, &reserve)).map_err(|e| core_status(&e))?;
            answers.truncate(kept);
            answers.extend(more);
        }
    }
}

fn millis(span: Duration) -> u32 {
    u32::try_from(span.as_millis()).unwrap_or(u32::MAX)
}

fn attach_spec(node: &Node, message: &v1::AttachRequest) -> Result<AttachSpec, Status> {
    if message.protocol_version != PROTOCOL_VERSION {
        return Err(Status::failed_precondition(format!(
            "protocol version {} cannot talk to this daemon's {PROTOCOL_VERSION}: install the same kvtier release on both sides",
            message.protocol_version
        )));
    }
    let missing = |field: &str| Status::invalid_argument(format!("field {field} is missing"));
    let namespace = message.namespace.as_ref().ok_or_else(|| missing("namespace"))?;
    let namespace = Namespace::try_from(namespace).map_err(wire_status)?;
    let layout = message.layout.as_ref().ok_or_else(|| missing("layout"))?;
    let layout = convert::layout(layout, namespace.hash_block_tokens).map_err(wire_status)?;
    let role = match v1::Role::try_from(message.role) {
        Ok(v1::Role::Scheduler) => Role::Scheduler,
        Ok(v1::Role::Worker) => Role::Worker,
        _ => return Err(missing("role")),
    };
    let engine = convert::bounded("engine_id", &message.engine_id, MAX_ENGINE_ID_BYTES).map_err(wire_status)?;
    if engine.is_empty() {
        return Err(missing("engine_id"));
    }
    if message.shard >= u32::from(layout.shards) {
        return Err(Status::invalid_argument(format!("shard {} of {}", message.shard, layout.shards)));
    }
    let (shard, devices) = (shard(message.shard)?, devices(node, &message.devices)?);
    let (engine, rank, pid) = (engine.to_owned(), message.rank, message.pid);
    Ok(AttachSpec { engine, role, rank, shard, devices, pid, namespace, layout })
}

/// Those of a process's devices that have a pool here, in its order.
fn devices(node: &Node, ids: &[prost::bytes::Bytes]) -> Result<Vec<DeviceNumber>, Status> {
    if ids.len() > DeviceNumber::MAX {
        return Err(Status::invalid_argument(format!("{} devices: at most {}", ids.len(), DeviceNumber::MAX)));
    }
    let mut known = Vec::new();
    for id in ids {
        let bytes: [u8; 16] = id[..].try_into().map_err(|_| Status::invalid_argument("a device's id has 16 bytes"))?;
        known.extend(node.devices.number_of(&DeviceId::new(bytes)));
    }
    Ok(known)
}

fn lookup_range(range: &v1::BlockRange) -> Result<LookupRange, Status> {
    let keys = convert::unpack_keys(&range.keys).map_err(wire_status)?;
    Ok(LookupRange { group: range.group, first_block: range.first_block, keys })
}

fn frame_bytes(frame: &AnswerFrame) -> v1::Frame {
    v1::Frame {
        extent: frame.frame.extent,
        offset: u64::from(frame.frame.page) * PAGE_BYTES,
        bytes: u64::from(frame.bytes),
        generation: frame.frame.generation,
        checksum: frame.checksum,
        source: v1::Origin::from(frame.source).into(),
    }
}

fn lookup_reply(answer: &LookupAnswer) -> v1::LookupReply {
    let found = |origin: &Option<Origin>| origin.map_or(0, |o| u8::try_from(o.index() + 1).unwrap_or(u8::MAX));
    let ranges = answer.ranges.iter().map(|range| v1::RangeFrames {
        found: range.found.iter().map(found).collect::<Vec<u8>>().into(),
        frames: range.frames.iter().map(frame_bytes).collect(),
    });
    v1::LookupReply { ranges: ranges.collect() }
}

fn reserve_request(
    attachment: AttachmentId,
    tenant: TenantId,
    message: &v1::ReserveRequest,
) -> Result<ReserveRequest, Status> {
    let range = message.range.as_ref().ok_or_else(|| Status::invalid_argument("field range is missing"))?;
    let parent = if message.parent_key.is_empty() {
        None
    } else {
        Some(convert::key("parent_key", &message.parent_key).map_err(wire_status)?)
    };
    Ok(ReserveRequest {
        attachment,
        parent,
        group: range.group,
        first_block: range.first_block,
        keys: convert::unpack_keys(&range.keys).map_err(wire_status)?,
        tenant,
        hints: convert::hints(message.hints.as_ref()).map_err(wire_status)?,
    })
}

fn reserve_reply(answers: Vec<Reservation>, bytes: u64) -> v1::ReserveReply {
    let mut states = Vec::with_capacity(answers.len());
    let mut frames = Vec::new();
    for answer in answers {
        let state = match answer {
            Reservation::Granted(granted) => {
                frames.extend(granted.iter().map(|frame| v1::Frame {
                    extent: frame.extent,
                    offset: u64::from(frame.page) * PAGE_BYTES,
                    bytes,
                    generation: frame.generation,
                    ..Default::default()
                }));
                v1::Reservation::Granted
            }
            Reservation::Present => v1::Reservation::Present,
            Reservation::Busy => v1::Reservation::Busy,
        };
        states.push(u8::try_from(i32::from(state)).unwrap_or(0));
    }
    v1::ReserveReply { states: states.into(), frames }
}

fn seal_request(frame: &v1::SealedFrame) -> Result<SealRequest, Status> {
    let refuse = |why| Status::invalid_argument(format!("offset {} is {why}", frame.offset));
    let page = u32::try_from(frame.offset / PAGE_BYTES).map_err(|_| refuse("outside any extent"))?;
    if !frame.offset.is_multiple_of(PAGE_BYTES) {
        return Err(refuse("not a multiple of 4096: no frame starts there"));
    }
    Ok(SealRequest {
        key: convert::key("key", &frame.key).map_err(wire_status)?,
        shard: shard(frame.shard)?,
        frame: FrameRef { extent: frame.extent, page, generation: frame.generation },
        checksum: frame.checksum,
        abandoned: frame.abandoned,
    })
}

fn shard(shard: u32) -> Result<u16, Status> {
    u16::try_from(shard).map_err(|_| Status::invalid_argument(format!("shard {shard} is out of range")))
}

fn load_report(frame: &v1::LoadedFrame) -> Result<LoadReport, Status> {
    let result = match v1::LoadResult::try_from(frame.result) {
        Ok(v1::LoadResult::Loaded) => LoadResult::Loaded,
        Ok(v1::LoadResult::Corrupt) => LoadResult::Corrupt,
        Ok(v1::LoadResult::Lost) => LoadResult::Lost,
        _ => return Err(Status::invalid_argument(format!("unknown load result {}", frame.result))),
    };
    let source = convert::origin("source", frame.source).map_err(wire_status)?;
    Ok(LoadReport {
        key: convert::key("key", &frame.key).map_err(wire_status)?,
        shard: shard(frame.shard)?,
        source,
        generation: frame.generation,
        result,
    })
}
