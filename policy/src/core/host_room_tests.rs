//! Room in host memory where blocks of two sizes share it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kvtier_types::{BlockKey, Layout, RequestHints, TenantId, Tier};

use super::tests::{BLOCK, Bench, NOW, full, key, layout, spec};
use super::*;
use crate::frame::Allocation;

/// Long enough for two short blocks, or for a long one.
const EXTENT: u64 = 2 * BLOCK;

/// Extents that serve one size at a time.
#[derive(Debug)]
struct Extents {
    extents: Vec<(u64, BTreeSet<u32>)>,
    generation: u64,
    asked: Arc<AtomicUsize>,
}

impl FramePool for Extents {
    fn alloc(&mut self, bytes: u64) -> Allocation {
        let free = |(class, taken): &(u64, BTreeSet<u32>)| {
            taken.is_empty() || *class == bytes && (taken.len() as u64) < EXTENT / bytes
        };
        let Some(at) = self.extents.iter().position(free) else { return Allocation::Full };
        let (class, taken) = &mut self.extents[at];
        *class = bytes;
        let page = (0..).find(|page| !taken.contains(page)).unwrap();
        taken.insert(page);
        self.generation += 1;
        Allocation::Granted(FrameRef { extent: u32::try_from(at).unwrap(), page, generation: self.generation })
    }

    fn free(&mut self, frame: FrameRef, _bytes: u64) {
        assert!(self.extents[frame.extent as usize].1.remove(&frame.page));
    }

    fn class(&self, bytes: u64) -> u64 {
        bytes
    }

    fn victim_extents(&self, bytes: u64, most: usize) -> Vec<u32> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        (0..).zip(&self.extents).filter(|(_, (class, _))| *class != bytes).map(|(at, _)| at).take(most).collect()
    }

    fn capacity_bytes(&self) -> u64 {
        EXTENT * self.extents.len() as u64
    }
}

/// An engine of short blocks, one of long blocks, and how often extents were looked for.
fn two_sizes(disk: bool) -> (Bench, Long, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let pool = Extents { extents: vec![(0, BTreeSet::new()); 2], generation: 0, asked: Arc::clone(&asked) };
    let mut core = Core::new(CoreConfig { disk, ..CoreConfig::default() }, Box::new(pool), |bytes| bytes);
    let who = core.attach(NOW, spec(layout(1, full()))).unwrap();
    let mut long = spec(Layout { block_bytes: vec![EXTENT], ..layout(1, full()) });
    long.engine = "long".into();
    let long = Long(core.attach(NOW, long).unwrap());
    (Bench { core, who }, long, asked)
}

/// The engine of long blocks.
#[derive(Debug, Clone, Copy)]
struct Long(AttachmentId);

impl Long {
    fn reserve(self, b: &mut Bench, keys: impl Iterator<Item = BlockKey>) -> Vec<Reservation> {
        let request = ReserveRequest {
            attachment: self.0,
            parent: None,
            group: 0,
            first_block: 0,
            keys: keys.collect(),
            tenant: TenantId::shared(),
            hints: RequestHints::default(),
        };
        b.core.reserve(NOW, &request).unwrap()
    }
}

#[test]
fn an_extent_that_may_go_is_found_behind_one_that_may_not() {
    let (mut b, long, _) = two_sizes(false);
    b.write(&[1, 2, 3, 4]);
    b.lookup("r", &[1]);
    let answers = long.reserve(&mut b, std::iter::once(key(100)));
    assert!(matches!(answers[0], Reservation::Granted(_)));
    assert_eq!(b.found(&[1, 2]), 2, "what shares an extent with a block in use stays");
    assert_eq!(b.found(&[3]), 0);
}

#[test]
fn no_other_extent_is_emptied_while_one_waits_for_a_movement() {
    let (mut b, long, _) = two_sizes(true);
    b.write(&[1, 2, 3, 4]);
    b.offload_all();
    b.core.apply_evict(&[key(1), key(2)], &[Tier::Host]);
    b.lookup("r", &[1]);
    assert!(matches!(b.core.poll_action(), Some(Action::Onboard { .. })));
    assert_eq!(long.reserve(&mut b, std::iter::once(key(100))), [Reservation::Busy]);
    assert_eq!(b.core.tier_use(Tier::Host).copies, 2, "what lies in the other extent stays");
}

#[test]
fn a_size_without_room_is_not_looked_for_at_every_block() {
    let (mut b, long, asked) = two_sizes(false);
    b.write(&[1, 2, 3, 4]);
    b.lookup("r", &[1]);
    b.lookup("s", &[3]);
    let answers =
        long.reserve(&mut b, (0..1000_u32).map(|n| BlockKey::new([n.to_le_bytes(); 8].concat().try_into().unwrap())));
    assert!(answers.iter().all(|answer| *answer == Reservation::Busy));
    assert_eq!(asked.load(Ordering::Relaxed), 1);
}

#[test]
fn a_block_without_room_does_not_hold_up_one_of_another_size() {
    let (mut b, long, _) = two_sizes(true);
    let Reservation::Granted(frames) = &long.reserve(&mut b, std::iter::once(key(100)))[0] else { panic!() };
    let seal = SealRequest { key: key(100), shard: 0, frame: frames[0], checksum: 100, abandoned: false };
    b.core.seal(long.0, &[seal]).unwrap();
    b.write(&[5]);
    assert_eq!(b.offload_all(), 2);
    b.core.apply_evict(&[key(100), key(5)], &[Tier::Host]);
    b.write(&[1, 2, 3]);
    b.offload_all();
    b.lookup("r", &[1]);
    b.lookup("s", &[3]);
    let range = LookupRange { group: 0, first_block: 0, keys: vec![key(100)] };
    let request = LookupRequest {
        attachment: long.0,
        request_id: "long".into(),
        ranges: vec![range],
        local_tokens: 0,
        tenant: TenantId::shared(),
        hints: RequestHints::default(),
    };
    let waits = b.core.lookup(NOW, request).unwrap();
    let short = b.lookup("t", &[5]);
    let mut onboarded = Vec::new();
    while let Some(action) = b.core.poll_action() {
        if let Action::Onboard { id, key, .. } = action {
            onboarded.push(key.block);
            b.core.moved(id, MoveEnd::Done(None));
        }
    }
    assert_eq!(onboarded, [key(5)]);
    assert_eq!((b.core.waiting(short), b.core.waiting(waits)), (Ok(0), Ok(1)));
}
