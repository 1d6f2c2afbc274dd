//! Long work that verbs began: what runs, how far it is, and how it ended.
//!
//! *Bounds*: [`MAX_RUNNING`] at once; those that ended are kept for [`KEEP`], at most [`MAX_ENDED`] of them; at most
//! [`MAX_FAILURES`] failures each. *Cancellation*: an operation's work is one future, dropped when it is cancelled, its
//! deadline passes or the node stops; what it held it lets go then. *Shutdown*: each is one of the node's tasks.

mod copies;
mod moves;
mod prefetch;
mod secure;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvtier_policy::LeaseId;
use kvtier_policy::limits::MAX_SHARDS_PER_EXPORT;
use kvtier_proto::v1;
use kvtier_types::{BlockKey, Outcome, TenantId};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::node::Node;

pub(crate) use copies::{Wish, replicate};
pub(crate) use moves::move_blocks;
pub(crate) use prefetch::prefetch;
pub(crate) use secure::{off_node, secure};

/// Operations under way at once.
const MAX_RUNNING: usize = 256;
/// Ended operations remembered.
const MAX_ENDED: usize = 256;
/// How long an ended operation is remembered.
const KEEP: Duration = Duration::from_secs(600);
/// Failures told of one operation.
const MAX_FAILURES: usize = 64;
/// Blocks of one flight at most: their shards must fit one hold.
const FLIGHT_BLOCKS: usize = 64;
/// A flight's bytes are at most this part of host memory, or one block.
const FLIGHT_SHARE: u64 = 8;
/// Longest that one flight may take; what is not done by then has failed.
const FLIGHT_LIMIT: Duration = Duration::from_secs(60);

/// A block that a target named, with the target's index.
pub(crate) type Goal = (u32, BlockKey);

/// What an operation is begun with.
#[derive(Debug)]
pub(crate) struct Terms {
    /// The verb's name.
    pub(crate) verb: &'static str,
    /// Who may see and cancel it, beside operators.
    pub(crate) tenant: TenantId,
    /// Blocks in all.
    pub(crate) total: u64,
    /// When it is given up.
    pub(crate) limit: Duration,
}

/// How far an operation is.
#[derive(Debug, Clone, Default)]
struct Progress {
    done: u64,
    failed: u64,
    bytes: u64,
    failures: Vec<v1::TargetOutcome>,
}

/// One operation.
#[derive(Debug)]
pub(crate) struct Operation {
    id: String,
    terms: Terms,
    began: Instant,
    progress: Mutex<Progress>,
    state: watch::Sender<v1::OperationState>,
    cancel: CancellationToken,
}

impl Operation {
    /// Its name: random, so that it cannot be guessed.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// Who may see it, beside operators.
    pub(crate) const fn tenant(&self) -> &TenantId {
        &self.terms.tenant
    }

    /// Takes note of a block's end.
    pub(crate) fn note(&self, (target, key): Goal, outcome: Outcome, reason: &str, bytes: u64) {
        let mut progress = self.progress.lock();
        if matches!(outcome, Outcome::Applied | Outcome::Duplicate) {
            progress.done += 1;
            progress.bytes += bytes;
            return;
        }
        progress.failed += 1;
        if progress.failures.len() < MAX_FAILURES {
            progress.failures.push(v1::TargetOutcome {
                key: key.as_bytes().to_vec().into(),
                outcome: v1::Outcome::from(outcome).into(),
                reason: reason.to_owned(),
                target,
                ..Default::default()
            });
        }
    }

    /// Ends it early.
    pub(crate) fn cancel(&self) {
        self.cancel.cancel();
    }

    /// Waits for its end, or for so long.
    pub(crate) async fn ended(&self, limit: Duration) {
        let mut state = self.state.subscribe();
        // Whether it ended in time is what its state says.
        drop(tokio::time::timeout(limit, state.wait_for(|s| *s != v1::OperationState::Running)).await);
    }

    /// As it is told.
    pub(crate) fn view(&self) -> v1::Operation {
        let progress = self.progress.lock().clone();
        v1::Operation {
            operation_id: self.id.clone(),
            verb: self.terms.verb.to_owned(),
            state: (*self.state.borrow()).into(),
            total: self.terms.total,
            done: progress.done,
            failed: progress.failed,
            bytes: progress.bytes,
            age_ms: u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX),
            failures: progress.failures,
        }
    }
}

/// Counts that only grow, for metrics.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Counts {
    /// Ended, by state: done, cancelled, expired.
    pub(crate) ended: [u64; 3],
    /// Blocks done and failed.
    pub(crate) blocks: [u64; 2],
}

#[derive(Debug, Default)]
struct Table {
    running: BTreeMap<String, Arc<Operation>>,
    ended: VecDeque<(Instant, Arc<Operation>)>,
    counts: Counts,
}

/// All operations of a node.
#[derive(Debug, Default)]
pub(crate) struct Operations(Mutex<Table>);

impl Operations {
    /// One of them.
    pub(crate) fn find(&self, id: &str) -> Option<Arc<Operation>> {
        let mut table = self.0.lock();
        table.forget_old();
        let ended = table.ended.iter().map(|(_, op)| op);
        table.running.get(id).or_else(|| ended.into_iter().find(|op| op.id == id)).cloned()
    }

    /// All of them, those that run first.
    pub(crate) fn list(&self) -> Vec<Arc<Operation>> {
        let mut table = self.0.lock();
        table.forget_old();
        table.running.values().chain(table.ended.iter().rev().map(|(_, op)| op)).cloned().collect()
    }

    /// Operations under way, and counts so far.
    pub(crate) fn counts(&self) -> (usize, Counts) {
        let table = self.0.lock();
        (table.running.len(), table.counts)
    }

    /// Begins one: `work` runs as a task of the node until it ends, is cancelled, or its time is over. `None` when too
    /// many run already, or the system has no random bytes.
    pub(crate) fn begin<W>(
        node: &Arc<Node>,
        terms: Terms,
        work: impl FnOnce(Arc<Operation>) -> W,
    ) -> Option<Arc<Operation>>
    where
        W: Future<Output = ()> + Send + 'static,
    {
        let mut name = [0; 16];
        let filled = rustix::rand::getrandom(&mut name, rustix::rand::GetRandomFlags::empty()).ok()?;
        if filled < name.len() {
            return None;
        }
        let limit = terms.limit;
        let operation = Arc::new(Operation {
            id: hex::encode(name),
            terms,
            began: Instant::now(),
            progress: Mutex::default(),
            state: watch::Sender::new(v1::OperationState::Running),
            cancel: CancellationToken::new(),
        });
        {
            let mut table = node.operations.0.lock();
            if table.running.len() >= MAX_RUNNING {
                return None;
            }
            table.running.insert(operation.id.clone(), Arc::clone(&operation));
        }
        let (of_task, running) = (Arc::clone(node), Arc::clone(&operation));
        let work = work(Arc::clone(&operation));
        node.tasks.spawn(async move {
            let state = tokio::select! {
                () = of_task.stopping.cancelled() => v1::OperationState::Cancelled,
                () = running.cancel.cancelled() => v1::OperationState::Cancelled,
                ended = tokio::time::timeout(limit, work) => match ended {
                    Ok(()) => v1::OperationState::Done,
                    Err(_) => v1::OperationState::Expired,
                },
            };
            of_task.operations.end(&running, state);
        });
        Some(operation)
    }

    fn end(&self, operation: &Arc<Operation>, state: v1::OperationState) {
        let mut table = self.0.lock();
        table.running.remove(&operation.id);
        let at = match state {
            v1::OperationState::Cancelled => 1,
            v1::OperationState::Expired => 2,
            _ => 0,
        };
        table.counts.ended[at] += 1;
        let progress = operation.progress.lock();
        table.counts.blocks[0] += progress.done;
        table.counts.blocks[1] += progress.failed;
        drop(progress);
        table.ended.push_back((Instant::now(), Arc::clone(operation)));
        table.forget_old();
        drop(table);
        operation.state.send_replace(state);
    }
}

impl Table {
    fn forget_old(&mut self) {
        while self.ended.front().is_some_and(|(at, _)| self.ended.len() > MAX_ENDED || at.elapsed() > KEEP) {
            self.ended.pop_front();
        }
    }
}

/// Blocks held for an operation; they are let go with it.
struct Held {
    node: Arc<Node>,
    lease: LeaseId,
}

impl Held {
    const fn new(node: Arc<Node>, lease: LeaseId) -> Self {
        Self { node, lease }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.node.with_core(|core, _| core.release_export(self.lease));
    }
}

/// An operation's work: some blocks, flight by flight.
struct Job {
    node: Arc<Node>,
    operation: Arc<Operation>,
}

impl Job {
    /// How many of the next goals go together.
    fn flight(&self, goals: &[Goal]) -> usize {
        let most = self.node.config.host.capacity.0 / FLIGHT_SHARE;
        let first = &goals[..goals.len().min(FLIGHT_BLOCKS)];
        self.node.read_core(|core| {
            let (mut shards, mut bytes) = (0, 0);
            let fits = first.iter().take_while(|(_, key)| {
                let weight = core.weigh(key);
                shards += weight.0;
                bytes += weight.1;
                shards <= MAX_SHARDS_PER_EXPORT && bytes <= most
            });
            fits.count().max(1)
        })
    }

    fn keys(goals: &[Goal]) -> Vec<BlockKey> {
        goals.iter().map(|(_, key)| *key).collect()
    }

    fn fail(&self, goals: &[Goal], outcome: Outcome, reason: &str) {
        for goal in goals {
            self.operation.note(*goal, outcome, reason, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operation(id: u64) -> Arc<Operation> {
        let terms = Terms { verb: "Move", tenant: TenantId::shared(), total: 3, limit: Duration::from_secs(1) };
        Arc::new(Operation {
            id: id.to_string(),
            terms,
            began: Instant::now(),
            progress: Mutex::default(),
            state: watch::Sender::new(v1::OperationState::Running),
            cancel: CancellationToken::new(),
        })
    }

    #[test]
    fn ended_operations_and_their_failures_are_bounded() {
        let operations = Operations::default();
        for id in 0..1_000 {
            let one = operation(id);
            operations.0.lock().running.insert(one.id.clone(), Arc::clone(&one));
            for n in 0..200 {
                one.note((0, BlockKey::new([n; 32])), Outcome::Missing, "gone", 1);
            }
            operations.end(&one, v1::OperationState::Done);
        }
        let (running, counts) = operations.counts();
        assert_eq!((running, counts.ended, counts.blocks), (0, [1_000, 0, 0], [0, 200_000]));
        assert_eq!(operations.list().len(), MAX_ENDED);
        assert!(operations.find("3").is_none());
        let last = operations.find("999").unwrap().view();
        assert_eq!((last.failed, last.failures.len(), last.state()), (200, MAX_FAILURES, v1::OperationState::Done));
    }

    #[tokio::test]
    async fn whoever_waits_hears_the_end_and_does_not_wait_beyond_its_time() {
        let operations = Operations::default();
        let one = operation(1);
        one.ended(Duration::from_millis(1)).await;
        assert_eq!(one.view().state(), v1::OperationState::Running);
        operations.end(&one, v1::OperationState::Expired);
        one.ended(Duration::from_secs(600)).await;
        assert_eq!(one.view().state(), v1::OperationState::Expired);
    }
}
