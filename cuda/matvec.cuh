// Matrix times the activation rows in shared memory, in the canonical order: per segment of 256 k a sum
// that starts from zero and goes in m16n8k16 steps, the segments then added in ascending order. Weights are
// mma's A operand (16 outputs), activations its B operand (up to 8 rows), so a row's bits do not depend on
// how many others there are.
#pragma once

#include "block.cuh"

// ---- dequantisation: how a slot's bytes become A fragments for the 32 k of block j ----
// A new weight format is one more of these: load(slot, j, lane) gives the two k-steps' fragments, flush()
// applies the scales of a finished group.

template <class M, int BITS = M::BITS>
struct Dequant;

template <class M>
struct Dequant<M, 16> {
    __device__ void load(const uint8_t* slot, int j, int lane, uint32_t (&a)[2][4]) {
        for (int step = 0; step < 2; ++step) {
            const uint4 v = *reinterpret_cast<const uint4*>(slot + (2 * j + step) * LINE_BYTES + lane * 16);
            a[step][0] = v.x, a[step][1] = v.y, a[step][2] = v.z, a[step][3] = v.w;
        }
    }
};

template <class M>
struct Dequant<M, 8> {
    // Two's complement in bytes 0 and 2 of `word` to two bf16: (128 + low seven bits) - (128 or 256), exact.
    static __device__ uint32_t pair(uint32_t word) {
        const uint32_t low = (word & 0x007f007f) | 0x43004300;
        const uint32_t sign = (word & 0x00800080) | 0x43004300;
        return fma_bf16x2(sign, 0xbf80bf80, low);  // low - sign
    }

    __device__ void load(const uint8_t* slot, int j, int lane, uint32_t (&a)[2][4]) {
        const uint4 v = *reinterpret_cast<const uint4*>(slot + j * LINE_BYTES + lane * 16);
        const uint32_t words[2][2] = {{v.x, v.y}, {v.z, v.w}};
        for (int step = 0; step < 2; ++step) {
            for (int half = 0; half < 2; ++half) {
                a[step][2 * half] = pair(words[step][half]);
                a[step][2 * half + 1] = pair(words[step][half] >> 8);
            }
        }
    }

    // sum += scale * part for the group whose scales are at `scales` (fp16 [16 rows]).
    static __device__ void flush(float (&sum)[4], const float (&part)[4], const uint8_t* scales, int lane,
                                 const float (&)[2]) {
        const uint16_t* row = reinterpret_cast<const uint16_t*>(scales) + lane / 4;
        const float top = half_to_float(row[0]), bottom = half_to_float(row[8]);
        sum[0] = fmaf(top, part[0], sum[0]);
        sum[1] = fmaf(top, part[1], sum[1]);
        sum[2] = fmaf(bottom, part[2], sum[2]);
        sum[3] = fmaf(bottom, part[3], sum[3]);
    }
};

template <class M>
struct Dequant<M, 4> {
    uint4 line;

    // A nibble in mantissa bits 3 to 6 of 0x4180 is 16 + q exactly; flush() takes the 16 out again.
    static __device__ uint32_t pair(uint32_t word, int nibble) {
        const uint32_t shifted = nibble == 0 ? word << 3 : word >> (4 * nibble - 3);
        return (shifted & 0x00780078) | 0x41804180;
    }

    __device__ void load(const uint8_t* slot, int j, int lane, uint32_t (&a)[2][4]) {
        if (j % 2 == 0) line = *reinterpret_cast<const uint4*>(slot + j / 2 * LINE_BYTES + lane * 16);
        for (int r = 0; r < 4; ++r) {
            a[0][r] = pair(j % 2 == 0 ? line.x : line.z, r);
            a[1][r] = pair(j % 2 == 0 ? line.y : line.w, r);
        }
    }

    // sum += scale * (part - (16 + zero) * group_sum): part holds the products with 16 + q, group_sum the
    // group's activations of columns 2t and 2t + 1. Scales are fp16 [16 rows][scale, zero].
    static __device__ void flush(float (&sum)[4], const float (&part)[4], const uint8_t* scales, int lane,
                                 const float (&group_sum)[2]) {
        const uint32_t* row = reinterpret_cast<const uint32_t*>(scales) + lane / 4;
        for (int half = 0; half < 2; ++half) {
            const float scale = half_to_float(static_cast<uint16_t>(row[8 * half]));
            const float offset = -(16.0f + half_to_float(static_cast<uint16_t>(row[8 * half] >> 16)));
            for (int c = 0; c < 2; ++c) {
                sum[2 * half + c] =
                    fmaf(scale, fmaf(offset, group_sum[c], part[2 * half + c]), sum[2 * half + c]);
            }
        }
    }
};

// ---- one unit: 16 outputs, one segment ----

// The sums of activations that a lane's accumulator columns need for group `group`.
template <class M>
__device__ __forceinline__ void load_group_sum(const Block& block, int group, float (&group_sum)[2]) {
    for (int c = 0; c < 2; ++c) {
        const int column = 2 * (block.lane % 4) + c;
        group_sum[c] = 0.0f;
        if (M::BITS == 4 && column < block.num_rows) {
            group_sum[c] = block.shared->group_sum[column * MAX_GROUPS + group];
        }
    }
}

// sum += the products of one slot, which covers k0 <= k < k0 + K.
template <class M, int K>
__device__ __forceinline__ void multiply_slot(const Block& block, const uint8_t* slot, int k0,
                                              float (&sum)[4]) {
    constexpr int GROUP = M::BITS == 16 ? K : min_of(M::GROUP, K);
    const int column = block.lane / 4;
    const uint16_t* activations = block.activations + column * ACTIVATION_STRIDE + k0 + 8 * (block.lane % 4);
    Dequant<M> dequant;
    float part[4] = {};
#pragma unroll 2
    for (int j = 0; j < K / 32; ++j) {
        uint4 b = make_uint4(0, 0, 0, 0);
        if (column < block.num_rows) b = *reinterpret_cast<const uint4*>(activations + 32 * j);
        uint32_t a[2][4];
        dequant.load(slot, j, block.lane, a);
        if constexpr (M::BITS == 16) {
            mma_16x8x16(sum, a[0], b.x, b.y);
            mma_16x8x16(sum, a[1], b.z, b.w);
        } else {
            mma_16x8x16(part, a[0], b.x, b.y);
            mma_16x8x16(part, a[1], b.z, b.w);
            if ((j + 1) * 32 % GROUP == 0 || j + 1 == K / 32) {
                const int group = j * 32 / GROUP;
                float group_sum[2];
                load_group_sum<M>(block, k0 / M::GROUP + group, group_sum);
                dequant.flush(sum, part,
                              slot + K * M::BITS / 8 * TILE_ROWS + group * TILE_ROWS * M::SCALE_BYTES,
                              block.lane, group_sum);
                for (int i = 0; i < 4; ++i) part[i] = 0.0f;
            }
        }
    }
}

// Multiplies the warp's next unit of the stream into part[row][output of the tile].
template <class M>
__device__ __forceinline__ void multiply_unit(Block& block, int segment, float* part) {
    float sum[4] = {};
    const int first = segment * M::SLOTS_PER_SEGMENT;
    const int last = min_of(first + M::SLOTS_PER_SEGMENT, M::SLOTS);
    for (int slot = first; slot < last; ++slot) {
        const uint8_t* bytes = block.weights.wait();
        if (M::TAIL_K == M::SLOT_K || slot + 1 < M::SLOTS) {
            multiply_slot<M, M::SLOT_K>(block, bytes, slot * M::SLOT_K, sum);
        } else {
            multiply_slot<M, M::TAIL_K>(block, bytes, slot * M::SLOT_K, sum);
        }
        block.weights.release();
    }
    const int column = 2 * (block.lane % 4), output = block.lane / 4;
    for (int c = 0; c < 2; ++c) {
        if (column + c < ROWS) {
            part[(column + c) * TILE_ROWS + output] = sum[c];
            part[(column + c) * TILE_ROWS + output + 8] = sum[2 + c];
        }
    }
}

// ---- all units of a stage ----

// Adds the segments of units [first, last) in ascending order. A tile that is complete goes to
// epilogue(own tile, row, value) in half warps, lane % 16 being the output; one that goes on in the next
// round is carried.
template <class M, class Epilogue>
__device__ __forceinline__ void add_segments(Block& block, int first, int last, int parity,
                                             Epilogue epilogue) {
    const int first_tile = first / M::SEGMENTS;
    const int jobs = (ceil_div(last, M::SEGMENTS) - first_tile) * block.num_rows;
    const int output = block.thread % TILE_ROWS;
    for (int job = block.thread / TILE_ROWS; job < jobs; job += THREADS / TILE_ROWS) {
        const int tile = first_tile + job / block.num_rows, row = job % block.num_rows;
        const int begin = max_of(first, tile * M::SEGMENTS), end = min_of(last, (tile + 1) * M::SEGMENTS);
        const bool starts = begin == tile * M::SEGMENTS;
        float* carry = block.shared->carry + row * TILE_ROWS + output;
        float sum = starts ? 0.0f : carry[parity * ROWS * TILE_ROWS];
        for (int unit = begin; unit < end; ++unit) {
            sum += block.shared->part[((unit - first) * ROWS + row) * TILE_ROWS + output];
        }
        if (end == (tile + 1) * M::SEGMENTS) {
            epilogue(tile, row, sum);
        } else {
            carry[(parity ^ 1) * ROWS * TILE_ROWS] = sum;
        }
    }
}

// Runs the block's share of M times its activations. All threads call it, with the activations in place.
template <class M, class Epilogue>
__device__ __forceinline__ void multiply(Block& block, Epilogue epilogue) {
    const int units = own_tiles(M::TILES) * M::SEGMENTS;
    int parity = 0;
    for (int first = 0; first < units; first += ROUND_UNITS) {
        const int last = min_of(first + ROUND_UNITS, units);
        for (int unit = first + block.warp; unit < last; unit += WARPS) {
            multiply_unit<M>(block, unit % M::SEGMENTS,
                             block.shared->part + (unit - first) * ROWS * TILE_ROWS);
        }
        __syncthreads();
        add_segments<M>(block, first, last, parity, epilogue);
        __syncthreads();
        parity ^= 1;
    }
}

// Fills the group sums of M's input (int4 only): eight lanes add a group's activations, each a run of
// GROUP / 8, then the eight runs in a fixed tree. Ends with a barrier.
template <class M>
__device__ __forceinline__ void sum_groups(Block& block) {
    if constexpr (M::BITS == 4) {
        constexpr int RUN = M::GROUP / 8;
        const int jobs = round_up(M::GROUPS * block.num_rows, THREADS / 8);
        for (int job = block.thread / 8; job < jobs; job += THREADS / 8) {
            const int row = job / M::GROUPS, group = job % M::GROUPS;
            float sum = 0.0f;
            if (row < block.num_rows) {
                const int k = group * M::GROUP + block.thread % 8 * RUN;
                for (int i = 0; i < RUN; ++i) {
                    if (k + i >= M::K_PAD) break;
                    const uint32_t bits = block.activations[row * ACTIVATION_STRIDE + k + i];
                    sum += __uint_as_float(bits << 16);
                }
            }
            for (int offset = 4; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffff, sum, offset);
            if (row < block.num_rows && block.thread % 8 == 0) {
                block.shared->group_sum[row * MAX_GROUPS + group] = sum;
            }
        }
        __syncthreads();
    }
}
