// A quantised model's activations as integers: each segment of 256 k of a row shares one power of two, so
// that the products with the weights' codes are exact. 16 bits hold all that bf16 has of every element within
// 2^-7 of the segment's largest. Two planes of bytes, q = 256 high + low, take the place of the segment's
// bf16. ffmini/numerics.py has the same arithmetic (align).
#pragma once

#include "block.cuh"

constexpr uint32_t ALIGNED_EXPONENT = 127 + 14;  // biased: where the largest element's goes, so |q| < 2^15
constexpr uint32_t LEAST_EXPONENT = 27;  // of a largest element: below, powers of two would leave their range
constexpr uint32_t INFINITE_BF16 = 0x7f80;
constexpr uint32_t NAN_BITS = 0x7fffffff;  // what a segment with an element that is not finite is worth
constexpr float ROUNDER = 12582912.0f;  // 1.5 * 2^23: a sum with it has the nearest integer in its low bits
constexpr uint32_t ROUNDER_BITS = 0x4b400000;

// Where in a segment the plane's 16 bytes of a block of 64 k begin that the lanes with lane % 4 = t multiply:
// k = 8t .. 8t + 7 and 32 more. The low plane's blocks are swapped in pairs: the two columns that a quarter
// warp reads at once lie in different banks.
__device__ __forceinline__ int plane_offset(int plane, int block64, int t) {
    return plane * SEGMENT + 64 * (block64 ^ plane) + 16 * t;
}

// The largest magnitude among eight bf16, as its bits.
__device__ __forceinline__ uint32_t largest_bits(const uint4& pairs) {
    const uint32_t words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
    uint32_t largest = 0;  // in the upper 15 bits; what is below decides nothing
    for (int i = 0; i < 4; ++i) largest = max_of(largest, max_of(words[i] << 1, words[i] << 17));
    return largest >> 17;
}

// Byte B of each of four words.
template <int B>
__device__ __forceinline__ uint32_t gather_bytes(const uint32_t* words) {
    constexpr uint32_t PAIR = B | (4 + B) << 4;
    return __byte_perm(__byte_perm(words[0], words[1], PAIR), __byte_perm(words[2], words[3], PAIR), 0x5410);
}

// What a warp does to turn segments from bf16 into integers, BATCH of them at once: each is a chain of steps
// that wait for each other. A lane has eight elements of each.
template <class M, int BATCH>
class Aligner {
  public:
    static constexpr int SEGMENTS = M::PART_SEGMENTS;

    // Takes segments `unit`, unit + WARPS, ... of the rows, which have SEGMENTS each, counted row by row.
    __device__ Aligner(const Block& block, int unit, int units) {
#pragma unroll
        for (int i = 0; i < BATCH; ++i, unit += WARPS) {
            exists_[i] = unit < units;
            row_[i] = row_of(unit, SEGMENTS), segment_[i] = unit - row_[i] * SEGMENTS;
            const bool inside =
                M::PART_K % SEGMENT == 0 || segment_[i] * SEGMENT + 8 * block.lane() < M::PART_K;
            pairs_[i] = make_uint4(0, 0, 0, 0);
            if (exists_[i] && inside) {
                pairs_[i] = *reinterpret_cast<const uint4*>(bytes(block, i) + 16 * block.lane());
            }
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) largest_[i] = warp_max(largest_bits(pairs_[i]));
        __syncwarp();  // all have read before any writes
    }

    __device__ void write(const Block& block) {
        uint32_t sum[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) sum[i] = write_planes(block, i);
        if constexpr (M::BITS == 4) write_group_sums(block, sum);
    }

  private:
    __device__ uint8_t* bytes(const Block& block, int i) const {
        return reinterpret_cast<uint8_t*>(block.activations() + row_[i] * ACTIVATION_STRIDE +
                                          segment_[i] * SEGMENT);
    }

    // Also what one is worth. The sum of the lane's integers.
    __device__ uint32_t write_planes(const Block& block, int i) {
        const int lane = block.lane(), in_block = lane % 8 / 4 * 8;
        const uint32_t exponent =
            max_of((largest_[i] + 1) >> 7, LEAST_EXPONENT);  // of what rounds up, one more
        const float factor = __uint_as_float((127 + ALIGNED_EXPONENT - exponent) << 23);
        const uint32_t words[4] = {pairs_[i].x, pairs_[i].y, pairs_[i].z, pairs_[i].w};
        uint32_t low[8], high[8], sum = -8 * ROUNDER_BITS;
        for (int k = 0; k < 8; ++k) {
            const uint32_t bits = k % 2 == 0 ? words[k / 2] << 16 : words[k / 2] & 0xffff0000;
            low[k] = __float_as_uint(fmaf(__uint_as_float(bits), factor, ROUNDER));
            high[k] =
                __float_as_uint(fmaf(__uint_as_float(bits), factor, ROUNDER + 128));  // not on the busy unit
            sum += low[k];
        }
        if (!exists_[i]) return sum;
        *reinterpret_cast<uint2*>(bytes(block, i) + plane_offset(0, lane / 8, lane % 4) + in_block) =
            make_uint2(gather_bytes<1>(high), gather_bytes<1>(high + 4));
        *reinterpret_cast<uint2*>(bytes(block, i) + plane_offset(1, lane / 8, lane % 4) + in_block) =
            make_uint2(gather_bytes<0>(low), gather_bytes<0>(low + 4));
        if (lane == 0) {
            const uint32_t worth =
                largest_[i] < INFINITE_BF16 ? (exponent + 127 - ALIGNED_EXPONENT) << 23 : NAN_BITS;
            block.scales()->segment[row_[i] * MAX_SEGMENTS + segment_[i]] = __uint_as_float(worth);
        }
        return sum;
    }

    // The lanes' sums by groups of the scales.
    __device__ void write_group_sums(const Block& block, uint32_t (&sum)[BATCH]) {
        constexpr int LANES = M::GROUP / 8;
#pragma unroll
        for (int offset = 1; offset < LANES; offset *= 2) {
#pragma unroll
            for (int i = 0; i < BATCH; ++i) sum[i] += __shfl_xor_sync(0xffffffff, sum[i], offset);
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int group = segment_[i] * (SEGMENT / M::GROUP) + block.lane() / LANES;
            if (exists_[i] && block.lane() % LANES == 0 && group < ceil_div(M::PART_K, M::GROUP)) {
                block.scales()->group_sum[row_[i] * MAX_GROUPS + group] =
                    static_cast<float>(static_cast<int>(sum[i]));
            }
        }
    }

    uint4 pairs_[BATCH];
    uint32_t largest_[BATCH];
    int row_[BATCH], segment_[BATCH];
    bool exists_[BATCH];
};

// What comes between an input's arrival, which a barrier of the block has shown, and its products. The next
// barrier shows the result.
template <class M>
__device__ __forceinline__ void align_activations(const Block& block) {
    constexpr int BATCH = min_of(4, ceil_div(ROWS * M::PART_SEGMENTS, WARPS));
    const int units = num_rows(block.args) * M::PART_SEGMENTS;
    for (int unit = block.warp(); unit < units; unit += BATCH * WARPS) {
        Aligner<M, BATCH>(block, unit, units).write(block);
    }
}
