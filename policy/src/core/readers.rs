//! Who reads which device: what counts for a lookup is what all workers of an engine with a shard can read.

use kvtier_types::{DeviceNumber, Origin, Tier};

use super::{Core, LoadReport, LoadResult};
use crate::attachment::{Attachment, AttachmentId, Role};
use crate::catalog::{BlockId, device_of};
use crate::entry::Flags;
use crate::frame::FrameRef;

/// Loads from a device that may fail in a row before an engine's workers of that shard are handed none of it any more: whoever
/// cannot read a device after all is served from host memory until it attaches anew.
const MAX_LOSSES: u8 = 8;

/// What the workers of one shard read.
#[derive(Debug, Clone, Copy, Default)]
struct OfShard {
    /// Bit by device.
    devices: u32,
    first: Option<DeviceNumber>,
    known: bool,
}

/// What an engine's workers read, by shard. Empty where there are no devices.
#[derive(Debug, Clone, Default)]
pub(super) struct Readers(Vec<OfShard>);

impl Readers {
    /// The device that all workers of a shard read, and one of them before others.
    pub(super) fn first(&self, shard: u16) -> Option<DeviceNumber> {
        self.0.get(usize::from(shard))?.first
    }

    fn reads(&self, shard: u16, device: DeviceNumber) -> bool {
        self.0.get(usize::from(shard)).is_some_and(|of| of.devices & (1 << device.index()) != 0)
    }
}

impl Core {
    /// What the workers of an engine read.
    pub(super) fn readers(&self, engine: u32) -> Readers {
        let mut readers = Readers::default();
        if !self.has_devices() {
            return readers;
        }
        for worker in self.attachments.values().filter(|a| a.engine == engine && a.spec.role == Role::Worker) {
            let shard = usize::from(worker.spec.shard);
            if readers.0.len() <= shard {
                readers.0.resize(shard + 1, OfShard::default());
            }
            let own = self.read_by(worker).fold(0, |bits, device| bits | 1 << device.index());
            let of = &mut readers.0[shard];
            of.devices = if of.known { of.devices & own } else { own };
            of.known = true;
        }
        for worker in self.attachments.values().filter(|a| a.engine == engine && a.spec.role == Role::Worker) {
            let of = &mut readers.0[usize::from(worker.spec.shard)];
            let devices = of.devices;
            let first = self.read_by(worker).find(|device| devices & (1 << device.index()) != 0);
            of.first = of.first.or(first);
        }
        readers
    }

    /// Whether an attachment's process may have a device's memory to read.
    #[must_use]
    pub fn reads_device(&self, id: AttachmentId, device: DeviceNumber) -> bool {
        self.attachments.get(&id).is_some_and(|a| a.spec.devices.contains(&device)) && self.devices.is_live(device)
    }

    /// The devices that a worker reads.
    fn read_by<'a>(&'a self, worker: &'a Attachment) -> impl Iterator<Item = DeviceNumber> + 'a {
        let devices = worker.spec.devices.iter().copied();
        devices.filter(|device| worker.device_losses[device.index()] < MAX_LOSSES && self.devices.is_live(*device))
    }

    /// The frame of a leased shard's copy on a device that its readers can read.
    pub(super) fn readable(&self, id: BlockId, (shard, readers): (u16, &Readers)) -> Option<FrameRef> {
        let frame = self.catalog.device_frame(id)?;
        let doomed = self.catalog.get(id).flags.has(Flags::DOOMED);
        device_of(frame).filter(|device| !doomed && readers.reads(shard, *device)).map(|_| frame)
    }

    /// Where a leased shard comes from, for these readers.
    pub(super) fn origin_for(&self, id: BlockId, of: (u16, &Readers)) -> Origin {
        let entry = self.catalog.get(id);
        // What is on a device that they cannot read is of no use beside a copy in host memory.
        if entry.resident(Tier::Device) && entry.resident(Tier::Host) && self.readable(id, of).is_none() {
            return Origin::Tier(Tier::Host);
        }
        self.origin(id)
    }

    /// The device that some attached worker reads a layout's shard from first.
    pub(super) fn device_of_workers(&self, layout: u16, shard: u16) -> Option<DeviceNumber> {
        let workers = self.attachments.values().filter(|a| a.layout_number == layout && a.spec.role == Role::Worker);
        workers.filter(|a| a.spec.shard == shard).find_map(|a| self.read_by(a).next())
    }

    /// An engine's load from a device went well, or was lost. Which device that was is known while the copy is there.
    pub(super) fn note_device_load(&mut self, (engine, layout): (u32, u16), report: &LoadReport) {
        let id = self.catalog.find(&report.key, layout, report.shard);
        let frame = id.and_then(|id| self.catalog.device_frame(id)).filter(|f| f.generation == report.generation);
        let Some(device) = frame.and_then(device_of) else { return };
        let well = report.result == LoadResult::Loaded;
        for worker in self.attachments.values_mut().filter(|a| a.engine == engine && a.spec.shard == report.shard) {
            let losses = &mut worker.device_losses[device.index()];
            *losses = if well { 0 } else { losses.saturating_add(1) };
        }
    }
}
