//! `Admin`'s word on rules: what is in force, and which rule decided what of a block.

use std::sync::Arc;

use kvtier_proto::{convert, v1};
use kvtier_types::TenantId;
use kvtier_types::rules::Decision;
use tonic::Status;

use super::caller::Caller;
use super::wire_status;
use crate::node::Node;
use crate::rules::{self, RulesState};

/// The rules in force.
pub(super) fn in_force(node: &Node) -> v1::RulesReply {
    reply(node, node.rules.state())
}

/// Reads the file again.
pub(super) async fn reload(node: &Arc<Node>) -> v1::RulesReply {
    let state = rules::reload(node).await;
    reply(node, state)
}

fn reply(node: &Node, state: RulesState) -> v1::RulesReply {
    let file = node.rules.path().map(|p| p.display().to_string()).unwrap_or_default();
    v1::RulesReply { file, text: state.text, error: state.refused, generation: state.generation }
}

/// Which rule decided each field of a block's lifecycle.
pub(super) fn explain(
    node: &Node,
    caller: &Caller,
    message: &v1::ExplainRulesRequest,
) -> Result<v1::ExplainRulesReply, Status> {
    let key = convert::key("key", &message.key).map_err(wire_status)?;
    let Some(explained) = node.read_core(|core| core.explain(&key)) else {
        return Ok(v1::ExplainRulesReply { outcome: v1::Outcome::Missing.into(), ..Default::default() });
    };
    let shared = explained.tenant == TenantId::shared().as_str();
    if !caller.operator && !shared && explained.tenant != caller.tenant.as_str() {
        return Ok(v1::ExplainRulesReply { outcome: v1::Outcome::Rejected.into(), ..Default::default() });
    }
    Ok(v1::ExplainRulesReply {
        outcome: v1::Outcome::Applied.into(),
        semantic: v1::SemanticType::from(explained.semantic).into(),
        taints: explained.taints.iter().map(Into::into).collect(),
        model: explained.model,
        tenant: explained.tenant,
        decisions: explained.decisions.into_iter().map(decision).collect(),
    })
}

fn decision(decision: Decision) -> v1::RuleDecision {
    v1::RuleDecision {
        field: decision.field.to_owned(),
        value: decision.value,
        rule: decision.rule,
        line: decision.line,
    }
}
