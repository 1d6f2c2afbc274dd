//! Movement by verb, against hand-made situations.

use kvtier_types::{LayoutId, Location, NodeId, Outcome, RecordMeta, Tier};

use super::tests::{Bench, NOW, key};
use super::*;
use crate::catalog::Source;
use crate::entry::Kept;

/// Carries out what the core wants done, and answers with how many copies were made.
fn carry_out(core: &mut Core) -> usize {
    let mut done = 0;
    while let Some(action) = core.poll_action() {
        match action {
            Action::Offload { id, .. } => {
                done += 1;
                core.moved(id, MoveEnd::Done(Some(Location { segment: 1, offset: 8 + done })));
            }
            Action::Onboard { id, .. } => {
                done += 1;
                core.moved(id, MoveEnd::Done(None));
            }
            _ => {}
        }
    }
    usize::try_from(done).unwrap()
}

fn keys(range: std::ops::RangeInclusive<u8>) -> Vec<kvtier_types::BlockKey> {
    range.map(key).collect()
}

/// A flight from its beginning to its end: how each block ended.
fn fly(bench: &mut Bench, keys: &[kvtier_types::BlockKey], to: Tier) -> Vec<Outcome> {
    let lease = bench.core.hold_blocks(NOW, keys, Some(to)).unwrap();
    let mut left = keys.to_vec();
    let mut ended = Vec::new();
    for _ in 0..8 {
        let step = bench.core.step_move(lease, &left, to);
        left.retain(|key| step.ended.iter().all(|moved| moved.key != *key));
        ended.extend(step.ended);
        carry_out(&mut bench.core);
    }
    bench.core.release_export(lease);
    keys.iter().filter_map(|key| ended.iter().find(|m| m.key == *key).map(|m| m.outcome)).collect()
}

#[test]
fn a_faster_copy_goes_only_once_the_slower_one_exists() {
    let mut b = Bench::new(8, true);
    b.write(&[1, 2, 3]);
    let lease = b.core.hold_blocks(NOW, &keys(1..=3), Some(Tier::Disk)).unwrap();
    let step = b.core.step_move(lease, &keys(1..=3), Tier::Disk);
    assert!(step.ended.is_empty(), "{step:?}");
    assert_eq!(b.core.lies_in(&key(1), Tier::Host).map(|(whole, _)| whole), Some(true));
    assert_eq!(carry_out(&mut b.core), 3);
    let step = b.core.step_move(lease, &keys(1..=3), Tier::Disk);
    assert_eq!(step.ended.iter().map(|m| m.outcome).collect::<Vec<_>>(), [Outcome::Applied; 3]);
    b.core.release_export(lease);
    for tier in [Tier::Host, Tier::Disk] {
        assert_eq!(b.core.tier_use(tier).copies, if tier == Tier::Disk { 3 } else { 0 }, "{tier}");
    }
    let plan = b.core.plan_move(&keys(1..=4), Tier::Disk);
    assert_eq!(
        plan.iter().map(|p| p.outcome).collect::<Vec<_>>(),
        [Outcome::Duplicate, Outcome::Duplicate, Outcome::Duplicate, Outcome::Missing]
    );
    assert_eq!(fly(&mut b, &keys(1..=3), Tier::Host), [Outcome::Applied; 3]);
    assert_eq!(b.core.tier_use(Tier::Host).copies, 3);
}

#[test]
fn a_reader_keeps_its_copy_until_it_lets_go() {
    let mut b = Bench::new(8, true);
    b.write(&[1, 2]);
    carry_out(&mut b.core);
    let reader = b.core.hold_blocks(NOW, &keys(1..=1), None).unwrap();
    assert_eq!(fly(&mut b, &keys(1..=2), Tier::Disk), [Outcome::Applied], "the other one went");
    assert_eq!(b.core.lies_in(&key(1), Tier::Host).map(|(whole, _)| whole), Some(true));
    b.core.release_export(reader);
    assert_eq!(fly(&mut b, &keys(1..=1), Tier::Disk), [Outcome::Applied]);
}

#[test]
fn what_a_claim_keeps_is_neither_moved_away_nor_evicted() {
    let mut b = Bench::new(8, true);
    b.write(&[1, 2]);
    carry_out(&mut b.core);
    let id = b.core.visible_shards(&key(1))[0];
    b.core.catalog.update(id, |e| e.kept = Kept::default().with(Tier::Host));
    let plan = b.core.plan_move(&keys(1..=2), Tier::Disk);
    assert_eq!(plan.iter().map(|p| p.outcome).collect::<Vec<_>>(), [Outcome::Rejected, Outcome::Accepted]);
    assert_eq!(fly(&mut b, &keys(1..=2), Tier::Disk), [Outcome::Rejected, Outcome::Applied], "claimed in between");
    assert_eq!(b.core.lies_in(&key(1), Tier::Host).map(|(whole, _)| whole), Some(true));
    for (tiers, outcome) in [(vec![], Outcome::Rejected), (vec![Tier::Disk], Outcome::Applied)] {
        let plan = b.core.plan_evict(&keys(1..=1), &tiers);
        assert_eq!(plan.outcomes[0].1, outcome, "{tiers:?}");
        assert_eq!(plan.journal.is_empty(), outcome == Outcome::Rejected);
        b.core.apply_evict(&keys(1..=1), &tiers);
        assert_eq!(b.core.lies_in(&key(1), Tier::Host).map(|(whole, _)| whole), Some(true));
    }
}

#[test]
fn a_failed_copy_drops_nothing() {
    let mut b = Bench::new(8, true);
    b.write(&[1]);
    let lease = b.core.hold_blocks(NOW, &keys(1..=1), Some(Tier::Disk)).unwrap();
    let mut tries = 0;
    for _ in 0..4 {
        let step = b.core.step_move(lease, &keys(1..=1), Tier::Disk);
        assert!(step.ended.is_empty());
        tries += step.queued.len();
        while let Some(action) = b.core.poll_action() {
            if let Action::Offload { id, .. } = action {
                b.core.moved(id, MoveEnd::Failed);
            }
        }
    }
    assert!(tries >= 3, "each new try is told: {tries}");
    assert_eq!(b.core.lies_in(&key(1), Tier::Host).map(|(whole, _)| whole), Some(true));
}

fn meta(n: u8, parent: Option<u8>, bytes: u64) -> RecordMeta {
    RecordMeta {
        key: ShardKey { block: key(n), layout: LayoutId::new([7; 32]), shard: 0 },
        namespace: kvtier_types::NamespaceId::new([3; 32]),
        tenant: kvtier_types::TenantId::shared(),
        hints: kvtier_types::BlockHints::default(),
        parent: parent.map(key),
        depth_blocks: u32::from(n) - 1,
        group: 0,
        needs_ancestors: true,
        model: "far".into(),
        bytes,
        checksum: u64::from(n),
        sequence: 0,
        expires_ms: None,
    }
}

#[test]
fn what_is_known_by_its_key_alone_is_whole_once_it_came() {
    let mut b = Bench::new(8, false);
    let node = NodeId::new("far").unwrap().number();
    let bare = |n| {
        let nameless = meta(n, None, super::tests::BLOCK);
        let namespace = crate::Scope::default().namespace;
        let sources = vec![Source::Peer { node, incarnation: 1 }];
        (RecordMeta { namespace, depth_blocks: 0, model: String::new(), ..nameless }, sources)
    };
    let lease = b.core.pull(NOW, &[bare(1), bare(2)]).unwrap();
    let mut fetches = Vec::new();
    while let Some(action) = b.core.poll_action() {
        if let Action::Fetch { id, key, .. } = action {
            fetches.push((id, key));
        }
    }
    assert_eq!(fetches.len(), 2);
    for (id, shard) in fetches {
        let n = shard.block.as_bytes()[0];
        let meta = meta(n, n.checked_sub(1).filter(|n| *n > 0), super::tests::BLOCK);
        b.core.fetched(NOW, id, FetchEnd::Done(Box::new(meta)));
    }
    assert_eq!(b.core.export_waiting(lease), 0);
    b.core.release_export(lease);
    let view = b.core.locate(&key(2)).unwrap();
    assert_eq!((view.model.as_str(), view.depth_blocks, view.leases), ("far", 1, 0));
    assert_eq!(b.core.describe(&key(2))[0].parent, Some(key(1)));
    assert_eq!(b.core.shard_keys(&key(1)).len(), 2, "one shard in each layout that is known");
    // Now that one stands on the other, the inner one outlives it.
    b.write(&[11, 12, 13, 14, 15, 16]);
    b.write(&[17]);
    assert_eq!((b.core.lies_in(&key(1), Tier::Host).is_some(), b.core.lies_in(&key(2), Tier::Host)), (true, None));
}

#[test]
fn nobody_having_it_leaves_nothing_behind() {
    let mut b = Bench::new(8, false);
    let before = b.core.catalog_size().0;
    let node = NodeId::new("far").unwrap().number();
    let wanted = (meta(1, None, super::tests::BLOCK), vec![Source::Peer { node, incarnation: 1 }]);
    let lease = b.core.pull(NOW, &[wanted]).unwrap();
    while let Some(action) = b.core.poll_action() {
        if let Action::Fetch { id, .. } = action {
            b.core.fetched(NOW, id, FetchEnd::Gone);
        }
    }
    assert_eq!(b.core.export_waiting(lease), 0);
    b.core.release_export(lease);
    assert_eq!(b.core.catalog_size().0, before);
}
