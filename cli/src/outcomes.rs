//! What became of the targets of a verb, here and on other nodes: the part that all verbs' reports share.

use std::collections::BTreeMap;

use kvtier_proto::v1::{self, Outcome};
use serde::Serialize;

use crate::keys::short;
use crate::locate::outcome_text;
use crate::table::{Align, Table};
use crate::target::target_text;
use crate::units::bytes_text;

/// Targets that are listed one by one for people; JSON has them all.
const MAX_ROWS: usize = 100;

/// One target's outcome as JSON.
#[derive(Debug, Serialize)]
pub(crate) struct Target {
    /// For block keys.
    #[serde(skip_serializing_if = "String::is_empty")]
    key: String,
    /// For other targets, which have one outcome in all.
    #[serde(skip_serializing_if = "String::is_empty")]
    target: String,
    outcome: String,
    reason: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    blocks: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<u64>,
}

/// Another node's outcome as JSON.
#[derive(Debug, Serialize)]
pub(crate) struct Node {
    node_id: String,
    outcome: String,
    reason: String,
    blocks: u64,
    bytes: u64,
}

/// The outcomes of a call as JSON.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Outcomes {
    /// How many targets had each outcome.
    pub(crate) totals: BTreeMap<String, u64>,
    pub(crate) outcomes: Vec<Target>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) nodes: Vec<Node>,
}

impl Outcomes {
    /// Of a call about `targets`.
    pub(crate) fn new(wire: &[v1::TargetOutcome], nodes: &[v1::NodeOutcome], targets: &[v1::Target]) -> Self {
        let outcomes: Vec<Target> = wire.iter().map(|outcome| target(outcome, targets)).collect();
        let mut totals = BTreeMap::new();
        outcomes.iter().for_each(|t| *totals.entry(t.outcome.clone()).or_insert(0) += 1);
        Self { totals, outcomes, nodes: nodes.iter().map(node).collect() }
    }

    /// The table of targets, without those for which `hidden` is true of the outcome; of very many only what was not
    /// done, and of that the first.
    pub(crate) fn rows(&self, hidden: impl Fn(&str) -> bool) -> String {
        let many = self.outcomes.len() > MAX_ROWS;
        let done = |t: &Target| Outcome::from_str_name(&t.outcome).is_some_and(is_done);
        let shown: Vec<&Target> = self.outcomes.iter().filter(|t| !(hidden(&t.outcome) || many && done(t))).collect();
        let rows = if shown.is_empty() { String::new() } else { rows_of(&shown[..shown.len().min(MAX_ROWS)]) };
        let more = match shown.len().saturating_sub(MAX_ROWS) {
            0 => String::new(),
            n => format!("and {n} more that were not done: --json lists them all\n"),
        };
        rows + &more + &self.node_rows()
    }

    fn node_rows(&self) -> String {
        if self.nodes.is_empty() {
            return String::new();
        }
        let mut table = Table::new(&[
            ("NODE", Align::Left),
            ("OUTCOME", Align::Left),
            ("BLOCKS", Align::Right),
            ("BYTES", Align::Right),
            ("REASON", Align::Left),
        ]);
        for n in &self.nodes {
            table.row([&n.node_id, &n.outcome, &n.blocks.to_string(), &bytes_text(n.bytes), &n.reason]);
        }
        table.render(0)
    }

    /// `3 APPLIED, 1 MISSING`, or what to say of no outcome at all.
    pub(crate) fn counts(&self, nothing: &str) -> String {
        let counts: Vec<String> = self.totals.iter().map(|(outcome, n)| format!("{n} {outcome}")).collect();
        if counts.is_empty() { nothing.to_owned() } else { counts.join(", ") }
    }
}

fn rows_of(targets: &[&Target]) -> String {
    let sized = targets.iter().any(|t| t.blocks.is_some());
    let mut columns = vec![("TARGET", Align::Left), ("OUTCOME", Align::Left)];
    if sized {
        columns.extend([("BLOCKS", Align::Right), ("BYTES", Align::Right)]);
    }
    columns.push(("REASON", Align::Left));
    let mut table = Table::new(&columns);
    for t in targets {
        let mut cells = vec![t.name(), t.outcome.clone()];
        if sized {
            cells.extend([number(t.blocks), t.bytes.map(bytes_text).unwrap_or_default()]);
        }
        cells.push(t.reason.clone());
        table.row(cells);
    }
    table.render(0)
}

impl Target {
    fn name(&self) -> String {
        if self.key.is_empty() {
            return self.target.clone();
        }
        hex::decode(&self.key).map_or_else(|_| self.key.clone(), |bytes| short(&bytes))
    }
}

fn number(n: Option<u64>) -> String {
    n.map(|n| n.to_string()).unwrap_or_default()
}

fn target(wire: &v1::TargetOutcome, targets: &[v1::Target]) -> Target {
    let by_key = !wire.key.is_empty();
    let named = usize::try_from(wire.target).ok().and_then(|index| targets.get(index));
    let name = named.map_or_else(|| format!("target {}", wire.target), target_text);
    Target {
        key: hex::encode(&wire.key),
        target: if by_key { String::new() } else { name },
        outcome: outcome_text(wire.outcome),
        reason: wire.reason.clone(),
        blocks: (!by_key).then_some(wire.blocks),
        bytes: (!by_key || wire.bytes > 0).then_some(wire.bytes),
    }
}

fn node(wire: &v1::NodeOutcome) -> Node {
    Node {
        node_id: wire.node_id.clone(),
        outcome: outcome_text(wire.outcome),
        reason: wire.reason.clone(),
        blocks: wire.blocks,
        bytes: wire.bytes,
    }
}

/// True when it is done or taken on.
pub(crate) const fn is_done(outcome: Outcome) -> bool {
    matches!(outcome, Outcome::Applied | Outcome::Accepted | Outcome::Duplicate)
}

/// True when every target is done, and every node; what is not here may have been done elsewhere, and the other way
/// round.
pub(crate) fn all_done(outcomes: &[v1::TargetOutcome], nodes: &[v1::NodeOutcome]) -> bool {
    let elsewhere = nodes.iter().any(|n| is_done(n.outcome()) && n.blocks > 0);
    let missing = |outcome| elsewhere && outcome == Outcome::Missing;
    outcomes.iter().all(|t| is_done(t.outcome()) || missing(t.outcome()))
        && nodes.iter().all(|n| is_done(n.outcome()) || n.outcome() == Outcome::Missing)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(key: &[u8], outcome: Outcome) -> v1::TargetOutcome {
        v1::TargetOutcome { key: key.to_vec().into(), outcome: outcome.into(), ..Default::default() }
    }

    fn node(outcome: Outcome, blocks: u64) -> v1::NodeOutcome {
        v1::NodeOutcome { node_id: "n2".into(), outcome: outcome.into(), blocks, ..Default::default() }
    }

    #[test]
    fn what_is_missing_here_may_have_been_done_elsewhere() {
        let missing = [outcome(&[], Outcome::Missing)];
        assert!(!all_done(&missing, &[]));
        assert!(!all_done(&missing, &[node(Outcome::Missing, 0)]));
        assert!(all_done(&missing, &[node(Outcome::Applied, 3)]));
        assert!(!all_done(&[outcome(&[], Outcome::Applied)], &[node(Outcome::Deferred, 0)]));
        assert!(all_done(&[outcome(&[], Outcome::Applied)], &[node(Outcome::Missing, 0)]));
    }

    #[test]
    fn targets_without_a_key_are_named_and_sized() {
        let session = v1::target::Target::Session(v1::SessionTarget { session_id: "s1".into(), ..Default::default() });
        let targets = [v1::Target { target: Some(session), ..Default::default() }];
        let wire = v1::TargetOutcome { blocks: 3, bytes: 4096, ..outcome(&[], Outcome::Applied) };
        let outcomes = Outcomes::new(&[wire], &[node(Outcome::Deferred, 0)], &targets);
        let rows = outcomes.rows(|_| false);
        assert!(rows.contains("session s1  APPLIED       3  4.0 KiB  -"), "{rows}");
        assert!(rows.contains("n2    DEFERRED       0    0 B  -"), "{rows}");
        assert_eq!(outcomes.counts("nothing"), "1 APPLIED");
        assert_eq!(Outcomes::default().counts("nothing"), "nothing");
    }

    #[test]
    fn of_very_many_targets_only_what_was_not_done_is_listed() {
        let of = |failed: usize| {
            let key = |n: usize| (n as u64).to_be_bytes();
            let wire = |n| outcome(&key(n), if n < failed { Outcome::Missing } else { Outcome::Applied });
            Outcomes::new(&(0..500).map(wire).collect::<Vec<_>>(), &[], &[]).rows(|_| false)
        };
        assert_eq!(of(0), "");
        assert_eq!(of(3).lines().count(), 4);
        let long = of(130);
        assert_eq!(long.lines().count(), 1 + MAX_ROWS + 1);
        assert!(long.ends_with("and 30 more that were not done: --json lists them all\n"), "{long}");
    }
}
