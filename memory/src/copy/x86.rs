//! Non-temporal stores of x86-64: past the cache, so that a copy neither reads its destination nor evicts what the
//! engine works on.

use std::arch::x86_64::{
    __m128i, __m256i, _MM_HINT_T0, _mm_loadu_si128, _mm_prefetch, _mm_sfence, _mm_storeu_si128, _mm_stream_si128,
    _mm256_loadu_si256, _mm256_storeu_si256, _mm256_stream_si256,
};

use super::{LINE_BYTES, Tee};

/// How far ahead of the loads lines are asked for.
const PREFETCH_BYTES: usize = 2 << 10;

/// The widest kernel this processor has.
pub(super) fn streaming() -> Tee {
    if is_x86_feature_detected!("avx") { tee_avx } else { tee_sse2 }
}

/// Orders the non-temporal stores before everything that follows.
pub(super) fn store_fence() {
    // SAFETY: every x86-64 processor has SSE.
    unsafe { _mm_sfence() };
}

/// # Safety
/// See [`Tee`]; the processor must have AVX.
#[target_feature(enable = "avx")]
unsafe fn tee_avx(src: *const u8, bounce: &mut [u8], dst: *mut u8) {
    for (at, kept) in bounce.chunks_exact_mut(LINE_BYTES).enumerate() {
        // A hint, which may be of any address.
        _mm_prefetch::<_MM_HINT_T0>(src.wrapping_add(at * LINE_BYTES + PREFETCH_BYTES).cast());
        let line = src.wrapping_add(at * LINE_BYTES).cast::<__m256i>();
        // SAFETY: the first half of a line inside the source.
        let low = unsafe { _mm256_loadu_si256(line) };
        // SAFETY: the second half.
        let high = unsafe { _mm256_loadu_si256(line.wrapping_add(1)) };
        let kept = kept.as_mut_ptr().cast::<__m256i>();
        // SAFETY: the first half of a line of the bounce buffer.
        unsafe { _mm256_storeu_si256(kept, low) };
        // SAFETY: the second half.
        unsafe { _mm256_storeu_si256(kept.wrapping_add(1), high) };
        let to = dst.wrapping_add(at * LINE_BYTES).cast::<__m256i>();
        // SAFETY: the first half of a line inside the destination, aligned as the line is.
        unsafe { _mm256_stream_si256(to, low) };
        // SAFETY: the second half.
        unsafe { _mm256_stream_si256(to.wrapping_add(1), high) };
    }
}

/// # Safety
/// See [`Tee`]; every x86-64 processor has SSE2.
#[target_feature(enable = "sse2")]
unsafe fn tee_sse2(src: *const u8, bounce: &mut [u8], dst: *mut u8) {
    for (at, kept) in bounce.chunks_exact_mut(size_of::<__m128i>()).enumerate() {
        let offset = at * size_of::<__m128i>();
        // SAFETY: 16 bytes inside the source.
        let bytes = unsafe { _mm_loadu_si128(src.wrapping_add(offset).cast()) };
        // SAFETY: 16 bytes of the bounce buffer.
        unsafe { _mm_storeu_si128(kept.as_mut_ptr().cast(), bytes) };
        // SAFETY: 16 bytes inside the destination, aligned as the line is.
        unsafe { _mm_stream_si128(dst.wrapping_add(offset).cast(), bytes) };
    }
}

#[cfg(test)]
pub(super) fn kernels() -> Vec<(&'static str, Tee)> {
    let mut kernels: Vec<(&'static str, Tee)> = vec![("sse2", tee_sse2)];
    if is_x86_feature_detected!("avx") {
        kernels.push(("avx", tee_avx));
    }
    kernels
}
