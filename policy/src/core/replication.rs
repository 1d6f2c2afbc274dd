//! Copies on other nodes that taints and rules want: which blocks wait for them. The shell makes them.
//!
//! *Bounds*: [`MAX_REPLICATIONS`] blocks wait; those that found no room are found again by [`Core::walk`].

use kvtier_types::rules::Copies;
use kvtier_types::{Effect, RecordMeta, ShardKey};

use super::Core;
use crate::catalog::BlockId;
use crate::entry::{Entry, Flags};
use crate::limits::MAX_REPLICATIONS;

impl Core {
    /// Blocks that want copies on other nodes, at most `limit`, and how many copies. What could not be done comes back by
    /// [`Self::replicate_again`].
    pub fn poll_replication(&mut self, limit: usize) -> Vec<(RecordMeta, Copies)> {
        let mut out = Vec::new();
        while out.len() < limit {
            let Some(id) = self.replications.pop_front() else { break };
            if !self.catalog.update(id, |e| e.flags.set(Flags::REPLICATE, false)) {
                continue;
            }
            let entry = self.catalog.get(id);
            let copies = self.copies_of(entry);
            if entry.visible() && copies.any() {
                out.push((self.meta(entry, entry.sequence), copies));
            }
        }
        out
    }

    /// A block's copies could not all be made.
    pub fn replicate_again(&mut self, key: &ShardKey) {
        if let Some(id) = self.catalog.find_shard(key) {
            self.want_replicas(id);
        }
    }

    /// Blocks that wait for copies on other nodes.
    #[must_use]
    pub fn pending_replications(&self) -> usize {
        self.replications.len()
    }

    pub(super) fn want_replicas(&mut self, id: BlockId) {
        let entry = self.catalog.get(id);
        let others = Flags::FETCHED | Flags::REPLICATE;
        if self.catalog.publication.is_none() || entry.flags.has(others) || !entry.visible() {
            return;
        }
        if self.copies_of(entry).any() && self.replications.len() < MAX_REPLICATIONS {
            self.catalog.update(id, |e| e.flags.set(Flags::REPLICATE, true));
            self.replications.push_back(id);
        }
    }

    /// Copies on other nodes that a block shall have.
    fn copies_of(&self, entry: &Entry) -> Copies {
        if !self.may_leave(entry) {
            return Copies::default();
        }
        if self.taints(entry).iter().any(|t| t.effect == Effect::AlwaysReplicate) {
            return Copies::All;
        }
        self.lifecycle(entry).replicate
    }
}
