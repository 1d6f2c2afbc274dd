//! Declared programs as JSON: what `graph declare` reads and `graph show --json` prints.

use kvtier_proto::{convert, v1};
use kvtier_types::BlockKey;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A program with its steps.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Program {
    program_id: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    tenant: String,
    #[serde(default, skip_serializing_if = "is_zero")]
    revision: u64,
    steps: Vec<Step>,
}

/// A step.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Step {
    step_id: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    program_id: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    after: Vec<String>,
    #[serde(default, skip_serializing_if = "is_zero")]
    expected_ms: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    tool_gap_ms: u64,
    #[serde(default, skip_serializing_if = "is_zero_tokens")]
    tokens: u32,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    kind: String,
    /// Name of a semantic type.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    shares: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    shared_context: Option<Shared>,
}

/// A part of a context.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Shared {
    #[serde(default, skip_serializing_if = "String::is_empty")]
    program_id: String,
    #[serde(default, skip_serializing_if = "is_zero_tokens")]
    start_token: u32,
    #[serde(default, skip_serializing_if = "is_zero_tokens")]
    end_token: u32,
    /// Hexadecimal.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    keys: Vec<String>,
}

impl From<&v1::SharedContext> for Shared {
    fn from(wire: &v1::SharedContext) -> Self {
        let keys = convert::unpack_keys(&wire.keys).unwrap_or_default();
        Self {
            program_id: wire.program_id.clone(),
            start_token: wire.start_token,
            end_token: wire.end_token,
            keys: keys.iter().map(ToString::to_string).collect(),
        }
    }
}

impl Shared {
    fn wire(self) -> Result<v1::SharedContext, String> {
        let key = |text: &String| text.parse::<BlockKey>().map_err(|why| format!("shared_context: {text:?}: {why}"));
        let keys = self.keys.iter().map(key).collect::<Result<Vec<_>, _>>()?;
        Ok(v1::SharedContext {
            program_id: self.program_id,
            start_token: self.start_token,
            end_token: self.end_token,
            keys: convert::pack_keys(&keys),
        })
    }
}

/// A graph as it is.
#[derive(Debug, Serialize)]
pub(super) struct Graph {
    program_id: String,
    tenant: String,
    revision: u64,
    ended: u32,
    attained_ms: u64,
    remaining_ms: u64,
    critical_path_ms: u64,
    steps: Vec<State>,
}

#[derive(Debug, Serialize)]
struct State {
    #[serde(flatten)]
    step: Step,
    state: String,
    takes_ms: u64,
    rank_ms: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
const fn is_zero(n: &u64) -> bool {
    *n == 0
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
const fn is_zero_tokens(n: &u32) -> bool {
    *n == 0
}

impl From<&v1::GraphStep> for Step {
    fn from(wire: &v1::GraphStep) -> Self {
        let shares = wire.shares();
        let is_said = shares != v1::SemanticType::Unspecified;
        Self {
            step_id: wire.step_id.clone(),
            program_id: wire.program_id.clone(),
            after: wire.after.clone(),
            expected_ms: wire.expected_ms,
            tool_gap_ms: wire.tool_gap_ms,
            tokens: wire.tokens,
            kind: wire.kind.clone(),
            shares: if is_said { shares.as_str_name().to_owned() } else { String::new() },
            shared_context: wire.shared_context.as_ref().map(Shared::from),
        }
    }
}

impl From<&v1::DeclareRequest> for Program {
    fn from(wire: &v1::DeclareRequest) -> Self {
        Self {
            program_id: wire.program_id.clone(),
            tenant: wire.tenant.clone(),
            revision: wire.revision,
            steps: wire.steps.iter().map(Step::from).collect(),
        }
    }
}

impl From<&v1::Graph> for Graph {
    fn from(wire: &v1::Graph) -> Self {
        let state = |s: &v1::GraphStepState| {
            let step = Step::from(s.step.as_ref()?);
            Some(State { step, state: s.state.clone(), takes_ms: s.takes_ms, rank_ms: s.rank_ms })
        };
        Self {
            program_id: wire.program_id.clone(),
            tenant: wire.tenant.clone(),
            revision: wire.revision,
            ended: wire.ended,
            attained_ms: wire.attained_ms,
            remaining_ms: wire.remaining_ms,
            critical_path_ms: wire.critical_path_ms,
            steps: wire.steps.iter().filter_map(state).collect(),
        }
    }
}

impl Step {
    fn wire(self) -> Result<v1::GraphStep, String> {
        let shares = match self.shares.as_str() {
            "" => v1::SemanticType::Unspecified,
            name => {
                let upper = name.to_ascii_uppercase().replace('-', "_");
                v1::SemanticType::from_str_name(&upper)
                    .ok_or_else(|| format!("step {:?}: shares is no semantic type: {name:?}", self.step_id))?
            }
        };
        Ok(v1::GraphStep {
            step_id: self.step_id,
            program_id: self.program_id,
            after: self.after,
            expected_ms: self.expected_ms,
            tool_gap_ms: self.tool_gap_ms,
            tokens: self.tokens,
            kind: self.kind,
            shares: shares.into(),
            shared_context: self.shared_context.map(Shared::wire).transpose()?,
        })
    }
}

/// Reads a program, or an array of programs.
///
/// # Errors
/// What is wrong with the text.
pub(super) fn parse(text: &str) -> Result<Vec<v1::DeclareRequest>, String> {
    let value: Value = serde_json::from_str(text).map_err(|e| format!("it is no JSON: {e}"))?;
    let programs = match value {
        Value::Array(programs) => programs,
        one => vec![one],
    };
    let mut all = Vec::with_capacity(programs.len());
    for (at, program) in programs.into_iter().enumerate() {
        let program: Program = serde_json::from_value(program)
            .map_err(|e| format!("program {at} is not one with program_id and steps: {e}"))?;
        if program.steps.is_empty() {
            return Err(format!(
                "program {:?} has no steps: to forget one, use `kvtier graph remove`",
                program.program_id
            ));
        }
        let steps = program.steps.into_iter().map(Step::wire).collect::<Result<_, _>>()?;
        all.push(v1::DeclareRequest {
            program_id: program.program_id,
            tenant: program.tenant,
            revision: program.revision,
            steps,
            local_only: false,
        });
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_read_and_printed_alike() {
        let text = r#"{"program_id": "p", "steps": [{"step_id": "a", "expected_ms": 5, "shares": "system-prompt"},
            {"step_id": "b", "after": ["a"], "program_id": "p/b", "tool_gap_ms": 2, "tokens": 9, "kind": "k"}]}"#;
        let read = parse(text).unwrap();
        assert_eq!(read[0].steps[0].shares(), v1::SemanticType::SystemPrompt);
        let printed = serde_json::to_string(&read.iter().map(Program::from).collect::<Vec<_>>()).unwrap();
        assert_eq!(parse(&printed).unwrap(), read);
    }

    #[test]
    fn what_is_wrong_with_a_file_is_said() {
        for (text, said) in [
            ("{", "it is no JSON"),
            ("[1]", "program 0 is not one with program_id and steps"),
            (r#"{"program_id": "p", "steps": [{"id": "a"}]}"#, "unknown field `id`, expected"),
            (r#"{"program_id": "p", "steps": []}"#, "kvtier graph remove"),
            (r#"{"program_id": "p", "steps": [{"step_id": "a", "shares": "x"}]}"#, "no semantic type"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(said), "{error}");
        }
    }
}
