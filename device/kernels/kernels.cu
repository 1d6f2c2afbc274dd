// Kernels of kvtier-device: copies of many small runs, and checksums. Built into kernels.ptx by build.py; run on the host by
// host.cpp, so that what is tested is this text. No more of CUDA is used than threads, blocks, shared memory and one barrier.

typedef unsigned long long u64;
typedef unsigned int u32;

#define COLUMNS 256
#define NIBBLES 16
// 16-byte pieces that a thread has under way at once: reads over a bus take microseconds.
#define FLIGHT 4

struct Run {
    u64 src;
    u64 dst;
    u64 bytes;
};

struct Span {
    u64 base;
    u64 bytes;
};

// Filled by the host when the module is loaded: see fold.rs.
__device__ u64 kvtier_fold[NIBBLES * NIBBLES];
__device__ u64 kvtier_tail[COLUMNS];

// One block a run. Sources and destinations are device memory or host memory that the device reaches.
extern "C" __global__ void __launch_bounds__(COLUMNS) kvtier_copy(const Run *runs) {
    const Run run = runs[blockIdx.x];
    u64 done = 0;
    if (((run.src | run.dst) & 15) == 0) {
        const uint4 *src = (const uint4 *)run.src;
        uint4 *dst = (uint4 *)run.dst;
        const u64 pieces = run.bytes / 16;
        for (u64 at = threadIdx.x; at < pieces; at += COLUMNS * FLIGHT) {
            uint4 piece[FLIGHT];
#pragma unroll
            for (int i = 0; i < FLIGHT; i++) {
                if (at + (u64)i * COLUMNS < pieces) piece[i] = src[at + (u64)i * COLUMNS];
            }
#pragma unroll
            for (int i = 0; i < FLIGHT; i++) {
                if (at + (u64)i * COLUMNS < pieces) dst[at + (u64)i * COLUMNS] = piece[i];
            }
        }
        done = pieces * 16;
    }
    for (u64 at = done + threadIdx.x; at < run.bytes; at += COLUMNS) {
        ((unsigned char *)run.dst)[at] = ((const unsigned char *)run.src)[at];
    }
}

// One block a span of at most 64 KiB, whole words at a multiple of 8. raw[block] = its raw CRC-64/NVME: see fold.rs.
extern "C" __global__ void __launch_bounds__(COLUMNS) kvtier_sum(const Span *spans, u64 *raw) {
    __shared__ u64 fold[NIBBLES * NIBBLES];
    __shared__ u64 part[COLUMNS];
    const u32 column = threadIdx.x;
    fold[column] = kvtier_fold[column];
    __syncthreads();

    const Span span = spans[blockIdx.x];
    const u64 *words = (const u64 *)span.base;
    const u64 count = span.bytes / 8;
    const u64 rows = (count + COLUMNS - 1) / COLUMNS;
    const u64 pad = rows * COLUMNS - count;
    u64 state = 0;
    for (u64 row = 0; row < rows; row++) {
        const u64 at = row * COLUMNS + column;
        const u64 word = at < pad ? 0 : words[at - pad];
        u64 folded = 0;
#pragma unroll
        for (int k = 0; k < NIBBLES; k++) folded ^= fold[NIBBLES * k + ((state >> (4 * k)) & 15)];
        state = folded ^ word;
    }

    // state * tail[column], reduced.
    u64 factor = kvtier_tail[column];
    u64 product = 0;
    for (int bit = 63; bit >= 0; bit--) {
        if ((state >> bit) & 1) product ^= factor;
        factor = (factor >> 1) ^ ((factor & 1) ? 0x9a6c9329ac4bc9b5ULL : 0);
    }
    part[column] = product;
    __syncthreads();
    if (column == 0) {
        u64 sum = 0;
        for (int i = 0; i < COLUMNS; i++) sum ^= part[i];
        raw[blockIdx.x] = sum;
    }
}
