// What a CUDA compiler has built in, as far as cuda/ uses it, on the simulated device.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "machine.hpp"

#define __device__
#define __global__
#define __constant__
#define __shared__
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __align__(n)

// `extern uint8_t shared_memory[]` in a kernel becomes the declaration of a pointer to an array, its use
// the array that the pointer is set to: that of the running block.
#define shared_memory (*sim_shared_memory)

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

struct alignas(8) uint2 {
    uint32_t x, y;
};

struct alignas(16) float4 {
    float x, y, z, w;
};

struct alignas(8) float2 {
    float x, y;
};

inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
    return {x, y, z, w};
}

inline uint2 make_uint2(uint32_t x, uint32_t y) {
    return {x, y};
}

inline float2 make_float2(float x, float y) {
    return {x, y};
}

// The larger of each two halves.
inline uint32_t __vmaxu2(uint32_t x, uint32_t y) {
    return std::max(x & 0xffff, y & 0xffff) | std::max(x >> 16, y >> 16) << 16;
}

// Bytes of x (0 to 3) and y (4 to 7); each nibble of `selector` names one, its upper bit being 0 here.
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
    const uint64_t both = x | static_cast<uint64_t>(y) << 32;
    uint32_t bytes = 0;
    for (int i = 0; i < 4; ++i) {
        bytes |= static_cast<uint32_t>(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    }
    return bytes;
}

struct Index {
    uint32_t x;
};

#define threadIdx (Index{static_cast<uint32_t>(sim::machine.lane().thread)})
#define blockIdx (Index{static_cast<uint32_t>(sim::machine.lane().block->index)})
#define gridDim (Index{sim::machine.blocks()})

inline float __uint_as_float(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

inline float __int_as_float(uint32_t bits) {
    return __uint_as_float(bits);
}

inline uint32_t __float_as_uint(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}

inline int __popc(uint32_t x) {
    return __builtin_popcount(x);
}

inline void __syncthreads(SIM_SITE) {
    sim::machine.barrier(sim::SYNC_THREADS, 0, false, {"__syncthreads", file, line});
}

inline void __syncwarp(uint32_t mask = sim::ALL_LANES, SIM_SITE) {
    sim::machine.release_copies();
    sim::machine.meet(mask, {"__syncwarp", file, line}, [](sim::Warp&) {});
}

inline uint32_t __shfl_sync(uint32_t mask, uint32_t value, int source, SIM_SITE) {
    const sim::Site site{"__shfl_sync", file, line};
    if (source < 0 || source >= sim::WARP_LANES || !(mask >> source & 1)) {
        sim::machine.fail(site, "lane %d is not among those of mask %08x", source, mask);
    }
    sim::Lane& lane = sim::machine.lane();
    lane.operand[0] = value;
    lane.operand[1] = static_cast<uint32_t>(source);
    sim::machine.meet(mask, site, [mask](sim::Warp& warp) {
        for (int i = 0; i < sim::WARP_LANES; ++i) {
            if (mask >> i & 1) warp.lanes[i]->result[0] = warp.lanes[warp.lanes[i]->operand[1]]->operand[0];
        }
    });
    return lane.result[0];
}

inline float __shfl_sync(uint32_t mask, float value, int source, SIM_SITE) {
    return __uint_as_float(__shfl_sync(mask, __float_as_uint(value), source, file, line));
}

inline uint32_t __shfl_xor_sync(uint32_t mask, uint32_t value, int lane_bits, SIM_SITE) {
    return __shfl_sync(mask, value, sim::machine.lane().index ^ lane_bits, file, line);
}

inline float __shfl_xor_sync(uint32_t mask, float value, int lane_bits, SIM_SITE) {
    return __shfl_sync(mask, value, sim::machine.lane().index ^ lane_bits, file, line);
}

inline bool __any_sync(uint32_t mask, bool value, SIM_SITE) {
    sim::Lane& lane = sim::machine.lane();
    lane.operand[0] = value;
    sim::machine.meet(mask, {"__any_sync", file, line}, [mask](sim::Warp& warp) {
        uint32_t any = 0;
        for (int i = 0; i < sim::WARP_LANES; ++i) any |= mask >> i & 1 & warp.lanes[i]->operand[0];
        for (int i = 0; i < sim::WARP_LANES; ++i) warp.lanes[i]->result[0] = any;
    });
    return lane.result[0] != 0;
}
