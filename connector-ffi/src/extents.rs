//! Extents of the daemon mapped into this process, per attachment. Used on copy threads only: mapping waits for the daemon.
//!
//! # Bounds
//! [`MAX_MAPPED`] mappings; one request to the daemon at a time, each within its job's deadline and [`MAX_WAIT`]. After a
//! request that got no answer, others fail at once for [`PAUSE_AFTER_SILENCE`], those too that waited for their turn, so that a
//! stalled daemon does not hold every copy thread.
#![expect(unsafe_code, reason = "registers mapped memory with the engine's device")]

use std::collections::HashMap;
use std::io::ErrorKind;
use std::ops::ControlFlow;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use kvtier_device::{Device, DeviceError, PoolMemory, Registered, Span};
use kvtier_memory::fdpass::{Access, FdClient, Request};
use kvtier_memory::{ExtentFds, MappedExtent, MappedGenerations, MemoryError};
use kvtier_types::DeviceNumber;
use parking_lot::Mutex;

use crate::link::Attachment;
use crate::shared::Shared;

/// Most mappings kept; at 1 GiB an extent that is more than a node's memory.
const MAX_MAPPED: usize = 4096;
/// Longest wait for one extent, whatever the job's deadline.
const MAX_WAIT: Duration = Duration::from_secs(1);
/// How often extents that the daemon gave up are looked for, at most.
pub(crate) const SWEEP_EVERY: Duration = Duration::from_secs(1);
/// How long the daemon is left alone after it did not answer.
const PAUSE_AFTER_SILENCE: Duration = Duration::from_millis(250);

/// An extent of host memory.
#[derive(Debug)]
pub(crate) struct HostExtent {
    // Let go before the mapping.
    pin: OnceLock<Box<dyn Registered>>,
    pub(crate) memory: MappedExtent,
}

impl HostExtent {
    pub(crate) const fn new(memory: MappedExtent) -> Self {
        Self { pin: OnceLock::new(), memory }
    }

    /// Lets the device reach it directly. Answers whether it does now.
    pub(crate) fn register(&self, device: &dyn Device) -> bool {
        if self.pin.get().is_none() {
            // Faults one by one would be slower; what is not there yet is made ready by the driver.
            drop(self.memory.populate());
            let span = Span { base: self.memory.base().expose_provenance() as u64, bytes: self.memory.len() };
            // SAFETY: the mapping lives as long as this value, which drops the registration first.
            if let Ok(pin) = unsafe { device.register(span, self.memory.writable()) } {
                drop(self.pin.set(pin));
            }
        }
        self.pin.get().is_some()
    }

    /// Whether the device reaches it directly.
    pub(crate) fn is_pinned(&self) -> bool {
        self.pin.get().is_some()
    }
}

/// An extent of a device's memory.
#[derive(Debug)]
pub(crate) struct DeviceExtent {
    pub(crate) memory: Arc<dyn PoolMemory>,
    pub(crate) generations: MappedGenerations,
}

/// A mapped extent.
#[derive(Debug, Clone)]
pub(crate) enum Mapped {
    Host(Arc<HostExtent>),
    Device(Arc<DeviceExtent>),
}

impl Mapped {
    /// Generation of the frame that starts at `offset`; 0 if none does.
    pub(crate) fn generation(&self, offset: u64) -> u64 {
        match self {
            Self::Host(extent) => extent.memory.generation(offset),
            Self::Device(extent) => extent.generations.generation(offset),
        }
    }
}

impl Mapped {
    /// Whether the daemon gave it up: no frame of it will be granted again.
    fn is_retired(&self) -> bool {
        match self {
            Self::Host(extent) => extent.memory.is_retired(),
            Self::Device(extent) => extent.generations.is_retired(),
        }
    }
}

/// The mappings of one session.
#[derive(Debug, Default)]
pub(crate) struct Extents {
    cache: Mutex<Cache>,
}

#[derive(Debug, Default)]
struct Cache {
    /// Epoch of everything here.
    epoch: u64,
    mapped: HashMap<(u32, bool), Mapped>,
    client: Option<Arc<Mutex<FdClient>>>,
    silent_until: Option<Instant>,
    /// When extents that the daemon gave up were looked for last.
    swept: Option<Instant>,
}

impl Cache {
    /// Whether it is time to look for extents that the daemon gave up.
    fn is_due(&mut self, now: Instant) -> bool {
        let due = self.swept.is_none_or(|last| now.duration_since(last) >= SWEEP_EVERY);
        if due {
            self.swept = Some(now);
        }
        due
    }

    /// Forgets what belongs to another attachment. Running copies keep their mappings.
    fn enter(&mut self, attachment: &Attachment) -> Arc<Mutex<FdClient>> {
        if self.epoch != attachment.epoch {
            *self = Self { epoch: attachment.epoch, ..Self::default() };
        }
        let client = self.client.get_or_insert_with(|| Arc::new(Mutex::new(FdClient::new(&attachment.fd_socket))));
        Arc::clone(client)
    }
}

/// Why an extent cannot be had.
#[derive(Debug, thiserror::Error)]
enum NoExtent {
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl Extents {
    /// Whether it is time for [`Self::sweep`].
    pub(crate) fn is_due(&self) -> bool {
        self.cache.lock().is_due(Instant::now())
    }

    /// Lets go of extents that the daemon gave up, and of all of a daemon that this process is attached to no more: whoever
    /// maps one keeps its memory from others.
    pub(crate) fn sweep(&self, epoch: Option<u64>) {
        let mut cache = self.cache.lock();
        let former = epoch != Some(cache.epoch);
        let retired: Vec<(u32, bool)> =
            cache.mapped.iter().filter(|(_, mapped)| former || mapped.is_retired()).map(|(slot, _)| *slot).collect();
        let gone: Vec<Mapped> = retired.into_iter().filter_map(|slot| cache.mapped.remove(&slot)).collect();
        drop(cache);
        // Unmapped outside of the lock.
        drop(gone);
    }

    /// The extent mapped as asked, from the cache or from the daemon until `deadline`; `None` when it cannot be had.
    pub(crate) fn get(
        &self,
        attachment: &Attachment,
        (extent, access): (u32, Access),
        deadline: Instant,
        shared: &Shared,
    ) -> Option<Mapped> {
        let slot = (extent, access == Access::Writable);
        let client = match self.known(attachment, slot) {
            ControlFlow::Break(known) => return known,
            ControlFlow::Continue(client) => client,
        };
        // Held until the answer is known to others.
        let mut connection = client.try_lock_until(deadline)?;
        // Whoever had it before may have asked for the same extent, or in vain.
        if let ControlFlow::Break(known) = self.known(attachment, slot) {
            return known;
        }
        let request = Request { attachment: attachment.token, extent, access };
        let result = ask(&mut connection, &request, deadline).map_err(NoExtent::from);
        let result = result.and_then(|(fds, bytes)| map(shared, &request, fds, bytes));
        let mut cache = self.cache.lock();
        match result {
            Ok(mapped) => {
                shared.counters.extents_mapped.one();
                if cache.epoch == attachment.epoch {
                    if cache.mapped.len() >= MAX_MAPPED {
                        cache.mapped.clear();
                    }
                    cache.mapped.insert(slot, mapped.clone());
                }
                Some(mapped)
            }
            Err(error) => {
                shared.counters.extents_failed.one();
                let answered = matches!(error, NoExtent::Memory(MemoryError::Refused { .. }) | NoExtent::Device(_));
                if !answered && cache.epoch == attachment.epoch {
                    cache.silent_until = Some(Instant::now() + PAUSE_AFTER_SILENCE);
                }
                None
            }
        }
    }

    /// The extent as far as is known without asking, `None` when it cannot be had now; else the connection to ask over.
    fn known(&self, attachment: &Attachment, slot: (u32, bool)) -> ControlFlow<Option<Mapped>, Arc<Mutex<FdClient>>> {
        let mut cache = self.cache.lock();
        if attachment.epoch < cache.epoch {
            // It ended while this thread waited.
            return ControlFlow::Break(None);
        }
        let client = cache.enter(attachment);
        if let Some(mapped) = cache.mapped.get(&slot) {
            return ControlFlow::Break(Some(mapped.clone()));
        }
        if cache.silent_until.is_some_and(|until| Instant::now() < until) {
            return ControlFlow::Break(None);
        }
        ControlFlow::Continue(client)
    }
}

/// Maps what came for a request, and begins to register it with the engine's device.
fn map(shared: &Shared, request: &Request, fds: ExtentFds, bytes: u64) -> Result<Mapped, NoExtent> {
    if DeviceNumber::of_extent(request.extent).is_none() {
        let memory = MappedExtent::new(fds, bytes, request.access == Access::Writable)?;
        let extent = Arc::new(HostExtent::new(memory));
        if let Some(side) = &shared.device {
            side.pin(&extent, &shared.counters);
        }
        return Ok(Mapped::Host(extent));
    }
    let absent = || DeviceError::Absent { why: "the engine's memory is not on a device".to_owned() };
    let side = shared.device.as_ref().ok_or_else(absent)?;
    let generations = MappedGenerations::new(&fds.generations, bytes)?;
    let memory = side.device.import(fds.extent, bytes)?;
    Ok(Mapped::Device(Arc::new(DeviceExtent { memory, generations })))
}

/// Asks, and once more over a new connection where this one is of no use: the daemon hangs up idle ones. One that says nothing
/// is not asked again.
fn ask(client: &mut FdClient, request: &Request, deadline: Instant) -> Result<(ExtentFds, u64), MemoryError> {
    let until = deadline.min(Instant::now() + MAX_WAIT);
    let left = || until.saturating_duration_since(Instant::now());
    match client.request(request, left()) {
        Err(error) if has_hung_up(&error) => client.request(request, left()),
        result => result,
    }
}

fn has_hung_up(error: &MemoryError) -> bool {
    match error {
        // What a socket call answers that took longer than it may.
        MemoryError::System { source, .. } => !matches!(source.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
        MemoryError::Protocol { .. } => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::path::Path;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn asked(path: &Path) -> Result<(ExtentFds, u64), MemoryError> {
        let request = Request { attachment: [0; 16], extent: 0, access: Access::ReadOnly };
        ask(&mut FdClient::new(path), &request, Instant::now() + Duration::from_secs(60))
    }

    #[test]
    fn a_daemon_that_says_nothing_is_asked_once_and_one_that_hangs_up_twice() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fd.sock");
        let silent = UnixListener::bind(&path).unwrap();
        let answer = asked(&path);
        assert!(matches!(answer, Err(MemoryError::System { .. })), "{answer:?}");
        silent.set_nonblocking(true).unwrap();
        assert_eq!(silent.incoming().map_while(Result::ok).count(), 1);
        silent.set_nonblocking(false).unwrap();
        let calls = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&calls);
        std::thread::spawn(move || {
            for stream in silent.incoming().map_while(Result::ok) {
                counted.fetch_add(1, Ordering::AcqRel);
                drop(stream);
            }
        });
        assert!(asked(&path).is_err());
        assert_eq!(calls.load(Ordering::Acquire), 2);
    }
}
