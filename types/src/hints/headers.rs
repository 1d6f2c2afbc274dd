//! Who a request is of, by the HTTP headers that agents and routers send: families of headers, of which one counts.
//!
//! vLLM hands connectors no headers but the session's, so they are read where they can be seen: by the agents' transport,
//! which turns them into fields of the body, and by the services that routers call. The table of docs/HINTS.md is the same
//! (`the_table_is_the_documented_one`), and so is `kvtier_agents.headers`.
//!
//! *Invariant*: families are never mixed: a session of one and a program of another may be two clients'
//! (`one_family_counts`).

use super::fields::valid_id;

/// Headers that are sent together, and which names the session, the program and its parent: the first that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Family {
    /// Who sends them.
    pub sender: &'static str,
    /// Of the session.
    pub session: &'static [&'static str],
    /// Of the program.
    pub program: &'static [&'static str],
    /// Of its parent; a program is not its own.
    pub parent: &'static [&'static str],
}

/// All families; the first of which a header is there counts.
pub const FAMILIES: [Family; 5] = [
    Family {
        sender: "Claude Code",
        session: &["x-claude-code-session-id"],
        program: &["x-claude-code-agent-id", "x-claude-code-session-id"],
        parent: &["x-claude-code-parent-agent-id", "x-claude-code-session-id"],
    },
    Family {
        sender: "Codex, OpenCode",
        session: &["session-id", "session_id"],
        program: &["thread-id", "session-id", "session_id"],
        parent: &[],
    },
    Family { sender: "OpenCode", session: &["x-session-affinity"], program: &[], parent: &[] },
    Family { sender: "Dynamo", session: &["x-dynamo-session-id"], program: &[], parent: &[] },
    Family {
        sender: "llm-d, vLLM",
        session: &["x-session-id"],
        program: &["x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id"],
        parent: &[],
    },
];

/// Who a request is of; empty where that was not said.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Identity {
    /// The conversation.
    pub session_id: String,
    /// The program.
    pub program_id: String,
    /// The program that started it.
    pub parent_program_id: String,
}

/// Who a request is of by its headers: `get` answers with the value of one, by its name in lower case. `None` where none of
/// them is there. What cannot be a name counts as not there.
pub fn identity<'a>(get: impl Fn(&str) -> Option<&'a str>) -> Option<Identity> {
    let value = |names: &[&str]| names.iter().find_map(|name| get(name).map(str::trim).filter(|id| valid_id(id)));
    let of = |family: &Family| {
        let (session, program) = (value(family.session), value(family.program));
        session.or(program)?;
        let parent = value(family.parent).filter(|parent| Some(*parent) != program);
        let text = |id: Option<&str>| id.unwrap_or_default().to_owned();
        Some(Identity { session_id: text(session), program_id: text(program), parent_program_id: text(parent) })
    };
    FAMILIES.iter().find_map(of)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(headers: &[(&str, &str)]) -> Option<[String; 3]> {
        let get = |name: &str| headers.iter().find(|(n, _)| *n == name).map(|(_, value)| *value);
        let Identity { session_id, program_id, parent_program_id } = identity(get)?;
        Some([session_id, program_id, parent_program_id])
    }

    fn told(ids: [&str; 3]) -> Option<[String; 3]> {
        Some(ids.map(str::to_owned))
    }

    #[test]
    fn one_family_counts() {
        let claude = ("x-claude-code-session-id", "c");
        let agent = ("x-claude-code-agent-id", "a");
        assert_eq!(of(&[("x-session-id", "s"), claude]), told(["c", "c", ""]));
        assert_eq!(of(&[claude, agent]), told(["c", "a", "c"]));
        assert_eq!(of(&[claude, agent, ("x-claude-code-parent-agent-id", "p")]), told(["c", "a", "p"]));
        assert_eq!(of(&[("session_id", "s"), ("x-session-affinity", "o")]), told(["s", "s", ""]));
        assert_eq!(of(&[("session-id", "s"), ("thread-id", "t")]), told(["s", "t", ""]));
        assert_eq!(of(&[("x-session-id", "s"), ("x-llm-d-inference-fairness-id", "f")]), told(["s", "f", ""]));
        assert_eq!(of(&[("x-session-id", " s ")]), told(["s", "", ""]));
        assert_eq!(of(&[("authorization", "Bearer")]), None);
    }

    #[test]
    fn what_cannot_be_a_name_is_not_there() {
        let long = "x".repeat(129);
        assert_eq!(of(&[("x-claude-code-session-id", &long), ("x-session-id", "s")]), told(["s", "", ""]));
        assert_eq!(of(&[("x-session-id", "")]), None);
    }

    #[test]
    fn the_table_is_the_documented_one() {
        let docs = include_str!("../../../docs/HINTS.md");
        for Family { sender, session, program, parent } in FAMILIES {
            let cell = |names: &[&str]| names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ");
            let row = format!("| {sender} | {} | {} | {} |", cell(session), cell(program), cell(parent));
            let row = row.replace("|  |", "| |").replace("|  |", "| |");
            assert!(docs.contains(&row), "docs/HINTS.md lacks {row}");
        }
    }
}
