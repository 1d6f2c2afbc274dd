//! [`BlockIo`] over a pool of threads that call `preadv` and `pwritev`: works everywhere, costs more CPU per byte.
#![expect(unsafe_code, reason = "vectored system calls on buffers that are raw memory shared with other processes")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc as std_mpsc;
use std::thread;

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use super::{BlockIo, DROP_WAIT, Direction, Finished, Job, QUEUE_TRANSFERS, Transfer};

/// Most threads: a device's bandwidth is reached well before.
const MAX_THREADS: u32 = 8;

/// The pool. Dropping it lets the transfers that were taken on end.
#[derive(Debug)]
pub(crate) struct Threads {
    jobs: Option<mpsc::Sender<Job>>,
    /// Disconnects when the last thread has ended.
    ended: Mutex<std_mpsc::Receiver<()>>,
    threads: u32,
}

impl Threads {
    pub(crate) fn start(depth: u32) -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel(QUEUE_TRANSFERS);
        let queue = Arc::new(Mutex::new(queue));
        let (running, ended) = std_mpsc::channel();
        let threads = depth.min(MAX_THREADS);
        for n in 0..threads {
            let (queue, running) = (Arc::clone(&queue), running.clone());
            thread::Builder::new().name(format!("kvtier-disk-{n}")).spawn(move || work(&queue, running))?;
        }
        Ok(Self { jobs: Some(jobs), ended: Mutex::new(ended), threads })
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.jobs = None;
        // Disconnected is the normal end; a timeout leaves the threads, which own what they still use.
        let _ended = self.ended.lock().recv_timeout(DROP_WAIT);
    }
}

#[async_trait]
impl BlockIo for Threads {
    async fn run(&self, transfer: Transfer) -> Finished {
        let (reply, finished) = oneshot::channel();
        let Some(jobs) = &self.jobs else { return Finished::engine_closed(transfer) };
        match jobs.send(Job { transfer, reply }).await {
            Ok(()) => finished.await.unwrap_or_else(|_| Finished::engine_died()),
            Err(mpsc::error::SendError(job)) => Finished::engine_closed(job.transfer),
        }
    }

    fn describe(&self) -> String {
        format!("{} threads", self.threads)
    }
}

fn work(queue: &Mutex<mpsc::Receiver<Job>>, _running: std_mpsc::Sender<()>) {
    loop {
        // One thread waits in the channel, the others for the lock: that is the pool's queue.
        let Some(Job { mut transfer, reply }) = queue.lock().blocking_recv() else { return };
        let result = loop {
            let returned = call(&mut transfer);
            if let Some(result) = transfer.advance(returned) {
                break result;
            }
        };
        // Whoever waited may have gone: then the buffers end here.
        let _unclaimed = reply.send(transfer.finish(result));
    }
}

/// One system call on what is left of the transfer.
fn call(transfer: &mut Transfer) -> io::Result<usize> {
    let iovecs = transfer.iovecs();
    let position = libc::off_t::try_from(transfer.position()).map_err(io::Error::other)?;
    let count = libc::c_int::try_from(iovecs.len()).map_err(io::Error::other)?;
    let fd = File::as_raw_fd(&transfer.file);
    let returned = match transfer.direction {
        // SAFETY: the iovecs describe memory that the transfer, borrowed mutably for the length of the call, owns.
        Direction::Read => unsafe { libc::preadv(fd, iovecs.as_ptr(), count, position) },
        // SAFETY: as above.
        Direction::Write => unsafe { libc::pwritev(fd, iovecs.as_ptr(), count, position) },
    };
    usize::try_from(returned).map_err(|_| io::Error::last_os_error())
}
