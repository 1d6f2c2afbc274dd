//! Which slots of which extents are taken: bookkeeping under its owner's mutex, of host memory or of a device's.
//!
//! Each extent serves one size class (slot length) at a time and returns to the pool when no slot of it is taken.
//!
//! *Invariants*: slots of an extent never overlap; an extent is in `empty`, or retires, or belongs to one class and is in that
//! class's `open` set exactly while it has a slot to give; a doomed (freed, still pinned) slot counts as taken.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use crate::{FrameId, PAGE_BYTES};

/// Memory that is cut into slots.
pub trait Slots {
    /// Bytes of it.
    fn bytes(&self) -> u64;

    /// The slot at `offset` is a frame's of this generation from now on.
    fn granted(&self, offset: u64, generation: u64);

    /// The frame at `offset` is no more: from now on nobody may take what lies there for its bytes.
    fn revoked(&self, offset: u64);
}

/// A taken slot.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub(crate) frame: FrameId,
    pub(crate) pins: u32,
    /// Freed while pinned: goes when the last pin does.
    pub(crate) doomed: bool,
}

/// What a pin needs to know.
#[derive(Debug)]
pub struct Pinned<E> {
    /// The extent.
    pub extent: Arc<E>,
    /// Bytes of the slot.
    pub slot_bytes: u64,
}

/// An extent and how it is cut.
#[derive(Debug)]
pub struct Carved<E> {
    pub(crate) extent: Arc<E>,
    /// Length of a slot; 0 while the extent is empty.
    pub(crate) slot_bytes: u64,
    /// Offset of the first slot that was never taken since the extent was cut.
    fresh: u64,
    /// Offsets given back.
    free: Vec<u64>,
    /// Taken slots by offset.
    pub(crate) taken: BTreeMap<u64, Slot>,
    /// Taken slots that are not doomed.
    pub(crate) live: u64,
    /// Taken slots that are pinned.
    pub(crate) pinned: u64,
    /// No slot of it is given any more: once none is taken it leaves.
    retires: bool,
}

impl<E: Slots> Carved<E> {
    /// Whether it is on its way out.
    #[must_use]
    pub const fn retires(&self) -> bool {
        self.retires
    }

    fn next_slot(&mut self) -> Option<u64> {
        if let Some(offset) = self.free.pop() {
            return Some(offset);
        }
        let offset = self.fresh;
        if offset + self.slot_bytes > self.extent.bytes() {
            return None;
        }
        self.fresh += self.slot_bytes;
        Some(offset)
    }

    fn has_room(&self) -> bool {
        !self.retires && (!self.free.is_empty() || self.fresh + self.slot_bytes <= self.extent.bytes())
    }

    /// Bytes of taken slots.
    #[must_use]
    pub fn taken_bytes(&self) -> u64 {
        self.taken.len() as u64 * self.slot_bytes
    }
}

/// The slots of one pool.
#[derive(Debug)]
pub struct Slab<E> {
    pub(crate) extents: BTreeMap<u32, Carved<E>>,
    /// Per slot length, the extents of that class with a slot to give.
    open: BTreeMap<u64, BTreeSet<u32>>,
    /// Extents of no class, shortest first.
    empty: BTreeSet<(u64, u32)>,
    /// Extents that left, for their owner to drop outside of its lock.
    retired: Vec<Arc<E>>,
    next_generation: u64,
    /// Numbers of extents to come.
    numbers: Range<u32>,
    /// Sum of the extents' lengths.
    pub(crate) resident_bytes: u64,
}

/// The slot length that serves blocks of `bytes`; `None` when no memory could.
#[must_use]
pub fn slot_bytes(bytes: u64) -> Option<u64> {
    bytes.max(1).checked_next_multiple_of(PAGE_BYTES)
}

impl<E: Slots> Slab<E> {
    /// Without extents. Those that are added get these numbers; frames get generations from the first on.
    #[must_use]
    pub const fn new(first_generation: u64, numbers: Range<u32>) -> Self {
        Self {
            extents: BTreeMap::new(),
            open: BTreeMap::new(),
            empty: BTreeSet::new(),
            retired: Vec::new(),
            next_generation: if first_generation == 0 { 1 } else { first_generation },
            numbers,
            resident_bytes: 0,
        }
    }

    /// Adds an empty extent; `None` once ids ran out (they are never used twice, since engines cache mappings by them).
    pub fn add(&mut self, extent: Arc<E>) -> Option<u32> {
        let id = self.numbers.next()?;
        self.resident_bytes += extent.bytes();
        self.empty.insert((extent.bytes(), id));
        let carved = Carved {
            extent,
            slot_bytes: 0,
            fresh: 0,
            free: Vec::new(),
            taken: BTreeMap::new(),
            live: 0,
            pinned: 0,
            retires: false,
        };
        self.extents.insert(id, carved);
        Some(id)
    }

    /// Whether an extent of no class could serve slots of this length.
    #[must_use]
    pub fn has_empty(&self, slot_bytes: u64) -> bool {
        self.empty.last().is_some_and(|&(len, _)| len >= slot_bytes)
    }

    /// Extents of no class.
    #[must_use]
    pub fn empty_count(&self) -> usize {
        self.empty.len()
    }

    /// Takes all extents of no class out.
    pub fn drain_empty(&mut self) -> Vec<Arc<E>> {
        let drained: Vec<_> =
            std::mem::take(&mut self.empty).into_iter().filter_map(|(_, id)| self.extents.remove(&id)).collect();
        self.resident_bytes -= drained.iter().map(|carved| carved.extent.bytes()).sum::<u64>();
        drained.into_iter().map(|carved| carved.extent).collect()
    }

    /// Takes a slot for `bytes`, in the class's oldest extent with room, so that younger ones empty out; else cuts an
    /// empty extent, the shortest that fits. Publishes the frame's generation.
    pub fn take(&mut self, bytes: u64, slot_bytes: u64) -> Option<FrameId> {
        let id = match self.open.get(&slot_bytes).and_then(|open| open.first()) {
            Some(&id) => id,
            None => self.cut(slot_bytes)?,
        };
        let carved = self.extents.get_mut(&id)?;
        let offset = carved.next_slot()?;
        let frame = FrameId { extent: id, offset, bytes, generation: self.next_generation };
        self.next_generation += 1;
        carved.taken.insert(offset, Slot { frame, pins: 0, doomed: false });
        carved.live += 1;
        carved.extent.granted(offset, frame.generation);
        if !carved.has_room() {
            self.close(slot_bytes, id);
        }
        Some(frame)
    }

    fn cut(&mut self, slot_bytes: u64) -> Option<u32> {
        let &(len, id) = self.empty.range((slot_bytes, 0)..).next()?;
        self.empty.remove(&(len, id));
        self.extents.get_mut(&id)?.slot_bytes = slot_bytes;
        self.open.entry(slot_bytes).or_default().insert(id);
        Some(id)
    }

    fn close(&mut self, slot_bytes: u64, id: u32) {
        if let Some(open) = self.open.get_mut(&slot_bytes) {
            open.remove(&id);
            if open.is_empty() {
                self.open.remove(&slot_bytes);
            }
        }
    }

    /// Whether the class can serve half an extent more without another one.
    #[must_use]
    pub fn has_headroom(&self, slot_bytes: u64) -> bool {
        let Some(open) = self.open.get(&slot_bytes) else { return false };
        let half_free = |id| {
            let carved = self.extents.get(id);
            carved.is_some_and(|carved| carved.taken_bytes() <= carved.extent.bytes() / 2)
        };
        open.len() > 1 || open.first().is_some_and(half_free)
    }

    /// The extent of a frame, if its slot is taken and still the frame's.
    fn of(&mut self, frame: FrameId) -> Option<&mut Carved<E>> {
        let carved = self.extents.get_mut(&frame.extent)?;
        carved.taken.get(&frame.offset).is_some_and(|slot| slot.frame == frame).then_some(carved)
    }

    /// Revokes a frame's generation and gives its slot back, or leaves that to the last unpin. False if it is not granted.
    pub fn free(&mut self, frame: FrameId) -> bool {
        let Some(carved) = self.of(frame) else { return false };
        let Some(slot) = carved.taken.get_mut(&frame.offset).filter(|slot| !slot.doomed) else { return false };
        slot.doomed = true;
        let pinned = slot.pins > 0;
        carved.live -= 1;
        carved.extent.revoked(frame.offset);
        if !pinned {
            self.give_back(frame);
        }
        true
    }

    /// Adds a pin; `doomed_too` also to a frame freed meanwhile, for whoever holds a pin already.
    pub fn pin(&mut self, frame: FrameId, doomed_too: bool) -> Option<Pinned<E>> {
        let carved = self.of(frame)?;
        let slot = carved.taken.get_mut(&frame.offset).filter(|slot| doomed_too || !slot.doomed)?;
        slot.pins = slot.pins.checked_add(1)?;
        carved.pinned += u64::from(slot.pins == 1);
        Some(Pinned { extent: Arc::clone(&carved.extent), slot_bytes: carved.slot_bytes })
    }

    /// Takes a pin off; the last one of a freed frame gives its slot back.
    pub fn unpin(&mut self, frame: FrameId) {
        let Some(carved) = self.of(frame) else { return };
        let Some(slot) = carved.taken.get_mut(&frame.offset) else { return };
        slot.pins -= 1;
        let (last, doomed) = (slot.pins == 0, slot.doomed);
        carved.pinned -= u64::from(last);
        if last && doomed {
            self.give_back(frame);
        }
    }

    fn give_back(&mut self, frame: FrameId) {
        let Some(carved) = self.extents.get_mut(&frame.extent) else { return };
        let slot_bytes = carved.slot_bytes;
        carved.taken.remove(&frame.offset);
        carved.free.push(frame.offset);
        if carved.taken.is_empty() {
            carved.slot_bytes = 0;
            carved.fresh = 0;
            carved.free = Vec::new();
            let (len, retires) = (carved.extent.bytes(), carved.retires);
            self.close(slot_bytes, frame.extent);
            if retires {
                self.leave(frame.extent);
            } else {
                self.empty.insert((len, frame.extent));
            }
        } else if !carved.retires {
            self.open.entry(slot_bytes).or_default().insert(frame.extent);
        }
    }

    /// Gives no more slots of an extent, which leaves once none is taken; or gives them again, if it is not too late.
    pub fn retire(&mut self, id: u32, retires: bool) {
        let Some(carved) = self.extents.get_mut(&id).filter(|carved| carved.retires != retires) else { return };
        carved.retires = retires;
        let (slot_bytes, len, has_room) =
            (carved.slot_bytes, carved.extent.bytes(), carved.slot_bytes > 0 && carved.has_room());
        if retires && slot_bytes == 0 {
            self.empty.remove(&(len, id));
            self.leave(id);
        } else if retires {
            self.close(slot_bytes, id);
        } else if has_room {
            self.open.entry(slot_bytes).or_default().insert(id);
        }
    }

    fn leave(&mut self, id: u32) {
        if let Some(carved) = self.extents.remove(&id) {
            self.resident_bytes -= carved.extent.bytes();
            self.retired.push(carved.extent);
        }
    }

    /// Extents that left since the last call.
    pub fn take_retired(&mut self) -> Vec<Arc<E>> {
        std::mem::take(&mut self.retired)
    }

    /// The extents with their numbers, oldest first.
    pub fn extents(&self) -> impl Iterator<Item = (u32, &Carved<E>)> {
        self.extents.iter().map(|(id, carved)| (*id, carved))
    }

    /// The extent of a number.
    #[must_use]
    pub fn extent(&self, id: u32) -> Option<&Arc<E>> {
        self.extents.get(&id).map(|carved| &carved.extent)
    }

    /// Whether a frame is still granted.
    #[must_use]
    pub fn contains(&self, frame: FrameId) -> bool {
        let slot = self.extents.get(&frame.extent).and_then(|carved| carved.taken.get(&frame.offset));
        slot.is_some_and(|slot| slot.frame == frame && !slot.doomed)
    }

    /// Sum of the extents' lengths.
    #[must_use]
    pub const fn resident_bytes(&self) -> u64 {
        self.resident_bytes
    }

    /// Extents of other classes that could serve slots of this length, at most so many: those with the fewest taken bytes.
    #[must_use]
    pub fn victims(&self, slot_bytes: u64, most: usize) -> Vec<u32> {
        let other = |carved: &Carved<E>| {
            !carved.retires
                && carved.slot_bytes != 0
                && carved.slot_bytes != slot_bytes
                && carved.extent.bytes() >= slot_bytes
        };
        let candidates = self.extents.iter().filter(|(_, carved)| other(carved));
        let mut found: Vec<(u64, u32)> = candidates.map(|(id, carved)| (carved.taken_bytes(), *id)).collect();
        found.sort_unstable();
        found.into_iter().take(most).map(|(_, id)| id).collect()
    }

    /// The first of [`Self::victims`], with its granted frames.
    #[must_use]
    pub fn victim(&self, slot_bytes: u64) -> Option<(u32, Vec<FrameId>)> {
        let id = *self.victims(slot_bytes, 1).first()?;
        let carved = self.extents.get(&id)?;
        let live = carved.taken.values().filter(|slot| !slot.doomed).map(|slot| slot.frame).collect();
        Some((id, live))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    /// Memory of which only the last word about it is kept.
    #[derive(Debug)]
    struct Paper(u64, AtomicU64);

    impl Slots for Paper {
        fn bytes(&self) -> u64 {
            self.0
        }

        fn granted(&self, _offset: u64, generation: u64) {
            self.1.store(generation, Ordering::Relaxed);
        }

        fn revoked(&self, _offset: u64) {
            self.1.store(0, Ordering::Relaxed);
        }
    }

    fn slab(extents: u64) -> Slab<Paper> {
        let mut slab = Slab::new(7, 1 << 31..(1 << 31) + 3);
        (0..extents).for_each(|_| assert!(slab.add(Arc::new(Paper(2 * PAGE_BYTES, AtomicU64::new(0)))).is_some()));
        slab
    }

    #[test]
    fn numbers_and_generations_are_the_owners_choice() {
        let mut slab = slab(3);
        assert_eq!(slab.add(Arc::new(Paper(PAGE_BYTES, AtomicU64::new(0)))), None, "numbers ran out");
        let frame = slab.take(100, PAGE_BYTES).unwrap();
        assert_eq!((frame.extent, frame.generation), (1 << 31, 7));
        assert_eq!(slab.extent(frame.extent).unwrap().1.load(Ordering::Relaxed), 7);
        assert!(slab.contains(frame) && slab.free(frame) && !slab.contains(frame));
        assert_eq!(slab.extent(frame.extent).unwrap().1.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn an_extent_that_retires_gives_nothing_and_leaves_once_it_is_empty() {
        let mut slab = slab(2);
        let [first, second, third] = [(); 3].map(|()| slab.take(100, PAGE_BYTES).unwrap());
        assert_eq!((first.extent, third.extent), (second.extent, second.extent + 1));
        assert!(slab.free(first));
        let pin = slab.pin(second, false).unwrap();
        slab.retire(second.extent, true);
        let fourth = slab.take(100, PAGE_BYTES).unwrap();
        assert_eq!(fourth.extent, third.extent, "not in what retires");
        assert!(slab.take(100, PAGE_BYTES).is_none());
        assert!(slab.victim(2 * PAGE_BYTES).is_some_and(|(id, _)| id == third.extent));
        assert!(slab.free(second) && slab.take_retired().is_empty(), "a pin is on it");
        slab.unpin(second);
        assert_eq!(slab.take_retired().len(), 1);
        assert_eq!((slab.resident_bytes(), slab.extents().count()), (2 * PAGE_BYTES, 1));
        assert_eq!(pin.slot_bytes, PAGE_BYTES);
        // One that has no frames leaves at once; one that was not to go after all gives slots again.
        assert!(slab.free(fourth));
        slab.retire(third.extent, true);
        slab.retire(third.extent, false);
        assert_eq!(slab.take(100, PAGE_BYTES).unwrap().extent, third.extent);
        assert!(slab.add(Arc::new(Paper(PAGE_BYTES, AtomicU64::new(0)))).is_some());
        let [last] = [slab.extents().last().unwrap().0];
        slab.retire(last, true);
        assert_eq!(slab.take_retired().len(), 1);
    }
}
