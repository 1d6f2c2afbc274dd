//! `Move`, `Prefetch`, `Replicate`: what would be done is told at once, and is done as an operation.

use std::sync::Arc;
use std::time::Duration;

use kvtier_proto::{convert, v1};
use kvtier_types::{BlockKey, Outcome, Tier};
use tonic::Status;

use crate::node::Node;
use crate::operations::{self, Goal, Operation, Operations, Terms, Wish};
use crate::services::caller::Caller;
use crate::services::targets::{self, KEYS_PER_CORE_CALL, Resolved};
use crate::services::wire_status;

/// Longest that a move may take.
const MOVE_LIMIT: Duration = Duration::from_secs(3600);
/// How long a prefetch takes that does not say.
const PREFETCH_LIMIT: Duration = Duration::from_secs(30);
/// How long copying to other nodes takes that does not say.
const REPLICATE_LIMIT: Duration = Duration::from_secs(60);
/// Longest deadline that may be asked for.
const MAX_LIMIT: Duration = Duration::from_secs(3600);
/// Copies on other nodes at most.
const MAX_COPIES: u32 = 16;

/// A time on the wire, with its default and its bound.
pub(super) fn limit(millis: u32, default: Duration, most: Duration) -> Duration {
    if millis == 0 { default } else { Duration::from_millis(millis.into()).min(most) }
}

/// What is known beforehand of one block: its outcome, and why it is not ACCEPTED.
type Plan = (Outcome, String);

/// Plans for all keys, a portion a call of the core.
fn plan_all(keys: &[BlockKey], plan: impl Fn(&[BlockKey]) -> Vec<Plan>) -> Vec<Plan> {
    keys.chunks(KEYS_PER_CORE_CALL).flat_map(plan).collect()
}

/// The goals among the targets: blocks with something to do.
pub(super) fn goals(resolved: &[Resolved], plans: &[Plan]) -> Vec<Goal> {
    let named = resolved.iter().flat_map(|one| one.keys().map(|key| (one.target, *key)));
    named.zip(plans).filter(|(_, (outcome, _))| *outcome == Outcome::Accepted).map(|(goal, _)| goal).collect()
}

/// Begins an operation.
///
/// # Errors
/// `RESOURCE_EXHAUSTED` when too many run.
pub(super) fn begin<W>(
    node: &Arc<Node>,
    caller: &Caller,
    (verb, total, limit): (&'static str, usize, Duration),
    work: impl FnOnce(Arc<Operation>) -> W,
) -> Result<Arc<Operation>, Status>
where
    W: Future<Output = ()> + Send + 'static,
{
    let terms = Terms { verb, tenant: caller.tenant.clone(), total: total as u64, limit };
    Operations::begin(node, terms, work)
        .ok_or_else(|| Status::resource_exhausted("too many operations run here: wait for some, or cancel them"))
}

fn reply(resolved: &[Resolved], plans: Vec<Plan>, operation: Option<&Operation>) -> v1::OperationReply {
    v1::OperationReply {
        outcomes: targets::outcomes(resolved, plans),
        operation_id: operation.map(|operation| operation.id().to_owned()).unwrap_or_default(),
    }
}

/// Why a block is copied nowhere else.
pub(super) const STAYS_HERE: &str = "tainted NoReplicate: no other node may have it";

/// Why nothing can be on a device, if that is so.
fn no_device(node: &Node) -> Option<String> {
    node.devices.why_absent().map(|why| format!("there is no device tier here: {why}"))
}

/// Moves blocks so that their fastest copy lies in a tier.
pub(super) fn move_to(
    node: &Arc<Node>,
    caller: &Caller,
    message: &v1::MoveRequest,
) -> Result<v1::OperationReply, Status> {
    let to = convert::tier("to", message.to).map_err(wire_status)?;
    let to = to.ok_or_else(|| Status::invalid_argument("field to is missing: device, host, disk or object"))?;
    let resolved = targets::resolve(node, caller, &message.targets)?;
    let keys: Vec<BlockKey> = resolved.iter().flat_map(Resolved::keys).copied().collect();
    let unsupported = match to {
        Tier::Device => no_device(node),
        Tier::Host => None,
        Tier::Disk | Tier::Object if node.stores.get(to).is_some() => None,
        Tier::Disk | Tier::Object => {
            let why = node.stores.absent.get(&to).map_or("not configured", String::as_str);
            Some(format!("there is no {to} tier here: {why}"))
        }
    };
    if let Some(reason) = unsupported {
        let plans = keys.iter().map(|_| (Outcome::Unsupported, reason.clone())).collect();
        return Ok(reply(&resolved, plans, None));
    }
    let plans = plan_all(&keys, |keys| {
        let plans = node.read_core(|core| core.plan_move(keys, to));
        plans.into_iter().map(|plan| (plan.outcome, plan.reason.to_owned())).collect()
    });
    let goals = goals(&resolved, &plans);
    if message.dry_run || goals.is_empty() {
        return Ok(reply(&resolved, plans, None));
    }
    let operation = begin(node, caller, ("Move", goals.len(), MOVE_LIMIT), |operation| {
        operations::move_blocks(Arc::clone(node), operation, goals, to)
    })?;
    Ok(reply(&resolved, plans, Some(&operation)))
}

/// Brings blocks into host memory, or onto a device.
pub(super) fn prefetch(
    node: &Arc<Node>,
    caller: &Caller,
    message: &v1::PrefetchRequest,
) -> Result<v1::OperationReply, Status> {
    let resolved = targets::resolve(node, caller, &message.targets)?;
    let keys: Vec<BlockKey> = resolved.iter().flat_map(Resolved::keys).copied().collect();
    let to = convert::tier("to", message.to).map_err(wire_status)?.unwrap_or(Tier::Host);
    let unsupported = match to {
        Tier::Host => None,
        Tier::Device => no_device(node),
        Tier::Disk | Tier::Object => {
            return Err(Status::invalid_argument("prefetched is what is brought to host or device: move it down"));
        }
    };
    if let Some(reason) = unsupported {
        let plans = keys.iter().map(|_| (Outcome::Unsupported, reason.clone())).collect();
        return Ok(reply(&resolved, plans, None));
    }
    let plans = plan_all(&keys, |keys| {
        let plan = |key: &BlockKey| node.read_core(|core| core.lies_in(key, to));
        let plans = keys.iter().map(plan).map(|lies| match lies {
            Some((true, _)) => (Outcome::Duplicate, format!("it lies in {to} memory already")),
            _ => (Outcome::Accepted, String::new()),
        });
        plans.collect()
    });
    let goals = goals(&resolved, &plans);
    if goals.is_empty() {
        return Ok(reply(&resolved, plans, None));
    }
    let limit = limit(message.deadline_ms, PREFETCH_LIMIT, MAX_LIMIT);
    let of_work = caller.clone();
    let operation = begin(node, caller, ("Prefetch", goals.len(), limit), |operation| {
        operations::prefetch(Arc::clone(node), operation, goals, (of_work, to))
    })?;
    Ok(reply(&resolved, plans, Some(&operation)))
}

/// Makes copies on other nodes.
pub(super) fn replicate(
    node: &Arc<Node>,
    caller: &Caller,
    message: &v1::ReplicateRequest,
) -> Result<v1::OperationReply, Status> {
    let resolved = targets::resolve(node, caller, &message.targets)?;
    let keys: Vec<BlockKey> = resolved.iter().flat_map(Resolved::keys).copied().collect();
    if message.copies > MAX_COPIES || message.node_ids.len() > MAX_COPIES as usize {
        return Err(Status::invalid_argument(format!("at most {MAX_COPIES} copies on other nodes")));
    }
    let named: Vec<_> =
        message.node_ids.iter().map(|id| convert::node(id)).collect::<Result<_, _>>().map_err(wire_status)?;
    let nodes: Vec<_> = named.iter().map(kvtier_types::NodeId::number).collect();
    let least = if nodes.is_empty() { 1 } else { nodes.len() };
    let copies = if message.copies == 0 { least } else { message.copies as usize };
    if !nodes.is_empty() && copies > nodes.len() {
        return Err(Status::invalid_argument(format!("{copies} copies on {} named nodes", nodes.len())));
    }
    let others = node.read_core(|core| core.members().iter().next().is_some());
    let plans = plan_all(&keys, |keys| {
        let plan = |key: &BlockKey| {
            let plan = |outcome, reason: &str| (outcome, reason.to_owned());
            if node.read_core(|core| core.lies_in(key, Tier::Host)).is_none() {
                plan(Outcome::Missing, "nothing of it is on this node")
            } else if !node.read_core(|core| core.may_replicate(key)) {
                plan(Outcome::Rejected, STAYS_HERE)
            } else if others {
                plan(Outcome::Accepted, "")
            } else {
                plan(Outcome::Rejected, "no other node is known that could take a copy")
            }
        };
        keys.iter().map(plan).collect()
    });
    let goals = goals(&resolved, &plans);
    if goals.is_empty() {
        return Ok(reply(&resolved, plans, None));
    }
    let limit = limit(message.deadline_ms, REPLICATE_LIMIT, MAX_LIMIT);
    let operation = begin(node, caller, ("Replicate", goals.len(), limit), |operation| {
        operations::replicate(Arc::clone(node), operation, goals, Wish { copies, nodes, ahead: false })
    })?;
    Ok(reply(&resolved, plans, Some(&operation)))
}
