//! `kvtier evict`: drops blocks.

use std::collections::BTreeSet;

use kvtier_proto::{convert, v1};
use kvtier_types::{BlockKey, Tier};
use serde::Serialize;

use crate::args::EvictArgs;
use crate::client::{Client, PAGE_BLOCKS};
use crate::error::CliError;
use crate::outcomes::{Outcomes, all_done, is_done};
use crate::report::Report;
use crate::target::named;

#[derive(Serialize)]
struct Evicted {
    dry_run: bool,
    #[serde(flatten)]
    outcomes: Outcomes,
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
/// What resolving targets and asking the daemon can fail with.
pub async fn evict(client: &mut Client, args: &EvictArgs) -> Result<Report, CliError> {
    let tiers: Vec<i32> = args.tiers.iter().map(|tier| v1::Tier::from(*tier).into()).collect();
    let request = v1::EvictRequest { tiers, dry_run: args.dry_run, everywhere: args.everywhere, ..Default::default() };
    let asked = Asked { all: args.all, dry_run: args.dry_run };
    if args.all {
        let keys = every_key(client, &args.tiers).await?;
        let mut reply = v1::EvictReply::default();
        for chunk in keys.chunks(PAGE_BLOCKS as usize) {
            let targets = vec![convert::block_targets(chunk)];
            reply.outcomes.extend(client.evict(v1::EvictRequest { targets, ..request.clone() }).await?.outcomes);
        }
        return Ok(report(&reply, &[], asked));
    }
    let targets = named(client, &args.targets).await?.targets();
    let reply = client.evict(v1::EvictRequest { targets: targets.clone(), ..request }).await?;
    Ok(report(&reply, &targets, asked))
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

/// The report of an answer about `targets`; complete when every target is done or taken on.
#[must_use]
pub fn report(reply: &v1::EvictReply, targets: &[v1::Target], asked: Asked) -> Report {
    let complete = if asked.all {
        let gone = |outcome| is_done(outcome) || outcome == v1::Outcome::Missing;
        reply.outcomes.iter().all(|target| gone(target.outcome()))
    } else {
        all_done(&reply.outcomes, &reply.nodes)
    };
    let evicted = Evicted { dry_run: asked.dry_run, outcomes: Outcomes::new(&reply.outcomes, &reply.nodes, targets) };
    Report::new(text(&evicted, asked), &evicted, complete)
}

/// With `--all` only what was not dropped is listed: the rest is a number.
fn text(evicted: &Evicted, asked: Asked) -> String {
    let applied = v1::Outcome::Applied.as_str_name();
    let rows = evicted.outcomes.rows(|outcome| asked.all && outcome == applied);
    let dry = if evicted.dry_run { "dry run: " } else { "" };
    format!("{rows}{dry}{}\n", evicted.outcomes.counts("nothing to evict"))
}
