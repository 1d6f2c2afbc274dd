//! The wall around a stream of ours: works of one way, and the thread that sleeps until each has ended.
//!
//! *Invariants*: what was given to the stream in part is waited for like what was given whole; a work's memory is let go
//! and its end told after its event was reached, or the device was lost.
//! *Bounds*: [`MAX_IN_FLIGHT`](crate::MAX_IN_FLIGHT) works; as many tables.
#![expect(unsafe_code, reason = "makes and destroys a stream")]

use std::collections::VecDeque;
use std::ffi::{c_int, c_uint};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::api::{Handle, is_dead};
use super::context::{Context, Event};
use super::copying::{Copier, Layout};
use super::pinned::Table;
use crate::{DeviceError, Done, MAX_IN_FLIGHT, OnEnd, Way, Work};

/// `CU_STREAM_NON_BLOCKING`: it does not wait for the default stream.
const NON_BLOCKING: c_uint = 1;
/// How long a device may answer errors, though it is not dead, before it is given nothing more.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two questions, and once nothing more is hoped for.
const PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Words of the smallest table: the runs of a few blocks.
const MIN_TABLE_WORDS: usize = 4096;

/// The lane.
pub(super) struct Lane {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    context: Arc<Context>,
    copier: Arc<Copier>,
    stream: Handle,
    state: Mutex<State>,
    changed: Condvar,
}

// SAFETY: streams may be used from any thread.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

#[derive(Default)]
struct State {
    given: VecDeque<Given>,
    /// Given and not told of yet.
    in_flight: usize,
    tables: Vec<Table>,
    closed: bool,
}

/// A work that the stream has.
struct Given {
    work: Work,
    on_end: OnEnd,
    table: Table,
    layout: Layout,
    /// Reached after it; without, the whole stream is waited for.
    end: Result<Event, DeviceError>,
    /// Giving it failed part of the way.
    failed: Option<DeviceError>,
}

impl Lane {
    pub(super) fn start(way: Way, context: &Arc<Context>, copier: &Arc<Copier>) -> Result<Self, DeviceError> {
        let stream = create(context)?;
        let shared = Arc::new(Shared {
            context: Arc::clone(context),
            copier: Arc::clone(copier),
            stream,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name(format!("kvtier-gpu-{}", way.name()));
        let thread = thread.spawn(move || of_thread.work());
        let thread = thread.map_err(|e| DeviceError::Absent { why: format!("no thread for the GPU's copies: {e}") })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    pub(super) fn push(&self, work: Work, on_end: OnEnd) -> Result<(), DeviceError> {
        let shared = &self.shared;
        if let Some(fence) = &work.after {
            fence.get::<Event>()?;
        }
        let layout = shared.copier.lay_out(&work)?;
        // Held while the stream is given the work: what is given in one order ends in that order.
        let mut state = shared.state.lock();
        if state.in_flight >= MAX_IN_FLIGHT {
            return Err(DeviceError::Busy);
        }
        let mut table = shared.table(&mut state, layout.words())?;
        let _entered = shared.context.enter()?;
        let end = Event::create(&shared.context)?;
        // A panic of ours after a part was given is a failure of the work, which is then waited for.
        let given = catch_unwind(AssertUnwindSafe(|| shared.give(&work, (&layout, &mut table))));
        let failed = given.unwrap_or(Err(DeviceError::Invalid { what: "giving it to the GPU panicked" })).err();
        let end = end.record(shared.stream).map(|()| end);
        state.in_flight += 1;
        state.given.push_back(Given { work, on_end, table, layout, end, failed });
        shared.changed.notify_one();
        Ok(())
    }
}

impl Drop for Lane {
    /// What was given is waited for.
    fn drop(&mut self) {
        self.shared.state.lock().closed = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn create(context: &Arc<Context>) -> Result<Handle, DeviceError> {
    let _entered = context.enter()?;
    let (mut least, mut greatest): (c_int, c_int) = (0, 0);
    // SAFETY: room for two ints.
    let code = unsafe { (context.api.stream_priorities)(&raw mut least, &raw mut greatest) };
    context.check("cuCtxGetStreamPriorityRange", code)?;
    let mut stream: Handle = std::ptr::null_mut();
    // SAFETY: room for one handle; destroyed with the lane.
    let code = unsafe { (context.api.stream_create)(&raw mut stream, NON_BLOCKING, least) };
    context.check("cuStreamCreateWithPriority", code)?;
    Ok(stream)
}

impl Shared {
    /// A table of at least so many words: one that is free, or a new one.
    fn table(&self, state: &mut State, words: usize) -> Result<Table, DeviceError> {
        if let Some(at) = state.tables.iter().position(|t| t.words() >= words) {
            return Ok(state.tables.swap_remove(at));
        }
        Table::new(&self.context, words.next_power_of_two().max(MIN_TABLE_WORDS))
    }

    fn give(&self, work: &Work, table: (&Layout, &mut Table)) -> Result<(), DeviceError> {
        if let Some(fence) = &work.after {
            fence.get::<Event>()?.hold(self.stream)?;
        }
        self.copier.issue(self.stream, work, table)
    }

    fn work(&self) {
        while let Some(given) = self.next() {
            self.end(given);
        }
    }

    fn next(&self) -> Option<Given> {
        let mut state = self.state.lock();
        loop {
            if let Some(next) = state.given.pop_front() {
                return Some(next);
            }
            if state.closed {
                return None;
            }
            self.changed.wait(&mut state);
        }
    }

    /// Waits for a work's end and tells it. A panic of ours is a failed work, not the end of the lane: others wait for it.
    fn end(&self, given: Given) {
        let Given { work, on_end, table, layout, end, failed } = given;
        let reached = self.reached(end.as_ref().ok());
        let sums = catch_unwind(AssertUnwindSafe(|| layout.sums(&table)));
        let sums = sums.map_err(|_| DeviceError::Invalid { what: "its checksums could not be read" });
        let result = failed.map_or(reached, Err).and(sums).map(|sums| Done { sums });
        drop(work);
        {
            let mut state = self.state.lock();
            state.in_flight -= 1;
            // The larger ones are kept: what needed them once needs them again.
            if state.tables.len() < MAX_IN_FLIGHT {
                state.tables.push(table);
            }
            state.tables.sort_unstable_by_key(Table::words);
        }
        if catch_unwind(AssertUnwindSafe(|| on_end(result))).is_err() {
            tracing::error!("whoever was told the end of a copy panicked");
        }
    }

    /// Waits until a work has ended: its event was reached, or the stream has nothing more to do, or the driver says that
    /// nothing of this process is under way any more. Any other error says nothing of the copies: they may still be written
    /// where somebody else will write next, so it is asked again, as long as it takes.
    fn reached(&self, end: Option<&Event>) -> Result<(), DeviceError> {
        let given_up = Instant::now() + PATIENCE;
        let mut pause = PAUSE;
        loop {
            let waited = self.context.enter_anyway().and_then(|_entered| match end {
                Some(event) => event.wait().or_else(|_| self.drain()),
                None => self.drain(),
            });
            match waited {
                Ok(()) => return Ok(()),
                Err(error) if is_dead(&error) => return Err(error),
                Err(error) => {
                    if Instant::now() >= given_up && pause < LONGEST_PAUSE {
                        tracing::error!(%error, "the GPU does not tell the end of copies: it is given nothing more");
                        self.context.lose();
                        pause = LONGEST_PAUSE;
                    }
                    std::thread::sleep(pause);
                }
            }
        }
    }

    /// Waits for everything that the stream was given.
    fn drain(&self) -> Result<(), DeviceError> {
        // SAFETY: the stream is ours; its context is current.
        let code = unsafe { (self.context.api.stream_synchronize)(self.stream) };
        self.context.check("cuStreamSynchronize", code)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let Ok(_entered) = self.context.enter() else { return };
        // SAFETY: ours; the thread that used it has ended.
        let _code = unsafe { (self.context.api.stream_destroy)(self.stream) };
    }
}
