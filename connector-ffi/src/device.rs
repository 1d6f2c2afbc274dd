//! The device that the engine's memory lies in, as a session uses it: what it is given, how fast, and by which method.
//!
//! # Bounds
//! [`PIN_THREADS`] threads register host memory, one extent each at a time, and one measures; only closing waits for them.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use kvtier_device::{Backend, Device, DeviceError, Method, Methods, Pace, Way, choose};
use kvtier_types::DeviceId;
use parking_lot::{Condvar, Mutex, RwLock};

use crate::counters::Counters;
use crate::error::Error;
use crate::extents::HostExtent;

/// Threads that register host memory with the device: one takes about a second for a few gigabytes.
const PIN_THREADS: usize = 4;

/// Which device a session's engine computes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceSpec {
    /// Where it comes from.
    pub backend: Backend,
    /// Its number in this process.
    pub ordinal: u32,
    /// Most bytes a second that copies may move; none for as many as come.
    pub bandwidth: Option<u64>,
}

/// The device of a session.
#[derive(Debug)]
pub(crate) struct DeviceSide {
    pub(crate) device: Arc<dyn Device>,
    pub(crate) pace: Pace,
    methods: RwLock<Methods>,
    background: Mutex<Background>,
    ended: Condvar,
}

/// What goes on behind the copies.
#[derive(Debug, Default)]
struct Background {
    /// Extents to be registered.
    waiting: VecDeque<Weak<HostExtent>>,
    pinning: usize,
    measuring: usize,
    closed: bool,
}

impl DeviceSide {
    /// Opens the device of a spec.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be had: without it the session could not reach the engine's memory.
    pub(crate) fn open(spec: DeviceSpec) -> Result<Self, Error> {
        let opened = kvtier_device::open(spec.backend, spec.ordinal);
        let failed = |e: DeviceError| Error::Io { what: "the engine's device".to_owned(), reason: e.to_string() };
        Ok(Self::new(opened.map_err(failed)?, spec.bandwidth))
    }

    pub(crate) fn new(device: Arc<dyn Device>, bandwidth: Option<u64>) -> Self {
        let methods = RwLock::new(Methods::plain(&*device));
        Self { device, pace: Pace::new(bandwidth), methods, background: Mutex::default(), ended: Condvar::new() }
    }

    /// Devices whose pools this process reads: none where it could not check what it read.
    pub(crate) fn readable(&self) -> Vec<DeviceId> {
        let facts = self.device.facts();
        if facts.sums { facts.reaches.clone() } else { Vec::new() }
    }

    pub(crate) fn method(&self, way: Way) -> Method {
        self.methods.read().of(way)
    }

    /// Measures, in the background, how runs of this length are copied best.
    pub(crate) fn measure(self: &Arc<Self>, run_bytes: u64) {
        let mut background = self.background.lock();
        if background.closed {
            return;
        }
        let this = Arc::clone(self);
        let measure = move || {
            let methods = choose(&*this.device, run_bytes);
            *this.methods.write() = methods;
            this.background.lock().measuring -= 1;
            this.ended.notify_all();
        };
        // Without the thread, what needs no measurement stays.
        let thread = std::thread::Builder::new().name("kvtier-measure".to_owned()).spawn(measure);
        background.measuring += usize::from(thread.is_ok());
    }

    /// Registers an extent with the device, in the background.
    pub(crate) fn pin(self: &Arc<Self>, extent: &Arc<HostExtent>, counters: &Arc<Counters>) {
        let mut background = self.background.lock();
        if background.closed {
            return;
        }
        background.waiting.push_back(Arc::downgrade(extent));
        if background.pinning >= PIN_THREADS {
            return;
        }
        let (this, counters) = (Arc::clone(self), Arc::clone(counters));
        let thread = std::thread::Builder::new().name("kvtier-pin".to_owned()).spawn(move || this.pin_all(&counters));
        background.pinning += usize::from(thread.is_ok());
    }

    fn pin_all(&self, counters: &Counters) {
        while let Some(extent) = self.next_to_pin() {
            let Some(extent) = extent.upgrade() else { continue };
            let done = if extent.register(&*self.device) { &counters.extents_pinned } else { &counters.pins_failed };
            done.one();
        }
    }

    fn next_to_pin(&self) -> Option<Weak<HostExtent>> {
        let mut background = self.background.lock();
        let next = background.waiting.pop_front();
        if next.is_none() {
            background.pinning -= 1;
            self.ended.notify_all();
        }
        next
    }

    /// Begins nothing more behind the copies, and waits until what goes on there has ended, at most `patience`: a process
    /// that ends under it takes the driver away from it.
    pub(crate) fn close(&self, patience: Duration) {
        let until = Instant::now() + patience;
        let mut background = self.background.lock();
        background.closed = true;
        background.waiting.clear();
        while background.pinning + background.measuring > 0 {
            if self.ended.wait_until(&mut background, until).timed_out() {
                return;
            }
        }
    }
}
