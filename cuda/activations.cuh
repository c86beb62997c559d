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

// What a warp does to turn pieces, each a segment of a row, from bf16 into integers, COUNT of them at once:
// each is a chain of steps that wait for each other. They lie STEP bytes apart, the first at `bytes`. held(i)
// says whether the lane's eight elements of piece i are there; those that are not count as zeros.
template <int COUNT, int STEP>
class Aligner {
  public:
    template <class Held>
    __device__ Aligner(const Block& block, uint8_t* bytes, Held held) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            pairs_[i] = make_uint4(0, 0, 0, 0);
            if (held(i)) pairs_[i] = *reinterpret_cast<const uint4*>(bytes + i * STEP + 16 * block.lane());
        }
#pragma unroll
        for (int i = 0; i < COUNT; ++i) largest_[i] = warp_max(largest_bits(pairs_[i]));
        __syncwarp();  // all have read before any writes
    }

    // Leaves the integers of the pieces that exist where the bf16 were, and hands to take(i, worth, sum), for
    // all pieces, what one is worth and the sum of the lane's.
    template <class Exists, class Take>
    __device__ void write(const Block& block, uint8_t* bytes, Exists exists, Take take) {
        const int lane = block.lane(), in_block = lane % 8 / 4 * 8;
        uint8_t* high = bytes + plane_offset(0, lane / 8, lane % 4) + in_block;
        uint8_t* low = bytes + plane_offset(1, lane / 8, lane % 4) + in_block;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const AlignedEight eight(pairs_[i], largest_[i]);
            if (exists(i)) {
                *reinterpret_cast<uint2*>(high + i * STEP) = eight.high;
                *reinterpret_cast<uint2*>(low + i * STEP) = eight.low;
            }
            take(i, worth_of(largest_[i]), eight.sum);
        }
    }

  private:
    uint4 pairs_[COUNT];
    uint32_t largest_[COUNT];
};

// How warps share out the rows of an input: so many to each.
constexpr int ROW_WARPS = ROWS > 4 ? 2 : (ROWS > 2 ? 4 : (ROWS > 1 ? 8 : 16));

// Adds the lanes' sums by groups of int4's scales.
template <class M, int COUNT>
__device__ __forceinline__ void add_lanes(const Block& block, uint32_t (&sum)[COUNT]) {
#pragma unroll
    for (int offset = 1; offset < M::GROUP / 8; offset *= 2) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) sum[i] += __shfl_xor_sync(0xffffffff, sum[i], offset);
    }
}

// What comes between an input's arrival, which a barrier of the block has shown, and its products. The next
// barrier shows the result. `end`: where what has arrived of a row ends. WHOLE: that it is the end of a
// segment, the last that is held.
template <class M, bool WHOLE>
__device__ __forceinline__ void align_activations(const Block& block, int end) {
    constexpr int SHARE = ceil_div(M::HELD_SEGMENTS, ROW_WARPS);
    constexpr int COUNT = min_of(4, SHARE), STEP = ROW_WARPS * 2 * SEGMENT, LANES = M::GROUP / 8;
    constexpr bool EVEN = WHOLE && M::HELD_SEGMENTS % (COUNT * ROW_WARPS) == 0;
    const int row = block.warp() / ROW_WARPS, lane = block.lane();
    if (row >= num_rows(block.args)) return;
    uint8_t* bytes = block.memory + row * 2 * ACTIVATION_STRIDE;
#pragma unroll 1
    for (int first = block.warp() % ROW_WARPS; first < M::HELD_SEGMENTS; first += COUNT * ROW_WARPS) {
        const auto exists = [&](int i) { return EVEN || first + i * ROW_WARPS < M::HELD_SEGMENTS; };
        const auto held = [&](int i) {
            return EVEN || (exists(i) && (first + i * ROW_WARPS) * SEGMENT + 8 * lane < end);
        };
        uint8_t* own = bytes + first * 2 * SEGMENT;
        Aligner<COUNT, STEP> aligner(block, own, held);
        float* worth = block.scales()->segment + row * SEGMENT_STRIDE + first;
        uint32_t sum[COUNT];
        aligner.write(block, own, exists, [&](int i, float worth_of_one, uint32_t sum_of_eight) {
            if (exists(i) && lane == 0) worth[i * ROW_WARPS] = worth_of_one;
            sum[i] = sum_of_eight;
        });
        if constexpr (M::BITS == 4) {
            add_lanes<M>(block, sum);
            float* sums =
                block.scales()->group_sum + row * GROUP_STRIDE + first * (SEGMENT / M::GROUP) + lane / LANES;
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                if (exists(i) && lane % LANES == 0) {
                    sums[i * ROW_WARPS * (SEGMENT / M::GROUP)] = static_cast<float>(static_cast<int>(sum[i]));
                }
            }
        }
    }
}

// The same for the segments that are the warp's own, of all rows; a barrier of the warp shows the result,
// which lacks int4's sums: see Unit::Input.
template <class M, bool WHOLE>
__device__ __forceinline__ void align_own(const Block& block, int end) {
    using Own = OwnSegments<M>;
    constexpr int PIECES = ROWS * Own::MOST, COUNT = min_of(4, PIECES);
    constexpr int STEP = ROWS == 1 ? WARPS * 2 * SEGMENT : 2 * ACTIVATION_STRIDE;
    constexpr int PLACE_STEP = ROWS == 1 ? WARPS : SEGMENT_STRIDE;
    const int lane = block.lane(), turn = M::turn(block.warp()), place = Own::place(turn, 0);
    const int pieces = Own::pieces(block);
#pragma unroll 1
    for (int first = 0; first < pieces; first += COUNT) {
        const auto exists = [&](int i) { return ROWS > 1 || first + i < pieces; };
        const auto held = [&](int i) {
            const int segment = Own::segment(turn, ROWS == 1 ? first + i : 0);
            return exists(i) && (WHOLE || segment * SEGMENT + 8 * lane < end);
        };
        uint8_t* bytes = block.memory + place * 2 * SEGMENT + first * STEP;
        Aligner<COUNT, STEP> aligner(block, bytes, held);
        aligner.write(block, bytes, exists, [&](int i, float worth_of_one, uint32_t) {
            if (exists(i) && lane == 0) {
                block.scales()->segment[place + (first + i) * PLACE_STEP] = worth_of_one;
            }
        });
    }
}
