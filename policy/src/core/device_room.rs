//! Room on devices: which copies make way, and how a pool is emptied when its memory is wanted or its device is lost.
//!
//! *Bounds*: a call looks at [`SCAN`] copies for a victim, and drops at most [`MAX_TOUCHES_PER_CALL`].

use kvtier_types::{DeviceNumber, Tier};

use super::Core;
use crate::catalog::BlockId;
use crate::entry::{Entry, Flags};
use crate::evict::Standing;
use crate::limits::MAX_TOUCHES_PER_CALL;

/// Copies examined for one that may go: each is spared at most once between two of its uses, so that later calls find one
/// where this one did not.
const SCAN: usize = 64;

/// Where a walk over an extent's copies goes on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ExtentWalk(u32);

impl Core {
    /// Evicts one copy of a size class: in the order in which they came, those used since are spared once. Answers whether
    /// one went.
    pub(super) fn evict_from_class(&mut self, device: DeviceNumber, class: u64) -> bool {
        for _ in 0..SCAN {
            let Some((id, touched)) = self.catalog.on_device.first(device, class) else { return false };
            let entry = self.catalog.get(id);
            let used = entry.touched > touched && entry.standing != Standing::First;
            if used || !may_leave_device(entry) || entry.flags.has(Flags::CLAIMED) {
                let touched = entry.touched;
                self.catalog.on_device.spare(id, touched);
                continue;
            }
            self.evict_copy(id, Tier::Device);
            return true;
        }
        false
    }

    /// Evicts everything in the extent of another class that holds least, if all of it may go.
    pub(super) fn empty_device_extent(&mut self, device: DeviceNumber, bytes: u64) -> bool {
        let victims = self.devices.pool(device).map(|pool| pool.frames.victim_extents(bytes, 1));
        let Some(extent) = victims.and_then(|victims| victims.first().copied()) else { return false };
        let inside: Vec<BlockId> = self.catalog.on_device.in_extent(extent).take(MAX_TOUCHES_PER_CALL + 1).collect();
        let may_go = |id: &BlockId| may_leave_device(self.catalog.get(*id));
        if inside.is_empty() || inside.len() > MAX_TOUCHES_PER_CALL || !inside.iter().all(may_go) {
            return false;
        }
        self.evict_all(inside);
        true
    }

    /// Evicts what may go from an extent whose memory is wanted, looking at [`MAX_TOUCHES_PER_CALL`] copies from `walk` on;
    /// with `claimed` also what claims keep there, which comes back once there is room. Answers where to go on, `None` at
    /// the end.
    pub fn vacate_extent(&mut self, extent: u32, claimed: bool, walk: ExtentWalk) -> Option<ExtentWalk> {
        let seen: Vec<BlockId> =
            self.catalog.on_device.in_extent_from(extent, BlockId::new(walk.0)).take(MAX_TOUCHES_PER_CALL).collect();
        let next = seen
            .last()
            .map(|last| ExtentWalk(last.index().saturating_add(1)))
            .filter(|_| seen.len() == MAX_TOUCHES_PER_CALL);
        let may_go = |id: &BlockId| {
            let entry = self.catalog.get(*id);
            !entry.in_use() && (claimed || !entry.keeps(Tier::Device))
        };
        let inside = seen.into_iter().filter(may_go).collect();
        self.evict_all(inside);
        self.pump();
        next
    }

    /// Copies in a device's extent, and those of them that claims keep there or somebody uses: of the first
    /// [`MAX_TOUCHES_PER_CALL`].
    #[must_use]
    pub fn extent_use(&self, extent: u32) -> (usize, usize) {
        let held = |id: &BlockId| !may_leave_device(self.catalog.get(*id));
        let copies = self.catalog.on_device.in_extent(extent).take(MAX_TOUCHES_PER_CALL);
        copies.fold((0, 0), |(all, kept), id| (all + 1, kept + usize::from(held(&id))))
    }

    fn evict_all(&mut self, ids: Vec<BlockId>) {
        for id in ids {
            if self.catalog.try_get(id).is_some() {
                self.evict_copy(id, Tier::Device);
            }
        }
    }

    /// A device is gone: nothing of it is read from now on. Its copies are forgotten by [`Self::forget_lost_devices`].
    pub fn lose_device(&mut self, device: DeviceNumber) {
        if let Some(pool) = self.devices.pool_mut(device) {
            pool.lost = true;
        }
    }

    /// Goes on forgetting copies on devices that are gone. Answers whether some are left.
    pub fn forget_lost_devices(&mut self) -> bool {
        let lost: Vec<DeviceNumber> = self.devices.pools.iter().filter(|p| p.lost).map(|p| p.number).collect();
        let on_device = &self.catalog.on_device;
        let copies = lost.iter().flat_map(|device| on_device.of_device(*device));
        let mut copies: Vec<BlockId> = copies.take(MAX_TOUCHES_PER_CALL + 1).collect();
        let more = copies.len() > MAX_TOUCHES_PER_CALL;
        copies.truncate(MAX_TOUCHES_PER_CALL);
        let former = self.catalog.events.because("lost");
        for id in copies {
            if self.catalog.try_get(id).is_some() {
                self.drop_from_device(id);
            }
        }
        self.catalog.events.because(former);
        self.pump();
        more
    }
}

const fn may_leave_device(entry: &Entry) -> bool {
    entry.evictable(Tier::Device)
}
