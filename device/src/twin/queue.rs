//! One queue of the twin: works of one way, one after the other, on a thread.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};

use super::{MAX_IN_FLIGHT, OnEnd, Shared, StreamFence, Way, Work, lost, move_run, sum_of};
use crate::{DeviceError, Done};

/// The queue.
pub(super) struct Queue {
    line: Arc<Line>,
    thread: Option<JoinHandle<()>>,
}

struct Line {
    shared: Arc<Shared>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    works: VecDeque<(Work, OnEnd)>,
    /// One is being carried out.
    busy: bool,
    closed: bool,
}

impl Queue {
    pub(super) fn start(way: Way, shared: Arc<Shared>) -> Result<Self, DeviceError> {
        let line = Arc::new(Line { shared, state: Mutex::default(), changed: Condvar::new() });
        let of_thread = Arc::clone(&line);
        let thread = std::thread::Builder::new().name(format!("twin-{}", way.name()));
        let thread = thread.spawn(move || of_thread.work());
        let thread = thread.map_err(|e| DeviceError::Absent { why: format!("no thread for the twin: {e}") })?;
        Ok(Self { line, thread: Some(thread) })
    }

    pub(super) fn push(&self, work: Work, on_end: OnEnd) -> Result<(), DeviceError> {
        let mut state = self.line.state.lock();
        if state.works.len() + usize::from(state.busy) >= MAX_IN_FLIGHT {
            return Err(DeviceError::Busy);
        }
        state.works.push_back((work, on_end));
        self.line.changed.notify_one();
        Ok(())
    }
}

impl Drop for Queue {
    /// What was submitted is carried out first.
    fn drop(&mut self) {
        self.line.state.lock().closed = true;
        self.line.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

impl Line {
    fn work(&self) {
        while let Some((work, on_end)) = self.next() {
            let end = self.carry_out(&work);
            drop(work);
            self.state.lock().busy = false;
            // A panic of whoever is told is not the end of the queue.
            drop(catch_unwind(AssertUnwindSafe(|| on_end(end))));
        }
    }

    fn next(&self) -> Option<(Work, OnEnd)> {
        let mut state = self.state.lock();
        loop {
            if let Some(next) = state.works.pop_front() {
                state.busy = true;
                return Some(next);
            }
            if state.closed {
                return None;
            }
            self.changed.wait(&mut state);
        }
    }

    fn carry_out(&self, work: &Work) -> Result<Done, DeviceError> {
        if let Some(fence) = &work.after {
            fence.get::<StreamFence>()?.wait();
        }
        let flip = {
            let mut faults = self.shared.faults.lock();
            while faults.stalled {
                self.shared.changed.wait(&mut faults);
            }
            if faults.lost {
                return Err(lost());
            }
            if faults.fail_next > 0 {
                faults.fail_next -= 1;
                return Err(DeviceError::Call { call: "copy", code: 719, name: "told to fail".to_owned() });
            }
            let flip = faults.flip_next > 0;
            faults.flip_next -= usize::from(flip);
            flip
        };
        for (index, run) in work.runs.iter().enumerate() {
            move_run(run, flip && index == 0);
        }
        Ok(Done { sums: work.sums.iter().map(|spans| sum_of(spans)).collect() })
    }
}
