// Runs kernels.cu on the host: a block's threads are threads, a barrier is a barrier. Reads a file of
//   u64 n, then n bytes
// from stdin, copies it in runs and in spans of at most 64 KiB computes their raw checksums; writes "ok" or what differs,
// then the raw checksums in hexadecimal, a line each. The tables come first on stdin: 256 and 256 u64.
#include <barrier>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct Index {
    unsigned x;
};
static thread_local Index threadIdx, blockIdx;
static std::barrier<> *barrier;
#define __device__
#define __global__
#define __launch_bounds__(n)
#define __shared__ static
#define __syncthreads() barrier->arrive_and_wait()
#include "kernels.cu"

template <typename Kernel> static void launch(unsigned blocks, Kernel kernel) {
    for (unsigned block = 0; block < blocks; block++) {
        std::barrier<> here(COLUMNS);
        barrier = &here;
        std::vector<std::thread> threads;
        for (unsigned thread = 0; thread < COLUMNS; thread++) {
            threads.emplace_back([=] {
                threadIdx.x = thread;
                blockIdx.x = block;
                kernel();
            });
        }
        for (auto &thread : threads) thread.join();
    }
}

static bool take(void *into, size_t bytes) { return fread(into, 1, bytes, stdin) == bytes; }

int main() {
    u64 len = 0;
    if (!take(kvtier_fold, sizeof kvtier_fold) || !take(kvtier_tail, sizeof kvtier_tail) || !take(&len, 8)) return 1;
    std::vector<u64> words(len / 8 + 4), copy(len / 8 + 4);
    if (!take(words.data(), len)) return 1;

    std::vector<Run> runs;
    u64 at = 0;
    for (u64 bytes = 1; at < len; bytes = bytes * 3 + 16) {
        const u64 run = bytes < len - at ? bytes : len - at;
        runs.push_back({(u64)words.data() + at, (u64)copy.data() + at, run});
        at += run;
    }
    launch(runs.size(), [&] { kvtier_copy(runs.data()); });
    puts(memcmp(words.data(), copy.data(), len) == 0 && copy[len / 8 + 1] == 0 ? "ok" : "the copy differs");

    std::vector<Span> spans;
    for (u64 from = 0; from < len; from += 65536) spans.push_back({(u64)words.data() + from, len - from < 65536 ? len - from : 65536});
    std::vector<u64> raw(spans.size());
    launch(spans.size(), [&] { kvtier_sum(spans.data(), raw.data()); });
    for (u64 sum : raw) printf("%016llx\n", sum);
}
