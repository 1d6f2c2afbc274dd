//! Words on the command line that name kinds of things on the wire.

use std::str::FromStr;

use kvtier_proto::v1;
use kvtier_types::{Effect, SemanticType, Taint, Toleration};

/// A word as wire names are written: `tool-result` is `TOOL_RESULT`.
fn wire_word(s: &str) -> String {
    s.to_ascii_uppercase().replace('-', "_")
}

/// A word that is not one of a list.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected one of {0}")]
pub struct NotOneOf(String);

impl NotOneOf {
    fn of<'a>(names: impl Iterator<Item = &'a str>) -> Self {
        Self(names.map(word).collect::<Vec<_>>().join(", "))
    }
}

/// A wire name as people write it.
pub(crate) fn word(name: &str) -> String {
    name.to_ascii_lowercase().replace('_', "-")
}

/// Reads a semantic type, in either case, with `-` or `_`.
///
/// # Errors
/// [`NotOneOf`] the types.
pub fn parse_semantic(s: &str) -> Result<SemanticType, NotOneOf> {
    wire_word(s).parse().map_err(|_| NotOneOf::of(SemanticType::ALL.iter().map(|t| t.name())))
}

/// What a program says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SignalKind(pub v1::SignalKind);

impl FromStr for SignalKind {
    type Err = NotOneOf;

    fn from_str(s: &str) -> Result<Self, NotOneOf> {
        let kinds = (1..).map_while(|n| v1::SignalKind::try_from(n).ok());
        let known = v1::SignalKind::from_str_name(&wire_word(s)).filter(|k| *k != v1::SignalKind::Unspecified);
        known.map(Self).ok_or_else(|| NotOneOf::of(kinds.map(|k| k.as_str_name())))
    }
}

/// A kind of event; its wire name without `BLOCK_`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EventKind(pub v1::EventKind);

impl EventKind {
    /// The kind's name as people read it.
    #[must_use]
    pub fn name(kind: v1::EventKind) -> &'static str {
        let name = kind.as_str_name();
        name.strip_prefix("BLOCK_").unwrap_or(name)
    }
}

impl FromStr for EventKind {
    type Err = NotOneOf;

    fn from_str(s: &str) -> Result<Self, NotOneOf> {
        let wanted = wire_word(s);
        let mut kinds = (1..).map_while(|n| v1::EventKind::try_from(n).ok());
        let known = kinds.clone().find(|k| Self::name(*k) == wanted || k.as_str_name() == wanted);
        known.map(Self).ok_or_else(|| NotOneOf::of(kinds.by_ref().map(Self::name)))
    }
}

/// A place in a daemon's events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// The daemon's incarnation.
    pub incarnation: u64,
    /// The last event seen.
    pub sequence: u64,
}

/// A text that is no position.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected INCARNATION:SEQUENCE, two numbers as `kvtier events --json` shows them")]
pub struct BadPosition;

impl FromStr for Position {
    type Err = BadPosition;

    fn from_str(s: &str) -> Result<Self, BadPosition> {
        let (incarnation, sequence) = s.split_once(':').ok_or(BadPosition)?;
        let number = |text: &str| text.parse().map_err(|_| BadPosition);
        Ok(Self { incarnation: number(incarnation)?, sequence: number(sequence)? })
    }
}

/// Taints to take off: those with a key, and with a value and an effect where given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaintPattern(pub v1::Taint);

/// A text that names no taints.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} names no taints: {reason}; write key, key=value, key:Effect or key=value:Effect, with one of {}", Effect::NAMES.join(", "))]
pub struct BadPattern {
    text: String,
    reason: String,
}

impl FromStr for TaintPattern {
    type Err = BadPattern;

    fn from_str(s: &str) -> Result<Self, BadPattern> {
        if let Ok(whole) = s.parse::<Taint>() {
            return Ok(Self(v1::Taint::from(&whole)));
        }
        let bad = |reason: &str| BadPattern { text: s.to_owned(), reason: reason.to_owned() };
        // A toleration has the same parts, each of which may be missing.
        let parts: Toleration = s.parse().map_err(|e: kvtier_types::BadTaint| bad(e.reason))?;
        let wire = v1::Toleration::from(&parts);
        if wire.key.is_empty() {
            return Err(bad("it has no key"));
        }
        Ok(Self(v1::Taint { key: wire.key, value: wire.value, effect: wire.effect, ttl_ms: 0 }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_in_any_spelling() {
        for text in ["tool-result", "TOOL_RESULT", "Tool-Result"] {
            assert_eq!(parse_semantic(text), Ok(SemanticType::ToolResult));
        }
        for text in ["tool-wait", "TOOL_WAIT"] {
            assert_eq!(text.parse(), Ok(SignalKind(v1::SignalKind::ToolWait)));
        }
        for text in ["stored", "block-stored", "BLOCK_STORED"] {
            assert_eq!(text.parse(), Ok(EventKind(v1::EventKind::BlockStored)));
        }
        assert_eq!("program-ended".parse(), Ok(EventKind(v1::EventKind::ProgramEnded)));
    }

    #[test]
    fn a_wrong_name_is_told_the_right_ones() {
        assert!(parse_semantic("prompt").unwrap_err().to_string().contains("system-prompt"));
        let kinds = "stop".parse::<SignalKind>().unwrap_err().to_string();
        assert!(kinds.contains("tool-wait") && kinds.ends_with("cancellation"), "{kinds}");
        assert!("event-kind-unspecified".parse::<EventKind>().unwrap_err().to_string().contains("corrupt"));
        assert!("signal-kind-unspecified".parse::<SignalKind>().is_err());
    }

    #[test]
    fn positions_are_two_numbers() {
        assert_eq!("3:17".parse(), Ok(Position { incarnation: 3, sequence: 17 }));
        for text in ["", "3", "3:", ":3", "3:x", "-1:2"] {
            assert_eq!(text.parse::<Position>(), Err(BadPosition), "{text}");
        }
    }

    #[test]
    fn patterns_name_taints_by_the_parts_they_have() {
        let taint = |key: &str, value: &str, effect: v1::TaintEffect, ttl_ms| v1::Taint {
            key: key.into(),
            value: value.into(),
            effect: effect.into(),
            ttl_ms,
        };
        for (text, pattern) in [
            ("pii", taint("pii", "", v1::TaintEffect::Unspecified, 0)),
            ("pii=card", taint("pii", "card", v1::TaintEffect::Unspecified, 0)),
            ("pii:NoServe", taint("pii", "", v1::TaintEffect::NoServe, 0)),
            ("pii=card:NoServe", taint("pii", "card", v1::TaintEffect::NoServe, 0)),
            ("tmp:Ephemeral", taint("tmp", "", v1::TaintEffect::Ephemeral, 0)),
            ("tmp:Ephemeral(30s)", taint("tmp", "", v1::TaintEffect::Ephemeral, 30_000)),
        ] {
            assert_eq!(text.parse(), Ok(TaintPattern(pattern)), "{text}");
        }
        for text in ["", "*", ":NoServe", "a b", "pii:Serve", "=x"] {
            assert!(text.parse::<TaintPattern>().is_err(), "{text}");
        }
    }
}
