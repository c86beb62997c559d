// The yardstick of `ffmini bench`: how fast this GPU reads memory when it does nothing else.

#include "ptx.cuh"

constexpr int LOADS = 8;  // 16-byte loads that a thread has in flight

// Reads count 16-byte words, count a multiple of LOADS * the threads of the grid. `never` stays as it is
// unless every bit of them is set, which keeps the loads from being dropped.
extern "C" __global__ void __launch_bounds__(512)
    ffmini_read(const uint4* words, uint64_t count, uint4* never) {
    const uint64_t threads = static_cast<uint64_t>(gridDim.x) * blockDim.x;
    const uint64_t thread = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    uint32_t all = 0xffffffff;
    for (uint64_t at = thread; at < count; at += LOADS * threads) {
        uint4 loaded[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; ++i) loaded[i] = words[at + i * threads];
#pragma unroll
        for (int i = 0; i < LOADS; ++i) all &= loaded[i].x & loaded[i].y & loaded[i].z & loaded[i].w;
    }
    if (all == 0xffffffff) *never = make_uint4(all, all, all, all);
}
