//! Copies between frames and engine memory, checksummed while they move.
//!
//! ```text
//! source --loads--> registers --non-temporal stores--> destination
//!                             --stores--> bounce buffer (L1) --CRC--> checksum
//! ```
//! *Invariants*: the checksum covers exactly the bytes that were stored, even if another process changes the source
//! meanwhile, because each byte is read from the source once; when a copy returns, its stores are visible to other cores.
//!
//! *Bounds*: the bounce buffer lies on the stack; nothing is allocated and nothing blocks but page faults.
#![expect(unsafe_code, reason = "copies between raw memory of this process and memory that other processes share")]

use std::ptr;

use crate::checksum::Checksum;

/// Bytes moved between two updates of the checksum: small enough that the memory's queues stay busy while it is computed,
/// large enough to compute it fast (of 2, 4, 8 and 16 KiB the best in `benches/copy.rs`).
const BOUNCE_BYTES: usize = 4 << 10;
/// Bytes of a cache line, the unit of non-temporal stores.
const LINE_BYTES: usize = 64;
/// A load smaller than this is stored through the cache, since the engine reads it next.
const CACHED_LOAD_BYTES: usize = 256 << 10;

/// Which way bytes move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// A save: from engine memory into a frame. Nobody on this core reads the frame next.
    IntoFrame,
    /// A load: from a frame into engine memory.
    FromFrame,
}

/// One contiguous piece of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First byte to read.
    pub src: *const u8,
    /// First byte to write.
    pub dst: *mut u8,
    /// Bytes.
    pub len: usize,
}

// SAFETY: a run is a pair of addresses; using them is what the unsafe functions' contracts are about.
unsafe impl Send for Run {}
// SAFETY: as above.
unsafe impl Sync for Run {}

/// Copies `runs` in order and returns the CRC-64/NVME of all bytes written, in that order.
///
/// # Safety
/// For each run, `src..src + len` must be readable and `dst..dst + len` writable for the whole call, they must not overlap
/// in this process, and no other thread of this process may write either or read the destination meanwhile. Other
/// *processes* may write the source: the bytes are then arbitrary, but the checksum is that of the bytes written.
#[must_use]
pub unsafe fn copy_checksummed(runs: &[Run], direction: Direction) -> u64 {
    let tee = tee_for(runs, direction);
    let mut bounce = Bounce([0; BOUNCE_BYTES]);
    let mut checksum = Checksum::new();
    for run in runs {
        // SAFETY: the caller's contract, run by run.
        unsafe { tee_run(*run, tee, &mut bounce, |piece| checksum.update(piece)) };
    }
    store_fence();
    checksum.value()
}

/// Copies `runs` in order, without a checksum.
///
/// # Safety
/// As for [`copy_checksummed`].
pub unsafe fn copy(runs: &[Run], direction: Direction) {
    let tee = tee_for(runs, direction);
    let mut bounce = Bounce([0; BOUNCE_BYTES]);
    for run in runs {
        // SAFETY: the caller's contract, run by run.
        unsafe { tee_run(*run, tee, &mut bounce, |_| ()) };
    }
    store_fence();
}

/// CRC-64/NVME of bytes whose checksum is `before` and the `len` bytes at `at` that follow them, each read once.
///
/// # Safety
/// `at..at + len` must be readable for the whole call, and no other thread of this process may write it meanwhile.
#[must_use]
pub unsafe fn checksum(before: u64, at: *const u8, len: usize) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if let Some(wide) = wide::Wide::detect() {
        // SAFETY: the caller's contract.
        return unsafe { wide.checksum(before, at, len) };
    }
    // SAFETY: likewise.
    unsafe { bounced(before, at, len) }
}

/// The same on every processor.
///
/// # Safety
/// As for [`checksum`].
unsafe fn bounced(before: u64, at: *const u8, len: usize) -> u64 {
    let mut bounce = Bounce([0; BOUNCE_BYTES]);
    let mut checksum = Checksum::after(before);
    for done in (0..len).step_by(BOUNCE_BYTES) {
        let piece = &mut bounce.0[..BOUNCE_BYTES.min(len - done)];
        // SAFETY: inside the caller's range; the bounce buffer is ours and as long as the piece.
        unsafe { ptr::copy_nonoverlapping(at.wrapping_add(done), piece.as_mut_ptr(), piece.len()) };
        checksum.update(piece);
    }
    checksum.value()
}

/// Where bytes stay between being read and being written.
#[repr(C, align(64))]
struct Bounce([u8; BOUNCE_BYTES]);

/// Moves whole lines from `src` to the line-aligned `dst`, as many bytes as `bounce` has, leaving a copy in `bounce`.
type Tee = unsafe fn(src: *const u8, bounce: &mut [u8], dst: *mut u8);

/// Copies one run, showing each piece to `seen` as it was written.
///
/// # Safety
/// As for [`copy_checksummed`], for one run.
unsafe fn tee_run(run: Run, tee: Tee, bounce: &mut Bounce, mut seen: impl FnMut(&[u8])) {
    let mut done = 0;
    while done < run.len {
        let (src, dst) = (run.src.wrapping_add(done), run.dst.wrapping_add(done));
        let left = run.len - done;
        let unaligned = dst.addr().wrapping_neg() & (LINE_BYTES - 1);
        let (kernel, len) = if unaligned > 0 || left < LINE_BYTES {
            // The run's head, up to a line boundary, or its tail: less than a line.
            (cached as Tee, if unaligned > 0 { unaligned.min(left) } else { left })
        } else {
            (tee, BOUNCE_BYTES.min(left & !(LINE_BYTES - 1)))
        };
        let piece = &mut bounce.0[..len];
        // SAFETY: `done..done + len` is inside the run, which the caller vouches for; `dst` is aligned where lines go, and
        // the kernel was chosen for this processor.
        unsafe { kernel(src, piece, dst) };
        seen(piece);
        done += len;
    }
}

fn tee_for(runs: &[Run], direction: Direction) -> Tee {
    let total = runs.iter().fold(0_usize, |sum, run| sum.saturating_add(run.len));
    if direction == Direction::FromFrame && total < CACHED_LOAD_BYTES { cached } else { streaming() }
}

/// Ordinary stores, of any length and alignment.
///
/// # Safety
/// `src` must be readable and `dst` writable for `bounce.len()` bytes.
unsafe fn cached(src: *const u8, bounce: &mut [u8], dst: *mut u8) {
    // SAFETY: the source's contract; the bounce buffer is ours and apart.
    unsafe { ptr::copy_nonoverlapping(src, bounce.as_mut_ptr(), bounce.len()) };
    // SAFETY: the destination's contract; what goes there is what stays in the bounce buffer.
    unsafe { ptr::copy_nonoverlapping(bounce.as_ptr(), dst, bounce.len()) };
}

#[cfg(not(target_arch = "x86_64"))]
fn streaming() -> Tee {
    cached
}

#[cfg(not(target_arch = "x86_64"))]
fn store_fence() {}

#[cfg(target_arch = "x86_64")]
use x86::{store_fence, streaming};

#[cfg(target_arch = "x86_64")]
mod wide;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(test)]
mod tests;
