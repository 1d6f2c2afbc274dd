//! The baselines: bare copies, and a bare io_uring loop.
#![expect(unsafe_code, reason = "baselines are raw copies and raw submissions")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::Instant;

use anyhow::{Context, ensure};
use io_uring::{IoUring, opcode, types};
use kvtier_memory::IoBuf;
use kvtier_memory::copy::{Direction, Run, copy, copy_checksummed};

/// libc's memcpy, run by run; seconds.
///
/// The runs are parts of buffers of this process, or of extents mapped into it, that nobody uses meanwhile: the benchmark
/// is the only user of its daemon, and waits for one copy before it begins another.
pub(crate) fn memcpy(runs: &[Run]) -> f64 {
    let begin = Instant::now();
    for run in runs {
        // SAFETY: as said above; source and destination are different buffers.
        unsafe { libc::memcpy(run.dst.cast(), run.src.cast(), run.len) };
    }
    begin.elapsed().as_secs_f64()
}

/// The library's non-temporal copy without a checksum; seconds. Runs as for [`memcpy`].
pub(crate) fn streamed(runs: &[Run], direction: Direction) -> f64 {
    let begin = Instant::now();
    // SAFETY: as for `memcpy`.
    unsafe { copy(runs, direction) };
    begin.elapsed().as_secs_f64()
}

/// The library's copy with its checksum, in the caller's thread: what is left of a put or get without the way there;
/// seconds. Runs as for [`memcpy`].
pub(crate) fn checksummed(runs: &[Run], direction: Direction) -> f64 {
    let begin = Instant::now();
    // SAFETY: as for `memcpy`.
    std::hint::black_box(unsafe { copy_checksummed(runs, direction) });
    begin.elapsed().as_secs_f64()
}

/// Which way a loop goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Write,
    Read,
}

/// Moves every buffer to or from its place in the file (buffer n at n times the buffers' size), at most `depth` at once.
///
/// # Errors
/// The system's.
pub(crate) fn uring_loop(file: &File, way: Way, buffers: &mut [IoBuf], depth: u32) -> anyhow::Result<()> {
    let mut builder = IoUring::<io_uring::squeue::Entry>::builder();
    builder.setup_single_issuer().setup_coop_taskrun();
    let mut ring = builder.build(depth.next_power_of_two()).context("io_uring")?;
    let fd = types::Fd(file.as_raw_fd());
    let (mut next, mut done) = (0, 0);
    while done < buffers.len() {
        while next < buffers.len() && next - done < depth as usize {
            let buffer = &mut buffers[next];
            let (at, len) = (buffer.as_mut_ptr(), u32::try_from(buffer.len())?);
            let offset = next as u64 * u64::from(len);
            let entry = match way {
                Way::Write => opcode::Write::new(fd, at, len).offset(offset).build(),
                Way::Read => opcode::Read::new(fd, at, len).offset(offset).build(),
            };
            // SAFETY: the buffers are borrowed until every completion was seen; on an error the process ends.
            unsafe { ring.submission().push(&entry.user_data(u64::from(len))) }?;
            next += 1;
        }
        ring.submit_and_wait(1)?;
        for completion in ring.completion() {
            ensure!(u64::try_from(completion.result()) == Ok(completion.user_data()), "{completion:?}");
            done += 1;
        }
    }
    Ok(())
}
