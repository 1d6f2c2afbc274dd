//! The traits of a device, and what their callers promise.
#![expect(unsafe_code, reason = "only the caller knows whose memory is copied, and for how long it is mapped")]

use std::fmt::Debug;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::{DeviceError, DeviceFacts, Done, EngineStream, Fence, Span, Work};

/// Told the end of a work, on a thread of the device's: it must be quick and wait for nothing.
pub type OnEnd = Box<dyn FnOnce(Result<Done, DeviceError>) + Send>;

/// Host memory that the device reaches directly; until dropped.
pub trait Registered: Debug + Send + Sync {
    /// Where it lies.
    fn span(&self) -> Span;
}

/// Device memory that processes share.
pub trait PoolMemory: Debug + Send + Sync {
    /// Where it lies for this process's device: an address for [`Work`], not for the processor.
    fn span(&self) -> Span;

    /// A descriptor with which another process of this machine imports it.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] for memory that was itself imported; [`DeviceError::Call`].
    fn export(&self) -> Result<OwnedFd, DeviceError>;
}

/// A GPU, or its twin.
pub trait Device: Debug + Send + Sync {
    /// What it is.
    fn facts(&self) -> &DeviceFacts;

    /// Bytes of its memory that nobody has taken.
    ///
    /// # Errors
    /// [`DeviceError::Call`], [`DeviceError::Lost`].
    fn free_bytes(&self) -> Result<u64, DeviceError>;

    /// Lets the device reach a range of host memory directly, so that copies need no staging by the driver. `writable` is
    /// whether this process may write it. Takes a while for gigabytes.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] where the driver cannot; copies then still work, slower.
    ///
    /// # Safety
    /// The range stays mapped until the answer is dropped.
    unsafe fn register(&self, span: Span, writable: bool) -> Result<Box<dyn Registered>, DeviceError>;

    /// A fence of what `stream` has been given so far. To be called by the thread that gives it work, and quick.
    ///
    /// # Errors
    /// [`DeviceError::Call`] for a handle that is no stream.
    fn fence(&self, stream: EngineStream) -> Result<Fence, DeviceError>;

    /// Begins a work. Does not wait for it.
    ///
    /// # Errors
    /// [`DeviceError::Busy`] when [`MAX_IN_FLIGHT`](crate::MAX_IN_FLIGHT) works of its way have not ended, [`DeviceError::Invalid`]; nothing was
    /// begun then, and `on_end` is not called.
    ///
    /// # Safety
    /// Until `on_end` is called: every run's memory stays mapped; nobody else writes what a run reads or touches what it
    /// writes, but other processes may write what runs read; spans of `sums` are device memory.
    unsafe fn submit(&self, work: Work, on_end: OnEnd) -> Result<(), DeviceError>;

    /// Takes device memory that other processes can import. `bytes` is rounded up to what the device gives out at once.
    ///
    /// # Errors
    /// [`DeviceError::NoMemory`], [`DeviceError::Unsupported`].
    fn allocate(&self, bytes: u64) -> Result<Arc<dyn PoolMemory>, DeviceError>;

    /// Maps memory that another process took, on this device or one that it reaches, for reading.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] when this device cannot reach it, [`DeviceError::Call`] when it is no such memory.
    fn import(&self, memory: OwnedFd, bytes: u64) -> Result<Arc<dyn PoolMemory>, DeviceError>;
}
