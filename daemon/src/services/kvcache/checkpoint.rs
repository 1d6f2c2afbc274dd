//! `CommitCheckpoint`: APPLIED only once a verified copy of every shard of every block exists off this node.

use std::sync::Arc;
use std::time::Duration;

use kvtier_proto::v1;
use kvtier_types::{BlockKey, Outcome, SemanticType, Tier};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use tonic::Status;

use super::movement::{STAYS_HERE, begin, goals, limit};
use super::taints;
use crate::node::Node;
use crate::operations;
use crate::services::caller::Caller;
use crate::services::targets::{self, KEYS_PER_CORE_CALL, Resolved};

/// How long a call waits that does not say.
const DEFAULT_WAIT: Duration = Duration::from_secs(30);
/// Longest that a call waits.
const MAX_WAIT: Duration = Duration::from_secs(300);
/// How long the work goes on after the call.
const WORK_LIMIT: Duration = Duration::from_secs(3600);

/// Marks blocks as an execution checkpoint, and answers once their copies exist or the deadline passed.
pub(super) async fn commit(
    node: &Arc<Node>,
    caller: &Caller,
    message: &v1::CommitCheckpointRequest,
) -> Result<v1::OperationReply, Status> {
    let until = Instant::now() + limit(message.deadline_ms, DEFAULT_WAIT, MAX_WAIT);
    let resolved = targets::resolve(node, caller, &message.targets)?;
    let keys: Vec<BlockKey> = resolved.iter().flat_map(Resolved::keys).copied().collect();
    let nowhere = operations::off_node(node);
    let mut plans: Vec<(Outcome, String)> = Vec::with_capacity(keys.len());
    for portion in keys.chunks(KEYS_PER_CORE_CALL) {
        plans.extend(node.read_core(|core| {
            let plan = |key| match (core.lies_in(key, Tier::Host), nowhere) {
                (None, _) => (Outcome::Missing, "nothing of it is on this node".to_owned()),
                (Some(_), Some(reason)) => (Outcome::Rejected, reason.to_owned()),
                (Some(_), None) if !core.may_replicate(key) => (Outcome::Rejected, STAYS_HERE.to_owned()),
                (Some(_), None) => (Outcome::Accepted, String::new()),
            };
            portion.iter().map(plan).collect::<Vec<_>>()
        }));
    }
    let goals = goals(&resolved, &plans);
    let mut operation_id = String::new();
    if !goals.is_empty() {
        let keys: Vec<BlockKey> = goals.iter().map(|(_, key)| *key).collect();
        taints::retype(node, &keys, SemanticType::ExecutionCheckpoint).await?;
        let (told, mut answers) = mpsc::unbounded_channel();
        let count = goals.len();
        let operation = begin(node, caller, ("CommitCheckpoint", count, WORK_LIMIT), |operation| {
            operations::secure(Arc::clone(node), operation, goals, told)
        })?;
        let mut ended: Vec<Option<(Outcome, &'static str)>> = vec![None; count];
        let mut open = count;
        while open > 0 {
            // The channel closes when the work ends, whichever way.
            let Ok(Some((at, outcome, reason))) = timeout_at(until, answers.recv()).await else { break };
            open -= usize::from(ended[at].replace((outcome, reason)).is_none());
        }
        if open > 0 {
            operation.id().clone_into(&mut operation_id);
        }
        let accepted = plans.iter_mut().filter(|(outcome, _)| *outcome == Outcome::Accepted);
        for (plan, ended) in accepted.zip(ended) {
            *plan = ended.map_or_else(deferred, |(outcome, reason)| (outcome, reason.to_owned()));
        }
    }
    Ok(v1::OperationReply { outcomes: targets::outcomes(&resolved, whole(&resolved, plans)), operation_id })
}

fn deferred() -> (Outcome, String) {
    (Outcome::Deferred, "no verified copy off this node yet: wait for the operation".to_owned())
}

/// A target that is more than one block is a checkpoint as a whole or not at all: one block that is not secured decides.
fn whole(resolved: &[Resolved], mut plans: Vec<(Outcome, String)>) -> Vec<(Outcome, String)> {
    let mut from = 0;
    for one in resolved {
        let count = one.keys().count();
        let own = &mut plans[from..from + count];
        from += count;
        let bad = own.iter().find(|(outcome, _)| *outcome != Outcome::Applied).cloned();
        if let Some((outcome, reason)) = bad.filter(|_| !one.by_key) {
            let secured = own.iter().filter(|(outcome, _)| *outcome == Outcome::Applied).count();
            own.fill((outcome, format!("{secured} of {count} blocks are secured; {reason}")));
        }
    }
    plans
}
