//! What requests say of themselves and their blocks: hints, taints, tolerations.

use std::time::Duration;

use kvtier_types::{BlockHints, Effect, RequestHints, SemanticType, Taint, Toleration};

use super::{WireError, text};
use crate::v1;

/// Most priority there is.
pub const MAX_PRIORITY: u32 = 100;

impl From<SemanticType> for v1::SemanticType {
    fn from(semantic: SemanticType) -> Self {
        Self::try_from(i32::from(semantic as u8)).unwrap_or_default()
    }
}

/// Reads a semantic type; a number from a newer sender is a block without meaning.
#[must_use]
pub fn semantic(value: i32) -> SemanticType {
    u8::try_from(value).map_or_else(|_| SemanticType::default(), SemanticType::from_number)
}

/// Reads hints; absent hints are empty ones.
///
/// # Errors
/// [`WireError`] for a text over its bound, a bad taint, or more of anything than its bound.
pub fn hints(wire: Option<&v1::BlockHints>) -> Result<RequestHints, WireError> {
    let Some(wire) = wire else { return Ok(RequestHints::default()) };
    let id = |field, value: &str| text(field, value, BlockHints::MAX_PROGRAM_ID_BYTES);
    at_most("hints.taints", wire.taints.len(), Taint::MAX_PER_BLOCK)?;
    at_most("hints.tolerations", wire.tolerations.len(), Toleration::MAX_PER_REQUEST)?;
    let priority = u8::try_from(wire.priority.min(MAX_PRIORITY)).unwrap_or(u8::MAX);
    Ok(RequestHints {
        block: BlockHints {
            program_id: id("hints.program_id", &wire.program_id)?,
            semantic: semantic(wire.semantic),
            taints: taints(&wire.taints)?,
        },
        session_id: id("hints.session_id", &wire.session_id)?,
        parent_program_id: id("hints.parent_program_id", &wire.parent_program_id)?,
        agent_role: id("hints.agent_role", &wire.agent_role)?,
        blocks_parent: wire.blocks_parent,
        tolerations: wire.tolerations.iter().map(toleration).collect::<Result<_, _>>()?,
        retain: (wire.retain_ms > 0).then(|| (priority, Duration::from_millis(wire.retain_ms))),
    })
}

impl From<&RequestHints> for v1::BlockHints {
    fn from(hints: &RequestHints) -> Self {
        let (priority, retain) = hints.retain.unwrap_or_default();
        Self {
            program_id: hints.block.program_id.clone(),
            semantic: v1::SemanticType::from(hints.block.semantic).into(),
            session_id: hints.session_id.clone(),
            parent_program_id: hints.parent_program_id.clone(),
            agent_role: hints.agent_role.clone(),
            blocks_parent: hints.blocks_parent,
            taints: hints.block.taints.iter().map(Into::into).collect(),
            tolerations: hints.tolerations.iter().map(Into::into).collect(),
            priority: priority.into(),
            retain_ms: millis(retain),
        }
    }
}

/// Reads taints: sorted, each once.
///
/// # Errors
/// [`WireError`] for one that is none.
pub fn taints(wire: &[v1::Taint]) -> Result<Vec<Taint>, WireError> {
    let mut taints: Vec<Taint> = wire.iter().map(Taint::try_from).collect::<Result<_, _>>()?;
    taints.sort_unstable();
    taints.dedup();
    Ok(taints)
}

impl TryFrom<&v1::Taint> for Taint {
    type Error = WireError;

    fn try_from(w: &v1::Taint) -> Result<Self, WireError> {
        let ttl = Duration::from_millis(w.ttl_ms);
        let known = effect_index(w.effect).and_then(|index| Effect::from_index(index, ttl));
        let effect = known.ok_or(WireError::Enum { field: "taint.effect", value: w.effect })?;
        Ok(Self::new(&w.key, &w.value, effect)?)
    }
}

impl From<&Taint> for v1::Taint {
    fn from(taint: &Taint) -> Self {
        let ttl = if let Effect::Ephemeral(ttl) = taint.effect { ttl } else { Duration::ZERO };
        Self {
            key: taint.key.clone(),
            value: taint.value.clone(),
            effect: effect_number(taint.effect.index()),
            ttl_ms: millis(ttl),
        }
    }
}

/// Reads a toleration.
///
/// # Errors
/// [`WireError`] for an unknown effect or a part that is too long.
pub fn toleration(wire: &v1::Toleration) -> Result<Toleration, WireError> {
    let part =
        |field, value: &str| text(field, value, Taint::MAX_PART_BYTES).map(|part| (!part.is_empty()).then_some(part));
    let effect = match wire.effect {
        0 => None,
        number => {
            let unknown = WireError::Enum { field: "toleration.effect", value: number };
            Some(effect_index(number).filter(|i| *i < Effect::NAMES.len()).ok_or(unknown)?)
        }
    };
    Ok(Toleration { key: part("toleration.key", &wire.key)?, value: part("toleration.value", &wire.value)?, effect })
}

impl From<&Toleration> for v1::Toleration {
    fn from(toleration: &Toleration) -> Self {
        Self {
            key: toleration.key.clone().unwrap_or_default(),
            value: toleration.value.clone().unwrap_or_default(),
            effect: toleration.effect.map_or(0, effect_number),
        }
    }
}

/// Wire numbers start at one.
fn effect_index(number: i32) -> Option<usize> {
    usize::try_from(number).ok()?.checked_sub(1)
}

fn effect_number(index: usize) -> i32 {
    i32::try_from(index + 1).unwrap_or_default()
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

pub(super) fn at_most(field: &'static str, len: usize, max: usize) -> Result<(), WireError> {
    if len > max { Err(WireError::TooLong { field, len, max }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hints_travel_whole() {
        let hints = RequestHints {
            block: BlockHints {
                program_id: "p/1".into(),
                semantic: SemanticType::ToolResult,
                taints: vec!["a=b:NoServe".parse().unwrap(), "t:Ephemeral(30s)".parse().unwrap()],
            },
            session_id: "s".into(),
            parent_program_id: "p".into(),
            agent_role: "planner".into(),
            blocks_parent: Some(false),
            tolerations: vec!["a=b:NoServe".parse().unwrap(), "*".parse().unwrap()],
            retain: Some((90, Duration::from_secs(5))),
        };
        let wire = v1::BlockHints::from(&hints);
        assert_eq!(super::hints(Some(&wire)).unwrap(), hints);
        assert_eq!(super::hints(None).unwrap(), RequestHints::default());
    }

    #[test]
    fn what_is_out_of_bounds_is_refused() {
        let taint = v1::Taint { key: "a".into(), effect: 99, ..Default::default() };
        let many = vec![v1::Taint { key: "a".into(), effect: 1, ..Default::default() }; Taint::MAX_PER_BLOCK + 1];
        for wire in [
            v1::BlockHints { taints: vec![taint], ..Default::default() },
            v1::BlockHints { taints: many, ..Default::default() },
            v1::BlockHints { session_id: "x".repeat(129), ..Default::default() },
            v1::BlockHints {
                tolerations: vec![v1::Toleration { effect: -1, ..Default::default() }],
                ..Default::default()
            },
        ] {
            assert!(super::hints(Some(&wire)).is_err(), "{wire:?}");
        }
    }
}
