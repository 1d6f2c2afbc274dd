//! The twin of a GPU: its memory is host memory, its queues are threads. It behaves as [`Device`] says and can be told to
//! misbehave as hardware does; what it shows about speed is nothing.
//!
//! It is honest about the rest: device memory can be exported and mapped by another process (a memfd), it runs out, a queue
//! waits for fences, an engine's stream does its work when it gets to it, and a lost device stays lost.
#![expect(unsafe_code, reason = "keeps the trait's promises; memory is touched behind another wall")]

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvtier_types::DeviceId;
use parking_lot::{Condvar, Mutex};

use self::bytes::{Bytes, move_run, sum_of};
use crate::{
    Device, DeviceError, DeviceFacts, EngineStream, Fence, MAX_IN_FLIGHT, Method, OnEnd, PoolMemory, Registered, Span,
    Way, Work, check,
};

mod bytes;
mod queue;

use queue::Queue;

/// What device memory is given out in, in bytes: as CUDA does.
pub const GRANULARITY: u64 = 2 << 20;

/// What a twin is made of.
#[derive(Debug, Clone)]
pub struct TwinConfig {
    /// Its number in this process.
    pub ordinal: u32,
    /// Its memory in bytes.
    pub memory_bytes: u64,
    /// Whether it makes checksums itself.
    pub sums: bool,
}

impl Default for TwinConfig {
    fn default() -> Self {
        Self { ordinal: 0, memory_bytes: 8 << 30, sums: true }
    }
}

/// The twin. Its identity is its number: twins of one number in all processes are the same device.
pub struct TwinDevice {
    facts: DeviceFacts,
    shared: Arc<Shared>,
    queues: [Queue; 3],
    next_stream: AtomicU64,
    streams: Mutex<BTreeMap<u64, Arc<StreamState>>>,
}

/// What queues share with the device.
#[derive(Debug)]
struct Shared {
    free: Mutex<u64>,
    faults: Mutex<Faults>,
    changed: Condvar,
}

/// How it misbehaves.
#[derive(Debug, Default)]
struct Faults {
    /// Works that fail before they begin.
    fail_next: usize,
    /// Works of which a byte is wrong afterwards.
    flip_next: usize,
    stalled: bool,
    lost: bool,
}

impl fmt::Debug for TwinDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TwinDevice").field("id", &self.facts.id).finish_non_exhaustive()
    }
}

fn lost() -> DeviceError {
    DeviceError::Lost { call: "twin", code: -1, name: "told to be lost".to_owned() }
}

impl TwinDevice {
    /// Starts its queues.
    ///
    /// # Errors
    /// [`DeviceError::Absent`] when a thread cannot be started.
    pub fn new(config: TwinConfig) -> Result<Self, DeviceError> {
        let shared = Arc::new(Shared {
            free: Mutex::new(config.memory_bytes),
            faults: Mutex::default(),
            changed: Condvar::new(),
        });
        let mut id = *b"kvtier twin\0\0\0\0\0";
        id[12..].copy_from_slice(&config.ordinal.to_le_bytes());
        let facts = DeviceFacts {
            id: DeviceId::new(id),
            ordinal: config.ordinal,
            reaches: vec![DeviceId::new(id)],
            name: "twin (host memory)".to_owned(),
            memory_bytes: config.memory_bytes,
            driver: 0,
            methods: vec![Method::Single, Method::Batch, Method::Kernel],
            sums: config.sums,
            notes: vec!["this is no GPU: host memory stands in for it".to_owned()],
        };
        let queue = |way: Way| Queue::start(way, Arc::clone(&shared));
        let queues = [queue(Way::ToHost)?, queue(Way::FromHost)?, queue(Way::Within)?];
        Ok(Self { facts, shared, queues, next_stream: AtomicU64::new(1), streams: Mutex::default() })
    }

    /// A new stream of an engine's.
    #[must_use]
    pub fn stream(&self) -> TwinStream {
        let handle = self.next_stream.fetch_add(1, Ordering::Relaxed);
        let state = Arc::new(StreamState::default());
        self.streams.lock().insert(handle, Arc::clone(&state));
        TwinStream { handle: EngineStream(handle), state }
    }

    /// The next `count` works fail before they begin.
    pub fn fail_next(&self, count: usize) {
        self.shared.faults.lock().fail_next = count;
    }

    /// Of the next `count` works a byte is wrong afterwards.
    pub fn flip_next(&self, count: usize) {
        self.shared.faults.lock().flip_next = count;
    }

    /// Begins no work from now on, until [`Self::resume`].
    pub fn stall(&self) {
        self.shared.faults.lock().stalled = true;
    }

    /// Goes on.
    pub fn resume(&self) {
        self.shared.faults.lock().stalled = false;
        self.shared.changed.notify_all();
    }

    /// From now on everything fails.
    pub fn lose(&self) {
        let mut faults = self.shared.faults.lock();
        (faults.lost, faults.stalled) = (true, false);
        self.shared.changed.notify_all();
    }

    fn take(&self, bytes: u64) -> Result<(), DeviceError> {
        let mut free = self.shared.free.lock();
        *free = free.checked_sub(bytes).ok_or(DeviceError::NoMemory { bytes })?;
        Ok(())
    }

    fn alive(&self) -> Result<(), DeviceError> {
        if self.shared.faults.lock().lost { Err(lost()) } else { Ok(()) }
    }
}

impl Device for TwinDevice {
    fn facts(&self) -> &DeviceFacts {
        &self.facts
    }

    fn free_bytes(&self) -> Result<u64, DeviceError> {
        self.alive()?;
        Ok(*self.shared.free.lock())
    }

    unsafe fn register(&self, span: Span, _writable: bool) -> Result<Box<dyn Registered>, DeviceError> {
        self.alive()?;
        if span.base == 0 || span.end().is_none() || span.bytes == 0 {
            return Err(DeviceError::Invalid { what: "the range to register is empty" });
        }
        Ok(Box::new(TwinRegistered(span)))
    }

    fn fence(&self, stream: EngineStream) -> Result<Fence, DeviceError> {
        self.alive()?;
        if stream == EngineStream::default() {
            return Ok(Fence::new(StreamFence { state: Arc::default(), upto: 0 }));
        }
        let state = self.streams.lock().get(&stream.0).cloned();
        let state = state.ok_or(DeviceError::Call { call: "fence", code: 400, name: "no such stream".to_owned() })?;
        let upto = state.progress.lock().given;
        Ok(Fence::new(StreamFence { state, upto }))
    }

    unsafe fn submit(&self, work: Work, on_end: OnEnd) -> Result<(), DeviceError> {
        self.alive()?;
        check(&work)?;
        if let Some(fence) = &work.after {
            fence.get::<StreamFence>()?;
        }
        if !work.sums.is_empty() && !self.facts.sums {
            return Err(DeviceError::Unsupported { what: "making checksums on the device" });
        }
        let at = Way::ALL.iter().position(|way| *way == work.way).expect("every way has a queue");
        self.queues[at].push(work, on_end)
    }

    fn allocate(&self, bytes: u64) -> Result<Arc<dyn PoolMemory>, DeviceError> {
        self.alive()?;
        let bytes = bytes.max(1).next_multiple_of(GRANULARITY);
        self.take(bytes)?;
        match Bytes::create(bytes) {
            Ok(memory) => Ok(Arc::new(TwinMemory { memory, taken: Some((bytes, Arc::clone(&self.shared))) })),
            Err(error) => {
                *self.shared.free.lock() += bytes;
                Err(error)
            }
        }
    }

    fn import(&self, memory: OwnedFd, bytes: u64) -> Result<Arc<dyn PoolMemory>, DeviceError> {
        self.alive()?;
        Ok(Arc::new(TwinMemory { memory: Bytes::open(memory, bytes)?, taken: None }))
    }
}

#[derive(Debug)]
struct TwinRegistered(Span);

impl Registered for TwinRegistered {
    fn span(&self) -> Span {
        self.0
    }
}

/// Memory of the twin.
#[derive(Debug)]
struct TwinMemory {
    memory: Bytes,
    /// What goes back when it is dropped; `None` for imported memory.
    taken: Option<(u64, Arc<Shared>)>,
}

impl PoolMemory for TwinMemory {
    fn span(&self) -> Span {
        self.memory.span()
    }

    fn export(&self) -> Result<OwnedFd, DeviceError> {
        if self.taken.is_none() {
            return Err(DeviceError::Unsupported { what: "exporting imported memory" });
        }
        let failed = |e: std::io::Error| DeviceError::Call { call: "dup", code: -1, name: e.to_string() };
        self.memory.fd().as_fd().try_clone_to_owned().map_err(failed)
    }
}

impl Drop for TwinMemory {
    fn drop(&mut self) {
        if let Some((bytes, shared)) = &self.taken {
            *shared.free.lock() += bytes;
        }
    }
}

/// A stream of an engine's on the twin: it does what it was given when it is told to.
#[derive(Debug)]
pub struct TwinStream {
    handle: EngineStream,
    state: Arc<StreamState>,
}

#[derive(Debug, Default)]
struct StreamState {
    progress: Mutex<Progress>,
    changed: Condvar,
}

#[derive(Default)]
struct Progress {
    given: u64,
    done: u64,
    waiting: VecDeque<Box<dyn FnOnce() + Send>>,
}

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Progress").field("given", &self.given).field("done", &self.done).finish_non_exhaustive()
    }
}

/// A point in a stream.
#[derive(Debug)]
struct StreamFence {
    state: Arc<StreamState>,
    upto: u64,
}

impl StreamFence {
    fn wait(&self) {
        let mut progress = self.state.progress.lock();
        while progress.done < self.upto {
            self.state.changed.wait(&mut progress);
        }
    }
}

impl TwinStream {
    /// Its handle.
    #[must_use]
    pub const fn handle(&self) -> EngineStream {
        self.handle
    }

    /// Gives it something to do, later.
    pub fn give(&self, work: impl FnOnce() + Send + 'static) {
        let mut progress = self.state.progress.lock();
        progress.given += 1;
        progress.waiting.push_back(Box::new(work));
    }

    /// Has it do everything it was given.
    pub fn run(&self) {
        loop {
            let Some(work) = self.state.progress.lock().waiting.pop_front() else { return };
            work();
            self.state.progress.lock().done += 1;
            self.state.changed.notify_all();
        }
    }
}

impl Drop for TwinStream {
    /// A stream that goes does its work first, as CUDA's do: whoever waits for a fence in it comes to an end.
    fn drop(&mut self) {
        self.run();
    }
}

#[cfg(test)]
mod tests;
