//! A circuit breaker: while a store is known to be dead, nobody waits for it.
//!
//! Closed: calls go through. A call whose retries are exhausted opens it; then every call fails at once, until a probe by
//! the background task (see [`super::packer`]) gets an answer. No caller ever serves as the probe.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::store::StorageError;

/// Whether one kind of call (reads or writes) is worth trying.
#[derive(Debug)]
pub(super) struct Breaker {
    what: &'static str,
    pause: Duration,
    /// When to probe next; `None` while closed.
    probe_at: Mutex<Option<Instant>>,
    /// The probing task, woken when the breaker opens.
    wake: Arc<Notify>,
}

impl Breaker {
    /// A closed breaker for calls of a kind, which are tried again `pause` after they failed.
    pub(super) fn new(what: &'static str, pause: Duration, wake: Arc<Notify>) -> Self {
        Self { what, pause, probe_at: Mutex::new(None), wake }
    }

    /// # Errors
    /// [`StorageError::Unavailable`] while it is open.
    pub(super) fn check(&self) -> Result<(), StorageError> {
        match *self.probe_at.lock() {
            None => Ok(()),
            Some(_) => Err(StorageError::Unavailable {
                reason: format!("{} fail at once since the store stopped answering", self.what),
                source: None,
            }),
        }
    }

    /// A call failed for good: calls fail at once from now on.
    pub(super) fn trip(&self) {
        let was = self.probe_at.lock().replace(Instant::now() + self.pause);
        if was.is_none() {
            tracing::warn!(what = self.what, pause = ?self.pause, "the object store does not answer: failing fast");
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
