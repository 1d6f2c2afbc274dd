//! What blocks are marked with, between core and journal: what was acknowledged is durable.
//!
//! *Order*: whoever marks blocks holds [`Node::marks_turn`] from the change in the core until its entries are durable, so
//! that the journal's last word is the core's.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant as StdInstant;

use kvtier_policy::{Core, Mark, MarkSweep};
use kvtier_storage::StorageError;
use kvtier_storage::journal::{Entry, Journal, MarkRecord};
use kvtier_types::{BlockKey, RecordMeta};

use crate::claims::{millis, unix_ms};
use crate::journaling::append_or_warn;
use crate::node::Node;

/// A mark as the journal has it.
pub(crate) fn entry((block, mark): (BlockKey, Mark)) -> Entry {
    let Mark { semantic, taints, expires_ms, up_to_sequence } = mark;
    Entry::Mark(block, MarkRecord { semantic, taints, expires_ms, up_to_sequence })
}

/// Gives the core the clock and the marks of a former life. To be called before the tiers are recovered.
pub(crate) fn recover(core: &mut Core, origin: StdInstant, marks: impl IntoIterator<Item = (BlockKey, MarkRecord)>) {
    core.set_epoch(unix_ms().saturating_sub(millis(origin.elapsed())));
    for (block, record) in marks {
        let MarkRecord { semantic, taints, expires_ms, up_to_sequence } = record;
        core.remember_mark(block, Mark { semantic, taints, expires_ms, up_to_sequence });
    }
}

/// Which marks of a former life are still about something.
#[derive(Debug, Default)]
pub(crate) struct Marked(BTreeSet<BlockKey>);

impl Marked {
    /// Of these blocks.
    pub(crate) fn new(of: impl Iterator<Item = BlockKey>) -> (BTreeSet<BlockKey>, Self) {
        (of.collect(), Self::default())
    }

    /// A record of a marked block was found.
    pub(crate) fn found(&mut self, meta: &RecordMeta) {
        self.0.insert(meta.key.block);
    }

    /// Drops what only unmarks blocks that are not here. Taints stay: a block may come back from another node's pack.
    pub(crate) fn compact(&self, before: &BTreeSet<BlockKey>, journal: &Journal) -> Result<(), StorageError> {
        let idle = |key: &BlockKey, mark: &MarkRecord| {
            before.contains(key) && !self.0.contains(key) && mark.taints.is_empty() && mark.expires_ms.is_none()
        };
        journal.retain_marks(|key, mark| !idle(key, mark))
    }
}

/// Makes durable what engines said of blocks since the last call, and that the time of others is over.
pub(crate) async fn journal_changes(node: &Arc<Node>) {
    let _turn = node.marks_turn.lock().await;
    while node.with_core(|core, _| {
        core.expire_more();
        core.has_expired()
    }) {
        tokio::task::yield_now().await;
    }
    let waiting = node.read_core(Core::marks_waiting);
    if waiting > 0
        && let Err(error) = make_room(node, waiting).await
    {
        tracing::warn!(%error, "marks that were forgotten stay in the journal");
    }
    let (over, marks): (Vec<Entry>, Vec<Entry>) = node.with_core(|core, _| {
        let over = core.poll_expired_records();
        let over = over.into_iter().map(|(key, up_to_sequence)| Entry::Evicted { key, up_to_sequence });
        (over.collect(), core.poll_marks().into_iter().map(entry).collect())
    });
    // Apart from each other: where the journal takes no more of one it still takes the other.
    append_or_warn(node, over, "that the time of blocks was over").await;
    append_or_warn(node, marks, "what engines said of blocks").await;
}

/// Makes room for more marks, in the core and in the journal. The caller has its turn with marks.
///
/// # Errors
/// When the journal cannot be written.
pub(crate) async fn make_room(node: &Arc<Node>, more: usize) -> Result<(), String> {
    let mut sweep = MarkSweep::new(more);
    node.with_core_in_steps(|core, _| core.sweep_marks(&mut sweep));
    if !sweep.forgot() {
        return Ok(());
    }
    let of_task = Arc::clone(node);
    let retain = move || of_task.journal.retain_marks(|key, _| of_task.read_core(|core| core.has_mark(key)));
    match tokio::task::spawn_blocking(retain).await {
        Ok(retained) => retained.map_err(|error| error.to_string()),
        Err(error) => Err(format!("its task died: {error}")),
    }
}
