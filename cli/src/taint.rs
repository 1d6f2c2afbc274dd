//! `kvtier taint` and `untaint`: what blocks are marked with, and what they mean.

use kvtier_proto::v1;

use crate::args::{TaintArgs, UntaintArgs};
use crate::client::Client;
use crate::error::CliError;
use crate::outcomes::{Outcomes, all_done};
use crate::report::Report;
use crate::target::named;

/// Marks blocks.
///
/// # Errors
/// What resolving targets and asking the daemon can fail with.
pub(crate) async fn taint(client: &mut Client, args: &TaintArgs) -> Result<Report, CliError> {
    let targets = named(client, &args.targets).await?.targets();
    let message = v1::TaintRequest {
        targets: targets.clone(),
        taints: args.taints.iter().map(v1::Taint::from).collect(),
        semantic: args.semantic.map_or(0, |semantic| v1::SemanticType::from(semantic).into()),
        local_only: false,
    };
    Ok(report(&client.taint(message).await?, &targets))
}

/// Takes marks off.
///
/// # Errors
/// What resolving targets and asking the daemon can fail with.
pub(crate) async fn untaint(client: &mut Client, args: &UntaintArgs) -> Result<Report, CliError> {
    let targets = named(client, &args.targets).await?.targets();
    let message = v1::TaintRequest {
        targets: targets.clone(),
        taints: args.taints.iter().map(|pattern| pattern.0.clone()).collect(),
        ..v1::TaintRequest::default()
    };
    Ok(report(&client.untaint(message).await?, &targets))
}

fn report(reply: &v1::TaintReply, targets: &[v1::Target]) -> Report {
    let outcomes = Outcomes::new(&reply.outcomes, &reply.nodes, targets);
    let text = format!("{}{}\n", outcomes.rows(|_| false), outcomes.counts("nothing to mark"));
    Report::new(text, &outcomes, all_done(&reply.outcomes, &reply.nodes))
}
