//! A shared mapping of a sealed memfd: the only place that calls mmap.
//!
//! *Invariants*: the descriptor was sealed against shrinking before it is mapped and is at least as long as the mapping,
//! so no access inside `len` faults; the mapping lives exactly as long as the value.
#![expect(unsafe_code, reason = "maps memory that other processes share")]

use std::os::fd::BorrowedFd;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicU64, Ordering, fence};

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

use crate::{MemoryError, PAGE_BYTES, size};

/// Bytes populated by one madvise call, so that the address space is not locked for a whole extent.
const POPULATE_STEP_BYTES: usize = 32 << 20;

#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
    writable: bool,
}

// SAFETY: the mapping is plain memory with no thread affinity; it is unmapped only by drop, which needs ownership.
unsafe impl Send for Mapping {}
// SAFETY: shared access hands out raw pointers and atomic words only; whoever dereferences a pointer answers for races.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `len` bytes of `fd`, shared. The caller has checked size and seals.
    pub(crate) fn shared(fd: BorrowedFd<'_>, len: usize, writable: bool) -> Result<Self, MemoryError> {
        let protection = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        // SAFETY: a fresh address is asked for (null hint, no MAP_FIXED), so no existing memory is replaced.
        let mapped = unsafe { mmap(null_mut(), len, protection, MapFlags::SHARED, fd, 0) };
        let base = mapped.map_err(MemoryError::system("mmap"))?;
        let base = NonNull::new(base.cast()).ok_or(MemoryError::BadDescriptor { reason: "mapped at address zero" })?;
        Ok(Self { base, len, writable })
    }

    pub(crate) fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn writable(&self) -> bool {
        self.writable
    }

    /// A pointer to `bytes` bytes at `offset`, if they are inside.
    pub(crate) fn range(&self, offset: u64, bytes: u64) -> Result<*mut u8, MemoryError> {
        let inside = offset.checked_add(bytes).is_some_and(|end| end <= self.len as u64);
        if !inside {
            return Err(MemoryError::OutOfBounds { offset, bytes, len: self.len as u64 });
        }
        Ok(self.base().wrapping_add(size(offset)))
    }

    /// Asks for transparent huge pages.
    pub(crate) fn advise_huge(&self) -> Result<(), Errno> {
        // SAFETY: the whole mapping is ours, and this advice changes no contents.
        unsafe { madvise(self.base().cast(), self.len, Advice::LinuxHugepage) }
    }

    /// Maps the pages of a range before their first use; for writing, they are also allocated.
    ///
    /// Kernels without MADV_POPULATE (before 5.14) answer `EINVAL`.
    pub(crate) fn populate(&self, offset: usize, len: usize) -> Result<(), Errno> {
        let advice = if self.writable { Advice::LinuxPopulateWrite } else { Advice::LinuxPopulateRead };
        let page = size(PAGE_BYTES);
        let end = offset.saturating_add(len).min(self.len);
        let mut at = offset - offset % page;
        while at < end {
            let step = (end - at).min(POPULATE_STEP_BYTES);
            let from = self.base().wrapping_add(at);
            // SAFETY: `at..at + step` is inside the mapping; populating changes no contents and reports, instead of
            // raising, a page that cannot be had.
            match unsafe { madvise(from.cast(), step, advice) } {
                Ok(()) => at += step,
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    /// Reads one byte of every page of a range (writes a zero there if `fresh`: nobody else has the memory yet).
    pub(crate) fn touch(&self, offset: usize, len: usize, fresh: bool) {
        let end = offset.saturating_add(len).min(self.len);
        for at in (offset..end).step_by(size(PAGE_BYTES)) {
            let byte = self.base().wrapping_add(at);
            if fresh && self.writable {
                // SAFETY: inside a writable mapping that was never shared, whose pages are zero.
                unsafe { byte.write_volatile(0) };
            } else {
                // SAFETY: inside the mapping, which is readable.
                let _seen = unsafe { byte.read_volatile() };
            }
        }
    }

    /// The u64 word at `index`; `None` outside. Ordered after earlier reads and before later ones.
    pub(crate) fn word(&self, index: u64) -> Option<u64> {
        let at = self.range(index.checked_mul(8)?, 8).ok()?;
        fence(Ordering::Acquire);
        // SAFETY: in bounds, 8-aligned (the base is page-aligned), and only ever accessed atomically in every process.
        let word = unsafe { AtomicU64::from_ptr(at.cast()) };
        // A relaxed load, because only that is defined on memory mapped read-only; the fences order it.
        let value = word.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        Some(value)
    }

    /// Stores the u64 word at `index`, ordered after earlier writes and before later ones.
    pub(crate) fn set_word(&self, index: u64, value: u64) {
        assert!(self.writable, "words are stored by the owner of the table");
        let at = self.range(index * 8, 8).expect("the table covers every slot of its extent");
        // SAFETY: in bounds, writable, 8-aligned, and only ever accessed atomically in every process.
        let word = unsafe { AtomicU64::from_ptr(at.cast()) };
        word.store(value, Ordering::Release);
        fence(Ordering::SeqCst);
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this value owns the mapping, and pointers into it are only used by holders of the value.
        let unmapped = unsafe { munmap(self.base().cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "munmap of an own mapping: {unmapped:?}");
    }
}
