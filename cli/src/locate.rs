//! `kvtier locate`: where blocks lie, copy by copy.

use kvtier_proto::v1;
use serde::Serialize;

use crate::args::LocateArgs;
use crate::client::Client;
use crate::error::CliError;
use crate::keys::short;
use crate::report::Report;
use crate::status::tier_text;
use crate::table::{Align, Table, printable};
use crate::target::named;
use crate::units::bytes_text;

/// A block as JSON; also the rows of `kvtier ls --json`.
#[derive(Debug, Serialize)]
pub(crate) struct Block {
    pub(crate) key: String,
    pub(crate) outcome: String,
    pub(crate) model: String,
    pub(crate) tenant: String,
    pub(crate) program_id: String,
    pub(crate) semantic: String,
    pub(crate) leases: u32,
    pub(crate) depth_blocks: u32,
    pub(crate) replicas: Vec<Replica>,
    /// As `key=value:Effect`.
    pub(crate) taints: Vec<String>,
    /// Claims that hold it.
    pub(crate) claims: Vec<String>,
    /// Live programs that hold it.
    pub(crate) holders: u32,
    /// The rule that decided its lifecycle; empty when none matched.
    pub(crate) rule: String,
}

#[derive(Debug, Serialize)]
pub(crate) struct Replica {
    pub(crate) shard: u32,
    pub(crate) tier: String,
    pub(crate) bytes: u64,
    /// CRC-64/NVME, 16 digits: a JSON number would lose its low bits.
    pub(crate) checksum: String,
    pub(crate) layout_id: String,
    pub(crate) place: String,
    /// The node that holds it.
    pub(crate) node_id: String,
}

impl From<&v1::BlockInfo> for Block {
    fn from(b: &v1::BlockInfo) -> Self {
        Self {
            key: hex::encode(&b.key),
            outcome: outcome_text(b.outcome),
            model: b.model.clone(),
            tenant: b.tenant.clone(),
            program_id: b.program_id.clone(),
            semantic: kvtier_proto::convert::semantic(b.semantic).name().to_owned(),
            leases: b.leases,
            depth_blocks: b.depth_blocks,
            replicas: b.replicas.iter().map(Replica::from).collect(),
            taints: b.taints.iter().map(taint_text).collect(),
            claims: b.claims.clone(),
            holders: b.holders,
            rule: b.rule.clone(),
        }
    }
}

impl From<&v1::Replica> for Replica {
    fn from(r: &v1::Replica) -> Self {
        Self {
            shard: r.shard,
            tier: tier_text(r.tier),
            bytes: r.bytes,
            checksum: format!("{:016x}", r.checksum),
            layout_id: hex::encode(&r.layout_id),
            place: r.place.clone(),
            node_id: r.node_id.clone(),
        }
    }
}

/// A taint as `key=value:Effect`; a newer daemon's effect keeps its number.
#[must_use]
pub(crate) fn taint_text(wire: &v1::Taint) -> String {
    kvtier_types::Taint::try_from(wire)
        .map_or_else(|_| format!("{}={}:effect {}", wire.key, wire.value, wire.effect), |taint| taint.to_string())
}

/// The name of an outcome on the wire; a newer daemon's outcome keeps its number.
#[must_use]
pub(crate) fn outcome_text(value: i32) -> String {
    v1::Outcome::try_from(value).map_or_else(|_| format!("OUTCOME {value}"), |o| o.as_str_name().to_owned())
}

#[derive(Serialize)]
struct Located {
    node_id: String,
    blocks: Vec<Block>,
}

/// Where the blocks lie.
///
/// # Errors
/// What resolving targets and asking the daemon can fail with.
pub async fn locate(client: &mut Client, args: &LocateArgs) -> Result<Report, CliError> {
    let named = named(client, &args.targets).await?;
    Ok(report(&client.locate(&named.keys, &named.others).await?))
}

/// The report of an answer; complete when every block was found.
#[must_use]
pub fn report(reply: &v1::LocateReply) -> Report {
    let located = Located { node_id: reply.node_id.clone(), blocks: reply.blocks.iter().map(Block::from).collect() };
    let text = located.blocks.iter().map(|b| block_text(&located.node_id, b)).collect::<Vec<_>>().join("\n");
    let complete = !located.blocks.is_empty() && located.blocks.iter().all(|b| !b.replicas.is_empty());
    let text = if located.blocks.is_empty() { "no blocks: nothing here belongs to it\n".to_owned() } else { text };
    Report::new(text, &located, complete)
}

fn block_text(node_id: &str, block: &Block) -> String {
    if block.replicas.is_empty() {
        return format!("block {}\n  {} on every node that {} reaches\n", block.key, block.outcome, printable(node_id));
    }
    let facts = format!(
        "  model {}  tenant {}  program {}  {}  depth {} blocks  {} leases\n",
        printable(&block.model),
        printable(&block.tenant),
        printable(&block.program_id),
        block.semantic,
        block.depth_blocks,
        block.leases
    );
    let mut table = Table::new(&[
        ("NODE", Align::Left),
        ("TIER", Align::Left),
        ("SHARD", Align::Right),
        ("BYTES", Align::Right),
        ("CHECKSUM", Align::Left),
        ("LAYOUT", Align::Left),
        ("PLACE", Align::Left),
    ]);
    for r in &block.replicas {
        let layout = hex::decode(&r.layout_id).map_or_else(|_| r.layout_id.clone(), |bytes| short(&bytes));
        table.row([
            &printable(&r.node_id),
            &r.tier,
            &r.shard.to_string(),
            &bytes_text(r.bytes),
            &r.checksum,
            &layout,
            &r.place,
        ]);
    }
    format!("block {}\n{facts}{}{}", block.key, marks(block), table.render(2))
}

/// What holds the block, and what marks it: a line for each that there is.
fn marks(block: &Block) -> String {
    let holders = if block.holders > 0 { vec![format!("{} live programs", block.holders)] } else { Vec::new() };
    let rule: Vec<String> = Some(block.rule.clone()).filter(|rule| !rule.is_empty()).into_iter().collect();
    let lines = [("taints", &block.taints), ("claims", &block.claims), ("held by", &holders), ("rule", &rule)];
    let shown = lines.into_iter().filter(|(_, what)| !what.is_empty());
    shown.map(|(name, what)| format!("  {name} {}\n", printable(&what.join(", ")))).collect()
}
