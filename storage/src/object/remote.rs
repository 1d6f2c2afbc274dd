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
    /// Breaker of PUT and DELETE. Apart from that of reads: a store whose quota is used up can still be read.
    pub(super) writes: Breaker,
}

impl fmt::Debug for Remote {
    /// Without the client, which knows secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Remote({})", self.store)
    }
}

/// One call: what it is (for messages), whose breaker it obeys, and until when it may try.
struct Call<'a> {
    action: &'static str,
    path: &'a Path,
    breaker: &'a Breaker,
    deadline: Duration,
}

impl Remote {
    /// `wake` is notified when a breaker opens.
    pub(super) fn new(store: Arc<dyn ObjectStore>, retry: RetryPolicy, wake: &Arc<Notify>) -> Self {
        let breaker = |what| Breaker::new(what, retry.fail_fast, Arc::clone(wake));
        Self { store, retry, reads: breaker("reads"), writes: breaker("writes") }
    }

    /// Stores an object. One that is there already under this name is the same one.
    pub(super) async fn put(&self, path: &Path, payload: PutPayload) -> Result<(), StorageError> {
        let call = Call { action: "PUT", path, breaker: &self.writes, deadline: self.retry.write_deadline };
        let put = self.retried(&call, || async {
            match self.store.put(path, payload.clone()).await {
                Ok(_) | Err(object_store::Error::AlreadyExists { .. }) => Ok(()),
                Err(error) => Err(error),
            }
        });
        match put.await {
            // Nothing can be missing but the bucket or the directory.
            Err(StorageError::NotFound) => {
                self.writes.trip();
                Err(StorageError::Unavailable { reason: format!("PUT {path}: no such bucket"), source: None })
            }
            other => other,
        }
    }

    /// Reads a range of an object; shorter when the object ends within it, empty when it ends before.
    ///
    /// # Errors
    /// [`StorageError::NotFound`] when there is no such object; [`StorageError::Unavailable`].
    pub(super) async fn get(&self, path: &Path, range: Range<u64>) -> Result<Bytes, StorageError> {
        let call = Call { action: "GET", path, breaker: &self.reads, deadline: self.retry.read_deadline };
        self.retried(&call, || self.get_once(path, range.clone())).await
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
        let call = Call { action: "DELETE", path, breaker: &self.writes, deadline: self.retry.write_deadline };
        match self.retried(&call, || self.store.delete(path)).await {
            Ok(()) | Err(StorageError::NotFound) => Ok(()),
            Err(error) => Err(error),
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

    /// Probes whichever breaker is open when its time has come; never returns. `wake` is what [`Self::new`] was given.
    pub(super) async fn keep_probing(&self, wake: &Notify, probe: &Path) {
        loop {
            let next = [self.reads.probe_at(), self.writes.probe_at()].into_iter().flatten().min();
            tokio::select! {
                () = wake.notified() => {}
                () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
            }
            let due = |at: Option<Instant>| at.is_some_and(|at| at <= Instant::now());
            if due(self.reads.probe_at()) {
                self.probe_reads(probe).await;
            }
            if due(self.writes.probe_at()) {
                self.probe_writes(probe).await;
            }
        }
    }

    /// Asks the store for something harmless, past the breaker, which the answer sets.
    pub(super) async fn probe_reads(&self, nowhere: &Path) {
        match self.list_once(nowhere, limited(1)).await {
            Ok(_) => self.reads.reset(),
            Err(_) => self.reads.trip(),
        }
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

    async fn retried<T, F>(&self, call: &Call<'_>, make: impl Fn() -> F) -> Result<T, StorageError>
    where
        F: Future<Output = Result<T, object_store::Error>>,
    {
        let end = Instant::now() + call.deadline;
        let mut attempt = 0;
        loop {
            call.breaker.check()?;
            let left = end.saturating_duration_since(Instant::now()).min(self.retry.attempt_timeout);
            let error = match timeout(left, make()).await {
                Ok(Ok(value)) => {
                    call.breaker.reset();
                    return Ok(value);
                }
                Ok(Err(object_store::Error::NotFound { .. })) => {
                    call.breaker.reset();
                    return Err(StorageError::NotFound);
                }
                Ok(Err(error)) => Some(error),
                Err(_elapsed) => None,
            };
            attempt += 1;
            let hopeless = error.as_ref().is_some_and(is_denied);
            let pause = self.retry.backoff(attempt);
            if hopeless || attempt >= self.retry.attempts || Instant::now() + pause >= end {
                call.breaker.trip();
                let reason = format!("{} {}, {attempt} attempts", call.action, call.path);
                return Err(unavailable(reason, error));
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
