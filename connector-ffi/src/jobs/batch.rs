//! Transfers where engine memory is a device's: some at once, so that its bus does not idle between them.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::time::Instant;

use kvtier_memory::copy::Direction;

use super::Inner;
use super::job::{Fate, Job, Kind};
use crate::copying::device::{Item, Terms};
use crate::copying::{self, Copied};
use crate::device::DeviceSide;
use crate::extents::Mapped;

/// Bytes that a thread gives the device at once: large enough that its bus does not idle, small enough to share.
const BATCH_BYTES: u64 = 16 << 20;
/// Transfers that a thread gives the device at once.
const BATCH_TRANSFERS: usize = 1024;
impl Inner {
    /// Does a claimed transfer of a job, and those after it that make up a batch.
    pub(super) fn batch(&self, side: &DeviceSide, job: &Job, first: usize) {
        let batch = batch_from(job, first);
        let copied = catch_unwind(AssertUnwindSafe(|| self.transfer_batch(side, job, &batch)));
        let fates = copied.unwrap_or_else(|_| vec![Fate::Lost; batch.len()]);
        batch.into_iter().zip(fates).for_each(|(index, fate)| job.finish(index, fate));
    }

    fn transfer_batch(&self, side: &DeviceSide, job: &Job, batch: &[usize]) -> Vec<Fate> {
        if self.extents.is_due() {
            self.sweep();
        }
        let mut fates = vec![Fate::Lost; batch.len()];
        let item = |(at, index): (usize, &usize)| {
            let transfer = &job.transfers[*index];
            let extent = self.extent(job, *index)?;
            let regions = job.regions.of(transfer.frame.group);
            Some((at, Item { extent, frame: transfer.frame, regions, block: transfer.block_id }))
        };
        let ready: Vec<(usize, Item<'_>)> = batch.iter().enumerate().filter_map(item).collect();
        let direction = if job.kind == Kind::Save { Direction::IntoFrame } else { Direction::FromFrame };
        let terms = Terms { direction, after: job.after.as_ref(), deadline: job.deadline };
        // Before anything begins: what waits for its turn can still be cancelled.
        let bytes = ready.iter().map(|(_, item)| item.frame.bytes).sum();
        let pace = side.pace.take(Instant::now(), bytes);
        std::thread::sleep(pace.min(job.deadline.saturating_duration_since(Instant::now())));
        let gate = self.gate.read();
        if !self.may_begin(job, *gate) {
            return fates;
        }
        let begun = ready.into_iter().filter(|(at, _)| job.begin(batch[*at]));
        let (places, items): (Vec<usize>, Vec<Item<'_>>) = begun.unzip();
        let copied = copying::device::copy(side, terms, &items);
        drop(gate);
        for ((at, item), copied) in places.into_iter().zip(&items).zip(copied) {
            if matches!((&item.extent, copied), (Mapped::Device(_), Copied::Whole(_))) {
                self.shared.counters.device_load_bytes.add(item.frame.bytes);
            }
            fates[at] = self.ended(job, &job.transfers[batch[at]], copied);
        }
        fates
    }

    /// Lets go of memory that others may want. Within the gate: closing waits for the driver's calls too.
    pub(super) fn sweep(&self) {
        let gate = self.gate.read();
        if *gate && !self.shut.load(Ordering::Acquire) {
            let epoch = self.shared.link.epoch();
            // A panic is a bug that must not end the thread.
            drop(catch_unwind(AssertUnwindSafe(|| self.extents.sweep(epoch))));
        }
    }
}

/// Transfers of a job to do at once, from one that was claimed.
fn batch_from(job: &Job, first: usize) -> Vec<usize> {
    let mut batch = vec![first];
    let mut bytes = job.transfers[first].frame.bytes;
    while bytes < BATCH_BYTES && batch.len() < BATCH_TRANSFERS {
        let Some(next) = job.claim(Instant::now()) else { break };
        bytes += job.transfers[next].frame.bytes;
        batch.push(next);
    }
    batch
}
