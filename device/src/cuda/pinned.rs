//! The wall around host memory that the GPU reaches: ranges that are registered, and small tables that kernels read.
#![expect(unsafe_code, reason = "registers and allocates host memory with the driver")]

use std::ffi::{c_uint, c_void};
use std::sync::Arc;

use super::context::{Attribute, Context};
use crate::{DeviceError, Registered, Span};

/// `CU_MEMHOSTREGISTER_PORTABLE | DEVICEMAP`, and the same bits for allocations.
const PORTABLE_MAPPED: c_uint = 1 | 2;
/// `CU_MEMHOSTREGISTER_READ_ONLY`.
const READ_ONLY: c_uint = 8;

/// A registered range.
#[derive(Debug)]
pub(super) struct HostPin {
    context: Arc<Context>,
    span: Span,
}

fn pointer(span: Span) -> Result<*mut c_void, DeviceError> {
    let address = usize::try_from(span.base).map_err(|_| DeviceError::Invalid { what: "the range is no address" })?;
    Ok(std::ptr::with_exposed_provenance_mut(address))
}

impl HostPin {
    /// Registers.
    ///
    /// # Safety
    /// The range stays mapped until this value is dropped.
    pub(super) unsafe fn new(context: &Arc<Context>, span: Span, writable: bool) -> Result<Self, DeviceError> {
        if span.base == 0 || span.bytes == 0 || span.end().is_none() {
            return Err(DeviceError::Invalid { what: "the range to register is empty" });
        }
        if !writable && !context.attribute(Attribute::ReadOnlyRegister) {
            return Err(DeviceError::Unsupported { what: "registering memory that is mapped read-only" });
        }
        let _entered = context.enter()?;
        let flags = PORTABLE_MAPPED | if writable { 0 } else { READ_ONLY };
        let bytes = usize::try_from(span.bytes).map_err(|_| DeviceError::Invalid { what: "the range is too long" })?;
        let at = pointer(span)?;
        // SAFETY: the range is mapped, as the caller promises; the driver refuses what it cannot register.
        let code = unsafe { (context.api.host_register)(at, bytes, flags) };
        context.check_alone("cuMemHostRegister", code)?;
        Ok(Self { context: Arc::clone(context), span })
    }
}

impl Registered for HostPin {
    fn span(&self) -> Span {
        self.span
    }
}

impl Drop for HostPin {
    fn drop(&mut self) {
        let (Ok(_entered), Ok(at)) = (self.context.enter(), pointer(self.span)) else { return };
        // SAFETY: registered by `new` with this address. Copies that use it hold this value.
        let code = unsafe { (self.context.api.host_unregister)(at) };
        if let Err(error) = self.context.check_alone("cuMemHostUnregister", code) {
            tracing::warn!(%error, "host memory stays registered with the GPU");
        }
    }
}

/// A table of words that host and GPU share.
#[derive(Debug)]
pub(super) struct Table {
    context: Arc<Context>,
    at: *mut u64,
    words: usize,
}

// SAFETY: the memory is this value's alone; who writes when is up to its owner.
unsafe impl Send for Table {}

impl Table {
    /// Room for so many words.
    pub(super) fn new(context: &Arc<Context>, words: usize) -> Result<Self, DeviceError> {
        let _entered = context.enter()?;
        let mut at: *mut c_void = std::ptr::null_mut();
        let bytes = words.max(1) * size_of::<u64>();
        // SAFETY: room for one pointer; freed when this value is dropped.
        let code = unsafe { (context.api.host_alloc)(&raw mut at, bytes, PORTABLE_MAPPED) };
        context.check_alone("cuMemHostAlloc", code)?;
        // SAFETY: `bytes` bytes of ours that nobody else has yet.
        unsafe { at.cast::<u8>().write_bytes(0, bytes) };
        Ok(Self { context: Arc::clone(context), at: at.cast(), words: words.max(1) })
    }

    pub(super) const fn words(&self) -> usize {
        self.words
    }

    /// Where word `index` lies, for host and GPU: with unified addressing it is one address.
    pub(super) fn address(&self, index: usize) -> u64 {
        self.at.wrapping_add(index).expose_provenance() as u64
    }

    /// Writes words from `at` on. Only while no kernel uses the table.
    pub(super) fn fill(&mut self, at: usize, words: impl IntoIterator<Item = u64>) {
        for (index, word) in (at..).zip(words) {
            assert!(index < self.words, "what is written fits the table");
            // SAFETY: inside the table, which this thread alone uses.
            unsafe { self.at.wrapping_add(index).write_volatile(word) };
        }
    }

    /// Reads words. Only once the kernel that writes them has ended.
    pub(super) fn read(&self, at: usize, count: usize) -> Vec<u64> {
        assert!(at + count <= self.words, "what is read lies in the table");
        // SAFETY: inside the table; the kernel that wrote has ended, as the caller says.
        (at..at + count).map(|index| unsafe { self.at.wrapping_add(index).read_volatile() }).collect()
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        let Ok(_entered) = self.context.enter() else { return };
        // SAFETY: allocated by `new`; no kernel uses it any more.
        let _code = unsafe { (self.context.api.host_free)(self.at.cast()) };
    }
}
