//! Verbs that every node carries out: passed on at once to those that answer, later to those that are away.
//!
//! *Invariants*: a node is told in the order in which verbs were said here. One that is away, or restarts, is told once it
//! is back, in whichever life: what it evicts may lie on its disk. Verbs are idempotent, so telling twice is no harm.
//! *Bounds*: [`ANSWER_LIMIT`] a call; those of [`super::outbox`].

use std::sync::Arc;
use std::time::Duration;

use kvtier_proto::v1;
use kvtier_types::NodeId;
use tokio::time::{interval, timeout};
use tonic::Code;

use super::outbox::{Outbox, Queued};
use super::peers::{self, Client};
use crate::node::Node;

/// A verb for every node.
pub(crate) use kvtier_proto::v1::passed_on::Verb;

/// Longest that a caller waits for other nodes; what is not answered by then is deferred.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// Longest that connecting to a node may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// Longest that a node may take to carry out one verb.
const CALL_LIMIT: Duration = Duration::from_secs(30);

/// Tells all other nodes of a verb: one outcome each, `DEFERRED` for those that could not be told yet.
pub(crate) async fn tell_all(node: &Arc<Node>, verb: Verb) -> Vec<v1::NodeOutcome> {
    tell_all_but(node, verb).await.0
}

/// As [`tell_all`], and says who could not be told yet.
pub(crate) async fn tell_all_but(node: &Arc<Node>, verb: Verb) -> (Vec<v1::NodeOutcome>, Vec<NodeId>) {
    let Some(cluster) = node.cluster.as_ref().filter(|_| !node.config.cluster.is_embedded()) else {
        return (Vec::new(), Vec::new());
    };
    let outbox = &cluster.outbox;
    let living: Vec<NodeId> = cluster.records().into_iter().map(|r| r.id).collect();
    // Nodes that came since the last round.
    tokio::task::block_in_place(|| outbox.tend(living.iter().cloned()));
    let Queued { letter, answers, refused } = outbox.queue(&cluster.id, verb);
    for (id, _) in answers.iter().filter(|(id, _)| living.contains(id)) {
        send(node, id);
    }
    let reason = "too much waits for this node already: repeat it once the node is back";
    let mut outcomes: Vec<v1::NodeOutcome> =
        refused.iter().map(|id| outcome(id, v1::Outcome::Rejected, reason.into())).collect();
    let asked = answers.into_iter().map(|(id, answer)| {
        let away = !living.contains(&id);
        async move {
            let answered = if away { None } else { timeout(ANSWER_LIMIT, answer).await.ok().and_then(Result::ok) };
            (id, answered)
        }
    });
    let mut untold = Vec::new();
    for (id, answered) in futures::future::join_all(asked).await {
        outcomes.push(answered.unwrap_or_else(|| {
            untold.push(id.clone());
            outcome(&id, v1::Outcome::Deferred, "it could not be told yet: it is once it is back".into())
        }));
    }
    if !untold.is_empty() {
        let of_task = Arc::clone(outbox);
        let of_letter = untold.clone();
        let kept = tokio::task::spawn_blocking(move || of_task.keep(&letter, &of_letter)).await;
        if let Err(error) = kept.map_err(std::io::Error::other).flatten() {
            tracing::error!(%error, "a verb for nodes that are away is not durable: a restart of this node forgets it");
        }
    }
    (outcomes, untold)
}

/// As [`tell_all`], but while much waits for nodes that are away, they are not told: what is large must not keep verbs that
/// free something from them.
pub(crate) async fn tell_all_with_room(node: &Arc<Node>, verb: Verb) -> Vec<v1::NodeOutcome> {
    let is_crowded = node.cluster.as_ref().is_some_and(|cluster| cluster.outbox.is_crowded());
    if is_crowded { tell_living(node, verb).await } else { tell_all(node, verb).await }
}

/// Tells all nodes that live of a verb that is no news to one that comes back later.
pub(crate) async fn tell_living(node: &Arc<Node>, verb: Verb) -> Vec<v1::NodeOutcome> {
    let Some(cluster) = node.cluster.as_ref().filter(|_| !node.config.cluster.is_embedded()) else { return Vec::new() };
    let others = cluster.records().into_iter().map(|r| r.id).filter(|id| *id != cluster.id);
    let told = others.map(|id| {
        let verb = verb.clone();
        async move {
            let say = async {
                let mut client = peers::client(node, id.number(), CONNECT_LIMIT).await?;
                Ok::<_, anyhow::Error>(say(&mut client, &id, verb).await?)
            };
            let answered = timeout(ANSWER_LIMIT, say).await.map_err(anyhow::Error::from).flatten();
            answered.unwrap_or_else(|error| outcome(&id, v1::Outcome::Missing, format!("it was not told: {error:#}")))
        }
    });
    futures::future::join_all(told).await
}

/// Tells nodes that are back what waited for them, until this node stops.
pub(super) async fn run(node: Arc<Node>, outbox: Arc<Outbox>) {
    let mut ticks = interval(node.config.cluster.heartbeat.0);
    loop {
        tokio::select! {
            () = node.stopping.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let Some(cluster) = &node.cluster else { return };
        let living: Vec<NodeId> = cluster.records().into_iter().map(|r| r.id).filter(|id| *id != cluster.id).collect();
        let (of_task, heard) = (Arc::clone(&outbox), living.clone());
        if tokio::task::spawn_blocking(move || of_task.tend(heard.into_iter())).await.is_err() {
            tracing::error!("the outbox could not be tended");
        }
        for id in &living {
            send(&node, id);
        }
    }
}

/// Sends what waits for a node, in the background, unless that is under way.
fn send(node: &Arc<Node>, id: &NodeId) {
    let Some(outbox) = node.cluster.as_ref().map(|c| Arc::clone(&c.outbox)) else { return };
    if !outbox.begin(id) {
        return;
    }
    let (of_task, id) = (Arc::clone(node), id.clone());
    node.tasks.spawn(async move {
        let sent = tokio::select! {
            () = of_task.stopping.cancelled() => return,
            sent = send_queue(&of_task, &outbox, &id) => sent,
        };
        // At a good end nothing waited, and another may send already.
        if let Err(error) = sent {
            tracing::debug!(peer = %id, %error, "a node was not told of all verbs: later");
            outbox.failed(&id);
        }
    });
}

async fn send_queue(node: &Arc<Node>, outbox: &Outbox, id: &NodeId) -> anyhow::Result<()> {
    let mut client = peers::client(node, id.number(), CONNECT_LIMIT).await?;
    while let Some(letter) = outbox.next(id) {
        let answer = timeout(CALL_LIMIT, say(&mut client, id, letter.verb.clone())).await?;
        match answer {
            Ok(outcome) => outbox.told(id, outcome),
            Err(status) if passing(status.code()) => return Err(status.into()),
            Err(status) => {
                tracing::warn!(peer = %id, %status, "a node refused a verb that was passed on to it");
                let unknown = status.code() == Code::Unimplemented;
                let refused = if unknown { v1::Outcome::Unsupported } else { v1::Outcome::Rejected };
                outbox.told(id, outcome(id, refused, status.message().to_owned()));
            }
        }
    }
    Ok(())
}

/// Whether a node that answered so may well answer otherwise later.
const fn passing(code: Code) -> bool {
    matches!(
        code,
        Code::Unavailable
            | Code::DeadlineExceeded
            | Code::Cancelled
            | Code::Unknown
            | Code::Aborted
            | Code::ResourceExhausted
    )
}

async fn say(client: &mut Client, id: &NodeId, verb: Verb) -> Result<v1::NodeOutcome, tonic::Status> {
    Ok(match verb {
        Verb::Evict(request) => sum(id, &client.evict(request).await?.into_inner().outcomes),
        Verb::Taint(request) => sum(id, &client.taint(request).await?.into_inner().outcomes),
        Verb::Untaint(request) => sum(id, &client.untaint(request).await?.into_inner().outcomes),
        Verb::Signal(request) => {
            let reply = client.signal(request).await?.into_inner();
            let answer = outcome(id, reply.outcome(), reply.reason.clone());
            v1::NodeOutcome { blocks: reply.blocks, bytes: reply.bytes, ..answer }
        }
        Verb::Declare(request) => {
            let reply = client.declare(request).await?.into_inner();
            outcome(id, reply.outcome(), reply.reason)
        }
        Verb::Progress(request) => {
            let reply = client.progress(request).await?.into_inner();
            outcome(id, reply.outcome(), reply.reason)
        }
    })
}

fn outcome(id: &NodeId, outcome: v1::Outcome, reason: String) -> v1::NodeOutcome {
    v1::NodeOutcome { node_id: id.to_string(), outcome: outcome.into(), reason, blocks: 0, bytes: 0 }
}

/// One outcome for a node: what it did if it did anything, else what it said first.
fn sum(id: &NodeId, targets: &[v1::TargetOutcome]) -> v1::NodeOutcome {
    let did = [v1::Outcome::Applied, v1::Outcome::Accepted, v1::Outcome::Deferred, v1::Outcome::Clipped];
    let done = did.into_iter().find_map(|o| targets.iter().find(|t| t.outcome() == o));
    let word = done.or_else(|| targets.iter().find(|t| t.outcome() != v1::Outcome::Missing)).or(targets.first());
    let (kind, reason) = word.map_or((v1::Outcome::Missing, ""), |t| (t.outcome(), t.reason.as_str()));
    v1::NodeOutcome {
        blocks: targets.iter().map(|t| t.blocks).sum(),
        bytes: targets.iter().map(|t| t.bytes).sum(),
        ..outcome(id, kind, reason.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_summed_up_by_what_it_did() {
        let id = NodeId::new("a").expect("a valid name");
        let target =
            |outcome: v1::Outcome, blocks| v1::TargetOutcome { outcome: outcome.into(), blocks, ..Default::default() };
        let mixed = sum(&id, &[target(v1::Outcome::Missing, 0), target(v1::Outcome::Applied, 3)]);
        assert_eq!((mixed.outcome(), mixed.blocks), (v1::Outcome::Applied, 3));
        let refused = sum(&id, &[target(v1::Outcome::Missing, 0), target(v1::Outcome::Rejected, 0)]);
        assert_eq!(refused.outcome(), v1::Outcome::Rejected);
        assert_eq!(sum(&id, &[]).outcome(), v1::Outcome::Missing);
    }
}
