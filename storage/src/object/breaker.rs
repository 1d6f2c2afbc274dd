//! A circuit breaker: while a store is known to be dead, nobody waits for it.
//!
//! Closed: calls go through. A call whose retries are exhausted opens it; then every call fails at once, until a probe by
//! the background task (see [`super::packer`]) gets an answer. No caller ever serves as the probe, but where calls are rare
//! or nobody waits for them ([`Breaker::probed_by_calls`]).

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::store::StorageError;

/// Whether one kind of call (reads, writes or deletions) is worth trying.
#[derive(Debug)]
pub(super) struct Breaker {
    what: &'static str,
    pause: Duration,
    /// Whether calls go through once it is time to probe.
    calls_probe: bool,
    /// When to probe next; `None` while closed.
    probe_at: Mutex<Option<Instant>>,
    /// The probing task, woken when the breaker opens.
    wake: Arc<Notify>,
}

impl Breaker {
    /// A closed breaker for calls of a kind, which are tried again `pause` after they failed.
    pub(super) fn new(what: &'static str, pause: Duration, wake: Arc<Notify>) -> Self {
        Self { what, pause, calls_probe: false, probe_at: Mutex::new(None), wake }
    }

    /// As [`Self::new`], for calls that are rare or that nobody waits for: once the pause is over they are the probe.
    pub(super) fn probed_by_calls(what: &'static str, pause: Duration, wake: Arc<Notify>) -> Self {
        Self { calls_probe: true, ..Self::new(what, pause, wake) }
    }

    /// # Errors
    /// [`StorageError::Unavailable`] while it is open; [`is_untried`] tells it from that of a call that was tried.
    pub(super) fn check(&self) -> Result<(), StorageError> {
        match *self.probe_at.lock() {
            Some(at) if !self.calls_probe || at > Instant::now() => Err(StorageError::Unavailable {
                reason: format!("{} fail at once since the store stopped answering", self.what),
                source: Some(Box::new(Untried)),
            }),
            _ => Ok(()),
        }
    }

    /// A call failed for good: calls fail at once from now on.
    pub(super) fn trip(&self) {
        self.open_for(self.pause);
    }

    /// A call failed, and it is not known whether that is the store's fault: calls fail at once until the background task,
    /// which probes now, has an answer.
    pub(super) fn doubt(&self) {
        self.open_for(Duration::ZERO);
    }

    fn open_for(&self, pause: Duration) {
        let was = self.probe_at.lock().replace(Instant::now() + pause);
        if was.is_none() {
            tracing::warn!(what = self.what, ?pause, "the object store does not answer: failing fast");
        }
        self.wake.notify_one();
    }

    /// The store answered.
    pub(super) fn reset(&self) {
        if self.probe_at.lock().take().is_some() {
            tracing::info!(what = self.what, "the object store answers again");
        }
    }

    /// When to probe, `None` while closed.
    pub(super) fn probe_at(&self) -> Option<Instant> {
        *self.probe_at.lock()
    }
}

/// The source of an error that says nothing about the store.
#[derive(Debug, thiserror::Error)]
#[error("it was not asked")]
struct Untried;

/// Whether a call failed because a breaker was open: it was not tried, or not to the end.
pub(super) fn is_untried(error: &StorageError) -> bool {
    matches!(error, StorageError::Unavailable { source: Some(source), .. } if source.is::<Untried>())
}
