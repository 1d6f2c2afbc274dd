use super::{Alloc, Arena, ArenaConfig, FrameId, FramePin};
use crate::{MemoryError, PageKind};
use proptest::{collection::vec, prelude::any, prop_oneof, proptest, strategy::Strategy};
use std::collections::BTreeMap;

const KIB: u64 = 1024;
const BASE: u64 = 0x5eed_0000_0000_0000;

fn arena(capacity_bytes: u64, extent_bytes: u64) -> Arena {
    let page_kind = PageKind::Plain;
    Arena::new(ArenaConfig { capacity_bytes, extent_bytes, page_kind, first_generation: BASE }).unwrap()
}

/// Allocates, growing as a daemon's background thread would.
fn alloc(arena: &Arena, bytes: u64) -> Option<FrameId> {
    loop {
        match arena.alloc(bytes) {
            Alloc::Growing => assert!(arena.grow().unwrap(), "it promised to grow"),
            answer => return answer.granted(),
        }
    }
}

#[test]
fn sizes_that_cannot_work_are_refused() {
    for (capacity_bytes, extent_bytes) in [(0, 0), (4096, 0), (4097, 4096), (8192, 4097), (4096, 8192)] {
        let page_kind = PageKind::Plain;
        let refused = Arena::new(ArenaConfig { capacity_bytes, extent_bytes, page_kind, first_generation: 1 });
        assert!(matches!(refused, Err(MemoryError::BadSize { .. })), "{capacity_bytes} {extent_bytes}");
    }
    let arena = arena(64 * KIB, 32 * KIB);
    assert_eq!(arena.alloc(32 * KIB + 1), Alloc::TooLarge { limit_bytes: 32 * KIB });
    assert_eq!(arena.alloc(u64::MAX), Alloc::TooLarge { limit_bytes: 32 * KIB });
}

#[test]
fn it_grows_by_one_extent_ahead_and_the_last_has_the_rest() {
    let arena = arena(80 * KIB, 32 * KIB);
    assert!(arena.needs_growth());
    assert_eq!(arena.alloc(4096), Alloc::Growing);
    assert!(arena.grow().unwrap());
    assert!(!arena.grow().unwrap(), "one spare is enough");
    let first = arena.alloc(4096).granted().unwrap();
    assert!(!arena.needs_growth(), "half of the extent is free");
    let mut frames: Vec<_> =
        std::iter::once(first).chain((0..7).map(|_| arena.alloc(4096).granted().unwrap())).collect();
    assert!(arena.needs_growth(), "the extent is full");
    assert_eq!(arena.alloc(4096), Alloc::Growing);
    frames.extend(std::iter::from_fn(|| alloc(&arena, 4096)));
    assert_eq!(frames.len(), 20);
    assert_eq!(arena.alloc(4096), Alloc::Full);
    assert!(!arena.needs_growth() && !arena.grow().unwrap());
    let stats = arena.stats();
    assert_eq!((stats.resident_bytes, stats.used_bytes, stats.frames, stats.extents), (80 * KIB, 80 * KIB, 20, 3));
    assert_eq!(arena.extent(2).unwrap().len(), 16 * KIB);
    assert_eq!((stats.classes[&4096].slots, stats.bytes_by_page_kind[&PageKind::Plain]), (20, 80 * KIB));
    assert!(arena.victim_extent(4096).is_none(), "its own class has no victims");
}

#[test]
fn a_remainder_too_small_for_one_class_still_grows_for_another() {
    let arena = arena(36 * KIB, 32 * KIB);
    let large = alloc(&arena, 20 * KIB).unwrap();
    assert_eq!(arena.alloc(20 * KIB), Alloc::Full, "4 KiB remain");
    assert_eq!(arena.alloc(4096), Alloc::Growing);
    assert!(arena.grow().unwrap());
    assert_ne!(arena.alloc(4096).granted().unwrap().extent, large.extent);
}

#[test]
fn memory_that_is_not_to_be_had_is_not_promised() {
    let arena = arena(1 << 62, 1 << 60);
    assert_eq!(arena.alloc(4096), Alloc::Growing);
    for _ in 0..2 {
        assert!(matches!(arena.grow(), Err(MemoryError::System { .. })));
        assert_eq!(arena.alloc(4096), Alloc::Full, "until a growth succeeds");
        assert!(arena.needs_growth(), "trying again is the caller's choice");
    }
    assert_eq!(arena.stats().resident_bytes, 0);
}

#[test]
fn an_empty_extent_serves_another_class() {
    let arena = arena(64 * KIB, 32 * KIB);
    let small: Vec<_> = std::iter::from_fn(|| alloc(&arena, 4096)).collect();
    assert_eq!(arena.alloc(9000), Alloc::Full);
    arena.free(small[15]);
    let (victim, frames) = arena.victim_extent(9000).unwrap();
    assert_eq!((victim, frames.len()), (1, 7), "the extent with fewer frames");
    let pin = arena.pin(frames[0]).unwrap();
    assert!(frames.iter().all(|&frame| arena.free(frame)));
    assert_eq!(arena.alloc(9000), Alloc::Full, "a pin holds the extent");
    assert_eq!(arena.victim_extent(9000), Some((1, Vec::new())), "only the pin is awaited");
    drop(pin);
    let large = arena.alloc(9000).granted().unwrap();
    assert_eq!((large.extent, large.bytes), (1, 9000));
    assert_eq!(arena.stats().classes[&(12 * KIB)].slots, 2);
}

#[test]
fn a_freed_frame_is_revoked_at_once_and_its_name_is_dead() {
    let arena = arena(32 * KIB, 32 * KIB);
    let frame = alloc(&arena, 100).unwrap();
    let extent = arena.extent(frame.extent).unwrap();
    assert_eq!((frame.generation, extent.generation(frame.offset)), (BASE, BASE));
    assert!(arena.contains(frame));
    let pin = arena.pin(frame).unwrap();
    assert!(arena.free(frame));
    assert_eq!(extent.generation(frame.offset), 0, "revoked though pinned");
    assert!(!arena.free(frame) && arena.pin(frame).is_none() && !arena.contains(frame));
    let second_pin = pin.clone();
    drop(pin);
    let others: Vec<_> = std::iter::from_fn(|| alloc(&arena, 100)).collect();
    assert_eq!(others.len(), 7, "the pinned slot is not granted");
    second_pin.fill(1);
    drop(second_pin);
    let again = arena.alloc(100).granted().unwrap();
    assert_eq!((again.offset, again.generation), (frame.offset, BASE + 8));
    for forged in [
        FrameId { generation: frame.generation, ..again },
        FrameId { bytes: 101, ..again },
        FrameId { offset: again.offset + 4096, ..again },
        FrameId { extent: 9, ..again },
    ] {
        assert!(!arena.free(forged) && arena.pin(forged).is_none(), "{forged:?}");
    }
}

#[test]
fn shrinking_gives_memory_and_descriptors_back() {
    // Other tests open descriptors, so this one counts its own mappings and the arena's extents by their ids.
    let arena = arena(96 * KIB, 32 * KIB);
    let frames: Vec<_> = std::iter::from_fn(|| alloc(&arena, 32 * KIB)).collect();
    let extents: Vec<_> = frames.iter().map(|frame| arena.extent(frame.extent).unwrap()).collect();
    let weak: Vec<_> = extents.iter().map(std::sync::Arc::downgrade).collect();
    drop(extents);
    assert_eq!(arena.shrink(), 0, "no extent is empty");
    arena.free(frames[0]);
    arena.free(frames[2]);
    assert_eq!(arena.shrink(), 64 * KIB);
    let alive: Vec<_> = weak.iter().map(|extent| extent.upgrade().is_some()).collect();
    assert_eq!(alive, [false, true, false], "dropped extents are unmapped and closed");
    assert_eq!(arena.stats().resident_bytes, 32 * KIB);
    let next = alloc(&arena, 32 * KIB).unwrap();
    assert_eq!(next.extent, 3, "ids are not used twice");
    let pin = arena.pin(frames[1]).unwrap();
    drop(arena);
    pin.fill(3);
    assert_eq!(pin.checksum(), crate::checksum::checksum(&[3; 32 << 10]), "a pin outlives the arena");
    drop(pin);
    assert!(weak[1].upgrade().is_none(), "and then nothing is left");
}

#[derive(Clone, Debug)]
enum Step {
    Alloc(u64),
    Free(usize),
    Pin(usize),
    Unpin(usize),
    Grow,
    Shrink,
    EvictVictim(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (1_u64..40 * KIB).prop_map(Step::Alloc),
        2 => (1_u64..3).prop_map(|pages| Step::Alloc(pages * 4096)),
        4 => any::<usize>().prop_map(Step::Free),
        2 => any::<usize>().prop_map(Step::Pin),
        2 => any::<usize>().prop_map(Step::Unpin),
        3 => proptest::prelude::Just(Step::Grow),
        1 => proptest::prelude::Just(Step::Shrink),
        1 => (1_u64..32 * KIB).prop_map(Step::EvictVictim),
    ]
}

/// What the arena must be, kept as lists.
struct Model {
    arena: Arena,
    live: Vec<FrameId>,
    pins: Vec<FramePin>,
    last_generation: u64,
}

impl Model {
    fn apply(&mut self, step: &Step) {
        match *step {
            Step::Alloc(bytes) => match self.arena.alloc(bytes) {
                Alloc::Granted(frame) => self.granted(frame, bytes),
                Alloc::TooLarge { limit_bytes } => assert!(bytes > limit_bytes),
                Alloc::Growing => assert!(self.arena.needs_growth(), "growing means that growth will help"),
                Alloc::Full => {}
            },
            Step::Free(at) if !self.live.is_empty() => {
                let frame = self.live.swap_remove(at % self.live.len());
                assert!(self.arena.free(frame));
                assert!(!self.arena.free(frame), "freed once");
            }
            Step::Pin(at) if !self.live.is_empty() => {
                let frame = self.live[at % self.live.len()];
                self.pins.push(self.arena.pin(frame).expect("granted frames can be pinned"));
            }
            Step::Unpin(at) if !self.pins.is_empty() => drop(self.pins.swap_remove(at % self.pins.len())),
            Step::Grow => assert_eq!(self.arena.needs_growth(), self.arena.grow().unwrap()),
            Step::Shrink => {
                self.arena.shrink();
                assert_eq!(self.arena.stats().empty_extents, 0);
            }
            Step::EvictVictim(bytes) => {
                for frame in self.arena.victim_extent(bytes).map(|(_, frames)| frames).unwrap_or_default() {
                    let at = self.live.iter().position(|&live| live == frame).expect("victims are granted frames");
                    self.live.swap_remove(at);
                    assert!(self.arena.free(frame));
                }
            }
            Step::Free(_) | Step::Pin(_) | Step::Unpin(_) => {}
        }
        self.check();
    }

    fn granted(&mut self, frame: FrameId, bytes: u64) {
        assert_eq!(frame.bytes, bytes);
        assert!(frame.generation > self.last_generation, "generations increase");
        self.last_generation = frame.generation;
        self.live.push(frame);
    }

    /// Every slot that somebody may touch: granted, or freed under a pin.
    fn check(&self) {
        let mut slots: BTreeMap<(u32, u64), (u64, FrameId)> = BTreeMap::new();
        let pinned = self.pins.iter().map(FramePin::frame);
        for frame in self.live.iter().copied().chain(pinned) {
            let end = frame.offset + frame.bytes.next_multiple_of(4096);
            if let Some((_, other)) = slots.insert((frame.extent, frame.offset), (end, frame)) {
                assert_eq!(other, frame, "a slot was granted while pinned or granted");
            }
        }
        let ends: Vec<_> = slots.iter().map(|(&(extent, offset), &(end, _))| (extent, offset, end)).collect();
        for pair in ends.windows(2) {
            assert!(pair[0].0 != pair[1].0 || pair[0].2 <= pair[1].1, "slots overlap: {pair:?}");
        }
        for frame in &self.live {
            let extent = self.arena.extent(frame.extent).expect("extents with frames stay");
            assert_eq!(extent.generation(frame.offset), frame.generation);
            assert!(frame.offset + frame.bytes <= extent.len());
        }
        let stats = self.arena.stats();
        assert!(stats.used_bytes <= stats.resident_bytes && stats.resident_bytes <= stats.capacity_bytes);
        assert_eq!(stats.frames, self.live.len() as u64);
        let pinned: std::collections::BTreeSet<_> = self.pins.iter().map(FramePin::frame).collect();
        assert_eq!(stats.pinned_frames, pinned.len() as u64);
        assert_eq!(stats.used_bytes, slots.iter().map(|((_, offset), (end, _))| end - offset).sum::<u64>());
    }
}

proptest! {
    #[test]
    fn an_arena_behaves_like_a_list_of_frames(steps in vec(step(), 1..120)) {
        let arena = arena(100 * KIB, 32 * KIB);
        let mut model = Model { arena, live: Vec::new(), pins: Vec::new(), last_generation: 0 };
        for step in &steps {
            model.apply(step);
        }
        model.pins.clear();
        for frame in std::mem::take(&mut model.live) {
            assert!(model.arena.free(frame));
        }
        model.arena.shrink();
        assert_eq!(model.arena.stats().resident_bytes, 0, "everything was given back");
    }
}
