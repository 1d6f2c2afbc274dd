//! `kvtier move`, `prefetch`, `replicate`, `commit-checkpoint`: what goes on as an operation is followed to its end.

use kvtier_proto::v1;
use serde::Serialize;

use crate::args::{CheckpointArgs, EndArgs, MoveArgs, PrefetchArgs, ReplicateArgs};
use crate::client::Client;
use crate::error::CliError;
use crate::operations::{self, Operation};
use crate::outcomes::{Outcomes, all_done};
use crate::report::Report;
use crate::table::printable;
use crate::target::named;
use crate::units::millis_32;

#[derive(Debug, Serialize)]
struct Moved {
    dry_run: bool,
    /// Empty when nothing was left to do.
    operation_id: String,
    #[serde(flatten)]
    outcomes: Outcomes,
    /// Its end; absent when it was not waited for.
    #[serde(skip_serializing_if = "Option::is_none")]
    operation: Option<Operation>,
}

/// What was asked, besides the verb itself.
struct Asked<'a> {
    targets: &'a [v1::Target],
    dry_run: bool,
    end: EndArgs,
}

/// Moves blocks to a tier.
///
/// # Errors
/// What resolving targets and asking the daemon can fail with.
pub(crate) async fn to_tier(client: &mut Client, args: &MoveArgs) -> Result<Report, CliError> {
    let targets = named(client, &args.targets).await?.targets();
    let to = v1::Tier::from(args.to).into();
    let reply = client.r#move(v1::MoveRequest { targets: targets.clone(), to, dry_run: args.dry_run }).await?;
    end(client, &reply, Asked { targets: &targets, dry_run: args.dry_run, end: args.end }).await
}

/// Brings blocks up.
///
/// # Errors
/// What resolving targets and asking the daemon can fail with.
pub(crate) async fn prefetch(client: &mut Client, args: &PrefetchArgs) -> Result<Report, CliError> {
    let targets = named(client, &args.targets).await?.targets();
    let (deadline_ms, to) = (millis_32(args.deadline), v1::Tier::from(args.to).into());
    let reply = client.prefetch(v1::PrefetchRequest { targets: targets.clone(), deadline_ms, to }).await?;
    end(client, &reply, Asked { targets: &targets, dry_run: false, end: args.end }).await
}

/// Makes copies on other nodes.
///
/// # Errors
/// What resolving targets and asking the daemon can fail with.
pub(crate) async fn replicate(client: &mut Client, args: &ReplicateArgs) -> Result<Report, CliError> {
    let targets = named(client, &args.targets).await?.targets();
    let message = v1::ReplicateRequest {
        targets: targets.clone(),
        copies: args.copies,
        node_ids: args.nodes.clone(),
        deadline_ms: args.deadline.map(millis_32).unwrap_or_default(),
    };
    let reply = client.replicate(message).await?;
    end(client, &reply, Asked { targets: &targets, dry_run: false, end: args.end }).await
}

/// Commits a checkpoint.
///
/// # Errors
/// What resolving targets and asking the daemon can fail with.
pub(crate) async fn commit(client: &mut Client, args: &CheckpointArgs) -> Result<Report, CliError> {
    let targets = named(client, &args.targets).await?.targets();
    // The wire's zero is the daemon's own limit.
    let deadline_ms = if args.end.no_wait { 1 } else { millis_32(args.deadline) };
    let message = v1::CommitCheckpointRequest { targets: targets.clone(), deadline_ms };
    let reply = client.commit_checkpoint(message).await?;
    end(client, &reply, Asked { targets: &targets, dry_run: false, end: args.end }).await
}

/// Follows the operation of an answer, if there is one and it shall be followed.
async fn end(client: &mut Client, reply: &v1::OperationReply, asked: Asked<'_>) -> Result<Report, CliError> {
    let follow = !reply.operation_id.is_empty() && !asked.end.no_wait;
    let ended =
        if follow { Some(operations::follow(client, &reply.operation_id, asked.end.wait).await?) } else { None };
    Ok(report(reply, ended.as_ref(), &asked))
}

/// Complete when every target is done; those that went on are done when their operation is.
fn report(reply: &v1::OperationReply, ended: Option<&v1::Operation>, asked: &Asked<'_>) -> Report {
    let deferred = |outcome| outcome == v1::Outcome::Deferred && ended.is_some();
    let settled: Vec<v1::TargetOutcome> = reply.outcomes.iter().filter(|t| !deferred(t.outcome())).cloned().collect();
    let complete = all_done(&settled, &[]) && ended.is_none_or(operations::succeeded);
    let moved = Moved {
        dry_run: asked.dry_run,
        operation_id: reply.operation_id.clone(),
        outcomes: Outcomes::new(&reply.outcomes, &[], asked.targets),
        operation: ended.map(Operation::from),
    };
    Report::new(text(&moved), &moved, complete)
}

fn text(moved: &Moved) -> String {
    let dry = if moved.dry_run { "dry run: " } else { "" };
    let head = format!("{}{dry}{}\n", moved.outcomes.rows(|_| false), moved.outcomes.counts("nothing to do"));
    match &moved.operation {
        Some(operation) => head + &operations::text(operation),
        None if moved.operation_id.is_empty() => head,
        None => {
            let id = &moved.operation_id;
            format!("{head}operation {}\n{}", printable(id), operations::goes_on(id))
        }
    }
}
