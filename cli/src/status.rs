//! `kvtier status`: tiers, attached engines, and the ledger of looked-up tokens.

use std::time::Duration;

use kvtier_proto::v1;
use serde::Serialize;

use crate::meaning::{self, TypeRow};
use crate::report::Report;
use crate::table::{Align, Table, printable};
use crate::units::{bytes_text, duration_text, share_text};

#[derive(Serialize)]
struct Status<'a> {
    node_id: &'a str,
    version: &'a str,
    incarnation: u64,
    uptime_ms: u64,
    state: &'a str,
    tiers: Vec<TierRow<'a>>,
    attachments: Vec<AttachmentRow<'a>>,
    ledger: Ledger<'a>,
    blocks_loaded: Vec<CountRow<'a>>,
    corrupt_blocks: u64,
    transports: Vec<TransportRow<'a>>,
    cluster: Vec<CountRow<'a>>,
    types: Vec<TypeRow>,
    policy: Vec<CountRow<'a>>,
    notes: &'a [String],
}

#[derive(Serialize)]
struct TierRow<'a> {
    tier: String,
    state: &'a str,
    detail: &'a str,
    capacity_bytes: u64,
    used_bytes: u64,
    blocks: u64,
    pending_writes: u64,
}

#[derive(Serialize)]
struct TransportRow<'a> {
    kind: &'a str,
    state: &'a str,
    read_bytes: u64,
    served_bytes: u64,
    failed_reads: u64,
    links: u64,
}

#[derive(Serialize)]
struct AttachmentRow<'a> {
    engine_id: &'a str,
    role: &'a str,
    rank: u32,
    pid: i32,
    model: &'a str,
    leases: u32,
    reservations: u32,
    age_ms: u64,
}

#[derive(Serialize)]
struct Ledger<'a> {
    looked_up_tokens: u64,
    parts: Vec<CountRow<'a>>,
    sum_tokens: u64,
    balanced: bool,
}

#[derive(Serialize)]
struct CountRow<'a> {
    name: &'a str,
    value: u64,
}

/// The report of a daemon's status.
#[must_use]
pub fn report(reply: &v1::StatusReply) -> Report {
    let status = digest(reply);
    Report::new(text(&status), &status, true)
}

/// The name of a tier on the wire; a newer daemon's tier keeps its number.
#[must_use]
pub(crate) fn tier_text(value: i32) -> String {
    match kvtier_proto::convert::tier("tier", value) {
        Ok(Some(tier)) => tier.name().to_owned(),
        Ok(None) => "unspecified".to_owned(),
        Err(_) => format!("tier {value}"),
    }
}

fn digest(reply: &v1::StatusReply) -> Status<'_> {
    let sum_tokens = reply.ledger.iter().fold(0u64, |sum, c| sum.saturating_add(c.value));
    Status {
        node_id: &reply.node_id,
        version: &reply.version,
        incarnation: reply.incarnation,
        uptime_ms: reply.uptime_ms,
        state: &reply.state,
        tiers: reply.tiers.iter().map(tier_row).collect(),
        attachments: reply.attachments.iter().map(attachment_row).collect(),
        ledger: Ledger {
            looked_up_tokens: reply.looked_up_tokens,
            parts: count_rows(&reply.ledger),
            sum_tokens,
            balanced: sum_tokens == reply.looked_up_tokens,
        },
        blocks_loaded: count_rows(&reply.blocks_loaded),
        corrupt_blocks: reply.corrupt_blocks,
        transports: reply.transports.iter().map(transport_row).collect(),
        cluster: count_rows(&reply.cluster),
        types: meaning::rows(&reply.types),
        policy: count_rows(&reply.policy),
        notes: &reply.notes,
    }
}

fn count_rows(list: &[v1::Count]) -> Vec<CountRow<'_>> {
    list.iter().map(|c| CountRow { name: &c.name, value: c.value }).collect()
}

fn tier_row(t: &v1::TierStatus) -> TierRow<'_> {
    TierRow {
        tier: tier_text(t.tier),
        state: &t.state,
        detail: &t.detail,
        capacity_bytes: t.capacity_bytes,
        used_bytes: t.used_bytes,
        blocks: t.blocks,
        pending_writes: t.pending_writes,
    }
}

fn transport_row(t: &v1::TransportStatus) -> TransportRow<'_> {
    TransportRow {
        kind: &t.kind,
        state: &t.state,
        read_bytes: t.read_bytes,
        served_bytes: t.served_bytes,
        failed_reads: t.failed_reads,
        links: t.links,
    }
}

fn attachment_row(a: &v1::AttachmentStatus) -> AttachmentRow<'_> {
    AttachmentRow {
        engine_id: &a.engine_id,
        role: &a.role,
        rank: a.rank,
        pid: a.pid,
        model: &a.model,
        leases: a.leases,
        reservations: a.reservations,
        age_ms: a.age_ms,
    }
}

fn text(status: &Status<'_>) -> String {
    let mut out = format!(
        "node {}  kvtierd {}  {}  up {}  incarnation {}\n",
        printable(status.node_id),
        printable(status.version),
        printable(status.state),
        duration_text(Duration::from_millis(status.uptime_ms)),
        status.incarnation
    );
    section(&mut out, "TIERS", &tiers_table(&status.tiers), "none");
    section(&mut out, "ATTACHED ENGINES", &attachments_table(&status.attachments), "none");
    section(&mut out, "LOOKED-UP TOKENS", &ledger_table(&status.ledger), "none");
    if !status.ledger.balanced {
        line(
            &mut out,
            &format!(
                "  the parts sum to {}, not to {}: this is a fault of the daemon, please report it",
                status.ledger.sum_tokens, status.ledger.looked_up_tokens
            ),
        );
    }
    section(&mut out, "BLOCKS LOADED BY ENGINES", &counts_table("FROM", &status.blocks_loaded), "none");
    line(&mut out, &format!("\nCORRUPT BLOCKS  {}", status.corrupt_blocks));
    if !status.types.is_empty() {
        section(&mut out, "TYPES", &meaning::table(&status.types), "none");
    }
    if status.policy.iter().any(|count| count.value > 0) {
        section(&mut out, "POLICY", &policy_table(&status.policy), "none");
    }
    if !status.transports.is_empty() {
        section(&mut out, "TRANSPORTS", &transports_table(&status.transports), "none");
        section(&mut out, "CLUSTER", &counts_table("COUNT", &status.cluster), "none");
    }
    if !status.notes.is_empty() {
        line(&mut out, "\nNOTES");
        status.notes.iter().for_each(|note| line(&mut out, &format!("  {}", printable(note))));
    }
    out
}

fn line(out: &mut String, text: &str) {
    out.push_str(text);
    out.push('\n');
}

fn section(out: &mut String, title: &str, table: &Table, otherwise: &str) {
    if table.is_empty() {
        line(out, &format!("\n{title}  {otherwise}"));
    } else {
        line(out, &format!("\n{title}"));
        out.push_str(&table.render(2));
    }
}

fn transports_table(transports: &[TransportRow<'_>]) -> Table {
    let mut table = Table::new(&[
        ("KIND", Align::Left),
        ("STATE", Align::Left),
        ("READ", Align::Right),
        ("SERVED", Align::Right),
        ("FAILED READS", Align::Right),
        ("LINKS", Align::Right),
    ]);
    for t in transports {
        let (read, served) = (bytes_text(t.read_bytes), bytes_text(t.served_bytes));
        table.row([t.kind, t.state, &read, &served, &t.failed_reads.to_string(), &t.links.to_string()]);
    }
    table
}

fn tiers_table(tiers: &[TierRow<'_>]) -> Table {
    let mut table = Table::new(&[
        ("TIER", Align::Left),
        ("STATE", Align::Left),
        ("BLOCKS", Align::Right),
        ("USED", Align::Right),
        ("CAPACITY", Align::Right),
        ("FULL", Align::Right),
        ("WRITING", Align::Right),
        ("DETAIL", Align::Left),
    ]);
    for t in tiers {
        table.row([
            t.tier.as_str(),
            t.state,
            &t.blocks.to_string(),
            &bytes_text(t.used_bytes),
            &bytes_text(t.capacity_bytes),
            &share_text(t.used_bytes, t.capacity_bytes),
            &t.pending_writes.to_string(),
            t.detail,
        ]);
    }
    table
}

fn attachments_table(attachments: &[AttachmentRow<'_>]) -> Table {
    let mut table = Table::new(&[
        ("ENGINE", Align::Left),
        ("ROLE", Align::Left),
        ("RANK", Align::Right),
        ("PID", Align::Right),
        ("MODEL", Align::Left),
        ("LEASES", Align::Right),
        ("RESERVED", Align::Right),
        ("AGE", Align::Right),
    ]);
    for a in attachments {
        table.row([
            a.engine_id,
            a.role,
            &a.rank.to_string(),
            &a.pid.to_string(),
            a.model,
            &a.leases.to_string(),
            &a.reservations.to_string(),
            &duration_text(Duration::from_millis(a.age_ms)),
        ]);
    }
    table
}

fn ledger_table(ledger: &Ledger<'_>) -> Table {
    let mut table = Table::new(&[("BECAME", Align::Left), ("TOKENS", Align::Right), ("SHARE", Align::Right)]);
    for part in &ledger.parts {
        table.row([part.name, &part.value.to_string(), &share_text(part.value, ledger.looked_up_tokens)]);
    }
    if !ledger.parts.is_empty() || ledger.looked_up_tokens > 0 {
        let whole = ledger.looked_up_tokens;
        table.row(["looked up", &whole.to_string(), &share_text(whole, whole)]);
    }
    table
}

/// Counts of claims, verbs, hints, rules and eviction that are not zero.
fn policy_table(counts: &[CountRow<'_>]) -> Table {
    let mut table = Table::new(&[("NAME", Align::Left), ("COUNT", Align::Right)]);
    counts.iter().filter(|c| c.value > 0).for_each(|c| table.row([c.name, &c.value.to_string()]));
    table
}

fn counts_table(name: &str, counts: &[CountRow<'_>]) -> Table {
    let mut table = Table::new(&[(name, Align::Left), ("BLOCKS", Align::Right)]);
    counts.iter().for_each(|c| table.row([c.name, &c.value.to_string()]));
    table
}
