//! Brings blocks into host memory without a reader, or by way of it onto a device: from disk and object store, from peers, from
//! other nodes' packs.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use kvtier_types::{BlockKey, Outcome, Tier};
use tokio::time::Instant;

use super::{Goal, Held, Job, Operation, moves};
use crate::cluster;
use crate::node::Node;
use crate::services::Caller;

/// Longest that one flight may take: what found no room by then makes way for readers.
const FLIGHT_LIMIT: Duration = Duration::from_secs(30);

/// Brings all of `goals` into a tier of memory, as far as there is room for them.
pub(crate) async fn prefetch(
    node: Arc<Node>,
    operation: Arc<Operation>,
    goals: Vec<Goal>,
    (caller, to): (Caller, Tier),
) {
    let job = Job { node, operation };
    let mut rest = &goals[..];
    let mut brought = 0;
    let room = if to == Tier::Device { job.node.devices.stats().capacity_bytes } else { u64::MAX };
    let room = room.min(job.node.config.host.capacity.0);
    while !rest.is_empty() {
        if brought >= room {
            // The first would go to make room for the last.
            return job.fail(rest, Outcome::Rejected, "more than that memory holds was asked for");
        }
        let (flight, later) = rest.split_at(job.flight(rest));
        rest = later;
        brought += fly(&job, flight, (&caller, to)).await;
    }
}

/// One flight; answers with the bytes that came into host memory.
async fn fly(job: &Job, flight: &[Goal], (caller, to): (&Caller, Tier)) -> u64 {
    let node = &job.node;
    let keys = Job::keys(flight);
    let here = match node.with_core(|core, now| core.hold_blocks(now, &keys, None)) {
        Ok(lease) => Held::new(Arc::clone(node), lease),
        Err(error) => {
            job.fail(flight, Outcome::Rejected, &error.to_string());
            return 0;
        }
    };
    let absent: Vec<BlockKey> =
        node.read_core(|core| keys.iter().copied().filter(|key| core.lies_in(key, Tier::Host).is_none()).collect());
    let mut held = vec![here];
    for mut wanted in cluster::find_elsewhere(node, &absent).await {
        wanted.retain(|(meta, _)| caller.controls(&meta.tenant));
        // What cannot be held is reported as not come.
        if let Ok(lease) = node.with_core(|core, now| core.pull(now, &wanted)) {
            held.push(Held::new(Arc::clone(node), lease));
        }
    }
    let until = Instant::now() + FLIGHT_LIMIT;
    let arrived =
        |core: &kvtier_policy::Core| Ok::<_, Infallible>(held.iter().all(|held| core.export_waiting(held.lease) == 0));
    let Ok(()) = node.wait_until(until, arrived).await;
    let (mut bytes_in_all, mut going_on) = (0, Vec::new());
    for goal in flight {
        let (outcome, reason, bytes) = match node.read_core(|core| core.lies_in(&goal.1, Tier::Host)) {
            Some((true, bytes)) => (Outcome::Applied, "", bytes),
            Some((false, _)) => (Outcome::Rejected, "there was no room in host memory, or it did not come in time", 0),
            None => (Outcome::Missing, "no node and no pack that is known has it", 0),
        };
        bytes_in_all += bytes;
        if to == Tier::Device && outcome == Outcome::Applied {
            going_on.push(*goal);
        } else {
            job.operation.note(*goal, outcome, reason, bytes);
        }
    }
    if !going_on.is_empty() {
        moves::fly(job, going_on, to).await;
    }
    bytes_in_all
}
