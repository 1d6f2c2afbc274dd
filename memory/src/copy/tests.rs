use super::{BOUNCE_BYTES, Direction, Run, Tee, bounced, checksum, copy, copy_checksummed};
use proptest::prelude::{any, proptest};
use proptest::{collection::vec, prop_assert_eq};

/// CRC-64/NVME bit by bit: reflected polynomial 0x9a6c9329ac4bc9b5, all ones in and out.
fn naive(bytes: &[u8]) -> u64 {
    !bytes.iter().fold(!0_u64, |crc, byte| {
        (0..8).fold(crc ^ u64::from(*byte), |crc, _| (crc >> 1) ^ (0x9a6c_9329_ac4b_c9b5 & (crc & 1).wrapping_neg()))
    })
}

fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()[0]
    };
    (0..len).map(|_| next()).collect()
}

/// Copies `pieces` of (source offset, destination offset, length) and compares bytes, checksum and the bytes around.
fn check(pieces: &[(usize, usize, usize)], direction: Direction) {
    let span = pieces.iter().map(|(src, dst, len)| src.max(dst) + len).max().unwrap_or(0);
    let source = pattern(span, 7);
    let mut destination = vec![0xee; span + 64];
    let mut expected = destination.clone();
    let mut in_order = Vec::new();
    for &(src, dst, len) in pieces {
        expected[dst..dst + len].copy_from_slice(&source[src..src + len]);
        in_order.extend_from_slice(&source[src..src + len]);
    }
    let base = destination.as_mut_ptr();
    let runs: Vec<Run> = pieces
        .iter()
        .map(|&(src, dst, len)| Run { src: source[src..].as_ptr(), dst: base.wrapping_add(dst), len })
        .collect();
    // SAFETY: the runs were cut from the two vectors.
    let crc = unsafe { copy_checksummed(&runs, direction) };
    assert_eq!(destination, expected, "bytes of {pieces:?}");
    assert_eq!(crc, naive(&in_order), "checksum of {pieces:?}");

    destination.fill(0xee);
    let base = destination.as_mut_ptr();
    let runs: Vec<Run> =
        runs.iter().zip(pieces).map(|(run, &(_, dst, _))| Run { dst: base.wrapping_add(dst), ..*run }).collect();
    // SAFETY: as above.
    unsafe { copy(&runs, direction) };
    assert_eq!(destination, expected, "plain copy of {pieces:?}");
}

#[test]
fn check_value_of_the_crc_catalogue() {
    assert_eq!(naive(b"123456789"), 0xae8b_1486_0a79_9888);
    assert_eq!(crate::checksum::checksum(b"123456789"), 0xae8b_1486_0a79_9888);
    let whole = crate::checksum::combine(naive(b"1234"), naive(b"56789"), 5);
    assert_eq!(whole, 0xae8b_1486_0a79_9888);
}

#[test]
fn every_alignment_and_awkward_length_is_copied_exactly() {
    for direction in [Direction::IntoFrame, Direction::FromFrame] {
        for len in
            [0, 1, 31, 63, 64, 65, 127, 128, 4095, 4096, BOUNCE_BYTES - 1, BOUNCE_BYTES + 1, 3 * BOUNCE_BYTES + 77]
        {
            for (src, dst) in [(0, 0), (1, 0), (0, 1), (3, 61), (63, 63), (17, 32)] {
                check(&[(src, dst, len)], direction);
            }
        }
    }
    check(&[], Direction::IntoFrame);
    check(&[(5, 9, 700_001)], Direction::FromFrame);
}

#[test]
fn a_checksum_reads_every_byte_once_in_order() {
    let bytes = pattern(100_000, 3);
    // Every length at which the way through the kernels differs, and more; from places of every alignment.
    for len in (0..1700).chain([4095, 4096, 4097, 65_536, 99_000]) {
        let bytes = &bytes[len % 67..][..len];
        let expected = naive(bytes);
        for before in [0, 1, len / 3, len] {
            let (first, second) = bytes.split_at(before.min(len));
            let begun = naive(first);
            // SAFETY: a whole slice.
            let all = unsafe { checksum(begun, second.as_ptr(), second.len()) };
            assert_eq!(all, expected, "{len} bytes, {before} of them before");
            // SAFETY: likewise.
            let all = unsafe { bounced(begun, second.as_ptr(), second.len()) };
            assert_eq!(all, expected, "{len} bytes, {before} of them before, through the bounce buffer");
        }
    }
}

#[test]
fn every_kernel_keeps_in_the_bounce_buffer_what_it_stores() {
    let mut kernels: Vec<(&str, Tee)> = vec![("cached", super::cached as Tee)];
    #[cfg(target_arch = "x86_64")]
    kernels.extend(super::x86::kernels());
    for (name, kernel) in kernels {
        let source = pattern(1000, 11);
        let mut bounce = crate::AlignedBuf::zeroed(512);
        let mut destination = crate::AlignedBuf::zeroed(1024);
        // SAFETY: 512 bytes of each buffer; the destination is 4096-aligned; `kernels` lists what this processor has.
        unsafe { kernel(source[13..].as_ptr(), bounce.as_mut_slice(), destination.as_mut_slice().as_mut_ptr()) };
        super::store_fence();
        assert_eq!(bounce.as_slice(), &source[13..525], "{name}: bounce");
        assert_eq!(&destination.as_slice()[..512], &source[13..525], "{name}: destination");
        assert!(destination.as_slice()[512..].iter().all(|&byte| byte == 0), "{name}: beyond");
    }
}

/// A source that changes all the time: whatever was read, the checksum must be that of what was written.
#[test]
fn the_checksum_is_of_the_bytes_written_even_if_the_source_changes() {
    use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
    let source: Vec<AtomicU8> = (0..1 << 20).map(|_| AtomicU8::new(0)).collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut value = 0_u8;
            while !stop.load(Ordering::Relaxed) {
                value = value.wrapping_add(1);
                source.iter().step_by(61).for_each(|byte| byte.store(value, Ordering::Relaxed));
            }
        });
        let mut destination = vec![0; source.len()];
        let mut checksums = Vec::new();
        for _ in 0..20 {
            let run = Run { src: source.as_ptr().cast(), dst: destination.as_mut_ptr(), len: source.len() };
            // SAFETY: readable and writable; the writer stands for another process, which the contract allows.
            let crc = unsafe { copy_checksummed(&[run], Direction::IntoFrame) };
            checksums.push((crc, crate::checksum::checksum(&destination)));
        }
        // Compared once the writer has stopped, so that a failure does not leave it running.
        stop.store(true, Ordering::Relaxed);
        assert!(checksums.iter().all(|(made, written)| made == written), "{checksums:x?}");
    });
}

proptest! {
    #[test]
    fn runs_are_copied_and_checksummed_in_order(
        lens in vec((0_usize..9000, 0_usize..70, 0_usize..70), 0..6),
        into_frame in any::<bool>(),
    ) {
        let mut at = 0;
        let pieces: Vec<_> = lens.iter().map(|&(len, src, dst)| {
            let piece = (at + src, at + dst, len);
            at += len + 70;
            piece
        }).collect();
        check(&pieces, if into_frame { Direction::IntoFrame } else { Direction::FromFrame });
        prop_assert_eq!(pieces.len(), lens.len());
    }
}
