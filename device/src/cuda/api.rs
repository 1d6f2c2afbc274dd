//! The functions of NVIDIA's driver that this crate uses, found at run time (signatures: cuda.h of CUDA 12.2 to 13.0).
//!
//! Own declarations, not a crate's: every number that the driver answers is a plain integer here, because a newer driver
//! answers codes that an older list does not have, and every function that is missing is an error
//! (docs/decisions/0010-own-cuda-bindings.md).
#![expect(unsafe_code, reason = "opens the driver's library and declares its functions")]

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use crate::DeviceError;

/// The driver's library.
pub(super) const LIBRARY: &str = "libcuda.so.1";

/// `CUdevice`.
pub(super) type Ordinal = c_int;
/// `CUcontext`, `CUstream`, `CUevent`, `CUmodule`, `CUfunction`: opaque.
pub(super) type Handle = *mut c_void;
/// `CUdeviceptr`.
pub(super) type Address = u64;
/// `CUmemGenericAllocationHandle`.
pub(super) type Allocation = u64;

/// `CUmemLocation`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Location {
    /// 0 unsaid, 1 device.
    pub(super) kind: c_uint,
    pub(super) id: c_int,
}

/// `CUmemAllocationProp`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct AllocationProp {
    /// 1: pinned.
    pub(super) kind: c_uint,
    /// 1: POSIX file descriptor.
    pub(super) handle_types: c_uint,
    pub(super) location: Location,
    pub(super) win32: *mut c_void,
    pub(super) compression: u8,
    pub(super) rdma_capable: u8,
    pub(super) usage: u16,
    pub(super) reserved: [u8; 4],
}

/// `CUmemAccessDesc`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct AccessDesc {
    pub(super) location: Location,
    /// 1 read, 3 read and write.
    pub(super) flags: c_uint,
}

/// `CUmemcpyAttributes`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct CopyAttributes {
    /// 1: sources are read in the stream's order.
    pub(super) source_order: c_uint,
    pub(super) source: Location,
    pub(super) destination: Location,
    pub(super) flags: c_uint,
}

/// A success.
pub(super) const SUCCESS: c_int = 0;
/// `CUDA_ERROR_UNKNOWN`: nothing more will be asked of the device, but its copies may be under way.
const UNKNOWN: c_int = 999;
/// `CUDA_ERROR_OUT_OF_MEMORY`.
const OUT_OF_MEMORY: c_int = 2;
/// Answers after which nothing works any more in this process: `DEINITIALIZED`, `ECC_UNCORRECTABLE`,
/// `NVLINK_UNCORRECTABLE`, `CONTAINED`, `ILLEGAL_ADDRESS`, `LAUNCH_TIMEOUT`, `CONTEXT_IS_DESTROYED`, `ASSERT`,
/// `HARDWARE_STACK_ERROR` to `LAUNCH_FAILED`, `TENSOR_MEMORY_LEAK`, `UNKNOWN`.
const LOST: [c_int; 16] = [4, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 999];

macro_rules! functions {
    ($($(#[$doc:meta])* $field:ident = $name:literal: fn($($argument:ty),*);)+ ; $($(#[$odoc:meta])* $ofield:ident = $oname:literal: fn($($oargument:ty),*);)+) => {
        /// The functions, by what they do. Those below are there on every driver from 11.4 on.
        pub(super) struct Api {
            $($(#[$doc])* pub(super) $field: unsafe extern "C" fn($($argument),*) -> c_int,)+
            $($(#[$odoc])* pub(super) $ofield: Option<unsafe extern "C" fn($($oargument),*) -> c_int>,)+
        }

        impl Api {
            /// Finds every function in `library`.
            fn find(library: &Library) -> Result<Self, DeviceError> {
                Ok(Self {
                    $($field: {
                        // SAFETY: the type is that of cuda.h for this versioned name.
                        let found = unsafe { library.get::<unsafe extern "C" fn($($argument),*) -> c_int>($name) };
                        *found.map_err(|_| DeviceError::MissingSymbol { name: $name })?
                    },)+
                    $($ofield: {
                        // SAFETY: as above.
                        let found = unsafe { library.get::<unsafe extern "C" fn($($oargument),*) -> c_int>($oname) };
                        found.ok().map(|found| *found)
                    },)+
                })
            }
        }
    };
}

functions! {
    init = "cuInit": fn(c_uint);
    driver_version = "cuDriverGetVersion": fn(*mut c_int);
    error_name = "cuGetErrorName": fn(c_int, *mut *const c_char);
    device_count = "cuDeviceGetCount": fn(*mut c_int);
    device_get = "cuDeviceGet": fn(*mut Ordinal, c_int);
    device_name = "cuDeviceGetName": fn(*mut c_char, c_int, Ordinal);
    device_uuid = "cuDeviceGetUuid_v2": fn(*mut [u8; 16], Ordinal);
    device_memory = "cuDeviceTotalMem_v2": fn(*mut usize, Ordinal);
    can_access_peer = "cuDeviceCanAccessPeer": fn(*mut c_int, Ordinal, Ordinal);
    device_attribute = "cuDeviceGetAttribute": fn(*mut c_int, c_int, Ordinal);
    primary_retain = "cuDevicePrimaryCtxRetain": fn(*mut Handle, Ordinal);
    primary_release = "cuDevicePrimaryCtxRelease_v2": fn(Ordinal);
    context_push = "cuCtxPushCurrent_v2": fn(Handle);
    context_pop = "cuCtxPopCurrent_v2": fn(*mut Handle);
    context_synchronize = "cuCtxSynchronize": fn();
    capture_mode = "cuThreadExchangeStreamCaptureMode": fn(*mut c_uint);
    stream_priorities = "cuCtxGetStreamPriorityRange": fn(*mut c_int, *mut c_int);
    memory_info = "cuMemGetInfo_v2": fn(*mut usize, *mut usize);
    stream_create = "cuStreamCreateWithPriority": fn(*mut Handle, c_uint, c_int);
    stream_destroy = "cuStreamDestroy_v2": fn(Handle);
    stream_wait = "cuStreamWaitEvent": fn(Handle, Handle, c_uint);
    stream_synchronize = "cuStreamSynchronize": fn(Handle);
    event_create = "cuEventCreate": fn(*mut Handle, c_uint);
    event_destroy = "cuEventDestroy_v2": fn(Handle);
    event_record = "cuEventRecord": fn(Handle, Handle);
    event_synchronize = "cuEventSynchronize": fn(Handle);
    host_register = "cuMemHostRegister_v2": fn(*mut c_void, usize, c_uint);
    host_unregister = "cuMemHostUnregister": fn(*mut c_void);
    host_alloc = "cuMemHostAlloc": fn(*mut *mut c_void, usize, c_uint);
    host_free = "cuMemFreeHost": fn(*mut c_void);
    copy_async = "cuMemcpyAsync": fn(Address, Address, usize, Handle);
    copy_to_device = "cuMemcpyHtoD_v2": fn(Address, *const c_void, usize);
    granularity = "cuMemGetAllocationGranularity": fn(*mut usize, *const AllocationProp, c_uint);
    vmm_create = "cuMemCreate": fn(*mut Allocation, usize, *const AllocationProp, u64);
    vmm_release = "cuMemRelease": fn(Allocation);
    vmm_export = "cuMemExportToShareableHandle": fn(*mut c_void, Allocation, c_uint, u64);
    vmm_import = "cuMemImportFromShareableHandle": fn(*mut Allocation, *mut c_void, c_uint);
    vmm_reserve = "cuMemAddressReserve": fn(*mut Address, usize, usize, Address, u64);
    vmm_unreserve = "cuMemAddressFree": fn(Address, usize);
    vmm_map = "cuMemMap": fn(Address, usize, usize, Allocation, u64);
    vmm_unmap = "cuMemUnmap": fn(Address, usize);
    vmm_access = "cuMemSetAccess": fn(Address, usize, *const AccessDesc, usize);
    module_load = "cuModuleLoadData": fn(*mut Handle, *const c_void);
    module_unload = "cuModuleUnload": fn(Handle);
    module_function = "cuModuleGetFunction": fn(*mut Handle, Handle, *const c_char);
    module_global = "cuModuleGetGlobal_v2": fn(*mut Address, *mut usize, Handle, *const c_char);
    launch = "cuLaunchKernel":
        fn(Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut *mut c_void, *mut *mut c_void);
    ;
    /// From 12.8 on.
    batch = "cuMemcpyBatchAsync":
        fn(*const Address, *const Address, *const usize, usize, *const CopyAttributes, *const usize, usize, *mut usize, Handle);
    /// Of old; for tests.
    #[cfg_attr(not(test), expect(dead_code, reason = "the tests hold streams up"))]
    host_function = "cuLaunchHostFunc": fn(Handle, extern "C" fn(*mut c_void), *mut c_void);
    /// From 13.0 on, without the place of a failure.
    batch_v2 = "cuMemcpyBatchAsync_v2":
        fn(*const Address, *const Address, *const usize, usize, *const CopyAttributes, *const usize, usize, Handle);
}

/// Whether an answer means that nothing of the process is under way on the device any more.
pub(super) fn is_dead(error: &DeviceError) -> bool {
    matches!(error, DeviceError::Lost { code, .. } if *code != UNKNOWN && *code != SUCCESS)
}

impl std::fmt::Debug for Api {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Api").finish_non_exhaustive()
    }
}

impl Api {
    /// Opens the driver's library and tells the driver to begin. The library is never unloaded: it has threads of its own.
    ///
    /// # Errors
    /// [`DeviceError::Absent`], [`DeviceError::MissingSymbol`].
    pub(super) fn open(library: &str) -> Result<&'static Self, DeviceError> {
        // SAFETY: runs the initializers of NVIDIA's driver, which expect nothing of their caller.
        let opened = unsafe { Library::open(Some(library), RTLD_NOW | RTLD_LOCAL) };
        let library = opened.map_err(|error| {
            let said = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
            DeviceError::Absent { why: format!("no CUDA driver on this machine ({said})") }
        })?;
        let api: &'static Self = Box::leak(Box::new(Self::find(&library)?));
        let _kept = std::mem::ManuallyDrop::new(library);
        // SAFETY: the function has no preconditions; it may be called any number of times.
        let code = unsafe { (api.init)(0) };
        if code == SUCCESS {
            return Ok(api);
        }
        let name = api.name_of(code);
        Err(DeviceError::Absent { why: format!("the CUDA driver does not start: {name} ({code})") })
    }

    /// The driver's name for one of its numbers.
    pub(super) fn name_of(&self, code: c_int) -> String {
        let mut text = std::ptr::null();
        // SAFETY: `text` is room for one pointer.
        let known = unsafe { (self.error_name)(code, &raw mut text) };
        if known != SUCCESS || text.is_null() {
            return "unknown error".to_owned();
        }
        // SAFETY: the driver answers a NUL-terminated text of static lifetime.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }

    /// What a call answered after whose failure everything else still works, as a result.
    pub(super) fn check_alone(&self, call: &'static str, code: c_int) -> Result<(), DeviceError> {
        match code {
            SUCCESS => Ok(()),
            OUT_OF_MEMORY => Err(DeviceError::NoMemory { bytes: 0 }),
            code => Err(DeviceError::Call { call, code, name: self.name_of(code) }),
        }
    }

    /// What a call on a stream or an event answered, as a result.
    pub(super) fn check(&self, call: &'static str, code: c_int) -> Result<(), DeviceError> {
        if LOST.contains(&code) {
            return Err(DeviceError::Lost { call, code, name: self.name_of(code) });
        }
        self.check_alone(call, code)
    }
}

const _: () = assert!(size_of::<AllocationProp>() == 32);
const _: () = assert!(size_of::<AccessDesc>() == 12);
const _: () = assert!(size_of::<CopyAttributes>() == 24);
