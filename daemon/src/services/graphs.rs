//! Declared graphs over gRPC: declare, progress, show, and what should run next.
//!
//! *Bounds*: those of [`kvtier_policy::programs::graphs`], [`MAX_PROGRAMS_ASKED`] programs and [`MAX_NEXT_STEPS`] steps a
//! question. Programs that declared nothing are looked at in slices of the core's bound.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use kvtier_policy::programs::graphs::{
    Answer, GraphName, GraphView, MAX_PROGRESS, NextStep, Plan, Question, Search, StepState, StepView, Undeclared,
};
use kvtier_policy::{Due, HolderKind, HolderName, ProgramTurn};
use kvtier_proto::{convert, v1};
use kvtier_storage::StorageError;
use kvtier_types::{BlockHints, Instant, Outcome, TenantId};
use tonic::Status;

use super::caller::Caller;
use super::kvcache::appended;
use super::wire_status;
use crate::cluster::fanout::{self, Verb};
use crate::graphs::{entries, flush, millis, step, wire_step};
use crate::node::Node;

/// Programs named in one question.
pub(super) const MAX_PROGRAMS_ASKED: usize = 1024;
/// Steps of one answer.
pub(super) const MAX_NEXT_STEPS: usize = 1024;
const DEFAULT_NEXT_STEPS: usize = 100;
/// Graphs of one answer.
const MAX_SHOWN: usize = 8;

/// Takes a declaration here and, unless it is for this node only, at all others. Without steps, removes it.
pub(super) async fn declare(
    node: &Arc<Node>,
    caller: &Caller,
    message: v1::DeclareRequest,
) -> Result<v1::DeclareReply, Status> {
    let caller = caller.acting_for(&message.tenant)?;
    let program = program_id(&message.program_id)?;
    let removes = message.steps.is_empty();
    let wire_steps = if message.local_only { Vec::new() } else { message.steps.clone() };
    let steps = message.steps.into_iter().map(step).collect::<Result<_, _>>().map_err(wire_status)?;
    let plan = Plan::new(steps);
    let plan = plan.map_err(|bad| Status::invalid_argument(format!("nothing was declared: {bad}")))?;
    let name = GraphName { tenant: caller.tenant.clone(), program };
    let answer = declare_here(node, &name, message.revision, plan).await?;
    if answer.outcome == Outcome::Applied {
        // How far steps are that were declared before went with their former declaration.
        flush(node).await;
    }
    let mut reply = v1::DeclareReply {
        outcome: v1::Outcome::from(answer.outcome).into(),
        reason: answer.reason,
        revision: answer.revision,
        steps: answer.steps,
        nodes: Vec::new(),
    };
    // What was removed here may be known elsewhere.
    let news = matches!(answer.outcome, Outcome::Applied | Outcome::Duplicate | Outcome::Missing);
    if !message.local_only && news {
        let verb = Verb::Declare(v1::DeclareRequest {
            program_id: name.program,
            tenant: name.tenant.to_string(),
            steps: wire_steps,
            revision: answer.revision,
            local_only: true,
        });
        reply.nodes = match answer.outcome {
            // Nodes that are away hear of it as it was said first.
            Outcome::Duplicate => fanout::tell_living(node, verb).await,
            _ if removes => fanout::tell_all(node, verb).await,
            _ => fanout::tell_all_with_room(node, verb).await,
        };
    }
    Ok(reply)
}

async fn declare_here(node: &Arc<Node>, name: &GraphName, revision: u64, plan: Plan) -> Result<Answer, Status> {
    let _turn = node.graphs.turn.lock().await;
    let now = node.now();
    let answer = node.graphs.with(|graphs| {
        graphs.hear(now, name);
        graphs.check(name, &plan, revision, unix_ms())
    });
    if answer.outcome == Outcome::Applied {
        match appended(node, entries(name, answer.revision, &plan)).await? {
            Ok(()) => {}
            Err(StorageError::Full) => {
                let reason = "the journal has no room for more declarations: remove some".to_owned();
                return Ok(Answer { outcome: Outcome::Rejected, reason, ..answer });
            }
            Err(error) => {
                let reason = format!("nothing was declared: the journal cannot be written: {error}");
                return Err(Status::unavailable(reason));
            }
        }
        node.graphs.with(|graphs| graphs.declare(node.now(), name.clone(), (answer.revision, plan)));
    } else if answer.outcome == Outcome::Missing && revision != 0 {
        node.graphs.with(|graphs| graphs.removed_ahead(now, name.clone(), revision));
    }
    Ok(answer)
}

/// A program ended: so does what it declared. Says whether it had declared anything.
pub(super) async fn program_ended(node: &Arc<Node>, caller: &Caller, program: &str) -> Result<bool, Status> {
    let mut is_news = false;
    for name in controlled(node, caller, program) {
        // What is declared after it, wherever that is, has a higher revision than what it ends.
        let ended = node.graphs.with(|graphs| graphs.revision(&name));
        is_news |= declare_here(node, &name, ended, Plan::default()).await?.outcome == Outcome::Applied;
    }
    Ok(is_news)
}

/// The graphs of a name that a caller may control.
fn controlled(node: &Arc<Node>, caller: &Caller, program: &str) -> Vec<GraphName> {
    let tenant = (!caller.operator).then_some(&caller.tenant);
    node.graphs.with(|graphs| graphs.named(program, tenant))
}

/// Takes progress here and, unless it is for this node only, at those that live.
pub(super) async fn progress(
    node: &Arc<Node>,
    caller: &Caller,
    message: v1::ProgressRequest,
) -> Result<v1::ProgressReply, Status> {
    let caller = caller.acting_for(&message.tenant)?;
    let program = program_id(&message.program_id)?;
    let named = message.began.len() + message.ended.len();
    if named == 0 {
        return Err(Status::invalid_argument("began and ended are empty: say which steps did"));
    }
    if named > MAX_PROGRESS {
        return Err(Status::invalid_argument(format!(
            "{named} steps in one call, at most {MAX_PROGRESS}: send several"
        )));
    }
    let mut reply = v1::ProgressReply {
        outcome: v1::Outcome::Missing.into(),
        reason: "nothing is declared of this program".into(),
        ..Default::default()
    };
    for name in controlled(node, &caller, &program) {
        let now = node.now();
        let one = node.graphs.with(|graphs| graphs.progress(now, &name, (&message.began, &message.ended)));
        (reply.outcome, reply.reason) = (v1::Outcome::from(one.outcome).into(), one.reason);
        reply.steps += one.steps;
    }
    if !message.local_only {
        let tenant = if caller.operator { String::new() } else { caller.tenant.to_string() };
        let verb = Verb::Progress(v1::ProgressRequest { tenant, local_only: true, ..message });
        // A node that comes back later learns from what begins then.
        reply.nodes = fanout::tell_living(node, verb).await;
    }
    Ok(reply)
}

/// What was declared of a program, and how far it is.
pub(super) fn show(
    node: &Arc<Node>,
    caller: &Caller,
    message: &v1::GetGraphRequest,
) -> Result<v1::GetGraphReply, Status> {
    let caller = caller.acting_for(&message.tenant)?;
    let program = program_id(&message.program_id)?;
    let names = controlled(node, &caller, &program);
    let view = |name| node.graphs.with(|graphs| graphs.view(node.now(), name));
    Ok(v1::GetGraphReply { graphs: names.iter().take(MAX_SHOWN).filter_map(view).map(wire_graph).collect() })
}

/// The steps that may run, in the order in which they should.
pub(super) async fn next_steps(
    node: &Arc<Node>,
    caller: &Caller,
    message: &v1::NextStepsRequest,
) -> Result<v1::NextStepsReply, Status> {
    let caller = caller.acting_for(&message.tenant)?;
    if message.program_ids.len() > MAX_PROGRAMS_ASKED {
        return Err(Status::invalid_argument(format!(
            "{} programs in one call, at most {MAX_PROGRAMS_ASKED}: send several",
            message.program_ids.len()
        )));
    }
    let programs = message.program_ids.iter().map(|id| program_id(id)).collect::<Result<BTreeSet<_>, _>>()?;
    let limit = match message.limit as usize {
        0 => DEFAULT_NEXT_STEPS,
        limit => limit.min(MAX_NEXT_STEPS),
    };
    let tenant = (!caller.operator).then_some(&caller.tenant);
    let now = node.now();
    let question = Question { tenant, programs: &programs, running: message.include_running, limit };
    let mut search = Search::new(question);
    while node.graphs.with(|graphs| graphs.search_some(now, &mut search)) {
        tokio::task::yield_now().await;
    }
    let (mut steps, mut truncated) = node.graphs.with(|graphs| graphs.found(now, search));
    let (turns, admission) = if programs.is_empty() {
        let (turns, under_way) = due(node, now, tenant).await;
        let advised = node.with_core(|core, _| core.advise(under_way));
        // How many others are under way is nobody's business but an operator's.
        let told = |count| if caller.operator { count } else { 0 };
        let admit = under_way < advised;
        (turns, Some(v1::Admission { admit, advised: told(advised), under_way: told(under_way) }))
    } else {
        (asked(node, &caller, &programs), None)
    };
    let turns = node.graphs.with(|graphs| {
        let alone = |turn: &ProgramTurn| !graphs.covers(&turn.name.tenant, &turn.name.id);
        turns.into_iter().filter(alone).collect::<Vec<_>>()
    });
    steps.extend(turns.iter().map(|turn| undeclared(now, turn)));
    steps.sort_by_key(|step| step.order);
    truncated |= steps.len() > limit;
    steps.truncate(limit);
    let clock = Clock { now, unix_ms: i64::try_from(unix_ms()).unwrap_or(i64::MAX) };
    Ok(v1::NextStepsReply { steps: steps.into_iter().map(|step| clock.wire(step)).collect(), truncated, admission })
}

/// Programs that said that they are about to call, or when. Slice by slice: the core is not held while others wait.
/// Answers with how many are under way, too.
async fn due(node: &Arc<Node>, now: Instant, tenant: Option<&TenantId>) -> (Vec<ProgramTurn>, u32) {
    let (mut turns, mut under_way, mut after) = (Vec::new(), 0_u32, None);
    loop {
        let Due { turns: some, under_way: more, next } =
            node.read_core(|core| core.programs_due(now, after.as_ref(), tenant));
        turns.extend(some);
        under_way += more;
        if next.is_none() {
            return (turns, under_way);
        }
        after = next;
        tokio::task::yield_now().await;
    }
}

/// The programs that were asked for, of the caller or of whoever has one of that name.
fn asked(node: &Arc<Node>, caller: &Caller, programs: &BTreeSet<String>) -> Vec<ProgramTurn> {
    let unknown = |name| ProgramTurn { name, attained: Default::default(), waits: None, returns: None, ended: false };
    let of_program = |program: &String| {
        let names = if caller.operator {
            let known = node.read_core(|core| core.holders_named(HolderKind::Program, program, None));
            if known.is_empty() && node.graphs.with(|graphs| graphs.named(program, None)).is_empty() {
                vec![HolderName::program(&caller.tenant, program)]
            } else {
                known
            }
        } else {
            vec![HolderName::program(&caller.tenant, program)]
        };
        let turn = |name: HolderName| node.read_core(|core| core.program_turn(&name)).unwrap_or_else(|| unknown(name));
        names.into_iter().map(turn).collect::<Vec<_>>()
    };
    programs.iter().flat_map(of_program).collect()
}

fn undeclared(now: Instant, turn: &ProgramTurn) -> NextStep {
    // A tool that is late is no engine's fault: the program waits from now on.
    let since = turn.waits.unwrap_or_else(|| turn.returns.unwrap_or(now).max(now));
    let of = Undeclared { tenant: &turn.name.tenant, program: &turn.name.id, attained: turn.attained, since };
    NextStep::undeclared(now, of)
}

/// The core's time and the world's, at once.
#[derive(Clone, Copy)]
struct Clock {
    now: Instant,
    unix_ms: i64,
}

impl Clock {
    fn wire(self, step: NextStep) -> v1::NextStep {
        let ms = |ns: u64| i64::try_from(ns / 1_000_000).unwrap_or(i64::MAX);
        let in_ms = ms(step.order.turn_ns()).saturating_sub(ms(self.now.as_nanos()));
        v1::NextStep {
            reason: step.reason.to_string(),
            program_id: step.program,
            step_id: step.step,
            graph: step.graph,
            tenant: step.tenant.to_string(),
            kind: step.kind,
            rank_ms: millis(step.rank),
            remaining_ms: millis(step.remaining),
            attained_ms: millis(step.attained),
            waited_ms: millis(step.waited),
            due_in_ms: millis(step.due_in),
            priority: self.unix_ms.saturating_add(in_ms),
            running: step.running,
        }
    }
}

fn wire_graph(view: GraphView) -> v1::Graph {
    let ended = view.steps.iter().filter(|step| step.state == StepState::Ended).count();
    let state = |step: StepView| v1::GraphStepState {
        state: match step.state {
            StepState::Waiting if step.ready => "ready",
            StepState::Waiting => "waiting",
            StepState::Running => "running",
            StepState::Ended => "ended",
        }
        .to_owned(),
        takes_ms: millis(step.takes),
        rank_ms: millis(step.rank),
        step: Some(wire_step(&step.step)),
    };
    v1::Graph {
        program_id: view.name.program,
        tenant: view.name.tenant.to_string(),
        revision: view.revision,
        remaining_ms: millis(view.remaining),
        critical_path_ms: millis(view.longest),
        attained_ms: millis(view.attained),
        ended: u32::try_from(ended).unwrap_or(u32::MAX),
        steps: view.steps.into_iter().map(state).collect(),
    }
}

fn program_id(text: &str) -> Result<String, Status> {
    let text = convert::bounded("program_id", text, BlockHints::MAX_PROGRAM_ID_BYTES).map_err(wire_status)?;
    if text.is_empty() || text.contains('\0') {
        return Err(Status::invalid_argument("program_id is empty, or holds a zero byte"));
    }
    Ok(text.to_owned())
}

fn unix_ms() -> u64 {
    millis(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}
