//! What one LIST of all writers' folders says, in bounded memory however many objects there are.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

use kvtier_types::NodeId;
use object_store::ObjectMeta;

use super::name::{PackAt, TombAt};

/// A pack as it was listed. Orders by age, the oldest first.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Listed {
    /// When it was made, in milliseconds of Unix time by the store's clock.
    pub(super) modified_ms: u64,
    pub(super) at: PackAt,
    pub(super) bytes: u64,
}

impl Listed {
    pub(super) fn new(at: PackAt, object: &ObjectMeta) -> Self {
        let modified_ms = u64::try_from(object.last_modified.timestamp_millis()).unwrap_or(0);
        Self { modified_ms, at, bytes: object.size }
    }
}

/// Most files of tombstones in a listing: each node merges its own.
pub(super) const MAX_TOMB_FILES: usize = 1 << 18;

/// What is not a pack: files of tombstones, and how old each writer's packs are.
#[derive(Debug, Default)]
pub(super) struct Graves {
    pub(super) files: BTreeSet<TombAt>,
    /// More files than [`MAX_TOMB_FILES`].
    pub(super) too_many: bool,
    /// When the oldest pack of each writer was made, the own ones included.
    pub(super) oldest_ms: BTreeMap<NodeId, u64>,
}

impl Graves {
    pub(super) fn add_file(&mut self, at: TombAt) {
        if self.files.len() < MAX_TOMB_FILES {
            self.files.insert(at);
        } else {
            self.too_many = true;
        }
    }

    pub(super) fn add_pack(&mut self, writer: &NodeId, modified_ms: u64) {
        if let Some(oldest) = self.oldest_ms.get_mut(writer) {
            *oldest = (*oldest).min(modified_ms);
        } else {
            self.oldest_ms.insert(writer.clone(), modified_ms);
        }
    }
}

/// The newest packs of a listing, and what else it shows.
#[derive(Debug, Default)]
pub(super) struct Listing {
    newest: BinaryHeap<Reverse<Listed>>,
    cut: usize,
    pub(super) graves: Graves,
}

impl Listing {
    /// Adds a pack; of more than `limit` the oldest goes.
    pub(super) fn add(&mut self, pack: Listed, limit: usize) {
        self.newest.push(Reverse(pack));
        if self.newest.len() > limit {
            self.newest.pop();
            self.cut += 1;
        }
    }

    /// The packs, newest first, and how many older ones were left out.
    pub(super) fn newest_first(self) -> (Vec<Listed>, usize) {
        // Sorted by `Reverse`: descending.
        let packs = self.newest.into_sorted_vec();
        (packs.into_iter().map(|Reverse(pack)| pack).collect(), self.cut)
    }
}

#[cfg(test)]
mod tests {
    use kvtier_types::NodeId;

    use super::*;
    use crate::object::pack::PackName;

    #[test]
    fn the_newest_are_kept_newest_first() {
        let mut listing = Listing::default();
        let writer = NodeId::new("a").unwrap();
        for modified_ms in [5, 1, 9, 7, 3] {
            let at = PackAt { writer: writer.clone(), name: PackName([1; 32]) };
            listing.add(Listed { modified_ms, at, bytes: 1 }, 3);
        }
        let (packs, cut) = listing.newest_first();
        assert_eq!((packs.iter().map(|p| p.modified_ms).collect::<Vec<_>>(), cut), (vec![9, 7, 5], 2));
    }
}
