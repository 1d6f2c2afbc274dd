//! The directory in memory: what `embedded` and the simulator use, and the meaning that others are held to.

use std::collections::BTreeMap;
use std::time::Duration;

use kvtier_types::{Edition, Instant, NodeId, NodeNumber};

use super::{BUCKETS, Batch, Digest, DirectoryKey, NodeRecord, Replica, Tiers};

/// What a bucket knows of one node.
#[derive(Debug, Clone, Copy)]
struct Held {
    edition: Edition,
    digest: Digest,
}

/// A directory in memory.
#[derive(Debug, Clone, Default)]
pub struct Table {
    nodes: BTreeMap<NodeId, (Instant, NodeRecord)>,
    entries: BTreeMap<DirectoryKey, BTreeMap<NodeNumber, (Edition, Tiers)>>,
    held: BTreeMap<(NodeNumber, u8), Held>,
}

impl Table {
    /// Takes a node's record for `ttl`, and answers with every record that lives.
    pub fn heartbeat(&mut self, now: Instant, record: &NodeRecord, ttl: Duration) -> Vec<NodeRecord> {
        self.nodes.insert(record.id.clone(), (now + ttl, record.clone()));
        self.nodes.retain(|_, (until, _)| *until > now);
        self.nodes.values().map(|(_, record)| record.clone()).collect()
    }

    /// Carries out a batch and answers with the bucket's digest afterwards, under the edition it then counts.
    pub fn apply(&mut self, node: NodeNumber, edition: Edition, batch: &Batch) -> (Edition, Digest) {
        let fresh = Held { edition, digest: Digest::default() };
        let held = self.held.entry((node, batch.bucket)).or_insert(fresh);
        if held.edition < edition {
            *held = fresh;
        }
        let late = held.edition > edition || held.digest.sequence >= batch.sequence;
        if !late {
            held.digest.sequence = batch.sequence;
            for change in &batch.changes {
                let old = set(&mut self.entries, change.key, node, (edition, change.tiers));
                held.digest.count(&change.key, old, change.tiers);
            }
        }
        (held.edition, held.digest)
    }

    /// Entries of each key, of whatever edition.
    #[must_use]
    pub fn locate(&self, keys: &[DirectoryKey]) -> Vec<Vec<Replica>> {
        let replica = |(&node, &(edition, tiers)): (&NodeNumber, &(Edition, Tiers))| Replica { node, edition, tiers };
        let of_key = |key| self.entries.get(key).into_iter().flatten().map(replica).collect();
        keys.iter().map(of_key).collect()
    }

    /// What each bucket holds of a node's edition, `None` where it knows nothing of it.
    #[must_use]
    pub fn digests(&self, node: NodeNumber, edition: Edition) -> Vec<Option<Digest>> {
        let of_bucket = |bucket: usize| {
            let bucket = u8::try_from(bucket).expect("buckets are numbered by a byte");
            self.held.get(&(node, bucket)).filter(|h| h.edition == edition).map(|h| h.digest)
        };
        (0..BUCKETS).map(of_bucket).collect()
    }

    /// Up to `limit` entries beyond `after`, in order.
    #[must_use]
    pub fn page(&self, after: Option<DirectoryKey>, limit: usize) -> Vec<(DirectoryKey, Replica)> {
        use std::ops::Bound;
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let keys = self.entries.range((from, Bound::Unbounded));
        let flat = keys.flat_map(|(key, of_key)| {
            of_key.iter().map(|(&node, &(edition, tiers))| (*key, Replica { node, edition, tiers }))
        });
        flat.take(limit).collect()
    }

    /// Removes an entry if it is still exactly this one: how entries of dead editions are reaped. One that still counts
    /// leaves the digest, so that a node taken for dead too early learns what it lost.
    pub fn remove(&mut self, key: &DirectoryKey, replica: &Replica) -> bool {
        let Some(of_key) = self.entries.get_mut(key) else { return false };
        let same = of_key.get(&replica.node) == Some(&(replica.edition, replica.tiers));
        if same {
            of_key.remove(&replica.node);
            if of_key.is_empty() {
                self.entries.remove(key);
            }
            let at = (replica.node, key.bucket());
            if let Some(held) = self.held.get_mut(&at).filter(|held| held.edition == replica.edition) {
                held.digest.count(key, replica.tiers, Tiers::NONE);
                if held.digest.count == 0 {
                    self.held.remove(&at);
                }
            }
        }
        same
    }

    /// Removes a node's record, if it is of this edition's start.
    pub fn leave(&mut self, node: &NodeId, edition: Edition) {
        if self.nodes.get(node).is_some_and(|(_, r)| r.edition.incarnation() == edition.incarnation()) {
            self.nodes.remove(node);
        }
    }

    /// Entries it holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.values().map(BTreeMap::len).sum()
    }

    /// Whether it holds no entry.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

/// Sets one entry; answers what of it counted in the same edition.
fn set(
    entries: &mut BTreeMap<DirectoryKey, BTreeMap<NodeNumber, (Edition, Tiers)>>,
    key: DirectoryKey,
    node: NodeNumber,
    (edition, tiers): (Edition, Tiers),
) -> Tiers {
    let of_key = entries.entry(key).or_default();
    let old = if tiers.is_empty() { of_key.remove(&node) } else { of_key.insert(node, (edition, tiers)) };
    if of_key.is_empty() {
        entries.remove(&key);
    }
    old.filter(|(of, _)| *of == edition).map_or(Tiers::NONE, |(_, tiers)| tiers)
}

#[cfg(test)]
mod tests {
    use kvtier_types::{Edition, NodeNumber};

    use super::{Batch, Digest, DirectoryKey, Replica, Table, Tiers};
    use crate::directory::Change;

    fn key(n: u8) -> DirectoryKey {
        DirectoryKey::new([7, n, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14])
    }

    fn batch(sequence: u64, changes: &[(u8, u8)]) -> Batch {
        let change = |&(k, tiers): &(u8, u8)| Change { key: key(k), tiers: Tiers::from_bits(tiers) };
        Batch { bucket: 7, sequence, changes: changes.iter().map(change).collect() }
    }

    #[test]
    fn late_and_repeated_batches_change_nothing() {
        let (node, edition) = (NodeNumber::new(1), Edition::first(3));
        let mut table = Table::default();
        let (_, first) = table.apply(node, edition, &batch(1, &[(1, 2), (2, 4)]));
        assert_eq!((first.count, first.sequence), (2, 1));
        let (_, second) = table.apply(node, edition, &batch(2, &[(1, 0)]));
        assert_eq!(second.count, 1);
        for late in [batch(1, &[(1, 2)]), batch(2, &[(1, 2)])] {
            assert_eq!(table.apply(node, edition, &late), (edition, second));
        }
        let (counts_under, _) = table.apply(node, Edition::first(2), &batch(9, &[(1, 2)]));
        assert_eq!(counts_under, edition, "an older start has no say");
        assert_eq!(table.len(), 1);
    }

    #[test]
    fn a_newer_edition_starts_from_nothing() {
        let (node, old) = (NodeNumber::new(1), Edition::first(3));
        let mut table = Table::default();
        table.apply(node, old, &batch(5, &[(1, 2), (2, 2)]));
        let (_, digest) = table.apply(node, old.next(), &batch(1, &[(1, 2)]));
        let mut expected = Digest { sequence: 1, ..Digest::default() };
        expected.count(&key(1), Tiers::NONE, Tiers::from_bits(2));
        assert_eq!(digest, expected);
        assert_eq!(table.digests(node, old)[7], None);
        let stale = Replica { node, edition: old, tiers: Tiers::from_bits(2) };
        assert!(table.remove(&key(2), &stale) && !table.remove(&key(1), &stale));
    }
}
