//! The wall around device memory that processes share: CUDA's virtual memory management, with POSIX descriptors.
#![expect(unsafe_code, reason = "calls of the driver")]

use std::ffi::{c_int, c_uint, c_void};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use super::api::{AccessDesc, Address, Allocation, AllocationProp, Location};
use super::context::{Attribute, Context};
use crate::{DeviceError, PoolMemory, Span};

/// `CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR`.
const DESCRIPTOR: c_uint = 1;
/// `CU_MEM_ALLOCATION_TYPE_PINNED`.
const PINNED: c_uint = 1;
/// `CU_MEM_LOCATION_TYPE_DEVICE`.
const ON_DEVICE: c_uint = 1;
/// `CU_MEM_ALLOC_GRANULARITY_RECOMMENDED`.
const RECOMMENDED: c_uint = 1;
/// `CU_MEM_ACCESS_FLAGS_PROT_READ`.
const READ: c_uint = 1;
/// `CU_MEM_ACCESS_FLAGS_PROT_READWRITE`.
const READ_WRITE: c_uint = 3;

/// Mapped device memory, allocated here or by another process.
#[derive(Debug)]
pub(super) struct Vmm {
    context: Arc<Context>,
    allocation: Allocation,
    address: Address,
    bytes: usize,
    is_ours: bool,
}

impl Vmm {
    /// Allocates at least `bytes`.
    pub(super) fn allocate(context: &Arc<Context>, bytes: u64) -> Result<Self, DeviceError> {
        if !context.attribute(Attribute::Vmm) || !context.attribute(Attribute::VmmDescriptors) {
            return Err(DeviceError::Unsupported { what: "device memory that processes share" });
        }
        let entered = context.enter()?;
        let prop = AllocationProp {
            kind: PINNED,
            handle_types: DESCRIPTOR,
            location: Location { kind: ON_DEVICE, id: context.number() },
            win32: std::ptr::null_mut(),
            compression: 0,
            rdma_capable: 0,
            usage: 0,
            reserved: [0; 4],
        };
        let mut unit = 0_usize;
        // SAFETY: room for one size; `prop` is whole.
        let code = unsafe { (context.api.granularity)(&raw mut unit, &raw const prop, RECOMMENDED) };
        context.check_alone("cuMemGetAllocationGranularity", code)?;
        let wanted = usize::try_from(bytes.max(1)).map_err(|_| DeviceError::NoMemory { bytes })?;
        let bytes = wanted.checked_next_multiple_of(unit.max(1)).ok_or(DeviceError::NoMemory { bytes })?;
        let mut allocation: Allocation = 0;
        // SAFETY: room for one handle; released when this value is dropped.
        let code = unsafe { (context.api.vmm_create)(&raw mut allocation, bytes, &raw const prop, 0) };
        with_bytes(context.check_alone("cuMemCreate", code), bytes as u64)?;
        drop(entered);
        Self::map(context, allocation, bytes, true)
    }

    /// Maps what another process exported.
    pub(super) fn import(context: &Arc<Context>, memory: OwnedFd, bytes: u64) -> Result<Self, DeviceError> {
        let bytes = usize::try_from(bytes).map_err(|_| DeviceError::Invalid { what: "the memory is too long" })?;
        let entered = context.enter()?;
        let mut allocation: Allocation = 0;
        let descriptor = usize::try_from(memory.as_raw_fd()).expect("a descriptor is not negative");
        let handle: *mut c_void = std::ptr::without_provenance_mut(descriptor);
        // SAFETY: room for one handle; the driver takes the descriptor by number and does not keep it.
        let code = unsafe { (context.api.vmm_import)(&raw mut allocation, handle, DESCRIPTOR) };
        context.check_alone("cuMemImportFromShareableHandle", code)?;
        drop(entered);
        Self::map(context, allocation, bytes, false)
    }

    fn map(context: &Arc<Context>, allocation: Allocation, bytes: usize, is_ours: bool) -> Result<Self, DeviceError> {
        let _entered = context.enter()?;
        let api = context.api;
        // From here on dropping gives everything back that was had.
        let mut this = Self { context: Arc::clone(context), allocation, address: 0, bytes, is_ours };
        let mut address: Address = 0;
        // SAFETY: room for one address.
        let code = unsafe { (api.vmm_reserve)(&raw mut address, bytes, 0, 0, 0) };
        context.check_alone("cuMemAddressReserve", code)?;
        // SAFETY: the range was reserved just now, the allocation is ours to map.
        let code = unsafe { (api.vmm_map)(address, bytes, 0, allocation, 0) };
        if let Err(error) = context.check_alone("cuMemMap", code) {
            // SAFETY: reserved just now, nothing is mapped there.
            let _code = unsafe { (api.vmm_unreserve)(address, bytes) };
            return Err(error);
        }
        this.address = address;
        let wanted = if is_ours { [READ_WRITE, READ_WRITE] } else { [READ, READ_WRITE] };
        let allowed = wanted.into_iter().map(|flags| this.allow(flags)).find(|allowed| *allowed == Ok(()));
        match allowed {
            Some(_) => Ok(this),
            None if is_ours => Err(DeviceError::Unsupported { what: "access to device memory of its own" }),
            None => Err(DeviceError::Unsupported { what: "reaching the memory of that GPU from this one" }),
        }
    }

    /// Lets the context's device reach the memory; the context is current.
    fn allow(&self, flags: c_uint) -> Result<(), DeviceError> {
        let access = AccessDesc { location: Location { kind: ON_DEVICE, id: self.context.number() }, flags };
        // SAFETY: the range is mapped whole; one description.
        let code = unsafe { (self.context.api.vmm_access)(self.address, self.bytes, &raw const access, 1) };
        self.context.check_alone("cuMemSetAccess", code)
    }
}

/// Says how much was wanted where there was too little.
fn with_bytes(result: Result<(), DeviceError>, bytes: u64) -> Result<(), DeviceError> {
    result.map_err(
        |error| if matches!(error, DeviceError::NoMemory { .. }) { DeviceError::NoMemory { bytes } } else { error },
    )
}

impl PoolMemory for Vmm {
    fn span(&self) -> Span {
        Span { base: self.address, bytes: self.bytes as u64 }
    }

    fn export(&self) -> Result<OwnedFd, DeviceError> {
        if !self.is_ours {
            return Err(DeviceError::Unsupported { what: "exporting imported memory" });
        }
        let _entered = self.context.enter()?;
        let mut descriptor: c_int = -1;
        let room: *mut c_void = (&raw mut descriptor).cast();
        // SAFETY: room for one descriptor; the allocation was made for this kind of handle.
        let code = unsafe { (self.context.api.vmm_export)(room, self.allocation, DESCRIPTOR, 0) };
        self.context.check_alone("cuMemExportToShareableHandle", code)?;
        if descriptor < 0 {
            return Err(DeviceError::Call {
                call: "cuMemExportToShareableHandle",
                code: 0,
                name: "no descriptor".to_owned(),
            });
        }
        // SAFETY: the driver made it for us just now.
        Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let Ok(_entered) = self.context.enter() else { return };
        let api = self.context.api;
        if self.address != 0 {
            // SAFETY: mapped by `map`; copies that use it hold this value.
            let _code = unsafe { (api.vmm_unmap)(self.address, self.bytes) };
            // SAFETY: reserved by `map`, unmapped just now.
            let _code = unsafe { (api.vmm_unreserve)(self.address, self.bytes) };
        }
        // SAFETY: ours since `allocate` or `import`; the memory goes once nobody maps it.
        let _code = unsafe { (api.vmm_release)(self.allocation) };
    }
}
