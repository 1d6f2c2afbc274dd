//! Keeps a device's pool as large as its engines leave room for: it grows by an extent when one is wanted and enough memory is
//! free, and gives extents back, one at a time, when too little is.
//!
//! ```text
//! free memory   0 ........ reserve ........ twice the reserve ........
//!               | gives back |  as it is       |  may grow
//! ```
//! Memory of an extent is free once engines have let go of their mappings too.
//!
//! *Bounds*: one task a device; a round gives back at most [`MAX_PER_ROUND`] extents.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvtier_device::{DeviceError, RegisteredExtent};
use kvtier_policy::ExtentWalk;
use tokio::time::{MissedTickBehavior, interval};

use super::{Gpu, lose};
use crate::node::Node;

/// How often the device's free memory is looked at.
const EVERY: Duration = Duration::from_secs(1);
/// How long engines may take to let go of extents that were given back, before more is.
const LETTING_GO: Duration = Duration::from_secs(10);
/// Extents of one round: what engines want at once is less, and a round must come to its end.
const MAX_PER_ROUND: usize = 64;

/// Starts tending all devices.
pub(crate) fn start(node: &Arc<Node>) {
    for gpu in node.devices.gpus() {
        let (node_of_task, gpu) = (Arc::clone(node), Arc::clone(gpu));
        node.tasks.spawn(async move { tend(node_of_task, gpu).await });
    }
}

async fn tend(node: Arc<Node>, gpu: Arc<Gpu>) {
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !gpu.is_lost() {
        tokio::select! {
            () = node.stopping.cancelled() => return,
            () = gpu.pool.wanted() => {}
            _ = ticks.tick() => {}
        }
        let (of_round, gpu_of_round) = (Arc::clone(&node), Arc::clone(&gpu));
        let runtime = tokio::runtime::Handle::current();
        let round = move || {
            let _inside = runtime.enter();
            round(&of_round, &gpu_of_round);
            reach_one(&of_round, &gpu_of_round);
        };
        if tokio::task::spawn_blocking(round).await.is_err() {
            lose(&node, &gpu, "its upkeep failed: see the log");
        }
    }
    // Copies that hold its memory end meanwhile; what is left goes with the process.
    let closing = move || gpu.pool.give_back();
    drop(tokio::task::spawn_blocking(closing).await);
}

/// Looks at the device's memory once, and does what follows.
pub(super) fn round(node: &Arc<Node>, gpu: &Gpu) {
    let reserve = node.config.device.reserve.0;
    let Some(free) = free_bytes(node, gpu) else { return };
    if free.saturating_add(coming(gpu)) < reserve {
        gpu.pool.set_may_grow(false);
        give_back(node, gpu, reserve);
        return;
    }
    gpu.pool.reinstate();
    // Giving back what was just taken would be in vain.
    let enough = reserve.saturating_mul(2).max(reserve.saturating_add(gpu.pool.extent_bytes()));
    gpu.pool.set_may_grow(free >= enough);
    if gpu.pool.wants_extent() {
        match gpu.pool.grow(&*gpu.device) {
            Ok(()) => {}
            Err(error) => {
                tracing::warn!(device = gpu.number.index(), %error, "no more memory for blocks; serving with what there is");
                gpu.pool.set_may_grow(false);
            }
        }
        node.with_core(|core, _| core.frames_grew());
    }
}

fn free_bytes(node: &Arc<Node>, gpu: &Gpu) -> Option<u64> {
    match gpu.device.free_bytes() {
        Ok(free) => Some(free),
        Err(error @ DeviceError::Lost { .. }) => {
            lose(node, gpu, &error.to_string());
            None
        }
        Err(error) => {
            tracing::warn!(device = gpu.number.index(), %error, "the device does not say how much memory is free");
            gpu.pool.set_may_grow(false);
            None
        }
    }
}

/// Empties extents until enough is free: first those that nothing is claimed in, the emptiest before others.
fn give_back(node: &Arc<Node>, gpu: &Gpu, reserve: u64) {
    let (mut extents, before) = (gpu.pool.emptiest(), gpu.pool.stats().resident_bytes);
    let mut given = 0;
    // Those with most that stays come last.
    extents.sort_by_cached_key(|extent| node.read_core(|core| core.extent_use(*extent).1));
    let passes = [false, true].into_iter().flat_map(|claimed| extents.iter().map(move |extent| (*extent, claimed)));
    for (extent, claimed) in passes.take(MAX_PER_ROUND) {
        gpu.pool.retire(extent, true);
        let mut walk = Some(ExtentWalk::default());
        while let Some(from) = walk {
            walk = node.with_core(|core, _| core.vacate_extent(extent, claimed, from));
        }
        given += gpu.pool.give_back() as u64 * gpu.pool.extent_bytes();
        if free_bytes(node, gpu).is_none_or(|free| free.saturating_add(given) >= reserve) {
            break;
        }
    }
    *gpu.coming.lock() = (given > 0).then(|| (Instant::now(), given));
    let after = gpu.pool.stats().resident_bytes;
    if after < before {
        let given_mib = (before - after) >> 20;
        tracing::info!(
            device = gpu.number.index(),
            given_mib,
            "memory was given back: less than device.reserve was free"
        );
    }
}

/// Memory that was given back so lately that engines may still map it.
fn coming(gpu: &Gpu) -> u64 {
    let coming = *gpu.coming.lock();
    coming.filter(|(since, _)| since.elapsed() < LETTING_GO).map_or(0, |(_, bytes)| bytes)
}

/// Lets the device reach one more extent of host memory directly, and lets go of those that are gone.
fn reach_one(node: &Arc<Node>, gpu: &Gpu) {
    let there = node.arena.extents();
    let known: Vec<u32> = {
        let mut reached = gpu.reached.lock();
        reached.extents.retain(|(id, _)| there.iter().any(|(other, _)| other == id));
        reached.extents.iter().map(|(id, _)| *id).collect()
    };
    if let Some((id, _)) = there.into_iter().find(|(id, _)| !known.contains(id)) {
        reach(node, gpu, id);
    }
}

/// Lets the device reach an extent of host memory directly, unless that was tried before. Takes a while.
pub(super) fn reach(node: &Arc<Node>, gpu: &Gpu, id: u32) {
    let mut reached = gpu.reached.lock();
    if reached.extents.iter().any(|(known, _)| *known == id) {
        return;
    }
    let Some(extent) = node.arena.extent(id) else { return };
    let registered = RegisteredExtent::new(&*gpu.device, extent);
    if let Err(error) = &registered {
        // Copies work without, staged by the driver.
        tracing::debug!(device = gpu.number.index(), extent = id, %error, "host memory is not reached directly");
    }
    reached.extents.push((id, registered.ok()));
}
