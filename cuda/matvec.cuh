// Matrix times the activation rows in shared memory, in the canonical order: per segment of 256 k a sum
// that starts from zero and goes in m16n8k16 steps, the segments then added in ascending order. Weights are
// mma's A operand (16 outputs), activations its B operand (up to 8 rows), so a row's bits do not depend on
// how many others there are.
#pragma once

#include "block.cuh"

// ---- dequantisation: how a slot's bytes become A fragments for the 32 k of block j ----
// A new weight format is one more of these: load(slot, j, lane) gives the two k-steps' fragments, flush()
// applies the scales of a finished group; with NEEDS_SUMS it gets the sum of the group's activations too, in
// the accumulators' columns: what mma makes of weights of one, so its bits do not depend on other rows.

constexpr int COLUMNS = min_of(ROWS, 2);  // of a lane's two accumulator columns, those that some row has

template <class M, int BITS = M::BITS>
struct Dequant;

template <class M>
struct Dequant<M, 16> {
    static constexpr bool NEEDS_SUMS = false;
    __device__ void load(const uint8_t* slot, int j, int lane, uint32_t (&a)[2][4]) {
        for (int step = 0; step < 2; ++step) {
            const uint4 v = *reinterpret_cast<const uint4*>(slot + (2 * j + step) * LINE_BYTES + lane * 16);
            a[step][0] = v.x, a[step][1] = v.y, a[step][2] = v.z, a[step][3] = v.w;
        }
    }
};

template <class M>
struct Dequant<M, 8> {
    static constexpr bool NEEDS_SUMS = false;
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
                                 const float (&)[4]) {
        const uint16_t* row = reinterpret_cast<const uint16_t*>(scales) + lane / 4;
        for (int half = 0; half < 2; ++half) {
            const float scale = half_to_float(row[8 * half]);
            for (int c = 0; c < COLUMNS; ++c)
                sum[2 * half + c] = fmaf(scale, part[2 * half + c], sum[2 * half + c]);
        }
    }
};

template <class M>
struct Dequant<M, 4> {
    static constexpr bool NEEDS_SUMS = true;
    const uint32_t mask =
        static_cast<uint32_t>(opaque(0x00780078));  // in a register, not made anew each time

    // A nibble in mantissa bits 3 to 6 of 0x4180 is 16 + q exactly; flush() takes the 16 out again.
    __device__ uint32_t pair(uint32_t word, int nibble) const {
        return mask_or(nibble == 0 ? word << 3 : word >> (4 * nibble - 3), mask, 0x41804180);
    }

    __device__ void load(const uint8_t* slot, int j, int lane, uint32_t (&a)[2][4]) {
        const uint4 line =
            *reinterpret_cast<const uint4*>(slot + j / 2 * LINE_BYTES + lane * 16);  // once for both halves
        for (int r = 0; r < 4; ++r) {
            a[0][r] = pair(j % 2 == 0 ? line.x : line.z, r);
            a[1][r] = pair(j % 2 == 0 ? line.y : line.w, r);
        }
    }

    // sum += scale * (part - (16 + zero) * group_sum): part holds the products with 16 + q. Scales are fp16
    // [16 rows][scale, zero].
    static __device__ void flush(float (&sum)[4], const float (&part)[4], const uint8_t* scales, int lane,
                                 const float (&group_sum)[4]) {
        const uint32_t* row = reinterpret_cast<const uint32_t*>(scales) + lane / 4;
        for (int half = 0; half < 2; ++half) {
            const float scale = half_to_float(static_cast<uint16_t>(row[8 * half]));
            const float offset = -(16.0f + half_to_float(static_cast<uint16_t>(row[8 * half] >> 16)));
            for (int c = 0; c < COLUMNS; ++c) {
                sum[2 * half + c] =
                    fmaf(scale, fmaf(offset, group_sum[c], part[2 * half + c]), sum[2 * half + c]);
            }
        }
    }
};

// ---- activations ----

// The B fragments of the 32 k from k0 on, of two k-steps: {x, y} and {z, w}. Columns without a row repeat the
// last.
__device__ __forceinline__ uint4 load_activations(const Block& block, int k0) {
    const int row = min_of(block.lane() / 4, num_rows(block.args) - 1);
    const uint16_t* at = block.activations() + row * ACTIVATION_STRIDE + k0 + 8 * (block.lane() % 4);
    return *reinterpret_cast<const uint4*>(at);
}

// ---- one unit: 16 outputs, one segment ----

// sum += the products of one slot, which covers k0 <= k < k0 + K.
template <class M, int K>
__device__ __forceinline__ void multiply_slot(const Block& block, const uint8_t* slot, int k0,
                                              float (&sum)[4]) {
    constexpr int RUN =
        M::BITS == 16 ? K : min_of(M::GROUP, K);  // of k, whose products one accumulator takes
    constexpr int RUN_BYTES = RUN * M::BITS / 8 * TILE_ROWS;
    const uint8_t* scales = slot + K * M::BITS / 8 * TILE_ROWS;
    const uint32_t ones[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
#pragma unroll 2
    for (int run = 0; run < ceil_div(K, RUN); ++run) {
        Dequant<M> dequant;
        float part[4] = {}, activations[4] = {};
        constexpr bool HALF_LINES = M::BITS == 4 && RUN < 64;  // a line of int4 holds 64 k
        const uint8_t* lines = slot + (HALF_LINES ? run / 2 * 2 : run) * RUN_BYTES;
#pragma unroll
        for (int j = 0; j < RUN / 32; ++j) {
            if (K % RUN != 0 && run * RUN + j * 32 >= K) break;
            const uint4 b = load_activations(block, k0 + run * RUN + 32 * j);
            uint32_t a[2][4];
            dequant.load(lines, HALF_LINES ? run % 2 : j, block.lane(), a);
            float (&target)[4] = M::BITS == 16 ? sum : part;
            mma_16x8x16(target, a[0], b.x, b.y);
            mma_16x8x16(target, a[1], b.z, b.w);
            if constexpr (Dequant<M>::NEEDS_SUMS) {
                mma_16x8x16(activations, ones, b.x, b.y);
                mma_16x8x16(activations, ones, b.z, b.w);
            }
        }
        if constexpr (M::BITS < 16) {
            Dequant<M>::flush(sum, part, scales + run * TILE_ROWS * M::SCALE_BYTES, block.lane(),
                              activations);
        }
    }
}

// Multiplies the warp's next unit of the stream into part[row][output of the tile].
template <class M>
__device__ __forceinline__ void multiply_unit(Block& block, int segment, float* part) {
    float sum[4] = {};
    const int first = segment * M::SLOTS_PER_SEGMENT;
    const int last = min_of(first + M::SLOTS_PER_SEGMENT, M::SLOTS);
#pragma unroll 1
    for (int slot = first; slot < last; ++slot) {
        const uint8_t* bytes = block.stream.wait();
        if (M::TAIL_K == M::SLOT_K || slot + 1 < M::SLOTS) {
            multiply_slot<M, M::SLOT_K>(block, bytes, slot * M::SLOT_K, sum);
        } else {
            multiply_slot<M, M::TAIL_K>(block, bytes, slot * M::SLOT_K, sum);
        }
        block.stream.release(sum[0] + sum[2]);
    }
    const int column = 2 * (block.lane() % 4), output = block.lane() / 4;
    for (int c = 0; c < COLUMNS; ++c) {
        if (column + c < ROWS) {
            part[(column + c) * TILE_ROWS + output] = sum[c];
            part[(column + c) * TILE_ROWS + output + 8] = sum[2 + c];
        }
    }
}

// ---- all units of a stage ----

// Units of a round: of whole tiles, unless that makes it much shorter.
template <class M>
constexpr int ROUND =
    ROUND_UNITS % M::SEGMENTS < WARPS / 2 ? ROUND_UNITS / M::SEGMENTS * M::SEGMENTS : ROUND_UNITS;

// Adds the segments of units [first, last) in ascending order. A tile that is complete goes to
// epilogue(own tile, row, value, valid) in half warps, lane % 16 being the output, as for_half_warps() says;
// one that goes on in the next round is carried.
template <class M, class Epilogue>
__device__ __forceinline__ void add_segments(Block& block, const float* part, int first, int last, int parity,
                                             Epilogue epilogue) {
    constexpr bool WHOLE_TILES = ROUND<M> % M::SEGMENTS == 0;
    const int first_tile = first / M::SEGMENTS;
    const int jobs = (ceil_div(last, M::SEGMENTS) - first_tile) * num_rows(block.args);
    const int output = block.thread % TILE_ROWS;
    for_half_warps(block, jobs, [&](int job, bool valid) {
        const int tile = first_tile + job / num_rows(block.args), row = job % num_rows(block.args);
        const int tile_begin = tile * M::SEGMENTS, tile_end = tile_begin + M::SEGMENTS;
        const int begin = WHOLE_TILES ? tile_begin : max_of(first, tile_begin);
        const int end = WHOLE_TILES ? tile_end : min_of(last, tile_end);
        float* carry = block.shared()->carry + row * TILE_ROWS + output;
        float sum = begin == tile_begin ? 0.0f : carry[parity * ROWS * TILE_ROWS];
#pragma unroll 8
        for (int unit = begin; unit < end; ++unit) {
            sum += part[((unit - first) * ROWS + row) * TILE_ROWS + output];
        }
        if (!WHOLE_TILES && valid && end < tile_end) carry[(parity ^ 1) * ROWS * TILE_ROWS] = sum;
        epilogue(tile, row, sum, valid && end == tile_end);
    });
}

// Runs the block's share of M, the matrix of `stage`, times its activations. All threads call it, with the
// activations in place. Rounds take turns with two buffers: whoever adds up a round is done with it before
// anyone begins the next but one.
template <class M, class Epilogue>
__device__ __forceinline__ void multiply(Block& block, Stage stage, Epilogue epilogue) {
    const int units = block.own_tiles(stage) * M::SEGMENTS;
    int parity = 0;
    for (int first = 0; first < units; first += ROUND<M>) {
        const int last = min_of(first + ROUND<M>, units);
        float* part = block.shared()->part + parity * ROUND_UNITS * ROWS * TILE_ROWS;
        // Unit u is warp u % WARPS's, in the stream's order too.
        for (int unit = first + (block.warp() - first & (WARPS - 1)); unit < last; unit += WARPS) {
            multiply_unit<M>(block, unit % M::SEGMENTS, part + (unit - first) * ROWS * TILE_ROWS);
            block.stream.refill();
        }
        sync_threads<THREADS>();
        add_segments<M>(block, part, first, last, parity, epilogue);
        parity ^= 1;
    }
}
