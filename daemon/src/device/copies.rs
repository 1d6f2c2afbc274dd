//! Copies between host frames and frames of a device's pool, each verified before anybody hears of it.
//!
//! *Bounds*: the core has at most `max_device_copies` and `max_onboards` of them under way. *Cancellation*: a copy that is given
//! up waiting for keeps both frames until the device has ended it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kvtier_device::{DeviceError, OnCopied, PoolFrame, Way, off_device, onto_device};
use kvtier_memory::FramePin;
use kvtier_policy::{FrameRef, MoveEnd};
use kvtier_types::{DeviceNumber, Expect, ShardKey};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::tend::reach;
use super::{Gpu, lose};
use crate::node::Node;
use crate::pool::frame_id;

/// Longest wait for a copy: a frame takes a millisecond, registering an extent a second.
const DEADLINE: Duration = Duration::from_secs(10);
/// Copies in a row that are late before a device counts as lost.
const MAX_LATE: u32 = 8;

/// A copy of one shard.
#[derive(Debug)]
pub(crate) struct Copy {
    pub(crate) key: ShardKey,
    pub(crate) expect: Expect,
    pub(crate) from: FrameRef,
    pub(crate) into: FrameRef,
}

impl Copy {
    /// Whether it goes from a device to host memory.
    pub(crate) const fn is_upward(&self) -> bool {
        DeviceNumber::of_extent(self.from.extent).is_some()
    }
}

/// Carries a copy out, whichever way.
pub(crate) async fn copy(node: Arc<Node>, copy: Copy) -> MoveEnd {
    let upward = copy.is_upward();
    let (on_device, in_host) = if upward { (copy.from, copy.into) } else { (copy.into, copy.from) };
    let gpu = DeviceNumber::of_extent(on_device.extent).and_then(|number| node.devices.gpu(number)).cloned();
    let Some(gpu) = gpu.filter(|gpu| !gpu.is_lost()) else { return MoveEnd::Gone };
    let bytes = copy.expect.bytes;
    let Some(host) = node.arena.pin(frame_id(in_host, bytes)) else { return MoveEnd::Failed };
    let Some(pool) = gpu.pool.pin(on_device, bytes) else { return MoveEnd::Gone };
    let wait = gpu.pace.take(Instant::now(), bytes);
    if !wait.is_zero() {
        tokio::time::sleep(wait).await;
    }
    let result = match timeout(DEADLINE, carried_out(&node, &gpu, (in_host.extent, host), (pool, upward))).await {
        Ok(result) => result,
        Err(_) => return late(&node, &gpu, &copy),
    };
    gpu.late.store(0, Ordering::Relaxed);
    match result {
        Ok(checksum) if checksum == copy.expect.checksum => {
            if !upward {
                gpu.pool.publish(copy.into, bytes);
            }
            MoveEnd::Done(None)
        }
        Ok(_) => differs(&node, &copy, &gpu),
        Err(error) => failed(&node, &gpu, &copy, &error),
    }
}

/// Gives a copy to the device and waits for its end. A driver that blocks keeps a thread for such, and nobody else.
async fn carried_out(
    node: &Arc<Node>,
    gpu: &Arc<Gpu>,
    (extent, host): (u32, FramePin),
    (pool, upward): (PoolFrame, bool),
) -> Result<u64, DeviceError> {
    let (told, end) = oneshot::channel();
    let (node, gpu) = (Arc::clone(node), Arc::clone(gpu));
    let begin = move || {
        reach(&node, &gpu, extent);
        // Nobody may be waiting any more.
        let tell: OnCopied = Box::new(move |result| drop(told.send(result)));
        if upward {
            off_device(&*gpu.device, gpu.methods.of(Way::ToHost), (pool, host), tell)
        } else {
            onto_device(&*gpu.device, gpu.methods.of(Way::FromHost), (host, pool), tell)
        }
    };
    tokio::task::spawn_blocking(begin).await.unwrap_or(Err(DeviceError::Busy))?;
    end.await.unwrap_or(Err(DeviceError::Busy))
}

/// A copy did not end in time. A device of which that becomes a habit is given up: what waits for it waits in vain.
fn late(node: &Arc<Node>, gpu: &Gpu, copy: &Copy) -> MoveEnd {
    let device = gpu.number.index();
    tracing::warn!(key = %copy.key, device, "a copy between host memory and a device did not end in time");
    if gpu.late.fetch_add(1, Ordering::Relaxed) + 1 >= MAX_LATE {
        lose(node, gpu, "its copies do not end");
        return MoveEnd::Gone;
    }
    MoveEnd::Failed
}

/// What arrived is not what was sealed: whose fault is it?
fn differs(node: &Node, copy: &Copy, gpu: &Gpu) -> MoveEnd {
    let (key, device) = (&copy.key, gpu.number.index());
    if copy.is_upward() {
        tracing::error!(%key, device, "a corrupt copy on a device is dropped; it was not served");
        return MoveEnd::Corrupt;
    }
    let source = node.arena.pin(frame_id(copy.from, copy.expect.bytes));
    if source.as_ref().map(FramePin::checksum) == Some(copy.expect.checksum) {
        tracing::error!(%key, device, "a copy onto a device arrived damaged; it is not used");
        return MoveEnd::Failed;
    }
    tracing::error!(%key, "a corrupt copy in host memory is dropped; it was not served");
    MoveEnd::Corrupt
}

fn failed(node: &Arc<Node>, gpu: &Gpu, copy: &Copy, error: &DeviceError) -> MoveEnd {
    if let DeviceError::Lost { .. } = error {
        lose(node, gpu, &error.to_string());
        return MoveEnd::Gone;
    }
    tracing::warn!(key = %copy.key, device = gpu.number.index(), %error, "a copy between host memory and a device failed");
    MoveEnd::Failed
}
