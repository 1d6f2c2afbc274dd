//! The device tier: GPUs, opened as configured, and the pool of each.
//!
//! Its memory belongs to the daemon: filled from host frames by [`copies`], given back under pressure by [`tend`], imported by
//! engines over the descriptor socket. A device that cannot be opened, or is lost, is a tier less; everything else goes on.

mod copies;
mod open;
mod pool;
mod tend;

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Instant;

use kvtier_device::{Device, Methods, Pace, RegisteredExtent};
use kvtier_memory::fdpass::{FdStatus, Grant};
use kvtier_policy::FramePool;
use kvtier_types::{DeviceId, DeviceNumber};
use parking_lot::Mutex;

pub(crate) use copies::{Copy, copy};
pub(crate) use open::{Opener, open, open_all};
use pool::Pool;
pub(crate) use pool::PoolStats;
pub(crate) use tend::start;

use crate::node::Node;

/// One GPU.
#[derive(Debug)]
pub(crate) struct Gpu {
    pub(crate) number: DeviceNumber,
    device: Arc<dyn Device>,
    methods: Methods,
    pace: Pace,
    pub(crate) pool: Pool,
    /// Extents of host memory that it reaches directly, and those that it would not take.
    reached: Mutex<Reached>,
    /// Memory that was given back lately: it is free once engines have let go of it.
    coming: Mutex<Option<(Instant, u64)>>,
    /// Copies in a row that did not end in time.
    late: AtomicU32,
    /// Why it is lost, once it is.
    lost: Mutex<Option<String>>,
}

#[derive(Debug, Default)]
struct Reached {
    extents: Vec<(u32, Option<RegisteredExtent>)>,
}

/// The tier.
#[derive(Debug, Default)]
pub(crate) struct DeviceTier {
    gpus: Vec<Arc<Gpu>>,
    /// Why there is none, or not all of what was configured.
    absent: String,
}

impl DeviceTier {
    /// Pools for the core.
    pub(crate) fn pools(&self) -> Vec<(DeviceNumber, Box<dyn FramePool>)> {
        self.gpus.iter().map(|gpu| (gpu.number, Box::new(gpu.pool.clone()) as Box<dyn FramePool>)).collect()
    }

    pub(crate) fn gpus(&self) -> &[Arc<Gpu>] {
        &self.gpus
    }

    fn gpu(&self, number: DeviceNumber) -> Option<&Arc<Gpu>> {
        self.gpus.iter().find(|gpu| gpu.number == number)
    }

    /// The number of a device that a process reads, if it is one of these.
    pub(crate) fn number_of(&self, id: &DeviceId) -> Option<DeviceNumber> {
        self.gpus.iter().find(|gpu| gpu.device.facts().id == *id).map(|gpu| gpu.number)
    }

    /// Why there is no tier; `None` where there is one.
    pub(crate) fn why_absent(&self) -> Option<String> {
        if self.gpus.is_empty() {
            return Some(self.absent.clone());
        }
        let lost: Vec<String> = self.gpus.iter().map(|gpu| gpu.lost.lock().clone()).collect::<Option<_>>()?;
        Some(lost.join("; "))
    }

    /// What there is, for people.
    pub(crate) fn describe(&self) -> String {
        let mut all: Vec<String> = self.gpus.iter().map(|gpu| gpu.describe()).collect();
        if !self.absent.is_empty() {
            all.push(self.absent.clone());
        }
        all.join("; ")
    }

    /// All pools together.
    pub(crate) fn stats(&self) -> PoolStats {
        let live = self.gpus.iter().filter(|gpu| gpu.lost.lock().is_none());
        live.map(|gpu| gpu.pool.stats()).fold(PoolStats::default(), |sum, one| PoolStats {
            capacity_bytes: sum.capacity_bytes + one.capacity_bytes,
            resident_bytes: sum.resident_bytes + one.resident_bytes,
            used_bytes: sum.used_bytes + one.used_bytes,
        })
    }

    /// Leave to import an extent.
    pub(crate) fn grant(&self, device: DeviceNumber, extent: u32) -> Result<Grant, FdStatus> {
        let gpu = self.gpu(device).filter(|gpu| gpu.lost.lock().is_none()).ok_or(FdStatus::UnknownExtent)?;
        match gpu.pool.grant(extent) {
            Ok(grant) => grant.ok_or(FdStatus::UnknownExtent),
            Err(error) => {
                tracing::warn!(%error, device = gpu.number.index(), "an extent of a device cannot be exported");
                Err(FdStatus::UnknownExtent)
            }
        }
    }
}

impl Gpu {
    fn describe(&self) -> String {
        let facts = self.device.facts();
        let number = self.number.index();
        match &*self.lost.lock() {
            Some(why) => format!("device {number} lost: {why}"),
            None => {
                let stats = self.pool.stats();
                format!(
                    "device {number} {}: {} of {} MiB taken",
                    facts.name,
                    stats.resident_bytes >> 20,
                    stats.capacity_bytes >> 20
                )
            }
        }
    }

    /// Whether it is lost.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost.lock().is_some()
    }
}

/// A device is gone, or this process's access to it: what lies there is forgotten, and the daemon goes on.
pub(crate) fn lose(node: &Arc<Node>, gpu: &Gpu, why: &str) {
    {
        let mut lost = gpu.lost.lock();
        if lost.is_some() {
            return;
        }
        *lost = Some(why.to_owned());
    }
    tracing::error!(
        device = gpu.number.index(),
        why,
        "a device is lost: its copies are forgotten, serving goes on without it"
    );
    node.with_core(|core, _| core.lose_device(gpu.number));
    node.with_core_in_steps(|core, _| core.forget_lost_devices());
    gpu.pool.close();
}
