//! What is told to the daemon in the background: seals, abandoned frames, results of loads, releases.
//!
//! # Bounds
//! [`QUEUE`] messages wait; what does not fit is dropped and counted: unsealed frames are reaped and leases expire with the
//! attachment, so nothing leaks for good. A call is tried [`ATTEMPTS`] times, and only in the epoch it belongs to.

use std::sync::Arc;
use std::time::Duration;

use kvtier_proto::v1;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};
use tonic::{Code, Status};

use crate::counters::Counters;
use crate::frame::FrameRef;
use crate::link::Attachment;
use crate::lookup::table::Settlement;
use crate::shared::Shared;

/// Messages that may wait: a few seconds of saves at full speed.
const QUEUE: usize = 16_384;
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
    /// A frame was written, or is given up.
    Seal {
        /// Attachment in which it was granted.
        epoch: u64,
        /// The frame with its checksum.
        frame: v1::SealedFrame,
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
    /// A request is over.
    Release {
        /// Attachment that holds the lease.
        epoch: u64,
        /// The request.
        request_id: String,
        /// Its tokens.
        settlement: Settlement,
    },
    /// Answered when everything before it was told.
    Flush(oneshot::Sender<()>),
}

/// The queue's end that everybody holds.
#[derive(Debug)]
pub struct Reports {
    queue: mpsc::Sender<Report>,
    counters: Arc<Counters>,
}

/// The queue's other end.
pub type Queue = mpsc::Receiver<Report>;

impl Reports {
    /// A queue.
    #[must_use]
    pub fn new(counters: Arc<Counters>) -> (Self, Queue) {
        let (queue, receiver) = mpsc::channel(QUEUE);
        (Self { queue, counters }, receiver)
    }

    /// Queues a report, or drops and counts it.
    pub fn push(&self, report: Report) {
        if let Err(error) = self.queue.try_send(report) {
            let report = match error {
                mpsc::error::TrySendError::Full(report) | mpsc::error::TrySendError::Closed(report) => report,
            };
            dropped(&self.counters, &report);
        }
    }

    /// Queues the giving up of frames.
    pub fn abandon(&self, epoch: u64, frames: &[FrameRef]) {
        for frame in frames {
            self.push(Report::Seal { epoch, frame: frame.abandoned() });
        }
    }

    /// Completes when everything queued so far was told or dropped.
    pub async fn flush(&self) {
        let (sender, told) = oneshot::channel();
        if self.queue.send(Report::Flush(sender)).await.is_ok() {
            // An error means that the background task is gone, and with it all there was to tell.
            drop(told.await);
        }
    }
}

fn dropped(counters: &Counters, report: &Report) {
    match report {
        Report::Seal { .. } => counters.seals_dropped.one(),
        Report::Loads { .. } | Report::Release { .. } => counters.reports_dropped.one(),
        Report::Flush(_) | Report::SaveOver => {}
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
            Report::SaveOver => {}
            Report::Loads { epoch, request_id, frames } => {
                if send(shared, epoch, Call::Loads(request_id, frames)).await.is_none() {
                    shared.counters.reports_dropped.one();
                }
            }
            Report::Release { epoch, request_id, settlement } => {
                if send(shared, epoch, Call::Release(request_id, settlement)).await.is_none() {
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
        let same = seals.iter().take_while(|(other, _)| *other == epoch).count();
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
    Release(String, Settlement),
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
            Self::Release(request_id, settlement) => {
                let request = v1::ReleaseRequest {
                    attachment,
                    request_id: request_id.clone(),
                    local_tokens: settlement.local_tokens,
                    claimed_tokens: settlement.claimed_tokens,
                    lost_tokens: settlement.lost_tokens,
                };
                client.release(request).await?;
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
}
