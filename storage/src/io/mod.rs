//! [`BlockIo`]: moves whole buffers between memory and files; io_uring, or a thread pool where io_uring is barred.
//!
//! *Invariants*: a [`Transfer`] owns its buffers, its file and what else must outlive it until the kernel is done with
//! them; a future that is dropped leaves them with the engine. Short transfers are continued, never returned.
//! *Bounds*: [`QUEUE_TRANSFERS`] waiting transfers, `depth` in the kernel. What a caller may have outstanding in bytes is
//! its own business.

mod threads;
mod uring;

use std::any::Any;
use std::fmt::{self, Debug};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kvtier_memory::IoBuf;
use tokio::sync::oneshot;

use crate::disk::record::PAGE_BYTES;

/// Transfers that wait for the engine's thread; callers wait beyond that.
pub(crate) const QUEUE_TRANSFERS: usize = 64;
/// Times that an interrupted or refused-for-now transfer is tried again without progress.
const MAX_IDLE_RETRIES: u32 = 64;
/// How long dropping an engine waits for the transfers in the kernel.
const DROP_WAIT: Duration = Duration::from_secs(10);

/// Which engine to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IoEngine {
    /// io_uring, and threads (with a note) where it is not to be had.
    #[default]
    Auto,
    /// io_uring or nothing.
    Uring,
    /// A pool of threads that call `preadv` and `pwritev`.
    Threads,
}

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Read,
    Write,
}

/// The first `len` bytes of a buffer.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) buf: IoBuf,
    pub(crate) len: usize,
}

/// One contiguous range of a file, from or into several buffers.
pub(crate) struct Transfer {
    pub(crate) file: Arc<File>,
    pub(crate) direction: Direction,
    /// Where the range starts in the file.
    pub(crate) offset: u64,
    pub(crate) parts: Vec<Part>,
    /// Dropped when the kernel is done and whoever waits has taken the result (or gone).
    pub(crate) keep: Option<Box<dyn Any + Send>>,
    done: usize,
    idle_retries: u32,
}

impl Debug for Transfer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transfer")
            .field("direction", &self.direction)
            .field("offset", &self.offset)
            .field("bytes", &self.bytes())
            .field("done", &self.done)
            .finish_non_exhaustive()
    }
}

/// A transfer that ended, with everything it owned.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) result: io::Result<()>,
    /// Empty when the engine died with the transfer in the kernel.
    pub(crate) parts: Vec<Part>,
    pub(crate) keep: Option<Box<dyn Any + Send>>,
}

/// An engine that moves buffers.
#[async_trait]
pub(crate) trait BlockIo: Send + Sync + Debug {
    /// Moves all of the transfer, or fails. After a failed write, any part of the range may have been written.
    async fn run(&self, transfer: Transfer) -> Finished;

    /// Which engine this is, for logs and `doctor`.
    fn describe(&self) -> String;
}

impl Transfer {
    pub(crate) fn new(file: Arc<File>, direction: Direction, offset: u64, parts: Vec<Part>) -> Self {
        for part in &parts {
            assert!(part.len <= part.buf.capacity(), "a part lies within its buffer");
        }
        Self { file, direction, offset, parts, keep: None, done: 0, idle_retries: 0 }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.parts.iter().map(|part| part.len).sum()
    }

    /// File offset at which what is left begins.
    fn position(&self) -> u64 {
        self.offset + self.done as u64
    }

    /// Addresses of what is left, valid while the transfer lives and its parts are not touched.
    fn iovecs(&mut self) -> Vec<libc::iovec> {
        let mut skip = self.done;
        let mut out = Vec::with_capacity(self.parts.len());
        for part in &mut self.parts {
            let skipped = skip.min(part.len);
            skip -= skipped;
            if skipped < part.len {
                let iov_base = part.buf.as_mut_ptr().wrapping_add(skipped).cast();
                out.push(libc::iovec { iov_base, iov_len: part.len - skipped });
            }
        }
        out
    }

    /// Takes in what the kernel returned: bytes moved, or an error. `Some` when the transfer has ended.
    fn advance(&mut self, returned: io::Result<usize>) -> Option<io::Result<()>> {
        let moved = match returned {
            Ok(moved) => moved,
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {
                self.idle_retries += 1;
                return (self.idle_retries > MAX_IDLE_RETRIES).then_some(Err(error));
            }
            Err(error) => return Some(Err(error)),
        };
        if self.done + moved >= self.bytes() {
            return Some(Ok(()));
        }
        // Direct I/O continues at a page: a part of a page is moved again.
        let done = (self.done + moved) / PAGE_BYTES * PAGE_BYTES;
        if done <= self.done {
            return Some(Err(match self.direction {
                Direction::Read => io::Error::new(io::ErrorKind::UnexpectedEof, "the file ends before the range"),
                Direction::Write => io::Error::new(io::ErrorKind::WriteZero, "the device takes no more bytes"),
            }));
        }
        self.done = done;
        self.idle_retries = 0;
        None
    }

    fn finish(self, result: io::Result<()>) -> Finished {
        Finished { result, parts: self.parts, keep: self.keep }
    }
}

/// A transfer on its way to an engine's thread.
#[derive(Debug)]
struct Job {
    transfer: Transfer,
    reply: oneshot::Sender<Finished>,
}

impl Finished {
    fn engine_died() -> Self {
        let error = io::Error::other("the I/O engine died with the transfer in flight");
        Self { result: Err(error), parts: Vec::new(), keep: None }
    }

    fn engine_closed(transfer: Transfer) -> Self {
        transfer.finish(Err(io::Error::other("the I/O engine has stopped")))
    }
}

/// Starts an engine. The notes say what was asked for and could not be had.
///
/// # Errors
/// The system's error when the engine asked for cannot be had, or no thread can be started.
pub(crate) fn start(engine: IoEngine, depth: u32) -> io::Result<(Arc<dyn BlockIo>, Vec<String>)> {
    let depth = depth.max(1);
    let refused = match engine {
        IoEngine::Threads => None,
        IoEngine::Auto | IoEngine::Uring => match uring::Uring::start(depth) {
            Ok(uring) => return Ok((Arc::new(uring), Vec::new())),
            Err(error) if engine == IoEngine::Uring => return Err(error),
            Err(error) => Some(format!("io_uring is not available ({error}): using a thread pool")),
        },
    };
    Ok((Arc::new(threads::Threads::start(depth)?), refused.into_iter().collect()))
}

/// An error that means "no space", of whatever kind: the disk's, the quota's, the process's, its open files' or the system's.
pub(crate) fn is_no_space(error: &io::Error) -> bool {
    let space = [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded, io::ErrorKind::FileTooLarge];
    space.contains(&error.kind()) || matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

#[cfg(test)]
mod tests;
