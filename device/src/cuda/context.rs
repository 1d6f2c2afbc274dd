//! The wall around a GPU's primary context: what is asked of the device itself, and fences in an engine's streams.
#![expect(unsafe_code, reason = "calls of the driver")]

use std::ffi::{CStr, c_int, c_uint};
use std::sync::atomic::{AtomicBool, Ordering};

use super::api::{Api, Handle, Ordinal};
use crate::{DeviceError, EngineStream};

/// Of events: waiting for one sleeps instead of spinning, and no time is taken.
const EVENT_FLAGS: c_uint = 1 | 2;

/// `CU_STREAM_CAPTURE_MODE_RELAXED`.
const RELAXED: c_uint = 2;

/// `CU_DEVICE_ATTRIBUTE_*` numbers.
#[derive(Debug, Clone, Copy)]
#[repr(i32)]
pub(super) enum Attribute {
    /// `CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM`.
    HostPointers = 91,
    /// `VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED`.
    Vmm = 102,
    /// `HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED`.
    VmmDescriptors = 103,
    /// `READ_ONLY_HOST_REGISTER_SUPPORTED`.
    ReadOnlyRegister = 113,
}

/// The number of GPUs that the process sees.
pub(super) fn count(api: &Api) -> Result<u32, DeviceError> {
    let mut count: c_int = 0;
    // SAFETY: room for one int.
    let code = unsafe { (api.device_count)(&raw mut count) };
    api.check("cuDeviceGetCount", code)?;
    Ok(u32::try_from(count).unwrap_or(0))
}

/// The driver's version as 1000 * major + 10 * minor.
pub(super) fn driver(api: &Api) -> Result<u32, DeviceError> {
    let mut version: c_int = 0;
    // SAFETY: room for one int.
    let code = unsafe { (api.driver_version)(&raw mut version) };
    api.check("cuDriverGetVersion", code)?;
    Ok(u32::try_from(version).unwrap_or(0))
}

/// A GPU's primary context, retained.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) api: &'static Api,
    device: Ordinal,
    handle: Handle,
    lost: AtomicBool,
}

// SAFETY: the driver's functions may be called from any thread; a context is made current before each use.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// While it lives, the context is this thread's current one, and the thread's calls do not disturb a graph that another
/// thread captures: an engine captures its own, and by default that forbids everybody else most calls. Then all is as before.
#[derive(Debug)]
pub(super) struct Entered<'a> {
    context: &'a Context,
    /// The thread's former mode of capture.
    mode: c_uint,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let api = self.context.api;
        // SAFETY: room for one number, which was this thread's mode before.
        let _code = unsafe { (api.capture_mode)(&raw mut self.mode) };
        let mut popped: Handle = std::ptr::null_mut();
        // SAFETY: pushed by `Context::enter` on this thread; room for one handle.
        let _code = unsafe { (api.context_pop)(&raw mut popped) };
    }
}

impl Context {
    pub(super) fn open(api: &'static Api, ordinal: u32) -> Result<Self, DeviceError> {
        let wanted = c_int::try_from(ordinal).map_err(|_| DeviceError::Invalid { what: "the ordinal is too large" })?;
        let mut device: Ordinal = 0;
        // SAFETY: room for one device.
        let code = unsafe { (api.device_get)(&raw mut device, wanted) };
        api.check("cuDeviceGet", code)?;
        let mut handle: Handle = std::ptr::null_mut();
        // SAFETY: room for one handle; released when this value is dropped.
        let code = unsafe { (api.primary_retain)(&raw mut handle, device) };
        api.check("cuDevicePrimaryCtxRetain", code)?;
        Ok(Self { api, device, handle, lost: AtomicBool::new(false) })
    }

    /// Makes it this thread's current context.
    pub(super) fn enter(&self) -> Result<Entered<'_>, DeviceError> {
        if self.lost.load(Ordering::Relaxed) {
            return Err(DeviceError::Lost { call: "earlier", code: 0, name: "an earlier call told it".to_owned() });
        }
        self.enter_anyway()
    }

    /// As [`Self::enter`], even if the device was given up: what it was given before is still waited for.
    pub(super) fn enter_anyway(&self) -> Result<Entered<'_>, DeviceError> {
        // SAFETY: the context is retained for as long as `self` lives.
        let code = unsafe { (self.api.context_push)(self.handle) };
        self.check("cuCtxPushCurrent", code)?;
        let mut entered = Entered { context: self, mode: RELAXED };
        // SAFETY: room for one number.
        let code = unsafe { (self.api.capture_mode)(&raw mut entered.mode) };
        // Such calls tell of earlier failures too.
        self.check("cuThreadExchangeStreamCaptureMode", code)?;
        Ok(entered)
    }

    /// What a call answered after whose failure everything else still works: one that allocates, maps or registers.
    pub(super) fn check_alone(&self, call: &'static str, code: c_int) -> Result<(), DeviceError> {
        self.api.check_alone(call, code)
    }

    /// Nothing more of it will work in this process.
    pub(super) fn lose(&self) {
        self.lost.store(true, Ordering::Relaxed);
    }

    /// What a call on a stream or an event answered; remembers when the device is lost.
    pub(super) fn check(&self, call: &'static str, code: c_int) -> Result<(), DeviceError> {
        let result = self.api.check(call, code);
        if matches!(result, Err(DeviceError::Lost { .. })) {
            self.lost.store(true, Ordering::Relaxed);
        }
        result
    }

    /// The device's number as allocations name it.
    pub(super) const fn number(&self) -> c_int {
        self.device
    }

    pub(super) fn attribute(&self, attribute: Attribute) -> bool {
        let mut value: c_int = 0;
        // SAFETY: room for one int; a number that the driver does not know is an error.
        let code = unsafe { (self.api.device_attribute)(&raw mut value, attribute as c_int, self.device) };
        code == super::api::SUCCESS && value != 0
    }

    /// The identity of another GPU of this process, if this one reads its memory directly.
    pub(super) fn reaches(&self, other: u32) -> Option<[u8; 16]> {
        let (mut device, mut can): (Ordinal, c_int) = (0, 0);
        // SAFETY: room for one device.
        let code = unsafe { (self.api.device_get)(&raw mut device, c_int::try_from(other).ok()?) };
        self.api.check("cuDeviceGet", code).ok()?;
        // SAFETY: room for one int; both are devices.
        let code = unsafe { (self.api.can_access_peer)(&raw mut can, self.device, device) };
        self.api.check("cuDeviceCanAccessPeer", code).ok()?;
        if can == 0 { None } else { uuid_of(self.api, device).ok() }
    }

    pub(super) fn uuid(&self) -> Result<[u8; 16], DeviceError> {
        uuid_of(self.api, self.device)
    }

    pub(super) fn name(&self) -> Result<String, DeviceError> {
        let mut name = [0_u8; 256];
        let len = c_int::try_from(name.len()).expect("it is short");
        // SAFETY: room for `len` bytes; the driver ends the text with NUL.
        let code = unsafe { (self.api.device_name)(name.as_mut_ptr().cast(), len, self.device) };
        self.check("cuDeviceGetName", code)?;
        Ok(CStr::from_bytes_until_nul(&name).map(|n| n.to_string_lossy().into_owned()).unwrap_or_default())
    }

    pub(super) fn total_bytes(&self) -> Result<u64, DeviceError> {
        let mut bytes = 0_usize;
        // SAFETY: room for one size.
        let code = unsafe { (self.api.device_memory)(&raw mut bytes, self.device) };
        self.check("cuDeviceTotalMem", code)?;
        Ok(bytes as u64)
    }

    pub(super) fn free_bytes(&self) -> Result<u64, DeviceError> {
        let _entered = self.enter()?;
        let (mut free, mut total) = (0_usize, 0_usize);
        // SAFETY: room for two sizes; a context is current.
        let code = unsafe { (self.api.memory_info)(&raw mut free, &raw mut total) };
        self.check("cuMemGetInfo", code)?;
        Ok(free as u64)
    }

    /// An event of what the stream was given so far.
    pub(super) fn fence(self: &std::sync::Arc<Self>, stream: EngineStream) -> Result<Event, DeviceError> {
        let _entered = self.enter()?;
        let event = Event::create(self)?;
        event.record(handle_of(stream)?)?;
        Ok(event)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once by `open`; streams, events, memory and modules of ours hold this value and are gone.
        let _code = unsafe { (self.api.primary_release)(self.device) };
    }
}

fn uuid_of(api: &Api, device: Ordinal) -> Result<[u8; 16], DeviceError> {
    let mut uuid = [0; 16];
    // SAFETY: room for a uuid.
    let code = unsafe { (api.device_uuid)(&raw mut uuid, device) };
    api.check("cuDeviceGetUuid", code)?;
    Ok(uuid)
}

fn handle_of(stream: EngineStream) -> Result<Handle, DeviceError> {
    let address = usize::try_from(stream.0).map_err(|_| DeviceError::Invalid { what: "the stream is no handle" })?;
    Ok(std::ptr::with_exposed_provenance_mut(address))
}

/// A point in a stream.
#[derive(Debug)]
pub(super) struct Event {
    context: std::sync::Arc<Context>,
    handle: Handle,
}

// SAFETY: events may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// A new one; the context is current.
    pub(super) fn create(context: &std::sync::Arc<Context>) -> Result<Self, DeviceError> {
        let mut handle: Handle = std::ptr::null_mut();
        // SAFETY: room for one handle; a context is current.
        let code = unsafe { (context.api.event_create)(&raw mut handle, EVENT_FLAGS) };
        context.check("cuEventCreate", code)?;
        Ok(Self { context: std::sync::Arc::clone(context), handle })
    }

    /// Puts it at the end of what the stream was given; the context is current.
    pub(super) fn record(&self, stream: Handle) -> Result<(), DeviceError> {
        // SAFETY: the event is ours; the stream is ours or one that the engine named, of the same context.
        let code = unsafe { (self.context.api.event_record)(self.handle, stream) };
        self.context.check("cuEventRecord", code)
    }

    /// Has what the stream is given next wait for it; the context is current.
    pub(super) fn hold(&self, stream: Handle) -> Result<(), DeviceError> {
        // SAFETY: the event is ours and was recorded; the stream is ours.
        let code = unsafe { (self.context.api.stream_wait)(stream, self.handle, 0) };
        self.context.check("cuStreamWaitEvent", code)
    }

    /// Sleeps until it is reached.
    pub(super) fn wait(&self) -> Result<(), DeviceError> {
        // SAFETY: the event is ours; it needs no current context.
        let code = unsafe { (self.context.api.event_synchronize)(self.handle) };
        self.context.check("cuEventSynchronize", code)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: ours; the driver frees it once nothing waits for it.
        let _code = unsafe { (self.context.api.event_destroy)(self.handle) };
    }
}
