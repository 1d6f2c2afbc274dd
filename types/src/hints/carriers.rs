//! The document in which an engine's plugin hands on what came with a request.
//!
//! ```json
//! {"v": 1, "prompt_tokens": 900, "session_id": "s",
//!  "kv_hints": {"actions": [..]}, "xargs": {..}, "params": {..}}
//! ```
//! With `"finished": true` it tells that the request ended: what is to be done then is done, and nothing else once more.
//!
//! `xargs` is vLLM's `vllm_xargs` (values there are scalars: an object may come as its JSON text), `params` its
//! `kv_transfer_params`.

use serde_json::Value;

use super::envelope::read_envelope_json;
use super::fields::{Object, valid_id};
use super::{MAX_JSON_BYTES, Said};

/// Version of the document.
const VERSION: u64 = 1;

/// A document that cannot be read at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadHints {
    /// Too long.
    #[error("hints of {len} bytes: at most {} are read", MAX_JSON_BYTES)]
    TooLong {
        /// Bytes given.
        len: usize,
    },
    /// Not JSON, or not an object.
    #[error("hints are no JSON object: {why}")]
    NotJson {
        /// What is wrong.
        why: String,
    },
    /// Written by another release.
    #[error("hints of version {found}: install one release of plugin and daemon")]
    Version {
        /// The version given.
        found: u64,
    },
}

/// What came with one request, carrier by carrier.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ClientHints {
    /// Whether the request ended.
    pub finished: bool,
    /// Tokens of the prompt: where the output begins.
    pub prompt_tokens: u32,
    /// The `kv_hints` envelope.
    pub envelope: Said,
    /// `vllm_xargs`.
    pub xargs: Said,
    /// The session id that the engine was told.
    pub session: Said,
    /// `kv_transfer_params`: the weakest, since routers overwrite it.
    pub params: Said,
}

impl ClientHints {
    /// Reads a document; empty bytes say nothing.
    ///
    /// # Errors
    /// [`BadHints`] when it cannot be read at all; parts that are not valid are dropped with a note.
    pub fn read(json: &[u8]) -> Result<Self, BadHints> {
        if json.is_empty() {
            return Ok(Self::default());
        }
        if json.len() > MAX_JSON_BYTES {
            return Err(BadHints::TooLong { len: json.len() });
        }
        let value: Value = serde_json::from_slice(json).map_err(|e| BadHints::NotJson { why: e.to_string() })?;
        let object = value.as_object().ok_or_else(|| BadHints::NotJson { why: "not an object".into() })?;
        let found = object.get("v").and_then(Value::as_u64).unwrap_or_default();
        if found != VERSION {
            return Err(BadHints::Version { found });
        }
        let tokens = object.get("prompt_tokens").and_then(Value::as_u64).unwrap_or_default();
        let sub = |key| object.get(key).and_then(Value::as_object);
        Ok(Self {
            finished: object.get("finished").and_then(Value::as_bool).unwrap_or_default(),
            prompt_tokens: u32::try_from(tokens).unwrap_or(u32::MAX),
            envelope: object.get("kv_hints").filter(|v| !v.is_null()).map(envelope).unwrap_or_default(),
            xargs: sub("xargs").map(xargs).unwrap_or_default(),
            session: object.get("session_id").filter(|v| !v.is_null()).map(session).unwrap_or_default(),
            params: sub("params").map(|object| own(object, "kv_transfer_params")).unwrap_or_default(),
        })
    }

    /// All carriers, strongest first.
    #[must_use]
    pub fn carriers(&self) -> [&Said; 4] {
        [&self.envelope, &self.xargs, &self.session, &self.params]
    }

    /// All carriers, strongest first, to take back what is not trusted.
    pub fn carriers_mut(&mut self) -> [&mut Said; 4] {
        [&mut self.envelope, &mut self.xargs, &mut self.session, &mut self.params]
    }

    /// Whether it says nothing, not even that something was dropped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.carriers().iter().all(|said| said.is_empty() && said.told().next().is_none())
    }
}

fn envelope(value: &Value) -> Said {
    match read_envelope_json(&value.to_string()) {
        Ok((_, said)) => said,
        Err(error) => {
            let mut said = Said::default();
            let note = said.begin("", "kv_hints");
            said.notes[note].refuse(&error.to_string());
            said
        }
    }
}

fn session(value: &Value) -> Said {
    let mut said = Said::default();
    let note = said.begin("", "session_id");
    match value.as_str().filter(|id| valid_id(id)) {
        Some(id) => {
            said.notes[note].keep();
            said.session_id = Some(id.to_owned());
        }
        None => said.notes[note].refuse("session_id: a text of at most 128 bytes"),
    }
    said
}

/// `agentic_context`, then `kvtier`, then the fields of other vocabularies.
fn xargs(object: &Object) -> Said {
    let mut said = Said::default();
    for key in ["agentic_context", "kvtier"] {
        let Some(value) = object.get(key).filter(|v| !v.is_null()) else { continue };
        let note = said.begin("", key);
        let parsed = value.as_str().map(serde_json::from_str::<Value>);
        let nested = match &parsed {
            None => value.as_object(),
            Some(text) => text.as_ref().ok().and_then(Value::as_object),
        };
        match nested {
            Some(nested) => read(&mut said, nested, note),
            None => said.notes[note].refuse(&format!("{key}: not an object, nor the JSON text of one")),
        }
    }
    said.read_foreign(object);
    said
}

fn own(object: &Object, name: &str) -> Said {
    let mut said = Said::default();
    let note = said.begin("", name);
    read(&mut said, object, note);
    said
}

fn read(said: &mut Said, object: &Object, note: usize) {
    said.read_fields(object, note);
    if let Some(signal) = object.get("signal") {
        match signal {
            Value::Object(signal) => said.read_signal(signal, note),
            _ => said.read_signal(object, note),
        }
    }
    said.read_foreign(object);
}
