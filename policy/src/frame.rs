//! Frames as the core sees them: numbers handed out by pools that the shell owns.

use std::fmt::Debug;

use kvtier_types::DeviceNumber;

/// A slot of host memory or of a device's: extent, 4 KiB page within it, and the generation it was handed out under.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FrameRef {
    /// Extent number.
    pub extent: u32,
    /// First page of the slot, in units of 4 KiB.
    pub page: u32,
    /// Generation of the slot when it was handed out; never zero.
    pub generation: u64,
}

/// What a pool says to a request for a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allocation {
    /// Here it is.
    Granted(FrameRef),
    /// More memory is being made ready: not now, but eviction is not called for either.
    Growing,
    /// Something must be evicted first.
    Full,
}

/// The source of frames of host memory, or of one device. No two pools hand out one generation. Calls do bookkeeping only; none waits or touches block bytes.
pub trait FramePool: Debug + Send {
    /// A frame of at least `bytes`.
    fn alloc(&mut self, bytes: u64) -> Allocation;
    /// Takes a frame back. It may be handed out again under another generation.
    fn free(&mut self, frame: FrameRef, bytes: u64);
    /// Frames of which sizes can replace each other: requests of one class compete for the same slots.
    fn class(&self, bytes: u64) -> u64;
    /// When `bytes` cannot be served by evicting its own class: the extents of other classes, at most so many, that hold the
    /// least, the emptiest first.
    fn victim_extents(&self, bytes: u64, most: usize) -> Vec<u32>;
    /// Most bytes it can ever hand out.
    fn capacity_bytes(&self) -> u64;
}

/// In-memory twin of a pool: counts frames of one capacity, all of one class a size.
#[derive(Debug)]
pub struct TwinPool {
    extent: u32,
    capacity_bytes: u64,
    used_bytes: u64,
    next_page: u32,
    generation: u64,
    free_pages: Vec<(u64, u32)>,
}

impl TwinPool {
    /// A pool of `capacity_bytes`.
    #[must_use]
    pub const fn new(capacity_bytes: u64) -> Self {
        Self { extent: 0, capacity_bytes, used_bytes: 0, next_page: 0, generation: 0, free_pages: Vec::new() }
    }

    /// A pool of `capacity_bytes` on a device.
    #[must_use]
    pub fn on_device(device: DeviceNumber, capacity_bytes: u64) -> Self {
        let extent = device.extent(0).unwrap_or_default();
        Self { extent, generation: u64::from(extent) << 32, ..Self::new(capacity_bytes) }
    }

    /// Bytes handed out.
    #[must_use]
    pub const fn used_bytes(&self) -> u64 {
        self.used_bytes
    }
}

impl FramePool for TwinPool {
    fn alloc(&mut self, bytes: u64) -> Allocation {
        if self.used_bytes + bytes > self.capacity_bytes {
            return Allocation::Full;
        }
        self.used_bytes += bytes;
        self.generation += 1;
        let reused = self.free_pages.iter().position(|(size, _)| *size == bytes);
        let page = reused.map_or_else(
            || {
                self.next_page += 1;
                self.next_page
            },
            |at| self.free_pages.swap_remove(at).1,
        );
        Allocation::Granted(FrameRef { extent: self.extent, page, generation: self.generation })
    }

    fn free(&mut self, frame: FrameRef, bytes: u64) {
        assert!(self.used_bytes >= bytes, "more freed than was allocated");
        assert!(!self.free_pages.contains(&(bytes, frame.page)), "a frame is freed once");
        self.used_bytes -= bytes;
        self.free_pages.push((bytes, frame.page));
    }

    fn class(&self, bytes: u64) -> u64 {
        bytes
    }

    fn victim_extents(&self, _bytes: u64, _most: usize) -> Vec<u32> {
        Vec::new()
    }

    fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }
}
