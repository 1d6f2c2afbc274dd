//! One device's pool: extents of its memory cut into frames, which the daemon fills and engines import to read.
//!
//! *Invariants*: a frame's generation is published once its bytes were verified, not when it is granted; it is revoked before
//! the slot can be granted again; a slot is not granted again while a copy holds it. Numbers of extents are not used twice.
//!
//! *Bounds*: extents never exceed the configured memory together; one is made ready at a time.
//!
//! *Lock order*: one mutex, a leaf; taking and giving back device memory happens outside of it.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvtier_device::{Device, DeviceError, PoolFrame, PoolMemory, Span};
use kvtier_memory::fdpass::Grant;
use kvtier_memory::slab::{Slab, Slots, slot_bytes};
use kvtier_memory::{ExtentFds, FrameId, GenerationTable, MemoryError, NO_GENERATION, PAGE_BYTES};
use kvtier_policy::{Allocation, FramePool, FrameRef};
use kvtier_types::{DeviceNumber, MAX_DEVICE_EXTENTS};
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::pool::frame_id;

/// An extent of device memory with its table.
#[derive(Debug)]
pub(crate) struct PoolExtent {
    memory: Arc<dyn PoolMemory>,
    table: GenerationTable,
    bytes: u64,
}

impl Drop for PoolExtent {
    /// Whoever imported it is told to let go: until then its memory is nobody's.
    fn drop(&mut self) {
        self.table.retire();
    }
}

impl Slots for PoolExtent {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Its bytes are yet to come: [`Pool::publish`].
    fn granted(&self, _offset: u64, _generation: u64) {}

    fn revoked(&self, offset: u64) {
        self.table.set(offset, NO_GENERATION);
    }
}

/// Why an extent was not made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoExtent {
    /// No device memory.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// No memory for its table.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// As many as there can be were made since the start.
    #[error("numbers of extents ran out: restart the daemon")]
    Numbers,
}

#[derive(Debug)]
struct State {
    slab: Slab<PoolExtent>,
    /// An extent is wanted for slots of so many bytes; 0 if none is.
    wanted: u64,
    /// Whether the device has memory to spare for one.
    may_grow: bool,
}

/// The pool. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Pool(Arc<Shared>);

struct Shared {
    capacity_bytes: u64,
    extent_bytes: u64,
    state: Mutex<State>,
    wanted: Notify,
    closed: AtomicBool,
}

impl fmt::Debug for Shared {
    /// Without the frames, of which there are many.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("capacity_bytes", &self.capacity_bytes).finish_non_exhaustive()
    }
}

/// What a pool holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct PoolStats {
    /// Most bytes of extents.
    pub(crate) capacity_bytes: u64,
    /// Bytes of the extents there are.
    pub(crate) resident_bytes: u64,
    /// Bytes of taken slots.
    pub(crate) used_bytes: u64,
}

impl Pool {
    /// A pool without extents, for at most `capacity_bytes` in extents of `extent_bytes`.
    pub(crate) fn new(device: DeviceNumber, first_generation: u64, (capacity_bytes, extent_bytes): (u64, u64)) -> Self {
        let first = device.extent(0).expect("the first of many");
        let slab = Slab::new(first_generation, first..first + (MAX_DEVICE_EXTENTS - 1));
        let state = Mutex::new(State { slab, wanted: 0, may_grow: false });
        let (wanted, closed) = (Notify::new(), AtomicBool::new(false));
        Self(Arc::new(Shared { capacity_bytes, extent_bytes, state, wanted, closed }))
    }

    /// Bytes of an extent.
    pub(crate) fn extent_bytes(&self) -> u64 {
        self.0.extent_bytes
    }

    /// Waits until a frame was asked for that needs another extent.
    pub(crate) async fn wanted(&self) {
        self.0.wanted.notified().await;
    }

    /// Whether an extent is wanted.
    pub(crate) fn wants_extent(&self) -> bool {
        let state = self.0.state.lock();
        state.wanted > 0 && state.may_grow && self.has_budget(&state)
    }

    fn has_budget(&self, state: &State) -> bool {
        state.slab.resident_bytes() + self.0.extent_bytes <= self.0.capacity_bytes
            && !self.0.closed.load(Ordering::Relaxed)
    }

    /// Says whether the device has memory to spare for another extent.
    pub(crate) fn set_may_grow(&self, may_grow: bool) {
        self.0.state.lock().may_grow = may_grow;
    }

    /// Takes memory for another extent.
    ///
    /// # Errors
    /// [`NoExtent`].
    pub(crate) fn grow(&self, device: &dyn Device) -> Result<(), NoExtent> {
        let memory = device.allocate(self.0.extent_bytes)?;
        let bytes = self.0.extent_bytes;
        let extent = Arc::new(PoolExtent { memory, table: GenerationTable::create(bytes)?, bytes });
        let mut state = self.0.state.lock();
        state.wanted = 0;
        state.slab.add(extent).map(|_| ()).ok_or(NoExtent::Numbers)
    }

    /// The numbers of extents, those with the fewest taken bytes first.
    pub(crate) fn emptiest(&self) -> Vec<u32> {
        let state = self.0.state.lock();
        let mut all: Vec<(u64, u32)> = state.slab.extents().map(|(id, carved)| (carved.taken_bytes(), id)).collect();
        all.sort_unstable();
        all.into_iter().map(|(_, id)| id).collect()
    }

    /// Gives no more frames of an extent, which leaves once none is taken; or gives them again.
    pub(crate) fn retire(&self, extent: u32, retires: bool) {
        self.0.state.lock().slab.retire(extent, retires);
    }

    /// Gives frames again of all extents that did not leave.
    pub(crate) fn reinstate(&self) {
        let mut state = self.0.state.lock();
        let retiring: Vec<u32> =
            state.slab.extents().filter(|(_, carved)| carved.retires()).map(|(id, _)| id).collect();
        retiring.into_iter().for_each(|id| state.slab.retire(id, false));
    }

    /// Gives back the memory of extents that left; answers how many. Takes a while.
    pub(crate) fn give_back(&self) -> usize {
        let left = self.0.state.lock().slab.take_retired();
        left.len()
    }

    /// Ends the pool: no more frames, and extents leave once none is taken.
    pub(crate) fn close(&self) {
        self.0.closed.store(true, Ordering::Relaxed);
        let mut state = self.0.state.lock();
        let all: Vec<u32> = state.slab.extents().map(|(id, _)| id).collect();
        all.into_iter().for_each(|id| state.slab.retire(id, true));
    }

    /// A granted frame, kept in place until what comes back is dropped; `None` if there is no such frame (any more).
    pub(crate) fn pin(&self, frame: FrameRef, bytes: u64) -> Option<PoolFrame> {
        let frame = frame_id(frame, bytes);
        let pinned = self.0.state.lock().slab.pin(frame, false)?;
        let memory = Arc::new(Pinned { pool: self.clone(), extent: pinned.extent, frame });
        PoolFrame::new(memory, frame.offset, bytes).ok()
    }

    /// From now on engines may take what lies in a frame for its bytes, if it is still granted.
    pub(crate) fn publish(&self, frame: FrameRef, bytes: u64) {
        let frame = frame_id(frame, bytes);
        let state = self.0.state.lock();
        if let Some(extent) = state.slab.extent(frame.extent).filter(|_| state.slab.contains(frame)) {
            extent.table.set(frame.offset, frame.generation);
        }
    }

    /// Leave to import an extent; `None` when there is none of that number.
    ///
    /// # Errors
    /// [`NoExtent`] when it cannot be exported.
    pub(crate) fn grant(&self, extent: u32) -> Result<Option<Grant>, NoExtent> {
        let Some(extent) = self.0.state.lock().slab.extent(extent).cloned() else { return Ok(None) };
        let fds = ExtentFds { extent: extent.memory.export()?, generations: extent.table.descriptor()? };
        Ok(Some(Grant::Device { fds, bytes: extent.bytes }))
    }

    /// What it holds now.
    pub(crate) fn stats(&self) -> PoolStats {
        let state = self.0.state.lock();
        PoolStats {
            capacity_bytes: self.0.capacity_bytes,
            resident_bytes: state.slab.resident_bytes(),
            used_bytes: state.slab.extents().map(|(_, carved)| carved.taken_bytes()).sum(),
        }
    }
}

impl FramePool for Pool {
    fn alloc(&mut self, bytes: u64) -> Allocation {
        let Some(slot) = slot_bytes(bytes).filter(|slot| *slot <= self.0.extent_bytes) else { return Allocation::Full };
        let mut state = self.0.state.lock();
        if self.0.closed.load(Ordering::Relaxed) {
            return Allocation::Full;
        }
        if let Some(frame) = state.slab.take(bytes, slot) {
            let page = u32::try_from(frame.offset / PAGE_BYTES).expect("an extent has fewer than 2^32 pages");
            return Allocation::Granted(FrameRef { extent: frame.extent, page, generation: frame.generation });
        }
        if !state.may_grow || !self.has_budget(&state) {
            return Allocation::Full;
        }
        state.wanted = state.wanted.max(slot);
        self.0.wanted.notify_one();
        Allocation::Growing
    }

    fn free(&mut self, frame: FrameRef, bytes: u64) {
        let known = self.0.state.lock().slab.free(frame_id(frame, bytes));
        assert!(known, "the core frees only frames it was granted");
    }

    fn class(&self, bytes: u64) -> u64 {
        crate::pool::slot_bytes(bytes)
    }

    fn victim_extents(&self, bytes: u64, most: usize) -> Vec<u32> {
        slot_bytes(bytes).map(|bytes| self.0.state.lock().slab.victims(bytes, most)).unwrap_or_default()
    }

    fn capacity_bytes(&self) -> u64 {
        self.0.capacity_bytes
    }
}

/// The memory of a frame that a copy holds.
#[derive(Debug)]
struct Pinned {
    pool: Pool,
    extent: Arc<PoolExtent>,
    frame: FrameId,
}

impl PoolMemory for Pinned {
    fn span(&self) -> Span {
        self.extent.memory.span()
    }

    fn export(&self) -> Result<OwnedFd, DeviceError> {
        self.extent.memory.export()
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.pool.0.state.lock().slab.unpin(self.frame);
    }
}

#[cfg(test)]
mod tests {
    use kvtier_device::twin::{TwinConfig, TwinDevice};

    use super::*;

    const EXTENT: u64 = 2 << 20;
    const BLOCK: u64 = 1 << 20;

    fn pool() -> (TwinDevice, Pool) {
        let device = TwinDevice::new(TwinConfig::default()).unwrap();
        let pool = Pool::new(DeviceNumber::new(2).unwrap(), 100, (2 * EXTENT, EXTENT));
        (device, pool)
    }

    #[test]
    fn it_grows_to_its_budget_where_the_device_has_memory_to_spare() {
        let (device, mut pool) = pool();
        assert_eq!(pool.alloc(BLOCK), Allocation::Full, "nobody looked yet");
        pool.set_may_grow(true);
        assert_eq!(pool.alloc(BLOCK), Allocation::Growing);
        assert!(pool.wants_extent());
        pool.grow(&device).unwrap();
        assert!(!pool.wants_extent());
        let Allocation::Granted(frame) = pool.alloc(BLOCK) else { panic!() };
        assert_eq!((DeviceNumber::of_extent(frame.extent), frame.generation), (DeviceNumber::new(2), 100));
        assert!(matches!(pool.alloc(BLOCK), Allocation::Granted(_)));
        assert_eq!(pool.alloc(BLOCK), Allocation::Growing);
        pool.grow(&device).unwrap();
        assert!(matches!(pool.alloc(BLOCK), Allocation::Granted(_)));
        assert!(matches!(pool.alloc(BLOCK), Allocation::Granted(_)));
        assert_eq!(pool.alloc(BLOCK), Allocation::Full, "the budget is spent");
        assert_eq!(pool.alloc(EXTENT + 1), Allocation::Full);
        assert_eq!(
            pool.stats(),
            PoolStats { capacity_bytes: 2 * EXTENT, resident_bytes: 2 * EXTENT, used_bytes: 4 * BLOCK }
        );
    }

    #[test]
    fn generations_are_published_when_told_and_revoked_with_the_frame() {
        let (device, mut pool) = pool();
        pool.set_may_grow(true);
        pool.grow(&device).unwrap();
        let Allocation::Granted(frame) = pool.alloc(BLOCK) else { panic!() };
        let generation = |pool: &Pool| {
            let state = pool.0.state.lock();
            state.slab.extent(frame.extent).unwrap().table.generation(u64::from(frame.page) * PAGE_BYTES)
        };
        assert_eq!(generation(&pool), NO_GENERATION);
        pool.publish(frame, BLOCK);
        assert_eq!(generation(&pool), frame.generation);
        pool.free(frame, BLOCK);
        assert_eq!(generation(&pool), NO_GENERATION);
        pool.publish(frame, BLOCK);
        assert_eq!(generation(&pool), NO_GENERATION, "a late word counts no more");
        assert!(pool.pin(frame, BLOCK).is_none());
    }

    #[test]
    fn memory_goes_back_to_the_device_once_nothing_is_copied_into_it() {
        let (device, mut pool) = pool();
        let before = device.free_bytes().unwrap();
        pool.set_may_grow(true);
        pool.grow(&device).unwrap();
        let Allocation::Granted(frame) = pool.alloc(BLOCK) else { panic!() };
        let pin = pool.pin(frame, BLOCK).unwrap();
        assert!(matches!(pool.grant(frame.extent), Ok(Some(Grant::Device { bytes: EXTENT, .. }))));
        pool.free(frame, BLOCK);
        pool.retire(pool.emptiest()[0], true);
        assert_eq!(pool.give_back(), 0);
        drop(pin);
        assert_eq!(pool.give_back(), 1);
        assert_eq!(device.free_bytes().unwrap(), before);
        assert!(matches!(pool.grant(frame.extent), Ok(None)));
        pool.grow(&device).unwrap();
        pool.close();
        assert_eq!((pool.alloc(BLOCK), pool.give_back()), (Allocation::Full, 1));
    }
}
