//! Owned memory for I/O: a pinned frame or aligned heap memory. It moves into an operation and comes back with its result.
//!
//! *Invariants*: base and capacity are multiples of 4096, as O_DIRECT asks; the address does not change while the value
//! moves.
#![expect(unsafe_code, reason = "allocates aligned memory, and copies from and to memory that other processes share")]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

use crate::checksum::EMPTY;
use crate::copy::{Direction, Run, checksum, copy, copy_checksummed};
use crate::{FramePin, PAGE_BYTES, size};

const ALIGN: usize = size(PAGE_BYTES);

/// A stretch of memory that whoever holds the value keeps alive: the safe face of the raw copies.
#[derive(Debug)]
pub(crate) struct Span {
    base: NonNull<u8>,
    len: usize,
    capacity: usize,
}

// SAFETY: plain memory without thread affinity; what keeps it alive (a pin, an allocation) can be sent too.
unsafe impl Send for Span {}
// SAFETY: through a shared reference it is read and written like the shared memory it may be, see `FramePin`.
unsafe impl Sync for Span {}

impl Span {
    /// Of the slot at `base`, which the caller keeps mapped and taken as long as the span lives.
    pub(crate) fn of_slot(base: *mut u8, len: usize, capacity: usize) -> Self {
        assert!(len <= capacity, "a block of {len} bytes in a slot of {capacity}");
        Self { base: NonNull::new(base).expect("mappings are never at address zero"), len, capacity }
    }

    pub(crate) fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// The address of `at..at + len`.
    fn part(&self, at: usize, len: usize) -> *mut u8 {
        let inside = at.checked_add(len).is_some_and(|end| end <= self.len);
        assert!(inside, "{len} bytes at {at} of a buffer of {}", self.len);
        self.base().wrapping_add(at)
    }

    pub(crate) fn write(&self, at: usize, bytes: &[u8]) -> u64 {
        let run = Run { src: bytes.as_ptr(), dst: self.part(at, bytes.len()), len: bytes.len() };
        // SAFETY: the source is borrowed; the destination is inside memory that this value's holder keeps and writes alone.
        unsafe { copy_checksummed(&[run], Direction::IntoFrame) }
    }

    pub(crate) fn read(&self, at: usize, into: &mut [u8]) -> u64 {
        let run = Run { src: self.part(at, into.len()), dst: into.as_mut_ptr(), len: into.len() };
        // SAFETY: the destination is borrowed mutably, so it is apart from the source, which this value's holder keeps.
        unsafe { copy_checksummed(&[run], Direction::FromFrame) }
    }

    pub(crate) fn checksum(&self, before: u64, at: usize, len: usize) -> u64 {
        // SAFETY: inside memory that this value's holder keeps.
        unsafe { checksum(before, self.part(at, len), len) }
    }

    pub(crate) fn fill(&self, at: usize, len: usize, byte: u8) {
        // SAFETY: inside memory that this value's holder keeps and writes alone.
        unsafe { self.part(at, len).write_bytes(byte, len) };
    }
}

/// Heap memory aligned for direct I/O.
#[derive(Debug)]
pub struct AlignedBuf {
    span: Span,
}

impl AlignedBuf {
    /// `len` zero bytes, with a capacity rounded up to 4096.
    ///
    /// # Panics
    /// If `len` is beyond the address space. Aborts, as all allocations do, when memory ran out.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        let capacity = len.max(1).next_multiple_of(ALIGN);
        let layout = Self::layout(capacity);
        // SAFETY: the layout is not of zero size.
        let memory = unsafe { alloc_zeroed(layout) };
        let Some(base) = NonNull::new(memory) else { handle_alloc_error(layout) };
        Self { span: Span { base, len, capacity } }
    }

    /// A copy of `bytes`.
    #[must_use]
    pub fn from_slice(bytes: &[u8]) -> Self {
        let mut buf = Self::zeroed(bytes.len());
        buf.as_mut_slice().copy_from_slice(bytes);
        buf
    }

    /// Bytes in use.
    #[must_use]
    pub fn len(&self) -> usize {
        self.span.len
    }

    /// Whether no byte is in use.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.span.len == 0
    }

    /// Bytes of memory, a multiple of 4096.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.span.capacity
    }

    /// Sets the bytes in use; what was beyond is zero or what was last written there.
    ///
    /// # Panics
    /// If `len` exceeds the capacity.
    pub fn set_len(&mut self, len: usize) {
        assert!(len <= self.span.capacity, "{len} bytes in a buffer of {}", self.span.capacity);
        self.span.len = len;
    }

    /// The bytes in use.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: `len` bytes of an initialised allocation that this value owns, borrowed with it.
        unsafe { std::slice::from_raw_parts(self.span.base(), self.span.len) }
    }

    /// The bytes in use.
    #[must_use]
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: `len` bytes of an initialised allocation that this value owns, borrowed mutably with it.
        unsafe { std::slice::from_raw_parts_mut(self.span.base(), self.span.len) }
    }

    fn layout(capacity: usize) -> Layout {
        Layout::from_size_align(capacity, ALIGN).expect("buffers are smaller than the address space")
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: allocated by `zeroed` with the same layout, and owned by this value alone.
        unsafe { dealloc(self.span.base(), Self::layout(self.span.capacity)) };
    }
}

/// Memory that an I/O operation owns until it completes.
#[derive(Debug)]
pub enum IoBuf {
    /// A frame.
    Frame(FramePin),
    /// Heap memory.
    Heap(AlignedBuf),
}

impl IoBuf {
    /// `len` zero bytes on the heap.
    #[must_use]
    pub fn heap(len: usize) -> Self {
        Self::Heap(AlignedBuf::zeroed(len))
    }

    fn span(&self) -> &Span {
        match self {
            Self::Frame(pin) => pin.span(),
            Self::Heap(buf) => &buf.span,
        }
    }

    /// First byte, 4096-aligned.
    #[must_use]
    pub fn as_ptr(&self) -> *const u8 {
        self.span().base()
    }

    /// First byte, 4096-aligned.
    #[must_use]
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.span().base()
    }

    /// Bytes of payload.
    #[must_use]
    pub fn len(&self) -> usize {
        self.span().len
    }

    /// Whether there is no payload.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of memory, a multiple of 4096: what direct I/O may transfer.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.span().capacity
    }

    /// Writes `bytes` at offset `at`; returns their CRC-64/NVME.
    ///
    /// # Panics
    /// If they do not fit.
    pub fn copy_in_at(&mut self, at: usize, bytes: &[u8]) -> u64 {
        self.span().write(at, bytes)
    }

    /// Writes `bytes` to the start; returns their CRC-64/NVME.
    ///
    /// # Panics
    /// If they do not fit.
    pub fn copy_in(&mut self, bytes: &[u8]) -> u64 {
        self.copy_in_at(0, bytes)
    }

    /// Reads `into.len()` bytes from offset `at`; returns the CRC-64/NVME of what was delivered.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn copy_out_at(&self, at: usize, into: &mut [u8]) -> u64 {
        self.span().read(at, into)
    }

    /// Reads `into.len()` bytes from the start; returns the CRC-64/NVME of what was delivered.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn copy_out(&self, into: &mut [u8]) -> u64 {
        self.copy_out_at(0, into)
    }

    /// Copies the whole payload of `from` to the start; returns its CRC-64/NVME as it was written.
    ///
    /// # Panics
    /// If it does not fit.
    pub fn copy_from(&mut self, from: &Self) -> u64 {
        let run = self.run_from(from);
        // SAFETY: as for `Span::write`; `run_from` checked bounds and that the buffers are apart.
        unsafe { copy_checksummed(&[run], Direction::IntoFrame) }
    }

    /// As [`IoBuf::copy_from`], without a checksum.
    ///
    /// # Panics
    /// If it does not fit.
    pub fn copy_from_unchecked(&mut self, from: &Self) {
        let run = self.run_from(from);
        // SAFETY: as for `Span::write`; `run_from` checked bounds and that the buffers are apart.
        unsafe { copy(&[run], Direction::IntoFrame) };
    }

    fn run_from(&self, from: &Self) -> Run {
        let run = Run { src: from.as_ptr(), dst: self.span().part(0, from.len()), len: from.len() };
        assert!(run.src.addr().abs_diff(run.dst.addr()) >= run.len || run.len == 0, "copying a frame onto itself");
        run
    }

    /// CRC-64/NVME of the payload.
    #[must_use]
    pub fn checksum(&self) -> u64 {
        self.span().checksum(EMPTY, 0, self.len())
    }

    /// CRC-64/NVME of `len` bytes from offset `at`.
    ///
    /// # Panics
    /// If there are not so many.
    #[must_use]
    pub fn checksum_at(&self, at: usize, len: usize) -> u64 {
        self.checksum_after(EMPTY, at, len)
    }

    /// CRC-64/NVME of bytes whose checksum is `before`, and the `len` bytes from offset `at` after them.
    ///
    /// # Panics
    /// If there are not so many.
    #[must_use]
    pub fn checksum_after(&self, before: u64, at: usize, len: usize) -> u64 {
        self.span().checksum(before, at, len)
    }

    /// Sets every byte of the payload.
    pub fn fill(&mut self, byte: u8) {
        self.span().fill(0, self.len(), byte);
    }

    /// Zeroes what lies between the payload's end and the capacity, so that direct I/O writes nobody else's bytes.
    pub fn zero_padding(&mut self) {
        let span = self.span();
        let padding = span.base().wrapping_add(span.len);
        // SAFETY: between `len` and `capacity` of memory that this value's holder keeps and writes alone.
        unsafe { padding.write_bytes(0, span.capacity - span.len) };
    }
}

impl From<FramePin> for IoBuf {
    fn from(pin: FramePin) -> Self {
        Self::Frame(pin)
    }
}

impl From<AlignedBuf> for IoBuf {
    fn from(buf: AlignedBuf) -> Self {
        Self::Heap(buf)
    }
}

#[cfg(test)]
mod tests;
