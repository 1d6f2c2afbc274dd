//! [`BlockIo`] over io_uring: one thread owns the ring; callers reach it by a bounded channel and an eventfd.
//!
//! *Invariants*: a submission's user data is the index of its slot, or [`WAKE`] for the poll of the eventfd. A slot, with
//! the transfer and the iovecs that the kernel reads, is emptied only by its completion. If the thread unwinds, or the
//! ring fails with transfers in flight, the slots are leaked rather than freed under the kernel.
#![expect(unsafe_code, reason = "submissions hand raw addresses to the kernel")]

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc as std_mpsc;
use std::thread;

use async_trait::async_trait;
use io_uring::{IoUring, opcode, squeue, types};
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};
use tokio::sync::{mpsc, oneshot};

use super::{BlockIo, DROP_WAIT, Direction, Finished, Job, QUEUE_TRANSFERS, Transfer};

/// User data of the poll that a caller's wake-up completes.
const WAKE: u64 = u64::MAX;
/// Most transfers in the kernel: beyond that, latency grows and bandwidth does not.
const MAX_DEPTH: u32 = 256;

/// Handle of the ring's thread. Dropping it lets the transfers that were taken on end.
#[derive(Debug)]
pub(crate) struct Uring {
    jobs: Option<mpsc::Sender<Job>>,
    wake: Arc<OwnedFd>,
    /// Disconnects when the thread has ended.
    ended: Mutex<std_mpsc::Receiver<()>>,
    depth: u32,
}

impl Uring {
    /// Starts the thread and waits until it has its ring.
    ///
    /// # Errors
    /// What the kernel says where io_uring is absent or barred (`ENOSYS`, `EPERM`, `ENOMEM`).
    pub(crate) fn start(depth: u32) -> io::Result<Self> {
        let depth = depth.min(MAX_DEPTH);
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (jobs, queue) = mpsc::channel(QUEUE_TRANSFERS);
        let (ready_in, ready) = std_mpsc::channel();
        let (running, ended) = std_mpsc::channel::<()>();
        let thread_wake = Arc::clone(&wake);
        thread::Builder::new().name("kvtier-uring".into()).spawn(move || {
            let _running = running;
            // The ring is made by the thread that submits to it: SINGLE_ISSUER demands that.
            match build_ring(depth) {
                Ok(ring) => {
                    if ready_in.send(Ok(())).is_ok() {
                        Ring::new(ring, queue, thread_wake, depth).work();
                    }
                }
                Err(error) => drop(ready_in.send(Err(error))),
            }
        })?;
        ready.recv().map_err(|_| io::Error::other("the io_uring thread ended at its start"))??;
        Ok(Self { jobs: Some(jobs), wake, ended: Mutex::new(ended), depth })
    }

    fn wake(&self) {
        // Fails only when the counter is full, and then the thread is awake.
        let _full = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        self.jobs = None;
        self.wake();
        // Disconnected is the normal end; a timeout leaves the thread, which owns what the kernel still uses.
        let _ended = self.ended.lock().recv_timeout(DROP_WAIT);
    }
}

#[async_trait]
impl BlockIo for Uring {
    async fn run(&self, transfer: Transfer) -> Finished {
        let (reply, finished) = oneshot::channel();
        let Some(jobs) = &self.jobs else { return Finished::engine_closed(transfer) };
        match jobs.send(Job { transfer, reply }).await {
            Ok(()) => {
                self.wake();
                finished.await.unwrap_or_else(|_| Finished::engine_died())
            }
            Err(mpsc::error::SendError(job)) => Finished::engine_closed(job.transfer),
        }
    }

    fn describe(&self) -> String {
        format!("io_uring of depth {}", self.depth)
    }
}

fn build_ring(depth: u32) -> io::Result<IoUring> {
    // One entry more for the poll of the eventfd.
    let entries = (depth + 1).next_power_of_two();
    let mut builder = IoUring::builder();
    builder.setup_single_issuer().setup_coop_taskrun().dontfork();
    // Kernels before 6.0 do not know the flags.
    builder.build(entries).or_else(|_| IoUring::builder().dontfork().build(entries))
}

/// A transfer in the kernel.
struct Slot {
    transfer: Transfer,
    /// Read by the kernel until completion; its heap memory does not move with the slot.
    iovecs: Vec<libc::iovec>,
    reply: oneshot::Sender<Finished>,
}

/// State of the ring's thread.
struct Ring {
    ring: IoUring,
    queue: mpsc::Receiver<Job>,
    wake: Arc<OwnedFd>,
    /// Never dropped unless all are empty: see the invariants.
    slots: ManuallyDrop<Vec<Option<Slot>>>,
    free: Vec<usize>,
    closing: bool,
}

impl Ring {
    fn new(ring: IoUring, queue: mpsc::Receiver<Job>, wake: Arc<OwnedFd>, depth: u32) -> Self {
        let slots = (0..depth).map(|_| None).collect::<Vec<_>>();
        let free = (0..slots.len()).collect();
        Self { ring, queue, wake, slots: ManuallyDrop::new(slots), free, closing: false }
    }

    fn work(mut self) {
        self.arm_wake();
        loop {
            self.take_jobs();
            if self.closing && self.free.len() == self.slots.len() {
                break;
            }
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if is_passing(&error) => {}
                Err(error) => {
                    // Transfers in the kernel are leaked with their slots; their callers see a closed reply, as do the
                    // waiting ones when the queue is dropped.
                    tracing::error!(%error, "io_uring failed: this disk takes no more transfers");
                    self.abandon_replies();
                    return;
                }
            }
            self.reap();
        }
        ManuallyDrop::into_inner(self.slots);
    }

    fn take_jobs(&mut self) {
        while !self.closing && !self.free.is_empty() {
            match self.queue.try_recv() {
                Ok(Job { transfer, reply }) => {
                    let Some(index) = self.free.pop() else { return };
                    self.slots[index] = Some(Slot { transfer, iovecs: Vec::new(), reply });
                    self.submit(index);
                }
                Err(mpsc::error::TryRecvError::Empty) => return,
                Err(mpsc::error::TryRecvError::Disconnected) => self.closing = true,
            }
        }
    }

    /// Queues what is left of a slot's transfer.
    fn submit(&mut self, index: usize) {
        let Some(slot) = &mut self.slots[index] else { return };
        slot.iovecs = slot.transfer.iovecs();
        let fd = types::Fd(slot.transfer.file.as_raw_fd());
        let (position, base) = (slot.transfer.position(), slot.iovecs.as_ptr());
        let count = u32::try_from(slot.iovecs.len()).expect("a transfer has a handful of parts");
        let entry = match slot.transfer.direction {
            Direction::Read => opcode::Readv::new(fd, base, count).offset(position).build(),
            Direction::Write => opcode::Writev::new(fd, base, count).offset(position).build(),
        };
        self.push(&entry.user_data(index as u64));
    }

    fn arm_wake(&mut self) {
        let events = u32::from(libc::POLLIN.cast_unsigned());
        let entry = opcode::PollAdd::new(types::Fd(self.wake.as_raw_fd()), events).build();
        self.push(&entry.user_data(WAKE));
    }

    fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: the file, the iovecs and the buffers of a transfer belong to a slot that is emptied by the completion
        // only; the eventfd belongs to `self`, which outlives the ring's use.
        let pushed = unsafe { self.ring.submission().push(entry) };
        pushed.expect("the queue has an entry for every slot and one for the wake-up, each queued at most once");
    }

    fn reap(&mut self) {
        let completions: Vec<(u64, i32)> = self.ring.completion().map(|c| (c.user_data(), c.result())).collect();
        for (user_data, result) in completions {
            if user_data == WAKE {
                let mut counter = [0; 8];
                // Empty when a wake-up was already counted: the channel is looked at anyway.
                let _empty = rustix::io::read(&self.wake, &mut counter);
                if !self.closing {
                    self.arm_wake();
                }
                continue;
            }
            let index = usize::try_from(user_data).expect("user data is a slot's index");
            let Some(slot) = &mut self.slots[index] else { continue };
            let returned = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
            match slot.transfer.advance(returned) {
                None => self.submit(index),
                Some(result) => {
                    if let Some(Slot { transfer, reply, .. }) = self.slots[index].take() {
                        // Whoever waited may have gone: then the buffers end here.
                        let _unclaimed = reply.send(transfer.finish(result));
                    }
                    self.free.push(index);
                }
            }
        }
    }

    /// Tells everyone who waits for a transfer in the kernel that it is lost, and keeps what it owns.
    fn abandon_replies(&mut self) {
        for slot in self.slots.iter_mut().flatten() {
            let (closed, _) = oneshot::channel();
            drop(std::mem::replace(&mut slot.reply, closed));
        }
    }
}

/// Whether `submit_and_wait` may just be called again.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock | io::ErrorKind::ResourceBusy)
}
