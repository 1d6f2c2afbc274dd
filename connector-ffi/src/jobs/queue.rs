//! Jobs that wait for copy threads: loads and saves in a line each. The lines take turns, transfer by transfer: requests wait
//! for loads, and the engine's next step may wait for a save.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use super::job::{Job, Kind};

/// Both lines.
#[derive(Debug, Default)]
pub(super) struct Queue {
    loads: VecDeque<Arc<Job>>,
    saves: VecDeque<Arc<Job>>,
    /// The last transfer was given to a load: the next is a save's, if one waits.
    gave_load: bool,
    /// Nothing is given any more.
    pub(super) closed: bool,
}

impl Queue {
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
            let line = if is_load { &mut self.loads } else { &mut self.saves };
            while let Some(job) = line.front() {
                if let Some(index) = job.claim(now) {
                    let claimed = (Arc::clone(job), index);
                    self.gave_load = is_load;
                    return Some(claimed);
                }
                if let Some(job) = line.pop_front() {
                    left(&job);
                }
            }
        }
        None
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
        let mut queue = Queue::default();
        [job(load(), 3), job(load(), 3), job(Kind::Save, 2)].into_iter().for_each(|job| queue.push(job));
        let left = Cell::new(0);
        let now = Instant::now();
        let claim = || queue.claim(now, |_| left.set(left.get() + 1));
        let claimed: Vec<bool> = std::iter::from_fn(claim).map(|(job, _)| job.kind == Kind::Save).collect();
        assert_eq!(claimed, [false, true, false, true, false, false, false, false], "true is a save");
        assert_eq!(left.get(), 3);
    }

    #[test]
    fn a_line_of_saves_starves_no_load() {
        let mut queue = Queue::default();
        [job(Kind::Save, 3), job(load(), 1)].into_iter().for_each(|job| queue.push(job));
        let now = Instant::now();
        let mut next = || queue.claim(now, |_| {}).map(|(job, _)| job.kind == Kind::Save);
        assert_eq!([next(), next(), next(), next(), next()], [Some(false), Some(true), Some(true), Some(true), None]);
    }
}
