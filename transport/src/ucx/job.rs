//! One read, shared by the future that awaits it and the worker's thread that does it.
//!
//! *Invariants*: the buffer is given back only when no operation holds it. A read that is given up while operations are in
//! flight, or while the worker makes its checksum, gives back fresh heap memory of the same length instead, because what UCX
//! was given may still be written; that goes back to its owner when UCX has returned it, or the endpoint was closed by force.
//!
//! *Cancellation*: dropping the future gives the read up.
//!
//! *Lock order*: each mutex is a leaf.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Instant;

use futures::task::AtomicWaker;
use kvtier_memory::IoBuf;
use kvtier_memory::checksum::EMPTY;
use parking_lot::Mutex;

use super::inbox::Inbox;
use super::raw::Landing;
use super::stats::Counters;
use super::wire::Place;
use crate::{ReadDone, ReadTerms, TransportError};

/// Bytes whose checksum a reader computes before other tasks of its thread get their turn: some 40 us of it.
const STEP_BYTES: usize = 1 << 20;

/// The checksum of a read's first bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sum {
    checksum: u64,
    /// How many these are.
    pub(super) bytes: usize,
}

impl Sum {
    pub(super) const fn new() -> Self {
        Self { checksum: EMPTY, bytes: 0 }
    }
}

/// A read.
#[derive(Debug)]
pub(super) struct Job {
    /// What is read.
    pub(super) place: Place,
    /// Bytes.
    pub(super) len: usize,
    /// When its reader stops waiting.
    pub(super) deadline: Instant,
    landing: Mutex<Option<Arc<Landing>>>,
    given_up: AtomicBool,
    /// How it ended; what the worker did not checksum is left to the reader.
    end: Mutex<Option<Result<Sum, TransportError>>>,
    reader: AtomicWaker,
}

impl Job {
    /// A read of what lies at `place` into a buffer of the same length.
    pub(super) fn new(place: Place, into: IoBuf, deadline: Instant) -> Self {
        let len = into.len();
        Self {
            place,
            len,
            deadline,
            landing: Mutex::new(Some(Arc::new(Landing::new(into)))),
            given_up: AtomicBool::new(false),
            end: Mutex::new(None),
            reader: AtomicWaker::new(),
        }
    }

    /// The buffer, for an operation; `None` once the read was given up.
    pub(super) fn landing(&self) -> Option<Arc<Landing>> {
        self.landing.lock().clone()
    }

    /// Whether nobody waits for it any more.
    pub(super) fn is_given_up(&self) -> bool {
        self.given_up.load(Ordering::Acquire)
    }

    /// Checksums the next `len` bytes, which have arrived; none once the read was given up.
    pub(super) fn add_to(&self, sum: &mut Sum, len: usize) {
        if let Some(landing) = self.landing() {
            sum.checksum = landing.checksum(sum.checksum, sum.bytes, len);
            sum.bytes += len;
        }
    }

    /// All bytes arrived from a peer that was still there after: it ended well. No operation holds the buffer any more.
    pub(super) fn confirm(&self, sum: Sum) {
        self.end(Ok(sum));
    }

    /// It failed.
    pub(super) fn fail(&self, failure: TransportError) {
        self.end(Err(failure));
    }

    fn end(&self, end: Result<Sum, TransportError>) {
        self.end.lock().get_or_insert(end);
        self.reader.wake();
    }

    /// Waits for its end, and checksums what is left to it.
    async fn follow(&self) -> Result<u64, TransportError> {
        let mut sum = poll_fn(|context| {
            self.reader.register(context.waker());
            self.end.lock().take().map_or(Poll::Pending, Poll::Ready)
        })
        .await?;
        while sum.bytes < self.len {
            let step = STEP_BYTES.min(self.len - sum.bytes);
            self.add_to(&mut sum, step);
            tokio::task::yield_now().await;
        }
        Ok(sum.checksum)
    }

    /// The buffer, or one like it while operations hold it.
    fn take_back(&self) -> IoBuf {
        let landing = self.landing.lock().take();
        landing.and_then(Arc::into_inner).map_or_else(|| IoBuf::heap(self.len), Landing::into_inner)
    }
}

/// Counts a read when its future is done with it, and gives it up unless it ended well.
struct Following {
    job: Arc<Job>,
    inbox: Arc<Inbox>,
    counters: Arc<Counters>,
    well: bool,
}

impl Drop for Following {
    fn drop(&mut self) {
        self.counters.count_read(self.well.then_some(self.job.len as u64));
        if !self.well {
            self.job.landing.lock().take();
            self.job.given_up.store(true, Ordering::Release);
            self.inbox.notice();
        }
    }
}

/// Waits for a read that the worker has, by the terms it was asked for. Dropping what it answers gives the read up, even
/// if it was never polled.
pub(super) fn follow(
    job: Arc<Job>,
    inbox: Arc<Inbox>,
    counters: Arc<Counters>,
    terms: ReadTerms,
) -> impl Future<Output = ReadDone> {
    let following = Following { job, inbox, counters, well: false };
    async move {
        // Taken whole: a capture of single fields would leave its `Drop` behind.
        let mut following = following;
        let job = Arc::clone(&following.job);
        let result = tokio::select! {
            biased;
            result = job.follow() => result,
            () = terms.cancel.cancelled() => Err(TransportError::Cancelled),
            () = tokio::time::sleep_until(terms.deadline) => Err(TransportError::Deadline),
        };
        following.well = result.is_ok();
        ReadDone { into: job.take_back(), result }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::payload;
    use bytes::Bytes;
    use kvtier_memory::checksum::checksum;

    #[tokio::test]
    async fn a_reader_checksums_what_the_worker_left() {
        let bytes = payload(7, 3 * STEP_BYTES + 5);
        for summed in [0, 1, STEP_BYTES, bytes.len() - 1, bytes.len()] {
            let mut into = IoBuf::heap(bytes.len());
            into.copy_in(&bytes);
            let place = Place { token: [0; 16], address: 0, len: bytes.len() as u64, key: Bytes::new() };
            let job = Job::new(place, into, Instant::now());
            let mut sum = Sum::new();
            job.add_to(&mut sum, summed);
            job.confirm(sum);
            job.fail(TransportError::Gone);
            assert_eq!(
                job.follow().await.unwrap(),
                checksum(&bytes),
                "{summed} bytes were summed, and the first end counts"
            );
        }
    }
}
