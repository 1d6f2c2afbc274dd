//! CRC-64/NVME, the checksum of block bytes (parameters: the CRC catalogue's CRC-64/NVME; check value 0xae8b14860a799888).

use crc_fast::{CrcAlgorithm, Digest};

use crate::polynomial::{multiply, power};

/// The checksum of no bytes.
pub const EMPTY: u64 = 0;

/// A checksum being made of bytes that come in pieces.
#[derive(Debug)]
pub struct Checksum(Digest);

impl Default for Checksum {
    fn default() -> Self {
        Self::new()
    }
}

impl Checksum {
    /// Of no bytes yet.
    #[must_use]
    pub fn new() -> Self {
        Self::after(EMPTY)
    }

    /// Of the bytes whose checksum is `before`.
    #[must_use]
    pub fn after(before: u64) -> Self {
        Self(Digest::new_with_init_state(CrcAlgorithm::Crc64Nvme, !before))
    }

    /// Adds the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The checksum of all bytes added so far.
    #[must_use]
    pub fn value(&self) -> u64 {
        self.0.finalize()
    }
}

/// The checksum of `bytes`.
#[must_use]
pub fn checksum(bytes: &[u8]) -> u64 {
    crc_fast::checksum(CrcAlgorithm::Crc64Nvme, bytes)
}

/// The checksum of the joined bytes, from those of the first part and of the second, which is `second_len` bytes long: some
/// 100 ns for each bit that is set in it.
///
/// # Panics
/// If bytes so many have more bits than a `u64` can count.
#[must_use]
pub const fn combine(first: u64, second: u64, second_len: u64) -> u64 {
    let bits = second_len.checked_mul(8).expect("memory has fewer bytes");
    multiply(first, power(bits)) ^ second
}
