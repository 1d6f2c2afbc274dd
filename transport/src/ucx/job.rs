//! One read, shared by the future that awaits it and the worker's thread that does it.
//!
//! *Invariants*: the buffer is given back only when no operation holds it. A read that is given up while operations are in
//! flight gives back fresh heap memory of the same length instead, because what UCX was given may still be written; that
//! goes back to its owner when UCX has returned it, or the endpoint was closed by force.
//!
//! *Cancellation*: dropping the future gives the read up.
//!
//! *Lock order*: each mutex is a leaf.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Instant;

use futures::task::AtomicWaker;
use kvtier_memory::IoBuf;
use kvtier_memory::checksum::{checksum, combine};
use parking_lot::Mutex;

use super::inbox::Inbox;
use super::raw::Landing;
use super::stats::Counters;
use super::wire::Place;
use crate::{ReadDone, ReadTerms, TransportError};

/// Bytes whose checksum is computed before other tasks of the runtime's thread get their turn: some 40 us of it.
const SUM_BYTES: usize = 1 << 20;

/// A block with no more bytes is small: its checksum takes less than waking its reader.
const SMALL_BYTES: usize = 256 << 10;

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
    /// Bytes that arrived, from the start and without a gap.
    arrived: AtomicUsize,
    /// The peer was still there when all of them had.
    confirmed: AtomicBool,
    failure: Mutex<Option<TransportError>>,
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
            arrived: AtomicUsize::new(0),
            confirmed: AtomicBool::new(false),
            failure: Mutex::new(None),
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

    /// The first `bytes` have arrived. When these are all, no operation holds the buffer any more, and the reader of
    /// a small block hears of it with the confirmation.
    pub(super) fn arrive(&self, bytes: usize) {
        self.arrived.store(bytes, Ordering::Release);
        if bytes < self.len || self.len > SMALL_BYTES {
            self.reader.wake();
        }
    }

    /// All bytes arrived from a peer that was still there after: it ended well.
    pub(super) fn confirm(&self) {
        self.confirmed.store(true, Ordering::Release);
        self.reader.wake();
    }

    /// It failed.
    pub(super) fn fail(&self, failure: TransportError) {
        self.failure.lock().get_or_insert(failure);
        self.reader.wake();
    }

    /// Waits for its end, and computes the checksum of what arrives meanwhile.
    async fn follow(&self) -> Result<u64, TransportError> {
        let mut sum = checksum(&[]);
        let mut summed = 0;
        while summed < self.len {
            let arrived = self.until(|| Some(self.arrived.load(Ordering::Acquire)).filter(|all| *all > summed)).await?;
            let Some(landing) = self.landing() else { return Err(TransportError::Cancelled) };
            let part = (arrived - summed).min(SUM_BYTES);
            let of_part = landing.checksum(summed, part);
            sum = if summed == 0 { of_part } else { combine(sum, of_part, part as u64) };
            summed += part;
            if summed < arrived {
                tokio::task::yield_now().await;
            }
        }
        self.until(|| self.confirmed.load(Ordering::Acquire).then_some(sum)).await
    }

    /// Waits until there is what is waited for, or the read failed.
    async fn until<T>(&self, there_is: impl Fn() -> Option<T>) -> Result<T, TransportError> {
        poll_fn(|context| {
            self.reader.register(context.waker());
            if let Some(it) = there_is() {
                return Poll::Ready(Ok(it));
            }
            self.failure.lock().take().map_or(Poll::Pending, |failure| Poll::Ready(Err(failure)))
        })
        .await
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
