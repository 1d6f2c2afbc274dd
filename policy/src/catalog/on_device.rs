//! Copies in the memory of devices: beside the entries they are of, since few of many blocks have one.
//!
//! *Invariants*: an entry has the flag `ON_DEVICE` exactly while it has a row here; an extent's copies are found without
//! looking at the others. *Order*: of one device and size class, as the copies came, or were spared last.

use std::collections::{BTreeMap, BTreeSet};

use kvtier_types::DeviceNumber;
use rustc_hash::FxHashMap;

use super::{BlockId, Catalog};
use crate::entry::Flags;
use crate::frame::FrameRef;

/// One copy.
#[derive(Debug, Clone, Copy)]
struct Row {
    frame: FrameRef,
    class: u64,
    /// Its place in the order.
    turn: u64,
    /// The entry's last use when it came, or was spared last.
    touched: u64,
}

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct OnDevice {
    rows: FxHashMap<BlockId, Row>,
    order: BTreeMap<(DeviceNumber, u64, u64), BlockId>,
    extents: BTreeSet<(u32, BlockId)>,
    next_turn: u64,
}

/// The device that a frame lies on; `None` for one of host memory.
pub(crate) const fn device_of(frame: FrameRef) -> Option<DeviceNumber> {
    DeviceNumber::of_extent(frame.extent)
}

impl OnDevice {
    /// Bytes of their own memory, by capacity.
    pub(super) fn memory_bytes(&self) -> usize {
        self.rows.capacity() * (size_of::<(BlockId, Row)>() + 1) + self.rows.len() * 64
    }

    /// The copy of a device and class whose turn it is to go, with the entry's last use as known then.
    pub(crate) fn first(&self, device: DeviceNumber, class: u64) -> Option<(BlockId, u64)> {
        let (_, id) = self.order.range((device, class, 0)..=(device, class, u64::MAX)).next()?;
        Some((*id, self.rows[id].touched))
    }

    /// Spares a copy: it is the last of its class now.
    pub(crate) fn spare(&mut self, id: BlockId, touched: u64) {
        let turn = self.take_turn();
        let Some(row) = self.rows.get_mut(&id) else { return };
        let Some(device) = device_of(row.frame) else { return };
        self.order.remove(&(device, row.class, row.turn));
        (row.turn, row.touched) = (turn, touched);
        self.order.insert((device, row.class, turn), id);
    }

    /// The copies of an extent.
    pub(crate) fn in_extent(&self, extent: u32) -> impl Iterator<Item = BlockId> {
        self.in_extent_from(extent, BlockId::new(0))
    }

    /// Those of them from a block on, in the order of their numbers.
    pub(crate) fn in_extent_from(&self, extent: u32, from: BlockId) -> impl Iterator<Item = BlockId> {
        self.extents.range((extent, from)..=(extent, BlockId::new(u32::MAX))).map(|(_, id)| *id)
    }

    /// Copies of a device.
    pub(crate) fn of_device(&self, device: DeviceNumber) -> impl Iterator<Item = BlockId> {
        self.order.range((device, 0, 0)..=(device, u64::MAX, u64::MAX)).map(|(_, id)| *id)
    }

    const fn take_turn(&mut self) -> u64 {
        self.next_turn += 1;
        self.next_turn
    }

    fn insert(&mut self, id: BlockId, frame: FrameRef, (class, touched): (u64, u64)) {
        let device = device_of(frame).expect("frames of devices lie in extents of devices");
        let turn = self.take_turn();
        let former = self.rows.insert(id, Row { frame, class, turn, touched });
        assert!(former.is_none(), "an entry has one copy on all devices together");
        self.order.insert((device, class, turn), id);
        self.extents.insert((frame.extent, id));
    }

    fn remove(&mut self, id: BlockId) -> Option<FrameRef> {
        let row = self.rows.remove(&id)?;
        if let Some(device) = device_of(row.frame) {
            self.order.remove(&(device, row.class, row.turn));
        }
        self.extents.remove(&(row.frame.extent, id));
        Some(row.frame)
    }
}

impl Catalog {
    /// The frame of an entry's copy on a device.
    pub(crate) fn device_frame(&self, id: BlockId) -> Option<FrameRef> {
        // Most entries have none: their flags are at hand.
        if !self.get(id).flags.has(Flags::ON_DEVICE) {
            return None;
        }
        self.on_device.rows.get(&id).map(|row| row.frame)
    }

    /// A copy came onto a device; a movement there ended with that. Returns whether the entry remains.
    pub(crate) fn came_onto_device(&mut self, id: BlockId, frame: FrameRef, class: u64) -> bool {
        let touched = self.get(id).touched;
        self.on_device.insert(id, frame, (class, touched));
        self.update(id, |e| {
            e.flags.set(Flags::TO_DEVICE, false);
            e.flags.set(Flags::ON_DEVICE, true);
        })
    }

    /// Takes an entry's copy off its device: the frame to give back, and whether the entry remains.
    pub(crate) fn left_device(&mut self, id: BlockId) -> Option<(FrameRef, bool)> {
        let frame = self.on_device.remove(id)?;
        let remains = self.update(id, |e| e.flags.set(Flags::ON_DEVICE, false));
        Some((frame, remains))
    }
}
