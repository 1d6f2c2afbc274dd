//! `ApplyHints`: what an authenticated caller says of requests that are still to come.

use std::sync::Arc;
use std::time::Duration;

use kvtier_proto::{convert, v1};
use kvtier_types::hints::{Action, MAX_JSON_BYTES, Said, read_envelope, read_envelope_json};
use kvtier_types::{BlockHints, Outcome, RequestHints};
use tonic::Status;

use crate::hints::{Left, Owner, outcome};
use crate::node::Node;
use crate::services::caller::Caller;
use crate::services::hinting::settle_signal;
use crate::services::programs;
use crate::services::wire_status;

/// How long hints wait for requests when the caller does not say.
const DEFAULT_TTL: Duration = Duration::from_secs(600);
/// Longest that they may wait.
const MAX_TTL: Duration = Duration::from_secs(86_400);

/// Reads and keeps an envelope; one outcome for each of its actions.
pub(in crate::services) async fn apply(
    node: &Arc<Node>,
    caller: &Caller,
    message: &v1::ApplyHintsRequest,
) -> Result<v1::ApplyHintsReply, Status> {
    let owners = owners(message)?;
    let (message_id, mut said, bytes) = read(message)?;
    let tenant = (!caller.operator).then(|| caller.tenant.clone());
    // A message that is sent again, after an answer that was lost, must not end what a program began since.
    if let Some(said) = node.hints.left_before(&owners, &message_id, &tenant, node.now()) {
        return Ok(reply(&said, false));
    }
    settle_what_needs_a_request(&mut said);
    carry_out_signals(node, caller, &message.program_id, &mut said).await;
    let ttl = if message.ttl_ms == 0 { DEFAULT_TTL } else { Duration::from_millis(message.ttl_ms).min(MAX_TTL) };
    let left = Left { message_id, said, bytes, ttl };
    let kept = node.hints.leave(owners, left, tenant, node.now());
    let (said, new) = kept.map_err(|full| Status::resource_exhausted(full.to_string()))?;
    said.told().filter(|_| new).for_each(|note| node.hints.counts.note(note));
    Ok(reply(&said, new))
}

fn reply(said: &Said, new: bool) -> v1::ApplyHintsReply {
    let told = said.told().map(|note| {
        let mut row = outcome(note);
        match note.outcome() {
            // It waits for a request.
            Outcome::Applied | Outcome::Accepted if new => row.set_outcome(v1::Outcome::Accepted),
            Outcome::Applied | Outcome::Accepted => row.set_outcome(v1::Outcome::Duplicate),
            _ => {}
        }
        row
    });
    v1::ApplyHintsReply { outcomes: told.collect() }
}

fn owners(message: &v1::ApplyHintsRequest) -> Result<Vec<Owner>, Status> {
    let id = |field, text: &str| {
        convert::bounded(field, text, BlockHints::MAX_PROGRAM_ID_BYTES).map(str::to_owned).map_err(wire_status)
    };
    let session = id("session_id", &message.session_id)?;
    let program = id("program_id", &message.program_id)?;
    let mut owners = Vec::new();
    if !session.is_empty() {
        owners.push(Owner::Session(session));
    }
    if !program.is_empty() {
        owners.push(Owner::Program(program));
    }
    if owners.is_empty() {
        return Err(Status::invalid_argument("session_id and program_id are empty: say whose requests are meant"));
    }
    Ok(owners)
}

/// The envelope: its id, what it says, and the bytes of its text.
fn read(message: &v1::ApplyHintsRequest) -> Result<(String, Said, u64), Status> {
    let bytes = |len: usize| u64::try_from(len).unwrap_or(u64::MAX);
    match (&message.envelope, message.envelope_json.as_str()) {
        (None, "") => Err(Status::invalid_argument("envelope and envelope_json are missing")),
        (Some(_), json) if !json.is_empty() => {
            Err(Status::invalid_argument("envelope and envelope_json are both there: which one is meant?"))
        }
        (Some(envelope), _) => {
            let len: usize = envelope.actions.iter().map(|action| action.payload.len()).sum();
            if len > MAX_JSON_BYTES {
                return Err(Status::invalid_argument(format!("payloads of {len} bytes: at most {MAX_JSON_BYTES}")));
            }
            Ok((envelope.message_id.clone(), from_message(envelope), bytes(len)))
        }
        (None, json) => {
            let (id, said) = read_envelope_json(json).map_err(|error| Status::invalid_argument(error.to_string()))?;
            Ok((id, said, bytes(json.len())))
        }
    }
}

fn from_message(envelope: &v1::KvHintsEnvelope) -> Said {
    let payloads: Vec<serde_json::Value> = envelope
        .actions
        .iter()
        .map(|action| serde_json::from_str(&action.payload).unwrap_or(serde_json::Value::Null))
        .collect();
    let actions = envelope.actions.iter().zip(&payloads).map(|(action, payload)| Action {
        action_id: &action.action_id,
        action_type: &action.action_type,
        payload,
    });
    read_envelope(actions)
}

/// Some actions are about a request that is there, or have a verb of their own.
fn settle_what_needs_a_request(said: &mut Said) {
    for note in said.notes.iter_mut().filter(|note| note.kind == "kv.fetch") {
        note.settle(Outcome::Unsupported, "without a request only Prefetch brings blocks up");
    }
}

/// Signals are about now, and wait for no request.
async fn carry_out_signals(node: &Arc<Node>, caller: &Caller, program: &str, said: &mut Said) {
    let block = BlockHints { program_id: program.to_owned(), ..BlockHints::default() };
    let request = RequestHints { block, ..RequestHints::default() };
    for signal in std::mem::take(&mut said.signals) {
        let taken = programs::signal(node, caller, programs::from_hints(&signal, &request)).await;
        settle_signal(&mut said.notes[signal.note], taken);
    }
}
