//! The wall around copies between frames and engine memory on a device.
//!
//! # Invariants
//! As beside, and: a batch is over only when the device has told the end of all of it, so nothing writes the engine's blocks
//! afterwards. What counts is the checksum of the bytes in device memory, made there after the copy; where the device makes
//! none, that of the host frame's.
#![expect(unsafe_code, reason = "submits copies of memory that the engine registered")]

use std::sync::mpsc;
use std::time::Instant;

use kvtier_device::{Device, DeviceError, Done, Fence, Method, Span, Way, Work};
use kvtier_memory::checksum::EMPTY;
use kvtier_memory::copy::{Direction, Run, checksum};
use kvtier_memory::plan::{FrameSpan, Region, plan};
use kvtier_memory::{MemoryError, NO_GENERATION};

use super::Copied;
use crate::device::DeviceSide;
use crate::extents::Mapped;
use crate::frame::FrameRef;

/// One block to copy.
#[derive(Debug)]
pub(crate) struct Item<'a> {
    pub(crate) extent: Mapped,
    pub(crate) frame: FrameRef,
    pub(crate) regions: &'a [Region],
    pub(crate) block: u32,
}

/// A batch of one direction.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Terms<'a> {
    pub(crate) direction: Direction,
    /// What the engine's stream must have done before.
    pub(crate) after: Option<&'a Fence>,
    /// When nothing is begun any more.
    pub(crate) deadline: Instant,
}

/// Items whose copies go the same way by the same method.
#[derive(Debug)]
struct Group {
    way: Way,
    method: Method,
    /// By item of the batch: its place there.
    items: Vec<usize>,
    runs: Vec<Run>,
    sums: Vec<Vec<Span>>,
}

/// Copies a batch of blocks between frames and the engine's memory. Waits until nothing of it is under way.
#[must_use]
pub(crate) fn copy(side: &DeviceSide, terms: Terms<'_>, items: &[Item<'_>]) -> Vec<Copied> {
    let mut ends = vec![Copied::Lost; items.len()];
    let mut groups: Vec<Group> = Vec::new();
    for (index, item) in items.iter().enumerate() {
        let Some((way, method, runs)) = way_of(side, terms.direction, item) else { continue };
        let sums = if side.device.facts().sums { in_engine(&runs, terms.direction) } else { Vec::new() };
        let at = groups.iter().position(|g| (g.way, g.method) == (way, method)).unwrap_or_else(|| {
            groups.push(Group { way, method, items: Vec::new(), runs: Vec::new(), sums: Vec::new() });
            groups.len() - 1
        });
        groups[at].items.push(index);
        groups[at].runs.extend(runs);
        groups[at].sums.push(sums);
    }
    if Instant::now() >= terms.deadline {
        return ends;
    }
    let begun: Vec<_> = groups.into_iter().filter_map(|group| begin(side, terms, group, items)).collect();
    for mut group in begun {
        let Some(done) = group.end() else { continue };
        for (at, index) in std::mem::take(&mut group.items).into_iter().enumerate() {
            ends[index] = judge(&items[index], terms.direction, done.sums.get(at).copied());
        }
    }
    ends
}

/// A group that the device has. Dropping it waits for its end: whatever else happens, nobody is told before.
struct Begun {
    items: Vec<usize>,
    end: Option<mpsc::Receiver<Result<Done, DeviceError>>>,
}

impl Begun {
    /// Waits for its end; `None` when it failed.
    fn end(&mut self) -> Option<Done> {
        // The device tells every end; its sender is not dropped before.
        self.end.take()?.recv().ok()?.ok()
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        drop(self.end());
    }
}

fn begin(side: &DeviceSide, terms: Terms<'_>, group: Group, items: &[Item<'_>]) -> Option<Begun> {
    let keeps: Vec<Mapped> = group.items.iter().map(|index| items[*index].extent.clone()).collect();
    let sums = if side.device.facts().sums { group.sums } else { Vec::new() };
    let work = Work {
        way: group.way,
        runs: group.runs,
        method: group.method,
        after: terms.after.cloned(),
        sums,
        keeps: Box::new(keeps),
    };
    let (told, end) = mpsc::channel();
    let on_end = Box::new(move |result| drop::<Result<(), _>>(told.send(result)));
    // SAFETY: the plan keeps every run inside its extent, which the work keeps mapped, and inside the registered regions,
    // which the engine keeps and leaves to these blocks' only job; the batch is waited for before the job ends.
    unsafe { side.device.submit(work, on_end) }.ok().map(|()| Begun { items: group.items, end: Some(end) })
}

/// How a block is copied; `None` when frame and extent or block do not fit, or the frame is gone.
fn way_of(side: &DeviceSide, direction: Direction, item: &Item<'_>) -> Option<(Way, Method, Vec<Run>)> {
    let frame = &item.frame;
    if frame.generation == NO_GENERATION || item.extent.generation(frame.offset) != frame.generation {
        return None;
    }
    let (base, way, is_reached) = match (&item.extent, direction) {
        (Mapped::Host(extent), Direction::FromFrame) => {
            let at = extent.memory.range(frame.offset, frame.bytes).ok()?.expose_provenance();
            (at, Way::FromHost, extent.is_pinned())
        }
        (Mapped::Host(extent), Direction::IntoFrame) => {
            let at = extent.memory.range_mut(frame.offset, frame.bytes).ok()?.expose_provenance();
            (at, Way::ToHost, extent.is_pinned())
        }
        (Mapped::Device(extent), Direction::FromFrame) => {
            let at = within(extent.memory.span(), frame).ok()?;
            (at, Way::Within, true)
        }
        // Engines never write a device's pool.
        (Mapped::Device(_), Direction::IntoFrame) => return None,
    };
    let runs = plan(item.regions, u64::from(item.block), FrameSpan { base, bytes: frame.bytes }, direction).ok()?;
    // What is not registered yet is copied by the driver's own staging, run by run.
    let method = if is_reached { side.method(way) } else { Method::Single };
    Some((way, method, runs))
}

fn within(span: Span, frame: &FrameRef) -> Result<usize, MemoryError> {
    let outside = MemoryError::OutOfBounds { offset: frame.offset, bytes: frame.bytes, len: span.bytes };
    if frame.offset.checked_add(frame.bytes).is_none_or(|end| end > span.bytes) {
        return Err(outside);
    }
    usize::try_from(span.base + frame.offset).map_err(|_| outside)
}

/// The engine's side of runs.
fn in_engine(runs: &[Run], direction: Direction) -> Vec<Span> {
    let span = |run: &Run| match direction {
        Direction::FromFrame => Span { base: run.dst.addr() as u64, bytes: run.len as u64 },
        Direction::IntoFrame => Span { base: run.src.addr() as u64, bytes: run.len as u64 },
    };
    runs.iter().map(span).collect()
}

/// What became of a block whose copy has ended, with the checksum that the device made.
fn judge(item: &Item<'_>, direction: Direction, sum: Option<u64>) -> Copied {
    let Some(sum) = sum.or_else(|| host_sum(item)) else { return Copied::Lost };
    if item.extent.generation(item.frame.offset) != item.frame.generation {
        return Copied::Lost;
    }
    match direction {
        Direction::FromFrame if sum != item.frame.checksum => Copied::Corrupt,
        Direction::FromFrame | Direction::IntoFrame => Copied::Whole(sum),
    }
}

/// The checksum of what lies in the frame.
fn host_sum(item: &Item<'_>) -> Option<u64> {
    let Mapped::Host(extent) = &item.extent else { return None };
    let at = extent.memory.range(item.frame.offset, item.frame.bytes).ok()?;
    // SAFETY: inside the extent, which is mapped while it is borrowed; the copy into it has ended.
    Some(unsafe { checksum(EMPTY, at, usize::try_from(item.frame.bytes).ok()?) })
}

/// The device's own face, for the fence of a job.
pub(crate) fn fence(side: &DeviceSide, stream: u64) -> Option<Fence> {
    let device: &dyn Device = &*side.device;
    device.fence(kvtier_device::EngineStream(stream)).ok()
}
