//! What others' APIs say of how long a prompt is worth keeping, mapped onto claims.
//!
//! | from | field | becomes |
//! |---|---|---|
//! | `OpenAI` | `prompt_cache_retention`: `in_memory`, `24h`; `prompt_cache_options.ttl` | time |
//! | Anthropic | `cache_control`: `{"type": "ephemeral", "ttl": "5m" or "1h"}` | time |
//! | Dynamo | `agent_hints.priority`, also below `nvext`; `agent_context` with ids of session and trajectory | priority, ids |
//! | LMCache | `lmcache_retention_ttl_sec` | time |
//! | TensorRT-LLM | `token_range_retention_configs`: `[{tokenStart, tokenEnd, priority, durationMs}]` | ranges |

use std::time::Duration;

use serde_json::Value;

use super::fields::{Object, part, priority, span_of_time, valid_id};
use super::{MAX_DIRECTIVES, MAX_SPANS, Part, Said, Span};

/// `in_memory`: `OpenAI` keeps such prefixes for five to ten minutes of inactivity.
const IN_MEMORY: Duration = Duration::from_secs(600);
const DAY: Duration = Duration::from_secs(86_400);
/// Anthropic's default.
const EPHEMERAL: Duration = Duration::from_secs(300);

const RANGE_KEYS: [&str; 3] =
    ["token_range_retention_configs", "tokenRangeRetentionConfigs", "tokenRangeRetentionConfig"];

impl Said {
    /// Reads the fields of other vocabularies in an object.
    pub(super) fn read_foreign(&mut self, from: &Object) {
        self.openai(from);
        self.anthropic(from);
        self.dynamo(from);
        if from.contains_key("lmcache_retention_ttl_sec") {
            let note = self.begin("", "lmcache_retention_ttl_sec");
            let ttl = span_of_time(from, "lmcache_retention_ttl_sec", &mut self.notes[note]);
            self.keep_for(ttl, note);
        }
        let nested = from.get("kv_cache_retention_config").and_then(Value::as_object);
        for object in [Some(from), nested].into_iter().flatten() {
            if let Some(value) = RANGE_KEYS.iter().find_map(|key| object.get(*key)) {
                self.ranges(value);
            }
        }
    }

    fn keep_for(&mut self, ttl: Option<Duration>, note: usize) {
        if ttl.is_some() {
            self.spans.push(Span { ttl, ..Span::new(Part::Whole, note) });
        }
    }

    fn openai(&mut self, from: &Object) {
        if let Some(value) = from.get("prompt_cache_retention").filter(|v| !v.is_null()) {
            let note = self.begin("", "prompt_cache_retention");
            let ttl = match value.as_str() {
                Some("in_memory" | "in-memory") => Some(IN_MEMORY),
                Some("24h") => Some(DAY),
                _ => None,
            };
            self.notes[note].keep();
            if ttl.is_none() {
                self.notes[note].revoke("prompt_cache_retention: in_memory or 24h");
            }
            self.keep_for(ttl, note);
        }
        if let Some(options) = from.get("prompt_cache_options").and_then(Value::as_object) {
            let note = self.begin("", "prompt_cache_options");
            let ttl = span_of_time(options, "ttl", &mut self.notes[note]);
            self.keep_for(ttl, note);
        }
    }

    fn anthropic(&mut self, from: &Object) {
        let Some(control) = from.get("cache_control").and_then(Value::as_object) else { return };
        let note = self.begin("", "cache_control");
        if control.get("type").and_then(Value::as_str) != Some("ephemeral") {
            return self.notes[note].refuse("cache_control.type: only ephemeral");
        }
        let ttl = if control.contains_key("ttl") {
            span_of_time(control, "ttl", &mut self.notes[note])
        } else {
            self.notes[note].keep();
            Some(EPHEMERAL)
        };
        self.keep_for(ttl, note);
    }

    fn dynamo(&mut self, from: &Object) {
        let nested = from.get("nvext").and_then(Value::as_object);
        for object in [Some(from), nested].into_iter().flatten() {
            if let Some(hints) = object.get("agent_hints").and_then(Value::as_object) {
                let note = self.begin("", "agent_hints");
                let priority = priority(hints, "priority", &mut self.notes[note]);
                if priority.is_some() {
                    self.spans.push(Span { priority, ..Span::new(Part::Whole, note) });
                }
            }
            let Some(context) = object.get("agent_context").and_then(Value::as_object) else { continue };
            let note = self.begin("", "agent_hints");
            let id = |key| context.get(key).and_then(Value::as_str).filter(|id| valid_id(id)).map(str::to_owned);
            let ids = [id("trajectory_id"), id("parent_trajectory_id"), id("session_id")];
            let slots = [&mut self.program_id, &mut self.parent_program_id, &mut self.session_id];
            for (slot, id) in slots.into_iter().zip(ids) {
                if id.is_some() && slot.is_none() {
                    self.notes[note].keep();
                    *slot = id;
                }
            }
        }
    }

    fn ranges(&mut self, value: &Value) {
        let note = self.begin("", "token_range_retention");
        let one = std::slice::from_ref(value);
        for range in value.as_array().map_or(one, Vec::as_slice).iter().take(MAX_DIRECTIVES) {
            let notes = &mut self.notes[note];
            let Some((object, part)) = range.as_object().and_then(|object| Some((object, part(object)?))) else {
                notes.refuse("tokenStart and tokenEnd are no range of tokens");
                continue;
            };
            let priority = priority(object, "priority", notes);
            let milliseconds = object.get("durationMs").and_then(Value::as_u64).map(Duration::from_millis);
            let span = Span { priority, ttl: milliseconds.filter(|t| !t.is_zero()), ..Span::new(part, note) };
            if !span.is_empty() && self.spans.len() < MAX_SPANS {
                self.notes[note].keep();
                self.spans.push(span);
            }
        }
    }
}
