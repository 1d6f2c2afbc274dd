//! The way from any thread to the worker's thread: a bounded queue and a descriptor that wakes it.
//!
//! *Invariants*: a command is taken by the worker or refused to its sender; after [`Inbox::close`] all are refused.
//!
//! *Bounds*: [`MAX_COMMANDS`]; a [`Command::Drop`] is always taken, and there is one for each link.
//!
//! *Lock order*: one mutex, a leaf.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::time::Instant;

use kvtier_memory::Extent;
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};
use tokio::sync::oneshot;

use super::job::Job;
use super::link::Connected;
use super::registry::Registered;
use super::wire::Address;
use crate::TransportError;

/// Most commands that wait for the worker's thread.
const MAX_COMMANDS: usize = 8192;

/// What the worker's thread is asked to do.
#[derive(Debug)]
pub(super) enum Command {
    /// Connect to a peer.
    Connect { address: Address, reply: oneshot::Sender<Result<Connected, TransportError>> },
    /// Read from a link's peer.
    Read { link: u64, job: Arc<Job> },
    /// End a link.
    Drop { link: u64 },
    /// Register an extent.
    Register { extent: Arc<Extent>, reply: SyncSender<Result<Arc<Registered>, TransportError>> },
    /// End everything by then, and the thread.
    Close { deadline: Instant },
}

/// The queue.
#[derive(Debug)]
pub(super) struct Inbox {
    /// `None` once the worker has ended.
    commands: Mutex<Option<VecDeque<Command>>>,
    /// The worker sleeps or is about to: wake it.
    sleeping: AtomicBool,
    /// Some read was given up, or some exposure dropped: the worker should look.
    noticed: AtomicBool,
    wake: OwnedFd,
}

impl Inbox {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self {
            commands: Mutex::new(Some(VecDeque::new())),
            sleeping: AtomicBool::new(false),
            noticed: AtomicBool::new(false),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// Queues a command. It comes back when there is no room or the worker has ended.
    pub(super) fn send(&self, command: Command) -> Result<(), Refused> {
        {
            let mut commands = self.commands.lock();
            let Some(queue) = commands.as_mut() else { return Err(Refused::Closed) };
            let always = matches!(command, Command::Drop { .. } | Command::Close { .. });
            if queue.len() >= MAX_COMMANDS && !always {
                return Err(Refused::Full);
            }
            queue.push_back(command);
        }
        self.wake();
        Ok(())
    }

    /// Asks the worker to look at what was given up.
    pub(super) fn notice(&self) {
        self.noticed.store(true, Ordering::SeqCst);
        self.wake();
    }

    fn wake(&self) {
        if self.sleeping.swap(false, Ordering::SeqCst) {
            // It can only fail when its counter is full, and then the worker wakes anyway.
            let _full = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
        }
    }

    /// Takes all commands, in order.
    pub(super) fn take(&self) -> VecDeque<Command> {
        self.commands.lock().as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Whether [`Self::notice`] was called since the last call.
    pub(super) fn take_noticed(&self) -> bool {
        self.noticed.load(Ordering::Relaxed) && self.noticed.swap(false, Ordering::SeqCst)
    }

    /// Announces that the worker is going to sleep. False if it should not, because there is something to do.
    pub(super) fn start_sleep(&self) -> bool {
        self.sleeping.store(true, Ordering::SeqCst);
        let idle =
            !self.noticed.load(Ordering::SeqCst) && self.commands.lock().as_ref().is_some_and(VecDeque::is_empty);
        if !idle {
            self.sleeping.store(false, Ordering::SeqCst);
        }
        idle
    }

    /// The worker is awake again.
    pub(super) fn end_sleep(&self) {
        self.sleeping.store(false, Ordering::SeqCst);
        let mut count = [0_u8; 8];
        // It fails when nobody wrote, which is as good.
        let _empty = rustix::io::read(&self.wake, &mut count);
    }

    /// Readable when the worker should wake.
    pub(super) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Refuses commands from now on; returns those that were not taken.
    pub(super) fn close(&self) -> VecDeque<Command> {
        self.commands.lock().take().unwrap_or_default()
    }
}

/// Why a command was not queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    /// There are [`MAX_COMMANDS`] already.
    Full,
    /// The transport was closed.
    Closed,
}

impl From<Refused> for TransportError {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Full => Self::Limit { what: "commands to UCX", max: MAX_COMMANDS },
            Refused::Closed => Self::LinkDown { source: None },
        }
    }
}
