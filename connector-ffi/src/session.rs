//! A session: one process of an engine attached to the node's daemon. Safe; the C interface wraps it.
//!
//! # Invariants
//! - No call waits for the daemon but [`Session::wait_job`] and [`Session::close`], both within the caller's bound.
//! - A daemon that is absent, slow or restarted looks like misses.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvtier_memory::plan::Region;
use parking_lot::Mutex;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::watch;

use crate::counters::Counters;
use crate::device::DeviceSide;
use crate::error::Error;
use crate::frame::FrameRef;
use crate::hints::{HintTable, Hints, OutcomesPoll};
use crate::jobs::job::{Kind, Transfer};
use crate::jobs::{JobPoll, Jobs};
use crate::link::LinkState;
use crate::lookup::table::Settlement;
use crate::lookup::{FramesPoll, HitPoll, Lookups, Query};
use crate::regions::Regions;
use crate::report::Reports;
use crate::reserve::table::TicketPoll;
use crate::reserve::{Reservations, Reserve};
use crate::shared::Shared;
use crate::spec::{Spec, bounded};
use crate::{attach, report};

/// Threads of the hidden runtime: one for calls, one for the rest.
const RUNTIME_THREADS: usize = 2;
/// What closing the runtime may take when the caller's time is used up.
const MIN_SHUTDOWN: Duration = Duration::from_millis(20);
/// What closing the runtime may take at most: its tasks only wait for sockets, and are dropped there.
const MAX_SHUTDOWN: Duration = Duration::from_secs(1);

/// An open session.
#[derive(Debug)]
pub struct Session {
    shared: Arc<Shared>,
    lookups: Arc<Lookups>,
    reservations: Arc<Reservations>,
    hints: Arc<HintTable>,
    jobs: Jobs,
    handle: Handle,
    runtime: Mutex<Option<Runtime>>,
    stop: watch::Sender<bool>,
}

impl Session {
    /// Opens a session at once; attaching goes on in the background.
    ///
    /// # Errors
    /// [`Error::Io`] when threads, or the engine's device, cannot be had.
    pub fn open(spec: Spec) -> Result<Self, Error> {
        let counters = Arc::new(Counters::default());
        let (reports, queue) = Reports::new(Arc::clone(&counters));
        let (max_inflight, patience) = (spec.max_inflight, spec.call_timeout);
        let device = spec.device.map(DeviceSide::open).transpose()?.map(Arc::new);
        let shared = Arc::new(Shared::new(spec, device, (counters, reports)));
        let runtime = Builder::new_multi_thread()
            .worker_threads(RUNTIME_THREADS)
            .thread_name("kvtier-runtime")
            .enable_all()
            .build()
            .map_err(|e| Error::io("runtime", &e))?;
        let jobs = Jobs::start(&shared)?;
        let (stop, stopped) = watch::channel(false);
        runtime.spawn(report::run(Arc::clone(&shared), queue));
        runtime.spawn(report::releases::run(Arc::clone(&shared)));
        runtime.spawn(attach::run(Arc::clone(&shared), stopped));
        Ok(Self {
            shared,
            lookups: Arc::new(Lookups::new(max_inflight)),
            reservations: Arc::new(Reservations::new(max_inflight, patience)),
            hints: Arc::new(HintTable::new(max_inflight)),
            jobs,
            handle: runtime.handle().clone(),
            runtime: Mutex::new(Some(runtime)),
            stop,
        })
    }

    /// Whether there is a daemon, with the reason or the daemon's notes.
    #[must_use]
    pub fn state(&self) -> (LinkState, String) {
        self.shared.link.state()
    }

    /// Moves the engine to another namespace revision. From the return on, keys are the new ones, lookups answer zero,
    /// tickets are busy and jobs begin no further copy; the daemon is told in the background.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a text that is too long.
    pub fn switch_namespace(&self, revision: &str) -> Result<(), Error> {
        bounded("revision", revision)?;
        self.shared.switch_revision(revision);
        self.lookups.void_all(&self.shared);
        self.reservations.clear(&self.shared);
        self.jobs.cancel_all();
        Ok(())
    }

    /// Submits a lookup.
    ///
    /// # Errors
    /// [`Error::Limit`].
    pub fn submit_lookup(&self, query: Query) -> Result<(), Error> {
        self.lookups.submit(&self.shared, &self.handle, query)
    }

    /// What is known of a lookup, given what the engine has computed by now and wants at most.
    #[must_use]
    pub fn poll_lookup(&self, request_id: &str, computed_tokens: u32, max_tokens: u32) -> HitPoll {
        self.lookups.poll(&self.shared, request_id, computed_tokens, max_tokens)
    }

    /// Frames of an answered lookup for blocks of one group and shard.
    #[must_use]
    pub fn lookup_frames(&self, request_id: &str, group_shard: (u32, u32), blocks: std::ops::Range<u32>) -> FramesPoll {
        self.lookups.frames(&self.shared, request_id, group_shard, blocks)
    }

    /// Ends a request. Answers false when its lookup is unknown.
    pub fn release(&self, request_id: &str, settlement: Settlement) -> bool {
        self.lookups.release(&self.shared, request_id, settlement)
    }

    /// Hands on what a request's client said.
    ///
    /// # Errors
    /// [`Error::Limit`].
    pub fn submit_hints(&self, hints: Hints) -> Result<(), Error> {
        self.hints.submit(&self.shared, &self.handle, hints)
    }

    /// What became of a request's hints.
    #[must_use]
    pub fn poll_hints(&self, request_id: &str) -> OutcomesPoll {
        self.hints.poll(request_id)
    }

    /// Nobody asks for a request's outcomes anymore.
    pub fn forget_hints(&self, request_id: &str) {
        self.hints.forget(request_id);
    }

    /// Submits a reservation; answers its ticket.
    ///
    /// # Errors
    /// [`Error::Limit`], [`Error::InvalidArgument`].
    pub fn submit_reserve(&self, reserve: Reserve) -> Result<u64, Error> {
        self.reservations.submit(&self.shared, &self.handle, reserve)
    }

    /// What is known of a ticket.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`] when the answer has more than `frame_capacity` frames.
    pub fn poll_reserve(&self, ticket: u64, frame_capacity: usize) -> Result<TicketPoll, Error> {
        self.reservations.poll(&self.shared, ticket, frame_capacity)
    }

    /// Gives granted frames up.
    pub fn abandon(&self, frames: &[FrameRef]) {
        if let Some(epoch) = self.shared.link.epoch() {
            self.shared.reports.abandon(epoch, frames);
        }
    }

    /// Registers the engine's memory.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`].
    pub fn register_regions(&self, regions: &[(u32, Region)]) -> Result<(), Error> {
        self.jobs.register(Regions::new(&self.shared.spec.layout, regions)?);
        Ok(())
    }

    /// Submits a job with a deadline, after what a stream of the engine's was given so far; answers its number.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`], [`Error::Limit`].
    pub fn submit_job(&self, kind: Kind, transfers: Vec<Transfer>, terms: (Duration, u64)) -> Result<u64, Error> {
        self.jobs.submit(kind, transfers, terms)
    }

    /// Waits for a job, at most `timeout`.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`] when it has more than `capacity` transfers.
    pub fn wait_job(&self, job: u64, timeout: Duration, capacity: usize) -> Result<JobPoll, Error> {
        self.jobs.wait(job, timeout, capacity)
    }

    /// Begins no further transfer of a job. Answers false when it is unknown.
    pub fn cancel_job(&self, job: u64) -> bool {
        self.jobs.cancel(job)
    }

    /// The session's counters as JSON.
    #[must_use]
    pub fn counters(&self) -> String {
        self.shared.counters.to_json()
    }

    /// Closes the session: started copies end, reservations are given back and reports are told, the latter two within
    /// `deadline`. When this returns, nothing here touches engine memory anymore.
    pub fn close(&self, deadline: Duration) {
        let until = Instant::now() + deadline;
        self.jobs.close();
        self.reservations.clear(&self.shared);
        let Some(runtime) = self.runtime.lock().take() else { return };
        if self.shared.link.epoch().is_some() {
            // A daemon that does not take the reports in time reaps what they were about.
            drop(runtime.block_on(async { tokio::time::timeout(deadline, self.shared.reports.flush()).await }));
        }
        self.stop.send_replace(true);
        runtime.shutdown_timeout(until.saturating_duration_since(Instant::now()).clamp(MIN_SHUTDOWN, MAX_SHUTDOWN));
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.close(Duration::ZERO);
    }
}
