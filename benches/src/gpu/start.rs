//! How long it takes until host memory is registered and a pool is there. Both go on in the background of a node.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use kvtier_device::RegisteredExtent;
use kvtier_memory::{Extent, PageKind};

use crate::{Ratio, Setting};

/// Bytes of an extent, as a daemon's.
const EXTENT: u64 = 1 << 30;
/// Threads that register, as a connector's.
const THREADS: usize = 4;

pub(crate) fn run(setting: &Setting) -> anyhow::Result<Vec<Ratio>> {
    let (gib, extent_bytes) = if setting.quick { (1, EXTENT / 8) } else { (10, EXTENT) };
    let count = usize::try_from(gib * (EXTENT / extent_bytes) / if setting.quick { 8 } else { 1 }).unwrap_or(1).max(1);
    let extents = (0..count).map(|_| Extent::create(extent_bytes, PageKind::Huge).map(Arc::new));
    let extents = extents.collect::<Result<Vec<_>, _>>().context("extents")?;
    let bytes = count as f64 * extent_bytes as f64;
    let per_10_gib = |seconds: f64| seconds * 10.0 * EXTENT as f64 / bytes;

    let began = Instant::now();
    let registered = std::thread::scope(|scope| {
        let share = |part: Vec<Arc<Extent>>| {
            scope.spawn(move || {
                part.into_iter()
                    .map(|extent| RegisteredExtent::new(&*setting.device, extent))
                    .collect::<Result<Vec<_>, _>>()
            })
        };
        let shares = extents.chunks(count.div_ceil(THREADS)).map(<[_]>::to_vec).map(share).collect::<Vec<_>>();
        shares.into_iter().map(|s| s.join().expect("registering does not panic")).collect::<Result<Vec<_>, _>>()
    });
    let pinned = per_10_gib(began.elapsed().as_secs_f64());
    drop(registered.context("registering host memory")?);

    let began = Instant::now();
    let pool = (0..count).map(|_| setting.device.allocate(extent_bytes)).collect::<Result<Vec<_>, _>>();
    let allocated = per_10_gib(began.elapsed().as_secs_f64());
    drop(pool.context("allocating a pool")?);
    Ok(vec![
        Ratio::new("10 GiB of host memory registered within a second", (1.0 / pinned, 1.0), format!("{pinned:.2} s")),
        Ratio::new("10 GiB of pool allocated within a second", (1.0 / allocated, 1.0), format!("{allocated:.2} s")),
    ])
}
