// What a thread knows of its block: its place, the shared memory and the pass's arguments.
#pragma once

#include "config.cuh"
#include "stream.cuh"

constexpr int MAX_K_PAD =
    max_of(max_of(QkvProj::K_PAD, OProj::K_PAD), max_of(DownProj::K_PAD, LmHead::K_PAD));
constexpr int MAX_GROUPS =
    max_of(max_of(QkvProj::GROUPS, OProj::GROUPS), max_of(DownProj::GROUPS, LmHead::GROUPS));
// Rows of matrix operands lie 64 bytes off a multiple of 128, so that two rows' 64-byte pieces, which a
// quarter warp reads at once, fall into different banks.
constexpr int ACTIVATION_STRIDE = round_up(MAX_K_PAD, 64) + 32;  // bf16 elements
constexpr int ROUND_UNITS = WARPS * max_of(1, 8 / ROWS);         // units multiplied between two additions

// ---- attention's scratch, which lies over the activations: they are dead while it is used ----
constexpr int ITEM_HEADS = min_of(HEADS_PER_KV, 8);  // query heads that one item takes: the columns of an mma
constexpr int HEAD_GROUPS = ceil_div(HEADS_PER_KV, ITEM_HEADS);
constexpr int HEAD_DIM_PAD = round_up(HEAD_DIM, 32);
constexpr int QUERY_STRIDE = HEAD_DIM_PAD % 64 == 0 ? HEAD_DIM_PAD + 32 : HEAD_DIM_PAD;
constexpr int HEAD_CHUNK = 4;                                   // heads whose values are summed in one sweep
constexpr int SCORE_STRIDE = round_up(ITEM_HEADS, HEAD_CHUNK);  // floats for one position
constexpr int pow2_at_least(int n) {
    int p = 1;
    while (p < n) p *= 2;
    return p;
}
constexpr int VALUE_PAIRS = pow2_at_least(HEAD_DIM / 2);       // threads across a value vector
constexpr int VALUE_GROUPS = THREADS / VALUE_PAIRS;            // runs of positions summed side by side
constexpr int VALUE_RUN = max_of(1, KV_BLOCK / VALUE_GROUPS);  // positions in such a run

struct AttentionScratch {
    float query[ITEM_HEADS * HEAD_DIM];
    float key[ROWS * HEAD_DIM];    // of this pass's rows
    float value[ROWS * HEAD_DIM];  // the same
    alignas(16) uint16_t query_bf16[8 * QUERY_STRIDE];
    alignas(16) uint16_t key_bf16[ROWS * HEAD_DIM];
    alignas(16) uint16_t value_bf16[ROWS * HEAD_DIM];
    alignas(16) float score[KV_BLOCK * SCORE_STRIDE];  // later the unnormalised probability
    float partial[VALUE_GROUPS * HEAD_CHUNK * HEAD_DIM];
    float out[ITEM_HEADS * HEAD_DIM];
    float max[ITEM_HEADS];
    float sum[ITEM_HEADS];
};

struct MergeScratch {
    float max[MAX_SPLITS];
    float sum[MAX_SPLITS];
    float out[HEAD_DIM + 4];
};

struct SharedTail {
    alignas(16) float part[ROUND_UNITS * ROWS * TILE_ROWS];  // [unit of the round][row][output of the tile]
    float carry[2 * ROWS * TILE_ROWS];                       // [parity of the round][row][output of the tile]
    float group_sum[ROWS * max_of(1, MAX_GROUPS)];           // of the activations, for int4's zero points
    float residual[OWN_TILES * ROWS * TILE_ROWS];            // [own tile][row][output of the tile]
    float warp_sum[2 * WARPS];
};

constexpr int SCRATCH_BYTES =
    max_of(ROWS * ACTIVATION_STRIDE * 2,
           max_of(static_cast<int>(sizeof(AttentionScratch)), static_cast<int>(sizeof(MergeScratch))));
constexpr int FIXED_BYTES =
    round_up(SCRATCH_BYTES, 128) + round_up(static_cast<int>(sizeof(SharedTail)), 128);
constexpr int RING_SLOTS = min_of(8, (SHARED_LIMIT - FIXED_BYTES) / (WARPS * SLOT_CAPACITY));
static_assert(RING_SLOTS >= 1, "shared memory is too small for this model at this number of rows");
constexpr int SHARED_BYTES = FIXED_BYTES + WARPS * RING_SLOTS * SLOT_CAPACITY;

struct Block {
    const PassArgs& args;
    int thread, warp, lane;
    int num_rows;
    uint16_t* activations;  // bf16 [ROWS][ACTIVATION_STRIDE]
    AttentionScratch* attention;
    MergeScratch* merge;
    SharedTail* shared;
    WeightStream<RING_SLOTS> weights;

    __device__ Block(const PassArgs& pass_args, uint8_t* memory)
        : args(pass_args),
          num_rows(pass_args.num_rows),
          activations(reinterpret_cast<uint16_t*>(memory)),
          attention(reinterpret_cast<AttentionScratch*>(memory)),
          merge(reinterpret_cast<MergeScratch*>(memory)),
          shared(reinterpret_cast<SharedTail*>(memory + round_up(SCRATCH_BYTES, 128))),
          weights(pass_args, memory + FIXED_BYTES + threadIdx.x / 32 * RING_SLOTS * SLOT_CAPACITY) {
        locate();
    }

    // Called once a layer: places that depend on the thread are computed anew, not kept over the layers.
    __device__ void locate() {
        thread = opaque(threadIdx.x);
        warp = thread / 32;
        lane = thread % 32;
    }

    // The sum over the warp, the same bits in every lane.
    __device__ float warp_sum(float x) const {
        for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
        return x;
    }

    __device__ float warp_max(float x) const {
        for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, offset));
        return x;
    }
};
