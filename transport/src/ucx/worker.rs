//! The thread that owns a UCX worker: takes commands, starts reads as windows allow, sleeps when there is nothing to do.
//!
//! *Invariants*
//! - A read in flight keeps its link's window until UCX has returned it.
//! - A link that fails ends all its reads; one whose reads do not return by [`GRACE`] after nobody waits for them is closed
//!   by force, which returns them.
//!
//! *Bounds*: [`MAX_LINKS`]; [`MAX_READS`] and `window_bytes` per link; [`MAX_KEYS`] per link.

mod confirm;
mod post;
mod reads;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvtier_memory::Extent;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use self::confirm::Confirming;
use self::reads::{Active, PeerLink};
use super::config::UcxConfig;
use super::inbox::{Command, Inbox};
use super::link::Connected;
use super::raw::{Backing, Endpoint, Failure, Memory, Worker};
use super::registry::{Registered, Registry, name};
use super::stats::Counters;
use super::wire::Address;
use crate::{Kind, TransportError};

/// Most links.
const MAX_LINKS: usize = 1024;
/// Most reads of one link that have not ended.
const MAX_READS: usize = 4096;
/// Most keys of a peer that are kept for the next read: one for each of its extents.
const MAX_KEYS: usize = 1024;
/// How long UCX is polled after it last did something: sleeping and waking costs about as much.
const SPIN: Duration = Duration::from_micros(30);
/// Turns from one look at the clock to the next: some microseconds where a turn with nothing to do makes no system call.
const TURNS: u32 = 64;
/// Most bytes that the thread checksums in one turn: as many as it may start reading for a link. Where the processor moves
/// the bytes (shared memory, sockets) hardly more arrive, and this is the cheapest moment: the cache has them, and nobody has
/// to be woken. A device can bring more than one thread can checksum; the rest is left to those who read.
const TURN_SUM_BYTES: usize = 4 << 20;
/// Longest sleep, so that no lost event is lost for ever.
const MAX_SLEEP: Duration = Duration::from_secs(1);
/// How long reads that nobody waits for may stay in flight before their link is closed by force.
const GRACE: Duration = Duration::from_secs(2);

/// Why a link ends by force.
#[derive(Debug)]
enum Why {
    /// UCX says so.
    Failed(Failure),
    /// Somebody else answers, or nobody.
    Gone,
    /// Its user dropped it.
    Dropped,
    /// Its reads do not return.
    Stuck,
}

impl Why {
    /// What its reads answer.
    fn error(&self) -> TransportError {
        match self {
            Self::Failed(failure) => down(failure.clone()),
            Self::Gone => TransportError::Gone,
            Self::Dropped | Self::Stuck => TransportError::LinkDown { source: None },
        }
    }
}

/// What the thread shares with the rest of the transport.
#[derive(Debug, Clone)]
pub(super) struct Shared {
    pub(super) inbox: Arc<Inbox>,
    pub(super) registry: Arc<Registry>,
    pub(super) counters: Arc<Counters>,
}

/// The thread's state.
#[derive(Debug)]
pub(super) struct Engine {
    worker: Worker,
    shared: Shared,
    config: UcxConfig,
    links: HashMap<u64, PeerLink>,
    /// Reads that have not ended, by the tag of their operations.
    jobs: HashMap<u64, Active>,
    /// What peers read to know that this transport is there.
    greeting: Memory,
    /// Registered extents.
    memories: HashMap<usize, Memory>,
    next_id: u64,
    /// Bytes that may still be checksummed in this turn.
    may_sum: usize,
    /// When something may be due; see [`Self::look`].
    look_at: Instant,
    /// Ends by then.
    closing: Option<Instant>,
}

impl Engine {
    pub(super) fn new(worker: Worker, greeting: Memory, shared: Shared, config: UcxConfig) -> Self {
        Self {
            worker,
            greeting,
            shared,
            config,
            links: HashMap::new(),
            jobs: HashMap::new(),
            memories: HashMap::new(),
            next_id: 0,
            may_sum: 0,
            look_at: Instant::now(),
            closing: None,
        }
    }

    /// Works until it is closed.
    pub(super) fn run(mut self) {
        let mut spin_until = Instant::now();
        loop {
            let worked = (0..TURNS).fold(false, |worked, _| self.turn() || worked);
            let now = Instant::now();
            if worked {
                spin_until = now + SPIN;
            }
            if self.shared.inbox.take_noticed() || now >= self.look_at {
                self.look(now);
            }
            if self.is_over(now) {
                break;
            }
            // UCX refuses to be slept on while it has something to send.
            if now >= spin_until && !self.sleep(now) {
                spin_until = now + SPIN;
            }
        }
        self.end();
    }

    /// Does what there is to do; returns whether there was something.
    fn turn(&mut self) -> bool {
        self.may_sum = TURN_SUM_BYTES;
        let took = self.take_commands();
        let progressed = self.worker.progress();
        let ended = self.take_events();
        let posted = self.post();
        took || progressed || ended || posted
    }

    /// Sleeps until there is something to do; false if there is already.
    fn sleep(&self, now: Instant) -> bool {
        if !self.shared.inbox.start_sleep() {
            return false;
        }
        let armed = self.worker.arm();
        if armed {
            self.wait(self.look_at.saturating_duration_since(now).min(MAX_SLEEP));
        }
        self.shared.inbox.end_sleep();
        armed
    }

    /// Waits for UCX, a command or the timeout.
    fn wait(&self, timeout: Duration) {
        let Ok(event_fd) = self.worker.event_fd() else { return };
        let wake_fd = self.shared.inbox.wake_fd();
        let mut fds =
            [PollFd::from_borrowed_fd(event_fd, PollFlags::IN), PollFd::from_borrowed_fd(wake_fd, PollFlags::IN)];
        let timeout = Timespec::try_from(timeout).expect("sleeps are short");
        // An interruption is a wake like any other.
        let _interrupted = poll(&mut fds, Some(&timeout));
    }

    fn take_commands(&mut self) -> bool {
        let commands = self.shared.inbox.take();
        let some = !commands.is_empty();
        for command in commands {
            match command {
                Command::Connect { address, reply } => {
                    // Nobody waits any more if it fails; the link is dropped with the answer then.
                    if let Err(Ok(unwanted)) = reply.send(self.connect(&address)) {
                        self.drop_link(unwanted.link);
                    }
                }
                Command::Read { link, job } => self.add_job(link, job),
                Command::Drop { link } => self.drop_link(link),
                Command::Register { extent, reply } => {
                    let answer = self.register(&extent);
                    if reply.try_send(answer).is_err() {
                        self.look_at = Instant::now();
                    }
                }
                Command::Close { deadline } => self.close(deadline),
            }
        }
        some
    }

    fn connect(&mut self, address: &Address) -> Result<Connected, TransportError> {
        if self.links.len() >= MAX_LINKS {
            return Err(TransportError::Limit { what: "UCX links", max: MAX_LINKS });
        }
        if self.closing.is_some() {
            return Err(TransportError::LinkDown { source: None });
        }
        self.next_id += 1;
        let link = self.next_id;
        let endpoint = Endpoint::connect(&self.worker, &address.worker, link).map_err(down)?;
        let confirming = Confirming::new(&endpoint, address).map_err(down)?;
        let alive = Arc::new(AtomicBool::new(true));
        self.links.insert(link, PeerLink::new(endpoint, confirming, Arc::clone(&alive)));
        self.shared.counters.links.store(self.links.len() as u64, Ordering::Relaxed);
        Ok(Connected { link, alive })
    }

    fn register(&mut self, extent: &Arc<Extent>) -> Result<Arc<Registered>, TransportError> {
        if let Some(registered) = self.shared.registry.get(extent) {
            return Ok(registered);
        }
        self.shared.registry.check_room()?;
        let unavailable = |failure: Failure| TransportError::Unavailable {
            kind: Kind::Ucx.name(),
            reason: format!(
                "an extent cannot be registered ({failure}); is the limit of locked memory (ulimit -l) too low?"
            ),
        };
        let memory = Memory::register(&self.worker, Backing::Extent(Arc::clone(extent))).map_err(unavailable)?;
        let key = Bytes::from(memory.pack().map_err(unavailable)?);
        let registered = Arc::new(Registered { extent: Arc::clone(extent), key });
        self.memories.insert(name(extent), memory);
        self.shared.registry.add(&registered);
        Ok(registered)
    }

    /// Looks for what is due: reads that were given up, registrations that nobody needs.
    fn look(&mut self, now: Instant) {
        let mut next = now + Duration::from_secs(3600);
        let (expired, due) = self.shared.registry.sweep(now, self.config.registration_linger);
        for registered in expired {
            self.memories.remove(&name(&registered.extent));
        }
        next = due.map_or(next, |due| next.min(due));
        next = next.min(self.closing.unwrap_or(next));
        let stuck = self.give_up(now, &mut next);
        self.look_at = next;
        for link in stuck {
            tracing::warn!(link, "reads do not return: their UCX link is closed by force");
            self.fail_link(link, &Why::Stuck);
        }
    }

    fn close(&mut self, deadline: Instant) {
        self.closing = Some(deadline);
        // Before memory goes: reads that end after this are not confirmed.
        self.greeting.fill(0);
        self.look_at = self.look_at.min(deadline);
        for link in self.links.keys().copied().collect::<Vec<_>>() {
            self.drop_link(link);
        }
    }

    fn is_over(&self, now: Instant) -> bool {
        let Some(deadline) = self.closing else { return false };
        (self.links.is_empty() && self.worker.closing() == 0) || now >= deadline
    }

    /// Refuses what comes too late, and frees what can be freed: what UCX did not return keeps its buffer and the worker.
    fn end(self) {
        for command in self.shared.inbox.close() {
            if let Command::Read { job, .. } = command {
                job.fail(TransportError::LinkDown { source: None });
            }
        }
        for active in self.jobs.values() {
            active.job.fail(TransportError::LinkDown { source: None });
        }
        if !self.links.is_empty() || self.worker.closing() > 0 {
            let (links, closing) = (self.links.len(), self.worker.closing());
            tracing::warn!(links, closing, "UCX did not close in time: its worker is left behind");
        }
        self.shared.registry.clear();
    }
}

/// A UCX error as the end of a link.
fn down(failure: Failure) -> TransportError {
    TransportError::LinkDown { source: Some(std::io::Error::other(failure)) }
}
