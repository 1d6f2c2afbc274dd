//! `kvtier drain`: everything a node alone holds gets another home before it leaves.

use std::time::Duration;

use kvtier_proto::v1;
use serde::Serialize;

use crate::client::Client;
use crate::error::CliError;
use crate::keys::short;
use crate::report::Report;
use crate::table::printable;

#[derive(Debug, Serialize)]
struct Drained {
    examined: u64,
    safe: u64,
    to_object: u64,
    to_peers: u64,
    left: u64,
    failures: Vec<Failure>,
}

#[derive(Debug, Serialize)]
struct Failure {
    reason: String,
    shards: u64,
    keys: Vec<String>,
}

/// Drains a node, with progress on standard error.
///
/// # Errors
/// What the daemon's answers can be.
pub async fn drain(client: &mut Client, node: &str, deadline: Duration) -> Result<Report, CliError> {
    let last = client.drain(node, deadline, |event| eprintln!("kvtier: {}", progress(event))).await?;
    Ok(report(node, &last))
}

fn progress(event: &v1::DrainEvent) -> String {
    let left: u64 = event.failures.iter().map(|f| f.shards).sum();
    format!(
        "{} block shards: {} had another copy, {} to the object store, {} to peers, {left} left",
        event.examined, event.safe, event.to_object, event.to_peers
    )
}

/// The report of a drain; complete when nothing was left.
#[must_use]
pub fn report(node: &str, event: &v1::DrainEvent) -> Report {
    let failures: Vec<Failure> = event
        .failures
        .iter()
        .map(|f| Failure { reason: f.reason.clone(), shards: f.shards, keys: f.keys.iter().map(hex::encode).collect() })
        .collect();
    let left = failures.iter().map(|f| f.shards).sum();
    let drained = Drained {
        examined: event.examined,
        safe: event.safe,
        to_object: event.to_object,
        to_peers: event.to_peers,
        left,
        failures,
    };
    let mut text = format!("{}: {}\n", printable(node), progress(event));
    for (failure, wire) in drained.failures.iter().zip(&event.failures) {
        let keys: Vec<String> = wire.keys.iter().map(|k| short(k)).collect();
        text += &format!("  not copied: {} ({}): {}\n", failure.shards, printable(&failure.reason), keys.join(" "));
    }
    text += if left == 0 { "it may leave\n" } else { "if it leaves now, what was not copied is lost\n" };
    Report::new(text, &drained, left == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_named_with_its_reason() {
        let failure = v1::DrainFailure { reason: "no room".into(), shards: 2, keys: vec![vec![7; 32].into()] };
        let event = v1::DrainEvent { examined: 5, safe: 3, failures: vec![failure], done: true, ..Default::default() };
        let left = report("n1", &event);
        assert!(left.text.contains("no room") && !left.complete, "{}", left.text);
        assert!(report("n1", &v1::DrainEvent { examined: 5, safe: 5, ..Default::default() }).complete);
    }
}
