//! The object store behind deadlines, retries and circuit breakers: only PUT, ranged GET, LIST and DELETE are used.
//!
//! *Bounds*: a call ends within its deadline; an attempt within `attempt_timeout`; between attempts it waits
//! `first_backoff * 2^n`, at most `max_backoff`, without jitter (one daemon writes below one prefix, so there is no herd
//! to spread). The client library's own retries are off.

use std::fmt;
use std::future::Future;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use object_store::path::Path;
use object_store::{GetOptions, ObjectMeta, ObjectStore, ObjectStoreExt, PutPayload};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::breaker::Breaker;
use super::config::RetryPolicy;
use crate::store::StorageError;

/// An object store that answers or fails in bounded time.
pub(super) struct Remote {
    store: Arc<dyn ObjectStore>,
    retry: RetryPolicy,
    /// Breaker of GET and LIST.
    pub(super) reads: Breaker,
    /// Breaker of PUT. Apart from that of reads: a store whose quota is used up can still be read.
    pub(super) writes: Breaker,
    /// Breaker of DELETE. Apart from that of PUT: credentials that may not delete may well store.
    pub(super) deletes: Breaker,
}

impl fmt::Debug for Remote {
    /// Without the client, which knows secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Remote({})", self.store)
    }
}

/// One call: what it is and which permission it takes in S3 (for messages), whose breaker it obeys, and until when it may
/// try.
struct Call<'a> {
    action: &'static str,
    permission: &'static str,
    path: &'a Path,
    breaker: &'a Breaker,
    deadline: Duration,
}

/// Why a call did not succeed.
enum Failed {
    /// There is no such object.
    Missing,
    /// Its breaker is open.
    Untried(StorageError),
    /// Trying again cannot help before an operator does something.
    Denied(StorageError),
    /// There was no answer, or errors only, as long as it might try.
    Exhausted(StorageError),
}

impl Remote {
    /// `wake` is notified when a breaker opens.
    pub(super) fn new(store: Arc<dyn ObjectStore>, retry: RetryPolicy, wake: &Arc<Notify>) -> Self {
        let breaker = |what| Breaker::new(what, retry.fail_fast, Arc::clone(wake));
        let deletes = Breaker::probed_by_calls("deletions", retry.fail_fast, Arc::clone(wake));
        Self { store, retry, reads: breaker("reads"), writes: breaker("writes"), deletes }
    }

    /// For who stores rarely, and has no task that probes writes: the next write is the probe.
    pub(super) fn of_a_reader(store: Arc<dyn ObjectStore>, retry: RetryPolicy, wake: &Arc<Notify>) -> Self {
        let writes = Breaker::probed_by_calls("writes", retry.fail_fast, Arc::clone(wake));
        Self { writes, ..Self::new(store, retry, wake) }
    }

    /// Stores an object. One that is there already under this name is the same one.
    pub(super) async fn put(&self, path: &Path, payload: PutPayload) -> Result<(), StorageError> {
        let deadline = self.retry.write_deadline;
        let call = Call { action: "PUT", permission: "s3:PutObject", path, breaker: &self.writes, deadline };
        let put = self.retried(&call, || async {
            match self.store.put(path, payload.clone()).await {
                Ok(_) | Err(object_store::Error::AlreadyExists { .. }) => Ok(()),
                Err(error) => Err(error),
            }
        });
        put.await.map_err(|failed| match failed {
            Failed::Untried(error) => error,
            Failed::Denied(error) | Failed::Exhausted(error) => {
                self.writes.trip();
                error
            }
            // Nothing can be missing but the bucket or the directory.
            Failed::Missing => {
                self.writes.trip();
                StorageError::Unavailable { reason: format!("PUT {path}: no such bucket"), source: None }
            }
        })
    }

    /// Reads a range of an object; shorter when the object ends within it, empty when it ends before. One object that
    /// cannot be read, or may not (it was archived), says nothing about others: reads go on while LIST answers.
    ///
    /// # Errors
    /// [`StorageError::NotFound`] when there is no such object; [`StorageError::Unavailable`].
    pub(super) async fn get(&self, path: &Path, range: Range<u64>) -> Result<Bytes, StorageError> {
        let deadline = self.retry.read_deadline;
        let call = Call { action: "GET", permission: "s3:GetObject", path, breaker: &self.reads, deadline };
        let end = Instant::now() + deadline;
        match self.retried(&call, || self.get_once(path, range.clone())).await {
            Ok(bytes) => Ok(bytes),
            Err(Failed::Missing) => Err(StorageError::NotFound),
            Err(Failed::Untried(error) | Failed::Denied(error)) => Err(error),
            Err(Failed::Exhausted(error)) => {
                self.judge_reads(path, end).await;
                Err(error)
            }
        }
    }

    /// A GET failed for good: opens the breaker of reads unless LIST answers before `end`.
    async fn judge_reads(&self, path: &Path, end: Instant) {
        if self.reads.check().is_err() {
            return;
        }
        let left = end.saturating_duration_since(Instant::now());
        match timeout(left, self.list_once(path, limited(1))).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) => self.reads.trip(),
            Err(_elapsed) => self.reads.doubt(),
        }
    }

    /// An object that ends before the range is an error to every store, in words of its own. Unlike a store that does not
    /// answer it must not trip the breaker: others write these objects.
    async fn get_once(&self, path: &Path, range: Range<u64>) -> Result<Bytes, object_store::Error> {
        let start = range.start;
        match self.store.get_range(path, range).await {
            Err(error @ object_store::Error::Generic { .. }) => {
                // The body is not read.
                let whole = self.store.get_opts(path, GetOptions::default()).await;
                if whole.is_ok_and(|whole| whole.meta.size <= start) { Ok(Bytes::new()) } else { Err(error) }
            }
            other => other,
        }
    }

    /// Deletes an object, which may be gone already.
    pub(super) async fn delete(&self, path: &Path) -> Result<(), StorageError> {
        let deadline = self.retry.write_deadline;
        let call = Call { action: "DELETE", permission: "s3:DeleteObject", path, breaker: &self.deletes, deadline };
        match self.retried(&call, || self.store.delete(path)).await {
            Ok(()) | Err(Failed::Missing) => Ok(()),
            Err(Failed::Untried(error)) => Err(error),
            Err(Failed::Denied(error) | Failed::Exhausted(error)) => {
                self.deletes.trip();
                Err(error)
            }
        }
    }

    /// Lists at most `limit` objects below `prefix`, and says whether there were more. Pages are bounded by
    /// `attempt_timeout` each; the caller bounds the whole.
    pub(super) async fn list(&self, prefix: &Path, limit: usize) -> Result<(Vec<ObjectMeta>, bool), StorageError> {
        self.fold_list(prefix, limited(limit)).await
    }

    /// Lists the objects below `prefix` into a `T`, which begins anew with every attempt, until `take` breaks. Bounded as
    /// [`Self::list`].
    pub(super) async fn fold_list<T: Default>(
        &self,
        prefix: &Path,
        mut take: impl FnMut(&mut T, ObjectMeta) -> ControlFlow<()>,
    ) -> Result<T, StorageError> {
        let mut attempt = 0;
        loop {
            self.reads.check()?;
            match self.list_once(prefix, &mut take).await {
                Ok(found) => {
                    self.reads.reset();
                    return Ok(found);
                }
                Err(error) => {
                    attempt += 1;
                    if attempt >= self.retry.attempts {
                        self.reads.trip();
                        return Err(unavailable(format!("LIST {prefix}, {attempt} attempts"), Some(error)));
                    }
                    sleep(self.retry.backoff(attempt)).await;
                }
            }
        }
    }

    async fn list_once<T: Default>(
        &self,
        prefix: &Path,
        mut take: impl FnMut(&mut T, ObjectMeta) -> ControlFlow<()>,
    ) -> Result<T, object_store::Error> {
        let mut pages = self.store.list(Some(prefix));
        let mut found = T::default();
        while let Some(next) = self.attempt(pages.next()).await? {
            if take(&mut found, next?).is_break() {
                break;
            }
        }
        Ok(found)
    }

    /// Probes reads when their breaker is open and its time has come, for who never stores; never returns. `wake` is what
    /// [`Self::new`] was given.
    pub(super) async fn keep_probing_reads(&self, wake: &Notify, nowhere: &Path) {
        loop {
            let next = self.reads.probe_at();
            tokio::select! {
                () = wake.notified() => {}
                () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
            }
            if self.reads.probe_at().is_some_and(|at| at <= Instant::now()) {
                self.probe_reads(nowhere).await;
            }
        }
    }

    /// Asks the store for something harmless, past the breaker, which the answer sets. Returns whether there was one.
    pub(super) async fn probe_reads(&self, nowhere: &Path) -> bool {
        let answers = self.list_once(nowhere, limited(1)).await.is_ok();
        if answers {
            self.reads.reset();
        } else {
            self.reads.trip();
        }
        answers
    }

    /// Writes an empty object, past the breaker, which the answer sets.
    pub(super) async fn probe_writes(&self, path: &Path) {
        let put = async { Ok::<_, object_store::Error>(self.store.put(path, PutPayload::new()).await) };
        match self.attempt(put).await {
            Ok(Ok(Ok(_))) => self.writes.reset(),
            _ => self.writes.trip(),
        }
    }

    async fn attempt<T>(&self, call: impl Future<Output = T>) -> Result<T, object_store::Error> {
        timeout(self.retry.attempt_timeout, call)
            .await
            .map_err(|elapsed| object_store::Error::Generic { store: "kvtier", source: Box::new(elapsed) })
    }

    /// Tries until there is an answer. Resets the breaker, but leaves it to the caller to trip it.
    async fn retried<T, F>(&self, call: &Call<'_>, make: impl Fn() -> F) -> Result<T, Failed>
    where
        F: Future<Output = Result<T, object_store::Error>>,
    {
        let end = Instant::now() + call.deadline;
        let mut attempt = 0;
        loop {
            call.breaker.check().map_err(Failed::Untried)?;
            let left = end.saturating_duration_since(Instant::now()).min(self.retry.attempt_timeout);
            let error = match timeout(left, make()).await {
                Ok(Ok(value)) => {
                    call.breaker.reset();
                    return Ok(value);
                }
                Ok(Err(object_store::Error::NotFound { .. })) => {
                    call.breaker.reset();
                    return Err(Failed::Missing);
                }
                Ok(Err(error)) => Some(error),
                Err(_elapsed) => None,
            };
            attempt += 1;
            if error.as_ref().is_some_and(is_denied) {
                let reason = format!("{} {}, which takes {}", call.action, call.path, call.permission);
                return Err(Failed::Denied(unavailable(reason, error)));
            }
            let pause = self.retry.backoff(attempt);
            if attempt >= self.retry.attempts || Instant::now() + pause >= end {
                let reason = format!("{} {}, {attempt} attempts", call.action, call.path);
                return Err(Failed::Exhausted(unavailable(reason, error)));
            }
            sleep(pause).await;
        }
    }
}

/// Collects objects, and says whether there were more than `limit`.
fn limited(limit: usize) -> impl FnMut(&mut (Vec<ObjectMeta>, bool), ObjectMeta) -> ControlFlow<()> {
    move |(found, more), object| {
        if found.len() == limit {
            *more = true;
            return ControlFlow::Break(());
        }
        found.push(object);
        ControlFlow::Continue(())
    }
}

/// Whether trying again cannot help before an operator does something.
fn is_denied(error: &object_store::Error) -> bool {
    matches!(error, object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. })
}

fn unavailable(reason: String, error: Option<object_store::Error>) -> StorageError {
    match error {
        Some(error) => {
            StorageError::Unavailable { reason: format!("{reason}: {error}"), source: Some(Box::new(error)) }
        }
        None => StorageError::Unavailable { reason: format!("{reason}: timed out"), source: None },
    }
}
