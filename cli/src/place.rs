//! `kvtier place`: where to run a program's next step, and what it would cost elsewhere.

use std::time::Duration;

use kvtier_proto::v1;
use serde::Serialize;

use crate::args::PlaceArgs;
use crate::client::Client;
use crate::error::CliError;
use crate::parse::word;
use crate::report::Report;
use crate::table::{Align, Table, printable};
use crate::target::named;
use crate::units::{bytes_text, millis_32};

#[derive(Debug, Serialize)]
struct Placed {
    node_id: String,
    reason: String,
    explanation: String,
    costs: Vec<Cost>,
    started: Vec<Started>,
}

#[derive(Debug, Serialize)]
struct Cost {
    node_id: String,
    known: bool,
    cost_us: u64,
    queue_us: u64,
    load_us: u64,
    recompute_us: u64,
    displaced_us: u64,
    host_tokens: u32,
    disk_tokens: u32,
    object_tokens: u32,
    peer_tokens: u32,
    recompute_tokens: u32,
    prefill_tokens_per_second: u32,
}

#[derive(Debug, Serialize)]
struct Started {
    kind: String,
    node_id: String,
    blocks: u64,
    bytes: u64,
    operation_id: String,
}

impl From<&v1::PlaceCost> for Cost {
    fn from(c: &v1::PlaceCost) -> Self {
        let parts = [c.queue_us, c.load_us, c.recompute_us, c.displaced_us];
        Self {
            node_id: c.node_id.clone(),
            known: c.known,
            cost_us: parts.into_iter().fold(0, u64::saturating_add),
            queue_us: c.queue_us,
            load_us: c.load_us,
            recompute_us: c.recompute_us,
            displaced_us: c.displaced_us,
            host_tokens: c.host_tokens,
            disk_tokens: c.disk_tokens,
            object_tokens: c.object_tokens,
            peer_tokens: c.peer_tokens,
            recompute_tokens: c.recompute_tokens,
            prefill_tokens_per_second: c.prefill_tokens_per_second,
        }
    }
}

impl From<&v1::PlaceStarted> for Started {
    fn from(s: &v1::PlaceStarted) -> Self {
        let kind = s.kind().as_str_name();
        Self {
            kind: word(kind.strip_prefix("PLACE_WORK_").unwrap_or(kind)),
            node_id: s.node_id.clone(),
            blocks: s.blocks,
            bytes: s.bytes,
            operation_id: s.operation_id.clone(),
        }
    }
}

/// Asks where to run a step.
///
/// # Errors
/// What resolving targets and asking the daemon can fail with.
pub(crate) async fn place(client: &mut Client, args: &PlaceArgs) -> Result<Report, CliError> {
    let candidates = args.candidates.iter().map(|c| v1::PlaceCandidate {
        node_id: c.node.to_string(),
        queue_ms: c.queue_ms,
        prefill_tokens_per_second: c.tokens_per_second,
    });
    let request = v1::PlaceRequest {
        program_id: args.step_of.clone(),
        targets: named(client, &args.targets).await?.targets(),
        prompt_tokens: args.prompt_tokens,
        candidates: candidates.collect(),
        current_node_id: args.current.as_ref().map(ToString::to_string).unwrap_or_default(),
        start: args.start,
        tenant: args.targets.tenant.clone().unwrap_or_default(),
        deadline_ms: millis_32(args.deadline),
    };
    let reply = client.place(request).await?;
    let reason = reply.reason().as_str_name();
    let placed = Placed {
        node_id: reply.node_id.clone(),
        reason: reason.strip_prefix("PLACE_REASON_").unwrap_or(reason).to_owned(),
        explanation: reply.explanation.clone(),
        costs: reply.costs.iter().map(Cost::from).collect(),
        started: reply.started.iter().map(Started::from).collect(),
    };
    Ok(Report::new(text(&placed), &placed, true))
}

fn text(placed: &Placed) -> String {
    let mut text =
        format!("{} ({}): {}\n", printable(&placed.node_id), printable(&placed.reason), printable(&placed.explanation));
    text.push_str(&table(placed).render(0));
    for s in &placed.started {
        text.push_str(&format!(
            "{} of {} blocks, {}, to {}: operation {}\n",
            printable(&s.kind),
            s.blocks,
            bytes_text(s.bytes),
            printable(&s.node_id),
            printable(&s.operation_id)
        ));
    }
    text
}

fn table(placed: &Placed) -> Table {
    let left = [("", Align::Left), ("NODE", Align::Left)];
    let right = ["COST", "QUEUE", "LOAD", "COMPUTE", "DISPLACED", "HOST", "DISK", "PEER", "OBJECT", "COMPUTED"];
    let columns: Vec<_> = left.into_iter().chain(right.map(|name| (name, Align::Right))).collect();
    let mut table = Table::new(&columns);
    for c in &placed.costs {
        let times = [c.cost_us, c.queue_us, c.load_us, c.recompute_us, c.displaced_us];
        let tokens = [c.host_tokens, c.disk_tokens, c.peer_tokens, c.object_tokens, c.recompute_tokens];
        let mark = if c.node_id == placed.node_id { "*" } else { " " };
        let node = if c.known { c.node_id.clone() } else { format!("{} (unknown)", c.node_id) };
        let cells = [mark.to_owned(), node].into_iter().chain(times.map(millis_text));
        table.row(cells.chain(tokens.map(|tokens| tokens.to_string())));
    }
    table
}

/// Milliseconds with what of them is left of microseconds: `12.345ms`.
fn millis_text(micros: u64) -> String {
    let time = Duration::from_micros(micros);
    format!("{}.{:03}ms", time.as_millis(), time.subsec_micros() % 1_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_choice_is_marked_and_the_unknown_are_named() {
        let cost = |node: &str, queue_us, known| v1::PlaceCost {
            node_id: node.into(),
            queue_us,
            recompute_us: 1_500,
            host_tokens: 320,
            known,
            ..v1::PlaceCost::default()
        };
        let placed = Placed {
            node_id: "b".into(),
            reason: "QUEUE".into(),
            explanation: "b takes least".into(),
            costs: [cost("a", 2_000_000, false), cost("b", 0, true)].iter().map(Cost::from).collect(),
            started: Vec::new(),
        };
        let text = text(&placed);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "b (QUEUE): b takes least");
        assert!(lines[2].contains("a (unknown)") && lines[2].contains("2001.500ms"), "{text}");
        assert!(lines[3].starts_with('*') && lines[3].contains(" 320 "), "{text}");
    }
}
