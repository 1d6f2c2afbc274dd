//! What is told to the daemon in the background: seals, abandoned frames, results of loads, releases.
//!
//! # Bounds
//! [`QUEUE`] messages wait, and [`ABANDONED`] frames that they give up; what does not fit is dropped and counted: the daemon
//! reaps frames that nobody seals, whoever holds them. A call is tried [`ATTEMPTS`] times, and only in the epoch it belongs
//! to. Releases wait apart from all this and are never dropped while their attachment lives: [`releases`].

pub mod releases;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use kvtier_proto::v1;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};
use tonic::{Code, Status};

use crate::counters::Counters;
use crate::frame::FrameRef;
use crate::link::Attachment;
use crate::shared::Shared;
use releases::{EndedRequest, Releases};

/// Messages that may wait: a few seconds of saves at full speed.
const QUEUE: usize = 16_384;
/// Frames to give up that may wait: those of four of the largest reservations.
const ABANDONED: usize = 1 << 18;
/// Frames of one seal call.
const BATCH: usize = 1024;
/// Time between two calls while only seals of running jobs wait: a call for each block would cost a tenth of the copies'
/// speed where cores are few.
const SEAL_SPACING: Duration = Duration::from_millis(2);
/// Tries for one call.
const ATTEMPTS: u32 = 4;
/// Pause before the second try, doubled each time.
const RETRY_PAUSE: Duration = Duration::from_millis(25);

/// One thing to tell.
#[derive(Debug)]
pub enum Report {
    /// A frame was written.
    Seal {
        /// Attachment in which it was granted.
        epoch: u64,
        /// The frame with its checksum.
        frame: v1::SealedFrame,
    },
    /// Frames are given up.
    Abandon {
        /// Attachment in which they were granted.
        epoch: u64,
        /// The frames.
        frames: Vec<FrameRef>,
    },
    /// A save job is over: its seals wait for no more of them.
    SaveOver,
    /// What became of the loads of a job.
    Loads {
        /// Attachment in which the frames were leased.
        epoch: u64,
        /// The request.
        request_id: String,
        /// The frames.
        frames: Vec<v1::LoadedFrame>,
    },
    /// Answered when everything before it was told.
    Flush(oneshot::Sender<()>),
}

/// The queue's end that everybody holds.
#[derive(Debug)]
pub struct Reports {
    queue: mpsc::Sender<Report>,
    releases: Releases,
    /// Frames that the messages in the queue give up.
    abandoned: AtomicUsize,
    counters: Arc<Counters>,
}

/// The queue's other end.
pub type Queue = mpsc::Receiver<Report>;

impl Reports {
    /// A queue.
    #[must_use]
    pub fn new(counters: Arc<Counters>) -> (Self, Queue) {
        let (queue, receiver) = mpsc::channel(QUEUE);
        (Self { queue, releases: Releases::default(), abandoned: AtomicUsize::new(0), counters }, receiver)
    }

    /// Queues a report, or drops and counts it.
    pub fn push(&self, report: Report) {
        if let Err(error) = self.queue.try_send(report) {
            let report = match error {
                mpsc::error::TrySendError::Full(report) | mpsc::error::TrySendError::Closed(report) => report,
            };
            self.dropped(&report);
        }
    }

    /// Queues the giving up of frames, as one message.
    pub fn abandon(&self, epoch: u64, frames: &[FrameRef]) {
        if frames.is_empty() {
            return;
        }
        let waiting = self.abandoned.fetch_add(frames.len(), Ordering::Relaxed);
        let report = Report::Abandon { epoch, frames: frames.to_vec() };
        if waiting < ABANDONED {
            self.push(report);
        } else {
            self.dropped(&report);
        }
    }

    /// Tells the end of a request, however long it takes.
    pub fn release(&self, ended: EndedRequest) {
        self.releases.push(ended);
    }

    /// Releases that the daemon has not answered yet.
    #[must_use]
    pub fn releases_waiting(&self) -> usize {
        self.releases.count()
    }

    /// Completes when no release of a request waits any more.
    pub async fn released(&self, request_id: &str) {
        self.releases.until(|waiting| waiting.iter().all(|ended| ended.request_id != request_id)).await;
    }

    /// Completes when everything queued so far was told or dropped, and every release there is.
    pub async fn flush(&self) {
        let (sender, told) = oneshot::channel();
        if self.queue.send(Report::Flush(sender)).await.is_ok() {
            // An error means that the background task is gone, and with it all there was to tell.
            drop(told.await);
        }
        self.releases.until(VecDeque::is_empty).await;
    }

    fn dropped(&self, report: &Report) {
        match report {
            Report::Seal { .. } => self.counters.seals_dropped.one(),
            Report::Abandon { frames, .. } => {
                self.abandoned.fetch_sub(frames.len(), Ordering::Relaxed);
                self.counters.seals_dropped.count(frames.len());
            }
            Report::Loads { .. } => self.counters.reports_dropped.one(),
            Report::Flush(_) | Report::SaveOver => {}
        }
    }
}

/// Tells everything that arrives until the queue is closed. Owned by the session's runtime.
pub async fn run(shared: Arc<Shared>, mut queue: Queue) {
    let mut gather_until = Instant::now();
    loop {
        let batch = gather(&mut queue, gather_until).await;
        if batch.is_empty() {
            return;
        }
        tell(&shared, batch).await;
        gather_until = Instant::now() + SEAL_SPACING;
    }
}

/// The next reports, of which seals alone wait for others until `until`; none when the queue is closed.
async fn gather(queue: &mut Queue, until: Instant) -> Vec<Report> {
    let mut batch = Vec::with_capacity(BATCH);
    queue.recv_many(&mut batch, BATCH).await;
    let mut seen = 0;
    while seen < batch.len() && batch[seen..].iter().all(|report| matches!(report, Report::Seal { .. })) {
        seen = batch.len();
        // Full, late and closed all end it: nothing more is received.
        if let Err(_late) = timeout_at(until, queue.recv_many(&mut batch, BATCH - seen)).await {
            break;
        }
    }
    batch
}

async fn tell(shared: &Shared, batch: Vec<Report>) {
    let mut seals: Vec<(u64, v1::SealedFrame)> = Vec::new();
    for report in batch {
        match report {
            Report::Seal { epoch, frame } => seals.push((epoch, frame)),
            Report::Abandon { epoch, frames } => {
                shared.reports.abandoned.fetch_sub(frames.len(), Ordering::Relaxed);
                for chunk in frames.chunks(BATCH) {
                    seals.extend(chunk.iter().map(|frame| (epoch, frame.abandoned())));
                    if seals.len() >= BATCH {
                        send_seals(shared, std::mem::take(&mut seals)).await;
                    }
                }
            }
            Report::SaveOver => {}
            Report::Loads { epoch, request_id, frames } => {
                if send(shared, epoch, Call::Loads(request_id, frames)).await.is_none() {
                    shared.counters.reports_dropped.one();
                }
            }
            Report::Flush(done) => {
                send_seals(shared, std::mem::take(&mut seals)).await;
                // The waiter may have given up.
                let _waiter_gone = done.send(()).is_err();
            }
        }
    }
    send_seals(shared, seals).await;
}

async fn send_seals(shared: &Shared, mut seals: Vec<(u64, v1::SealedFrame)>) {
    while let Some(&(epoch, _)) = seals.first() {
        let same = seals.iter().take(BATCH).take_while(|(other, _)| *other == epoch).count();
        let frames: Vec<_> = seals.drain(..same).map(|(_, frame)| frame).collect();
        let count = frames.len();
        match send(shared, epoch, Call::Seal(frames)).await {
            Some(outcomes) => count_seals(&shared.counters, &outcomes),
            None => shared.counters.seals_dropped.count(count),
        }
    }
}

fn count_seals(counters: &Counters, outcomes: &[i32]) {
    let applied = outcomes.iter().filter(|&&o| o == i32::from(v1::Outcome::Applied)).count();
    counters.seals_applied.count(applied);
    counters.seals_refused.count(outcomes.len() - applied);
}

/// A call without the attachment that it will be made in.
enum Call {
    Seal(Vec<v1::SealedFrame>),
    Loads(String, Vec<v1::LoadedFrame>),
}

impl Call {
    /// Makes the call; the outcomes of seals, nothing of others.
    async fn make(&self, attachment: &Attachment) -> Result<Vec<i32>, Status> {
        let mut client = attachment.client.clone();
        let attachment = attachment.token_bytes();
        match self {
            Self::Seal(frames) => {
                let frames = frames.clone();
                Ok(client.seal(v1::SealRequest { attachment, frames }).await?.into_inner().outcomes)
            }
            Self::Loads(request_id, frames) => {
                let (request_id, frames) = (request_id.clone(), frames.clone());
                client.report_loads(v1::ReportLoadsRequest { attachment, request_id, frames }).await?;
                Ok(Vec::new())
            }
        }
    }
}

/// Calls until it succeeds, fails for good, or the attachment of `epoch` is gone.
async fn send(shared: &Shared, epoch: u64, call: Call) -> Option<Vec<i32>> {
    let mut pause = RETRY_PAUSE;
    for attempt in 1..=ATTEMPTS {
        let attachment = shared.link.current().filter(|a| a.epoch == epoch)?;
        match tokio::time::timeout(shared.spec.call_timeout, call.make(&attachment)).await {
            Ok(Ok(reply)) => return Some(reply),
            Ok(Err(status)) if !is_transient(status.code()) => return None,
            Ok(Err(_)) | Err(_) if attempt == ATTEMPTS => return None,
            Ok(Err(_)) | Err(_) => tokio::time::sleep(pause).await,
        }
        pause *= 2;
    }
    None
}

const fn is_transient(code: Code) -> bool {
    matches!(code, Code::Unavailable | Code::DeadlineExceeded | Code::ResourceExhausted | Code::Aborted)
}

#[cfg(test)]
mod tests {
    use kvtier_types::BlockKey;

    use super::*;

    fn seal() -> Report {
        Report::Seal { epoch: 1, frame: v1::SealedFrame::default() }
    }

    #[tokio::test]
    async fn seals_wait_for_others_until_their_job_is_over() {
        let (reports, mut queue) = Reports::new(Arc::default());
        let (past, far) = (Instant::now(), Instant::now() + Duration::from_secs(3600));
        (0..2).for_each(|_| reports.push(seal()));
        assert_eq!(gather(&mut queue, past).await.len(), 2, "the first of a job go at once");
        reports.push(seal());
        let gathered = tokio::spawn(async move { (gather(&mut queue, far).await, queue) });
        tokio::task::yield_now().await;
        [seal(), Report::SaveOver].into_iter().for_each(|report| reports.push(report));
        let (batch, mut queue) = gathered.await.unwrap();
        assert!(matches!(batch.as_slice(), [Report::Seal { .. }, Report::Seal { .. }, Report::SaveOver]), "{batch:?}");
        (0..=BATCH).for_each(|_| reports.push(seal()));
        assert_eq!(gather(&mut queue, far).await.len(), BATCH, "a full call waits for nothing");
        drop(reports);
        assert_eq!(gather(&mut queue, far).await.len(), 1);
        assert!(gather(&mut queue, far).await.is_empty(), "closed");
    }

    #[tokio::test]
    async fn frames_that_are_given_up_together_are_one_message_and_are_bounded() {
        let (reports, mut queue) = Reports::new(Arc::default());
        let frames = vec![FrameRef::from_wire(BlockKey::new([1; 32]), 0, 0, &v1::Frame::default()); 65_536];
        reports.abandon(1, &[]);
        assert!(queue.is_empty());
        reports.abandon(1, &frames[..3]);
        let message = queue.recv().await;
        assert!(matches!(&message, Some(Report::Abandon { epoch: 1, frames }) if frames.len() == 3), "{message:?}");
        (0..ABANDONED / frames.len()).for_each(|_| reports.abandon(1, &frames));
        assert_eq!(reports.counters.seals_dropped.get(), 0);
        reports.abandon(1, &frames[..5]);
        assert_eq!(reports.counters.seals_dropped.get(), 5);
    }
}
