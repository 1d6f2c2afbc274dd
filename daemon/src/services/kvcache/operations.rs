//! Long work of verbs: looked at, waited for, given up. Callers see their own tenant's; operators all.

use std::sync::Arc;
use std::time::Duration;

use kvtier_proto::v1;
use tonic::Status;

use crate::node::Node;
use crate::operations::Operation;
use crate::services::caller::Caller;

/// How long a wait takes that does not say.
const DEFAULT_WAIT: Duration = Duration::from_secs(30);
/// Longest that one call waits: whoever wants to wait longer calls again.
const MAX_WAIT: Duration = Duration::from_secs(300);
/// How long a cancelled operation may take to let go.
const CANCEL_WAIT: Duration = Duration::from_secs(5);

fn find(node: &Arc<Node>, caller: &Caller, id: &str) -> Result<Arc<Operation>, Status> {
    // What others began does not exist for this caller.
    let found = node.operations.find(id).filter(|operation| caller.controls(operation.tenant()));
    found.ok_or_else(|| {
        Status::not_found("no such operation: it was never begun here, or ended more than 10 minutes ago")
    })
}

/// How far an operation is.
pub(super) fn get(node: &Arc<Node>, caller: &Caller, message: &v1::OperationRequest) -> Result<v1::Operation, Status> {
    find(node, caller, &message.operation_id).map(|operation| operation.view())
}

/// Waits for an operation's end.
pub(super) async fn wait(
    node: &Arc<Node>,
    caller: &Caller,
    message: &v1::OperationRequest,
) -> Result<v1::Operation, Status> {
    let operation = find(node, caller, &message.operation_id)?;
    let limit = super::movement::limit(message.wait_ms, DEFAULT_WAIT, MAX_WAIT);
    operation.ended(limit).await;
    Ok(operation.view())
}

/// Gives an operation up. What it had done stays done.
pub(super) async fn cancel(
    node: &Arc<Node>,
    caller: &Caller,
    message: &v1::OperationRequest,
) -> Result<v1::Operation, Status> {
    let operation = find(node, caller, &message.operation_id)?;
    operation.cancel();
    operation.ended(CANCEL_WAIT).await;
    Ok(operation.view())
}

/// All that the caller may see.
pub(super) fn list(node: &Arc<Node>, caller: &Caller) -> v1::ListOperationsReply {
    let all = node.operations.list();
    let own = all.iter().filter(|operation| caller.controls(operation.tenant()));
    v1::ListOperationsReply { operations: own.map(|operation| operation.view()).collect() }
}
