//! vLLM's `kv_hints` envelope: actions by name, of which unknown ones are ignored and counted.
//!
//! Source: vLLM RFC "KV hints", `protocol_version`, `message_id`, `actions[{action_id, action_type, action_version,
//! payload}]`; `kv.retain` as its reference dispatcher reads it, `kv.fetch` as Dynamo's router writes it.

use serde_json::Value;

use super::fields::{Object, part, read_span, span_of_time};
use super::{MAX_ACTIONS, MAX_DIRECTIVES, MAX_JSON_BYTES, MAX_SPANS, Said, Span};
use crate::Outcome;
use crate::hints::{BadHints, DEFAULT_TTL, Part};

/// Actions that are carried out.
pub const ACTIONS: [&str; 6] =
    ["kv.retain", "kv.fetch", "kvtier.annotate", "kvtier.taint", "kvtier.pin", "kvtier.signal"];

/// One action, as a message carries it.
#[derive(Debug, Clone, PartialEq)]
pub struct Action<'a> {
    /// The client's name for it.
    pub action_id: &'a str,
    /// What to do.
    pub action_type: &'a str,
    /// JSON object.
    pub payload: &'a Value,
}

/// Reads an envelope.
///
/// # Errors
/// [`BadHints`] when it is none at all; what is wrong with a single action is said in its note.
pub fn read_envelope_json(json: &str) -> Result<(String, Said), BadHints> {
    if json.len() > MAX_JSON_BYTES {
        return Err(BadHints::TooLong { len: json.len() });
    }
    let value: Value = serde_json::from_str(json).map_err(|error| BadHints::NotJson { why: error.to_string() })?;
    let object = value.as_object().ok_or_else(|| BadHints::NotJson { why: "not an object".into() })?;
    // A request's field and a bare envelope are both welcome.
    let envelope = object.get("kv_hints").and_then(Value::as_object).unwrap_or(object);
    let id = envelope.get("message_id").and_then(Value::as_str).unwrap_or_default();
    let actions = envelope.get("actions").and_then(Value::as_array);
    let actions = actions.ok_or_else(|| BadHints::NotJson { why: "it has no list `actions`".into() })?;
    let text = |action: &Value, key| action.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let read: Vec<(String, String, &Value)> = actions
        .iter()
        .take(MAX_ACTIONS + 1)
        .map(|a| (text(a, "action_id"), text(a, "action_type"), a.get("payload").unwrap_or(&Value::Null)))
        .collect();
    let actions = read.iter().map(|(id, kind, payload)| Action { action_id: id, action_type: kind, payload });
    Ok((id.to_owned(), read_envelope(actions)))
}

/// Reads actions, at most [`MAX_ACTIONS`] of them.
pub fn read_envelope<'a>(actions: impl IntoIterator<Item = Action<'a>>) -> Said {
    let mut said = Said::default();
    for (number, action) in actions.into_iter().enumerate() {
        let note = said.begin(action.action_id, action.action_type);
        if number >= MAX_ACTIONS {
            said.notes[note].refuse(&format!("an envelope has at most {MAX_ACTIONS} actions"));
            break;
        }
        let Some(payload) = action.payload.as_object() else {
            said.notes[note].refuse("payload: not an object");
            continue;
        };
        match action.action_type {
            "kv.retain" => retain(&mut said, payload, note),
            "kv.fetch" => fetch(&mut said, payload, note),
            "kvtier.annotate" => said.read_fields(payload, note),
            "kvtier.taint" => taint(&mut said, payload, note),
            "kvtier.pin" => pin(&mut said, payload, note),
            "kvtier.signal" => said.read_signal(payload, note),
            _ => said.notes[note].settle(Outcome::Unsupported, "no such action here; it is ignored"),
        }
        if said.notes[note].is_empty() {
            said.notes[note].refuse("payload: nothing in it");
        }
    }
    said
}

/// `{"scope", "directives": [{"start", "end", "priority", "duration"} | {"covers_output": true, ..}]}`
fn retain(said: &mut Said, payload: &Object, note: usize) {
    let Some(directives) = payload.get("directives").and_then(Value::as_array) else {
        return said.notes[note].refuse("directives: not a list");
    };
    for (number, directive) in directives.iter().enumerate() {
        let notes = &mut said.notes[note];
        if number >= MAX_DIRECTIVES || said.spans.len() >= MAX_SPANS {
            return notes.refuse(&format!("directives: more than {MAX_DIRECTIVES}"));
        }
        let ranged = directive.as_object().and_then(|object| Some((object, part(object)?)));
        let Some((object, part)) = ranged else {
            notes.refuse(&format!("directives[{number}]: start and end are no range of tokens"));
            continue;
        };
        // Of a retention, the type and the taints are not read: they are `kvtier.annotate`'s.
        let claim: Object = object
            .iter()
            .filter(|(key, _)| RETAIN_KEYS.contains(&key.as_str()))
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect();
        said.spans.extend(read_span(&claim, Span::new(part, note), notes));
    }
}

const RETAIN_KEYS: [&str; 5] = ["priority", "duration", "duration_ms", "ttl", "ttl_ms"];

/// `{"source_control_endpoint", "block_hashes", "mode"}`: a request's own lookup brings its prefix from wherever it is.
fn fetch(said: &mut Said, payload: &Object, note: usize) {
    let mode = payload.get("mode").and_then(Value::as_str).unwrap_or("copy");
    let notes = &mut said.notes[note];
    if mode == "copy" {
        notes.settle(Outcome::Accepted, "the request's own lookup brings its prefix, from any node that has it");
    } else {
        notes.settle(Outcome::Unsupported, "mode: only copy");
    }
}

/// `{"taints": [..], "start", "end"}`
fn taint(said: &mut Said, payload: &Object, note: usize) {
    annotate_part(said, payload, &["taints"], note);
}

/// `{"start", "end", "ttl"}`
fn pin(said: &mut Said, payload: &Object, note: usize) {
    let notes = &mut said.notes[note];
    let Some(part) = whole_or_part(payload) else { return notes.refuse("start and end are no range of tokens") };
    let ttl = span_of_time(payload, "ttl", notes).or(Some(DEFAULT_TTL));
    notes.keep();
    said.spans.push(Span { ttl, pin: true, ..Span::new(part, note) });
}

fn annotate_part(said: &mut Said, payload: &Object, keys: &[&str], note: usize) {
    let notes = &mut said.notes[note];
    let Some(part) = whole_or_part(payload) else { return notes.refuse("start and end are no range of tokens") };
    let only: Object =
        payload.iter().filter(|(key, _)| keys.contains(&key.as_str())).map(|(k, v)| (k.clone(), v.clone())).collect();
    said.spans.extend(read_span(&only, Span::new(part, note), notes));
}

/// All blocks when the payload names no range.
fn whole_or_part(payload: &Object) -> Option<Part> {
    let ranged = ["start", "end", "covers_output"].iter().any(|key| payload.contains_key(*key));
    if ranged { part(payload) } else { Some(Part::Whole) }
}
