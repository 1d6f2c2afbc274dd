//! Carries out the core's actions: bytes between host frames and the stores below, or devices.
//!
//! *Bounds*: the core has at most `max_offloads`, `max_onboards` and `max_device_copies` movements under way; each is one task here.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvtier_memory::IoBuf;
use kvtier_policy::{Action, FrameRef, MoveEnd, MoveId};
use kvtier_storage::StorageError;
use kvtier_types::{Expect, Location, RecordMeta, ShardKey, Tier};
use tokio::time::timeout;

use crate::cluster::Fetch;
use crate::device::{self, Copy};
use crate::node::Node;
use crate::pool::frame_id;
use crate::reclaim;

/// Longest a movement may take: then it has failed, and others have their turn. Some may take longer than that if let: a
/// disk that stalls has no deadline, and an object store that barely answers keeps a write for up to three minutes, until
/// there is room, and those before it and its own pack are uploaded. What they store after it was given up is forgotten.
const MOVE_DEADLINE: Duration = Duration::from_secs(60);
/// Times room is made for one record before it is given up.
const ROOM_ATTEMPTS: usize = 3;

/// Starts what one call of the core wants done. Returns at once.
pub fn execute_all(node: &Arc<Node>, actions: Vec<Action>) {
    // Fetches of one call go together: those from one peer share its exports.
    let mut fetches = Vec::new();
    for action in actions {
        match action {
            Action::Fetch { id, key, from, into, bytes, deadline } => {
                fetches.push(Fetch { id, key, from, into, bytes, deadline });
            }
            // What was given up before it began: its frame is another's by now.
            Action::CancelFetch { id } if fetches.iter().any(|f| f.id == id) => fetches.retain(|f| f.id != id),
            other => execute(node, other),
        }
    }
    if let Some(cluster) = node.cluster.as_ref().filter(|_| !fetches.is_empty()) {
        cluster.fetch(node, fetches);
    }
}

fn execute(node: &Arc<Node>, action: Action) {
    match action {
        // Gathered by the caller.
        Action::Fetch { .. } => {}
        Action::CancelFetch { id } => {
            if let Some(cluster) = &node.cluster {
                cluster.cancel(id);
            }
        }
        Action::Forget { tier, at, bytes } => node.stores.forget(tier, at, bytes),
        Action::Offload { id, to, meta, frame } => {
            let task = offload(Arc::clone(node), to, meta, frame);
            report(node, id, None, task);
        }
        Action::Copy { id, key, expect, from, into } => {
            let copy = Copy { key, expect, from, into };
            let reload = copy.is_upward().then_some((Tier::Device, expect.bytes));
            report(node, id, reload, device::copy(Arc::clone(node), copy));
        }
        Action::Onboard { id, key, from, at, expect, into } => {
            let task = onboard(Arc::clone(node), Source { key, from, at, expect }, into);
            report(node, id, Some((from, expect.bytes)), task);
        }
    }
}

/// Tells the core how a movement ended, and of a reload, from a tier and of so many bytes, what it took.
fn report(
    node: &Arc<Node>,
    id: MoveId,
    reload: Option<(Tier, u64)>,
    work: impl Future<Output = MoveEnd> + Send + 'static,
) {
    let node_of_task = Arc::clone(node);
    node.tasks.spawn(async move {
        let began = Instant::now();
        let end = timeout(MOVE_DEADLINE, work).await.unwrap_or(MoveEnd::Failed);
        node_of_task.with_core(|core, _| {
            if let Some((from, bytes)) = reload.filter(|_| matches!(end, MoveEnd::Done(_))) {
                core.note_reload(from, bytes, began.elapsed());
            }
            core.moved(id, end);
        });
        node_of_task.movement.notify_waiters();
    });
}

async fn offload(node: Arc<Node>, to: Tier, meta: RecordMeta, frame: FrameRef) -> MoveEnd {
    let Some(store) = node.stores.get(to) else { return MoveEnd::Failed };
    let Some(pin) = node.arena.pin(frame_id(frame, meta.bytes)) else { return MoveEnd::Failed };
    let mut payload = IoBuf::Frame(pin);
    reclaim::look_ahead(&node, to).await;
    for _ in 0..ROOM_ATTEMPTS {
        let written = store.write(meta.clone(), payload).await;
        payload = written.payload;
        match written.result {
            Ok(at) => return MoveEnd::Done(Some(at)),
            Err(StorageError::Full) => reclaim::make_room(&node, to).await,
            Err(error @ StorageError::Poisoned { .. }) => {
                // What it holds is still read; what is new goes to the next tier.
                node.with_core(|core, _| core.without(to));
                return end_of(&error, "offload", to, &meta.key);
            }
            Err(error) => return end_of(&error, "offload", to, &meta.key),
        }
    }
    tracing::warn!(tier = %to, key = %meta.key, "no room could be made; the block stays in host memory only");
    MoveEnd::Failed
}

struct Source {
    key: ShardKey,
    from: Tier,
    at: Location,
    expect: Expect,
}

async fn onboard(node: Arc<Node>, source: Source, into: FrameRef) -> MoveEnd {
    let Some(store) = node.stores.get(source.from) else { return MoveEnd::Failed };
    let Some(pin) = node.arena.pin(frame_id(into, source.expect.bytes)) else { return MoveEnd::Failed };
    let read = store.read(&source.key, source.at, source.expect, IoBuf::Frame(pin)).await;
    match read.result {
        Ok(()) => MoveEnd::Done(None),
        Err(error) => end_of(&error, "onboard", source.from, &source.key),
    }
}

fn end_of(error: &StorageError, what: &'static str, tier: Tier, key: &ShardKey) -> MoveEnd {
    match error {
        StorageError::Corrupt { .. } => {
            tracing::error!(%tier, %key, %error, "{what}: corrupt copy dropped, it was not served");
            MoveEnd::Corrupt
        }
        StorageError::NotFound => MoveEnd::Gone,
        error => {
            tracing::warn!(%tier, %key, error = error as &dyn std::error::Error, "{what} failed");
            MoveEnd::Failed
        }
    }
}
