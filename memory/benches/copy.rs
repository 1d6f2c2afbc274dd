//! Copies of 2 MiB blocks between engine memory and an extent, against libc's memcpy, on working sets far beyond any cache.
//!
//! Expected, single thread: the checksummed copy at 0.9 of memcpy or better (a non-temporal copy does not read its
//! destination, which pays for the checksum). Prints GB/s, medians of interleaved rounds.
#![expect(unsafe_code, reason = "measures raw copies")]

use std::hint::black_box;
use std::time::Instant;

use kvtier_memory::checksum::Checksum;
use kvtier_memory::copy::{Direction, Run, copy, copy_checksummed};
use kvtier_memory::{AlignedBuf, Extent, PageKind};

const BLOCK_BYTES: usize = 2 << 20;
const BLOCKS: usize = 192;
const ROUNDS: usize = 15;

/// Copies one block.
type Way = fn(&[Run], Direction);

fn main() {
    let extent = Extent::create((BLOCK_BYTES * BLOCKS) as u64, PageKind::Transparent).expect("memory for the bench");
    let mut engine = AlignedBuf::zeroed(BLOCK_BYTES * BLOCKS);
    for (index, byte) in engine.as_mut_slice().iter_mut().enumerate() {
        *byte = u8::try_from(index % 251).expect("below 251");
    }
    let (frames, tensors) = (extent.base(), engine.as_mut_slice().as_mut_ptr());
    println!("{} MiB each way, {} pages, blocks of 2 MiB", (BLOCKS * BLOCK_BYTES) >> 20, extent.page_kind());
    for (direction, src, dst) in [(Direction::IntoFrame, tensors, frames), (Direction::FromFrame, frames, tensors)] {
        for run_bytes in [BLOCK_BYTES, 64 << 10, 8 << 10] {
            measure(direction, src, dst, run_bytes);
        }
    }
}

fn measure(direction: Direction, src: *mut u8, dst: *mut u8, run_bytes: usize) {
    let ways: [(&str, Way); 4] = [
        ("memcpy", memcpy),
        ("memcpy, then crc", memcpy_then_crc),
        ("copy", stream),
        ("copy_checksummed", checksummed),
    ];
    let mut rates = vec![Vec::new(); ways.len()];
    for _ in 0..ROUNDS {
        for (rates, (_, way)) in rates.iter_mut().zip(ways) {
            let start = Instant::now();
            for block in 0..BLOCKS {
                // A stride coprime to the count: blocks in an order that no prefetcher follows.
                let at = (block * 71 % BLOCKS) * BLOCK_BYTES;
                let runs: Vec<Run> = (at..at + BLOCK_BYTES)
                    .step_by(run_bytes)
                    .map(|at| Run { src: src.wrapping_add(at), dst: dst.wrapping_add(at), len: run_bytes })
                    .collect();
                way(&runs, direction);
            }
            rates.push((BLOCKS * BLOCK_BYTES) as f64 / start.elapsed().as_secs_f64() / 1e9);
        }
    }
    let medians: Vec<f64> = rates.into_iter().map(median).collect();
    for ((name, _), rate) in ways.iter().zip(&medians) {
        let ratio = rate / medians[0];
        println!("{direction:?} runs of {:4} KiB  {name:18} {rate:6.2} GB/s  {ratio:5.2} of memcpy", run_bytes >> 10);
    }
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

fn memcpy(runs: &[Run], _: Direction) {
    for run in runs {
        // SAFETY: both sides are parts of mapped buffers of this process, apart from each other.
        unsafe { std::ptr::copy_nonoverlapping(run.src, run.dst, run.len) };
    }
    black_box(runs);
}

fn memcpy_then_crc(runs: &[Run], direction: Direction) {
    memcpy(runs, direction);
    let mut checksum = Checksum::new();
    for run in runs {
        // SAFETY: just written, and nobody else writes it.
        checksum.update(unsafe { std::slice::from_raw_parts(run.dst, run.len) });
    }
    black_box(checksum.value());
}

fn stream(runs: &[Run], direction: Direction) {
    // SAFETY: as in `memcpy`.
    unsafe { copy(runs, direction) };
}

fn checksummed(runs: &[Run], direction: Direction) {
    // SAFETY: as in `memcpy`.
    black_box(unsafe { copy_checksummed(runs, direction) });
}
