//! Which slots of which extents are taken: the bookkeeping of [`super::Arena`], under its mutex.
//!
//! Each extent serves one size class (slot length) at a time and returns to the pool when no slot of it is taken.
//!
//! *Invariants*: slots of an extent never overlap; an extent is in `empty`, or belongs to one class and is in that class's
//! `open` set exactly while it has a slot to give; a doomed (freed, still pinned) slot counts as taken.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::FrameId;
use crate::{Extent, NO_GENERATION, PAGE_BYTES};

/// A taken slot.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    pub(super) frame: FrameId,
    pub(super) pins: u32,
    /// Freed while pinned: goes when the last pin does.
    pub(super) doomed: bool,
}

/// What a pin needs to know.
#[derive(Debug)]
pub(super) struct Pinned {
    pub(super) extent: Arc<Extent>,
    pub(super) slot_bytes: u64,
}

/// An extent and how it is cut.
#[derive(Debug)]
pub(super) struct Carved {
    pub(super) extent: Arc<Extent>,
    /// Length of a slot; 0 while the extent is empty.
    pub(super) slot_bytes: u64,
    /// Offset of the first slot that was never taken since the extent was cut.
    fresh: u64,
    /// Offsets given back.
    free: Vec<u64>,
    /// Taken slots by offset.
    pub(super) taken: BTreeMap<u64, Slot>,
    /// Taken slots that are not doomed.
    pub(super) live: u64,
    /// Taken slots that are pinned.
    pub(super) pinned: u64,
}

impl Carved {
    fn next_slot(&mut self) -> Option<u64> {
        if let Some(offset) = self.free.pop() {
            return Some(offset);
        }
        let offset = self.fresh;
        if offset + self.slot_bytes > self.extent.len() {
            return None;
        }
        self.fresh += self.slot_bytes;
        Some(offset)
    }

    fn has_room(&self) -> bool {
        !self.free.is_empty() || self.fresh + self.slot_bytes <= self.extent.len()
    }

    pub(super) fn taken_bytes(&self) -> u64 {
        self.taken.len() as u64 * self.slot_bytes
    }
}

#[derive(Debug)]
pub(super) struct Slab {
    pub(super) extents: BTreeMap<u32, Carved>,
    /// Per slot length, the extents of that class with a slot to give.
    open: BTreeMap<u64, BTreeSet<u32>>,
    /// Extents of no class, shortest first.
    empty: BTreeSet<(u64, u32)>,
    next_generation: u64,
    next_extent: u32,
    /// Sum of the extents' lengths.
    pub(super) resident_bytes: u64,
}

/// The slot length that serves blocks of `bytes`.
pub(super) fn slot_bytes(bytes: u64) -> Option<u64> {
    bytes.max(1).checked_next_multiple_of(PAGE_BYTES)
}

impl Slab {
    pub(super) fn new(first_generation: u64) -> Self {
        Self {
            extents: BTreeMap::new(),
            open: BTreeMap::new(),
            empty: BTreeSet::new(),
            next_generation: first_generation.max(1),
            next_extent: 0,
            resident_bytes: 0,
        }
    }

    /// Adds an empty extent; `None` once ids ran out (they are never used twice, since engines cache mappings by them).
    pub(super) fn add(&mut self, extent: Arc<Extent>) -> Option<u32> {
        let id = self.next_extent;
        self.next_extent = id.checked_add(1)?;
        self.resident_bytes += extent.len();
        self.empty.insert((extent.len(), id));
        let carved =
            Carved { extent, slot_bytes: 0, fresh: 0, free: Vec::new(), taken: BTreeMap::new(), live: 0, pinned: 0 };
        self.extents.insert(id, carved);
        Some(id)
    }

    /// Whether an extent of no class could serve slots of this length.
    pub(super) fn has_empty(&self, slot_bytes: u64) -> bool {
        self.empty.last().is_some_and(|&(len, _)| len >= slot_bytes)
    }

    pub(super) fn empty_count(&self) -> usize {
        self.empty.len()
    }

    /// Takes all extents of no class out.
    pub(super) fn drain_empty(&mut self) -> Vec<Arc<Extent>> {
        let drained: Vec<_> =
            std::mem::take(&mut self.empty).into_iter().filter_map(|(_, id)| self.extents.remove(&id)).collect();
        self.resident_bytes -= drained.iter().map(|carved| carved.extent.len()).sum::<u64>();
        drained.into_iter().map(|carved| carved.extent).collect()
    }

    /// Takes a slot for `bytes`, in the class's oldest extent with room, so that younger ones empty out; else cuts an
    /// empty extent, the shortest that fits. Publishes the frame's generation.
    pub(super) fn take(&mut self, bytes: u64, slot_bytes: u64) -> Option<FrameId> {
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
        carved.extent.set_generation(offset, frame.generation);
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
    pub(super) fn has_headroom(&self, slot_bytes: u64) -> bool {
        let Some(open) = self.open.get(&slot_bytes) else { return false };
        let half_free = |id| {
            let carved = self.extents.get(id);
            carved.is_some_and(|carved| carved.taken_bytes() <= carved.extent.len() / 2)
        };
        open.len() > 1 || open.first().is_some_and(half_free)
    }

    /// The extent of a frame, if its slot is taken and still the frame's.
    fn of(&mut self, frame: FrameId) -> Option<&mut Carved> {
        let carved = self.extents.get_mut(&frame.extent)?;
        carved.taken.get(&frame.offset).is_some_and(|slot| slot.frame == frame).then_some(carved)
    }

    /// Revokes a frame's generation and gives its slot back, or leaves that to the last unpin. False if it is not granted.
    pub(super) fn free(&mut self, frame: FrameId) -> bool {
        let Some(carved) = self.of(frame) else { return false };
        let Some(slot) = carved.taken.get_mut(&frame.offset).filter(|slot| !slot.doomed) else { return false };
        slot.doomed = true;
        let pinned = slot.pins > 0;
        carved.live -= 1;
        carved.extent.set_generation(frame.offset, NO_GENERATION);
        if !pinned {
            self.give_back(frame);
        }
        true
    }

    /// Adds a pin; `doomed_too` also to a frame freed meanwhile, for whoever holds a pin already.
    pub(super) fn pin(&mut self, frame: FrameId, doomed_too: bool) -> Option<Pinned> {
        let carved = self.of(frame)?;
        let slot = carved.taken.get_mut(&frame.offset).filter(|slot| doomed_too || !slot.doomed)?;
        slot.pins = slot.pins.checked_add(1)?;
        carved.pinned += u64::from(slot.pins == 1);
        Some(Pinned { extent: Arc::clone(&carved.extent), slot_bytes: carved.slot_bytes })
    }

    pub(super) fn unpin(&mut self, frame: FrameId) {
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
            let len = carved.extent.len();
            self.close(slot_bytes, frame.extent);
            self.empty.insert((len, frame.extent));
        } else {
            self.open.entry(slot_bytes).or_default().insert(frame.extent);
        }
    }

    /// The extent of another class that could serve slots of this length and has the fewest taken bytes.
    pub(super) fn victim(&self, slot_bytes: u64) -> Option<(u32, Vec<FrameId>)> {
        let other = |carved: &Carved| {
            carved.slot_bytes != 0 && carved.slot_bytes != slot_bytes && carved.extent.len() >= slot_bytes
        };
        let candidates = self.extents.iter().filter(|(_, carved)| other(carved));
        let (&id, carved) = candidates.min_by_key(|(id, carved)| (carved.taken_bytes(), **id))?;
        let live = carved.taken.values().filter(|slot| !slot.doomed).map(|slot| slot.frame).collect();
        Some((id, live))
    }
}
