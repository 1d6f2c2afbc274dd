//! Frames of host memory and of device memory, copied with everything kept that a copy needs: the safe face of a device.
#![expect(unsafe_code, reason = "submits copies between memory that the works keep, and registers memory that is kept")]

use std::sync::Arc;

use kvtier_memory::copy::Run;
use kvtier_memory::{Extent, FramePin};

use crate::{Device, DeviceError, Method, PoolMemory, Registered, Span, Way, Work};

/// An extent of host memory that a device reaches directly, for as long as this value lives.
#[derive(Debug)]
pub struct RegisteredExtent {
    // Let go before the extent.
    _pin: Box<dyn Registered>,
    extent: Arc<Extent>,
}

impl RegisteredExtent {
    /// Registers it. Takes a while: about a second for ten gigabytes.
    ///
    /// # Errors
    /// As [`Device::register`].
    pub fn new(device: &dyn Device, extent: Arc<Extent>) -> Result<Self, DeviceError> {
        let span = Span { base: extent.base().expose_provenance() as u64, bytes: extent.len() };
        // SAFETY: the extent is mapped while it is kept here, and its registration is dropped first.
        let pin = unsafe { device.register(span, true) }?;
        Ok(Self { _pin: pin, extent })
    }

    /// The extent.
    #[must_use]
    pub const fn extent(&self) -> &Arc<Extent> {
        &self.extent
    }
}

/// A slot of a pool of device memory.
#[derive(Debug, Clone)]
pub struct PoolFrame {
    memory: Arc<dyn PoolMemory>,
    span: Span,
}

impl PoolFrame {
    /// `bytes` at `offset` of the memory.
    ///
    /// # Errors
    /// [`DeviceError::Invalid`] when that is not inside.
    pub fn new(memory: Arc<dyn PoolMemory>, offset: u64, bytes: u64) -> Result<Self, DeviceError> {
        let all = memory.span();
        if offset.checked_add(bytes).is_none_or(|end| end > all.bytes) {
            return Err(DeviceError::Invalid { what: "a frame lies outside its pool" });
        }
        Ok(Self { span: Span { base: all.base + offset, bytes }, memory })
    }

    /// Where it lies for the device.
    #[must_use]
    pub const fn span(&self) -> Span {
        self.span
    }

    /// The memory it is a part of.
    #[must_use]
    pub const fn memory(&self) -> &Arc<dyn PoolMemory> {
        &self.memory
    }
}

/// The checksum of what arrived, or why nothing did. On a thread of the device's: be quick.
pub type OnCopied = Box<dyn FnOnce(Result<u64, DeviceError>) + Send>;

/// Copies a host frame into a pool's; answers the checksum of what lies in device memory then. A device that makes none
/// answers that of the host frame's bytes after the copy.
///
/// # Errors
/// As [`Device::submit`], and [`DeviceError::Invalid`] for frames of different lengths; `on_copied` is not called then.
pub fn onto_device(
    device: &dyn Device,
    method: Method,
    (from, to): (FramePin, PoolFrame),
    on_copied: OnCopied,
) -> Result<(), DeviceError> {
    let run = Run { src: from.as_ptr(), dst: pointer(to.span), len: same_len(&from, &to)? };
    let by_device = device.facts().sums && to.span.bytes.is_multiple_of(8);
    let sums = if by_device { vec![vec![to.span]] } else { Vec::new() };
    let host = from.clone();
    let work = Work { way: Way::FromHost, runs: vec![run], method, after: None, sums, keeps: Box::new((from, to)) };
    let on_end = Box::new(move |result: Result<crate::Done, DeviceError>| {
        on_copied(result.map(|done| done.sums.first().copied().unwrap_or_else(|| host.checksum())));
    });
    // SAFETY: the work keeps both frames; a frame is written by its holder only, once, before anybody reads it.
    unsafe { device.submit(work, on_end) }
}

/// Copies a pool's frame into a host frame; answers the checksum of what lies in host memory then.
///
/// # Errors
/// As [`onto_device`].
pub fn off_device(
    device: &dyn Device,
    method: Method,
    (from, to): (PoolFrame, FramePin),
    on_copied: OnCopied,
) -> Result<(), DeviceError> {
    let run = Run { src: pointer(from.span).cast_const(), dst: to.as_mut_ptr(), len: same_len(&to, &from)? };
    let host = to.clone();
    let keeps = Box::new((from, to));
    let work = Work { way: Way::ToHost, runs: vec![run], method, after: None, sums: Vec::new(), keeps };
    let on_end = Box::new(move |result: Result<crate::Done, DeviceError>| {
        on_copied(result.map(|_| host.checksum()));
    });
    // SAFETY: as above.
    unsafe { device.submit(work, on_end) }
}

fn pointer(span: Span) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(usize::try_from(span.base).expect("64-bit addresses"))
}

fn same_len(host: &FramePin, pool: &PoolFrame) -> Result<usize, DeviceError> {
    if host.len() as u64 == pool.span.bytes {
        Ok(host.len())
    } else {
        Err(DeviceError::Invalid { what: "frames of different lengths are copied" })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;
    use crate::twin::{TwinConfig, TwinDevice};
    use kvtier_memory::{Arena, ArenaConfig, PageKind};

    const SOON: Duration = Duration::from_secs(20);

    fn frames() -> [FramePin; 2] {
        let config = ArenaConfig {
            capacity_bytes: 4 << 20,
            extent_bytes: 4 << 20,
            page_kind: PageKind::Plain,
            first_generation: 1,
        };
        let arena = Arena::new(config).unwrap();
        assert!(arena.grow().unwrap());
        [(); 2].map(|()| arena.pin(arena.alloc(10_000).granted().unwrap()).unwrap())
    }

    #[test]
    fn a_frame_goes_onto_a_device_and_off_it() {
        for sums in [true, false] {
            let twin = TwinDevice::new(TwinConfig { sums, ..TwinConfig::default() }).unwrap();
            let [from, to] = frames();
            let sum = from.copy_in(&crate::conformance::noise(10_000, 3));
            let registered = RegisteredExtent::new(&twin, Arc::clone(from.extent())).unwrap();
            let memory = twin.allocate(1 << 20).unwrap();
            let pool = PoolFrame::new(Arc::clone(&memory), 8192, 10_000).unwrap();
            let (told, end) = mpsc::channel();
            let tell = || {
                let told = told.clone();
                Box::new(move |result| told.send(result).unwrap()) as OnCopied
            };
            onto_device(&twin, Method::Batch, (from, pool.clone()), tell()).unwrap();
            assert_eq!(end.recv_timeout(SOON).unwrap(), Ok(sum));
            off_device(&twin, Method::Batch, (pool, to.clone()), tell()).unwrap();
            assert_eq!(end.recv_timeout(SOON).unwrap(), Ok(sum));
            assert_eq!(to.checksum(), sum);
            let short = PoolFrame::new(Arc::clone(&memory), 0, 8192).unwrap();
            assert!(off_device(&twin, Method::Batch, (short, to), tell()).is_err());
            assert!(PoolFrame::new(memory, u64::MAX, 8192).is_err());
            drop(registered);
        }
    }
}
