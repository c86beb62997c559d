// Attention of a chunk: many rows of one sequence, whose keys and values the cache holds already. A block
// takes some rows of one KV head, each of its warps a few of their queries: the same products in the same
// order as attention.cuh, with more than one row's heads in an operand. Keys and values come in runs of
// positions through a ring in shared memory, which all warps read.
//
// Scores are not kept: keys come once for their maxima, those of blocks of positions and of all, and once
// more for the probabilities.
#pragma once

#include "arithmetic.cuh"
#include "items.cuh"
#include "vectors.cuh"

constexpr int ATTENTION_WARPS = 8;
constexpr int ATTENTION_THREADS = 32 * ATTENTION_WARPS;
// Of a warp; registers and shared memory hold no more.
constexpr int QUERIES = HEAD_DIM <= 128 && SHARED_LIMIT > 128 * 1024 ? 16 : 8;
constexpr int QUERY_SETS = QUERIES / 8;
constexpr int UNIT_HEADS = min_of(HEADS_PER_KV, QUERIES);
constexpr int WARP_ROWS = QUERIES / UNIT_HEADS;
constexpr int UNIT_ROWS = WARP_ROWS * ATTENTION_WARPS;
constexpr int UNIT_GROUPS = ceil_div(HEADS_PER_KV, UNIT_HEADS);  // units that share a KV head and rows
constexpr int LANE_VALUES = HEAD_DIM_TILES * QUERY_SETS * 4;     // of a warp's output

// What a warp keeps in shared memory: partial softmaxes that have been merged, as merge_splits() does it.
struct MergedSoftmax {
    float sum[QUERIES][32];      // of probabilities, in the place of the lane that would add them
    float run[LANE_VALUES][32];  // the output of the run under way, [value][lane]
};

// Outputs of finished runs lie in the scratch memory, if there can be several: [unit][warp][value][lane].
constexpr bool MANY_RUNS = MAX_SPLITS > MERGE_RUN;
constexpr uint64_t output_bytes(int rows) {
    const int units = NUM_KV_HEADS * UNIT_GROUPS * ceil_div(rows, UNIT_ROWS);
    return MANY_RUNS ? 4ull * units * ATTENTION_WARPS * LANE_VALUES * 32 : 0;
}

// A piece of the ring: so many positions' keys or values. One piece of each is read at a time.
constexpr int VECTORS_MEMORY = SHARED_LIMIT - 256 - ATTENTION_WARPS * static_cast<int>(sizeof(MergedSoftmax));
constexpr int vector_places(int positions) {
    return min_of(6, VECTORS_MEMORY / (positions * VECTOR_BYTES));
}
constexpr int PIECE_POSITIONS = vector_places(64) >= 4 ? 64 : (vector_places(32) >= 4 ? 32 : 16);
constexpr int VECTORS_BYTES = PIECE_POSITIONS * VECTOR_BYTES;
constexpr int VECTOR_PLACES = vector_places(PIECE_POSITIONS);
static_assert(VECTOR_PLACES >= 3, "shared memory is too small for keys and values");

// What stands for the position where a vector that stands `in_run` behind the one that begins a run (a tile)
// is rotated: if the rotation comes round in a run, all runs are alike, and the compiler finds the place
// once.
template <int ROTATION, int RUN>
__device__ __forceinline__ int turn_of(int first, int in_run) {
    return ROTATION * RUN % (HEAD_DIM / 8) == 0 ? in_run : first + in_run;
}

struct AttentionMemory {
    alignas(16) uint8_t vectors[VECTOR_PLACES][VECTORS_BYTES];
    MergedSoftmax merged[ATTENTION_WARPS];
};

// The rows of a chunk and where they stand.
struct Sequence {
    const uint16_t* queries;  // bf16 [rows][NUM_HEADS][HEAD_DIM]
    const uint8_t* keys;      // of the layer and slot: [NUM_KV_HEADS][MAX_SEQ_LEN][VECTOR_BYTES]
    const uint8_t* values;
    float* outputs;  // scratch [output_bytes()]
    float* tops;     // scratch [rows][NUM_HEADS][MAX_SPLITS]: maxima of blocks of positions
    int start, rows, window;

    __device__ int row_groups() const { return ceil_div(rows, UNIT_ROWS); }
    __device__ int units() const { return NUM_KV_HEADS * UNIT_GROUPS * row_groups(); }
    __device__ int first_seen(int position) const {
        return window > 0 ? max_of(0, position - window + 1) : 0;
    }
};

// The pieces that a unit's warps read, in their order: all keys; then each piece of keys once more, followed
// by its values.
class VectorOrder {
  public:
    __device__ VectorOrder(int begin, int end)
        : end_(end), first_(begin / PIECE_POSITIONS * PIECE_POSITIONS), at_(first_) {}
    __device__ bool more() const { return at_ < end_; }
    __device__ bool is_value() const { return phase_ == VALUES; }
    __device__ int first() const { return at_; }

    __device__ void advance() {
        if (phase_ == KEYS) {
            phase_ = VALUES;
            return;
        }
        at_ += PIECE_POSITIONS;
        if (phase_ == VALUES) phase_ = KEYS;
        if (phase_ == TOPS && at_ >= end_) at_ = first_, phase_ = KEYS;
    }

  private:
    enum Phase { TOPS, KEYS, VALUES };
    int end_, first_, at_;
    Phase phase_ = TOPS;
};

// The ring that the block's threads fill for themselves: next() gives the pieces in their order.
class VectorRing {
  public:
    __device__ VectorRing(const uint8_t* keys, const uint8_t* values, int begin, int end,
                          AttentionMemory& memory)
        : keys_(keys), values_(values), end_(end), memory_(memory), order_(begin, end) {
        for (int i = 0; i < VECTOR_PLACES - 2; ++i) fetch();
    }

    // The piece after the last one, which may still be read; the place of the one before is filled anew. All
    // threads call it.
    __device__ const uint8_t* next() {
        copy_async_wait<VECTOR_PLACES - 3>();
        sync_threads<ATTENTION_THREADS>();
        fetch();
        const uint8_t* piece = memory_.vectors[head_];
        if (++head_ == VECTOR_PLACES) head_ = 0;
        return piece;
    }

    // Before the memory is used for anything else.
    __device__ void finish() {
        copy_async_wait<0>();
        sync_threads<ATTENTION_THREADS>();
    }

  private:
    __device__ void fetch() {
        if (order_.more()) {
            const uint8_t* source = (order_.is_value() ? values_ : keys_) + order_.first() * VECTOR_BYTES;
            const int bytes = min_of(PIECE_POSITIONS, end_ - order_.first()) * VECTOR_BYTES;
#pragma unroll 1
            for (int at = 16 * threadIdx.x; at < bytes; at += 16 * ATTENTION_THREADS) {
                copy_async_16(memory_.vectors[tail_] + at, source + at);
            }
            order_.advance();
        }
        copy_async_commit();
        if (++tail_ == VECTOR_PLACES) tail_ = 0;
    }

    const uint8_t *keys_, *values_;
    int end_;
    AttentionMemory& memory_;
    VectorOrder order_;
    int head_ = 0, tail_ = 0;
};

// With g = lane / 4 and t = lane % 4 a lane has scores of its warp's queries g and, of more than eight, g
// + 8.
class AttentionUnit {
  public:
    // Those that see most positions have the lowest numbers.
    __device__ AttentionUnit(const Sequence& sequence, int unit, AttentionMemory& memory)
        : sequence_(sequence), unit_(unit), memory_(memory), merged_(memory.merged[threadIdx.x / 32]) {
        const int groups = NUM_KV_HEADS * UNIT_GROUPS, group = unit % groups;
        const int unit_row = (sequence.row_groups() - 1 - unit / groups) * UNIT_ROWS;
        kv_head_ = group / UNIT_GROUPS;
        first_head_ = kv_head_ * HEADS_PER_KV + group % UNIT_GROUPS * UNIT_HEADS;
        first_row_ = unit_row + threadIdx.x / 32 * WARP_ROWS;
        begin_ = sequence.first_seen(sequence.start + unit_row);
        end_ = sequence.start + min_of(unit_row + UNIT_ROWS, sequence.rows);
#pragma unroll
        for (int set = 0; set < QUERY_SETS; ++set) load_query(set);
        for (int query = 0; query < QUERIES; ++query) merged_.sum[query][lane()] = 0.0f;
        for (int i = 0; i < LANE_VALUES; ++i) {
            merged_.run[i][lane()] = 0.0f;
            if (MANY_RUNS) *output(i) = 0.0f;
        }
        __syncwarp();
    }

    // store(row, k, pair) gets each two neighbouring elements of attention's output, rounded to bf16. All of
    // the block's first ATTENTION_THREADS threads call it.
    template <class Store>
    __device__ void run(Store store) {
        const uint64_t head = static_cast<uint64_t>(kv_head_) * MAX_SEQ_LEN * VECTOR_BYTES;
        VectorRing ring(sequence_.keys + head, sequence_.values + head, begin_, end_, memory_);
        const int first_block = begin_ / KV_BLOCK, last_block = (end_ - 1) / KV_BLOCK;
        float top[QUERY_SETS];
#pragma unroll
        for (int set = 0; set < QUERY_SETS; ++set) top[set] = MASKED;
#pragma unroll 1
        for (int block = first_block; block <= last_block; ++block) find_top(ring, block, top);
        __syncwarp();
#pragma unroll 1
        for (int block = first_block; block <= last_block; ++block) {
            const int begin = max_of(begin_, block * KV_BLOCK), end = min_of(end_, (block + 1) * KV_BLOCK);
            float block_top[QUERY_SETS], sum[QUERY_SETS] = {};
#pragma unroll
            for (int set = 0; set < QUERY_SETS; ++set) {
                block_top[set] = exists(8 * set + lane() / 4) ? *kept_top(set, block) : MASKED;
            }
            float out[HEAD_DIM_TILES][QUERY_SETS][4] = {};
#pragma unroll 1
            for (int piece = begin / PIECE_POSITIONS * PIECE_POSITIONS; piece < end;
                 piece += PIECE_POSITIONS) {
                const uint8_t *keys = ring.next(), *values = ring.next();
#pragma unroll 1
                for (int at = 0; at < PIECE_POSITIONS && piece + at < end; at += KV_TILE) {
                    uint32_t p[TILE_RUNS][QUERY_SETS];
                    weigh_keys(keys + at * VECTOR_BYTES, piece + at, block_top, sum, p);
                    weigh_values(values + at * VECTOR_BYTES, piece + at, p, out);
                }
            }
            merge(block, block_top, top, sum, out);
            if (MANY_RUNS && ((block + 1) % MERGE_RUN == 0 || block == last_block)) end_run();
        }
        ring.finish();
        finish(store);
    }

  private:
    static __device__ int lane() { return threadIdx.x % 32; }
    __device__ int row_of_query(int query) const { return first_row_ + query / UNIT_HEADS; }
    __device__ int head_of_query(int query) const { return first_head_ + query % UNIT_HEADS; }
    __device__ bool exists(int query) const {
        return query < WARP_ROWS * UNIT_HEADS && row_of_query(query) < sequence_.rows &&
               head_of_query(query) < (kv_head_ + 1) * HEADS_PER_KV;
    }

    // The lane's part of query 8 set + g, and which positions that sees: none if it does not exist.
    __device__ void load_query(int set) {
        const int query = 8 * set + lane() / 4;
        const bool valid = exists(query);
        const int position = sequence_.start + row_of_query(query);
        first_[set] = sequence_.first_seen(position), last_[set] = valid ? position : -1;
        const uint16_t* vector =
            sequence_.queries +
            (static_cast<uint64_t>(row_of_query(query)) * NUM_HEADS + head_of_query(query)) * HEAD_DIM;
#pragma unroll
        for (int j = 0; j < HEAD_DIM_PAD / 32; ++j) {
            query_[set][j] = valid ? Vectors::load_query(vector, j) : make_uint4(0, 0, 0, 0);
        }
    }

    // score[set][c] = q . k / sqrt(HEAD_DIM) * log2(e) of query 8 set + g and position first + 2t + c, or
    // MASKED. `keys` are those from `first` on.
    __device__ void score_run(const uint8_t* keys, int first, float (&score)[QUERY_SETS][2]) const {
        const int t = lane() % 4, own = lane() / 4 % KV_RUN;
        const int turn = turn_of<Vectors::KEY_ROTATION, KV_RUN>(first, own);
        float dots[2][4] = {};
#pragma unroll
        for (int j = 0; j < HEAD_DIM_PAD / 32; ++j) {
            const uint4 k = Vectors::load_key(keys + own * VECTOR_BYTES, t, j, turn);
            const uint4 upper = QUERY_SETS > 1 ? query_[QUERY_SETS - 1][j] : make_uint4(0, 0, 0, 0);
            const uint32_t low[4] = {query_[0][j].x, upper.x, query_[0][j].y, upper.y};
            const uint32_t high[4] = {query_[0][j].z, upper.z, query_[0][j].w, upper.w};
            mma_16x8x16(dots[0], low, k.x, k.y);
            mma_16x8x16(dots[1], high, k.z, k.w);
        }
        float scales[2];
        Vectors::of_columns(Vectors::key_scale(keys + own * VECTOR_BYTES), scales);
#pragma unroll
        for (int set = 0; set < QUERY_SETS; ++set) {
            for (int c = 0; c < 2; ++c) {
                const int position = first + 2 * t + c;
                const bool visible = 2 * t + c < KV_RUN && position >= first_[set] && position <= last_[set];
                const float dot = dots[0][2 * set + c] + dots[1][2 * set + c];
                score[set][c] = visible ? dot * scales[c] : MASKED;
            }
        }
    }

    // Where the maximum of query 8 set + g in a block of positions is kept, if there is that query.
    __device__ float* kept_top(int set, int block) const {
        const int query = 8 * set + lane() / 4;
        const uint64_t row_head =
            static_cast<uint64_t>(row_of_query(query)) * NUM_HEADS + head_of_query(query);
        return sequence_.tops + row_head * MAX_SPLITS + block;
    }

    // The greatest score in a block of positions, whose keys are the ring's next pieces; `top` rises to it.
    __device__ void find_top(VectorRing& ring, int block, float (&top)[QUERY_SETS]) const {
        const int begin = max_of(begin_, block * KV_BLOCK), end = min_of(end_, (block + 1) * KV_BLOCK);
        float block_top[QUERY_SETS];
#pragma unroll
        for (int set = 0; set < QUERY_SETS; ++set) block_top[set] = MASKED;
#pragma unroll 1
        for (int piece = begin / PIECE_POSITIONS * PIECE_POSITIONS; piece < end; piece += PIECE_POSITIONS) {
            const uint8_t* keys = ring.next();
#pragma unroll 2
            for (int run = 0; run < PIECE_POSITIONS; run += KV_RUN) {
                float score[QUERY_SETS][2];
                score_run(keys + run * VECTOR_BYTES, piece + run, score);
#pragma unroll
                for (int set = 0; set < QUERY_SETS; ++set) {
                    block_top[set] = fmaxf(block_top[set], fmaxf(score[set][0], score[set][1]));
                }
            }
        }
#pragma unroll
        for (int set = 0; set < QUERY_SETS; ++set) {
            block_top[set] = fmaxf(block_top[set], __shfl_xor_sync(0xffffffff, block_top[set], 1));
            block_top[set] = fmaxf(block_top[set], __shfl_xor_sync(0xffffffff, block_top[set], 2));
            if (exists(8 * set + lane() / 4) && lane() % 4 == 0) *kept_top(set, block) = block_top[set];
            top[set] = fmaxf(top[set], block_top[set]);
        }
    }

    // The probabilities of a tile's positions, from `first` on, under the block's maximum, rounded to bf16:
    // p[run][set] is a pair of positions of query 8 set + g. sum[set] grows by the tile's sum.
    __device__ void weigh_keys(const uint8_t* keys, int first, const float (&top)[QUERY_SETS],
                               float (&sum)[QUERY_SETS], uint32_t (&p)[TILE_RUNS][QUERY_SETS]) const {
        float tile_sum[QUERY_SETS] = {};
#pragma unroll
        for (int run = 0; run < TILE_RUNS; ++run) {
            float score[QUERY_SETS][2];
            score_run(keys + run * KV_RUN * VECTOR_BYTES, first + run * KV_RUN, score);
#pragma unroll
            for (int set = 0; set < QUERY_SETS; ++set) {
                const float base = top[set] == MASKED ? 0.0f : top[set];  // the query sees nothing here
                p[run][set] =
                    pack_bf16x2(exp2_approx(score[set][0] - base), exp2_approx(score[set][1] - base));
                tile_sum[set] += __uint_as_float(p[run][set] << 16);
                tile_sum[set] += __uint_as_float(p[run][set] & 0xffff0000);
            }
        }
#pragma unroll
        for (int set = 0; set < QUERY_SETS; ++set) {
            tile_sum[set] += __shfl_xor_sync(0xffffffff, tile_sum[set], 1);
            tile_sum[set] += __shfl_xor_sync(0xffffffff, tile_sum[set], 2);
            sum[set] += tile_sum[set];
        }
    }

    // out[m][set] += v . p of a tile of positions: of tile m of 16 dimensions those of half 0 (elements 0, 1)
    // and half 1 (2, 3), see vectors.cuh, of queries 8 set + 2t and the next.
    __device__ void weigh_values(const uint8_t* values, int first, const uint32_t (&p)[TILE_RUNS][QUERY_SETS],
                                 float (&out)[HEAD_DIM_TILES][QUERY_SETS][4]) const {
        const int t = lane() % 4, half = lane() / 8 % 2, own = lane() % KV_RUN;
        uint32_t seen[TILE_RUNS], weights[TILE_RUNS][QUERY_SETS];
#pragma unroll
        for (int run = 0; run < TILE_RUNS; ++run) {
            const int position = first + run * KV_RUN + 2 * t;
            seen[run] =
                seen_pair(2 * t < KV_RUN && position < end_, 2 * t + 1 < KV_RUN && position + 1 < end_);
            float scales[2];
            Vectors::value_scales(values + (run * KV_RUN + own) * VECTOR_BYTES, scales);
#pragma unroll
            for (int set = 0; set < QUERY_SETS; ++set) {
                weights[run][set] = Vectors::weigh(p[run][set], seen[run], scales);
            }
        }
#pragma unroll
        for (int load = 0; load < VALUE_LOADS; ++load) {
            uint32_t loaded[TILE_RUNS][2];
#pragma unroll
            for (int run = 0; run < TILE_RUNS; ++run) {
                const int in_tile = run * KV_RUN + own;
                const int turn = turn_of<Vectors::VALUE_ROTATION, KV_TILE>(first, in_tile);
                const uint8_t* value = values + in_tile * VECTOR_BYTES;
                load_transposed(loaded[run], Vectors::value_piece(value, 2 * load + half, turn));
            }
#pragma unroll
            for (int tile = 0; tile < Vectors::LOAD_TILES; ++tile) {
                const int m = load * Vectors::LOAD_TILES + tile;
                if (m < HEAD_DIM_TILES) weigh_tile(loaded, tile, seen, weights, out[m]);
            }
        }
    }

    // The same of one tile of 16 dimensions, the tile-th of a load.
    static __device__ void weigh_tile(const uint32_t (&loaded)[TILE_RUNS][2], int tile,
                                      const uint32_t (&seen)[TILE_RUNS],
                                      const uint32_t (&weights)[TILE_RUNS][QUERY_SETS],
                                      float (&out)[QUERY_SETS][4]) {
        uint32_t a[TILE_RUNS][2];
#pragma unroll
        for (int run = 0; run < TILE_RUNS; ++run) Vectors::value_tile(loaded[run], tile, seen[run], a[run]);
#pragma unroll
        for (int set = 0; set < QUERY_SETS; ++set) {
            float tile_out[4] = {};
#pragma unroll
            for (int run = 0; run < TILE_RUNS; ++run) mma_16x8x8(tile_out, a[run], weights[run][set]);
            for (int i = 0; i < 4; ++i) out[set][i] += tile_out[i];
        }
    }

    // Something that lane 4 (2t + which) has of its query: 2t + which of the same set.
    static __device__ float of_column(float x, int which) {
        return __shfl_sync(0xffffffff, x, 4 * (2 * (lane() % 4) + which));
    }

    // Of finished runs the lane's value i.
    __device__ float* output(int i) const {
        const int warp = unit_ * ATTENTION_WARPS + threadIdx.x / 32;
        return sequence_.outputs + (static_cast<uint64_t>(warp) * LANE_VALUES + i) * 32 + lane();
    }

    // As which value the lane's element i of out[m][set] is kept.
    static __device__ int value_index(int m, int set, int i) { return (m * QUERY_SETS + set) * 4 + i; }

    // Adds a block's partial softmax to the run, as merge_splits() does.
    __device__ void merge(int block, const float (&block_top)[QUERY_SETS], const float (&top)[QUERY_SETS],
                          const float (&sum)[QUERY_SETS], const float (&out)[HEAD_DIM_TILES][QUERY_SETS][4]) {
#pragma unroll
        for (int set = 0; set < QUERY_SETS; ++set) {
            const bool sees = block_top[set] != MASKED;
            const float weight = sees ? exp2_approx(block_top[set] - top[set]) : 0.0f;
            const int query = 8 * set + lane() / 4, split = block - first_[set] / KV_BLOCK;
            if (sees && lane() % 4 == 0) {
                float& slot = merged_.sum[query][split % 32];
                slot = fmaf(weight, sum[set], slot);
            }
#pragma unroll
            for (int which = 0; which < 2; ++which) {
                const float factor = of_column(weight, which);
#pragma unroll
                for (int m = 0; m < HEAD_DIM_TILES; ++m) {
                    for (int half = 0; half < 2; ++half) {
                        float& x = merged_.run[value_index(m, set, 2 * half + which)][lane()];
                        x = fmaf(factor, out[m][set][2 * half + which], x);
                    }
                }
            }
        }
    }

    __device__ void end_run() {
        for (int i = 0; i < LANE_VALUES; ++i) {
            *output(i) += merged_.run[i][lane()];
            merged_.run[i][lane()] = 0.0f;
        }
    }

    // One over a query's sum of probabilities, in all lanes.
    __device__ float inverse_sum(int query) const {
        return divide_approx(1.0f, warp_sum(merged_.sum[query][lane()]));
    }

    template <class Store>
    __device__ void finish(Store store) const {
        __syncwarp();
        const int g = lane() / 4, t = lane() % 4;
#pragma unroll 1
        for (int set = 0; set < QUERY_SETS; ++set) {
            float inverse[2] = {};
            for (int query = 0; query < 8; ++query) {
                const float x = inverse_sum(8 * set + query);
                if (query / 2 == t) inverse[query % 2] = x;
            }
            const int query = 8 * set + g;
            for (int m = 0; m < HEAD_DIM_TILES; ++m) {
                uint32_t pairs[2];
                for (int half = 0; half < 2; ++half) {
                    float x[2];
                    for (int which = 0; which < 2; ++which) {
                        const int i = value_index(m, set, 2 * half + which);
                        x[which] = MANY_RUNS ? *output(i) : merged_.run[i][lane()];
                    }
                    pairs[half] = transpose(pack_bf16x2(x[0] * inverse[0], x[1] * inverse[1]));
                }
                Vectors::order_pairs(pairs);
                for (int i = 0; i < 2; ++i) {
                    const int d = 16 * m + Vectors::pair_dimension(i);
                    if (exists(query) && d < HEAD_DIM) {
                        store(row_of_query(query), head_of_query(query) * HEAD_DIM + d, pairs[i]);
                    }
                }
            }
        }
    }

    const Sequence& sequence_;
    const int unit_;
    AttentionMemory& memory_;
    MergedSoftmax& merged_;
    int kv_head_, first_head_, first_row_;
    int begin_, end_;                           // positions that some query of the block sees
    int first_[QUERY_SETS], last_[QUERY_SETS];  // that query 8 set + g sees, both included
    uint4 query_[QUERY_SETS][HEAD_DIM_PAD / 32];
};
