//! The fields of our own vocabulary, wherever they come: actions of the envelope, `vllm_xargs`, `kv_transfer_params`.
//!
//! Keys that are not ours belong to others and are left alone.

use std::time::Duration;

use serde_json::{Map, Value};

use super::{MAX_CHILDREN, MAX_PRIORITY, MAX_SPANS, MAX_TTL, Note, Part, Resume, Said, Signal, Span};
use crate::{BlockHints, SemanticType, Taint, Toleration, parse_span};

/// An `expected_resume` from here on is a time: seconds of Unix time. Below, and up to [`MAX_TTL`], it is a span.
const FIRST_TIME_SECONDS: f64 = 1e9;
/// The last time that is one: it fits milliseconds in 64 bits by far.
const LAST_TIME_SECONDS: f64 = 1e12;

/// A JSON object.
pub(super) type Object = Map<String, Value>;

impl Said {
    /// Reads identity, tolerations, what is said of all blocks, and spans.
    pub(super) fn read_fields(&mut self, from: &Object, note: usize) {
        let notes = &mut self.notes[note];
        take_id(&mut self.program_id, from, &["program_id"], notes);
        take_id(&mut self.parent_program_id, from, &["parent_program_id", "parent_agent_id"], notes);
        take_id(&mut self.session_id, from, &["session_id"], notes);
        take_id(&mut self.agent_role, from, &["agent_role"], notes);
        self.blocks_parent = self.blocks_parent.or_else(|| flag(from, "blocks_parent", notes));
        // Beside the name of a signal it is the signal's.
        if !from.get("signal").is_some_and(Value::is_string) {
            self.expected_resume = self.expected_resume.or_else(|| resume(from, notes));
        }
        let tolerations =
            texts(from, "tolerations", Toleration::MAX_PER_REQUEST, notes, |text| text.parse::<Toleration>().ok());
        self.tolerations.extend(tolerations);
        self.tolerations.truncate(Toleration::MAX_PER_REQUEST);
        let whole = read_span(from, Span::new(Part::Whole, note), notes);
        self.spans.extend(whole);
        match from.get("spans") {
            None | Some(Value::Null) => {}
            Some(Value::Array(spans)) => self.read_spans(spans, note),
            Some(_) => self.notes[note].refuse("spans: not a list"),
        }
    }

    /// Reads a list of spans, each with a range of tokens.
    pub(super) fn read_spans(&mut self, spans: &[Value], note: usize) {
        for (number, value) in spans.iter().enumerate() {
            if self.spans.len() >= MAX_SPANS {
                return self.notes[note].refuse(&format!("spans: more than {MAX_SPANS}"));
            }
            let notes = &mut self.notes[note];
            let ranged = value.as_object().and_then(|object| Some((object, part(object)?)));
            let Some((object, part)) = ranged else {
                notes.refuse(&format!("spans[{number}]: start and end are no range of tokens"));
                continue;
            };
            self.spans.extend(read_span(object, Span::new(part, note), notes));
        }
    }

    /// Reads a signal: its kind, its program when another than the request's, and what belongs to it.
    pub(super) fn read_signal(&mut self, from: &Object, note: usize) {
        let notes = &mut self.notes[note];
        let name = from.get("kind").or_else(|| from.get("signal")).and_then(Value::as_str).unwrap_or_default();
        let Some(kind) = Signal::KINDS.into_iter().find(|kind| kind.eq_ignore_ascii_case(name)) else {
            return notes.refuse(&format!("kind: one of {}", Signal::KINDS.join(", ")));
        };
        let (mut program, mut parent) = (None, None);
        take_id(&mut program, from, &["program_id"], notes);
        take_id(&mut parent, from, &["parent_program_id"], notes);
        let children = texts(from, "children", MAX_CHILDREN, notes, |text| valid_id(text).then(|| text.to_owned()));
        let expected_resume = span_of_time(from, "expected_resume", notes).unwrap_or_default();
        notes.keep();
        self.signals.push(Signal {
            kind,
            program_id: program.unwrap_or_default(),
            parent_program_id: parent.unwrap_or_default(),
            children,
            expected_resume,
            note,
        });
    }
}

/// What an object says of blocks; `None` for nothing.
pub(super) fn read_span(from: &Object, mut span: Span, note: &mut Note) -> Option<Span> {
    match from.get("type").or_else(|| from.get("semantic")) {
        None | Some(Value::Null) => {}
        Some(value) => match value.as_str().and_then(|name| name.to_ascii_uppercase().parse::<SemanticType>().ok()) {
            Some(kind) if kind != SemanticType::Unspecified => span.semantic = taken(note, kind),
            Some(_) => {}
            None => note.refuse("type: not a semantic type"),
        },
    }
    span.taints = texts(from, "taints", Taint::MAX_PER_BLOCK, note, |text| text.parse::<Taint>().ok());
    span.priority = priority(from, "priority", note);
    span.ttl = span_of_time(from, "ttl", note).or_else(|| span_of_time(from, "duration", note));
    (!span.is_empty()).then_some(span)
}

/// The tokens of `start` and `end`: from the first, or to the last, when one of them is missing.
pub(super) fn part(from: &Object) -> Option<Part> {
    if from.get("covers_output").and_then(Value::as_bool) == Some(true) {
        return Some(Part::Output);
    }
    let bound = |keys: [&str; 2], missing: u32| match keys.iter().find_map(|key| from.get(*key)) {
        None | Some(Value::Null) => Some(missing),
        Some(value) => value.as_u64().and_then(|n| u32::try_from(n).ok()),
    };
    let (start, end) = (bound(["start", "tokenStart"], 0)?, bound(["end", "tokenEnd"], u32::MAX)?);
    (start < end).then_some(Part::Tokens(start..end))
}

/// A priority, 0 to 100.
pub(super) fn priority(from: &Object, key: &str, note: &mut Note) -> Option<u8> {
    let value = present(from, key)?;
    match value.as_f64().filter(|n| (0.0..=f64::from(MAX_PRIORITY)).contains(n)) {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 100, checked above")]
        Some(n) => taken(note, n as u8),
        None => refused(note, &format!("{key}: a number from 0 to {MAX_PRIORITY}")),
    }
}

/// A span of time: a number of seconds, a text such as `5m`, or a number of milliseconds under `KEY_ms`.
pub(super) fn span_of_time(from: &Object, key: &str, note: &mut Note) -> Option<Duration> {
    let in_ms = format!("{key}_ms");
    let found = match (present(from, key), present(from, &in_ms)) {
        (Some(Value::String(text)), _) => parse_span(text),
        (Some(value), _) => value.as_f64().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()),
        (None, Some(value)) => value.as_u64().map(Duration::from_millis),
        (None, None) => return None,
    };
    match found.filter(|span| !span.is_zero() && *span <= MAX_TTL) {
        Some(span) => taken(note, span),
        None => refused(note, &format!("{key}: more than 0 and at most 30 days, in seconds or as `5m`")),
    }
}

/// A span as [`span_of_time`] reads it, or seconds of Unix time.
fn resume(from: &Object, note: &mut Note) -> Option<Resume> {
    const KEY: &str = "expected_resume";
    match present(from, KEY).and_then(Value::as_f64) {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "up to 1e15, checked here")]
        Some(at) if (FIRST_TIME_SECONDS..=LAST_TIME_SECONDS).contains(&at) => {
            taken(note, Resume::At((at * 1e3) as u64))
        }
        _ => span_of_time(from, KEY, note).map(Resume::In),
    }
}

/// Yes or no.
fn flag(from: &Object, key: &str, note: &mut Note) -> Option<bool> {
    match present(from, key)? {
        Value::Bool(flag) => taken(note, *flag),
        _ => refused(note, &format!("{key}: true or false")),
    }
}

/// The texts of a list that `read` understands, at most `max`.
fn texts<T>(from: &Object, key: &str, max: usize, note: &mut Note, read: impl Fn(&str) -> Option<T>) -> Vec<T> {
    let Some(value) = present(from, key) else { return Vec::new() };
    let Some(list) = value.as_array() else {
        note.refuse(&format!("{key}: not a list of texts"));
        return Vec::new();
    };
    let mut found = Vec::new();
    for value in list {
        match value.as_str().and_then(&read) {
            Some(_) if found.len() >= max => {
                note.refuse(&format!("{key}: more than {max}"));
                break;
            }
            Some(read) => found.extend(taken(note, read)),
            None => note.refuse(&format!("{key}: {value} is none")),
        }
    }
    found
}

fn take_id(slot: &mut Option<String>, from: &Object, keys: &[&str], note: &mut Note) {
    let Some((key, value)) = keys.iter().find_map(|key| Some((key, present(from, key)?))) else { return };
    match value.as_str() {
        Some("") => {}
        Some(id) if valid_id(id) => {
            note.keep();
            slot.get_or_insert_with(|| id.to_owned());
        }
        _ => note.refuse(&format!("{key}: a text of at most {} bytes", BlockHints::MAX_PROGRAM_ID_BYTES)),
    }
}

/// Whether it can name a program or a session.
pub(super) fn valid_id(id: &str) -> bool {
    !id.is_empty() && id.len() <= BlockHints::MAX_PROGRAM_ID_BYTES && !id.contains('\0')
}

fn present<'a>(from: &'a Object, key: &str) -> Option<&'a Value> {
    from.get(key).filter(|value| !value.is_null())
}

fn taken<T>(note: &mut Note, value: T) -> Option<T> {
    note.keep();
    Some(value)
}

fn refused<T>(note: &mut Note, reason: &str) -> Option<T> {
    note.refuse(reason);
    None
}
