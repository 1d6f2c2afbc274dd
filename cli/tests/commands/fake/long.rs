//! Its operations, which end at the third wait, and its events, which break off once.

use kvtier_proto::v1::{self, Outcome};
use tonic::Status;
use tonic::codegen::BoxStream;

use super::FakeDaemon;

/// Blocks of every operation.
const TOTAL: u64 = 3;

impl FakeDaemon {
    /// Begins an operation, unless nothing is known of any target or nothing shall be done.
    pub(super) fn begun(&self, verb: &str, targets: &[v1::Target], dry_run: bool) -> v1::OperationReply {
        let mut outcomes = self.outcomes(targets);
        let known = outcomes.iter().any(|o| o.outcome() == Outcome::Applied);
        if dry_run || !known {
            return v1::OperationReply { outcomes, operation_id: String::new() };
        }
        let taken_on = outcomes.iter_mut().filter(|o| o.outcome() == Outcome::Applied);
        taken_on.for_each(|o| o.outcome = Outcome::Accepted.into());
        let mut operations = self.operations.lock().expect("a fake works");
        let operation_id = format!("op-{}", operations.len() + 1);
        let operation = v1::Operation {
            operation_id: operation_id.clone(),
            verb: verb.to_owned(),
            state: v1::OperationState::Running.into(),
            total: TOTAL,
            ..Default::default()
        };
        operations.insert(operation_id.clone(), operation);
        v1::OperationReply { outcomes, operation_id }
    }

    /// One of its operations, changed.
    pub(super) fn operation(&self, id: &str, change: impl Fn(&mut v1::Operation)) -> Result<v1::Operation, Status> {
        let mut operations = self.operations.lock().expect("a fake works");
        let operation = operations.get_mut(id).ok_or_else(|| Status::not_found("no such operation"))?;
        change(operation);
        Ok(operation.clone())
    }
}

/// One more block is done; with the last one the operation is.
pub(super) fn step(operation: &mut v1::Operation) {
    if operation.state() == v1::OperationState::Running {
        operation.done += 1;
        operation.bytes += 65_536;
        if operation.done == TOTAL {
            operation.state = v1::OperationState::Done.into();
        }
    }
}

/// Two events after `after`, then the stream breaks; the first stream says that some were lost.
pub(super) fn events(after: u64) -> BoxStream<v1::WatchReply> {
    let event = |sequence: u64| v1::BlockEvent {
        sequence,
        kind: v1::EventKind::BlockStored.into(),
        key: vec![7; 32].into(),
        tier: v1::Tier::Host.into(),
        bytes: 65_536,
        ..Default::default()
    };
    let (first, second) = (after + 1, after + 2);
    let reply = v1::WatchReply {
        incarnation: 3,
        sequence: second,
        lost: after == 0,
        events: vec![event(first), event(second)],
    };
    Box::pin(tokio_stream::iter([Ok(reply), Err(Status::unavailable("the daemon ends"))]))
}
