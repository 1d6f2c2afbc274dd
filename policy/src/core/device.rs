//! The device tier: copies in pools of device memory that the shell fills from host frames and engines only read.
//!
//! ```text
//! shared prefix read again, claim, verb -> waiting -> frame of the pool -> Action::Copy -> on the device
//!                                                     (others make way)                    -> Action::Copy -> host memory
//! ```
//! A copy there is a faster copy of what host memory has or had: nothing is written there first, and what host memory lost
//! comes back from it as from disk. Nothing of it waits for a device: what finds no room is not copied.
//!
//! *Bounds*: [`MAX_WAITING`] blocks wait for one device, [`CoreConfig::max_device_copies`](super::CoreConfig) copies are under
//! way, [`MAX_PROMOTIONS`] blocks of one lookup are queued.

use std::collections::VecDeque;

use kvtier_types::{DeviceNumber, Expect, GroupSpec, Tier};

use super::readers::Readers;
use super::{Action, Core, MoveEnd, MoveId, Movement};
use crate::catalog::{BlockId, device_of};
use crate::entry::{Entry, Flags};
use crate::events::EventKind;
use crate::evict::Standing;
use crate::frame::{Allocation, FramePool, FrameRef};
use crate::lease::Leased;
use crate::ledger::MissReason;

/// Blocks that wait to be copied to one device: a few seconds' worth of copies; those that come later are queued by their
/// next reader.
pub(super) const MAX_WAITING: usize = 4096;
/// Blocks of one lookup that are queued at most: what remains of a long prefix is queued by the next reader.
const MAX_PROMOTIONS: usize = 256;

/// The pool of one device.
#[derive(Debug)]
pub(super) struct DevicePool {
    pub(super) number: DeviceNumber,
    pub(super) frames: Box<dyn FramePool>,
    pub(super) used_bytes: u64,
    /// The device is gone: nothing of it is read any more.
    pub(super) lost: bool,
    waiting: VecDeque<BlockId>,
}

/// All pools, and copies to them under way.
#[derive(Debug, Default)]
pub(super) struct Devices {
    pub(super) pools: Vec<DevicePool>,
    copying: usize,
}

impl Devices {
    pub(super) fn pool(&self, number: DeviceNumber) -> Option<&DevicePool> {
        self.pools.iter().find(|pool| pool.number == number)
    }

    pub(super) fn pool_mut(&mut self, number: DeviceNumber) -> Option<&mut DevicePool> {
        self.pools.iter_mut().find(|pool| pool.number == number)
    }

    pub(super) fn is_live(&self, number: DeviceNumber) -> bool {
        self.pool(number).is_some_and(|pool| !pool.lost)
    }
}

/// What becomes of the first that waits.
enum Next {
    /// Its copy began, or it is not to be copied.
    Done,
    /// Memory is being made ready for it.
    Waits,
}

impl Core {
    /// With pools of device memory to fill.
    #[must_use]
    pub fn with_devices(mut self, pools: Vec<(DeviceNumber, Box<dyn FramePool>)>) -> Self {
        let pool =
            |(number, frames)| DevicePool { number, frames, used_bytes: 0, lost: false, waiting: VecDeque::new() };
        self.devices.pools = pools.into_iter().map(pool).collect();
        self
    }

    /// Whether there is a device tier.
    #[must_use]
    pub fn has_devices(&self) -> bool {
        self.devices.pools.iter().any(|pool| !pool.lost)
    }

    /// Copies to devices queued or under way.
    #[must_use]
    pub fn pending_device_copies(&self) -> usize {
        self.devices.pools.iter().map(|pool| pool.waiting.len()).sum::<usize>() + self.devices.copying
    }

    /// Of the blocks of a lookup those that others are likely to use too, up to `last`: what was read before is copied to the
    /// device that its engine reads first.
    pub(super) fn promote_shared(
        &mut self,
        (blocks, last): (&[Leased], BlockId),
        groups: &[GroupSpec],
        readers: &Readers,
    ) {
        let end = |l: &Leased| (l.block + 1).saturating_mul(groups[usize::from(l.group)].block_tokens);
        let Some(shared) = blocks.iter().find(|l| l.id == last).map(end) else { return };
        let wanted = |l: &&Leased| end(l) <= shared && self.is_worth_a_device(self.catalog.get(l.id));
        let place = |l: &Leased| Some((l.id, readers.first(l.shard)?));
        let chosen: Vec<_> = blocks.iter().filter(wanted).filter_map(place).take(MAX_PROMOTIONS).collect();
        for (id, device) in chosen {
            self.queue_device_copy(id, Some(device));
        }
    }

    fn is_worth_a_device(&self, entry: &Entry) -> bool {
        let busy = Flags::ON_DEVICE | Flags::TO_DEVICE | Flags::FOR_DEVICE;
        entry.flags.has(Flags::READ) && !entry.flags.has(busy) && entry.standing != Standing::First
    }

    /// Puts a block in the queue for a device, or for one that suits. Answers whether it is there now.
    pub(super) fn queue_device_copy(&mut self, id: BlockId, device: Option<DeviceNumber>) -> bool {
        let entry = self.catalog.get(id);
        let busy = Flags::ON_DEVICE | Flags::TO_DEVICE | Flags::FOR_DEVICE | Flags::DOOMED;
        if entry.flags.has(busy) || !entry.resident(Tier::Host) || !self.allowed_in(entry, Tier::Device) {
            return false;
        }
        let Some(number) = device.or_else(|| self.suitable_device(entry)) else { return false };
        let Some(pool) = self.devices.pool_mut(number).filter(|p| !p.lost && p.waiting.len() < MAX_WAITING) else {
            return false;
        };
        pool.waiting.push_back(id);
        self.catalog.update(id, |e| e.flags.set(Flags::FOR_DEVICE, true));
        true
    }

    /// A device that an attached worker reads the entry's shard from, else the one with most room.
    fn suitable_device(&self, entry: &Entry) -> Option<DeviceNumber> {
        let room = |pool: &DevicePool| pool.frames.capacity_bytes().saturating_sub(pool.used_bytes);
        let roomiest = || {
            let live = self.devices.pools.iter().filter(|p| !p.lost);
            live.max_by_key(|p| (room(p), std::cmp::Reverse(p.number))).map(|p| p.number)
        };
        self.device_of_workers(entry.layout, entry.shard).or_else(roomiest)
    }

    /// Starts copies to devices, as many as may be under way.
    pub(super) fn pump_devices(&mut self) {
        for at in 0..self.devices.pools.len() {
            while self.devices.copying < self.config.max_device_copies {
                let pool = &self.devices.pools[at];
                let Some(&id) = pool.waiting.front() else { break };
                let number = pool.number;
                if matches!(self.start_device_copy(id, number), Next::Waits) {
                    break;
                }
                self.devices.pools[at].waiting.pop_front();
            }
        }
    }

    fn start_device_copy(&mut self, id: BlockId, number: DeviceNumber) -> Next {
        // What waits in the queue is in the catalog.
        let entry = self.catalog.get(id);
        let wanted = entry.resident(Tier::Host)
            && !entry.flags.has(Flags::DOOMED | Flags::ON_DEVICE | Flags::TO_DEVICE)
            && entry.expires > self.clock
            && self.allowed_in(entry, Tier::Device)
            && self.devices.is_live(number);
        let (from, bytes) = (entry.host.filter(|_| wanted), u64::from(entry.bytes));
        let room = if wanted { self.device_room(number, bytes) } else { Allocation::Full };
        let (from, into) = match (from, room) {
            (Some(_), Allocation::Growing) => return Next::Waits,
            (Some(from), Allocation::Granted(into)) => (from, into),
            _ => {
                if self.catalog.update(id, |e| e.flags.set(Flags::FOR_DEVICE, false)) {
                    self.try_device_later(id);
                }
                return Next::Done;
            }
        };
        self.catalog.update(id, |e| {
            e.flags.set(Flags::FOR_DEVICE, false);
            e.flags.set(Flags::TO_DEVICE, true);
        });
        let move_id = MoveId(self.take_id());
        self.moves.insert(move_id, (id, Movement::ToDevice { from, into }));
        self.devices.copying += 1;
        self.push_copy(id, move_id, (from, into));
        Next::Done
    }

    fn push_copy(&mut self, id: BlockId, move_id: MoveId, (from, into): (FrameRef, FrameRef)) {
        let entry = self.catalog.get(id);
        let expect = Expect { bytes: u64::from(entry.bytes), checksum: entry.checksum };
        let key = self.shard_key(entry);
        self.actions.push_back(Action::Copy { id: move_id, key, expect, from, into });
    }

    /// A frame of a device's pool; others make way if that is what it takes.
    fn device_room(&mut self, number: DeviceNumber, bytes: u64) -> Allocation {
        // One victim frees one frame of its class. A third try covers an extent that first has to change its class.
        for _ in 0..3 {
            let Some(pool) = self.devices.pool_mut(number) else { return Allocation::Full };
            match pool.frames.alloc(bytes) {
                Allocation::Granted(frame) => {
                    pool.used_bytes += pool.frames.class(bytes);
                    return Allocation::Granted(frame);
                }
                Allocation::Growing => return Allocation::Growing,
                Allocation::Full => {
                    let class = pool.frames.class(bytes);
                    if !self.evict_from_class(number, class) && !self.empty_device_extent(number, bytes) {
                        return Allocation::Full;
                    }
                }
            }
        }
        Allocation::Full
    }

    pub(super) fn free_device_frame(&mut self, frame: FrameRef, bytes: u64) {
        let number = device_of(frame).expect("frames of devices lie in extents of devices");
        let pool = self.devices.pool_mut(number).expect("pools stay while the core lives");
        pool.used_bytes -= pool.frames.class(bytes);
        pool.frames.free(frame, bytes);
    }

    /// A copy to a device came to its end.
    pub(super) fn device_copy_ended(&mut self, id: BlockId, (from, into): (FrameRef, FrameRef), end: MoveEnd) {
        self.devices.copying -= 1;
        let done = matches!(end, MoveEnd::Done(_));
        let counts = if done { &mut self.counts.moved } else { &mut self.counts.move_failures };
        counts[Tier::Device.index()] += 1;
        let bytes = u64::from(self.catalog.get(id).bytes);
        let number = device_of(into).expect("copies to devices end in extents of devices");
        if done && self.devices.is_live(number) {
            let class = self.devices.pool(number).map_or(bytes, |pool| pool.frames.class(bytes));
            self.catalog.came_onto_device(id, into, class);
            self.restand_copy(id);
        } else {
            self.free_device_frame(into, bytes);
            self.catalog.update(id, |e| e.flags.set(Flags::TO_DEVICE, false));
            if end == MoveEnd::Corrupt {
                self.host_was_corrupt(id, from);
            }
        }
        if self.catalog.try_get(id).is_some() {
            self.finish_doomed(id);
        }
        if !done && self.catalog.try_get(id).is_some() {
            self.try_device_later(id);
        }
    }

    /// A movement out of an entry's host frame found other bytes there than were sealed. Another frame may have come since.
    pub(super) fn host_was_corrupt(&mut self, id: BlockId, from: FrameRef) {
        if self.catalog.try_get(id).is_none_or(|entry| entry.host != Some(from)) {
            return;
        }
        self.counts.corrupt += 1;
        let key = self.catalog.get(id).key;
        self.ghost.insert(&key, MissReason::Corrupt);
        self.catalog.note_event(id, EventKind::Corrupt, Some(Tier::Host));
        self.drop_host(id);
    }

    /// What a claim wants on a device is tried again at the next expiry.
    fn try_device_later(&mut self, id: BlockId) {
        if self.lacks_device(self.catalog.get(id)) && self.failed_upholds.len() < MAX_WAITING {
            self.failed_upholds.push(id);
        }
    }

    /// Whether a claim wants a copy on a device that is not there.
    pub(super) fn lacks_device(&self, entry: &Entry) -> bool {
        entry.kept.has(Tier::Device) && !entry.flags.has(Flags::ON_DEVICE) && self.has_devices()
    }

    /// Starts bringing a block from its device into host memory.
    pub(super) fn start_staging(&mut self, id: BlockId, into: FrameRef) {
        let from = self.catalog.device_frame(id).expect("the source was chosen for having a copy");
        let move_id = MoveId(self.take_id());
        self.moves.insert(move_id, (id, Movement::FromDevice { from, into }));
        self.onboarding += 1;
        self.push_copy(id, move_id, (from, into));
    }

    /// A movement from a device into host memory came to its end.
    pub(super) fn staged(&mut self, id: BlockId, from: FrameRef, end: MoveEnd) {
        self.onboarding -= 1;
        let entry = self.catalog.get(id);
        // A device that fails, or is slow, is not asked again while there is another copy.
        let elsewhere = end == MoveEnd::Failed && (entry.disk.is_some() || entry.object.is_some());
        if elsewhere || matches!(end, MoveEnd::Corrupt | MoveEnd::Gone) {
            if end == MoveEnd::Corrupt {
                self.counts.corrupt += 1;
            }
            self.lose_device_copy(id, from, end == MoveEnd::Corrupt);
            if self.onboard_source(id).is_some() {
                // Another copy may be good; the block keeps its place among those wanted.
                self.onboards.push_back(id);
                return;
            }
        }
        self.onboard_ended(id);
    }

    /// The copy in this frame is no good, unless the frame was given back since.
    pub(super) fn lose_device_copy(&mut self, id: BlockId, frame: FrameRef, corrupt: bool) {
        if self.catalog.device_frame(id) != Some(frame) {
            return;
        }
        let key = self.catalog.get(id).key;
        if corrupt {
            self.ghost.insert(&key, MissReason::Corrupt);
            self.catalog.note_event(id, EventKind::Corrupt, Some(Tier::Device));
        }
        let former = self.catalog.events.because(if corrupt { "corrupt" } else { "lost" });
        self.drop_from_device(id);
        self.catalog.events.because(former);
    }

    /// Gives an entry's frame on a device back. The entry may go with it.
    pub(super) fn drop_from_device(&mut self, id: BlockId) {
        let bytes = u64::from(self.catalog.get(id).bytes);
        let Some((frame, remains)) = self.catalog.left_device(id) else { return };
        self.free_device_frame(frame, bytes);
        if remains {
            self.uphold(id);
        }
    }

    /// Where a block can be brought into host memory from, the fastest first.
    pub(super) fn onboard_source(&self, id: BlockId) -> Option<Tier> {
        let entry = self.catalog.get(id);
        let on_device = || self.catalog.device_frame(id).and_then(device_of).is_some_and(|of| self.devices.is_live(of));
        let from = |tier: &Tier| match tier {
            Tier::Device => on_device(),
            slower => entry.resident(*slower) && !self.unread.has_failed(id, *slower),
        };
        [Tier::Device, Tier::Disk, Tier::Object].into_iter().find(from)
    }
}
