//! The wall around our kernels: text that the driver compiles for the GPU it has.
#![expect(unsafe_code, reason = "loads a module into the driver and launches its functions")]

use std::ffi::{CStr, c_uint, c_void};
use std::sync::Arc;

use super::api::{Address, Handle};
use super::context::Context;
use crate::DeviceError;
use crate::fold::{COLUMNS, Tables};

/// `kernels/kernels.ptx`, built from `kernels/kernels.cu` by `kernels/build.py`.
pub(super) const PTX: &str = concat!(include_str!("../../kernels/kernels.ptx"), "\0");

/// The loaded kernels.
#[derive(Debug)]
pub(super) struct Kernels {
    context: Arc<Context>,
    module: Handle,
    copy: Handle,
    sum: Handle,
}

// SAFETY: modules and functions may be used from any thread.
unsafe impl Send for Kernels {}
// SAFETY: as above.
unsafe impl Sync for Kernels {}

impl Kernels {
    /// Loads them.
    pub(super) fn load(context: &Arc<Context>) -> Result<Self, DeviceError> {
        let _entered = context.enter()?;
        let mut module: Handle = std::ptr::null_mut();
        // SAFETY: room for one handle; the text ends with NUL.
        let code = unsafe { (context.api.module_load)(&raw mut module, PTX.as_ptr().cast()) };
        context.check_alone("cuModuleLoadData", code)?;
        let none: Handle = std::ptr::null_mut();
        let mut this = Self { context: Arc::clone(context), module, copy: none, sum: none };
        this.copy = this.function(c"kvtier_copy")?;
        this.sum = this.function(c"kvtier_sum")?;
        let tables = Tables::new();
        this.fill(c"kvtier_fold", &tables.fold)?;
        this.fill(c"kvtier_tail", &tables.tail)?;
        // A copy from memory that is not registered may return before it has ended, and our streams wait for no other.
        // SAFETY: a context is current.
        let code = unsafe { (context.api.context_synchronize)() };
        context.check("cuCtxSynchronize", code)?;
        Ok(this)
    }

    fn function(&self, name: &CStr) -> Result<Handle, DeviceError> {
        let mut function: Handle = std::ptr::null_mut();
        // SAFETY: room for one handle; the module is loaded.
        let code = unsafe { (self.context.api.module_function)(&raw mut function, self.module, name.as_ptr()) };
        self.context.check_alone("cuModuleGetFunction", code)?;
        Ok(function)
    }

    fn fill(&self, name: &CStr, words: &[u64]) -> Result<(), DeviceError> {
        let (mut at, mut bytes): (Address, usize) = (0, 0);
        // SAFETY: room for an address and a size; the module is loaded.
        let code = unsafe { (self.context.api.module_global)(&raw mut at, &raw mut bytes, self.module, name.as_ptr()) };
        self.context.check_alone("cuModuleGetGlobal", code)?;
        if bytes != size_of_val(words) {
            return Err(DeviceError::Invalid { what: "the kernels' tables have another length" });
        }
        // SAFETY: the global has these many bytes, and no kernel runs yet.
        let code = unsafe { (self.context.api.copy_to_device)(at, words.as_ptr().cast(), bytes) };
        self.context.check("cuMemcpyHtoD", code)
    }

    /// Copies `count` runs of the table at `runs`; the context is current.
    pub(super) fn copy(&self, stream: Handle, runs: Address, count: usize) -> Result<(), DeviceError> {
        self.launch(self.copy, stream, (count, &mut [runs]))
    }

    /// Writes the raw checksums of `count` spans of the table at `spans` to `sums`; the context is current.
    pub(super) fn sum(
        &self,
        stream: Handle,
        (spans, count): (Address, usize),
        sums: Address,
    ) -> Result<(), DeviceError> {
        self.launch(self.sum, stream, (count, &mut [spans, sums]))
    }

    /// Starts a block for each of `count` pieces.
    fn launch(
        &self,
        function: Handle,
        stream: Handle,
        (count, arguments): (usize, &mut [Address]),
    ) -> Result<(), DeviceError> {
        let blocks = c_uint::try_from(count).map_err(|_| DeviceError::Invalid { what: "it has too many pieces" })?;
        let threads = c_uint::try_from(COLUMNS).expect("it is small");
        let mut places: Vec<*mut c_void> = arguments.iter_mut().map(|a| std::ptr::from_mut(a).cast()).collect();
        let none = std::ptr::null_mut();
        // SAFETY: the function is the module's, its arguments are the addresses that its source names, and the tables there
        // hold `count` pieces; the driver copies the arguments before it returns.
        let code = unsafe {
            (self.context.api.launch)(function, blocks, 1, 1, threads, 1, 1, 0, stream, places.as_mut_ptr(), none)
        };
        self.context.check("cuLaunchKernel", code)
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        let Ok(_entered) = self.context.enter() else { return };
        // SAFETY: loaded by `load`; lanes that launch from it hold this value and have ended.
        let _code = unsafe { (self.context.api.module_unload)(self.module) };
    }
}
