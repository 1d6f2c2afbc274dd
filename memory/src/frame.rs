//! Frames: slots of extents, granted to hold one block each. Bytes of the host tier live here and nowhere else.
//!
//! *Invariants*: a frame's generation is larger than all before it in its arena; it is published in the extent's table when
//! the frame is granted and cleared before the slot can be granted again; a pinned slot is not granted again.
//!
//! *Bounds*: extents never exceed `capacity_bytes` together.
//!
//! *Lock order*: one mutex, a leaf; creating, prefaulting and unmapping extents happen outside of it.

mod pin;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;

pub use pin::FramePin;

use crate::slab::{Slab, slot_bytes};
use crate::{Extent, MemoryError, PAGE_BYTES, PageKind};

/// Numbers that extents of host memory may have: those with the upper bit are devices' ([`kvtier_types::DeviceNumber`]).
const MAX_EXTENTS: u32 = 1 << 31;

/// Name of a granted frame. A copy is not a guard: the frame may be gone, and then no operation takes the name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrameId {
    /// Extent it lies in; ids are not used twice in one arena.
    pub extent: u32,
    /// Byte offset in the extent, a multiple of 4096.
    pub offset: u64,
    /// Bytes asked for; the slot is that rounded up to 4096.
    pub bytes: u64,
    /// Distinguishes it from every other frame of the arena, before and after; never 0.
    pub generation: u64,
}

/// What an arena is made of.
#[derive(Clone, Copy, Debug)]
pub struct ArenaConfig {
    /// Most bytes of extents.
    pub capacity_bytes: u64,
    /// Bytes of one extent, and so of the largest block; the last extent has what remains.
    pub extent_bytes: u64,
    /// The best pages to try for.
    pub page_kind: PageKind,
    /// Generation of the first frame: random in its upper half, so that frames of a former daemon match none of this one.
    pub first_generation: u64,
}

/// Answer to [`Arena::alloc`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alloc {
    /// Here is the frame.
    Granted(FrameId),
    /// Not now: memory is left, and [`Arena::grow`] will have it ready.
    Growing,
    /// Not before frames are freed (see [`Arena::victim_extent`] for where that helps).
    Full,
    /// Never: no extent can hold so large a block.
    TooLarge {
        /// Bytes of the largest block that this arena can hold.
        limit_bytes: u64,
    },
}

impl Alloc {
    /// The frame, if there is one.
    #[must_use]
    pub fn granted(self) -> Option<FrameId> {
        match self {
            Self::Granted(frame) => Some(frame),
            Self::Growing | Self::Full | Self::TooLarge { .. } => None,
        }
    }
}

/// What an arena holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ArenaStats {
    /// Most bytes of extents.
    pub capacity_bytes: u64,
    /// Bytes of the extents there are.
    pub resident_bytes: u64,
    /// Bytes of taken slots.
    pub used_bytes: u64,
    /// Granted frames.
    pub frames: u64,
    /// Slots that are pinned, freed ones included.
    pub pinned_frames: u64,
    /// Extents there are.
    pub extents: u64,
    /// Extents that serve no class.
    pub empty_extents: u64,
    /// Bytes of extents by the pages they got.
    pub bytes_by_page_kind: BTreeMap<PageKind, u64>,
    /// Classes by slot length in bytes.
    pub classes: BTreeMap<u64, ClassStats>,
}

/// What one size class holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClassStats {
    /// Extents that serve it.
    pub extents: u64,
    /// Slots of those extents.
    pub slots: u64,
    /// Slots that are taken.
    pub taken: u64,
}

/// The daemon's frames. Clones share one arena.
#[derive(Clone, Debug)]
pub struct Arena {
    shared: Arc<Shared>,
}

struct Shared {
    config: ArenaConfig,
    state: Mutex<State>,
}

impl fmt::Debug for Shared {
    /// Without the frames, of which there are many.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("config", &self.config).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct State {
    slab: Slab<Extent>,
    /// Bytes of the extent that is being created outside the lock.
    growing_bytes: u64,
    /// Longest slot that an extent is wanted for, never longer than the next extent; 0 if none is.
    wanted_slot: u64,
    /// The last growth failed: until one succeeds, remaining capacity is not promised to anybody.
    stuck: bool,
}

impl Arena {
    /// An arena without extents: call [`Arena::grow`] while [`Arena::needs_growth`].
    ///
    /// # Errors
    /// [`MemoryError::BadSize`] if the sizes are no positive multiples of 4096 or an extent exceeds the capacity.
    pub fn new(config: ArenaConfig) -> Result<Self, MemoryError> {
        for (what, bytes) in [("capacity_bytes", config.capacity_bytes), ("extent_bytes", config.extent_bytes)] {
            if bytes == 0 || !bytes.is_multiple_of(PAGE_BYTES) {
                return Err(MemoryError::BadSize { what, bytes, rule: "must be a positive multiple of 4096" });
            }
        }
        if config.extent_bytes > config.capacity_bytes {
            let rule = "must not exceed capacity_bytes";
            return Err(MemoryError::BadSize { what: "extent_bytes", bytes: config.extent_bytes, rule });
        }
        let slab = Slab::new(config.first_generation, 0..MAX_EXTENTS);
        let state = State { slab, growing_bytes: 0, wanted_slot: PAGE_BYTES, stuck: false };
        Ok(Self { shared: Arc::new(Shared { config, state: Mutex::new(state) }) })
    }

    /// Grants a frame for a block of `bytes`. Never waits for memory; the frame's bytes are arbitrary.
    #[must_use]
    pub fn alloc(&self, bytes: u64) -> Alloc {
        let config = &self.shared.config;
        let slot_bytes = match slot_bytes(bytes) {
            Some(slot_bytes) if slot_bytes <= config.extent_bytes => slot_bytes,
            _ => return Alloc::TooLarge { limit_bytes: config.extent_bytes },
        };
        let mut state = self.shared.state.lock();
        let granted = state.slab.take(bytes, slot_bytes);
        // An extent ahead, so that few callers ever see `Growing`.
        let short = !state.slab.has_headroom(slot_bytes) && !state.slab.has_empty(slot_bytes);
        if short && state.next_extent_bytes(config) >= slot_bytes {
            state.wanted_slot = state.wanted_slot.max(slot_bytes);
        }
        match granted {
            Some(frame) => Alloc::Granted(frame),
            None if !state.stuck && state.may_grow(config, slot_bytes) => Alloc::Growing,
            None => Alloc::Full,
        }
    }

    /// Gives a frame up: its generation is revoked now, its slot granted again after its last pin. False if there is no
    /// such frame (any more).
    pub fn free(&self, frame: FrameId) -> bool {
        self.shared.state.lock().slab.free(frame)
    }

    /// Guards a frame's memory; `None` if there is no such frame (any more).
    #[must_use]
    pub fn pin(&self, frame: FrameId) -> Option<FramePin> {
        let pinned = self.shared.state.lock().slab.pin(frame, false)?;
        Some(FramePin::new(Arc::clone(&self.shared), pinned, frame))
    }

    /// Whether the frame is still granted.
    #[must_use]
    pub fn contains(&self, frame: FrameId) -> bool {
        self.shared.state.lock().slab.contains(frame)
    }

    /// The extent with this id.
    #[must_use]
    pub fn extent(&self, id: u32) -> Option<Arc<Extent>> {
        self.shared.state.lock().slab.extent(id).cloned()
    }

    /// The extents with their numbers, oldest first.
    #[must_use]
    pub fn extents(&self) -> Vec<(u32, Arc<Extent>)> {
        let state = self.shared.state.lock();
        state.slab.extents().map(|(id, carved)| (id, Arc::clone(&carved.extent))).collect()
    }

    /// Whether [`Arena::grow`] has something to do.
    #[must_use]
    pub fn needs_growth(&self) -> bool {
        self.shared.state.lock().growth(&self.shared.config).is_some()
    }

    /// Creates and prefaults one extent, if one is wanted; takes about a second per GiB. For a background thread. Returns
    /// whether the arena grew.
    ///
    /// # Errors
    /// [`MemoryError::System`] if memory or descriptors ran out: the arena then answers `Full` instead of `Growing`
    /// until a later call succeeds; the caller decides when to try again.
    pub fn grow(&self) -> Result<bool, MemoryError> {
        let config = &self.shared.config;
        let bytes = {
            let mut state = self.shared.state.lock();
            let Some(bytes) = state.growth(config) else { return Ok(false) };
            state.growing_bytes = bytes;
            bytes
        };
        let created = Extent::create(bytes, config.page_kind);
        let mut state = self.shared.state.lock();
        state.growing_bytes = 0;
        state.stuck = created.is_err();
        let extent = Arc::new(created?);
        let added = state.slab.add(extent).is_some();
        state.stuck = !added;
        if state.slab.has_empty(state.wanted_slot) {
            state.wanted_slot = 0;
        }
        Ok(added)
    }

    /// Gives the memory of extents without frames back; returns how many bytes.
    pub fn shrink(&self) -> u64 {
        let drained = self.shared.state.lock().slab.drain_empty();
        // Dropped here, outside the lock: unmapping takes milliseconds.
        drained.iter().map(|extent| extent.len()).sum()
    }

    /// For a block size that found no room: the extent whose frames are cheapest to evict in bytes among those that serve
    /// other sizes and could serve this one, with its granted frames. Once all are freed, and their pins gone, the extent
    /// serves this size. An empty list means that only pins are awaited.
    #[must_use]
    pub fn victim_extent(&self, bytes: u64) -> Option<(u32, Vec<FrameId>)> {
        self.shared.state.lock().slab.victim(slot_bytes(bytes)?)
    }

    /// The extents that [`Self::victim_extent`] chooses from, at most so many, the emptiest first.
    #[must_use]
    pub fn victim_extents(&self, bytes: u64, most: usize) -> Vec<u32> {
        slot_bytes(bytes).map(|bytes| self.shared.state.lock().slab.victims(bytes, most)).unwrap_or_default()
    }

    /// What it holds now.
    #[must_use]
    pub fn stats(&self) -> ArenaStats {
        let state = self.shared.state.lock();
        let mut stats = ArenaStats {
            capacity_bytes: self.shared.config.capacity_bytes,
            resident_bytes: state.slab.resident_bytes,
            extents: state.slab.extents.len() as u64,
            empty_extents: state.slab.empty_count() as u64,
            ..ArenaStats::default()
        };
        for carved in state.slab.extents.values() {
            *stats.bytes_by_page_kind.entry(carved.extent.page_kind()).or_default() += carved.extent.len();
            if carved.slot_bytes == 0 {
                continue;
            }
            stats.used_bytes += carved.taken_bytes();
            stats.frames += carved.live;
            stats.pinned_frames += carved.pinned;
            let class = stats.classes.entry(carved.slot_bytes).or_default();
            class.extents += 1;
            class.slots += carved.extent.len() / carved.slot_bytes;
            class.taken += carved.taken.len() as u64;
        }
        stats
    }
}

impl State {
    /// Bytes of the next extent; 0 once the capacity is spent.
    fn next_extent_bytes(&self, config: &ArenaConfig) -> u64 {
        let spent = self.slab.resident_bytes + self.growing_bytes;
        config.capacity_bytes.saturating_sub(spent).min(config.extent_bytes)
    }

    /// Whether growth, under way or still to come, can serve slots of this length.
    fn may_grow(&self, config: &ArenaConfig, slot_bytes: u64) -> bool {
        self.growing_bytes >= slot_bytes || self.next_extent_bytes(config) >= slot_bytes
    }

    /// Bytes of the extent to create now, if one is wanted.
    fn growth(&self, config: &ArenaConfig) -> Option<u64> {
        let wanted = self.wanted_slot;
        let bytes = self.next_extent_bytes(config);
        let useful = wanted > 0 && bytes >= wanted && !self.slab.has_empty(wanted);
        (useful && self.growing_bytes == 0).then_some(bytes)
    }
}

#[cfg(test)]
mod tests;
