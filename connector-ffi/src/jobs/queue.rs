//! Jobs that wait for copy threads: loads and saves in a line each. The lines take turns, transfer by transfer: requests wait
//! for loads, and the engine's next step may wait for a save.
//!
//! *Bounds*: so many threads are at saves at once. On a device a save waits for the engine's step to end, which loads need
//! not wait for.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use super::job::{Job, Kind};

/// Both lines.
#[derive(Debug)]
pub(super) struct Queue {
    loads: VecDeque<Arc<Job>>,
    saves: VecDeque<Arc<Job>>,
    /// The last transfer was given to a load: the next is a save's, if one waits.
    gave_load: bool,
    /// Saves that are being done, and how many may be.
    saving: usize,
    max_saving: usize,
    /// Nothing is given any more.
    pub(super) closed: bool,
}

impl Queue {
    pub(super) fn new(max_saving: usize) -> Self {
        let (loads, saves) = (VecDeque::new(), VecDeque::new());
        Self { loads, saves, gave_load: false, saving: 0, max_saving, closed: false }
    }

    /// Puts a job at the end of its line.
    pub(super) fn push(&mut self, job: Arc<Job>) {
        match job.kind {
            Kind::Load { .. } => self.loads.push_back(job),
            Kind::Save => self.saves.push_back(job),
        }
    }

    /// Claims the next transfer there is. Jobs of which nothing is left to begin leave; `left` has a look at each.
    pub(super) fn claim(&mut self, now: Instant, left: impl Fn(&Job)) -> Option<(Arc<Job>, usize)> {
        for is_load in [!self.gave_load, self.gave_load] {
            if !is_load && self.saving >= self.max_saving {
                continue;
            }
            let line = if is_load { &mut self.loads } else { &mut self.saves };
            while let Some(job) = line.front() {
                if let Some(index) = job.claim(now) {
                    let claimed = (Arc::clone(job), index);
                    self.gave_load = is_load;
                    self.saving += usize::from(!is_load);
                    return Some(claimed);
                }
                if let Some(job) = line.pop_front() {
                    left(&job);
                }
            }
        }
        None
    }

    /// A save that was claimed is over: another may be.
    pub(super) fn saved(&mut self) {
        self.saving -= 1;
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::time::Duration;

    use kvtier_memory::FrameId;

    use super::*;
    use crate::jobs::tests::{load, transfer};
    use crate::regions::Regions;

    fn job(kind: Kind, transfers: usize) -> Arc<Job> {
        let frame = FrameId { extent: 0, offset: 0, bytes: 8192, generation: 1 };
        let deadline = Instant::now() + Duration::from_secs(60);
        let transfers = vec![transfer(frame, 0, 0); transfers];
        Arc::new(Job::new(kind, transfers, Arc::new(Regions::default()), 1, deadline))
    }

    #[test]
    fn a_line_of_loads_starves_no_save() {
        let mut queue = Queue::new(usize::MAX);
        [job(load(), 3), job(load(), 3), job(Kind::Save, 2)].into_iter().for_each(|job| queue.push(job));
        let left = Cell::new(0);
        let now = Instant::now();
        let claim = || queue.claim(now, |_| left.set(left.get() + 1));
        let claimed: Vec<bool> = std::iter::from_fn(claim).map(|(job, _)| job.kind == Kind::Save).collect();
        assert_eq!(claimed, [false, true, false, true, false, false, false, false], "true is a save");
        assert_eq!(left.get(), 3);
    }

    #[test]
    fn saves_leave_threads_to_loads() {
        let mut queue = Queue::new(1);
        [job(Kind::Save, 3), job(load(), 2)].into_iter().for_each(|job| queue.push(job));
        let now = Instant::now();
        let is_save = |queue: &mut Queue| queue.claim(now, |_| {}).map(|(job, _)| job.kind == Kind::Save);
        let first = [(); 4].map(|()| is_save(&mut queue));
        assert_eq!(first, [Some(false), Some(true), Some(false), None], "one save at a time");
        queue.saved();
        assert_eq!(is_save(&mut queue), Some(true));
    }

    #[test]
    fn a_line_of_saves_starves_no_load() {
        let mut queue = Queue::new(usize::MAX);
        [job(Kind::Save, 3), job(load(), 1)].into_iter().for_each(|job| queue.push(job));
        let now = Instant::now();
        let mut next = || queue.claim(now, |_| {}).map(|(job, _)| job.kind == Kind::Save);
        assert_eq!([next(), next(), next(), next(), next()], [Some(false), Some(true), Some(true), Some(true), None]);
    }
}
