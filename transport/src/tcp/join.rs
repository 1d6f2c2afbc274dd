//! Joins checksums of neighbors when the second has a known length: a multiplication by a matrix made once.
//!
//! A CRC is linear: `combine(a, b, len) = M(len) * a ^ b`. The general [`combine`] makes `M(len)` anew for each call, which
//! takes longer than to checksum the 64 KiB that it is wanted for.

use std::sync::LazyLock;

use kvtier_memory::checksum::combine;

/// Joins a checksum with that of the `len` bytes that follow.
#[derive(Debug)]
pub(super) struct Join {
    /// What each bit of the first checksum turns into.
    columns: [u64; 64],
}

impl Join {
    fn new(len: u64) -> Self {
        Self { columns: std::array::from_fn(|bit| combine(1 << bit, 0, len)) }
    }

    pub(super) fn join(&self, first: u64, second: u64) -> u64 {
        let shifted = self.columns.iter().enumerate().map(|(bit, column)| column & (first >> bit & 1).wrapping_neg());
        shifted.fold(second, |sum, column| sum ^ column)
    }
}

/// Bytes checksummed at once, while the cache has them.
pub(super) const STEP_BYTES: usize = 64 << 10;
/// Bytes of one request: a large frame is spread over streams.
pub(super) const PART_BYTES: usize = 512 << 10;

/// For a second piece of [`STEP_BYTES`].
pub(super) static STEPS: LazyLock<Join> = LazyLock::new(|| Join::new(STEP_BYTES as u64));
/// For a second piece of [`PART_BYTES`].
pub(super) static PARTS: LazyLock<Join> = LazyLock::new(|| Join::new(PART_BYTES as u64));

/// Length of the first piece of `len` bytes, so that all others have `step` bytes.
pub(super) fn first_piece(len: usize, step: usize) -> usize {
    match len % step {
        0 => len.min(step),
        odd => odd,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvtier_memory::checksum::checksum;

    #[test]
    fn joined_checksums_are_those_of_the_whole() {
        let bytes = crate::conformance::payload(1, PART_BYTES + 12_345);
        for (join, len) in [(&STEPS, STEP_BYTES), (&PARTS, PART_BYTES)] {
            let (first, second) = bytes.split_at(bytes.len() - len);
            assert_eq!(join.join(checksum(first), checksum(second)), checksum(&bytes));
        }
        assert_eq!([0, 1, 9, 10, 11].map(|len| first_piece(len, 10)), [0, 1, 9, 10, 1]);
    }
}
