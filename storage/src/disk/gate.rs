//! Who is inside: the operations of a disk tier that have not ended, so that closing can wait for them and the
//! directory's lock outlives them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::io::Direction;
use crate::lock::DirLock;
use crate::store::StorageError;

/// Counts the operations that have not ended, and holds the directory's lock for them.
#[derive(Debug)]
pub(crate) struct Gate {
    closed: AtomicBool,
    writes: AtomicU64,
    reads: AtomicU64,
    /// Signalled when an operation ends.
    ended: Notify,
    lock: Mutex<Option<DirLock>>,
}

/// One operation, until the kernel is done with it.
pub(crate) struct Ticket {
    gate: Arc<Gate>,
    direction: Direction,
}

impl Gate {
    pub(crate) fn new(lock: DirLock) -> Self {
        Self {
            closed: AtomicBool::new(false),
            writes: AtomicU64::new(0),
            reads: AtomicU64::new(0),
            ended: Notify::new(),
            lock: Mutex::new(Some(lock)),
        }
    }

    /// Lets no more operations in.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    /// Lets another process have the directory.
    pub(crate) fn unlock(&self) {
        *self.lock.lock() = None;
    }

    /// Writes that have not ended.
    pub(crate) fn pending_writes(&self) -> u64 {
        self.writes.load(Ordering::SeqCst)
    }

    const fn count(&self, direction: Direction) -> &AtomicU64 {
        match direction {
            Direction::Read => &self.reads,
            Direction::Write => &self.writes,
        }
    }

    /// Counts an operation.
    ///
    /// # Errors
    /// [`StorageError::Closed`] once [`Self::close`] was called.
    pub(crate) fn enter(self: &Arc<Self>, direction: Direction) -> Result<Ticket, StorageError> {
        // Counted before the flag is looked at: a closer that sees no operation after setting it has waited for all.
        self.count(direction).fetch_add(1, Ordering::SeqCst);
        let ticket = Ticket { gate: Arc::clone(self), direction };
        if self.closed.load(Ordering::SeqCst) { Err(StorageError::Closed) } else { Ok(ticket) }
    }

    /// Waits until no operation is left.
    pub(crate) async fn idle(&self) {
        loop {
            let ended = self.ended.notified();
            if self.reads.load(Ordering::SeqCst) + self.writes.load(Ordering::SeqCst) == 0 {
                return;
            }
            ended.await;
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.gate.count(self.direction).fetch_sub(1, Ordering::SeqCst);
        self.gate.ended.notify_waiters();
    }
}
