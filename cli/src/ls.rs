//! `kvtier ls`: the blocks of a node.

use std::collections::BTreeSet;

use kvtier_proto::v1;
use kvtier_types::Tier;
use serde::Serialize;

use crate::args::LsArgs;
use crate::client::{Client, PAGE_BLOCKS};
use crate::error::CliError;
use crate::keys::SHOWN_DIGITS;
use crate::locate::Block;
use crate::report::Report;
use crate::table::{Align, Table};
use crate::units::bytes_text;

#[derive(Serialize)]
struct Listed {
    blocks: Vec<Block>,
    /// True when the limit ended the list and there may be more.
    truncated: bool,
}

/// Lists blocks, as many pages as the limit takes.
///
/// # Errors
/// What the daemon's answers can be.
pub async fn ls(client: &mut Client, filter: &LsArgs) -> Result<Report, CliError> {
    let limit = filter.limit as usize;
    let mut pages = client.pages(v1::ListRequest {
        tier: filter.tier.map_or(0, |tier| v1::Tier::from(tier).into()),
        page_size: filter.limit.min(PAGE_BLOCKS),
        model_contains: filter.model.clone().unwrap_or_default(),
        semantic: filter.semantic.map_or(0, |semantic| v1::SemanticType::from(semantic).into()),
        program_id: filter.program.clone().unwrap_or_default(),
        taint_key: filter.taint.clone().unwrap_or_default(),
        ..v1::ListRequest::default()
    });
    let mut blocks: Vec<v1::BlockInfo> = Vec::new();
    while blocks.len() < limit {
        let Some(page) = pages.next(client).await? else { break };
        blocks.extend(page);
    }
    let truncated = pages.more() || blocks.len() > limit;
    blocks.truncate(limit);
    Ok(report(&blocks, truncated))
}

/// The report of a list.
#[must_use]
pub fn report(blocks: &[v1::BlockInfo], truncated: bool) -> Report {
    let listed = Listed { blocks: blocks.iter().map(Block::from).collect(), truncated };
    Report::new(text(&listed), &listed, true)
}

fn text(listed: &Listed) -> String {
    if listed.blocks.is_empty() {
        return "no blocks\n".to_owned();
    }
    let mut table = Table::new(&[
        ("KEY", Align::Left),
        ("TIERS", Align::Left),
        ("COPIES", Align::Right),
        ("BYTES", Align::Right),
        ("MODEL", Align::Left),
        ("TYPE", Align::Left),
        ("PROGRAM", Align::Left),
        ("DEPTH", Align::Right),
        ("LEASES", Align::Right),
        ("CLAIMS", Align::Right),
        ("TAINTS", Align::Left),
        ("RULE", Align::Left),
    ]);
    for b in &listed.blocks {
        let bytes = b.replicas.iter().fold(0u64, |sum, r| sum.saturating_add(r.bytes));
        table.row([
            &shown(&b.key),
            &tiers(b),
            &b.replicas.len().to_string(),
            &bytes_text(bytes),
            &b.model,
            &b.semantic,
            &b.program_id,
            &b.depth_blocks.to_string(),
            &b.leases.to_string(),
            &b.claims.len().to_string(),
            &b.taints.join(","),
            &b.rule,
        ]);
    }
    let more = if listed.truncated { "; there may be more: raise --limit" } else { "" };
    format!("{}{} blocks{more}\n", table.render(0), listed.blocks.len())
}

fn shown(key: &str) -> String {
    key.get(..SHOWN_DIGITS).map_or_else(|| key.to_owned(), |head| format!("{head}.."))
}

fn tiers(block: &Block) -> String {
    let present: BTreeSet<&str> = block.replicas.iter().map(|r| r.tier.as_str()).collect();
    let known = Tier::ALL.into_iter().map(Tier::name).filter(|name| present.contains(name));
    known.collect::<Vec<_>>().join(",")
}
