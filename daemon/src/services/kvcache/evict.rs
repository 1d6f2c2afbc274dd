//! `Evict`: drops blocks from tiers, durably.

use std::collections::BTreeSet;
use std::sync::Arc;

use kvtier_proto::{convert, v1};
use kvtier_storage::StorageError;
use kvtier_storage::journal::Entry;
use kvtier_storage::object::{Burial, Floor};
use kvtier_types::{BlockKey, Outcome, Tier};
use tonic::Status;

use super::durable;
use crate::cluster::Cluster;
use crate::cluster::fanout::{self, Verb};
use crate::node::Node;
use crate::services::caller::Caller;
use crate::services::targets::{self, KEYS_PER_CORE_CALL, Resolved};
use crate::services::wire_status;

/// Most tombstones of one call, but for those of a last portion of keys.
const MAX_BURIALS: usize = 1 << 18;

/// Drops what the targets name.
pub(in crate::services) async fn evict(
    node: &Arc<Node>,
    caller: &Caller,
    message: &v1::EvictRequest,
) -> Result<v1::EvictReply, Status> {
    if let Some((_, floor)) = floor(node).filter(|_| !message.tombstones.is_empty()) {
        let learnt = floor.announced(&message.tombstones).await;
        tracing::debug!(?learnt, "what another node evicted from packs");
    }
    let resolved = targets::resolve(node, caller, &message.targets)?;
    let tiers = message.tiers.iter().map(|t| convert::tier("tiers", *t).map_err(wire_status));
    let tiers: Vec<Tier> = tiers.filter_map(Result::transpose).collect::<Result<_, _>>()?;
    let keys: Vec<BlockKey> = resolved.iter().flat_map(Resolved::keys).copied().collect();
    let mut outcomes: Vec<(Outcome, &'static str)> = Vec::with_capacity(keys.len());
    let mut journal = Vec::new();
    let of_packs = tiers.is_empty() || tiers.contains(&Tier::Object);
    // Before anything is dropped: a pack without a living record is deleted, but others may still know it.
    let mut packs = if of_packs { Packs::of(node, &keys).await? } else { Packs::default() };
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
        packs.to_object.extend(plan.to_object);
        packs.up_to_sequence = plan.up_to_sequence;
    }
    if !message.dry_run {
        let entry = |(key, sequence): &(_, u64)| Entry::Evicted { key: *key, up_to_sequence: *sequence };
        durable(node, journal.iter().map(entry).collect(), "evicted now, but a restart may bring the blocks back")
            .await?;
    }
    if of_packs {
        packs.may_name_absent = caller.operator && message.targets.iter().all(|t| t.tenant.is_empty());
        packs.add_own(node, &keys, &mut outcomes);
        if message.everywhere {
            packs.add_others(node, &keys, &mut outcomes)?;
        }
    }
    if message.dry_run {
        return Ok(v1::EvictReply { outcomes: targets::outcomes(&resolved, outcomes), nodes: Vec::new() });
    }
    // Before others are told: they could read anew what they just dropped.
    let buried = packs.bury(node).await;
    let mut nodes = Vec::new();
    if message.everywhere {
        let targets = targets::passed_on(caller, &message.targets);
        let tombstones = floor(node).map(|(_, floor)| floor.recent_tombstones()).unwrap_or_default();
        let passed_on = v1::EvictRequest { targets, tombstones, ..message.clone() };
        nodes = fanout::tell_all(node, Verb::Evict(passed_on)).await;
    }
    buried?;
    Ok(v1::EvictReply { outcomes: targets::outcomes(&resolved, outcomes), nodes })
}

type Outcomes = [(Outcome, &'static str)];

/// What is to be evicted from packs: other nodes could read it there, even what this node forgot.
#[derive(Default)]
struct Packs {
    /// Blocks in this node's packs.
    own: BTreeSet<BlockKey>,
    /// Blocks that are on their way there.
    to_object: Vec<BlockKey>,
    /// The last sequence that this node's records may have.
    up_to_sequence: u64,
    /// What is not here has no tenant that could be asked: only an operator who speaks for nobody else may evict it.
    may_name_absent: bool,
    burials: Vec<Burial>,
}

impl Packs {
    /// Looks for blocks in this node's packs.
    async fn of(node: &Arc<Node>, keys: &[BlockKey]) -> Result<Self, Status> {
        let Some(object) = node.stores.object.clone().filter(|_| floor(node).is_some()) else {
            return Ok(Self::default());
        };
        let keys: BTreeSet<BlockKey> = keys.iter().copied().collect();
        let looking = tokio::task::spawn_blocking(move || object.blocks_in_packs(&keys));
        let own = looking.await.map_err(|_| Status::internal("the task that looks into packs died"))?;
        Ok(Self { own, ..Self::default() })
    }

    fn may_evict(&self, outcome: Outcome) -> bool {
        outcome != Outcome::Rejected && (outcome != Outcome::Missing || self.may_name_absent)
    }

    /// Adds what this node's packs have, and says so of blocks that are nowhere else.
    fn add_own(&mut self, node: &Arc<Node>, keys: &[BlockKey], outcomes: &mut Outcomes) {
        let Some((cluster, _)) = floor(node) else { return };
        let moving: BTreeSet<BlockKey> = self.to_object.drain(..).collect();
        for (block, outcome) in keys.iter().zip(outcomes) {
            if !self.may_evict(outcome.0) || !(self.own.contains(block) || moving.contains(block)) {
                continue;
            }
            let (writer, up_to_sequence) = (cluster.id.clone(), self.up_to_sequence);
            self.burials.push(Burial { writer, block: *block, up_to_sequence });
            if outcome.0 == Outcome::Missing {
                *outcome = (Outcome::Applied, "in packs only");
            }
        }
    }

    /// Adds what is in packs of other nodes, and says so of blocks that are nowhere else. Those that live do so themselves
    /// for what is not known of here, but only once they are told.
    ///
    /// # Errors
    /// `RESOURCE_EXHAUSTED`: where it is not known which writers have a block, all of them may have each.
    fn add_others(&mut self, node: &Arc<Node>, keys: &[BlockKey], outcomes: &mut Outcomes) -> Result<(), Status> {
        let Some((cluster, floor)) = floor(node) else { return Ok(()) };
        for (portion, outcomes) in keys.chunks(KEYS_PER_CORE_CALL).zip(outcomes.chunks_mut(KEYS_PER_CORE_CALL)) {
            if self.burials.len() > MAX_BURIALS {
                return Err(Status::resource_exhausted(
                    "dropped here only: too many nodes may have stored so many blocks; name fewer in one call",
                ));
            }
            for ((block, writers), outcome) in portion.iter().zip(floor.writers_of(portion)).zip(outcomes) {
                if !self.may_evict(outcome.0) {
                    continue;
                }
                let before = self.burials.len();
                let others = writers.into_iter().filter(|(id, _)| *id != cluster.id);
                let burial = |(writer, up_to_sequence)| Burial { writer, block: *block, up_to_sequence };
                self.burials.extend(others.map(burial));
                if outcome.0 == Outcome::Missing && self.burials.len() > before {
                    *outcome = (Outcome::Applied, "in packs only");
                }
            }
        }
        Ok(())
    }

    async fn bury(self, node: &Arc<Node>) -> Result<(), Status> {
        let Some((_, floor)) = floor(node).filter(|_| !self.burials.is_empty()) else { return Ok(()) };
        floor.bury(&self.burials).await.map_err(|error| match error {
            StorageError::Full => Status::resource_exhausted(
                "evicted, but other nodes can still read records in packs: too much is evicted from packs already, until \
                 these are deleted",
            ),
            error => Status::unavailable(format!(
                "evicted, but other nodes can still read records in packs until the object store answers, and a restart of \
                 this node forgets to keep them from it: evict again: {error}"
            )),
        })
    }
}

fn floor(node: &Arc<Node>) -> Option<(&Arc<Cluster>, &Arc<Floor>)> {
    let cluster = node.cluster.as_ref()?;
    Some((cluster, cluster.floor.as_ref()?))
}
