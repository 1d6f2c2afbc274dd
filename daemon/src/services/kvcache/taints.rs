//! `Taint` and `Untaint`: what blocks mean and are marked with, durably, on every node.

use std::sync::Arc;

use kvtier_policy::{MarkChange, TaintPattern};
use kvtier_proto::{convert, v1};
use kvtier_storage::journal::Entry;
use kvtier_types::{BlockKey, Outcome, SemanticType, Taint, Tier};
use tonic::Status;

use super::durable;
use crate::cluster::fanout::{self, Verb};
use crate::marks;
use crate::node::Node;
use crate::services::caller::Caller;
use crate::services::targets::{self, KEYS_PER_CORE_CALL, Resolved};
use crate::services::wire_status;

/// Blocks that other nodes are told of at once.
const KEYS_PER_LETTER: usize = 4096;
/// Blocks that are marked in one hold of the core's lock: each may change tiers, orders and copies.
const MARKS_PER_CORE_CALL: usize = 64;

/// Adds taints, and says what blocks mean.
pub(in crate::services) async fn taint(
    node: &Arc<Node>,
    caller: &Caller,
    message: &v1::TaintRequest,
) -> Result<v1::TaintReply, Status> {
    let add = few(&message.taints).and_then(|taints| convert::taints(taints).map_err(wire_status))?;
    let semantic = convert::semantic(message.semantic);
    if add.is_empty() && semantic == SemanticType::Unspecified {
        return Err(Status::invalid_argument("neither taints nor a type are given: there is nothing to say"));
    }
    let semantic = (semantic != SemanticType::Unspecified).then_some(semantic);
    let change = MarkChange { absent: may_mark_absent(caller, message), add, remove: Vec::new(), semantic };
    mark(node, caller, message, (&change, Verb::Taint)).await
}

/// Takes taints away.
pub(in crate::services) async fn untaint(
    node: &Arc<Node>,
    caller: &Caller,
    message: &v1::TaintRequest,
) -> Result<v1::TaintReply, Status> {
    let pattern = |taint: &v1::Taint| {
        let parts = v1::Toleration { key: taint.key.clone(), value: taint.value.clone(), effect: taint.effect };
        let pattern = convert::toleration(&parts).map_err(wire_status)?;
        if pattern == TaintPattern::default() {
            return Err(Status::invalid_argument("a taint to remove has a key, or an effect, or both"));
        }
        Ok(pattern)
    };
    let remove: Vec<TaintPattern> = few(&message.taints)?.iter().map(pattern).collect::<Result<_, _>>()?;
    if remove.is_empty() {
        return Err(Status::invalid_argument("no taints are given: say which go"));
    }
    let change = MarkChange { absent: may_mark_absent(caller, message), remove, ..MarkChange::default() };
    mark(node, caller, message, (&change, Verb::Untaint)).await
}

/// What is not here has no tenant that could be asked: only an operator who speaks for nobody else may mark it.
fn may_mark_absent(caller: &Caller, message: &v1::TaintRequest) -> bool {
    caller.operator && message.targets.iter().all(|t| t.tenant.is_empty())
}

fn few(taints: &[v1::Taint]) -> Result<&[v1::Taint], Status> {
    if taints.len() > Taint::MAX_PER_BLOCK {
        return Err(Status::invalid_argument(format!(
            "{} taints, a block has at most {}",
            taints.len(),
            Taint::MAX_PER_BLOCK
        )));
    }
    Ok(taints)
}

async fn mark(
    node: &Arc<Node>,
    caller: &Caller,
    message: &v1::TaintRequest,
    (change, verb): (&MarkChange, fn(v1::TaintRequest) -> Verb),
) -> Result<v1::TaintReply, Status> {
    let resolved = targets::resolve(node, caller, &message.targets)?;
    let keys: Vec<BlockKey> = resolved.iter().flat_map(Resolved::keys).copied().collect();
    let outcomes = mark_keys(node, &keys, change).await?;
    let nodes = if message.local_only {
        Vec::new()
    } else {
        let tell = |targets| verb(v1::TaintRequest { targets, local_only: true, ..message.clone() });
        if !caller.operator {
            // They are the caller's, as this node knows. Another one may be about to read them from a pack, or from here: it
            // marks what it has not got yet, on this node's word.
            for portion in own_blocks(node, &keys).await.chunks(KEYS_PER_LETTER) {
                fanout::tell_all(node, tell(vec![convert::block_targets(portion)])).await;
            }
        }
        fanout::tell_all(node, tell(targets::passed_on(caller, &message.targets))).await
    };
    Ok(v1::TaintReply { outcomes: targets::outcomes(&resolved, outcomes), nodes })
}

/// Those of some blocks that are here: whose they are was checked when they were named.
async fn own_blocks(node: &Arc<Node>, keys: &[BlockKey]) -> Vec<BlockKey> {
    let mut here = Vec::new();
    for portion in keys.chunks(KEYS_PER_CORE_CALL) {
        here.extend(node.read_core(|core| {
            let is_here = |key: &&BlockKey| core.lies_in(key, Tier::Host).is_some();
            portion.iter().filter(is_here).copied().collect::<Vec<_>>()
        }));
        tokio::task::yield_now().await;
    }
    here
}

/// Says what blocks mean.
pub(super) async fn retype(node: &Arc<Node>, keys: &[BlockKey], semantic: SemanticType) -> Result<(), Status> {
    mark_keys(node, keys, &MarkChange { semantic: Some(semantic), ..MarkChange::default() }).await.map(drop)
}

async fn mark_keys(
    node: &Arc<Node>,
    keys: &[BlockKey],
    change: &MarkChange,
) -> Result<Vec<(Outcome, &'static str)>, Status> {
    let _turn = node.marks_turn.lock().await;
    marks::make_room(node, keys.len())
        .await
        .map_err(|error| Status::unavailable(format!("the journal cannot be written: {error}")))?;
    let (mut outcomes, mut entries): (Vec<_>, Vec<Entry>) = (Vec::with_capacity(keys.len()), Vec::new());
    for portion in keys.chunks(MARKS_PER_CORE_CALL) {
        let plan = node.with_core(|core, now| core.mark(now, portion, change));
        outcomes.extend(plan.outcomes);
        entries.extend(plan.journal.into_iter().map(marks::entry));
        tokio::task::yield_now().await;
    }
    durable(node, entries, "marked now, but a restart may forget it").await?;
    Ok(outcomes)
}
