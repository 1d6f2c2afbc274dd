//! The gRPC services: thin. Each checks its message, calls the core, and shapes the answer.

mod admin;
mod caller;
mod engine;
mod graphs;
mod headers;
mod hinting;
mod kvcache;
mod peer;
mod placing;
mod programs;
mod rules;
mod targets;

use std::sync::Arc;

use kvtier_policy::{AttachmentId, CoreError};
use kvtier_proto::convert::WireError;
use tonic::Status;

pub(crate) use admin::{AdminService, cluster_counts};
pub(crate) use caller::Caller;
pub(crate) use engine::EngineService;
pub(crate) use kvcache::KvCacheService;
pub(crate) use kvcache::watchers;
pub(crate) use peer::PeerService;
pub(crate) use placing::{MAX_CANDIDATES, Placements};
pub(crate) use programs::ProgramsService;
pub(crate) use targets::{KEYS_PER_CORE_CALL, gather};

use crate::node::Node;

/// The one place where core errors become gRPC statuses.
fn core_status(error: &CoreError) -> Status {
    let text = error.to_string();
    match error {
        CoreError::UnknownAttachment | CoreError::UnknownLease => Status::failed_precondition(text),
        CoreError::Limit { .. } => Status::resource_exhausted(text),
        CoreError::UnknownGroup { .. } | CoreError::BadRange { .. } => Status::invalid_argument(text),
        CoreError::EngineMismatch { .. } => Status::already_exists(text),
        _ => Status::internal(text),
    }
}

/// The one place where wire errors become gRPC statuses.
#[expect(clippy::needless_pass_by_value, reason = "used as `map_err(wire_status)`")]
fn wire_status(error: WireError) -> Status {
    Status::invalid_argument(error.to_string())
}

fn attachment(node: &Arc<Node>, token: &[u8]) -> Result<AttachmentId, Status> {
    node.attachment(token).ok_or_else(|| core_status(&CoreError::UnknownAttachment))
}

/// Carries a verb out to its end, though whoever asked may give up waiting: what is changed is made durable, and told.
async fn to_the_end<T: Send + 'static>(
    node: &Arc<Node>,
    of_peer: bool,
    work: impl Future<Output = Result<T, Status>> + Send + 'static,
) -> Result<T, Status> {
    let calls = Arc::clone(&node.verb_calls[usize::from(of_peer)]);
    let permit = calls.acquire_owned().await.map_err(|_| Status::unavailable("the node stops"))?;
    let taken = node.tasks.spawn(async move {
        let _permit = permit;
        work.await
    });
    taken.await.map_err(|_| Status::internal("the verb's task died"))?
}

/// Verbs about what lies on a tier come too early while its records are still to be read: they would come back, or come in
/// unmarked.
fn recovered(node: &Node) -> Result<(), Status> {
    if node.is_recovering() {
        return Err(Status::unavailable(
            "the object store has not been read since the start: this can be said once it answers; try again then",
        ));
    }
    Ok(())
}
