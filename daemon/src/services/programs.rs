//! `Programs`: what agents say of what they do, and who holds what.

use std::sync::Arc;
use std::time::Duration;

use kvtier_policy::{
    Freed, HolderKind, HolderName, HolderState, MAX_CHILDREN_PER_SIGNAL, MAX_PROGRAMS_PAGE, ProgramPage, ProgramView,
    Signal, SignalKind, Signaling,
};
use kvtier_proto::{convert, v1};
use kvtier_storage::journal::Entry;
use kvtier_types::{BlockHints, Instant, Outcome, RequestHints, TenantId, hints};
use tokio::sync::oneshot;
use tonic::{Request, Response, Status};

use super::caller::Caller;
use super::headers::ByHeaders;
use super::kvcache::durable;
use super::{graphs, placing, recovered, to_the_end, wire_status};
use crate::cluster::fanout::{self, Verb};
use crate::node::Node;
use crate::programs;

/// Programs in one page when the caller does not say.
const DEFAULT_PAGE: usize = 100;
/// Records of programs that one call of the core reads: each has a thousand tips at most.
const RECORDS_PER_CORE_CALL: usize = 8;
/// Entries of blocks that are made durable at once.
const ENTRIES_AT_ONCE: usize = 1024;
/// What a caller is told where the journal did not take what was freed.
const NOT_DURABLY_FREED: &str = "freed now, but a restart may bring the blocks back";
/// What is between the parts of a page token: no part holds it.
const SEPARATOR: char = '\0';

/// The service over one node.
#[derive(Debug, Clone)]
pub(crate) struct ProgramsService(pub(crate) Arc<Node>);

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl v1::programs_server::Programs for ProgramsService {
    async fn signal(&self, request: Request<v1::SignalRequest>) -> Answer<v1::SignalReply> {
        let caller = Caller::of(&self.0, &request)?;
        let said = ByHeaders::of(request.metadata());
        let mut message = request.into_inner();
        said.name_signaler(&mut message);
        signal(&self.0, &caller, message).await.map(Response::new)
    }

    async fn declare(&self, request: Request<v1::DeclareRequest>) -> Answer<v1::DeclareReply> {
        let caller = Caller::of(&self.0, &request)?;
        let said = ByHeaders::of(request.metadata());
        let (node, mut message) = (Arc::clone(&self.0), request.into_inner());
        said.name_program(&mut message.program_id);
        let work = async move { graphs::declare(&node, &caller, message).await };
        to_the_end(&self.0, false, work).await.map(Response::new)
    }

    async fn progress(&self, request: Request<v1::ProgressRequest>) -> Answer<v1::ProgressReply> {
        let caller = Caller::of(&self.0, &request)?;
        let said = ByHeaders::of(request.metadata());
        let (node, mut message) = (Arc::clone(&self.0), request.into_inner());
        said.name_program(&mut message.program_id);
        let work = async move { graphs::progress(&node, &caller, message).await };
        to_the_end(&self.0, false, work).await.map(Response::new)
    }

    async fn get_graph(&self, request: Request<v1::GetGraphRequest>) -> Answer<v1::GetGraphReply> {
        let caller = Caller::of(&self.0, &request)?;
        let said = ByHeaders::of(request.metadata());
        let mut message = request.into_inner();
        said.name_program(&mut message.program_id);
        graphs::show(&self.0, &caller, &message).map(Response::new)
    }

    async fn next_steps(&self, request: Request<v1::NextStepsRequest>) -> Answer<v1::NextStepsReply> {
        let caller = Caller::of(&self.0, &request)?;
        graphs::next_steps(&self.0, &caller, &request.into_inner()).await.map(Response::new)
    }

    async fn list_programs(&self, request: Request<v1::ListProgramsRequest>) -> Answer<v1::ListProgramsReply> {
        let caller = Caller::of(&self.0, &request)?;
        list(&self.0, &caller, &request.into_inner()).await.map(Response::new)
    }

    async fn place(&self, request: Request<v1::PlaceRequest>) -> Answer<v1::PlaceReply> {
        let caller = Caller::of(&self.0, &request)?;
        let said = ByHeaders::of(request.metadata());
        let mut message = request.into_inner();
        said.name_context(&mut message);
        placing::place(&self.0, &caller, &message).await.map(Response::new)
    }
}

/// Takes a signal here and, unless it is for this node only, at all others.
pub(super) async fn signal(
    node: &Arc<Node>,
    caller: &Caller,
    message: v1::SignalRequest,
) -> Result<v1::SignalReply, Status> {
    let caller = caller.acting_for(&message.tenant)?;
    let said = check(&message)?;
    recovered(node)?;
    let calls = Arc::clone(&node.signal_calls[usize::from(message.local_only)]);
    let permit = calls.acquire_owned().await.map_err(|_| Status::unavailable("the node stops"))?;
    let of_task = Arc::clone(node);
    // Whoever asked may give up waiting: what is begun is done, and told, all the same.
    let taken = node.tasks.spawn(async move {
        let _permit = permit;
        take_and_tell(&of_task, &caller, &said, message).await
    });
    taken.await.map_err(|_| Status::internal("the signal's task died"))?
}

async fn take_and_tell(
    node: &Arc<Node>,
    caller: &Caller,
    said: &Said,
    message: v1::SignalRequest,
) -> Result<v1::SignalReply, Status> {
    let mut reply = v1::SignalReply { outcome: v1::Outcome::Missing.into(), ..Default::default() };
    for tenant in tenants(node, caller, &message.program_id) {
        let one = signal_one(node, said.of(&tenant)).await?;
        if one.outcome() != v1::Outcome::Missing || reply.reason.is_empty() {
            (reply.outcome, reply.reason) = (one.outcome, one.reason);
        }
        reply.blocks += one.blocks;
        reply.bytes += one.bytes;
    }
    let had_declared = ends(said.kind) && graphs::program_ended(node, caller, &message.program_id).await?;
    if had_declared && reply.outcome() == v1::Outcome::Missing {
        (reply.outcome, reply.reason) =
            (v1::Outcome::Applied.into(), "it held nothing; what it declared ended".to_owned());
    }
    if !message.local_only {
        let tenant = if caller.operator { String::new() } else { caller.tenant.to_string() };
        reply.nodes = tell(node, tenant, message).await;
    }
    Ok(reply)
}

/// Takes a signal that came with a request; the other nodes are told behind it.
pub(super) async fn signal_of_request(
    node: &Arc<Node>,
    tenant: &TenantId,
    message: v1::SignalRequest,
) -> Result<v1::SignalReply, Status> {
    let said = check(&message)?;
    recovered(node)?;
    let Ok(permit) = Arc::clone(&node.signals).try_acquire_owned() else {
        return Err(Status::resource_exhausted(
            "too many signals of requests are under way: say it by Programs.Signal",
        ));
    };
    let (of_task, tenant) = (Arc::clone(node), tenant.clone());
    let (taken, answer) = oneshot::channel();
    // Whoever asked may give up waiting: what is begun is done, and told, all the same.
    node.tasks.spawn(async move {
        let mut reply = signal_one(&of_task, said.of(&tenant)).await;
        if ends(said.kind) && reply.is_ok() {
            let caller = Caller { tenant: tenant.clone(), operator: false };
            let ended = graphs::program_ended(&of_task, &caller, &message.program_id).await;
            reply = ended.and(reply);
        }
        let is_taken = reply.is_ok();
        drop(taken.send(reply));
        if is_taken {
            tell(&of_task, tenant.to_string(), message).await;
        }
        drop(permit);
    });
    answer.await.map_err(|_| Status::internal("the signal's task died"))?
}

/// Whether a program that says so is over, and what it declared with it.
const fn ends(kind: SignalKind) -> bool {
    matches!(kind, SignalKind::Completion | SignalKind::Cancellation)
}

/// A signal from hints as a message; what it leaves out is the request's.
pub(super) fn from_hints(signal: &hints::Signal, request: &RequestHints) -> v1::SignalRequest {
    let or = |own: &str, request: &str| if own.is_empty() { request.to_owned() } else { own.to_owned() };
    let is_own = signal.program_id.is_empty() || signal.program_id == request.block.program_id;
    let parent = if is_own { request.parent_program_id.as_str() } else { "" };
    let kind = v1::SignalKind::from_str_name(signal.kind).unwrap_or_default();
    v1::SignalRequest {
        program_id: or(&signal.program_id, &request.block.program_id),
        parent_program_id: or(&signal.parent_program_id, parent),
        kind: kind.into(),
        children: signal.children.clone(),
        expected_resume_ms: u64::try_from(signal.expected_resume.as_millis()).unwrap_or(u64::MAX),
        ..Default::default()
    }
}

/// Passes a signal on to the other nodes.
async fn tell(node: &Arc<Node>, tenant: String, message: v1::SignalRequest) -> Vec<v1::NodeOutcome> {
    // What a program does right now is no news to a node that comes back later.
    let passing = matches!(message.kind(), v1::SignalKind::ToolWait | v1::SignalKind::Continuation);
    let verb = Verb::Signal(v1::SignalRequest { tenant, local_only: true, ..message });
    if passing { fanout::tell_living(node, verb).await } else { fanout::tell_all(node, verb).await }
}

/// A signal whose words were checked, of whatever tenant.
struct Said {
    program: String,
    parent: String,
    kind: SignalKind,
    children: Vec<String>,
    returns_in: Option<Duration>,
}

impl Said {
    fn of(&self, tenant: &TenantId) -> Signal {
        let name = |id: &String| HolderName::program(tenant, id);
        Signal {
            program: name(&self.program),
            parent: Some(&self.parent).filter(|p| !p.is_empty()).map(name),
            kind: self.kind,
            children: self.children.iter().map(name).collect(),
            returns_in: self.returns_in,
        }
    }
}

fn check(message: &v1::SignalRequest) -> Result<Said, Status> {
    let id = |field: &'static str, text: &str| {
        let text = convert::bounded(field, text, BlockHints::MAX_PROGRAM_ID_BYTES).map_err(wire_status)?;
        if text.contains(SEPARATOR) {
            return Err(Status::invalid_argument(format!("{field} holds a zero byte")));
        }
        Ok(text.to_owned())
    };
    let program = id("program_id", &message.program_id)?;
    if program.is_empty() {
        return Err(Status::invalid_argument("program_id is empty: say who signals"));
    }
    if message.children.len() > MAX_CHILDREN_PER_SIGNAL {
        return Err(Status::invalid_argument(format!(
            "{} children in one signal, at most {MAX_CHILDREN_PER_SIGNAL}: send several",
            message.children.len()
        )));
    }
    let children = message.children.iter().map(|child| id("children", child)).collect::<Result<Vec<_>, _>>()?;
    if children.iter().any(String::is_empty) {
        return Err(Status::invalid_argument("children holds an empty name"));
    }
    let kind = match message.kind() {
        v1::SignalKind::ToolWait => SignalKind::ToolWait,
        v1::SignalKind::Continuation => SignalKind::Continuation,
        v1::SignalKind::Fork => SignalKind::Fork,
        v1::SignalKind::Join => SignalKind::Join,
        v1::SignalKind::Compaction => SignalKind::Compaction,
        v1::SignalKind::Completion => SignalKind::Completion,
        v1::SignalKind::Cancellation => SignalKind::Cancellation,
        v1::SignalKind::Unspecified => return Err(Status::invalid_argument("kind is not one that this build knows")),
    };
    let returns_in = Some(message.expected_resume_ms).filter(|ms| *ms > 0).map(Duration::from_millis);
    Ok(Said { program, parent: id("parent_program_id", &message.parent_program_id)?, kind, children, returns_in })
}

/// Whose program it is: the caller's; for an operator who names no tenant, that of whoever has one of this name.
fn tenants(node: &Arc<Node>, caller: &Caller, program: &str) -> Vec<TenantId> {
    if !caller.operator {
        return vec![caller.tenant.clone()];
    }
    let known = node.read_core(|core| core.holders_named(HolderKind::Program, program, None));
    if known.is_empty() { vec![caller.tenant.clone()] } else { known.into_iter().map(|name| name.tenant).collect() }
}

/// Takes a signal of one tenant here. To be called in a task of the node's: it is not to end in the midst.
async fn signal_one(node: &Arc<Node>, signal: Signal) -> Result<v1::SignalReply, Status> {
    let _turn = node.programs_turn.lock().await;
    let known: Vec<HolderName> = std::iter::once(&signal.program).chain(&signal.children).cloned().collect();
    let lasts = matches!(signal.kind, SignalKind::Fork | SignalKind::Completion);
    let mut signaling = Signaling::new(signal);
    while node.with_core(|core, now| core.signal_some(now, &mut signaling)) {
        tokio::task::yield_now().await;
    }
    let answer = signaling.answer();
    let (blocks, bytes) = free(node, &answer.abandoned).await?;
    if lasts && answer.outcome == Outcome::Applied {
        let mut records = Vec::with_capacity(known.len());
        for some in known.chunks(RECORDS_PER_CORE_CALL) {
            let some =
                node.read_core(|core| some.iter().filter_map(|name| core.holder_record(name)).collect::<Vec<_>>());
            records.extend(some.into_iter().map(programs::entry));
        }
        durable(node, records, "taken in, but a restart may forget it").await?;
    }
    Ok(v1::SignalReply {
        outcome: v1::Outcome::from(answer.outcome).into(),
        reason: answer.reason.to_owned(),
        blocks,
        bytes,
        nodes: Vec::new(),
    })
}

/// Frees what only these programs hold, durably. Answers with block shards and their bytes.
async fn free(node: &Arc<Node>, abandoned: &[HolderName]) -> Result<(u64, u64), Status> {
    let (mut blocks, mut bytes) = (0, 0);
    let mut unsaid: Vec<Entry> = Vec::new();
    for name in abandoned {
        let mut more = true;
        while more {
            let freed = node.with_core(|core, _| core.abandon_program(name));
            blocks += freed.blocks;
            bytes += freed.bytes;
            more = freed.more;
            unsaid.extend(entries(freed));
            if unsaid.len() >= ENTRIES_AT_ONCE {
                durable(node, std::mem::take(&mut unsaid), NOT_DURABLY_FREED).await?;
            }
            tokio::task::yield_now().await;
        }
    }
    durable(node, unsaid, NOT_DURABLY_FREED).await?;
    Ok((blocks, bytes))
}

fn entries(freed: Freed) -> Vec<Entry> {
    let evicted = freed.journal.into_iter().map(|(key, up_to_sequence)| Entry::Evicted { key, up_to_sequence });
    let ended = freed.cancelled.map(|(name, up_to)| programs::ended(&name, Some(up_to)));
    evicted.chain(ended).collect()
}

async fn list(
    node: &Arc<Node>,
    caller: &Caller,
    message: &v1::ListProgramsRequest,
) -> Result<v1::ListProgramsReply, Status> {
    let after = if message.page_token.is_empty() { None } else { Some(name_of_token(&message.page_token)?) };
    let limit = match message.page_size as usize {
        0 => DEFAULT_PAGE,
        size => size.min(MAX_PROGRAMS_PAGE),
    };
    let (tenant, now) = ((!caller.operator).then(|| caller.tenant.clone()), node.now());
    let mut page = ProgramPage::new(after, tenant, limit);
    while node.read_core(|core| core.fill_page(now, &mut page)) {
        tokio::task::yield_now().await;
    }
    let (page, more) = page.programs();
    let next = page.last().filter(|_| more).map(|last| token(&last.name)).unwrap_or_default();
    let programs = page.into_iter().map(|view| wire(view, now)).collect();
    Ok(v1::ListProgramsReply { programs, next_page_token: next.into() })
}

fn wire(view: ProgramView, now: Instant) -> v1::Program {
    let state = match view.state {
        HolderState::Active => "active",
        HolderState::Waiting { .. } => "tool_wait",
        HolderState::Ended => "ended",
    };
    let resumes = match view.state {
        HolderState::Waiting { until: Some(until) } => until.since(now),
        _ => Duration::ZERO,
    };
    v1::Program {
        program_id: view.name.id,
        parent_program_id: view.parent.map(|p| p.id).unwrap_or_default(),
        tenant: view.name.tenant.to_string(),
        state: state.to_owned(),
        idle_ms: u64::try_from(view.idle.as_millis()).unwrap_or(u64::MAX),
        blocks: view.blocks,
        exclusive_blocks: view.exclusive,
        is_session: view.name.kind == HolderKind::Session,
        resumes_in_ms: u64::try_from(resumes.as_millis()).unwrap_or(u64::MAX),
        agent_role: view.role,
        blocks_parent: view.blocks_parent,
    }
}

fn token(name: &HolderName) -> Vec<u8> {
    let kind = if name.kind == HolderKind::Session { "s" } else { "p" };
    format!("{kind}{SEPARATOR}{}{SEPARATOR}{}", name.id, name.tenant).into_bytes()
}

fn name_of_token(token: &[u8]) -> Result<HolderName, Status> {
    let bad = || Status::invalid_argument("page_token is not one this daemon gave out");
    let text = std::str::from_utf8(token).map_err(|_| bad())?;
    let mut parts = text.splitn(3, SEPARATOR);
    let (kind, id, tenant) = (parts.next(), parts.next(), parts.next());
    let kind = match kind {
        Some("s") => HolderKind::Session,
        Some("p") => HolderKind::Program,
        _ => return Err(bad()),
    };
    let tenant = tenant.and_then(|t| TenantId::new(t).ok()).ok_or_else(bad)?;
    Ok(HolderName { kind, id: id.ok_or_else(bad)?.to_owned(), tenant })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_tokens_name_holders() {
        let tenant = TenantId::new("team").unwrap();
        for name in [HolderName::program(&tenant, "a b"), HolderName::session(&tenant, "")] {
            assert_eq!(name_of_token(&token(&name)).unwrap(), name);
        }
        for bad in [&b"x"[..], b"p\0id", b"p\0id\0bad tenant", b"\xff"] {
            assert!(name_of_token(bad).is_err());
        }
    }

    #[test]
    fn signals_are_checked() {
        let good = v1::SignalRequest {
            program_id: "p".into(),
            kind: v1::SignalKind::Fork.into(),
            children: vec!["c".into()],
            ..Default::default()
        };
        assert_eq!(check(&good).unwrap().kind, SignalKind::Fork);
        let bad = [
            v1::SignalRequest { program_id: String::new(), ..good.clone() },
            v1::SignalRequest { program_id: "x".repeat(129), ..good.clone() },
            v1::SignalRequest { kind: 99, ..good.clone() },
            v1::SignalRequest { children: vec![String::new()], ..good.clone() },
            v1::SignalRequest { children: vec!["c".into(); 1025], ..good.clone() },
            v1::SignalRequest { parent_program_id: "a\0b".into(), ..good },
        ];
        for bad in bad {
            assert!(check(&bad).is_err(), "{bad:?}");
        }
    }
}
