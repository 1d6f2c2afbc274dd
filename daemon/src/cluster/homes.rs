//! Other homes for shards of this node: its object store, and peers that take copies into their care.

use std::sync::Arc;
use std::time::Duration;

use kvtier_policy::{Core, LeaseId};
use kvtier_proto::convert::shard_meta;
use kvtier_proto::v1;
use kvtier_types::{BlockKey, NodeNumber, RecordMeta, ShardKey, Tier};
use tokio::time::{Instant, timeout, timeout_at};

use super::peers;
use crate::claims::unix_ms;
use crate::node::Node;

/// Longest that one peer may take for one page.
const PUSH_LIMIT: Duration = Duration::from_secs(20);
/// Peers tried for one page.
const MAX_PEERS: usize = 3;

/// Blocks held in place; they are let go with it.
struct Guard<'a>(&'a Arc<Node>, LeaseId);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.0.with_core(|core, _| core.release_export(self.1));
    }
}

/// What became of shards that were to be written to the object store.
pub(crate) struct Written {
    /// Those that did not get there.
    pub(crate) left: Vec<RecordMeta>,
    /// Whether it took none of those that it was given.
    pub(crate) fails: bool,
}

/// Writes shards behind, each at most once, where there is a store off this node. It takes at most half of the time, so that peers can be asked when the store is
/// slow.
pub(crate) async fn to_object_store(node: &Arc<Node>, metas: Vec<RecordMeta>, deadline: Instant) -> Written {
    let nothing = |left| Written { left, fails: false };
    if !node.has_outer_store() {
        return nothing(metas);
    }
    let until = Instant::now() + deadline.saturating_duration_since(Instant::now()) / 2;
    let keys: Vec<ShardKey> = metas.iter().map(|m| m.key).collect();
    let mut blocks: Vec<BlockKey> = keys.iter().map(|k| k.block).collect();
    blocks.dedup();
    // Held in host memory: what is on disk only comes up, and nothing leaves meanwhile.
    let Ok(lease) = node.with_core(|core, now| core.hold_blocks(now, &blocks, Some(Tier::Object))) else {
        return nothing(metas);
    };
    let held = Guard(node, lease);
    let (mut untried, mut tried) = (keys.clone(), 0);
    loop {
        let moved = node.movement.notified();
        tokio::pin!(moved);
        moved.as_mut().enable();
        let busy = node.with_core(|core, now| {
            core.renew_hold(now, lease);
            tried += core.write_behind(&mut untried);
            core.export_waiting(lease) > 0 && !untried.is_empty() || keys.iter().any(|key| core.is_going_down(key))
        });
        if !busy || timeout_at(until, moved).await.is_err() {
            break;
        }
    }
    drop(held);
    let there = |meta: &RecordMeta| node.read_core(|core| core.in_object_store(&meta.key));
    let (count, left): (_, Vec<_>) = (metas.len(), metas.into_iter().filter(|meta| !there(meta)).collect());
    Written { fails: left.len() == count && tried > 0, left }
}

/// Asks the roomiest peers to take shards over; answers with those that none took.
pub(crate) async fn to_peers(node: &Arc<Node>, mut metas: Vec<RecordMeta>, deadline: Instant) -> Vec<RecordMeta> {
    let mut tried: Vec<NodeNumber> = Vec::new();
    while !metas.is_empty() && tried.len() < MAX_PEERS && Instant::now() < deadline {
        let roomiest = |core: &Core| core.members().roomiest(node.now(), &tried).map(|(number, _)| number);
        let Some(peer) = node.read_core(roomiest) else { break };
        tried.push(peer);
        let taken = push(node, peer, &metas, (deadline, false)).await;
        let mut taken = taken.into_iter();
        metas.retain(|_| !taken.next().unwrap_or(false));
    }
    metas
}

/// Asks a peer to take copies, which it fetches and verifies, until a deadline; whether it is ahead of their use. Answers for
/// each shard whether the peer has it now.
pub(crate) async fn push(
    node: &Arc<Node>,
    peer: NodeNumber,
    metas: &[RecordMeta],
    (deadline, ahead): (Instant, bool),
) -> Vec<bool> {
    let limit = PUSH_LIMIT.min(deadline.saturating_duration_since(Instant::now()));
    match timeout(limit, ask(node, peer, metas, (limit, ahead))).await {
        Ok(Ok(outcomes)) => {
            let applied = |outcome: &v1::PushOutcome| outcome.outcome() == v1::Outcome::Applied;
            for refused in outcomes.iter().filter(|outcome| !applied(outcome)).take(1) {
                tracing::info!(%peer, reason = refused.reason, "a peer did not take some of this node's blocks");
            }
            outcomes.iter().map(applied).collect()
        }
        Ok(Err(error)) => {
            tracing::warn!(%peer, %error, "a peer did not take this node's blocks");
            Vec::new()
        }
        Err(_) => {
            tracing::warn!(%peer, "a peer did not take this node's blocks in time");
            Vec::new()
        }
    }
}

async fn ask(
    node: &Arc<Node>,
    peer: NodeNumber,
    metas: &[RecordMeta],
    (limit, ahead): (Duration, bool),
) -> anyhow::Result<Vec<v1::PushOutcome>> {
    let mut client = peers::client(node, peer, limit).await?;
    let request = v1::PushRequest {
        node_id: node.config.node_id.clone(),
        node_incarnation: node.read_core(Core::incarnation),
        shards: metas.iter().map(|meta| shard_meta(meta, unix_ms())).collect(),
        // The answer takes a moment too.
        deadline_ms: u32::try_from((limit * 9 / 10).as_millis()).unwrap_or(u32::MAX),
        ahead,
    };
    Ok(client.push(request).await?.into_inner().outcomes)
}
