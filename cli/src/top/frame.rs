//! What the view shows of a look: text for a terminal of any size, and JSON.

use kvtier_proto::v1;
use serde_json::{Value, json};

use super::Look;
use super::change::{Change, is_hit};
use super::screen::Size;
use crate::claims::{self, Claim};
use crate::error::CliError;
use crate::meaning;
use crate::programs::{self, Program};
use crate::status::{self, tier_text};
use crate::table::{Align, Table, printable};
use crate::units::{bytes_text, duration_text, share_text};

/// Cells of the bar that says how full a tier is.
const BAR_CELLS: u64 = 12;
/// Fewest rows of a long table that a small terminal shows.
const FEWEST_ROWS: usize = 4;
/// Rows of programs and claims where nobody scrolls.
const LISTED_ROWS: usize = 20;

/// Of a look by itself: every section.
pub(super) fn text(look: &Look, change: &Change) -> String {
    sections(look, change, LISTED_ROWS).concat()
}

/// Of a look on a terminal: as many rows as it has, and as wide.
pub(super) fn fitted(look: &Look, change: &Change, away: Option<&CliError>, size: Size) -> Vec<String> {
    let banner: Vec<String> = away.iter().map(|error| format!("! {}", first_line(error))).collect();
    let fixed = sections(look, change, 0).concat().lines().count() + banner.len();
    // What is left goes to the two long tables in equal parts.
    let rows = (size.rows.saturating_sub(fixed) / 2).max(FEWEST_ROWS);
    let text = sections(look, change, rows).concat();
    let lines = banner.iter().map(String::as_str).chain(text.lines());
    lines.take(size.rows).map(|line| line.chars().take(size.columns).collect()).collect()
}

/// The view as one document: what `kvtier status --json` has, and what came of it in `over_ms`.
pub(super) fn json(look: &Look, change: &Change) -> Value {
    let by_name = |list: &[(String, u64)]| -> Value {
        list.iter().map(|(name, n)| (name.clone(), json!(n))).collect::<serde_json::Map<_, _>>().into()
    };
    let transfers: serde_json::Map<String, Value> = change
        .transports
        .iter()
        .map(|(kind, (read, served))| (kind.clone(), json!({ "read_bytes": read, "served_bytes": served })))
        .collect();
    json!({
        "status": status::report(&look.status).json,
        "over_ms": u64::try_from(change.span.as_millis()).unwrap_or(u64::MAX),
        "since_start": change.whole,
        "looked_up_tokens": change.looked_up,
        "hit_tokens": change.hits(),
        "ledger": by_name(&change.ledger),
        "blocks_loaded": change.loaded,
        "transfers": transfers,
        "policy": by_name(&change.policy),
        "programs": look.programs.as_ref().ok().map(|list| list.iter().map(Program::from).collect::<Vec<_>>()),
        "claims": look.claims.as_ref().ok().map(|reply| reply.claims.iter().map(Claim::from).collect::<Vec<_>>()),
    })
}

fn sections(look: &Look, change: &Change, rows: usize) -> Vec<String> {
    vec![
        head(&look.status, change),
        hits(change),
        titled("TIERS", &tiers(&look.status, change).render(2)),
        types(&look.status),
        transfers(&look.status, change),
        programs(look, rows),
        claims(look, rows),
        policy(change),
    ]
}

fn titled(title: &str, body: &str) -> String {
    format!("\n{title}\n{body}")
}

fn first_line(error: &CliError) -> String {
    printable(error.to_string().lines().next().unwrap_or_default())
}

fn head(status: &v1::StatusReply, change: &Change) -> String {
    let over = if change.whole { "since its start".to_owned() } else { format!("over {}", duration_text(change.span)) };
    let up = duration_text(std::time::Duration::from_millis(status.uptime_ms));
    format!(
        "node {}  kvtierd {}  {}  up {up}  {} engines  rates {over}\n",
        printable(&status.node_id),
        printable(&status.version),
        printable(&status.state),
        status.attachments.len()
    )
}

fn hits(change: &Change) -> String {
    let part = |(name, n): &(String, u64)| format!("{} {}", printable(name), share_text(*n, change.looked_up));
    let parts = |hit: bool| {
        let some = change.ledger.iter().filter(|(name, n)| *n > 0 && is_hit(name) == hit);
        let parts: Vec<String> = some.map(part).collect();
        if parts.is_empty() { "-".to_owned() } else { parts.join("  ") }
    };
    format!(
        "\nHIT RATE  {} of {} tokens/s looked up\n  served  {}\n  missed  {}\n",
        share_text(change.hits(), change.looked_up),
        change.per_second(change.looked_up),
        parts(true),
        parts(false)
    )
}

fn tiers(status: &v1::StatusReply, change: &Change) -> Table {
    let mut table = Table::new(&[
        ("TIER", Align::Left),
        ("STATE", Align::Left),
        ("FULL", Align::Left),
        ("USED", Align::Right),
        ("CAPACITY", Align::Right),
        ("BLOCKS", Align::Right),
        ("LOADED/s", Align::Right),
        ("WRITING", Align::Right),
    ]);
    for t in &status.tiers {
        let name = tier_text(t.tier);
        let loaded = change.loaded.get(&name).copied().unwrap_or(0);
        table.row([
            &name,
            &t.state,
            &bar(t.used_bytes, t.capacity_bytes),
            &bytes_text(t.used_bytes),
            &bytes_text(t.capacity_bytes),
            &t.blocks.to_string(),
            &change.per_second(loaded).to_string(),
            &t.pending_writes.to_string(),
        ]);
    }
    if let Some(loaded) = change.loaded.get("peer") {
        let loaded = change.per_second(*loaded).to_string();
        table.row(["peer", "", "", "", "", "", loaded.as_str(), ""]);
    }
    table
}

fn bar(used: u64, capacity: u64) -> String {
    let filled = u128::from(used.min(capacity)) * u128::from(BAR_CELLS);
    let filled = filled.checked_div(u128::from(capacity)).unwrap_or(0);
    let cells: String = (0..u128::from(BAR_CELLS)).map(|cell| if cell < filled { '#' } else { '.' }).collect();
    format!("[{cells}] {}", share_text(used, capacity))
}

fn types(status: &v1::StatusReply) -> String {
    let rows = meaning::rows(&status.types);
    if rows.is_empty() { String::new() } else { titled("TYPES", &meaning::table(&rows).render(2)) }
}

fn transfers(status: &v1::StatusReply, change: &Change) -> String {
    if status.transports.is_empty() {
        return String::new();
    }
    let mut table = Table::new(&[
        ("TRANSPORT", Align::Left),
        ("STATE", Align::Left),
        ("READ/s", Align::Right),
        ("SERVED/s", Align::Right),
        ("FAILED READS", Align::Right),
        ("LINKS", Align::Right),
    ]);
    for t in &status.transports {
        let (read, served) = change.transports.get(&t.kind).copied().unwrap_or_default();
        let [read, served] = [read, served].map(|n| bytes_text(change.per_second(n)));
        table.row([&t.kind, &t.state, &read, &served, &t.failed_reads.to_string(), &t.links.to_string()]);
    }
    titled("TRANSFERS", &table.render(2))
}

fn programs(look: &Look, rows: usize) -> String {
    match &look.programs {
        Ok(list) if list.is_empty() => "\nPROGRAMS  none\n".to_owned(),
        Ok(list) => {
            let shown: Vec<Program> = list.iter().take(rows).map(Program::from).collect();
            titled(&format!("PROGRAMS  {}", list.len()), &programs::table(&shown).render(2))
        }
        Err(error) => format!("\nPROGRAMS  {}\n", first_line(error)),
    }
}

fn claims(look: &Look, rows: usize) -> String {
    let reply = match &look.claims {
        Ok(reply) if reply.claims.is_empty() => return "\nCLAIMS  none\n".to_owned(),
        Ok(reply) => reply,
        Err(error) => return format!("\nCLAIMS  {}\n", first_line(error)),
    };
    let pinned = reply.budgets.iter().filter(|b| b.budget_bytes > 0).map(|b| {
        format!("  pinned in {} {} of {}", tier_text(b.tier), bytes_text(b.claimed_bytes), bytes_text(b.budget_bytes))
    });
    let more = if reply.next_page_token.is_empty() { "" } else { " or more" };
    let title = format!("CLAIMS  {}{more}{}", reply.claims.len(), pinned.collect::<String>());
    let shown: Vec<Claim> = reply.claims.iter().take(rows).map(Claim::from).collect();
    titled(&title, &claims::table(&shown).render(2))
}

/// Counts that grew.
fn policy(change: &Change) -> String {
    let mut table = Table::new(&[("POLICY", Align::Left), ("COUNT", Align::Right), ("PER SECOND", Align::Right)]);
    for (name, n) in change.policy.iter().filter(|(_, n)| *n > 0) {
        table.row([name, &n.to_string(), &change.per_second(*n).to_string()]);
    }
    if table.is_empty() { String::new() } else { format!("\n{}", table.render(0)) }
}

#[cfg(test)]
mod tests;
