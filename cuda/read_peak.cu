// The yardstick of `ffmini bench`: how fast this GPU reads memory when it does nothing else.

#include "ptx.cuh"

#if !defined(BULK_COPIES)
#error "a -D constant is missing"
#endif

constexpr int THREADS = 512;
constexpr int CHUNK_BYTES = 16384;

#if BULK_COPIES

constexpr int SLOTS = 8;  // copies that a block has under way
constexpr int SHARED_BYTES = SLOTS * CHUNK_BYTES;

// Copies `chunks` chunks of CHUNK_BYTES from `bytes` into shared memory, where nobody reads them.
extern "C" __global__ void __launch_bounds__(THREADS)
    ffmini_read(const uint8_t* bytes, uint64_t chunks, uint4*) {
    extern __shared__ __align__(128) uint8_t ring[];
    __shared__ uint64_t landed[SLOTS];
    if (threadIdx.x != 0) return;
    for (int slot = 0; slot < SLOTS; ++slot) mbarrier_init(landed + slot, 1);
    mbarrier_init_fence();
    const uint64_t policy = evict_first_policy();
    const uint64_t own = blockIdx.x < chunks ? (chunks - blockIdx.x + gridDim.x - 1) / gridDim.x : 0;
    for (uint64_t i = 0; i < own + SLOTS; ++i) {
        const int slot = static_cast<int>(i % SLOTS);
        if (i >= SLOTS && i - SLOTS < own) {
            while (!mbarrier_try_wait(landed + slot, static_cast<uint32_t>(i / SLOTS + 1) & 1)) {
            }
        }
        if (i >= own) continue;
        mbarrier_arrive_expect(landed + slot, CHUNK_BYTES);
        copy_bulk(ring + slot * CHUNK_BYTES, bytes + (blockIdx.x + i * gridDim.x) * CHUNK_BYTES, CHUNK_BYTES,
                  landed + slot, policy);
    }
}

#else

constexpr int LOADS = CHUNK_BYTES / 16 / THREADS;  // 16-byte loads of a thread per chunk
constexpr int CHUNKS = 4;                          // that a block reads at a time
constexpr int SHARED_BYTES = 0;

// Reads `chunks` chunks of CHUNK_BYTES from `bytes`. `never` stays as it is unless every bit of them is set,
// which keeps the loads from being dropped.
extern "C" __global__ void __launch_bounds__(THREADS)
    ffmini_read(const uint8_t* bytes, uint64_t chunks, uint4* never) {
    const uint4* words = reinterpret_cast<const uint4*>(bytes);
    uint32_t all = 0xffffffff;
    for (uint64_t chunk = blockIdx.x; chunk < chunks; chunk += CHUNKS * gridDim.x) {
        uint4 loaded[CHUNKS * LOADS];
#pragma unroll
        for (int i = 0; i < CHUNKS * LOADS; ++i) {
            const uint64_t own = chunk + i / LOADS * gridDim.x;
            const uint64_t at = (own < chunks ? own : chunk) * (CHUNK_BYTES / 16) + i % LOADS * THREADS;
            loaded[i] = words[at + threadIdx.x];
        }
#pragma unroll
        for (int i = 0; i < CHUNKS * LOADS; ++i) all &= loaded[i].x & loaded[i].y & loaded[i].z & loaded[i].w;
    }
    if (all == 0xffffffff) *never = make_uint4(all, all, all, all);
}

#endif

extern "C" {
__constant__ uint32_t ffmini_read_shared_bytes = SHARED_BYTES;
}
