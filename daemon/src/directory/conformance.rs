//! What every [`Directory`] promises, as one suite to run over each implementation. Panics where a promise is broken.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvtier_policy::directory::{Batch, Change, Digest, DirectoryKey, NodeRecord, NodeState, Replica, Tiers};
use kvtier_types::{Edition, NodeId, NodeNumber};

use super::Directory;

/// Far more than any step of the suite takes.
const PATIENCE: Duration = Duration::from_secs(30);
/// A record's life that is far longer than the suite.
const LONG: Duration = Duration::from_secs(600);
/// Between two looks at something awaited.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Runs all of it; `empty` answers with a directory that holds nothing.
///
/// # Panics
/// Where a promise is broken.
pub async fn run(empty: impl Fn() -> Arc<dyn Directory>) {
    late_batches(&*empty()).await;
    newer_editions(&*empty()).await;
    order_within_a_batch(&*empty()).await;
    many_batches(&*empty()).await;
    known_and_unknown(&*empty()).await;
    big_numbers(&*empty()).await;
    records_expire(&*empty()).await;
    leaving(&*empty()).await;
    walking_and_reaping(&*empty()).await;
    nothing_to_do(&*empty()).await;
}

/// Key number `n` of a bucket: every byte counts, and zeros occur.
#[must_use]
pub fn key(bucket: u8, n: u32) -> DirectoryKey {
    let mixed = (u64::from(n) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes();
    let [a, b, c, d, e, f, g, h] = mixed;
    let [w, x, y, z] = n.to_be_bytes();
    DirectoryKey::new([bucket, a, b, c, d, e, f, g, h, 0, 17, bucket, w, x, y, z])
}

/// A batch of changes, each a key's number in the bucket and the bits of its tiers.
#[must_use]
pub fn batch(bucket: u8, sequence: u64, changes: &[(u32, u8)]) -> Batch {
    let change = |&(n, tiers): &(u32, u8)| Change { key: key(bucket, n), tiers: Tiers::from_bits(tiers) };
    Batch { bucket, sequence, changes: changes.iter().map(change).collect() }
}

/// A record of a node.
#[must_use]
pub fn record(id: &str, edition: Edition) -> NodeRecord {
    NodeRecord {
        id: NodeId::new(id).expect("the suite's ids are good"),
        edition,
        state: NodeState::Ready,
        warming: false,
        peer: format!("{id}:7400"),
        free_host_bytes: 1 << 40,
        packs: vec!["pack-1".into(), "pack-2".into()],
    }
}

/// The digest of keys of a bucket, each with its tiers.
#[must_use]
pub fn digest(bucket: u8, sequence: u64, entries: &[(u32, u8)]) -> Digest {
    let mut digest = Digest { sequence, ..Digest::default() };
    for (n, tiers) in entries {
        digest.count(&key(bucket, *n), Tiers::NONE, Tiers::from_bits(*tiers));
    }
    digest
}

async fn apply(on: &dyn Directory, node: u64, edition: Edition, one: Batch) -> (Edition, Digest) {
    let answers = on.apply(NodeNumber::new(node), edition, &[one]).await.expect("the batch is carried out");
    assert_eq!(answers.len(), 1, "one answer a batch");
    answers[0]
}

async fn locate(on: &dyn Directory, keys: &[DirectoryKey]) -> Vec<Vec<Replica>> {
    let found = on.locate(keys).await.expect("keys are located");
    assert_eq!(found.len(), keys.len(), "one answer a key");
    found
}

async fn digest_of(on: &dyn Directory, node: u64, edition: Edition, bucket: u8) -> Option<Digest> {
    on.digests(NodeNumber::new(node), edition).await.expect("digests are told")[usize::from(bucket)]
}

fn replica(node: u64, edition: Edition, tiers: u8) -> Replica {
    Replica { node: NodeNumber::new(node), edition, tiers: Tiers::from_bits(tiers) }
}

async fn late_batches(on: &dyn Directory) {
    let edition = Edition::first(3);
    assert_eq!(apply(on, 1, edition, batch(7, 2, &[(1, 2), (2, 4)])).await, (edition, digest(7, 2, &[(1, 2), (2, 4)])));
    let held = (edition, digest(7, 3, &[(2, 5), (3, 1)]));
    assert_eq!(apply(on, 1, edition, batch(7, 3, &[(1, 0), (2, 5), (3, 1)])).await, held);
    for late in [batch(7, 3, &[(1, 2)]), batch(7, 2, &[(1, 2), (2, 4)]), batch(7, 1, &[(9, 1)]), batch(7, 0, &[(3, 0)])]
    {
        assert_eq!(apply(on, 1, edition, late).await, held, "a late or repeated batch changes nothing");
    }
    assert_eq!(apply(on, 1, Edition::first(2), batch(7, 99, &[(2, 0)])).await, held, "an older start has no say");
    let found = locate(on, &[key(7, 1), key(7, 2), key(7, 3), key(7, 9)]).await;
    assert_eq!(found, [vec![], vec![replica(1, edition, 5)], vec![replica(1, edition, 1)], vec![]]);
    assert_eq!(apply(on, 1, edition, batch(8, 1, &[(1, 1)])).await.1, digest(8, 1, &[(1, 1)]), "buckets count apart");
}

async fn newer_editions(on: &dyn Directory) {
    let (old, new) = (Edition::first(3), Edition::first(3).next());
    apply(on, 1, old, batch(7, 5, &[(1, 2), (2, 2)])).await;
    assert_eq!(apply(on, 1, new, batch(7, 1, &[(1, 2)])).await, (new, digest(7, 1, &[(1, 2)])));
    assert_eq!(digest_of(on, 1, old, 7).await, None);
    assert_eq!(digest_of(on, 1, new, 7).await, Some(digest(7, 1, &[(1, 2)])));
    let found = locate(on, &[key(7, 1), key(7, 2)]).await;
    assert_eq!(found, [vec![replica(1, new, 2)], vec![replica(1, old, 2)]], "old entries stay until they are reaped");
    let removed = apply(on, 1, new, batch(7, 2, &[(2, 0)])).await;
    assert_eq!(removed.1, digest(7, 2, &[(1, 2)]), "an old entry's removal counts for nothing");
    assert!(locate(on, &[key(7, 2)]).await[0].is_empty());
}

async fn order_within_a_batch(on: &dyn Directory) {
    let edition = Edition::first(1);
    let several = batch(0, 1, &[(1, 1), (2, 1), (1, 0), (2, 8), (3, 0), (1, 2), (4, 1), (4, 0)]);
    assert_eq!(apply(on, 1, edition, several).await.1, digest(0, 1, &[(1, 2), (2, 8)]), "the last of a key counts");
    assert_eq!(apply(on, 1, edition, batch(0, 2, &[])).await.1, digest(0, 2, &[(1, 2), (2, 8)]));
}

async fn many_batches(on: &dyn Directory) {
    let (node, edition) = (NodeNumber::new(u64::MAX), Edition::first(1));
    let entries: Vec<_> = (0..512).map(|n| (n, 15)).collect();
    let batches: Vec<_> =
        (0..=255).map(|bucket| batch(bucket, 1, if bucket < 8 { &entries } else { &[(1, 1)] })).collect();
    let answers = on.apply(node, edition, &batches).await.expect("batches of all buckets at once");
    let digests = on.digests(node, edition).await.expect("digests are told");
    assert_eq!((answers.len(), digests.len()), (256, 256));
    for (batch, (answer, told)) in batches.iter().zip(answers.iter().zip(&digests)) {
        let expected = digest(batch.bucket, 1, if batch.bucket < 8 { &entries } else { &[(1, 1)] });
        assert_eq!((answer, told), (&(edition, expected), &Some(expected)));
    }
    let keys: Vec<_> = (0..4096).map(|n| key(u8::try_from(n % 8).expect("below 8"), n / 8)).collect();
    assert!(locate(on, &keys).await.iter().all(|found| *found == [replica(u64::MAX, edition, 15)]));
}

async fn known_and_unknown(on: &dyn Directory) {
    let edition = Edition::first(1);
    for node in [3, 1, 2] {
        apply(on, node, edition, batch(5, 1, &[(1, 1), (2, 2)])).await;
    }
    apply(on, 2, edition, batch(5, 2, &[(1, 0)])).await;
    let keys = [key(5, 9), key(5, 1), key(6, 1), key(5, 2), key(5, 1)];
    let of = |nodes: &[u64], tiers| nodes.iter().map(|n| replica(*n, edition, tiers)).collect::<Vec<_>>();
    let expected = [vec![], of(&[1, 3], 1), vec![], of(&[1, 2, 3], 2), of(&[1, 3], 1)];
    assert_eq!(locate(on, &keys).await, expected, "in the order of the keys, and of the nodes within");
    assert_eq!(digest_of(on, 4, edition, 5).await, None);
}

async fn big_numbers(on: &dyn Directory) {
    let base = (1 << 62) + (1 << 53);
    let (low, high) = (Edition::new(base), Edition::new(base + 1));
    // Neighbors beyond 2^53, and numbers whose bytes sort otherwise than they do, are told apart.
    assert_eq!(apply(on, 1, high, batch(1, base + 1, &[(1, 1)])).await.0, high);
    assert_eq!(apply(on, 1, low, batch(1, u64::MAX, &[(1, 0)])).await, (high, digest(1, base + 1, &[(1, 1)])));
    assert_eq!(apply(on, 1, high, batch(1, base, &[(1, 0)])).await.1, digest(1, base + 1, &[(1, 1)]));
    assert_eq!(apply(on, 1, high, batch(1, base + 2, &[(2, 2)])).await.1, digest(1, base + 2, &[(1, 1), (2, 2)]));
    let pairs = [(0x7f, 0x80), (0xff, 0x100), (0x2f_ffff_ffff, 0x30_0000_0000), (0x41, 0x61), (0x5f, 0x60)];
    for (bucket, (below, above)) in (2..).zip(pairs) {
        apply(on, 1, high, batch(bucket, above, &[(1, 1)])).await;
        assert_eq!(apply(on, 1, high, batch(bucket, below, &[(1, 0)])).await.1.sequence, above);
        assert_eq!(apply(on, 1, high, batch(bucket, above + 1, &[(1, 0)])).await.1, digest(bucket, above + 1, &[]));
    }
}

async fn beat(on: &dyn Directory, record: &NodeRecord, ttl: Duration) -> Vec<NodeRecord> {
    on.heartbeat(record, ttl).await.expect("the heartbeat is taken")
}

async fn records_expire(on: &dyn Directory) {
    let (mut a, b) = (record("a", Edition::first(1)), record("b", Edition::first(1 << 40)));
    assert_eq!(beat(on, &a, LONG).await, [a.clone()]);
    assert_eq!(beat(on, &b, LONG).await, [a.clone(), b.clone()]);
    a.state = NodeState::Draining;
    a.packs.clear();
    assert_eq!(beat(on, &a, Duration::from_millis(50)).await.len(), 2, "a heartbeat renews, it does not add");
    let deadline = Instant::now() + PATIENCE;
    while beat(on, &b, LONG).await != [b.clone()] {
        assert!(Instant::now() < deadline, "a record outlives its time");
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

async fn leaving(on: &dyn Directory) {
    let (a, b) = (record("a", Edition::first(2).next()), record("b", Edition::first(1)));
    beat(on, &a, LONG).await;
    on.leave(&a.id, Edition::first(1)).await.expect("an older start may try to leave");
    on.leave(&a.id, Edition::first(3)).await.expect("so may a newer one");
    assert_eq!(beat(on, &b, LONG).await, [a.clone(), b.clone()], "only the record's own start removes it");
    on.leave(&a.id, Edition::first(2)).await.expect("any edition of the start may leave");
    on.leave(&a.id, Edition::first(2)).await.expect("leaving twice does no harm");
    assert_eq!(beat(on, &b, LONG).await, [b]);
}

async fn walking_and_reaping(on: &dyn Directory) {
    let (dead, new) = (Edition::first(1), Edition::first(2));
    let mut expected = BTreeMap::new();
    for bucket in [0, 1, 128, 255] {
        let entries: Vec<_> = (0..500).map(|n| (n, 3)).collect();
        for node in 1..=4 {
            apply(on, node, dead, batch(bucket, 1, &entries)).await;
            for (n, tiers) in &entries {
                expected.insert((key(bucket, *n), NodeNumber::new(node)), replica(node, dead, *tiers));
            }
        }
        apply(on, 1, new, batch(bucket, 1, &[(0, 3)])).await;
        expected.insert((key(bucket, 0), NodeNumber::new(1)), replica(1, new, 3));
    }
    assert_eq!(walk(on).await, expected);

    let of_dead: Vec<_> = expected.iter().filter(|((_, node), r)| node.get() == 1 && r.edition == dead).collect();
    let mut reaped: Vec<_> = of_dead.into_iter().map(|((key, _), replica)| (*key, *replica)).collect();
    let wrong = [(key(0, 0), replica(1, dead, 3)), (key(0, 1), replica(1, dead, 1)), (key(3, 1), replica(1, dead, 3))];
    reaped.extend(wrong);
    assert_eq!(on.reap(&reaped).await.expect("entries are reaped"), 4 * 499, "what changed meanwhile stays");
    assert_eq!(on.reap(&reaped).await.expect("again"), 0);
    expected.retain(|(_, node), r| node.get() != 1 || r.edition == new);
    assert_eq!(walk(on).await, expected);
    assert_eq!(digest_of(on, 1, new, 255).await, Some(digest(255, 1, &[(0, 3)])), "what counts still counts");
}

/// Everything a walk finds.
async fn walk(on: &dyn Directory) -> BTreeMap<(DirectoryKey, NodeNumber), Replica> {
    let (mut found, mut from) = (BTreeMap::new(), None);
    for _ in 0..10_000 {
        let (page, next) = on.walk(from).await.expect("the walk goes on");
        found.extend(page.into_iter().map(|(key, replica)| ((key, replica.node), replica)));
        if next.is_none() {
            return found;
        }
        from = next;
    }
    panic!("the walk has no end");
}

async fn nothing_to_do(on: &dyn Directory) {
    assert!(locate(on, &[]).await.is_empty());
    assert_eq!(on.reap(&[]).await.expect("nothing is reaped"), 0);
    assert!(on.apply(NodeNumber::new(1), Edition::first(1), &[]).await.expect("nothing is applied").is_empty());
    assert!(walk(on).await.is_empty());
    assert_eq!(on.digests(NodeNumber::new(1), Edition::first(1)).await.expect("digests are told"), vec![None; 256]);
}
