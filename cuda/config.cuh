// What a build is made for: the model's shape and the device's limits come in as -D constants, everything
// else follows from them here. A missing one is an error, never a default.
#pragma once

#include "ptx.cuh"

#if !defined(ROWS) || !defined(HIDDEN_SIZE) || !defined(INTERMEDIATE_SIZE) || !defined(NUM_LAYERS) ||     \
    !defined(SCORE_SCALE) || !defined(NUM_HEADS) || !defined(NUM_KV_HEADS) || !defined(HEAD_DIM) ||       \
    !defined(VOCAB_SIZE) || !defined(MAX_SEQ_LEN) || !defined(RMS_NORM_EPS) || !defined(LAYER_WINDOWS) || \
    !defined(TIE_WORD_EMBEDDINGS) || !defined(QKV_BIAS) || !defined(O_BIAS) || !defined(MLP_BIAS) ||      \
    !defined(QK_NORM) || !defined(KV_BITS)
#error "a -D constant of the model is missing"
#endif
#if !defined(WEIGHT_BITS) || !defined(GROUP_SIZE) || !defined(LM_HEAD_BITS) ||         \
    !defined(LM_HEAD_GROUP_SIZE) || !defined(VECTORS_SIZE) || !defined(LAYER_BYTES) || \
    !defined(LM_HEAD_BYTES)
#error "a -D constant of the packed weights is missing"
#endif
#if !defined(INPUT_LAYERNORM_OFFSET) || !defined(POST_ATTENTION_LAYERNORM_OFFSET) ||   \
    !defined(Q_NORM_OFFSET) || !defined(K_NORM_OFFSET) || !defined(QKV_BIAS_OFFSET) || \
    !defined(O_BIAS_OFFSET) || !defined(GATE_UP_BIAS_OFFSET) || !defined(DOWN_BIAS_OFFSET)
#error "a -D constant of the norms and biases is missing"
#endif
#if !defined(SHARED_LIMIT) || !defined(PART_SEGMENTS) || !defined(SPLIT_PARTS) || !defined(OWN_TILES) || \
    !defined(OWN_HEAD_TILES) || !defined(MAX_QUERIED) || !defined(BULK_COPIES) ||                        \
    !defined(COPIES_IN_FLIGHT) || !defined(TEST_PAUSES) || !defined(STAGE_TIMES)
#error "a -D constant of the launch is missing"
#endif

constexpr int WARPS = 16;                         // that compute
constexpr int THREADS = 32 * WARPS;               // of those warps
constexpr int FETCH_WARPS = BULK_COPIES ? 4 : 0;  // that fetch for them
constexpr int BLOCK_THREADS = THREADS + 32 * FETCH_WARPS;
constexpr int LAUNCH_REGISTERS = 65536 / BLOCK_THREADS / 8 * 8;  // of a thread, before some are given up
constexpr int FETCH_REGISTERS = 64, COMPUTE_REGISTERS = 104;
static_assert(!BULK_COPIES || FETCH_WARPS * FETCH_REGISTERS + WARPS * COMPUTE_REGISTERS <=
                                  (WARPS + FETCH_WARPS) * LAUNCH_REGISTERS,
              "more registers are taken than given up");
constexpr int MAX_ROWS = 8;  // columns of one mma
constexpr int TILE_ROWS = 16;
constexpr int SEGMENT = 256;   // the canonical order of sums: each run of 256 k starts from zero
constexpr int KV_BLOCK = 256;  // the canonical order of attention: one partial softmax per 256 positions
constexpr int LINE_BYTES = 512;
constexpr int LINES_PER_SLOT = 4;

static_assert(ROWS >= 1 && ROWS <= MAX_ROWS, "one mma takes 1 to 8 rows");
static_assert(HEAD_DIM % 8 == 0 && HEAD_DIM <= 256, "head_dim must be a multiple of 8, at most 256");
static_assert(NUM_HEADS % NUM_KV_HEADS == 0, "num_heads must be a multiple of num_kv_heads");

constexpr int ceil_div(int a, int b) {
    return (a + b - 1) / b;
}
constexpr int round_up(int a, int b) {
    return ceil_div(a, b) * b;
}
template <class T>
constexpr T max_of(T a, T b) {
    return a > b ? a : b;
}
constexpr int min_of(int a, int b) {
    return a < b ? a : b;
}
constexpr int common_divisor(int a, int b) {  // the greatest
    return b == 0 ? a : common_divisor(b, a % b);
}

// Geometry of one packed matrix; ffmini/layout.py says where each element lies. Its input comes in runs of
// RUN elements, see RunsOf in exchange.cuh. If it ADDS to the residual stream its input has parts of up to
// PART_SEGMENTS segments, whose sums are added one after the other. Where parts are split, a block has one of
// them at a time; otherwise it has all of the input.
template <int N, int K, int BITS_, int GROUP_, int RUN_ = TILE_ROWS, bool ADDS_ = false>
struct Matrix {
    static constexpr bool ADDS = ADDS_;
    static constexpr int RUN = RUN_;
    static constexpr int BITS = BITS_;
    static constexpr int GROUP = GROUP_;
    static constexpr int TILES = ceil_div(N, TILE_ROWS);
    static constexpr int K_PAD = round_up(K, 64);
    static constexpr int SEGMENTS = ceil_div(K_PAD, SEGMENT);
    static constexpr int PARTS = ADDS ? ceil_div(SEGMENTS, PART_SEGMENTS) : 1;
    static constexpr int IN_PART = ceil_div(SEGMENTS, PARTS);  // segments
    static constexpr bool SPLIT = SPLIT_PARTS && PARTS > 1;
    static constexpr int HELD_SEGMENTS = SPLIT ? IN_PART : SEGMENTS;  // by a block
    // Who has the first unit: if there are few, others than those who had the few of the stage before, so
    // that all rings hold weights that are wanted soon.
    static constexpr int FIRST_WARP = ADDS && !SPLIT ? WARPS / 2 : 0;
    static __device__ int turn(int warp) { return (warp - FIRST_WARP) & (WARPS - 1); }  // of a warp
    static constexpr int HELD_K = min_of(HELD_SEGMENTS * SEGMENT, K_PAD);
    static constexpr int SLOT_K = LINES_PER_SLOT * 256 / BITS;
    static constexpr int SLOTS = ceil_div(K_PAD, SLOT_K);
    static constexpr int TAIL_K = K_PAD - (SLOTS - 1) * SLOT_K;
    static constexpr int SLOTS_PER_SEGMENT = SEGMENT / SLOT_K;
    static constexpr int SCALE_BYTES = BITS == 16 ? 0 : (BITS == 8 ? 2 : 4);
    static constexpr int GROUPS = BITS == 16 ? 0 : ceil_div(K_PAD, GROUP);
    static constexpr int bytes_of(int k) {
        return k * BITS / 8 * TILE_ROWS + (BITS == 16 ? 0 : ceil_div(k, GROUP) * TILE_ROWS * SCALE_BYTES);
    }
    static constexpr int SLOT_BYTES = bytes_of(SLOT_K);
    static constexpr int TAIL_BYTES = bytes_of(TAIL_K);
    static constexpr int TILE_BYTES = (SLOTS - 1) * SLOT_BYTES + TAIL_BYTES;
    static constexpr uint64_t BYTES = static_cast<uint64_t>(TILES) * TILE_BYTES;
};

// A quantised model multiplies integers, its lm_head too.
constexpr bool INTEGERS = WEIGHT_BITS != 16;
static_assert(INTEGERS == (LM_HEAD_BITS != 16), "all matrices are quantised or none");

constexpr float LOG2_E = 1.4426950408889634f;
constexpr int HEADS_PER_KV = NUM_HEADS / NUM_KV_HEADS;
constexpr int ATTENTION_SIZE = NUM_HEADS * HEAD_DIM;
constexpr int KV_SIZE = NUM_KV_HEADS * HEAD_DIM;
constexpr int INTERMEDIATE_TILES = ceil_div(INTERMEDIATE_SIZE, 8);  // of 8 gate rows and 8 up rows

using QkvProj = Matrix<ATTENTION_SIZE + 2 * KV_SIZE, HIDDEN_SIZE, WEIGHT_BITS, GROUP_SIZE>;
using OProj = Matrix<HIDDEN_SIZE, ATTENTION_SIZE, WEIGHT_BITS, GROUP_SIZE, HEAD_DIM, true>;
using GateUpProj = Matrix<INTERMEDIATE_TILES * TILE_ROWS, HIDDEN_SIZE, WEIGHT_BITS, GROUP_SIZE>;
using DownProj = Matrix<HIDDEN_SIZE, INTERMEDIATE_SIZE, WEIGHT_BITS, GROUP_SIZE, 8, true>;
using LmHead = Matrix<VOCAB_SIZE, HIDDEN_SIZE, LM_HEAD_BITS, LM_HEAD_GROUP_SIZE>;

static_assert(QkvProj::BYTES + OProj::BYTES + GateUpProj::BYTES + DownProj::BYTES == LAYER_BYTES,
              "ffmini/layout.py and cuda/config.cuh disagree about a layer's bytes");
static_assert(LmHead::BYTES == LM_HEAD_BYTES,
              "ffmini/layout.py and cuda/config.cuh disagree about the lm_head's bytes");

constexpr int HIDDEN_TILES = OProj::TILES;
constexpr int RESIDUAL_SIZE = HIDDEN_TILES * TILE_ROWS;  // of a row; what is behind HIDDEN_SIZE is zero

// A warp takes KV_TILE positions of a block of KV_BLOCK, their keys and then their values. They come in slots
// of KV_SLOT positions (about 2 KB), which it multiplies in runs of KV_RUN. A vector is bf16 or int8 codes
// and their fp32 scale (vectors.cuh), padded for copies of 16 bytes.
static_assert(KV_BITS == 16 || KV_BITS == 8, "keys and values are bf16 or int8");
constexpr int VECTOR_DATA = KV_BITS == 16 ? HEAD_DIM * 2 : HEAD_DIM + 4;  // bytes without the padding
constexpr int VECTOR_BYTES = round_up(VECTOR_DATA, 16);
constexpr int KV_TILE = KV_BLOCK / WARPS;
constexpr int KV_SLOT = VECTOR_BYTES <= 144 ? 16 : (VECTOR_BYTES <= 288 ? 8 : 4);
constexpr int KV_RUN = min_of(8, KV_SLOT);
constexpr int KV_SLOT_BYTES = KV_SLOT * VECTOR_BYTES;
constexpr int TILE_RUNS = KV_TILE / KV_RUN;
constexpr int HEAD_DIM_PAD = round_up(HEAD_DIM, 32);
constexpr int HEAD_DIM_TILES = ceil_div(HEAD_DIM, TILE_ROWS);
constexpr int MAX_SPLITS = ceil_div(MAX_SEQ_LEN, KV_BLOCK);
constexpr int MERGE_RUN = 16;  // the canonical order of merging: runs of 16 splits, by their absolute number
constexpr int ITEM_HEADS = min_of(HEADS_PER_KV, 8);  // query heads of one item of attention
constexpr int HEAD_GROUPS = ceil_div(HEADS_PER_KV, ITEM_HEADS);
constexpr int ITEM_GROUPS = NUM_KV_HEADS * HEAD_GROUPS;
static_assert(KV_TILE == 16, "a warp's positions are the columns of whole runs");

// One row of a pass. The rows of one slot stand together, at ascending consecutive positions.
struct Row {
    int token;  // or AWAITED, in the only row of a pass
    int position;
    int slot;
};

// The host's memory, written only when something is wrong: the last three words with the pass number.
struct Status {
    uint32_t stage;  // of a wait that gave up: 8 * layer + stage (see Stage)
    uint32_t block;
    uint32_t unused;      // the first four are written as one
    uint32_t gave_up;     // a wait outlasted spin_limit_ns
    uint32_t non_finite;  // a logit is NaN or infinite
    uint32_t no_token;    // the awaited token did not come within token_limit_ns
};

// A pass may be launched before its token is known. The mail that it waits for is one 64-bit word: the number
// of the pass below, this above. The pass before has drawn the token and left it, or the host sends it.
constexpr int AWAITED = -1;
constexpr uint32_t MAIL_APPEND = 1u << 31;  // the token joins the queried ids
constexpr uint32_t MAIL_TOKEN = MAIL_APPEND - 1;
constexpr uint32_t MAIL_LEAVE = MAIL_TOKEN;  // instead of a token: nobody wants the pass any more

constexpr int LISTED = 8;         // candidates of a block
constexpr int MOST_LISTED = 256;  // of the grid, which the host gets
constexpr int MAX_BLOCKS = 192;   // of a grid: there is room for so many lists
// Of a row: a header, the queried tokens, the candidates (see candidates.cuh).
constexpr int RESULT_PACKETS = 1 + MAX_QUERIED + MOST_LISTED;

constexpr int NO_DRAW = -1;
constexpr int MAX_ENDS = 4;

// How the host is going to draw the token of the wanted row, for which nothing is queried: see survivors()
// and draw() in ffmini/sampler.py.
struct Draw {
    float uniform;  // in [0, 1]: 1 where less than that rounds to it
    float top_p, min_p;
    int top_k;           // 0: no limit; 1 if decoding is greedy; NO_DRAW: the host alone can tell
    int ends[MAX_ENDS];  // tokens behind which nobody wants a pass, or -1
};

// What every kernel is told of the model: the first part of its one argument.
struct ModelArgs {
    const uint8_t* layers;         // packed [NUM_LAYERS][LAYER_BYTES]
    const uint8_t* lm_head;        // packed [LM_HEAD_BYTES]
    const uint16_t* embed_tokens;  // bf16 [VOCAB_SIZE][HIDDEN_SIZE]; null if tied
    const float* vectors;          // [NUM_LAYERS][VECTORS_SIZE]: norms and biases
    const float* norm;             // [HIDDEN_SIZE]
    const float* rope_cos;         // [MAX_SEQ_LEN][HEAD_DIM / 2]
    const float* rope_sin;         // [MAX_SEQ_LEN][HEAD_DIM / 2]
    uint8_t* key_cache;            // [NUM_LAYERS][num_slots][NUM_KV_HEADS][MAX_SEQ_LEN][VECTOR_BYTES],
    uint8_t* value_cache;          // the same; see vectors.cuh
    Status* status;                // the host's memory
    uint32_t* gave_up;             // the pass that some block has given up: all blocks leave it
    uint64_t spin_limit_ns;
    uint32_t pass;  // 1 .. 2^32 / (NUM_LAYERS + 1), a new one for each launch
    int num_slots;
};

// The argument of a pass; ffmini/kernel.py holds the same struct as a NumPy dtype, a test compares them.
struct PassArgs : ModelArgs {
    uint4* exchange;          // [EXCHANGE_PACKETS + blocks * BLOCK_PACKETS], zeroed once; see exchange.cuh
    float* logits;            // [ROWS][VOCAB_SIZE]
    const float* residual;    // [ROWS][RESIDUAL_SIZE] after the last layer: only the lm_head is left; or null
    int* queried_ids;         // [MAX_ROWS][MAX_QUERIED]: see queried_list() in candidates.cuh
    uint4* candidates;        // the host's memory, [ROWS][RESULT_PACKETS]; null: not wanted
    const uint64_t* mailbox;  // the host's memory; see AWAITED
    uint64_t* drawn;          // [2]: mail from pass to pass, at the last bit of its reader's number
    uint64_t* stage_times;    // [NUM_LAYERS + 1][MARKS][blocks] in nanoseconds; only if STAGE_TIMES
    uint64_t token_limit_ns;
    int num_rows;          // 1 .. ROWS
    uint32_t logits_rows;  // bit r: row r's logits are wanted; 0 leaves the lm_head out
    uint32_t append;       // bit r: row r's token joins its queried ids; the mail says it of an awaited one
    Draw draw;
    int num_queried[MAX_ROWS];
    float inverse_temperature[MAX_ROWS];  // of the candidates' sums
    Row rows[MAX_ROWS];
};

__device__ __forceinline__ int num_rows(const PassArgs& args) {
    return ROWS == 1 ? 1 : args.num_rows;
}

// NUM_LAYERS: none is left.
__device__ __forceinline__ int first_layer(const PassArgs& args) {
    return args.residual == nullptr ? 0 : NUM_LAYERS;
}

// The row of element `index` of [rows][size].
__device__ __forceinline__ int row_of(int index, int size) {
    return ROWS == 1 ? 0 : index / size;
}
