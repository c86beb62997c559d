// A quantised model's activations as integers (arithmetic.cuh) where a block's products find them: two planes
// of bytes take the place of the segment's bf16.
#pragma once

#include "arithmetic.cuh"
#include "block.cuh"

// Where in a segment the plane's 16 bytes of a block of 64 k begin that the lanes with lane % 4 = t multiply:
// k = 8t .. 8t + 7 and 32 more. The low plane's blocks are swapped in pairs: the two columns that a quarter
// warp reads at once lie in different banks.
__device__ __forceinline__ int plane_offset(int plane, int block64, int t) {
    return plane * SEGMENT + 64 * (block64 ^ plane) + 16 * t;
}

// What a warp does to turn segments from bf16 into integers, BATCH of them at once: each is a chain of steps
// that wait for each other. A lane has eight elements of each.
template <class M, int BATCH>
class Aligner {
  public:
    static constexpr int SEGMENTS = M::HELD_SEGMENTS;

    // Takes segments `unit`, unit + WARPS, ... of the rows, which have SEGMENTS each, counted row by row.
    // What is behind `end` in a row counts as zeros.
    __device__ Aligner(const Block& block, int unit, int units, int end) {
#pragma unroll
        for (int i = 0; i < BATCH; ++i, unit += WARPS) {
            exists_[i] = unit < units;
            row_[i] = row_of(unit, SEGMENTS), segment_[i] = unit - row_[i] * SEGMENTS;
            pairs_[i] = make_uint4(0, 0, 0, 0);
            if (exists_[i] && segment_[i] * SEGMENT + 8 * block.lane() < end) {
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
        const AlignedEight eight(pairs_[i], largest_[i]);
        if (!exists_[i]) return eight.sum;
        *reinterpret_cast<uint2*>(bytes(block, i) + plane_offset(0, lane / 8, lane % 4) + in_block) =
            eight.high;
        *reinterpret_cast<uint2*>(bytes(block, i) + plane_offset(1, lane / 8, lane % 4) + in_block) =
            eight.low;
        if (lane == 0) {
            block.scales()->segment[row_[i] * SEGMENT_STRIDE + segment_[i]] = worth_of(largest_[i]);
        }
        return eight.sum;
    }

    // The lanes' sums by groups of the scales.
    __device__ void write_group_sums(const Block& block, uint32_t (&sum)[BATCH]) {
        constexpr int LANES = M::GROUP / 8;
        const int lane = opaque(block.lane());  // where it writes is computed here: registers are short
#pragma unroll
        for (int offset = 1; offset < LANES; offset *= 2) {
#pragma unroll
            for (int i = 0; i < BATCH; ++i) sum[i] += __shfl_xor_sync(0xffffffff, sum[i], offset);
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int group = segment_[i] * (SEGMENT / M::GROUP) + lane / LANES;
            if (exists_[i] && lane % LANES == 0) {
                block.scales()->group_sum[row_[i] * GROUP_STRIDE + group] =
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
// barrier shows the result. `end`: where what has arrived of a row ends.
template <class M>
__device__ __forceinline__ void align_activations(const Block& block, int end) {
    constexpr int BATCH = min_of(4, ceil_div(ROWS * M::HELD_SEGMENTS, WARPS));
    const int units = num_rows(block.args) * M::HELD_SEGMENTS;
    for (int unit = block.warp(); unit < units; unit += BATCH * WARPS) {
        Aligner<M, BATCH>(block, unit, units, end).write(block);
    }
}
