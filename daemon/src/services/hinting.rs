//! Hints of requests on their way to the core: what each block of a reservation is said to be, and what is told back.

use std::sync::Arc;

use kvtier_policy::{LookupRange, LookupRequest, MAX_HINTED, ReserveRequest};
use kvtier_proto::{convert, v1};
use kvtier_types::hints::{Note, Resume, Run, Signal};
use kvtier_types::{BlockKey, Outcome, RequestHints, TenantId};
use tonic::Status;

use crate::claims::unix_ms;
use crate::hints::{Heard, Hold, Holder, joined, outcome, retain_or_pin};
use crate::node::Node;
use crate::services::programs;

/// The field that says when a program will be back.
const EXPECTED_RESUME: &str = "expected_resume";

/// What counts of a request's hints; what cannot be read says nothing here, since `Hint` tells the client so.
pub(super) fn hear(node: &Arc<Node>, client_hints: &[u8], tenant: &TenantId) -> Option<Heard> {
    if client_hints.is_empty() {
        return None;
    }
    node.hints.hear(client_hints, tenant, node.now()).ok()
}

/// What a request says of itself: the engine's word first, then its client's.
pub(super) fn of_request(own: RequestHints, heard: Option<&Heard>) -> RequestHints {
    match heard {
        Some(heard) => joined(own, heard.resolution().request()),
        None => own,
    }
}

/// `Hint`: what a client said, once a request. Answers and counts what became of each action.
pub(super) async fn hint(node: &Arc<Node>, client_hints: &[u8], tenant: &TenantId) -> v1::HintReply {
    let mut heard = match node.hints.hear(client_hints, tenant, node.now()) {
        Ok(heard) => heard,
        Err(error) => {
            let mut note = Note::new("", "kv_hints");
            note.refuse(&error.to_string());
            node.hints.counts.note(&note);
            return v1::HintReply { outcomes: vec![outcome(&note)] };
        }
    };
    if heard.is_over() {
        return over(node, tenant, &heard).await;
    }
    let signals: Vec<(usize, Signal)> = heard.signals().map(|(carrier, signal)| (carrier, signal.clone())).collect();
    let request = heard.resolution().request();
    for (carrier, signal) in signals {
        let taken = programs::signal_of_request(node, tenant, programs::from_hints(&signal, &request)).await;
        if let Some(note) = heard.note_mut(carrier, signal.note) {
            settle_signal(note, taken);
        }
    }
    heard.settle_holds(node.read_core(|core| core.claims_held()[2].1) >= MAX_HINTED as u64);
    heard.notes().for_each(|note| node.hints.counts.note(note));
    v1::HintReply { outcomes: heard.notes().map(outcome).collect() }
}

/// A request ended, and its program said when it will be back: it waits from now on. What else the client said was told of
/// and counted as the request began.
async fn over(node: &Arc<Node>, tenant: &TenantId, heard: &Heard) -> v1::HintReply {
    let (request, resume) = (heard.resolution().request(), heard.resolution().resume());
    let Some(resume) = resume.filter(|_| !request.block.program_id.is_empty()) else {
        return v1::HintReply::default();
    };
    let mut note = Note::new("", EXPECTED_RESUME);
    let signal = waits(resume, &request);
    settle_signal(&mut note, programs::signal_of_request(node, tenant, signal).await);
    v1::HintReply { outcomes: vec![outcome(&note)] }
}

/// The signal of a program that waits, as it said with its request.
fn waits(resume: Resume, request: &RequestHints) -> v1::SignalRequest {
    // One that should be back already is back any moment: zero would say that it is not known when.
    let millis = resume.from_now(unix_ms()).as_millis().max(1);
    v1::SignalRequest {
        program_id: request.block.program_id.clone(),
        parent_program_id: request.parent_program_id.clone(),
        kind: v1::SignalKind::ToolWait.into(),
        expected_resume_ms: u64::try_from(millis).unwrap_or(u64::MAX),
        ..Default::default()
    }
}

/// What became of a signal that came with hints.
pub(super) fn settle_signal(note: &mut Note, taken: Result<v1::SignalReply, Status>) {
    match taken {
        Ok(reply) => note.settle(convert::outcome(reply.outcome()), &reply.reason),
        Err(status) => note.settle(Outcome::Rejected, status.message()),
    }
}

/// A reservation as reservations of blocks of which the same is said.
pub(super) fn by_hints(reserve: ReserveRequest, block_tokens: u32, heard: Option<&Heard>) -> Vec<ReserveRequest> {
    let runs = heard.map(|heard| runs(heard, reserve.first_block, &reserve.keys, block_tokens)).unwrap_or_default();
    if runs.is_empty() {
        return vec![reserve];
    }
    let mut parent = reserve.parent;
    let mut of_run = |(run, keys): (Run, &[BlockKey])| ReserveRequest {
        attachment: reserve.attachment,
        parent: std::mem::replace(&mut parent, keys.last().copied()),
        group: reserve.group,
        first_block: run.blocks.start,
        keys: keys.to_vec(),
        tenant: reserve.tenant.clone(),
        hints: joined(reserve.hints.clone(), run.hints),
    };
    runs.into_iter().map(&mut of_run).collect()
}

/// What is asked to be kept of a range of blocks.
pub(super) fn holds(heard: &Heard, (first_block, keys): (u32, &[BlockKey]), block_tokens: u32) -> Vec<Hold> {
    let runs = runs(heard, first_block, keys, block_tokens).into_iter();
    let asked = runs.filter(|(run, _)| run.hints.retain.is_some() || run.pin.is_some());
    asked.map(|(run, keys)| Hold { keys: keys.to_vec(), retain: run.hints.retain, pin: run.pin }).collect()
}

/// The same, of a lookup.
pub(super) fn lookup_holds(node: &Arc<Node>, heard: Option<&Heard>, lookup: &LookupRequest) -> Vec<Hold> {
    let Some(heard) = heard else { return Vec::new() };
    let of_range = |range: &LookupRange| {
        let block_tokens = node.read_core(|core| core.block_tokens(lookup.attachment, range.group)).unwrap_or(0);
        holds(heard, (range.first_block, &range.keys), block_tokens)
    };
    lookup.ranges.iter().flat_map(of_range).collect()
}

/// Retains and pins blocks that a request reads or writes, as far as they are here.
pub(super) fn hold(node: &Arc<Node>, tenant: &TenantId, heard: Option<&Heard>, holds: Vec<Hold>) {
    if let Some(heard) = heard.filter(|_| !holds.is_empty()) {
        retain_or_pin(node, Holder::new(tenant, &heard.resolution().request()), holds);
    }
}

/// Blocks of which the same is said, with their keys; none where the numbers of blocks end.
fn runs<'k>(heard: &Heard, first_block: u32, keys: &'k [BlockKey], block_tokens: u32) -> Vec<(Run, &'k [BlockKey])> {
    let count = u32::try_from(keys.len()).ok();
    let Some(end) = count.and_then(|count| first_block.checked_add(count)) else { return Vec::new() };
    let with_keys = |run: Run| {
        let at = |block: u32| (block - first_block) as usize;
        let keys = &keys[at(run.blocks.start)..at(run.blocks.end)];
        (run, keys)
    };
    heard.resolution().runs(first_block..end, block_tokens).into_iter().map(with_keys).collect()
}
