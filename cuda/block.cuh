// What a thread knows of its block: its place, the shared memory and the pass's arguments.
#pragma once

#include "arithmetic.cuh"
#include "config.cuh"
#include "stream.cuh"

// ---- segments of a warp's own ----
// Where a warp's units are of few segments, the same in every tile, it receives these itself and waits for no
// other warp: one for each whole turn of WARPS segments and one of the rest, if there is any, which other
// warps may have too. Each lies in a place of its own. Not if much would be received twice, of bf16 only one
// row. (A warp's `turn`: see Matrix and UnitPlace.)
template <class M>
struct OwnSegments {
    static constexpr int WHOLE = M::HELD_SEGMENTS / WARPS, REST = M::HELD_SEGMENTS % WARPS;
    static constexpr int PERIOD =
        REST > 0 && WARPS % REST == 0 ? REST : WARPS;  // of the rest, over the warps
    static constexpr bool SAME_IN_TILES = REST == 0 || PERIOD == REST || OWN_TILES == 1;
    static constexpr int RECEIVED = WHOLE * WARPS + min_of(OWN_TILES * REST, WARPS);
    // Of those that add to the residual OWN_TILES are a block's, at most.
    static constexpr bool FEW = M::ADDS && SAME_IN_TILES && RECEIVED * 4 <= M::HELD_SEGMENTS * 5;
    static constexpr bool ONE = M::HELD_SEGMENTS == WARPS;
    static constexpr bool EXIST = !M::SPLIT && SEGMENT % M::RUN == 0 &&
                                  (ROWS == 1 ? ONE || FEW : ONE && INTEGERS && MAX_ROWS % ROWS == 0);
    static constexpr int MOST = EXIST ? WHOLE + (REST > 0) : 0;

    static __device__ int segment(int turn, int i) { return i * WARPS + (i < WHOLE ? turn : turn % PERIOD); }
    static __device__ int place(int turn, int i) { return i * WARPS + turn; }

    // What the warp has: one segment of each row, or several of the one row.
    template <class Block>
    static __device__ int pieces(const Block& block) {
        if (ROWS > 1) return num_rows(block.args);
        return WHOLE + (M::turn(block.warp()) < OWN_TILES * REST);
    }
};

template <class M>
constexpr bool OWN_INPUT = OwnSegments<M>::EXIST;
constexpr bool ANY_OWN_INPUT = OWN_INPUT<QkvProj> || OWN_INPUT<OProj> || OWN_INPUT<GateUpProj> ||
                               OWN_INPUT<DownProj> || OWN_INPUT<LmHead>;

template <class M>
constexpr int HELD_ELEMENTS = OWN_INPUT<M> ? OwnSegments<M>::MOST * WARPS * SEGMENT : M::HELD_K;
constexpr int MAX_K =  // that activations have room for
    max_of(max_of(HELD_ELEMENTS<QkvProj>, HELD_ELEMENTS<OProj>),
           max_of(max_of(HELD_ELEMENTS<GateUpProj>, HELD_ELEMENTS<DownProj>), HELD_ELEMENTS<LmHead>));
constexpr int MAX_SEGMENTS = ceil_div(MAX_K, SEGMENT);
// bf16 elements. Rows lie 64 bytes off a multiple of 128, so that two rows' 64-byte pieces, which a quarter
// warp reads at once, fall into different banks; integers take whole segments (activations.cuh).
constexpr int ACTIVATION_STRIDE = INTEGERS ? MAX_SEGMENTS * SEGMENT : round_up(MAX_K, 64) + 32;
constexpr int ACTIVATION_BYTES = ROWS * ACTIVATION_STRIDE * 2;

// ---- what activations that are integers are worth; behind them ----
constexpr int MAX_GROUPS = WEIGHT_BITS == 4 ? MAX_SEGMENTS * (SEGMENT / GROUP_SIZE) : 1;  // of int4's scales
// Odd, so that four rows' lie in different banks.
constexpr int SEGMENT_STRIDE = MAX_SEGMENTS | 1, GROUP_STRIDE = MAX_GROUPS | 1;

struct ActivationScales {
    float segment[ROWS * SEGMENT_STRIDE];  // [row][segment]: what one is worth
    float group_sum[ROWS * GROUP_STRIDE];  // [row][group of int4's scales]: their sum, for the zeros
};

// ---- attention's scratch, which lies over the activations: they are dead while it is used ----
// A query's pairs of bf16 and as much between them, see query_place(). Rows lie 16 bytes off a multiple of
// 128: two rows' pieces, which a quarter warp reads at once, fall into different banks.
constexpr int QUERY_STRIDE = 2 * HEAD_DIM_PAD + 8;
constexpr int TILE_HEADS = 8;  // columns of an mma
// Tiles of 16 dimensions whose sums over positions are in shared memory at a time.
constexpr int SWEEP_TILES =
    min_of(HEAD_DIM_TILES, max_of(1, (SHARED_LIMIT > 128 * 1024 ? 512 : 256) / (ITEM_HEADS * TILE_ROWS)));
constexpr int SWEEP_DIMS = SWEEP_TILES * TILE_ROWS;

// Pairs of floats: of a warp's share of an item's output what two heads' takes, so that the lanes of two
// pairs of heads meet different banks, and all of it. Before, a vector lies there and the weights of its
// norm.
constexpr int HEADS_SHARE = SWEEP_DIMS + 8;
constexpr int SHARE_PAIRS = max_of(ceil_div(ITEM_HEADS, 2) * HEADS_SHARE, HEAD_DIM);

struct AttentionScratch {
    alignas(16) uint16_t query_bf16[ITEM_HEADS * QUERY_STRIDE];
    alignas(16) uint8_t key_vector[ROWS * VECTOR_BYTES];    // as in the cache
    alignas(16) uint8_t value_vector[ROWS * VECTOR_BYTES];  // the same
    alignas(16) float tile_max[TILE_HEADS * WARPS];         // [head][tile of positions]
    alignas(16) float tile_sum[TILE_HEADS * WARPS];         // the same
    alignas(16) float2 share[WARPS * SHARE_PAIRS];          // [warp][pair of heads][dimension]
    float out[round_up(ITEM_HEADS, 2) * HEAD_DIM];
    float max[ITEM_HEADS];
    float sum[round_up(ITEM_HEADS, 2)];
};

constexpr int MAX_RUNS = ceil_div(MAX_SPLITS, MERGE_RUN) + 1;

struct MergeScratch {
    float max[MAX_SPLITS];
    float sum[MAX_SPLITS];
    float run[MAX_RUNS * HEAD_DIM];  // [run][dimension]
    float out[HEAD_DIM];
    float total;  // the splits' sums together
};

// ---- candidates: what warps make of their shares of the block's logits, over the activations too ----
struct WarpCandidates {
    uint64_t entry[LISTED];  // see candidates.cuh
    float sum;
};

constexpr int BUCKETS = THREADS;  // of entries with logits that are close to each other

// The whole grid's lists of one row, in the block that merges them.
struct GatheredCandidates {
    uint64_t entry[MAX_BLOCKS * LISTED];  // as they came; then the exact ones, by their buckets
    uint64_t sorted[MOST_LISTED];
    uint64_t first[WARPS];  // of each warp's share of the packets: the first entry,
    uint64_t bound[WARPS];  // the first of those that end a list
    float listed[WARPS];    // how many there are,
    float total[WARPS];     // and their blocks' sums
    float sum[MAX_BLOCKS];
    uint32_t held[BUCKETS];   // by each bucket: exact entries
    uint32_t begin[BUCKETS];  // where they begin
    uint32_t in_warp[WARPS];  // exact entries in the buckets of each warp's threads
    uint32_t count;           // in all
};

struct CandidateScratch {
    WarpCandidates of[ROWS][WARPS];
    GatheredCandidates gathered;
};

#if BULK_COPIES
using RingState = BulkState;
template <int SLOTS>
using RingOf = BulkRing<SLOTS>;
#else
using RingState = CopyState;
template <int SLOTS>
using RingOf = CopyRing<SLOTS>;
#endif

constexpr int MARK_WORDS = ceil_div(OWN_HEAD_TILES * TILE_ROWS, 32);  // a bit for each token of the own tiles

constexpr int SCRATCH_BYTES =
    max_of(max_of(ACTIVATION_BYTES + (INTEGERS ? static_cast<int>(sizeof(ActivationScales)) : 0),
                  static_cast<int>(sizeof(CandidateScratch))),
           max_of(static_cast<int>(sizeof(AttentionScratch)), static_cast<int>(sizeof(MergeScratch))));

// ---- rounds: units multiplied between two additions ----
constexpr int UNIT_SUMS = ROWS * TILE_ROWS;

// Integers whose units are of the same segment for a warp: it has the segment's input in registers, and the
// sums of two rounds take the place of the activations.
template <class M>
constexpr bool SAME_SEGMENT =
    INTEGERS && !M::SPLIT && WARPS % M::HELD_SEGMENTS == 0 && (M::HELD_SEGMENTS == WARPS || !OWN_INPUT<M>);

// If the segment is a warp's own, the warp's sums lie where its activations were and fill that place: those
// of OWN_TURNS units in each round.
template <class M>
constexpr bool OWN_SUMS = SAME_SEGMENT<M> && OWN_INPUT<M>;
constexpr int OWN_TURNS = 4;
static_assert(2 * OWN_TURNS * UNIT_SUMS * sizeof(float) == ROWS * SEGMENT * sizeof(uint16_t),
              "the sums of two rounds do not fill the place of the activations");

// Rounds of the others, whose sums lie in SharedTail::part: longer ones pay unless all of them are of parts,
// which are short.
template <class M>
constexpr bool WANTS_LONG_ROUNDS = !M::SPLIT && !SAME_SEGMENT<M>;
constexpr bool LONG_ROUNDS =
    SHARED_LIMIT > 200 * 1024 &&
    (WANTS_LONG_ROUNDS<QkvProj> || WANTS_LONG_ROUNDS<OProj> || WANTS_LONG_ROUNDS<GateUpProj> ||
     WANTS_LONG_ROUNDS<DownProj> || WANTS_LONG_ROUNDS<LmHead>);
constexpr int ROUND_UNITS = WARPS * max_of(LONG_ROUNDS ? 2 : 1, 4 / ROWS);

// Tiles after which all warps have had equally many units of a rest of segments, see UnitPlace, or all tiles:
// a round where that is not too long.
template <class M>
constexpr int FAIR_TILES = min_of(OWN_TILES, WARPS / OwnSegments<M>::PERIOD);
template <class M>
constexpr bool FAIR_ROUNDS = OWN_INPUT<M> && OwnSegments<M>::WHOLE > 0 && OwnSegments<M>::REST > 0 &&
                             M::HELD_SEGMENTS* FAIR_TILES<M> <= 8 * WARPS;

// Of whole tiles, unless that makes the round much shorter. (Rounds of more than 64 are slower: packets go
// late.)
constexpr int SCRATCH_UNITS = SCRATCH_BYTES / 4 / UNIT_SUMS;
template <class M>
constexpr int ROUND =
    OWN_SUMS<M>                                  ? OWN_TURNS * WARPS
    : SAME_SEGMENT<M>                            ? min_of(4 * WARPS, SCRATCH_UNITS / 2 / WARPS * WARPS)
    : FAIR_ROUNDS<M>                             ? FAIR_TILES<M> * M::HELD_SEGMENTS
    : ROUND_UNITS % M::HELD_SEGMENTS < WARPS / 2 ? ROUND_UNITS / M::HELD_SEGMENTS * M::HELD_SEGMENTS
                                                 : ROUND_UNITS;
static_assert(SCRATCH_UNITS >= 2 * WARPS, "two rounds have no place among the activations");

// Whether tiles end where rounds do and parts are of the same length: nothing is carried on then.
template <class M>
constexpr bool EVEN_ROUNDS = M::SEGMENTS == M::PARTS * M::IN_PART && ROUND<M> % M::HELD_SEGMENTS == 0;
constexpr bool CARRIES = !(EVEN_ROUNDS<QkvProj> && EVEN_ROUNDS<OProj> && EVEN_ROUNDS<GateUpProj> &&
                           EVEN_ROUNDS<DownProj> && EVEN_ROUNDS<LmHead>);

// Two rounds, or the only one.
template <class M>
constexpr int FAIR_UNITS = FAIR_ROUNDS<M> ? ROUND<M> * (FAIR_TILES<M> < OWN_TILES ? 2 : 1) : 0;
constexpr int PART_SUMS =
    max_of(2 * ROUND_UNITS, max_of(FAIR_UNITS<OProj>, FAIR_UNITS<DownProj>)) * UNIT_SUMS;

// The sums of squares lie among the sums of units if these are never alive together: those of matrices with a
// norm are elsewhere, and add_parts() has a barrier between the last of the others and the next squares.
constexpr int SQUARES = ROWS * HIDDEN_TILES;
constexpr bool SQUARES_APART = !(SAME_SEGMENT<QkvProj> && SAME_SEGMENT<GateUpProj> && SAME_SEGMENT<LmHead> &&
                                 OProj::SPLIT && DownProj::SPLIT && SQUARES <= PART_SUMS);

struct SharedTail {
    Partition partition[NUM_STAGES];
    int residual_tiles;                            // of the residual stream
    alignas(16) float part[PART_SUMS];             // [parity of the round][unit][row][output]
    float carry[CARRIES ? 2 * 2 * UNIT_SUMS : 1];  // [parity][the part's sum, what is before it][row][output]
    float squares_apart[SQUARES_APART ? SQUARES : 1];
    float residual[OWN_TILES * ROWS * TILE_ROWS];  // [own tile][row][output of the tile]
    float next_norm[OWN_TILES * TILE_ROWS];  // of the norm that comes next: [own tile][output of the tile]
    float norm_scale[ROWS];                  // 1 / root mean square
    float rope_cos[ROWS * (HEAD_DIM / 2)];   // at the rows' positions
    float rope_sin[ROWS * (HEAD_DIM / 2)];
    uint32_t mail;                        // of a pass whose token was awaited
    uint32_t queried[ROWS * MARK_WORDS];  // which tokens each row is asked for
    RingState ring;

    // Of the residual stream's tiles: sums of squares, [row][tile].
    __device__ float* tile_squares() { return SQUARES_APART ? squares_apart : part; }
};

constexpr int FIXED_BYTES =
    round_up(SCRATCH_BYTES, 128) + round_up(static_cast<int>(sizeof(SharedTail)), 128);
constexpr int RING_SLOTS = min_of(MAX_RING_SLOTS, (SHARED_LIMIT - FIXED_BYTES) / (WARPS * SLOT_CAPACITY));
static_assert(RING_SLOTS >= 1, "shared memory is too small for this model at this number of rows");
constexpr int SHARED_BYTES = FIXED_BYTES + WARPS * RING_SLOTS * SLOT_CAPACITY;

struct Block {
    const PassArgs& args;
    uint8_t* memory;
    int thread;
    RingOf<RING_SLOTS> stream;

    __device__ Block(const PassArgs& pass_args, uint8_t* bytes)
        : args(pass_args),
          memory(opaque_shared(bytes)),
          stream(pass_args, tail(memory)->ring, memory + FIXED_BYTES) {
        locate();
    }

    static __device__ SharedTail* tail(uint8_t* memory) {
        return reinterpret_cast<SharedTail*>(memory + round_up(SCRATCH_BYTES, 128));
    }
    __device__ SharedTail* shared() const { return tail(memory); }
    // bf16 [ROWS][ACTIVATION_STRIDE], or integers in their place.
    __device__ uint16_t* activations() const { return reinterpret_cast<uint16_t*>(memory); }
    __device__ ActivationScales* scales() const {
        return reinterpret_cast<ActivationScales*>(memory + ACTIVATION_BYTES);
    }
    __device__ AttentionScratch* attention() const { return reinterpret_cast<AttentionScratch*>(memory); }
    __device__ MergeScratch* merge() const { return reinterpret_cast<MergeScratch*>(memory); }
    __device__ CandidateScratch* candidates() const { return reinterpret_cast<CandidateScratch*>(memory); }

    __device__ int own_tiles(Stage stage) const { return shared()->partition[stage].tiles(); }
    __device__ int residual_tiles() const { return shared()->residual_tiles; }
    __device__ int warp() const { return thread / 32; }
    __device__ int lane() const { return thread % 32; }

    // Called where registers are short: places that depend on the thread are computed anew, not kept.
    __device__ void locate() { thread = opaque(threadIdx.x) & 1023; }  // not negative: divisions are shifts
};

// What must stand in shared memory before anything else. All threads of the block call it and may read it
// when it returns.
__device__ __forceinline__ void prepare_shared(const PassArgs& args, uint8_t* memory) {
    SharedTail& tail = *Block::tail(memory);
    if (threadIdx.x < NUM_STAGES) {
        tail.partition[threadIdx.x].start(SHAPES[threadIdx.x]);
    }
    if (threadIdx.x == NUM_STAGES) tail.residual_tiles = own_share(HIDDEN_TILES);
    for (int entry = threadIdx.x; entry < ItemTable::ENTRIES; entry += BLOCK_THREADS) {
        tail.ring.items.start(args, entry);
    }
#if BULK_COPIES
    if (threadIdx.x == THREADS - 1) tail.ring.initialize();  // thread 0 has begun with the items
#endif
    __syncthreads();
}

// Calls body(tile, row, valid) for the rows of `tiles` tiles, in half warps that all warps share out. Both
// halves of a warp call it together, as shuffles want: one that has nothing to do, or stands for a row that
// the pass does not have, gets another's once more and is not `valid`. (The pass's own number of rows would
// have to be divided by.)
template <class Body>
__device__ __forceinline__ void for_rows_of_tiles(const Block& block, int tiles, Body body) {
    const int jobs = tiles * ROWS, last_row = num_rows(block.args) - 1;
    for (int first = 2 * block.warp(); first < jobs; first += 2 * WARPS) {
        const int own = first + block.lane() / 16, job = min_of(own, jobs - 1), row = job % ROWS;
        body(job / ROWS, min_of(row, last_row), own < jobs && row <= last_row);
    }
}

// When a thread of each block passed a place, for tools/stages.py: a build of its own.
enum Mark {
    MARK_QKV_IN,
    MARK_QKV,
    MARK_ATTENTION_IN,
    MARK_ATTENTION,
    MARK_O_IN,
    MARK_O,
    MARK_GATE_UP_IN,
    MARK_GATE_UP,
    MARK_DOWN_IN,
    MARK_DOWN,
    MARKS
};

__device__ __forceinline__ void mark(const Block& block, int layer, Mark mark) {
#if STAGE_TIMES
    if (block.thread == 0) {
        block.args.stage_times[(layer * MARKS + mark) * gridDim.x + blockIdx.x] = global_timer_ns();
    }
#endif
}
