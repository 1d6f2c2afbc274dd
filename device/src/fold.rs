//! CRC-64/NVME in parallel: what the device's kernel computes of a span, and what the host makes of it.
//!
//! ```text
//! words of a span, in front of them zeros up to whole rows:
//!            column 0    column 1   ...  column T-1
//! row 0      0           0               w0
//! row 1      w1          w2              ...
//! a column   state = state * x^(64 T) + word, row by row       (a table of nibbles does the product)
//! a span     sum over columns of state * x^(64 (T - column))   = the raw checksum: from state 0, not inverted
//! ```
//! Polynomials over GF(2), reflected: bit `i` of a number is the coefficient of `x^(63 - i)`. Zeros in front of a message do
//! not change a checksum that starts from state 0, so every span is as many whole rows.
//!
//! Pinned by `columns_come_to_the_checksum` and, for the kernel's own source, `the_kernels_source_computes_the_checksum`.

use kvtier_memory::polynomial::{ONE, multiply, power};

/// Columns: threads of a block of the kernel.
pub const COLUMNS: usize = 256;
/// Longest span that one block of the kernel takes.
pub const SPAN_BYTES: u64 = 64 << 10;
/// Values of a nibble.
const NIBBLE: usize = 16;

/// The tables of the kernel.
#[derive(Debug)]
pub struct Tables {
    /// `fold[16 k + n]` is nibble `n`, the `k`-th from the lowest, times `x^(64 COLUMNS)`.
    pub fold: [u64; NIBBLE * NIBBLE],
    /// By column, `x^(64 (COLUMNS - column))`.
    pub tail: [u64; COLUMNS],
}

impl Tables {
    /// Computes them.
    #[must_use]
    pub fn new() -> Self {
        let row = power(64 * COLUMNS as u64);
        let fold = |at: usize| multiply(((at % NIBBLE) as u64) << (4 * (at / NIBBLE)), row);
        let tail = |column: usize| power(64 * (COLUMNS - column) as u64);
        Self { fold: std::array::from_fn(fold), tail: std::array::from_fn(tail) }
    }
}

impl Default for Tables {
    fn default() -> Self {
        Self::new()
    }
}

/// The checksum of `bytes` bytes, from their raw one.
#[must_use]
pub fn finish(raw: u64, bytes: u64) -> u64 {
    !(raw ^ multiply(u64::MAX, power(8 * bytes)))
}

/// The checksum of spans joined, from the raw checksum and the length of each.
#[must_use]
pub fn join(parts: impl IntoIterator<Item = (u64, u64)>) -> u64 {
    let (mut sum, mut total) = (0, 0);
    // Most parts are of one length.
    let mut shift = (0, ONE);
    for (raw, bytes) in parts {
        if shift.0 != bytes {
            shift = (bytes, power(8 * bytes));
        }
        sum = multiply(sum, shift.1) ^ raw;
        total += bytes;
    }
    finish(sum, total)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::noise;
    use kvtier_memory::checksum::checksum;

    /// As the kernel does it.
    fn raw(bytes: &[u8], tables: &Tables) -> u64 {
        let words: Vec<u64> = bytes.chunks_exact(8).map(|w| u64::from_le_bytes(w.try_into().unwrap())).collect();
        let rows = words.len().div_ceil(COLUMNS);
        let pad = rows * COLUMNS - words.len();
        let column = |column: usize| {
            let mut state = 0_u64;
            for row in 0..rows {
                let at = row * COLUMNS + column;
                let nibble = |k: usize| tables.fold[NIBBLE * k + ((state >> (4 * k)) & 15) as usize];
                let folded = (0..NIBBLE).fold(0, |sum, k| sum ^ nibble(k));
                state = folded ^ if at < pad { 0 } else { words[at - pad] };
            }
            multiply(state, tables.tail[column])
        };
        (0..COLUMNS).fold(0, |sum, c| sum ^ column(c))
    }

    #[test]
    fn columns_come_to_the_checksum() {
        let tables = Tables::new();
        let all = noise(usize::try_from(SPAN_BYTES).unwrap() + 4096, 1);
        for len in [8, 64, 2040, 2048, 2056, 4096, 10_000, 65_536] {
            assert_eq!(finish(raw(&all[..len], &tables), len as u64), checksum(&all[..len]), "{len}");
        }
        let parts = all.chunks(30_000).map(|part| (raw(part, &tables), part.len() as u64));
        assert_eq!(join(parts), checksum(&all));
        assert_eq!(join([]), checksum(&[]));
    }
}
