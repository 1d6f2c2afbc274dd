//! `kvtier next`: which steps should run, in which order.

use kvtier_proto::v1;
use serde::Serialize;

use super::span;
use crate::args::NextArgs;
use crate::client::Client;
use crate::error::CliError;
use crate::report::Report;
use crate::table::{Align, Table};

#[derive(Debug, Serialize)]
struct Step {
    program_id: String,
    step_id: String,
    graph: String,
    tenant: String,
    kind: String,
    rank_ms: u64,
    remaining_ms: u64,
    attained_ms: u64,
    waited_ms: u64,
    due_in_ms: u64,
    priority: i64,
    reason: String,
    running: bool,
}

#[derive(Debug, Serialize)]
struct Next {
    steps: Vec<Step>,
    truncated: bool,
    /// Whether another program should begin on this node; nothing where programs were named.
    admit: Option<bool>,
}

impl From<v1::NextStep> for Step {
    fn from(s: v1::NextStep) -> Self {
        Self {
            program_id: s.program_id,
            step_id: s.step_id,
            graph: s.graph,
            tenant: s.tenant,
            kind: s.kind,
            rank_ms: s.rank_ms,
            remaining_ms: s.remaining_ms,
            attained_ms: s.attained_ms,
            waited_ms: s.waited_ms,
            due_in_ms: s.due_in_ms,
            priority: s.priority,
            reason: s.reason,
            running: s.running,
        }
    }
}

/// Asks what should run next.
///
/// # Errors
/// What the daemon's answers can be.
pub(crate) async fn next(client: &mut Client, args: &NextArgs) -> Result<Report, CliError> {
    let message = v1::NextStepsRequest {
        program_ids: args.programs.clone(),
        tenant: args.tenant.clone().unwrap_or_default(),
        limit: args.limit,
        include_running: args.running,
    };
    let reply = client.next_steps(message).await?;
    let admit = reply.admission.as_ref().map(|advice| advice.admit);
    let steps = reply.steps.into_iter().map(Step::from).collect();
    let next = Next { steps, truncated: reply.truncated, admit };
    let more = if next.truncated { "; there are more: raise --limit" } else { "" };
    let mut text = match next.steps.len() {
        0 => "nothing may run now\n".to_owned(),
        n => format!("{}{n} steps, the first to run first{more}\n", table(&next.steps).render(0)),
    };
    if reply.admission.is_some_and(|advice| !advice.admit) {
        text.push_str("no further program should begin now: those under way wait for memory and transfers\n");
    }
    Ok(Report::new(text, &next, true))
}

fn table(steps: &[Step]) -> Table {
    let mut table = Table::new(&[
        ("PROGRAM", Align::Left),
        ("STEP", Align::Left),
        ("WAITED", Align::Right),
        ("TO THE END", Align::Right),
        ("LEFT", Align::Right),
        ("TAKEN", Align::Right),
        ("PRIORITY", Align::Right),
        ("WHY HERE", Align::Left),
    ]);
    for s in steps {
        let [waited, rank, left, taken] = [s.waited_ms, s.rank_ms, s.remaining_ms, s.attained_ms].map(span);
        table.row([&s.program_id, &s.step_id, &waited, &rank, &left, &taken, &s.priority.to_string(), &s.reason]);
    }
    table
}
