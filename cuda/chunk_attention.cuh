// Attention of a chunk: many rows of one sequence, whose keys and values the cache holds already. A warp
// takes a few queries, all of one KV head, and goes over the positions that they see: the same products in
// the same order as attention.cuh, with more than one row's heads in an operand. Keys and values come
// straight from the L1 and L2, where neighbouring warps find them too.
//
// Scores are not kept: they are computed again for each thing that wants them, the maximum of all, that of a
// block of positions, the probabilities.
#pragma once

#include "arithmetic.cuh"
#include "items.cuh"

// Of a unit; registers and shared memory hold no more.
constexpr int QUERIES = HEAD_DIM <= 128 && SHARED_LIMIT > 128 * 1024 ? 16 : 8;
constexpr int QUERY_SETS = QUERIES / 8;
constexpr int UNIT_HEADS = min_of(HEADS_PER_KV, QUERIES);
constexpr int UNIT_ROWS = QUERIES / UNIT_HEADS;
constexpr int UNIT_GROUPS = ceil_div(HEADS_PER_KV, UNIT_HEADS);  // units that share a KV head and rows
constexpr int VALUE_TILES = HEAD_DIM_PAD / TILE_ROWS;
constexpr int LANE_VALUES = VALUE_TILES * QUERY_SETS * 4;  // of a unit's output

// What a warp keeps in shared memory: partial softmaxes that have been merged, as merge_splits() does it.
struct UnitScratch {
    float sum[QUERIES][32];      // of probabilities, in the place of the lane that would add them
    float run[LANE_VALUES][32];  // the output of the run under way, [value][lane]
    float output[MAX_SPLITS > MERGE_RUN ? LANE_VALUES : 1][32];  // of finished runs; if there can be several
};

// The rows of a chunk and where they stand.
struct Sequence {
    const uint16_t* queries;  // bf16 [rows][NUM_HEADS][HEAD_DIM]
    const uint16_t* keys;     // of the layer and slot: [NUM_KV_HEADS][MAX_SEQ_LEN][HEAD_DIM]
    const uint16_t* values;
    int start, rows, window;

    __device__ int row_groups() const { return ceil_div(rows, UNIT_ROWS); }
    __device__ int units() const { return NUM_KV_HEADS * UNIT_GROUPS * row_groups(); }
};

// With g = lane / 4 and t = lane % 4 a lane has scores of queries g and, of sets of more than eight, g + 8.
class AttentionUnit {
  public:
    // Those that see most positions have the lowest numbers; those of one KV head stand together.
    __device__ AttentionUnit(const Sequence& sequence, int unit, UnitScratch& scratch)
        : sequence_(sequence), scratch_(scratch) {
        const int groups = sequence.row_groups(), group = unit / groups;
        kv_head_ = group / UNIT_GROUPS;
        first_head_ = kv_head_ * HEADS_PER_KV + group % UNIT_GROUPS * UNIT_HEADS;
        first_row_ = (groups - 1 - unit % groups) * UNIT_ROWS;
        const uint64_t head = static_cast<uint64_t>(kv_head_) * MAX_SEQ_LEN * HEAD_DIM;
        keys_ = sequence.keys + head, values_ = sequence.values + head;
        begin_ = first_seen(sequence.start + first_row_);
        end_ = sequence.start + min_of(first_row_ + UNIT_ROWS, sequence.rows);
        for (int set = 0; set < QUERY_SETS; ++set) load_query(set);
        for (int query = 0; query < QUERIES; ++query) scratch.sum[query][lane()] = 0.0f;
        for (int i = 0; i < LANE_VALUES; ++i) {
            scratch.run[i][lane()] = 0.0f;
            if (MAX_SPLITS > MERGE_RUN) scratch.output[i][lane()] = 0.0f;
        }
        __syncwarp();
    }

    // store(row, k, pair) gets each two neighbouring elements of attention's output, rounded to bf16.
    template <class Store>
    __device__ void run(Store store) {
        const int first_block = begin_ / KV_BLOCK, last_block = (end_ - 1) / KV_BLOCK;
        float top[QUERY_SETS];
        if (first_block < last_block) find_top(begin_, end_, top);
        for (int block = first_block; block <= last_block; ++block) {
            const int begin = max_of(begin_, block * KV_BLOCK), end = min_of(end_, (block + 1) * KV_BLOCK);
            float block_top[QUERY_SETS], sum[QUERY_SETS] = {};
            find_top(begin, end, block_top);
            if (first_block == last_block) {
#pragma unroll
                for (int set = 0; set < QUERY_SETS; ++set) top[set] = block_top[set];
            }
            float out[VALUE_TILES][QUERY_SETS][4] = {};
            for (int first = begin / KV_TILE * KV_TILE; first < end; first += KV_TILE) {
                add_tile(first, block_top, sum, out);
            }
            merge(block, block_top, top, sum, out);
            if (MAX_SPLITS > MERGE_RUN && ((block + 1) % MERGE_RUN == 0 || block == last_block)) end_run();
        }
        finish(store);
    }

  private:
    static __device__ int lane() { return threadIdx.x % 32; }
    __device__ int row_of_query(int query) const { return first_row_ + query / UNIT_HEADS; }
    __device__ int head_of_query(int query) const { return first_head_ + query % UNIT_HEADS; }
    __device__ bool exists(int query) const {
        return query < UNIT_ROWS * UNIT_HEADS && row_of_query(query) < sequence_.rows &&
               head_of_query(query) < (kv_head_ + 1) * HEADS_PER_KV;
    }
    __device__ int first_seen(int position) const {
        return sequence_.window > 0 ? max_of(0, position - sequence_.window + 1) : 0;
    }

    // The lane's part of query 8 set + g, and which positions that sees: none if it does not exist.
    __device__ void load_query(int set) {
        const int query = 8 * set + lane() / 4, t = lane() % 4;
        const bool valid = exists(query);
        const int position = sequence_.start + row_of_query(query);
        first_[set] = first_seen(position), last_[set] = valid ? position : -1;
        const uint16_t* vector =
            sequence_.queries +
            (static_cast<uint64_t>(row_of_query(query)) * NUM_HEADS + head_of_query(query)) * HEAD_DIM;
#pragma unroll
        for (int j = 0; j < HEAD_DIM_PAD / 32; ++j) {
            query_[set][j] = make_uint4(0, 0, 0, 0);
            if (valid && 32 * j + 8 * t < HEAD_DIM) {
                query_[set][j] = *reinterpret_cast<const uint4*>(vector + 32 * j + 8 * t);
            }
        }
    }

    // Of a run of positions the lane's 16 bytes of one, dimensions d .. d + 7.
    __device__ uint4 load_vector(const uint16_t* cache, int first, int d, int rotation) const {
        const int position = min_of(first + lane() / 4 % KV_RUN, end_ - 1);
        if (HEAD_DIM % 32 != 0 && d >= HEAD_DIM) return make_uint4(0, 0, 0, 0);
        return *reinterpret_cast<const uint4*>(cache + static_cast<uint64_t>(position) * HEAD_DIM +
                                               rotated(d, position, rotation));
    }

    // score[set][c] = q . k / sqrt(HEAD_DIM) * log2(e) of query 8 set + g and position first + 2t + c, or
    // MASKED.
    __device__ void score_run(int first, float (&score)[QUERY_SETS][2]) const {
        const int t = lane() % 4;
        float dots[2][4] = {};
#pragma unroll
        for (int j = 0; j < HEAD_DIM_PAD / 32; ++j) {
            const uint4 k = load_vector(keys_, first, 32 * j + 8 * t, KEY_ROTATION);
            const uint4 upper = QUERY_SETS > 1 ? query_[QUERY_SETS - 1][j] : make_uint4(0, 0, 0, 0);
            const uint32_t low[4] = {query_[0][j].x, upper.x, query_[0][j].y, upper.y};
            const uint32_t high[4] = {query_[0][j].z, upper.z, query_[0][j].w, upper.w};
            mma_16x8x16(dots[0], low, k.x, k.y);
            mma_16x8x16(dots[1], high, k.z, k.w);
        }
#pragma unroll
        for (int set = 0; set < QUERY_SETS; ++set) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int position = first + 2 * t + c;
                const bool visible = 2 * t + c < KV_RUN && position >= first_[set] && position <= last_[set];
                const float dot = dots[0][2 * set + c] + dots[1][2 * set + c];
                score[set][c] = visible ? dot * SCORE_SCALE : MASKED;
            }
        }
    }

    // The greatest score of positions begin <= p < end, the same in all lanes of a query.
    __device__ void find_top(int begin, int end, float (&top)[QUERY_SETS]) const {
#pragma unroll
        for (int set = 0; set < QUERY_SETS; ++set) top[set] = MASKED;
        for (int first = begin / KV_TILE * KV_TILE; first < end; first += KV_TILE) {
#pragma unroll
            for (int run = 0; run < TILE_RUNS; ++run) {
                float score[QUERY_SETS][2];
                score_run(first + run * KV_RUN, score);
#pragma unroll
                for (int set = 0; set < QUERY_SETS; ++set) {
                    top[set] = fmaxf(top[set], fmaxf(score[set][0], score[set][1]));
                }
            }
        }
#pragma unroll
        for (int set = 0; set < QUERY_SETS; ++set) {
            top[set] = fmaxf(top[set], __shfl_xor_sync(0xffffffff, top[set], 1));
            top[set] = fmaxf(top[set], __shfl_xor_sync(0xffffffff, top[set], 2));
        }
    }

    // Adds what a tile of positions, from `first` on, has under the block's maximum: to sum[set] of query 8
    // set + g, and to out[m][set], dimensions value_dim(m, .) of queries 8 set + 2t and the next.
    __device__ void add_tile(int first, const float (&top)[QUERY_SETS], float (&sum)[QUERY_SETS],
                             float (&out)[VALUE_TILES][QUERY_SETS][4]) const {
        uint32_t p[TILE_RUNS][QUERY_SETS];
        float tile_sum[QUERY_SETS] = {};
#pragma unroll
        for (int run = 0; run < TILE_RUNS; ++run) {
            float score[QUERY_SETS][2];
            score_run(first + run * KV_RUN, score);
#pragma unroll
            for (int set = 0; set < QUERY_SETS; ++set) {
                const float base = top[set] == MASKED ? 0.0f : top[set];  // of a query that sees nothing here
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
#pragma unroll
        for (int j = 0; j < HEAD_DIM_PAD / 32; ++j) {
            uint32_t values[TILE_RUNS][4];
#pragma unroll
            for (int run = 0; run < TILE_RUNS; ++run) load_values(first + run * KV_RUN, j, values[run]);
#pragma unroll
            for (int u = 0; u < 2; ++u) {
#pragma unroll
                for (int set = 0; set < QUERY_SETS; ++set) {
                    float tile_out[4] = {};
#pragma unroll
                    for (int run = 0; run < TILE_RUNS; ++run) {
                        const uint32_t a[2] = {values[run][2 * u], values[run][2 * u + 1]};
                        mma_16x8x8(tile_out, a, p[run][set]);
                    }
#pragma unroll
                    for (int i = 0; i < 4; ++i) out[2 * j + u][set][i] += tile_out[i];
                }
            }
        }
    }

    // Of a run's values operands with dimensions as rows: in element i row g is dimension 32 j + g / 2 * 8 +
    // 2 i
    // + g % 2.
    __device__ void load_values(int first, int j, uint32_t (&a)[4]) const {
        const int t = lane() % 4, position = first + 2 * t;
        // What no query sees may be anything, and 0 times anything is not 0.
        uint32_t mask = 0;
        if (2 * t < KV_RUN && position < end_) mask |= 0xffff;
        if (2 * t + 1 < KV_RUN && position + 1 < end_) mask |= 0xffff0000;
        const uint4 v = load_vector(values_, first, 32 * j + 8 * t, VALUE_ROTATION);
        a[0] = transpose(v.x) & mask, a[1] = transpose(v.y) & mask;
        a[2] = transpose(v.z) & mask, a[3] = transpose(v.w) & mask;
    }

    // Of the scores of query 8 set + 2t + which something that lane 4 (2t + which) has.
    static __device__ float of_column(float x, int which) {
        return __shfl_sync(0xffffffff, x, 4 * (2 * (lane() % 4) + which));
    }

    // Adds a block's partial softmax to the run, as merge_splits() does.
    __device__ void merge(int block, const float (&block_top)[QUERY_SETS], const float (&top)[QUERY_SETS],
                          const float (&sum)[QUERY_SETS], const float (&out)[VALUE_TILES][QUERY_SETS][4]) {
#pragma unroll
        for (int set = 0; set < QUERY_SETS; ++set) {
            const bool sees = block_top[set] != MASKED;
            const float weight = sees ? exp2_approx(block_top[set] - top[set]) : 0.0f;
            const int query = 8 * set + lane() / 4, split = block - first_[set] / KV_BLOCK;
            if (sees && lane() % 4 == 0) {
                float& slot = scratch_.sum[query][split % 32];
                slot = fmaf(weight, sum[set], slot);
            }
#pragma unroll
            for (int which = 0; which < 2; ++which) {
                const float factor = of_column(weight, which);
#pragma unroll
                for (int m = 0; m < VALUE_TILES; ++m) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        float& x = scratch_.run[value_index(m, set, 2 * half + which)][lane()];
                        x = fmaf(factor, out[m][set][2 * half + which], x);
                    }
                }
            }
        }
    }

    __device__ void end_run() {
        for (int i = 0; i < LANE_VALUES; ++i) {
            scratch_.output[i][lane()] += scratch_.run[i][lane()];
            scratch_.run[i][lane()] = 0.0f;
        }
    }

    // Where the lane's element i of out[m][set] is kept.
    static __device__ int value_index(int m, int set, int i) { return (m * QUERY_SETS + set) * 4 + i; }

    // One over query's sum of probabilities, in all lanes.
    __device__ float inverse_sum(int query) const {
        const float sum = warp_sum(scratch_.sum[query][lane()]);
        const int position = sequence_.start + row_of_query(query);
        const bool whole = first_seen(position) / KV_BLOCK == position / KV_BLOCK;
        return whole ? divide_approx(1.0f, sum) : 1.0f / sum;
    }

    template <class Store>
    __device__ void finish(Store store) const {
        __syncwarp();
        const int g = lane() / 4, t = lane() % 4;
#pragma unroll
        for (int set = 0; set < QUERY_SETS; ++set) {
            float inverse[2] = {};
            for (int query = 0; query < 8; ++query) {
                const float x = inverse_sum(8 * set + query);
                if (query / 2 == t) inverse[query % 2] = x;
            }
            const int query = 8 * set + g;
#pragma unroll
            for (int m = 0; m < VALUE_TILES; ++m) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float x[2];
#pragma unroll
                    for (int which = 0; which < 2; ++which) {
                        const int i = value_index(m, set, 2 * half + which);
                        x[which] =
                            MAX_SPLITS > MERGE_RUN ? scratch_.output[i][lane()] : scratch_.run[i][lane()];
                    }
                    const uint32_t pair = transpose(pack_bf16x2(x[0] * inverse[0], x[1] * inverse[1]));
                    const int d = m / 2 * 32 + 8 * t + 2 * (m % 2 * 2 + half);
                    if (exists(query) && (HEAD_DIM % 32 == 0 || d < HEAD_DIM)) {
                        store(row_of_query(query), head_of_query(query) * HEAD_DIM + d, pair);
                    }
                }
            }
        }
    }

    const Sequence& sequence_;
    UnitScratch& scratch_;
    const uint16_t *keys_, *values_;
    int kv_head_, first_head_, first_row_;
    int begin_, end_;                           // positions that some query sees
    int first_[QUERY_SETS], last_[QUERY_SETS];  // that query 8 set + g sees, both included
    uint4 query_[QUERY_SETS][HEAD_DIM_PAD / 32];
};
