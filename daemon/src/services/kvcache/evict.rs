//! `Evict`: drops blocks from tiers, durably.

use std::sync::Arc;

use kvtier_proto::{convert, v1};
use kvtier_storage::journal::Entry;
use kvtier_types::{BlockKey, Tier};
use tonic::Status;

use super::durable;
use crate::cluster::fanout::{self, Verb};
use crate::node::Node;
use crate::services::caller::Caller;
use crate::services::targets::{self, KEYS_PER_CORE_CALL, Resolved};
use crate::services::wire_status;

/// Drops what the targets name.
pub(in crate::services) async fn evict(
    node: &Arc<Node>,
    caller: &Caller,
    message: &v1::EvictRequest,
) -> Result<v1::EvictReply, Status> {
    let resolved = targets::resolve(node, caller, &message.targets)?;
    let tiers = message.tiers.iter().map(|t| convert::tier("tiers", *t).map_err(wire_status));
    let tiers: Vec<Tier> = tiers.filter_map(Result::transpose).collect::<Result<_, _>>()?;
    let keys: Vec<BlockKey> = resolved.iter().flat_map(Resolved::keys).copied().collect();
    let mut outcomes = Vec::with_capacity(keys.len());
    let mut journal = Vec::new();
    for portion in keys.chunks(KEYS_PER_CORE_CALL) {
        let plan = if message.dry_run {
            node.read_core(|core| core.plan_evict(portion, &tiers))
        } else {
            // In one step: a movement that began in between would write a record that the journal's entry does not cover
            // (`a_block_on_its_way_to_disk_is_evicted_for_good`).
            node.with_core(|core, _| {
                let plan = core.plan_evict(portion, &tiers);
                core.apply_evict(portion, &tiers);
                plan
            })
        };
        outcomes.extend(plan.outcomes.into_iter().map(|(_, outcome, reason)| (outcome, reason)));
        journal.extend(plan.journal);
    }
    if !message.dry_run {
        let entry = |(key, sequence): &(_, u64)| Entry::Evicted { key: *key, up_to_sequence: *sequence };
        durable(node, journal.iter().map(entry).collect(), "evicted now, but a restart may bring the blocks back")
            .await?;
    }
    let nodes = if message.everywhere && !message.dry_run {
        let passed_on = v1::EvictRequest { targets: targets::passed_on(caller, &message.targets), ..message.clone() };
        fanout::tell_all(node, Verb::Evict(passed_on)).await
    } else {
        Vec::new()
    };
    Ok(v1::EvictReply { outcomes: targets::outcomes(&resolved, outcomes), nodes })
}
