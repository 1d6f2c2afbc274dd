//! Spans of OpenTelemetry from JSON: lists of spans (`{"spans": [...]}`, or the array alone) with times as text, and what
//! the collector's file exporter writes (`resourceSpans`), with times as nanoseconds.
//!
//! *Bounds*: [`MAX_SPANS`] spans. What has no id or no times is left out and counted.

use std::collections::BTreeMap;

use chrono::{DateTime, NaiveDateTime};
use serde_json::{Map, Value};

/// Spans of one file.
const MAX_SPANS: usize = 65_536;
/// Operations that are a model call, of the semantic conventions for generative models.
const CALLS: [&str; 5] = ["chat", "text_completion", "generate_content", "completion", "responses"];
/// Where the name of an agent is found, the best first.
const AGENTS: [&str; 2] = ["gen_ai.agent.name", "agent.name"];
const INPUT_TOKENS: [&str; 2] = ["gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens"];
const OUTPUT_TOKENS: [&str; 2] = ["gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens"];

/// A span, as far as it matters to a graph.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) trace: String,
    pub(super) id: String,
    pub(super) parent: Option<String>,
    /// Microseconds since 1970; the end is later.
    pub(super) start_us: i64,
    pub(super) end_us: i64,
    /// Who did it, empty where nothing says so.
    pub(super) agent: String,
    pub(super) name: String,
    /// Whether it is a model call.
    pub(super) is_call: bool,
    pub(super) tokens: u32,
}

/// What a file holds.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) spans: Vec<Span>,
    /// Spans that were left out, by why.
    pub(super) left_out: BTreeMap<&'static str, usize>,
}

/// Reads the spans of a file.
///
/// # Errors
/// What is wrong with a text that holds no list of spans.
pub(super) fn read(text: &str) -> Result<Found, String> {
    let value: Value = serde_json::from_str(text).map_err(|e| format!("it is no JSON: {e}"))?;
    let mut found = Found::default();
    match &value {
        Value::Array(spans) => found.take(spans, &Map::new()),
        Value::Object(fields) if fields.contains_key("resourceSpans") => {
            for resource in list(&value, "resourceSpans") {
                let of_resource = attributes(resource.pointer("/resource/attributes"));
                for scope in list(resource, "scopeSpans") {
                    found.take(list(scope, "spans"), &of_resource);
                }
            }
        }
        Value::Object(fields) if fields.get("spans").is_some_and(Value::is_array) => {
            found.take(list(&value, "spans"), &Map::new());
        }
        _ => return Err("it holds neither `spans` nor `resourceSpans`".to_owned()),
    }
    Ok(found)
}

impl Found {
    fn take(&mut self, spans: &[Value], resource: &Map<String, Value>) {
        for value in spans {
            let read =
                if self.spans.len() < MAX_SPANS { span(value, resource) } else { Err("beyond the bound of a file") };
            match read {
                Ok(span) => self.spans.push(span),
                Err(why) => *self.left_out.entry(why).or_default() += 1,
            }
        }
    }
}

fn list<'a>(value: &'a Value, field: &str) -> &'a [Value] {
    value.get(field).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn span(value: &Value, resource: &Map<String, Value>) -> Result<Span, &'static str> {
    let text = |names: [&str; 2]| {
        names.into_iter().find_map(|name| value.get(name)).and_then(Value::as_str).filter(|text| !text.is_empty())
    };
    let own = attributes(value.get("attributes"));
    let of_resource = value.get("resource_attributes").map_or_else(|| resource.clone(), |v| attributes(Some(v)));
    let said = |names: &[&str]| {
        let found = names.iter().find_map(|name| own.get(*name).or_else(|| of_resource.get(*name)));
        found.and_then(Value::as_str).unwrap_or_default().to_owned()
    };
    let start_us = time(value, ["start_time", "startTimeUnixNano"]).ok_or("without a beginning")?;
    let end_us = time(value, ["end_time", "endTimeUnixNano"]).ok_or("without an end")?;
    let operation = said(&["gen_ai.operation.name"]);
    let is_call =
        CALLS.contains(&operation.as_str()) || (operation.is_empty() && own.contains_key("gen_ai.request.model"));
    let agent = Some(said(&AGENTS)).filter(|a| !a.is_empty()).unwrap_or_else(|| said(&["service.name"]));
    let count = |names: &[&str]| names.iter().find_map(|name| number(own.get(*name)?)).unwrap_or(0);
    let tokens = count(&INPUT_TOKENS).saturating_add(count(&OUTPUT_TOKENS));
    Ok(Span {
        trace: text(["trace_id", "traceId"]).ok_or("without a trace")?.to_owned(),
        id: text(["span_id", "spanId"]).ok_or("without an id")?.to_owned(),
        parent: text(["parent_span_id", "parentSpanId"]).map(str::to_owned),
        start_us,
        end_us: end_us.max(start_us + 1),
        agent,
        name: if operation.is_empty() { text(["name", "name"]).unwrap_or("unnamed").to_owned() } else { operation },
        is_call,
        tokens: u32::try_from(tokens).unwrap_or(0),
    })
}

/// Attributes by name, from an object, or from a list of keys with typed values.
fn attributes(value: Option<&Value>) -> Map<String, Value> {
    match value {
        Some(Value::Object(fields)) => fields.clone(),
        Some(Value::Array(pairs)) => {
            let pair = |pair: &Value| {
                let typed = pair.get("value")?.as_object()?.values().next()?;
                Some((pair.get("key")?.as_str()?.to_owned(), typed.clone()))
            };
            pairs.iter().filter_map(pair).collect()
        }
        _ => Map::new(),
    }
}

fn number(value: &Value) -> Option<i64> {
    value.as_i64().or_else(|| value.as_str()?.parse().ok())
}

/// Microseconds since 1970 of a time as text, in UTC where it names no zone, or as nanoseconds.
fn time(value: &Value, names: [&str; 2]) -> Option<i64> {
    let value = names.into_iter().find_map(|name| value.get(name))?;
    if let Some(nanos) = number(value) {
        return Some(nanos / 1000).filter(|us| *us > 0);
    }
    let text = value.as_str()?;
    let zoned = DateTime::parse_from_rfc3339(text).map(|at| at.timestamp_micros());
    let plain =
        || NaiveDateTime::parse_from_str(text, "%Y-%m-%dT%H:%M:%S%.f").map(|at| at.and_utc().timestamp_micros());
    zoned.or_else(|_| plain()).ok().filter(|us| *us > 0)
}
