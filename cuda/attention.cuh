// Attention of one pass, item by item (items.cuh). A row sees the cache as earlier passes left it, which
// comes through the stream, and the pass's own rows from their packets, rounded as the cache holds them. Each
// warp takes 16 positions: scores = q . k by mma with heads as rows, then out = v . p with dimensions as
// rows.
#pragma once

#include "arithmetic.cuh"
#include "exchange.cuh"
#include "vectors.cuh"

// ---- an item's vectors ----

// Of the rotation of the pass's row `row`.
__device__ __forceinline__ Angles angles_of(const Block& block, int row) {
    const int at = row * (HEAD_DIM / 2);
    return {block.shared()->rope_cos + at, block.shared()->rope_sin + at};
}

// One of the vectors that an item needs from the pass's packets: a query of the item's heads, or the key or
// the value of one of the pass's own rows that it sees. They are counted in this order.
struct FreshVector {
    enum Kind { QUERY, KEY, VALUE };
    Kind kind;
    int index, row, head;  // index: among those of its kind; head: among q's, k's and v's

    static __device__ int count(const Item& item) { return item.heads() + 2 * (item.end - item.fresh); }
    __device__ FreshVector(const Item& item, int v) {
        const int rows = item.end - item.fresh, heads = item.heads();
        kind = v < heads ? QUERY : (v < heads + rows ? KEY : VALUE);
        index = v - (kind == QUERY ? 0 : (kind == KEY ? heads : heads + rows));
        row = kind == QUERY ? item.row : item.fresh_row + index;
        head = kind == QUERY ? item.first_head + index
                             : NUM_HEADS + (kind == KEY ? 0 : NUM_KV_HEADS) + item.kv_head();
    }
};

// Receives a vector, by a warp, into target[HEAD_DIM]. False, in this lane alone, if a packet did not come.
__device__ __forceinline__ bool receive_vector(const Block& block, const uint4* packets, float* target,
                                               uint32_t tag, int where) {
    constexpr int SHARE = ceil_div(VECTOR_PACKETS, 32);  // of a lane
    uint4 packet[SHARE];
    Patience patience(block.args, where);
    const auto at = [&](int i) { return packets + min_of(block.lane() + 32 * i, VECTOR_PACKETS - 1); };
    if (!await_packets(patience, tag, at, packet)) return false;
#pragma unroll
    for (int i = 0; i < SHARE; ++i) {
        const int index = min_of(block.lane() + 32 * i, VECTOR_PACKETS - 1);
        float* three = target + index / 3 * 8 + index % 3 * 3;
        three[0] = __uint_as_float(packet[i].x);
        three[1] = __uint_as_float(packet[i].y);
        if (index % 3 < 2) three[2] = __uint_as_float(packet[i].z);
    }
    return true;
}

// Where dimension d of a query lies: pairs are A operands for rows 0 to 7, what stands between them is for
// rows 8 to 15, whose products nobody wants.
__device__ __forceinline__ int query_place(int d) {
    return Vectors::order_of(d) / 2 * 4 + Vectors::order_of(d) % 2;
}

// Fills query_bf16, key_vector and value_vector of the item. A warp receives a vector and makes of it what is
// wanted; the last warps, which have the fewest positions, begin.
__device__ __forceinline__ bool load_vectors(Block& block, const Item& item, int layer, const uint4* qkv,
                                             uint32_t tag, int where) {
    AttentionScratch& s = *block.attention();
    const float* vectors = layer_vectors(block.args, layer);
    float* vector = reinterpret_cast<float*>(s.share + block.warp() * SHARE_PAIRS);
    float* norm = vector + HEAD_DIM;
    bool arrived = true;
    for (int v = WARPS - 1 - block.warp(); v < FreshVector::count(item); v += WARPS) {
        const FreshVector fresh(item, opaque(v));  // registers are short
        // Asked for before the wait.
        for (int d = block.lane(); QK_NORM && d < HEAD_DIM; d += 32) {
            norm[d] = vectors[(fresh.kind == FreshVector::QUERY ? Q_NORM_OFFSET : K_NORM_OFFSET) + d];
        }
        const uint4* packets = qkv + fresh.row * QKV_PACKETS + fresh.head * VECTOR_PACKETS;
        arrived = receive_vector(block, packets, vector, tag, where) && arrived;
        __syncwarp();
        HeadVector head;
        head.load(vector);
        if (fresh.kind == FreshVector::VALUE) {
            Vectors::put_value(head, s.value_vector + fresh.index * VECTOR_BYTES, item.fresh + fresh.index);
        } else {
            head.norm_and_rotate(norm, angles_of(block, fresh.row));
            if (fresh.kind == FreshVector::KEY) {
                Vectors::put_key(head, s.key_vector + fresh.index * VECTOR_BYTES, item.fresh + fresh.index);
            } else {
                uint16_t* query = s.query_bf16 + fresh.index * QUERY_STRIDE;
                head.round(query, query_place);
                for (int d = HEAD_DIM + block.lane(); d < HEAD_DIM_PAD; d += 32) query[query_place(d)] = 0;
            }
        }
        __syncwarp();
    }
    if (sync_threads_or<THREADS>(!arrived)) return false;
    mark(block, layer, MARK_ATTENTION_IN);
    return true;
}

// Appends the row's own K and V to the cache if the item is the one to do it: the last block of positions,
// the first query heads of the KV head.
__device__ __forceinline__ void append_to_cache(const Block& block, const Item& item, int layer) {
    const AttentionScratch& s = *block.attention();
    const int position = block.args.rows[item.row].position;
    if (item.end != position + 1 || item.first_head != item.kv_head() * HEADS_PER_KV) return;
    const uint64_t at = item.cache_offset(block.args, layer, position);
    const int own = (position - item.fresh) * VECTOR_BYTES;
    for (int i = 2 * block.thread; i < VECTOR_DATA; i += 2 * THREADS) {
        const auto append = [&](uint8_t* cache, const uint8_t* vectors) {
            *reinterpret_cast<uint16_t*>(cache + at + i) =
                *reinterpret_cast<const uint16_t*>(vectors + own + i);
        };
        append(block.args.key_cache, s.key_vector);
        append(block.args.value_cache, s.value_vector);
    }
}

// ---- a warp's tile of positions ----

// The slots of a warp's tile in its stream, of its keys and then of its values, run by run.
class TileSlots {
  public:
    __device__ TileSlots(Block& block, const Item& item) : block_(block), item_(item) { locate(); }

    // What follows from the warp's number is not kept where registers are short.
    __device__ void locate() {
        first_ = item_.tile_begin(block_.warp()), positions_ = item_.tile_positions(block_.warp());
    }

    // Whether the cache has room for the run's positions, some of which the row sees.
    __device__ bool has(int run) const { return run * KV_RUN / KV_SLOT * KV_SLOT < positions_; }
    // The run's first position.
    __device__ int first(int run) const { return first_ + run * KV_RUN; }
    // Whether `position` is of the pass's own rows: the cache did not hold it when the slots were fetched.
    __device__ bool is_fresh(int position) const { return position >= item_.fresh && position < item_.end; }
    // Whether any position of the tile is.
    __device__ bool has_fresh() const { return item_.fresh < first_ + KV_TILE && item_.end > first_; }
    // Where a vector of the pass's own rows lies in `fresh`.
    __device__ const uint8_t* fresh(int position, const uint8_t* fresh) const {
        return fresh + (position - item_.fresh) * VECTOR_BYTES;
    }

    // Where the stream has the vector of the run's position number `in_run`. has(run), in ascending order.
    __device__ const uint8_t* vector(int run, int in_run) {
        const int in_slot = run * KV_RUN % KV_SLOT;
        if (in_slot == 0) slot_ = block_.stream.wait();
        return slot_ + (in_slot + in_run) * VECTOR_BYTES;
    }
    // `read`: a number that needs all that the lane has read of the run, which nobody reads again.
    __device__ void leave(int run, uint32_t read) {
        read_ ^= read;
        const bool last = (run + 1) * KV_RUN % KV_SLOT == 0 || run + 1 == TILE_RUNS;
        if (last) block_.stream.release(__uint_as_float(read_));
    }

  private:
    Block& block_;
    const Item& item_;
    int first_, positions_;
    const uint8_t* slot_ = nullptr;
    uint32_t read_ = 0;
};

// The keys of some runs as operands, in registers, and what a product with them is worth.
class Keys {
  public:
    static constexpr int RUNS = min_of(TILE_RUNS, max_of(1, 16 * KV_BITS / HEAD_DIM_PAD));
    static_assert(TILE_RUNS % RUNS == 0, "a tile is not of whole groups of runs");

    // Those of the runs from `begin` on, as the cache has them: the pass's own may be still to come.
    __device__ void read(const Block& block, TileSlots& slots, int begin) {
        const int t = block.lane() % 4, g = block.lane() / 4 % KV_RUN;
#pragma unroll
        for (int i = 0; i < RUNS; ++i) {
            if (!slots.has(begin + i)) {
                clear(i);
                continue;
            }
            const uint32_t read = load(i, slots.vector(begin + i, g), t, slots.first(begin + i) + g);
            slots.leave(begin + i, read);
        }
    }

    // Reads the pass's own, which `fresh` holds now.
    __device__ void read_fresh(const Block& block, const TileSlots& slots, int begin, const uint8_t* fresh) {
        if (!slots.has_fresh()) return;
        const int t = block.lane() % 4, g = block.lane() / 4 % KV_RUN;
#pragma unroll
        for (int i = 0; i < RUNS; ++i) {
            const int own = slots.first(begin + i) + g;
            if (slots.is_fresh(own)) load(i, slots.fresh(own, fresh), t, own);
        }
    }

    // dots[i][0] + dots[i][1] = the query of head g, if it exists, times the keys of run i.
    __device__ void multiply(const uint16_t* query, bool exists, float (&dots)[RUNS][2][4]) const {
#pragma unroll
        for (int j = 0; j < HEAD_DIM_PAD / 32; ++j) {
            uint4 first = make_uint4(0, 0, 0, 0), second = first;
            if (exists) {
                first = *reinterpret_cast<const uint4*>(query + 64 * j);
                second = *reinterpret_cast<const uint4*>(query + 64 * j + 8);
            }
            const uint32_t low[4] = {first.x, first.y, first.z, first.w};
            const uint32_t high[4] = {second.x, second.y, second.z, second.w};
#pragma unroll
            for (int i = 0; i < RUNS; ++i) {
                mma_16x8x16(dots[i][0], low, operand_[i][j].x, operand_[i][j].y);
                mma_16x8x16(dots[i][1], high, operand_[i][j].z, operand_[i][j].w);
            }
        }
    }

    __device__ void scales(int i, float (&scales)[2]) const { Vectors::of_columns(scale_[i], scales); }

  private:
    __device__ void clear(int i) {
        for (uint4& four : operand_[i]) four = make_uint4(0, 0, 0, 0);
        scale_[i] = 0.0f;
    }
    __device__ uint32_t load(int i, const uint8_t* vector, int t, int position) {
        uint32_t read = 0;
#pragma unroll
        for (int j = 0; j < HEAD_DIM_PAD / 32; ++j) {
            operand_[i][j] = Vectors::load_key(vector, t, j, position);
            read ^= operand_[i][j].x ^ operand_[i][j].z;
        }
        scale_[i] = Vectors::key_scale(vector);
        return read ^ __float_as_uint(scale_[i]);
    }

    uint4 operand_[RUNS][HEAD_DIM_PAD / 32];
    float scale_[RUNS];
};

// The values of some runs, in registers.
class Values {
  public:
    static constexpr int RUNS = min_of(TILE_RUNS, max_of(1, 16 / HEAD_DIM_TILES));
    static_assert(TILE_RUNS % RUNS == 0, "a tile is not of whole groups of runs");

    __device__ void clear() {
        for (int i = 0; i < RUNS; ++i) clear(i);
    }

    // Those of the runs from `begin` on.
    __device__ void read(const Block& block, TileSlots& slots, int begin, const uint8_t* fresh) {
        const int octet = block.lane() / 8;  // gives the rows of its own 16 bytes of each four
#pragma unroll
        for (int i = 0; i < RUNS; ++i) {
            if (!slots.has(begin + i)) {
                clear(i);
                continue;
            }
            const int in_run = block.lane() % KV_RUN, own = slots.first(begin + i) + in_run;
            const uint8_t* value = slots.vector(begin + i, in_run);
            if (slots.is_fresh(own)) value = slots.fresh(own, fresh);
            Vectors::value_scales(value, scales_[i]);
            uint32_t read = __float_as_uint(scales_[i][0]);
#pragma unroll
            for (int load = 0; load < VALUE_LOADS; load += 2) {
                uint32_t four[4];
                load_transposed(four, Vectors::value_piece(value, 2 * load + octet, own));
                loaded_[i][load][0] = four[0], loaded_[i][load][1] = four[1];
                if (load + 1 < VALUE_LOADS)
                    loaded_[i][load + 1][0] = four[2], loaded_[i][load + 1][1] = four[3];
                read ^= four[0];
            }
            slots.leave(begin + i, read);
        }
    }

    // out[m] += the values times their probabilities, see weigh_values().
    __device__ void weigh(const Block& block, const Item& item, const TileSlots& slots, int begin,
                          const uint32_t (&p)[TILE_RUNS], float (&out)[HEAD_DIM_TILES][4]) const {
        const int t = block.lane() % 4;
#pragma unroll
        for (int i = 0; i < RUNS; ++i) {
            const int position = slots.first(begin + i) + 2 * t;
            const uint32_t seen =
                seen_pair(2 * t < KV_RUN && position >= item.begin && position < item.end,
                          2 * t + 1 < KV_RUN && position + 1 >= item.begin && position + 1 < item.end);
            const uint32_t weights = Vectors::weigh(p[begin + i], seen, scales_[i]);
#pragma unroll
            for (int m = 0; m < HEAD_DIM_TILES; ++m) {
                uint32_t a[2];
                Vectors::value_tile(loaded_[i][m / Vectors::LOAD_TILES], m % Vectors::LOAD_TILES, seen, a);
                mma_16x8x8(out[m], a, weights);
            }
        }
    }

  private:
    __device__ void clear(int i) {
        for (uint32_t (&load)[2] : loaded_[i]) load[0] = load[1] = 0;
        scales_[i][0] = scales_[i][1] = 0.0f;
    }

    uint32_t loaded_[RUNS][VALUE_LOADS][2];
    float scales_[RUNS][2];
};

// score[run][c] = q . k / sqrt(HEAD_DIM) * log2(e) of head lane / 4 and the run's position 2 (lane % 4) + c,
// or MASKED. `keys` has the first runs', read ahead; `values` gets those of the first runs.
__device__ __forceinline__ void score_tile(Block& block, const Item& item, TileSlots& slots, Keys& keys,
                                           Values& values, float (&score)[TILE_RUNS][2]) {
    AttentionScratch& s = *block.attention();
    const int t = block.lane() % 4, g = block.lane() / 4;
#pragma unroll
    for (int begin = 0; begin < TILE_RUNS; begin += Keys::RUNS) {
        if (begin > 0) keys.read(block, slots, begin);
        keys.read_fresh(block, slots, begin, s.key_vector);
        float dots[Keys::RUNS][2][4] = {};  // two sums, which do not wait for each other
        keys.multiply(s.query_bf16 + g * QUERY_STRIDE + 16 * t, g < item.heads(), dots);
        if (begin + Keys::RUNS >= TILE_RUNS) {  // meanwhile
            block.stream.refill();
            values.read(block, slots, 0, s.value_vector);
        }
#pragma unroll
        for (int i = 0; i < Keys::RUNS; ++i) {
            float scales[2];
            keys.scales(i, scales);
            for (int c = 0; c < 2; ++c) {
                const int position = slots.first(begin + i) + 2 * t + c;
                const bool visible = 2 * t + c < KV_RUN && position >= item.begin && position < item.end;
                if (visible) score[begin + i][c] = (dots[i][0][c] + dots[i][1][c]) * scales[c];
            }
        }
    }
}

// Leaves the greatest score of the warp's tile, and a sum of probabilities for a tile without positions;
// softmax_tile() leaves that of the others.
__device__ __forceinline__ void leave_maximum(const Block& block, const float (&score)[TILE_RUNS][2]) {
    AttentionScratch& s = *block.attention();
    float top = MASKED;
    for (int run = 0; run < TILE_RUNS; ++run) top = fmaxf(top, fmaxf(score[run][0], score[run][1]));
    top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 2));
    if (block.lane() % 4 != 0) return;
    s.tile_max[block.lane() / 4 * WARPS + block.warp()] = top;
    s.tile_sum[block.lane() / 4 * WARPS + block.warp()] = 0.0f;
}

// Turns the scores of a tile into probabilities relative to the maximum of all warps' tiles, rounded to bf16:
// p[run] holds a pair of positions of head lane / 4. Leaves their sum in tile_sum.
__device__ __forceinline__ void softmax_tile(const Block& block, const Item& item, const TileSlots& slots,
                                             const float (&score)[TILE_RUNS][2], uint32_t (&p)[TILE_RUNS]) {
    AttentionScratch& s = *block.attention();
    const int head = block.lane() / 4;
    float top = MASKED;
    for (int tile = 0; tile < WARPS; tile += 4) {
        const float4 four = *reinterpret_cast<const float4*>(s.tile_max + head * WARPS + tile);
        top = fmaxf(fmaxf(top, fmaxf(four.x, four.y)), fmaxf(four.z, four.w));
    }
    float sum = 0.0f;
    for (int run = 0; run < TILE_RUNS; ++run) {
        p[run] = pack_bf16x2(exp2_approx(score[run][0] - top), exp2_approx(score[run][1] - top));
        sum += __uint_as_float(p[run] << 16);
        sum += __uint_as_float(p[run] & 0xffff0000);
    }
    sum += __shfl_xor_sync(0xffffffff, sum, 1);
    sum += __shfl_xor_sync(0xffffffff, sum, 2);
    if (block.lane() % 4 == 0) s.tile_sum[head * WARPS + block.warp()] = sum;
    const bool is_first = slots.first(0) <= item.begin;  // its tile has item.begin: it has positions
    if (is_first && block.lane() % 4 == 0 && head < item.heads()) s.max[head] = top;
}

// out[m] += v . p: of tile m of 16 dimensions those of half 0 (elements 0, 1) and half 1 (2, 3), see
// vectors.cuh, of heads 2 (lane % 4) and the next. `values` has the first runs'.
__device__ __forceinline__ void weigh_values(Block& block, const Item& item, TileSlots& slots, Values& values,
                                             const uint32_t (&p)[TILE_RUNS],
                                             float (&out)[HEAD_DIM_TILES][4]) {
#pragma unroll
    for (int begin = 0; begin < TILE_RUNS; begin += Values::RUNS) {
        if (begin > 0) values.read(block, slots, begin, block.attention()->value_vector);
        values.weigh(block, item, slots, begin, p, out);
    }
}

// ---- the warps' shares together ----

// Leaves the warp's share of the tiles of dimensions from `sweep` on where ShareSums finds it.
__device__ __forceinline__ void leave_share(const Block& block, int heads, int sweep,
                                            const float (&out)[HEAD_DIM_TILES][4]) {
    const int pair = block.lane() % 4;  // of heads
    float2* own = block.attention()->share + opaque(block.warp() * SHARE_PAIRS + pair * HEADS_SHARE +
                                                    Vectors::first_dimension(block.lane()));
    if (2 * pair >= heads) return;
#pragma unroll
    for (int m = sweep; m < min_of(sweep + SWEEP_TILES, HEAD_DIM_TILES); ++m) {
        for (int half = 0; half < 2; ++half) {
            own[16 * (m - sweep) + half * Vectors::HALF_STEP] =
                make_float2(out[m][2 * half], out[m][2 * half + 1]);
        }
    }
}

// What the tiles' shares of dimension d of a sweep sum up to, for a pair of heads, and the probabilities of
// one of the two, `odd` or not, in ascending order of positions.
struct ShareSums {
    float2 output = {0.0f, 0.0f};
    float probability = 0.0f;

    __device__ ShareSums(const AttentionScratch& s, const Item& item, int pair, int odd, int d) {
        const int first = item.first_tile() / 4 * 4, end = item.end_tile();
        const float2* share = s.share + first * SHARE_PAIRS + pair * HEADS_SHARE + d;
        const float* sums = s.tile_sum + first + (2 * pair + odd) * WARPS;
#pragma unroll 1
        for (int tile = first; tile < end; tile += 4, share += 4 * SHARE_PAIRS, sums += 4) {
            const float4 four = *reinterpret_cast<const float4*>(sums);
            float2 shares[4];
            for (int i = 0; i < 4; ++i) shares[i] = share[i * SHARE_PAIRS];
            for (int i = 0; i < 4; ++i) output.x += shares[i].x, output.y += shares[i].y;
            probability = probability + four.x + four.y + four.z + four.w;
        }
    }
};

// Leaves the sums of a sweep in s.out[head][dimension], and those of the probabilities in s.sum[head].
__device__ __forceinline__ void keep_sums(const Block& block, const Item& item, int sweep) {
    constexpr int JOBS = ceil_div(SWEEP_DIMS, 32);  // of a pair of heads
    AttentionScratch& s = *block.attention();
    const int pairs = ceil_div(item.heads(), 2), odd = block.lane() % 2;
    for (int job = block.warp(); job < pairs * JOBS; job += WARPS) {
        const int pair = job / JOBS, d = job % JOBS * 32 + block.lane(), k = sweep * TILE_ROWS + d;
        if (d >= SWEEP_DIMS || k >= HEAD_DIM) continue;
        const ShareSums sums(s, item, pair, odd, d);
        s.out[2 * pair * HEAD_DIM + k] = sums.output.x;
        s.out[(2 * pair + 1) * HEAD_DIM + k] = sums.output.y;
        if (d < 2) s.sum[2 * pair + odd] = sums.probability;
    }
}

// Publishes the finished output if there is one sweep. A warp takes 30 dimensions of a pair of heads, ten
// packets: even lanes get the first head's elements, two at a time, odd lanes the second's.
__device__ __forceinline__ void publish_sums(const Block& block, const Item& item, uint4* packets,
                                             uint32_t tag) {
    constexpr int DIMS = 30, JOBS = ceil_div(HEAD_DIM, DIMS);
    const AttentionScratch& s = *block.attention();
    const int pairs = ceil_div(item.heads(), 2), odd = block.lane() % 2;
    for (int job = block.warp(); job < pairs * JOBS; job += WARPS) {
        const int pair = job / JOBS, d = job % JOBS * DIMS + block.lane(), head = 2 * pair + odd;
        const ShareSums sums(s, item, pair, odd, min_of(d, HEAD_DIM - 1));
        const float2 sum = sums.output;
        const float inverse = divide_approx(1.0f, sums.probability);
        const float other = __shfl_xor_sync(0xffffffff, odd ? sum.x : sum.y, 1);
        const uint32_t two = odd ? pack_bf16x2(other * inverse, sum.y * inverse)
                                 : pack_bf16x2(sum.x * inverse, other * inverse);
        const uint32_t first = d - odd < HEAD_DIM ? two : 0;
        const uint32_t second = __shfl_sync(0xffffffff, first, min_of(block.lane() + 2, 31));
        const uint32_t third = __shfl_sync(0xffffffff, first, min_of(block.lane() + 4, 31));
        const int packet = d / 6;
        if (block.lane() % 6 < 2 && block.lane() < DIMS && packet < HEAD_PACKETS && head < item.heads()) {
            publish(packets + head * HEAD_PACKETS + packet, first, second, third, tag);
        }
    }
}

// ---- a whole item ----

// Publishes one head's finished vector, out * inverse, six bf16 to a packet.
__device__ __forceinline__ void publish_head(const float* out, float inverse, int packet_index,
                                             uint4* packets, uint32_t tag) {
    uint32_t words[3];
    for (int w = 0; w < 3; ++w) {
        const int d = 6 * packet_index + 2 * w;
        words[w] = d < HEAD_DIM ? pack_bf16x2(out[d] * inverse, out[d + 1] * inverse) : 0;
    }
    publish(packets + packet_index, words[0], words[1], words[2], tag);
}

// Publishes the item's unfinished softmax of one head: max, sum, out[HEAD_DIM], three floats to a packet.
__device__ __forceinline__ void publish_partial(const AttentionScratch& s, int head, int packet_index,
                                                uint4* packets, uint32_t tag) {
    uint32_t words[3];
    for (int w = 0; w < 3; ++w) {
        const int i = 3 * packet_index + w - 2;
        const float x = i == -2        ? s.max[head]
                        : i == -1      ? s.sum[head]
                        : i < HEAD_DIM ? s.out[head * HEAD_DIM + i]
                                       : 0;
        words[w] = __float_as_uint(x);
    }
    publish(packets + packet_index, words[0], words[1], words[2], tag);
}

// Publishes what keep_sums() left: the heads' shares of partial softmaxes or, if the item is the `whole`,
// attention's finished output, among `packets`.
__device__ __forceinline__ void publish_item(const Block& block, const Item& item, uint4* packets, bool whole,
                                             uint32_t tag) {
    const AttentionScratch& s = *block.attention();
    if (whole) {
        for (int i = block.thread; i < item.heads() * HEAD_PACKETS; i += THREADS) {
            const int head = i / HEAD_PACKETS;
            publish_head(s.out + head * HEAD_DIM, divide_approx(1.0f, s.sum[head]), i % HEAD_PACKETS,
                         packets + head * HEAD_PACKETS, tag);
        }
        return;
    }
    const int row_head = item.row * NUM_HEADS + item.first_head;
    for (int i = block.thread; i < item.heads() * PARTIAL_PACKETS; i += THREADS) {
        const int head = i / PARTIAL_PACKETS;
        uint4* partials =
            partial_packets(block.args.exchange) +
            (static_cast<uint64_t>(row_head + head) * MAX_SPLITS + item.split) * PARTIAL_PACKETS;
        publish_partial(s, head, i % PARTIAL_PACKETS, partials, tag);
    }
}

// Works on one item from its vectors to what it publishes. What the cache has is read before the pass's own
// vectors come.
__device__ __forceinline__ bool attend(Block& block, const Item& item, int layer, const LayerPackets& packets,
                                       bool whole, uint32_t tag, int where) {
    TileSlots slots(block, item);
    Keys keys;
    keys.read(block, slots, 0);
    block.stream.refill();
    if (!load_vectors(block, item, layer, packets.qkv(), tag, where)) return false;
    block.locate();
    slots.locate();
    Values values;
    float score[TILE_RUNS][2];
    for (int run = 0; run < TILE_RUNS; ++run) score[run][0] = score[run][1] = MASKED;
    if (slots.has(0)) {
        score_tile(block, item, slots, keys, values, score);
    } else {
        values.clear();
    }
    leave_maximum(block, score);
    sync_threads<THREADS>();
    block.locate();
    slots.locate();
    float out[HEAD_DIM_TILES][4] = {};
    if (slots.has(0)) {
        uint32_t p[TILE_RUNS];
        softmax_tile(block, item, slots, score, p);
        weigh_values(block, item, slots, values, p, out);
    }
    // Shares are added four at a time: the tiles that make up the fours leave zeros.
    const bool fills =
        block.warp() >= item.first_tile() / 4 * 4 && block.warp() < round_up(item.end_tile(), 4);
    uint4* output = packets.attention() + (item.row * NUM_HEADS + item.first_head) * HEAD_PACKETS;
    constexpr bool ONE_SWEEP = SWEEP_TILES == HEAD_DIM_TILES;
#pragma unroll
    for (int sweep = 0; sweep < HEAD_DIM_TILES; sweep += SWEEP_TILES) {
        if (sweep > 0) sync_threads<THREADS>();
        if (fills) leave_share(block, item.heads(), sweep, out);
        sync_threads<THREADS>();
        if (!ONE_SWEEP || !whole) keep_sums(block, item, sweep);
    }
    if (ONE_SWEEP && whole) {
        publish_sums(block, item, output, tag);
    } else {
        sync_threads<THREADS>();
        block.locate();
        publish_item(block, item, output, whole, tag);
    }
    block.locate();
    append_to_cache(block, item, layer);
    block.stream.refill();
    sync_threads<THREADS>();
    block.locate();
    return true;
}

// ---- partial softmaxes ----

constexpr int MERGE_LANES = round_up(PARTIAL_PACKETS, 32);    // threads across a vector's packets
constexpr int MERGE_RUNS = max_of(1, THREADS / MERGE_LANES);  // runs merged side by side
constexpr int MERGE_BATCH = 8;                                // splits that a thread asks for at once

// The maximum of the splits' maxima and the sum of their sums under it, the same in every thread.
__device__ __forceinline__ void merge_sums(const Block& block, int splits, float& top, float& sum) {
    const MergeScratch& s = *block.merge();
    top = MASKED, sum = 0.0f;
    for (int split = block.lane(); split < splits; split += 32) top = fmaxf(top, s.max[split]);
    for (int offset = 16; offset > 0; offset /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, offset));
    for (int split = block.lane(); split < splits; split += 32) {
        sum = fmaf(exp2_approx(s.max[split] - top), s.sum[split], sum);
    }
    sum = warp_sum(sum);
}

// Merges the partial softmaxes of one (row, head): runs of MERGE_RUN splits, by absolute number, each in
// ascending order, then the runs in ascending order. `first_split` is the absolute number of the first of
// `splits`.
__device__ __forceinline__ bool merge_splits(Block& block, int row_head, int first_split, int splits,
                                             uint4* target, uint32_t tag, int where) {
    MergeScratch& s = *block.merge();
    const uint4* partials =
        partial_packets(block.args.exchange) + static_cast<uint64_t>(row_head) * MAX_SPLITS * PARTIAL_PACKETS;
    bool arrived = receive_some<1>(
        block.args, block.thread, THREADS, splits, tag, where,
        [&](int split) { return partials + split * PARTIAL_PACKETS; },
        [&](int split, const uint4& packet) {
            s.max[split] = __uint_as_float(packet.x);
            s.sum[split] = __uint_as_float(packet.y);
        });
    if (sync_threads_or<THREADS>(!arrived)) return false;
    float top, sum;
    merge_sums(block, splits, top, sum);
    if (block.thread == 0) s.total = sum;  // not wanted before the end: registers are short
    const int runs = (first_split + splits - 1) / MERGE_RUN - first_split / MERGE_RUN + 1;
    const int index = block.thread % MERGE_LANES, in_run = first_split % MERGE_RUN;
    for (int run = block.thread / MERGE_LANES; run < runs && run < MAX_RUNS; run += MERGE_RUNS) {
        if (index >= PARTIAL_PACKETS || !arrived || block.thread >= MERGE_RUNS * MERGE_LANES) break;
        const int begin = max_of(run * MERGE_RUN - in_run, 0),
                  end = min_of((run + 1) * MERGE_RUN - in_run, splits);
        float x[3] = {};
        arrived = receive_some<MERGE_BATCH>(
            block.args, begin, 1, end, tag, where,
            [&](int split) { return partials + split * PARTIAL_PACKETS + index; },
            [&](int split, const uint4& packet) {
                const float weight = exp2_approx(s.max[split] - top);
                x[0] = fmaf(weight, __uint_as_float(packet.x), x[0]);
                x[1] = fmaf(weight, __uint_as_float(packet.y), x[1]);
                x[2] = fmaf(weight, __uint_as_float(packet.z), x[2]);
            });
        for (int w = 0; w < 3; ++w) {
            const int d = 3 * index + w - 2;
            if (d >= 0 && d < HEAD_DIM) s.run[run * HEAD_DIM + d] = x[w];
        }
    }
    if (sync_threads_or<THREADS>(!arrived)) return false;
    for (int d = block.thread; d < HEAD_DIM; d += THREADS) {
        float x = 0.0f;
        for (int run = 0; run < runs; ++run) x += s.run[run * HEAD_DIM + d];
        s.out[d] = x;
    }
    sync_threads<THREADS>();
    for (int i = block.thread; i < HEAD_PACKETS; i += THREADS) {
        publish_head(s.out, divide_approx(1.0f, s.total), i, target + row_head * HEAD_PACKETS, tag);
    }
    sync_threads<THREADS>();
    return true;
}
