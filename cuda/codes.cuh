// How weights become operands of the tensor cores, and products of integers sums: one place per format.
#pragma once

#include "config.cuh"

// Of a slot the 16 bytes of this lane in line i.
__device__ __forceinline__ uint4 load_line(const uint8_t* slot, int i) {
    return *reinterpret_cast<const uint4*>(slot + i * LINE_BYTES);
}

// How codes become A fragments of integers, how the products of a group become a sum, and what that is worth.
// A new format of codes is one more of these: fragments() makes those of the two steps of a block of 64 k of
// the block's LINES lines; exact() makes of a group's products with the planes, of outputs lane / 4 or, with
// `half`, 8 more, those with the integers, rounded once; scaled() adds them, times what the group's Scale of
// that output says, to the sum of the segment's other groups.
template <class M, int BITS = M::BITS>
struct Codes;

template <class M>
struct Codes<M, 8> {
    static constexpr int LINES = 2;
    using Scale = uint16_t;  // fp16

    static __device__ void fragments(const uint4* lines, uint32_t (&a)[2][4]) {
        for (int step = 0; step < 2; ++step) {
            a[step][0] = lines[step].x, a[step][1] = lines[step].y;
            a[step][2] = lines[step].z, a[step][3] = lines[step].w;
        }
    }
    static __device__ void multiply(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        mma_16x8x32_signed(d, a, b0, b1);
    }
    static __device__ float exact(const int (&d)[4], int half) {
        return static_cast<float>(256 * d[2 * half] + d[2 * half + 1]);
    }
    static __device__ float scaled(float product, float, Scale scale, float sum) {
        return fmaf(half_to_float(scale), product, sum);
    }
};

template <class M>
struct Codes<M, 4> {
    static constexpr int LINES = 1;
    using Scale = uint32_t;  // fp16 scale and, above, zero

    // A byte has the codes of outputs o and, above, o + 8. As it is it counts for the one, with the lower
    // half gone for the other: 16 times its code.
    static __device__ void fragments(const uint4* lines, uint32_t (&a)[2][4]) {
        a[0][0] = lines->x, a[0][2] = lines->y, a[1][0] = lines->z, a[1][2] = lines->w;
        for (int step = 0; step < 2; ++step) {
            for (int half = 0; half < 2; ++half) a[step][2 * half + 1] = a[step][2 * half] & 0xf0f0f0f0;
        }
    }
    static __device__ void multiply(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        mma_16x8x32_unsigned(d, a, b0, b1);
    }
    static __device__ float exact(const int (&d)[4], int half) {
        const int upper = 256 * d[2] + d[3];
        return half == 1 ? static_cast<float>(upper) * 0.0625f
                         : static_cast<float>(256 * d[0] + d[1] - upper);
    }
    static __device__ float scaled(float product, float group_sum, Scale scale, float sum) {
        const float zero = half_to_float(static_cast<uint16_t>(scale >> 16));
        return fmaf(half_to_float(static_cast<uint16_t>(scale)), fmaf(-zero, group_sum, product), sum);
    }
};

// Of a group's scales, [16 outputs], one.
template <class M>
__device__ __forceinline__ typename Codes<M>::Scale load_scale(const uint8_t* scales, int output) {
    return reinterpret_cast<const typename Codes<M>::Scale*>(scales)[output];
}
