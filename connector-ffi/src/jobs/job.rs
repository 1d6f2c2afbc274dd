//! One load or save job: which transfers are claimed, running and over.
//!
//! ```text
//! transfer: unclaimed -> claimed -> begun -> done | corrupt | lost          (a copy thread)
//!           unclaimed | claimed -> lost | cancelled                         (deadline, cancel, close)
//! ```
//! A claimed transfer waits for its extent, and so for the daemon; a begun one for memory only.
//!
//! # Invariants
//! Blocks are touched by begun transfers only. A job is over only when all of its transfers are: from then on nobody touches
//! its blocks.

use std::sync::Arc;
use std::time::Instant;

use kvtier_device::Fence;
use parking_lot::{Condvar, Mutex};

use crate::frame::FrameRef;
use crate::regions::Regions;

/// A frame and the engine's block it is copied to or from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transfer {
    /// The frame.
    pub frame: FrameRef,
    /// The engine's block.
    pub block_id: u32,
}

/// Which way a job copies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// Frames to engine, for a request.
    Load {
        /// The request.
        request_id: String,
    },
    /// Engine to frames.
    Save,
}

/// What became of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// Not over yet.
    Open,
    /// Copied.
    Done,
    /// The frame's bytes are not what was sealed.
    Corrupt,
    /// The frame is gone, or the deadline passed first.
    Lost,
    /// Cancelled before it began.
    Cancelled,
}

impl Fate {
    /// The result byte of the C interface.
    #[must_use]
    pub const fn byte(self) -> u8 {
        match self {
            Self::Open => 0,
            Self::Done => 1,
            Self::Corrupt => 2,
            Self::Lost | Self::Cancelled => 3,
        }
    }
}

/// A job.
#[derive(Debug)]
pub struct Job {
    /// Which way.
    pub kind: Kind,
    /// What.
    pub transfers: Vec<Transfer>,
    /// Where in the engine.
    pub regions: Arc<Regions>,
    /// Attachment under which it was submitted.
    pub epoch: u64,
    /// When transfers stop being begun.
    pub deadline: Instant,
    /// Where engine memory is a device's: what the engine's stream must have done before.
    pub after: Option<Fence>,
    progress: Mutex<Progress>,
    changed: Condvar,
}

#[derive(Debug)]
struct Progress {
    /// The first that is unclaimed.
    next: usize,
    /// Those that are claimed and not over.
    running: usize,
    begun: Vec<bool>,
    fates: Vec<Fate>,
    reported: bool,
}

impl Progress {
    const fn is_over(&self) -> bool {
        self.next == self.fates.len() && self.running == 0
    }

    fn end_unbegun(&mut self, fate: Fate) {
        let next = std::mem::replace(&mut self.next, self.fates.len());
        self.fates[next..].fill(fate);
        for (claimed, begun) in self.fates[..next].iter_mut().zip(&self.begun) {
            if *claimed == Fate::Open && !*begun {
                *claimed = fate;
                self.running -= 1;
            }
        }
    }
}

impl Job {
    /// A job of which nothing has begun.
    #[must_use]
    pub fn new(kind: Kind, transfers: Vec<Transfer>, regions: Arc<Regions>, epoch: u64, deadline: Instant) -> Self {
        let count = transfers.len();
        let progress = Progress {
            next: 0,
            running: 0,
            begun: vec![false; count],
            fates: vec![Fate::Open; count],
            reported: false,
        };
        Self {
            kind,
            transfers,
            regions,
            epoch,
            deadline,
            after: None,
            progress: Mutex::new(progress),
            changed: Condvar::new(),
        }
    }

    /// Claims the next transfer for a copy thread; `None` when there is none, or the deadline has passed.
    pub fn claim(&self, now: Instant) -> Option<usize> {
        let mut progress = self.progress.lock();
        if now >= self.deadline {
            progress.end_unbegun(Fate::Lost);
        }
        if progress.next == progress.fates.len() {
            return None;
        }
        progress.next += 1;
        progress.running += 1;
        Some(progress.next - 1)
    }

    /// Whether a claimed transfer is not over.
    #[must_use]
    pub fn is_open(&self, index: usize) -> bool {
        self.progress.lock().fates[index] == Fate::Open
    }

    /// Begins a claimed transfer. Answers false when it was ended before: then its block must not be touched.
    #[must_use]
    pub fn begin(&self, index: usize) -> bool {
        let mut progress = self.progress.lock();
        let begins = progress.fates[index] == Fate::Open;
        progress.begun[index] = begins;
        begins
    }

    /// A claimed transfer is over; nothing, if it was ended before it began.
    pub fn finish(&self, index: usize, fate: Fate) {
        let mut progress = self.progress.lock();
        if progress.fates[index] != Fate::Open {
            return;
        }
        progress.fates[index] = fate;
        progress.running -= 1;
        if progress.is_over() {
            self.changed.notify_all();
        }
    }

    /// Ends every transfer that has not begun.
    pub fn end_unbegun(&self, fate: Fate) {
        let mut progress = self.progress.lock();
        progress.end_unbegun(fate);
        if progress.is_over() {
            self.changed.notify_all();
        }
    }

    /// Reports the fates of a job that is over, once. Whoever calls this after the job is over returns only when the
    /// report is made, by itself or by another: `report` runs under the job's lock.
    pub fn report_once(&self, report: impl FnOnce(&[Fate])) {
        let mut progress = self.progress.lock();
        if progress.is_over() && !std::mem::replace(&mut progress.reported, true) {
            report(&progress.fates);
        }
    }

    /// Waits until the job is over, at most until `until`; then its fates.
    pub fn wait(&self, until: Instant) -> Option<Vec<Fate>> {
        let mut progress = self.progress.lock();
        loop {
            let now = Instant::now();
            if now >= self.deadline {
                progress.end_unbegun(Fate::Lost);
            }
            if progress.is_over() {
                return Some(progress.fates.clone());
            }
            if now >= until {
                return None;
            }
            let wake = if now < self.deadline { until.min(self.deadline) } else { until };
            self.changed.wait_until(&mut progress, wake);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvtier_types::BlockKey;
    use std::time::Duration;

    pub(crate) fn job(transfers: usize, deadline: Instant) -> Job {
        let frame = FrameRef {
            key: BlockKey::new([1; 32]),
            group: 0,
            shard: 0,
            extent: 0,
            source: 2,
            offset: 0,
            bytes: 8192,
            generation: 1,
            checksum: 0,
        };
        let transfers = vec![Transfer { frame, block_id: 0 }; transfers];
        Job::new(Kind::Save, transfers, Arc::new(Regions::default()), 1, deadline)
    }

    #[test]
    fn a_job_is_over_when_its_last_transfer_is() {
        let now = Instant::now();
        let job = job(2, now + Duration::from_secs(60));
        assert_eq!(job.claim(now), Some(0));
        assert_eq!(job.claim(now), Some(1));
        assert_eq!(job.claim(now), None);
        job.finish(1, Fate::Done);
        assert_eq!(job.wait(now), None);
        let mut reports = 0;
        job.report_once(|_| reports += 1);
        assert_eq!(reports, 0);
        job.finish(0, Fate::Corrupt);
        assert_eq!(job.wait(now), Some(vec![Fate::Corrupt, Fate::Done]));
        job.report_once(|_| reports += 1);
        job.report_once(|_| reports += 1);
        assert_eq!(reports, 1);
    }

    #[test]
    fn cancelling_ends_what_has_not_begun_and_waits_for_what_has() {
        let now = Instant::now();
        let job = job(3, now + Duration::from_secs(60));
        assert_eq!((job.claim(now), job.claim(now)), (Some(0), Some(1)));
        assert!(job.begin(0));
        job.end_unbegun(Fate::Cancelled);
        assert_eq!(job.claim(now), None);
        assert_eq!(job.wait(now), None, "the first transfer is still running");
        assert!(job.is_open(0) && !job.is_open(1) && !job.begin(1), "the second was claimed and had not begun");
        job.finish(1, Fate::Lost);
        job.finish(0, Fate::Done);
        assert_eq!(job.wait(now), Some(vec![Fate::Done, Fate::Cancelled, Fate::Cancelled]));
    }

    #[test]
    fn nothing_begins_after_the_deadline_even_if_no_thread_looks() {
        let now = Instant::now();
        let late = job(2, now);
        assert_eq!(late.claim(now), None);
        assert_eq!(late.wait(now), Some(vec![Fate::Lost; 2]));
        let soon = job(2, now + Duration::from_millis(20));
        soon.claim(now);
        assert_eq!(soon.wait(now + Duration::from_secs(60)), Some(vec![Fate::Lost; 2]), "the waiter ends it");
    }

    #[test]
    fn a_job_without_transfers_is_over_at_once() {
        let now = Instant::now();
        assert_eq!(job(0, now + Duration::from_secs(1)).wait(now), Some(Vec::new()));
    }
}
