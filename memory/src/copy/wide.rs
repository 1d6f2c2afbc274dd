//! CRC-64/NVME by 512-bit carry-less multiplication, straight from memory that other processes share: each byte is read
//! once, into a register, so no bounce buffer is needed (three times as fast as with one).
//!
//! ```text
//! bytes       | 0..64 | 64..128 | .. | 448..512 | 512..576 | ...
//! registers      r0      r1       ..     r7       r0 = fold(r0, 512) ^ bytes | ...
//! end         r0 folded over r1, that over r2 ..; one register over the rest 64 bytes at a time; its four lanes over each
//!             other; one lane over the rest 16 bytes at a time; that lane, and what is fewer than 16 bytes, by a table
//! ```
//! Bits are reflected: bit `i` of a 64-bit word stands for x^(63-i). `fold(r, d)` is each lane of r times x^(8d) modulo the
//! polynomial: with a lane = low * x^64 + high it is low * x^(8d+64) + high * x^(8d), and as a product of reflected words
//! comes out times x, the constants are one power lower (Gopal and others, "Fast CRC Computation for Generic Polynomials
//! Using PCLMULQDQ", Intel, 2009).

use std::arch::x86_64::{
    __m128i, __m512i, _mm_clmulepi64_si128, _mm_loadu_si128, _mm_set_epi64x, _mm_storeu_si128, _mm_xor_si128,
    _mm512_broadcast_i64x2, _mm512_clmulepi64_epi128, _mm512_extracti64x2_epi64, _mm512_loadu_si512,
    _mm512_ternarylogic_epi64, _mm512_xor_si512, _mm512_zextsi128_si512,
};
use std::ptr;

use crate::polynomial::{power, times_x};

/// Turns a checksum into the running value that it came from, and back.
const INVERT: u64 = u64::MAX;
/// Registers folded at once, so that a multiplication need not wait for the one before it.
const REGISTERS: usize = 8;
/// Bytes of a register.
const REGISTER_BYTES: usize = size_of::<__m512i>();
/// Bytes folded at once.
const STRIDE_BYTES: usize = REGISTERS * REGISTER_BYTES;
/// Bytes of a lane of a register.
const LANE_BYTES: usize = size_of::<__m128i>();

const OVER_STRIDE: [i64; 2] = factors(STRIDE_BYTES);
const OVER_REGISTER: [i64; 2] = factors(REGISTER_BYTES);
const OVER_LANE: [i64; 2] = factors(LANE_BYTES);

/// What one byte adds.
const TABLE: [u64; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < table.len() {
        let (mut value, mut bit) = (byte as u64, 0);
        while bit < 8 {
            value = times_x(value);
            bit += 1;
        }
        table[byte] = value;
        byte += 1;
    }
    table
};

/// Factors that move the low and the high word of a lane so many bytes on.
const fn factors(bytes: usize) -> [i64; 2] {
    let bits = 8 * bytes as u64;
    [power(bits + 63).cast_signed(), power(bits - 1).cast_signed()]
}

/// Says that this processor has what the kernel needs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wide(());

impl Wide {
    /// The kernel, if it can run here.
    pub(super) fn detect() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("vpclmulqdq")
            && is_x86_feature_detected!("pclmulqdq");
        has.then_some(Self(()))
    }

    /// CRC-64/NVME of bytes whose checksum is `before` and `len` more at `at`, each read once.
    ///
    /// # Safety
    /// As for [`super::checksum`].
    pub(super) unsafe fn checksum(self, before: u64, at: *const u8, len: usize) -> u64 {
        // SAFETY: the caller's contract; `detect` saw the features.
        unsafe { sum(before ^ INVERT, at, len) ^ INVERT }
    }
}

/// Goes on from a running value to that after `len` bytes.
///
/// # Safety
/// As for [`super::checksum`]; the processor must have these features.
#[target_feature(enable = "avx512f,avx512dq,vpclmulqdq,pclmulqdq")]
unsafe fn sum(mut value: u64, at: *const u8, len: usize) -> u64 {
    let (mut at, mut left) = (at, len);
    if left >= REGISTER_BYTES {
        let whole = left - left % REGISTER_BYTES;
        // SAFETY: the first `whole` of the caller's bytes.
        let lane = unsafe { registers(value, at, whole) };
        (at, left) = (at.wrapping_add(whole), left - whole);
        // SAFETY: what is left of the caller's bytes.
        (value, at, left) = unsafe { lanes(lane, at, left) };
    }
    // SAFETY: likewise, fewer than a register has.
    unsafe { short(value, at, left) }
}

/// Goes on from a running value over whole registers, at least one, which are folded into one lane.
///
/// # Safety
/// As for [`sum`].
#[target_feature(enable = "avx512f,avx512dq,vpclmulqdq,pclmulqdq")]
unsafe fn registers(value: u64, at: *const u8, len: usize) -> __m128i {
    let start = _mm512_zextsi128_si512(_mm_set_epi64x(0, value.cast_signed()));
    let (mut done, mut folded) = (REGISTER_BYTES, None);
    if len >= STRIDE_BYTES {
        // SAFETY: a stride is there.
        let mut stride = unsafe { load_stride(at) };
        stride[0] = _mm512_xor_si512(stride[0], start);
        done = STRIDE_BYTES;
        while done + STRIDE_BYTES <= len {
            // SAFETY: another one is there.
            let next = unsafe { load_stride(at.wrapping_add(done)) };
            for (register, next) in stride.iter_mut().zip(next) {
                *register = fold(*register, OVER_STRIDE, next);
            }
            done += STRIDE_BYTES;
        }
        folded = stride.into_iter().reduce(|before, next| fold(before, OVER_REGISTER, next));
    }
    let mut register = match folded {
        Some(folded) => folded,
        // SAFETY: at least one register's bytes are there.
        None => _mm512_xor_si512(unsafe { load(at) }, start),
    };
    while done < len {
        // SAFETY: `len` is a multiple of a register's bytes.
        register = fold(register, OVER_REGISTER, unsafe { load(at.wrapping_add(done)) });
        done += REGISTER_BYTES;
    }
    let lane = fold_lane(_mm512_extracti64x2_epi64::<0>(register), _mm512_extracti64x2_epi64::<1>(register));
    let lane = fold_lane(lane, _mm512_extracti64x2_epi64::<2>(register));
    fold_lane(lane, _mm512_extracti64x2_epi64::<3>(register))
}

/// Goes on from a lane over whole lanes of bytes; answers with the running value and what is left.
///
/// # Safety
/// As for [`sum`].
#[target_feature(enable = "sse2,pclmulqdq")]
unsafe fn lanes(mut lane: __m128i, mut at: *const u8, mut left: usize) -> (u64, *const u8, usize) {
    while left >= LANE_BYTES {
        // SAFETY: at least so many of the caller's bytes are left.
        lane = fold_lane(lane, unsafe { _mm_loadu_si128(at.cast()) });
        (at, left) = (at.wrapping_add(LANE_BYTES), left - LANE_BYTES);
    }
    let mut bytes = [0; LANE_BYTES];
    // SAFETY: as many bytes as a lane has, and ours.
    unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), lane) };
    (by_table(0, &bytes), at, left)
}

/// # Safety
/// A stride must be readable at `at`.
#[target_feature(enable = "avx512f")]
unsafe fn load_stride(at: *const u8) -> [__m512i; REGISTERS] {
    // SAFETY: each is a part of the stride.
    std::array::from_fn(|n| unsafe { load(at.wrapping_add(n * REGISTER_BYTES)) })
}

/// # Safety
/// A register's bytes must be readable at `at`.
#[target_feature(enable = "avx512f")]
unsafe fn load(at: *const u8) -> __m512i {
    // SAFETY: the caller's contract.
    unsafe { _mm512_loadu_si512(at.cast()) }
}

#[target_feature(enable = "avx512f,avx512dq,vpclmulqdq")]
fn fold(register: __m512i, [low, high]: [i64; 2], next: __m512i) -> __m512i {
    const XOR: i32 = 0x96;
    let factors = _mm512_broadcast_i64x2(_mm_set_epi64x(high, low));
    let (low, high) =
        (_mm512_clmulepi64_epi128::<0x00>(register, factors), _mm512_clmulepi64_epi128::<0x11>(register, factors));
    _mm512_ternarylogic_epi64::<XOR>(low, high, next)
}

#[target_feature(enable = "sse2,pclmulqdq")]
fn fold_lane(lane: __m128i, next: __m128i) -> __m128i {
    let [low, high] = OVER_LANE;
    let factors = _mm_set_epi64x(high, low);
    let (low, high) = (_mm_clmulepi64_si128::<0x00>(lane, factors), _mm_clmulepi64_si128::<0x11>(lane, factors));
    _mm_xor_si128(_mm_xor_si128(low, high), next)
}

/// Fewer bytes than a register has.
///
/// # Safety
/// As for [`sum`].
unsafe fn short(value: u64, at: *const u8, len: usize) -> u64 {
    let mut bytes = [0; REGISTER_BYTES];
    let bytes = &mut bytes[..len];
    // SAFETY: the caller's bytes; the copy is ours and as long.
    unsafe { ptr::copy_nonoverlapping(at, bytes.as_mut_ptr(), bytes.len()) };
    by_table(value, bytes)
}

fn by_table(value: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(value, |value, byte| TABLE[usize::from(value.to_le_bytes()[0] ^ byte)] ^ (value >> 8))
}
