//! `Evict`: drops blocks from tiers, durably.

use std::sync::Arc;
use std::time::Duration;

use kvtier_policy::directory::record_ttl;
use kvtier_proto::{convert, v1};
use kvtier_storage::journal::Entry;
use kvtier_types::{BlockKey, Outcome, Tier};
use tokio::time::sleep;
use tonic::Status;

use super::durable;
use super::in_packs::Packs;
use crate::cluster::fanout::{self, Verb};
use crate::node::Node;
use crate::services::caller::Caller;
use crate::services::targets::{self, KEYS_PER_CORE_CALL, Resolved};
use crate::services::wire_status;

/// How long what is evicted everywhere is not read from packs at all: until every node that was told has said what of its own
/// packs is dead. Their claims may refuse it.
const SHIELDED: Duration = Duration::from_secs(60);

/// Drops what the targets name, for a caller or (`passed_on`) another node that was asked.
pub(in crate::services) async fn evict(
    node: &Arc<Node>,
    caller: &Caller,
    message: &v1::EvictRequest,
    passed_on: bool,
) -> Result<v1::EvictReply, Status> {
    let resolved = targets::resolve(node, caller, &message.targets)?;
    let tiers = message.tiers.iter().map(|t| convert::tier("tiers", *t).map_err(wire_status));
    let tiers: Vec<Tier> = tiers.filter_map(Result::transpose).collect::<Result<_, _>>()?;
    let keys: Vec<BlockKey> = resolved.iter().flat_map(Resolved::keys).copied().collect();
    let mut packs = None;
    if tiers.is_empty() || tiers.contains(&Tier::Object) {
        let absent = caller.operator && message.targets.iter().all(|t| t.tenant.is_empty());
        packs = Packs::of(node, &keys, absent).await?;
    }
    let for_all = message.everywhere && !message.dry_run;
    if let Some(packs) = packs.as_ref().filter(|_| for_all || passed_on) {
        if for_all {
            // Before anything is dropped: what is not here any more cannot be named again by everybody.
            packs.look(node).await?;
        }
        packs.floor.shield(&keys, SHIELDED);
        packs.floor.announced(&message.tombstones).await;
    }
    let mut outcomes = drop_here(node, &keys, (&tiers, message.dry_run), packs.as_mut()).await?;
    let mut buried = Ok(());
    if let Some(packs) = &mut packs {
        if message.everywhere {
            buried = packs.add_others(node, &keys, &mut outcomes);
        }
        if !message.dry_run {
            // Before others are told: they could read anew what they just dropped.
            buried = packs.bury().await.and(buried);
        }
    }
    if message.dry_run {
        return Ok(v1::EvictReply { outcomes: targets::outcomes(&resolved, outcomes), nodes: Vec::new() });
    }
    let mut nodes = Vec::new();
    if message.everywhere {
        let targets = targets::passed_on(caller, &message.targets);
        let tombstones = packs.as_ref().and_then(|packs| packs.floor.recent_tombstones()).into_iter().collect();
        let passed_on = v1::EvictRequest { targets, tombstones, ..message.clone() };
        let untold;
        (nodes, untold) = fanout::tell_all_but(node, Verb::Evict(passed_on)).await;
        if let Some(packs) = packs.filter(|_| !untold.is_empty()) {
            bury_later(node, packs, keys, outcomes.clone());
        }
    }
    match buried {
        // It waits to be written, and the next start finds it in the journal: no reason to be told again.
        Err(status) if passed_on => tracing::warn!(%status, "what another node had evicted here"),
        buried => buried?,
    }
    Ok(v1::EvictReply { outcomes: targets::outcomes(&resolved, outcomes), nodes })
}

/// Evicts from packs of nodes that could not be told, if they are gone once their word would have run out: one that lives is
/// told later, and may refuse.
fn bury_later(node: &Arc<Node>, mut packs: Packs, keys: Vec<BlockKey>, mut outcomes: Vec<(Outcome, &'static str)>) {
    let (of_task, wait) = (Arc::clone(node), record_ttl(node.config.cluster.heartbeat.0) * 2);
    node.tasks.spawn(async move {
        tokio::select! {
            () = of_task.stopping.cancelled() => {}
            () = sleep(wait) => {}
        }
        let added = packs.add_others(&of_task, &keys, &mut outcomes);
        if let Err(status) = packs.bury().await.and(added) {
            tracing::warn!(%status, "what was evicted from packs of nodes that are gone");
        }
    });
}

/// Drops blocks from tiers of this node, durably; or says what would become of each.
async fn drop_here(
    node: &Arc<Node>,
    keys: &[BlockKey],
    (tiers, dry_run): (&[Tier], bool),
    mut packs: Option<&mut Packs>,
) -> Result<Vec<(Outcome, &'static str)>, Status> {
    let mut outcomes: Vec<(Outcome, &'static str)> = Vec::with_capacity(keys.len());
    let mut journal = Vec::new();
    for portion in keys.chunks(KEYS_PER_CORE_CALL) {
        let plan = if dry_run {
            node.read_core(|core| core.plan_evict(portion, tiers))
        } else {
            // In one step: a movement that began in between would write a record that the journal's entry does not cover
            // (`a_block_on_its_way_to_disk_is_evicted_for_good`).
            node.with_core(|core, _| {
                let plan = core.plan_evict(portion, tiers);
                core.apply_evict(portion, tiers);
                plan
            })
        };
        let at = outcomes.len();
        outcomes.extend(plan.outcomes.iter().map(|(_, outcome, reason)| (*outcome, *reason)));
        if let Some(packs) = packs.as_deref_mut() {
            packs.add_own(portion, &mut outcomes[at..], &plan);
        }
        journal.extend(plan.journal);
    }
    if !dry_run {
        let entry = |(key, sequence): &(_, u64)| Entry::Evicted { key: *key, up_to_sequence: *sequence };
        durable(node, journal.iter().map(entry).collect(), "evicted now, but a restart may bring the blocks back")
            .await?;
    }
    Ok(outcomes)
}
