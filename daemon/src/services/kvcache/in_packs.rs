//! What an eviction says of packs in the object store, which others read too.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use kvtier_policy::EvictPlan;
use kvtier_storage::StorageError;
use kvtier_storage::object::{Burial, Floor};
use kvtier_types::{BlockKey, NodeId, Outcome};
use tokio::time::timeout;
use tonic::Status;

use crate::node::Node;
use crate::services::targets::KEYS_PER_CORE_CALL;

/// Most tombstones of one call, but for those of a last portion of keys.
const MAX_BURIALS: usize = 1 << 18;
/// Longest look for packs of nodes that are gone.
const LOOK_LIMIT: Duration = Duration::from_secs(3);
/// A look at packs that is younger is good enough.
const LOOK_EVERY: Duration = Duration::from_secs(10);

type Outcomes = [(Outcome, &'static str)];

/// What is to be evicted from packs: other nodes could read it there, even what this node forgot.
pub(super) struct Packs {
    id: NodeId,
    pub(super) floor: Arc<Floor>,
    /// Blocks in this node's packs before anything was dropped: a pack without a living record is deleted, but others may
    /// still know it.
    own: BTreeSet<BlockKey>,
    /// What is not here has no tenant that could be asked: only an operator who speaks for nobody else may evict it.
    may_name_absent: bool,
    burials: Vec<Burial>,
}

impl Packs {
    /// Looks for blocks in this node's packs; `None` where no other node could read them.
    pub(super) async fn of(node: &Arc<Node>, keys: &[BlockKey], may_name_absent: bool) -> Result<Option<Self>, Status> {
        let Some(cluster) = &node.cluster else { return Ok(None) };
        let Some(floor) = cluster.floor.clone() else { return Ok(None) };
        let mut own = BTreeSet::new();
        if let Some(object) = node.stores.object.clone() {
            let keys: BTreeSet<BlockKey> = keys.iter().copied().collect();
            let looking = tokio::task::spawn_blocking(move || object.blocks_in_packs(&keys));
            own = looking.await.map_err(|_| Status::internal("the task that looks into packs died"))?;
        }
        Ok(Some(Self { id: cluster.id.clone(), floor, own, may_name_absent, burials: Vec::new() }))
    }

    fn may_evict(&self, outcome: Outcome) -> bool {
        outcome != Outcome::Rejected && (outcome != Outcome::Missing || self.may_name_absent)
    }

    /// Adds what this node's packs have, and says so of blocks that are nowhere else.
    pub(super) fn add_own(&mut self, keys: &[BlockKey], outcomes: &mut Outcomes, plan: &EvictPlan) {
        let stored: BTreeSet<&BlockKey> = plan.in_object.iter().collect();
        for (block, outcome) in keys.iter().zip(outcomes) {
            if self.may_evict(outcome.0) && (self.own.contains(block) || stored.contains(block)) {
                let (writer, up_to_sequence) = (self.id.clone(), plan.up_to_sequence);
                self.burials.push(Burial { writer, block: *block, up_to_sequence });
                found_in_packs(outcome);
            }
        }
    }

    /// Makes sure that all packs are known, and who lives. Where others left packs, looks for those that they stored last.
    ///
    /// # Errors
    /// `UNAVAILABLE`: the store was not listed yet, or the directory does not answer, which alone can say who is gone.
    pub(super) async fn look(&self, node: &Arc<Node>) -> Result<(), Status> {
        if !self.floor.wait_whole(LOOK_LIMIT).await {
            return Err(Status::unavailable(
                "nothing was evicted: the object store could not be listed yet, and packs of nodes that are gone may have it. Try \
                 again, or evict here only",
            ));
        }
        let living = living(node);
        let known = node.cluster.as_ref().is_some_and(|cluster| cluster.directory_state().away.is_none());
        if !known || !living.contains(&self.id) {
            return Err(Status::unavailable(
                "nothing was evicted: the directory does not answer, and packs of nodes that are gone may have it. Try again, or \
                 evict here only",
            ));
        }
        if self.floor.has_others(&living) {
            let floor = Arc::clone(&self.floor);
            // It goes on when it takes longer.
            let listing = node.tasks.spawn(async move { floor.refreshed_within(LOOK_EVERY).await });
            match timeout(LOOK_LIMIT, listing).await {
                Ok(Ok(Ok(()))) => {}
                Ok(Ok(Err(error))) => tracing::warn!(%error, "what nodes stored last that are gone is not known"),
                _ => tracing::info!("listing the object store takes long: what was known of it counts"),
            }
        }
        Ok(())
    }

    /// Adds what is in packs of nodes that cannot say so themselves, and says so of blocks that are nowhere else.
    ///
    /// # Errors
    /// `RESOURCE_EXHAUSTED`: where it is not known which writers have a block, all of them may have each.
    pub(super) fn add_others(
        &mut self,
        node: &Arc<Node>,
        keys: &[BlockKey],
        outcomes: &mut Outcomes,
    ) -> Result<(), Status> {
        let living = living(node);
        for (portion, outcomes) in keys.chunks(KEYS_PER_CORE_CALL).zip(outcomes.chunks_mut(KEYS_PER_CORE_CALL)) {
            if self.burials.len() > MAX_BURIALS {
                return Err(Status::resource_exhausted(
                    "evicted where it was cached, but too many nodes that are gone may have so many blocks in packs: name fewer \
                     in one call",
                ));
            }
            for ((block, writers), outcome) in portion.iter().zip(self.floor.writers_of(portion)).zip(outcomes) {
                if !self.may_evict(outcome.0) {
                    continue;
                }
                for (writer, up_to_sequence) in writers {
                    if writer != self.id && !living.contains(&writer) {
                        self.burials.push(Burial { writer, block: *block, up_to_sequence });
                        found_in_packs(outcome);
                    }
                }
            }
        }
        Ok(())
    }

    /// Has nobody read it again.
    pub(super) async fn bury(&mut self) -> Result<(), Status> {
        // Without any, what waits since an earlier call is written.
        self.floor.bury(&std::mem::take(&mut self.burials)).await.map_err(|error| match error {
            StorageError::Full => Status::resource_exhausted(
                "evicted, but other nodes can still read records in packs: too much is evicted from packs already, until \
                 these are deleted",
            ),
            error => Status::unavailable(format!(
                "evicted, but other nodes can still read records in packs until the object store answers: evict again: {error}"
            )),
        })
    }
}

/// Who is heard of.
fn living(node: &Arc<Node>) -> Vec<NodeId> {
    node.cluster.iter().flat_map(|cluster| cluster.records()).map(|record| record.id).collect()
}

fn found_in_packs(outcome: &mut (Outcome, &'static str)) {
    if outcome.0 == Outcome::Missing {
        *outcome = (Outcome::Applied, "in packs only");
    }
}
