//! The wall around the twin's memory: what stands in for device memory, and the copies that a GPU would do.
#![expect(unsafe_code, reason = "the twin does with addresses what a GPU's copy engine does")]

use std::os::fd::{AsFd, OwnedFd};

use kvtier_memory::checksum::Checksum;
use kvtier_memory::copy::Run;
use rustix::fs::{MemfdFlags, fstat, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::{DeviceError, Span};

/// A shared mapping of a memfd.
#[derive(Debug)]
pub(super) struct Bytes {
    fd: OwnedFd,
    base: usize,
    bytes: usize,
}

fn failed(call: &'static str) -> impl FnOnce(rustix::io::Errno) -> DeviceError {
    move |errno| DeviceError::Call { call, code: errno.raw_os_error(), name: errno.to_string() }
}

impl Bytes {
    pub(super) fn create(bytes: u64) -> Result<Self, DeviceError> {
        let fd = memfd_create("kvtier-twin", MemfdFlags::CLOEXEC).map_err(failed("memfd_create"))?;
        ftruncate(&fd, bytes).map_err(failed("ftruncate"))?;
        Self::map(fd, bytes)
    }

    pub(super) fn open(fd: OwnedFd, bytes: u64) -> Result<Self, DeviceError> {
        let stat = fstat(&fd).map_err(failed("fstat"))?;
        if bytes == 0 || u64::try_from(stat.st_size).map_or(true, |have| have < bytes) {
            return Err(DeviceError::Call {
                call: "import",
                code: 1,
                name: "shorter than what was asked for".to_owned(),
            });
        }
        Self::map(fd, bytes)
    }

    fn map(fd: OwnedFd, bytes: u64) -> Result<Self, DeviceError> {
        let len = usize::try_from(bytes).map_err(|_| DeviceError::NoMemory { bytes })?;
        // SAFETY: a new mapping at a place of the kernel's choice disturbs nobody.
        let base = unsafe {
            mmap(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, fd.as_fd(), 0)
        };
        let base = base.map_err(failed("mmap"))?.expose_provenance();
        Ok(Self { fd, base, bytes: len })
    }

    pub(super) const fn span(&self) -> Span {
        Span { base: self.base as u64, bytes: self.bytes as u64 }
    }

    pub(super) const fn fd(&self) -> &OwnedFd {
        &self.fd
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        let base = std::ptr::with_exposed_provenance_mut(self.base);
        // SAFETY: mapped by `map` with this length, and whoever uses its addresses keeps this value (`Work::keeps`).
        let _unmapped = unsafe { munmap(base, self.bytes) };
    }
}

/// Copies a run; with `flip`, its first byte arrives wrong.
pub(super) fn move_run(run: &Run, flip: bool) {
    // SAFETY: whoever submitted the work promised that its runs are mapped and apart until its end is told.
    unsafe { std::ptr::copy_nonoverlapping(run.src, run.dst, run.len) };
    if flip && run.len > 0 {
        // SAFETY: the first byte of what was just written.
        let first = unsafe { run.dst.read() };
        // SAFETY: as above.
        unsafe { run.dst.write(first ^ 0x40) };
    }
}

/// The checksum of spans joined.
pub(super) fn sum_of(spans: &[Span]) -> u64 {
    let mut sum = Checksum::new();
    for span in spans {
        let len = usize::try_from(span.bytes).expect("64-bit addresses");
        let at = std::ptr::with_exposed_provenance(usize::try_from(span.base).expect("64-bit addresses"));
        // SAFETY: the submitter promised that spans to be summed are this device's memory, mapped until the work's end.
        sum.update(unsafe { std::slice::from_raw_parts(at, len) });
    }
    sum.value()
}
