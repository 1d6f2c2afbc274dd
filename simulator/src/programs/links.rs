//! Links: bytes go one job after another; what a request waits for goes before what nobody waits for yet.

use std::collections::VecDeque;
use std::time::Duration;

use kvtier_types::Instant;

use super::engine::seconds;

/// A transfer on a link.
#[derive(Debug, Clone, Copy)]
struct Job {
    id: u32,
    left: Duration,
}

/// One direction of a bus, disk or network interface.
#[derive(Debug)]
pub(crate) struct Link {
    bytes_per_second: f64,
    latency: Duration,
    /// Waited for, and speculative.
    lines: [VecDeque<Job>; 2],
    current: Option<(usize, Job, Instant)>,
    /// Time to carry all that waits in each line.
    queued: [Duration; 2],
    pub(crate) busy: Duration,
}

impl Link {
    pub(crate) fn new(bytes_per_second: f64, latency: Duration) -> Self {
        let lines = [VecDeque::new(), VecDeque::new()];
        Self { bytes_per_second, latency, lines, current: None, queued: [Duration::ZERO; 2], busy: Duration::ZERO }
    }

    /// What so many bytes take, once it is their turn.
    pub(crate) fn time(&self, bytes: u64) -> Duration {
        self.latency + seconds(bytes as f64 / self.bytes_per_second)
    }

    /// When bytes that are waited for would be there.
    pub(crate) fn wait(&self, bytes: u64) -> Duration {
        let current = self.current.filter(|(line, ..)| *line == 0).map_or(Duration::ZERO, |(_, job, _)| job.left);
        self.queued[0] + current + self.time(bytes)
    }

    /// Puts a transfer in line.
    pub(crate) fn push(&mut self, now: Instant, id: u32, bytes: u64, speculative: bool) {
        let line = usize::from(speculative);
        let job = Job { id, left: self.time(bytes) };
        self.lines[line].push_back(job);
        self.queued[line] += job.left;
        if !speculative && let Some((1, mut job, since)) = self.current {
            let carried = now.since(since);
            job.left = job.left.saturating_sub(carried);
            self.busy += carried;
            self.lines[1].push_front(job);
            self.queued[1] += job.left;
            self.current = None;
        }
        self.begin(now);
    }

    /// A speculative transfer that somebody waits for now.
    pub(crate) fn hasten(&mut self, id: u32) {
        let Some(at) = self.lines[1].iter().position(|job| job.id == id) else { return };
        let job = self.lines[1].remove(at).expect("it is there");
        self.queued[1] = self.queued[1].saturating_sub(job.left);
        self.queued[0] += job.left;
        self.lines[0].push_back(job);
    }

    fn begin(&mut self, now: Instant) {
        if self.current.is_none() {
            let Some(line) = (0..2).find(|line| !self.lines[*line].is_empty()) else { return };
            let job = self.lines[line].pop_front().expect("it is not empty");
            self.queued[line] = self.queued[line].saturating_sub(job.left);
            self.current = Some((line, job, now));
        }
    }

    /// When the transfer under way ends.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.current.map(|(_, job, since)| since + job.left)
    }

    /// The transfer under way has ended, if this is when it does.
    pub(crate) fn finish(&mut self, now: Instant) -> Option<u32> {
        let (_, job, since) = self.current?;
        if since + job.left > now {
            return None;
        }
        self.busy += job.left;
        self.current = None;
        self.begin(now);
        Some(job.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_waited_for_goes_first() {
        let mut link = Link::new(1e9, Duration::ZERO);
        let at = |millis| Instant::ZERO + Duration::from_millis(millis);
        link.push(at(0), 1, 1_000_000_000, true);
        assert_eq!(link.next(), Some(at(1000)));
        link.push(at(400), 2, 100_000_000, false);
        assert_eq!(link.next(), Some(at(500)), "the speculative one is set aside");
        assert_eq!(link.finish(at(500)), Some(2));
        assert_eq!(link.next(), Some(at(1100)), "and goes on where it was");
        assert_eq!(link.finish(at(1000)), None);
        assert_eq!(link.finish(at(1100)), Some(1));
        assert_eq!((link.next(), link.busy), (None, Duration::from_millis(1100)));
    }
}
