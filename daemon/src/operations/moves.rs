//! Moves blocks between the tiers of this node.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kvtier_policy::MoveStep;
use kvtier_types::{BlockKey, Outcome, Tier};
use tokio::time::{Instant, timeout};

use super::{FLIGHT_LIMIT, Goal, Held, Job, Operation};
use crate::node::Node;

/// How often a flight looks again although nothing was told.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Times a copy of one block is asked for.
const MAX_TRIES: u32 = 3;

/// Moves all of `goals` so that their fastest copy lies in `to`.
pub(crate) async fn move_blocks(node: Arc<Node>, operation: Arc<Operation>, goals: Vec<Goal>, to: Tier) {
    let job = Job { node, operation };
    let mut rest = &goals[..];
    while !rest.is_empty() {
        let (flight, later) = rest.split_at(job.flight(rest));
        rest = later;
        fly(&job, flight.to_vec(), to).await;
    }
}

pub(super) async fn fly(job: &Job, mut left: Vec<Goal>, to: Tier) {
    let node = &job.node;
    let held = node.with_core(|core, now| core.hold_blocks(now, &Job::keys(&left), Some(to)));
    let held = match held {
        Ok(lease) => Held::new(Arc::clone(node), lease),
        Err(error) => return job.fail(&left, Outcome::Rejected, &error.to_string()),
    };
    let until = Instant::now() + FLIGHT_LIMIT;
    let mut tries: BTreeMap<BlockKey, u32> = BTreeMap::new();
    while !left.is_empty() {
        let moved = node.movement.notified();
        tokio::pin!(moved);
        moved.as_mut().enable();
        let step = node.with_core(|core, now| {
            core.renew_hold(now, held.lease);
            core.step_move(held.lease, &Job::keys(&left), to)
        });
        settle(job, &mut left, &mut tries, &step);
        if left.is_empty() {
            return;
        }
        if Instant::now() >= until {
            let reason = "it was in use, or found no room, for a minute: try again";
            return job.fail(&left, Outcome::Rejected, reason);
        }
        // The end of a lease is no movement: look again after a while in any case.
        drop(timeout(LOOK_EVERY, moved).await);
    }
}

fn settle(job: &Job, left: &mut Vec<Goal>, tries: &mut BTreeMap<BlockKey, u32>, step: &MoveStep) {
    for key in &step.queued {
        *tries.entry(*key).or_default() += 1;
    }
    left.retain(|goal| {
        if let Some(end) = step.ended.iter().find(|moved| moved.key == goal.1) {
            job.operation.note(*goal, end.outcome, end.reason, end.bytes);
            return false;
        }
        let tried = tries.get(&goal.1).is_some_and(|tries| *tries > MAX_TRIES);
        if tried {
            job.operation.note(*goal, Outcome::Rejected, "it could not be written there: see the log", 0);
        }
        !tried
    });
}
