//! Load and save jobs on a small pool of native threads.
//!
//! # Invariants
//! - Copies happen inside the gate: once [`Jobs::close`] has shut it, no thread touches engine memory again.
//! - Loads and saves take turns (`a_line_of_loads_starves_no_save`).
//!
//! # Bounds
//! `max_inflight` jobs that nobody has collected yet. A thread waits for the daemon only to map an extent.
//!
//! # Cancellation
//! What has not begun to copy ends at once, also while a thread waits for its extent
//! (`a_transfer_that_waits_for_its_extent_is_cancelled_at_once`).
//!
//! # Lock order
//! queue or gate, then a job's progress, then the report queue; the job table is a leaf.

mod batch;
pub mod job;
mod queue;

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kvtier_memory::fdpass::Access;
use kvtier_proto::v1;
use parking_lot::{Condvar, Mutex, RwLock};

use crate::copying::{self, Copied};
use crate::error::Error;
use crate::extents::{Extents, Mapped, SWEEP_EVERY};
use crate::regions::Regions;
use crate::report::Report;
use crate::shared::Shared;
use job::{Fate, Job, Kind, Transfer};
use queue::Queue;

/// Longest deadline of a job.
pub const MAX_DEADLINE: Duration = Duration::from_secs(600);
/// Most transfers of a job.
pub const MAX_TRANSFERS: usize = 65_536;

/// Copy threads where engine memory is a device's: they wait for it, and while one waits the next batch is made ready, in
/// both directions.
const DEVICE_THREADS: usize = 4;
/// How often an idle thread looks for memory to let go of, where only that of a daemon that is gone can be.
const IDLE_SWEEP_EVERY: Duration = Duration::from_secs(2);
/// How long closing waits for copies that a device has: it has ended them, or will end nothing any more.
const DEVICE_CLOSE: Duration = Duration::from_secs(30);

/// What a wait answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobPoll {
    /// No such job, or it was collected already.
    Unknown,
    /// Not over within the time given.
    Pending,
    /// Over; one fate a transfer. The job is gone.
    Over(Vec<Fate>),
}

/// The jobs of one session.
#[derive(Debug)]
pub struct Jobs {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    shared: Arc<Shared>,
    extents: Extents,
    regions: RwLock<Arc<Regions>>,
    table: Mutex<Table>,
    queue: Mutex<Queue>,
    work: Condvar,
    /// Whether copies may begin; held for reading during a copy.
    gate: RwLock<bool>,
    /// Set before the gate is shut: a device that ends nothing holds the gate open.
    shut: AtomicBool,
}

#[derive(Debug, Default)]
struct Table {
    jobs: HashMap<u64, Arc<Job>>,
    last: u64,
}

impl Jobs {
    /// Starts the copy threads.
    ///
    /// # Errors
    /// [`Error::Io`] when a thread cannot be started.
    pub fn start(shared: &Arc<Shared>) -> Result<Self, Error> {
        let threads = shared.spec.copy_threads;
        let is_device = shared.device.is_some();
        let (threads, saving) = if is_device {
            let threads = threads.max(DEVICE_THREADS);
            (threads, (threads / 2).max(1))
        } else {
            (threads, threads)
        };
        let inner = Arc::new(Inner {
            shared: Arc::clone(shared),
            extents: Extents::default(),
            regions: RwLock::default(),
            table: Mutex::default(),
            queue: Mutex::new(Queue::new(saving)),
            work: Condvar::new(),
            gate: RwLock::new(true),
            shut: AtomicBool::new(false),
        });
        let jobs = Self { inner };
        for index in 0..threads {
            let inner = Arc::clone(&jobs.inner);
            let thread = std::thread::Builder::new().name(format!("kvtier-copy-{index}"));
            // Not joined: a thread ends by itself soon after `close`, which waits for copies by the gate.
            if let Err(error) = thread.spawn(move || inner.work()) {
                jobs.close();
                return Err(Error::io("copy thread", &error));
            }
        }
        Ok(jobs)
    }

    /// Registers the engine's memory, in place of what was registered before.
    pub fn register(&self, regions: Regions) {
        if let (Some(side), Some(run_bytes)) = (&self.inner.shared.device, regions.shortest_run()) {
            side.measure(run_bytes);
        }
        *self.inner.regions.write() = Arc::new(regions);
    }

    /// Submits a job. Where engine memory is a device's, its copies come after what `stream` has been given so far.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when a transfer does not fit the layout or the registered memory, [`Error::Limit`] when
    /// too many jobs are not collected.
    pub fn submit(
        &self,
        kind: Kind,
        transfers: Vec<Transfer>,
        (deadline, stream): (Duration, u64),
    ) -> Result<u64, Error> {
        let inner = &self.inner;
        let regions = Arc::clone(&inner.regions.read());
        transfers.iter().try_for_each(|transfer| inner.check(transfer, &regions))?;
        let deadline = Instant::now() + deadline.min(MAX_DEADLINE);
        let epoch = inner.shared.link.epoch();
        let mut job = Job::new(kind, transfers, regions, epoch.unwrap_or(0), deadline);
        // Made here, on the thread that gives the stream its work.
        let fenced = inner.shared.device.as_ref().map(|side| copying::device::fence(side, stream));
        let unfenced = matches!(fenced, Some(None));
        job.after = fenced.flatten();
        let job = Arc::new(job);
        let number = {
            let mut table = inner.table.lock();
            if table.jobs.len() >= inner.shared.spec.max_inflight {
                return Err(Error::Limit("jobs"));
            }
            table.last += 1;
            let number = table.last;
            table.jobs.insert(number, Arc::clone(&job));
            number
        };
        let mut queue = inner.queue.lock();
        if epoch.is_none() || queue.closed || unfenced {
            drop(queue);
            job.end_unbegun(Fate::Lost);
            inner.settle(&job);
            return Ok(number);
        }
        queue.push(job);
        drop(queue);
        inner.work.notify_all();
        Ok(number)
    }

    /// Waits for a job, at most `timeout`; when it is over and has at most `capacity` transfers, collects it.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`]; the job stays.
    pub fn wait(&self, number: u64, timeout: Duration, capacity: usize) -> Result<JobPoll, Error> {
        let inner = &self.inner;
        let Some(job) = inner.table.lock().jobs.get(&number).cloned() else { return Ok(JobPoll::Unknown) };
        if job.transfers.len() > capacity {
            return Err(Error::BufferTooSmall { needed: job.transfers.len() });
        }
        let Some(fates) = job.wait(Instant::now() + timeout.min(MAX_DEADLINE)) else { return Ok(JobPoll::Pending) };
        inner.settle(&job);
        inner.table.lock().jobs.remove(&number);
        Ok(JobPoll::Over(fates))
    }

    /// Begins no further transfer of a job. Answers false when it is unknown.
    pub fn cancel(&self, number: u64) -> bool {
        let Some(job) = self.inner.table.lock().jobs.get(&number).cloned() else { return false };
        job.end_unbegun(Fate::Cancelled);
        self.inner.settle(&job);
        true
    }

    /// Begins no further transfer of any job there is.
    pub fn cancel_all(&self) {
        let jobs: Vec<_> = self.inner.table.lock().jobs.values().cloned().collect();
        for job in jobs {
            job.end_unbegun(Fate::Cancelled);
            self.inner.settle(&job);
        }
    }

    /// Ends all jobs. When this returns, no thread touches engine memory, now or later: it waits for the copies that have
    /// begun, which wait for nothing but memory. A device that ends nothing any more is waited for [`DEVICE_CLOSE`] long.
    pub fn close(&self) {
        self.inner.queue.lock().closed = true;
        self.inner.work.notify_all();
        self.cancel_all();
        if self.inner.shut.swap(true, Ordering::AcqRel) {
            return;
        }
        let Some(side) = &self.inner.shared.device else {
            *self.inner.gate.write() = false;
            return;
        };
        let until = Instant::now() + DEVICE_CLOSE;
        if let Some(mut gate) = self.inner.gate.try_write_until(until) {
            *gate = false;
        }
        side.close(until.saturating_duration_since(Instant::now()));
    }
}

impl Inner {
    fn check(&self, transfer: &Transfer, regions: &Regions) -> Result<(), Error> {
        let spec = &self.shared.spec;
        let frame = &transfer.frame;
        if spec.layout.block_bytes.get(frame.group as usize) != Some(&frame.bytes) {
            return Err(Error::invalid("a frame's group is unknown or its size is not the group's"));
        }
        if frame.shard != u32::from(spec.shard) {
            return Err(Error::invalid(format!("a frame of shard {}, this worker has {}", frame.shard, spec.shard)));
        }
        if !regions.has_block(frame.group, transfer.block_id) {
            return Err(Error::invalid(format!(
                "block {} of group {} is not in registered memory",
                transfer.block_id, frame.group
            )));
        }
        Ok(())
    }

    /// A copy thread's life.
    fn work(&self) {
        while let Some((job, first)) = self.next() {
            match &self.shared.device {
                None => {
                    let copied = catch_unwind(AssertUnwindSafe(|| self.transfer(&job, first)));
                    job.finish(first, copied.unwrap_or(Fate::Lost));
                }
                Some(side) => self.batch(side, &job, first),
            }
            if job.kind == Kind::Save {
                self.queue.lock().saved();
                // This thread may take a load next, and another be free for the save.
                self.work.notify_one();
            }
            self.settle(&job);
        }
    }

    /// The next transfer to do; `None` when the session is closed.
    fn next(&self) -> Option<(Arc<Job>, usize)> {
        let mut queue = self.queue.lock();
        loop {
            if queue.closed {
                return None;
            }
            let claimed = queue.claim(Instant::now(), |job| self.settle(job));
            if claimed.is_some() {
                return claimed;
            }
            // What a living daemon gave up keeps memory from others only on a device, or registered with one; what a dead
            // one left does so wherever it is mapped.
            let every = if self.shared.device.is_some() { SWEEP_EVERY } else { IDLE_SWEEP_EVERY };
            if self.work.wait_for(&mut queue, every).timed_out() {
                drop(queue);
                self.sweep();
                queue = self.queue.lock();
            }
        }
    }

    /// The extent of a claimed transfer, as its job needs it; `None` also once the transfer was ended.
    fn extent(&self, job: &Job, index: usize) -> Option<Mapped> {
        if !job.is_open(index) {
            return None;
        }
        let shared = &self.shared;
        let attachment = shared.link.current().filter(|a| a.epoch == job.epoch)?;
        let access = if job.kind == Kind::Save { Access::Writable } else { Access::ReadOnly };
        self.extents.get(&attachment, (job.transfers[index].frame.extent, access), job.deadline, shared)
    }

    /// Whether copies of a job may still begin, those that were not ended; to be asked inside the gate.
    fn may_begin(&self, job: &Job, is_open: bool) -> bool {
        is_open
            && !self.shut.load(Ordering::Acquire)
            && Instant::now() < job.deadline
            && self.shared.link.is_current(job.epoch)
    }

    fn transfer(&self, job: &Job, index: usize) -> Fate {
        let transfer = &job.transfers[index];
        let Some(Mapped::Host(extent)) = self.extent(job, index) else { return Fate::Lost };
        let regions = job.regions.of(transfer.frame.group);
        let gate = self.gate.read();
        if !self.may_begin(job, *gate) || !job.begin(index) {
            return Fate::Lost;
        }
        let copied = match job.kind {
            Kind::Load { .. } => copying::load(&extent.memory, &transfer.frame, regions, transfer.block_id),
            Kind::Save => copying::save(&extent.memory, &transfer.frame, regions, transfer.block_id),
        };
        drop(gate);
        self.ended(job, transfer, copied)
    }

    /// A copy ended: a save is sealed.
    fn ended(&self, job: &Job, transfer: &Transfer, copied: Copied) -> Fate {
        match copied {
            Copied::Whole(checksum) => {
                if job.kind == Kind::Save {
                    let frame = transfer.frame.sealed(checksum);
                    self.shared.reports.push(Report::Seal { epoch: job.epoch, frame });
                }
                Fate::Done
            }
            Copied::Corrupt => Fate::Corrupt,
            Copied::Lost => Fate::Lost,
        }
    }

    /// Counts and reports a job, once, when it is over.
    fn settle(&self, job: &Job) {
        job.report_once(|fates| {
            self.count(job, fates);
            self.report(job, fates);
        });
    }

    fn count(&self, job: &Job, fates: &[Fate]) {
        let counters = &self.shared.counters;
        let (done, corrupt, lost, bytes) = match job.kind {
            Kind::Load { .. } => {
                (&counters.loads_done, &counters.loads_corrupt, &counters.loads_lost, &counters.load_bytes)
            }
            Kind::Save => (&counters.saves_done, &counters.saves_lost, &counters.saves_lost, &counters.save_bytes),
        };
        for (transfer, fate) in job.transfers.iter().zip(fates) {
            match fate {
                Fate::Done => {
                    done.one();
                    bytes.add(transfer.frame.bytes);
                }
                Fate::Corrupt => corrupt.one(),
                Fate::Open | Fate::Lost | Fate::Cancelled => lost.one(),
            }
        }
    }

    fn report(&self, job: &Job, fates: &[Fate]) {
        let with_fates = job.transfers.iter().zip(fates);
        match &job.kind {
            Kind::Load { request_id } => {
                let frames: Vec<_> = with_fates.filter_map(|(transfer, fate)| loaded(transfer, *fate)).collect();
                if !frames.is_empty() {
                    let request_id = request_id.clone();
                    self.shared.reports.push(Report::Loads { epoch: job.epoch, request_id, frames });
                }
            }
            Kind::Save => {
                let unwritten: Vec<_> =
                    with_fates.filter(|(_, fate)| **fate != Fate::Done).map(|(transfer, _)| transfer.frame).collect();
                self.shared.reports.abandon(job.epoch, &unwritten);
                self.shared.reports.push(Report::SaveOver);
            }
        }
    }
}

/// What to tell of a load: nothing of one that was cancelled, since the frame had no part in it.
fn loaded(transfer: &Transfer, fate: Fate) -> Option<v1::LoadedFrame> {
    let result = match fate {
        Fate::Done => v1::LoadResult::Loaded,
        Fate::Corrupt => v1::LoadResult::Corrupt,
        Fate::Lost => v1::LoadResult::Lost,
        Fate::Open | Fate::Cancelled => return None,
    };
    Some(transfer.frame.loaded(result))
}

#[cfg(test)]
mod device_tests;
#[cfg(test)]
mod tests;
