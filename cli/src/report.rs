//! What a command has to say, for people and for programs.

use serde::Serialize;
use serde_json::Value;

/// The result of a command that ran.
#[derive(Debug, Clone)]
pub struct Report {
    /// For people: whole lines.
    pub text: String,
    /// For programs: field names are stable, new ones may be added.
    pub json: Value,
    /// False when some target was not found or not applied: the exit code is 1 then.
    pub complete: bool,
}

impl Report {
    /// A report whose JSON is `body`.
    pub fn new(text: String, body: &impl Serialize, complete: bool) -> Self {
        let json = serde_json::to_value(body).unwrap_or(Value::Null);
        Self { text, json, complete }
    }

    /// Of a command that has printed all it had to say.
    #[must_use]
    pub const fn printed() -> Self {
        Self { text: String::new(), json: Value::Null, complete: true }
    }

    /// The JSON as text, one document and a newline; nothing of a command that has printed it.
    #[must_use]
    pub fn json_text(&self) -> String {
        if self.json.is_null() {
            return String::new();
        }
        format!("{:#}\n", self.json)
    }
}
