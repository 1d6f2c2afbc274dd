//! A verified copy off this node for every shard of some blocks: in an object store, where it is read back, else at a
//! peer, whose fetch verifies it.

use std::sync::Arc;
use std::time::Duration;

use kvtier_memory::IoBuf;
use kvtier_policy::directory::NodeState;
use kvtier_types::{BlockKey, Outcome, RecordMeta, Tier};
use tokio::time::{Instant, sleep};

use super::{FLIGHT_LIMIT, Goal, Held, Job, Operation};
use crate::cluster;
use crate::node::Node;

/// Pause before what found no home is tried again.
const PAUSE: Duration = Duration::from_secs(1);

/// How each block ended, by its place among the goals; told once to whoever waits for the call's answer.
pub(crate) type Answers = tokio::sync::mpsc::UnboundedSender<(usize, Outcome, &'static str)>;

/// Why no copy off this node can be made now, if so.
pub(crate) fn off_node(node: &Arc<Node>) -> Option<&'static str> {
    let ready = node.read_core(|core| core.members().iter().any(|(_, m)| m.record.state == NodeState::Ready));
    let stored = node.has_outer_store();
    if ready || stored {
        return None;
    }
    Some(
        "there is neither another node that is ready nor an object store off this node (object.url): nothing was promised",
    )
}

/// Works until every one of `goals` has its copies. What is not done in one round is tried again.
pub(crate) async fn secure(node: Arc<Node>, operation: Arc<Operation>, goals: Vec<Goal>, answers: Answers) {
    let job = Job { node, operation };
    let mut left: Vec<(usize, Goal)> = goals.into_iter().enumerate().collect();
    while !left.is_empty() {
        let mut again = Vec::new();
        let mut rest = &left[..];
        while !rest.is_empty() {
            let next: Vec<Goal> = rest.iter().map(|(_, goal)| *goal).take(super::FLIGHT_BLOCKS).collect();
            let (flight, later) = rest.split_at(job.flight(&next));
            rest = later;
            again.extend(fly(&job, flight, &answers).await);
        }
        left = again;
        if !left.is_empty() {
            sleep(PAUSE).await;
        }
    }
}

/// One flight; answers with what found no home.
async fn fly(job: &Job, flight: &[(usize, Goal)], answers: &Answers) -> Vec<(usize, Goal)> {
    let node = &job.node;
    let keys: Vec<BlockKey> = flight.iter().map(|(_, (_, key))| *key).collect();
    let Ok(lease) = node.with_core(|core, now| core.hold_blocks(now, &keys, None)) else { return flight.to_vec() };
    let held = Held::new(Arc::clone(node), lease);
    let metas: Vec<RecordMeta> = node.read_core(|core| keys.iter().flat_map(|key| core.describe(key)).collect());
    let until = Instant::now() + FLIGHT_LIMIT;
    let left = in_store(node, metas.clone(), until).await;
    node.with_core(|core, now| core.renew_hold(now, held.lease));
    let left = cluster::to_peers(node, left, until).await;
    let mut again = Vec::new();
    for (at, goal) in flight {
        let own = metas.iter().filter(|meta| meta.key.block == goal.1);
        let bytes: u64 = own.clone().map(|meta| meta.bytes).sum();
        let (outcome, reason) = match (own.count(), left.iter().any(|meta| meta.key.block == goal.1)) {
            (0, _) => (Outcome::Missing, "nothing of it is on this node any more"),
            (_, false) => (Outcome::Applied, ""),
            (_, true) => {
                again.push((*at, *goal));
                continue;
            }
        };
        job.operation.note(*goal, outcome, reason, bytes);
        if answers.send((*at, outcome, reason)).is_err() {
            tracing::debug!("a checkpoint goes on after its call");
        }
    }
    again
}

/// Writes shards to the object store and reads them back; answers with those that are not whole there.
async fn in_store(node: &Arc<Node>, metas: Vec<RecordMeta>, until: Instant) -> Vec<RecordMeta> {
    let mut left = Vec::new();
    let unwritten = cluster::to_object_store(node, metas.clone(), until).await.left;
    for meta in metas {
        let written = unwritten.iter().all(|other| other.key != meta.key);
        if !(written && reads_back(node, &meta).await) {
            left.push(meta);
        }
    }
    left
}

async fn reads_back(node: &Arc<Node>, meta: &RecordMeta) -> bool {
    let Some(store) = node.stores.get(Tier::Object) else { return false };
    let Some((at, expect)) = node.read_core(|core| core.record_of(&meta.key, Tier::Object)) else { return false };
    let Ok(len) = usize::try_from(expect.bytes) else { return false };
    match store.read(&meta.key, at, expect, IoBuf::heap(len)).await.result {
        Ok(()) => true,
        Err(error) => {
            tracing::error!(key = %meta.key, %error, "a checkpoint's record in the object store does not read back");
            false
        }
    }
}
