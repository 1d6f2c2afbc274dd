//! `kvtier evict`: drops blocks.

use std::collections::{BTreeMap, BTreeSet};

use kvtier_proto::{convert, v1};
use kvtier_types::{BlockKey, Tier};
use serde::Serialize;

use crate::args::EvictArgs;
use crate::client::Client;
use crate::error::CliError;
use crate::keys::{resolve, short};
use crate::locate::outcome_text;
use crate::report::Report;
use crate::table::{Align, Table};

#[derive(Serialize)]
struct Evicted {
    dry_run: bool,
    /// How many targets had each outcome.
    totals: BTreeMap<String, u64>,
    outcomes: Vec<Target>,
}

#[derive(Serialize)]
struct Target {
    key: String,
    outcome: String,
    reason: String,
}

/// What was asked for.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    /// Every block, rather than named ones: one that went by itself meanwhile is no failure then.
    pub all: bool,
    /// Nothing was dropped.
    pub dry_run: bool,
}

/// Checks that `--all` was meant.
///
/// # Errors
/// [`CliError::Unconfirmed`].
pub fn confirmed(args: &EvictArgs) -> Result<(), CliError> {
    if !args.all || args.yes || args.dry_run {
        return Ok(());
    }
    let tiers: Vec<&str> = args.tiers.iter().map(|tier| tier.name()).collect();
    let scope = if tiers.is_empty() { String::new() } else { format!(" of tier {}", tiers.join(", ")) };
    Err(CliError::Unconfirmed { scope })
}

/// Drops what was named.
///
/// # Errors
/// What resolving keys and asking the daemon can fail with.
pub async fn evict(client: &mut Client, args: &EvictArgs) -> Result<Report, CliError> {
    let keys = if args.all { every_key(client, &args.tiers).await? } else { resolve(client, &args.keys).await? };
    let tiers: Vec<v1::Tier> = args.tiers.iter().map(|tier| v1::Tier::from(*tier)).collect();
    let outcomes = client.evict(&keys, &tiers, args.dry_run).await?;
    Ok(report(&outcomes, Asked { all: args.all, dry_run: args.dry_run }))
}

/// Keys of every block with a copy in one of `tiers`, or anywhere when empty. They are collected before the first is
/// dropped, so that dropping does not move the list under the walk.
async fn every_key(client: &mut Client, tiers: &[Tier]) -> Result<Vec<BlockKey>, CliError> {
    let filters: Vec<i32> =
        if tiers.is_empty() { vec![0] } else { tiers.iter().map(|tier| v1::Tier::from(*tier).into()).collect() };
    let mut keys = BTreeSet::new();
    for tier in filters {
        let mut pages = client.pages(v1::ListRequest { tier, ..v1::ListRequest::default() });
        while let Some(blocks) = pages.next(client).await? {
            for block in &blocks {
                let key = convert::key("block.key", &block.key);
                keys.insert(key.map_err(|e| CliError::BadAnswer { verb: "ls", what: e.to_string() })?);
            }
        }
    }
    Ok(keys.into_iter().collect())
}

/// The report of an answer; complete when every target is done or taken on.
#[must_use]
pub fn report(outcomes: &[v1::TargetOutcome], asked: Asked) -> Report {
    let complete = outcomes.iter().all(|target| match target.outcome() {
        v1::Outcome::Applied | v1::Outcome::Accepted | v1::Outcome::Duplicate => true,
        v1::Outcome::Missing => asked.all,
        _ => false,
    });
    let outcomes: Vec<Target> = outcomes
        .iter()
        .map(|t| Target { key: hex::encode(&t.key), outcome: outcome_text(t.outcome), reason: t.reason.clone() })
        .collect();
    let mut totals = BTreeMap::new();
    outcomes.iter().for_each(|t| *totals.entry(t.outcome.clone()).or_insert(0) += 1);
    let evicted = Evicted { dry_run: asked.dry_run, totals, outcomes };
    Report::new(text(&evicted, asked), &evicted, complete)
}

/// With `--all` only what was not dropped is listed: the rest is a number.
fn text(evicted: &Evicted, asked: Asked) -> String {
    let mut table = Table::new(&[("KEY", Align::Left), ("OUTCOME", Align::Left), ("REASON", Align::Left)]);
    let applied = v1::Outcome::Applied.as_str_name();
    for target in evicted.outcomes.iter().filter(|t| !asked.all || t.outcome != applied) {
        let key = hex::decode(&target.key).map_or_else(|_| target.key.clone(), |bytes| short(&bytes));
        table.row([&key, &target.outcome, &target.reason]);
    }
    let counts: Vec<String> = evicted.totals.iter().map(|(outcome, n)| format!("{n} {outcome}")).collect();
    let counts = if counts.is_empty() { "nothing to evict".to_owned() } else { counts.join(", ") };
    let dry = if evicted.dry_run { "dry run: " } else { "" };
    let rows = if table.is_empty() { String::new() } else { table.render(0) };
    format!("{rows}{dry}{counts}\n")
}
