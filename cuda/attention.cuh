// Attention of one pass, item by item (items.cuh). A row sees the cache as earlier passes left it, which
// comes through the stream, and the pass's own rows from their packets, rounded as the cache holds them. Each
// warp takes 16 positions: scores = q . k by mma with heads as rows, then out = v . p with dimensions as
// rows.
#pragma once

#include "arithmetic.cuh"
#include "exchange.cuh"
#include "vectors.cuh"

// ---- an item's vectors ----

// Receives the queries of the item's heads, and the keys and values of the pass's own rows that it sees.
__device__ __forceinline__ bool receive_vectors(const Block& block, const Item& item, const uint4* qkv,
                                                uint32_t tag, int where) {
    AttentionScratch& s = *block.attention();
    const int queries = item.heads() * VECTOR_PACKETS;
    const int key = (NUM_HEADS + item.kv_head()) * VECTOR_PACKETS;
    const uint4* own = qkv + item.row * QKV_PACKETS + item.first_head * VECTOR_PACKETS;
    const uint4* fresh = qkv + item.fresh_row * QKV_PACKETS + key;
    // Behind the queries: of each fresh row its key, then its value.
    const auto at = [&](int index) {
        if (index < queries) return own + index;
        const int vector = (index - queries) / VECTOR_PACKETS, packet = (index - queries) % VECTOR_PACKETS;
        return fresh + vector / 2 * QKV_PACKETS + vector % 2 * NUM_KV_HEADS * VECTOR_PACKETS + packet;
    };
    const auto take = [&](int index, const uint4& packet) {
        float* target = s.query;
        if (index >= queries) {
            index -= queries;
            const int vector = index / VECTOR_PACKETS;
            index -= vector * VECTOR_PACKETS;
            target = (vector % 2 == 0 ? s.key : s.value) + vector / 2 * HEAD_DIM;
        }
        target += index / 3 * 8 + index % 3 * 3;
        target[0] = __uint_as_float(packet.x);
        target[1] = __uint_as_float(packet.y);
        if (index % 3 < 2) target[2] = __uint_as_float(packet.z);
    };
    constexpr int MOST = (ITEM_HEADS + 2 * ROWS) * VECTOR_PACKETS;
    const int count = queries + 2 * (item.end - item.fresh) * VECTOR_PACKETS;
    return receive<MOST>(block, count, tag, where, at, take);
}

// Of the rotation of the pass's row `row`.
__device__ __forceinline__ Angles angles_of(const Block& block, int row) {
    const int at = row * (HEAD_DIM / 2);
    return {block.shared()->rope_cos + at, block.shared()->rope_sin + at};
}

// Fills query_bf16, key_vector and value_vector of the item.
__device__ __forceinline__ bool load_item(Block& block, const Item& item, int layer, const uint4* qkv,
                                          uint32_t tag, int where) {
    AttentionScratch& s = *block.attention();
    const float* vectors = block.args.vectors + static_cast<uint64_t>(layer) * VECTORS_SIZE;
    float norm = 0.0f;  // asked for before the wait
    if (QK_NORM && block.thread < 2 * HEAD_DIM) {
        norm = block.thread < HEAD_DIM ? vectors[Q_NORM_OFFSET + block.thread]
                                       : vectors[K_NORM_OFFSET + block.thread - HEAD_DIM];
    }
    for (int i = block.thread; i < TILE_HEADS * QUERY_STRIDE / 2; i += THREADS) {
        reinterpret_cast<uint32_t*>(s.query_bf16)[i] = 0;
    }
    const bool arrived = receive_vectors(block, item, qkv, tag, where);
    if (QK_NORM && block.thread < 2 * HEAD_DIM) s.norm[block.thread] = norm;
    if (sync_threads_or<THREADS>(!arrived)) return false;
    mark(block, layer, MARK_ATTENTION_IN);
    for (int v = block.warp(); v < item.heads() + item.end - item.fresh; v += WARPS) {
        const int i = opaque(v - item.heads());  // registers are short
        const bool is_query = i < 0;
        HeadVector vector;
        vector.load(is_query ? s.query + v * HEAD_DIM : s.key + i * HEAD_DIM);
        vector.norm_and_rotate(is_query ? s.norm : s.norm + HEAD_DIM,
                               angles_of(block, is_query ? item.row : item.fresh_row + i));
        if (is_query) {
            vector.round(s.query_bf16 + v * QUERY_STRIDE, [](int d) { return d; });
            continue;
        }
        Vectors::put_key(vector, s.key_vector + i * VECTOR_BYTES, item.fresh + i);
        vector.load(s.value + i * HEAD_DIM);
        Vectors::put_value(vector, s.value_vector + i * VECTOR_BYTES, item.fresh + i);
    }
    sync_threads<THREADS>();
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

// Where the vector of `position` lies: in a slot that begins with position `first`, or, if the cache did not
// hold it when it was fetched, among the pass's own rows in `fresh`.
__device__ __forceinline__ const uint8_t* vector_at(const Item& item, const uint8_t* slot, int first,
                                                    const uint8_t* fresh, int position) {
    const bool own = position >= item.fresh && position < item.end;
    return own ? fresh + (position - item.fresh) * VECTOR_BYTES : slot + (position - first) * VECTOR_BYTES;
}

// score[run][c] = q . k / sqrt(HEAD_DIM) * log2(e) of head lane / 4 and the run's position 2 (lane % 4) + c,
// or MASKED.
__device__ __forceinline__ void score_tile(Block& block, const Item& item, float (&score)[TILE_RUNS][2]) {
    const int t = block.lane() % 4, g = block.lane() / 4;
    const int first = item.tile_begin(block.warp()), positions = item.tile_positions(block.warp());
    uint4 query[HEAD_DIM_PAD / 32];
#pragma unroll
    for (int j = 0; j < HEAD_DIM_PAD / 32; ++j) {
        query[j] = Vectors::load_query(block.attention()->query_bf16 + g * QUERY_STRIDE, j);
    }
    const uint8_t* slot = nullptr;
    for (int run = 0; run < TILE_RUNS; ++run) score[run][0] = score[run][1] = MASKED;
#pragma unroll
    for (int run = 0; run < TILE_RUNS; ++run) {
        const int in_slot = run * KV_RUN % KV_SLOT;
        if (run * KV_RUN / KV_SLOT * KV_SLOT >= positions) break;
        if (in_slot == 0) slot = block.stream.wait();
        const int own = first + run * KV_RUN + g % KV_RUN;
        const uint8_t* key =
            vector_at(item, slot, first + run * KV_RUN - in_slot, block.attention()->key_vector, own);
        float dots[2][4] = {};  // two sums, which do not wait for each other
#pragma unroll
        for (int j = 0; j < HEAD_DIM_PAD / 32; ++j) {
            const uint4 k = Vectors::load_key(key, t, j, own);
            const uint32_t low[4] = {query[j].x, 0, query[j].y, 0}, high[4] = {query[j].z, 0, query[j].w, 0};
            mma_16x8x16(dots[0], low, k.x, k.y);
            mma_16x8x16(dots[1], high, k.z, k.w);
        }
        float scales[2], found[2];
        Vectors::key_scales(key, scales);
        for (int c = 0; c < 2; ++c) {
            const int position = first + run * KV_RUN + 2 * t + c;
            const bool visible = 2 * t + c < KV_RUN && position >= item.begin && position < item.end;
            found[c] = (dots[0][c] + dots[1][c]) * scales[c];
            if (visible) score[run][c] = found[c];
        }
        if (in_slot + KV_RUN == KV_SLOT || run + 1 == TILE_RUNS) block.stream.release(found[0] + found[1]);
    }
}

// Turns the scores of all warps' tiles into probabilities relative to the block of positions' maximum,
// rounded to bf16: p[run] holds a pair of positions of head lane / 4. Leaves every tile's sum in tile_sum.
__device__ __forceinline__ void softmax_tile(Block& block, const Item& item,
                                             const float (&score)[TILE_RUNS][2], uint32_t (&p)[TILE_RUNS]) {
    AttentionScratch& s = *block.attention();
    const int head = block.lane() / 4;
    float top = MASKED;
    for (int run = 0; run < TILE_RUNS; ++run) top = fmaxf(top, fmaxf(score[run][0], score[run][1]));
    top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 2));
    if (block.lane() % 4 == 0) s.tile_max[head * WARPS + block.warp()] = top;
    sync_threads<THREADS>();
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
    if (block.warp() == 0 && block.lane() % 4 == 0 && head < item.heads()) s.max[head] = top;
}

// A float that is made of all of `out`.
__device__ __forceinline__ float sum_of(const float (&out)[HEAD_DIM_TILES][4]) {
    float sum = 0.0f;
    for (int m = 0; m < HEAD_DIM_TILES; ++m) sum += out[m][0];
    return sum;
}

// out[m] += v . p: of tile m of 16 dimensions those of half 0 (elements 0, 1) and half 1 (2, 3), see
// vectors.cuh, of heads 2 (lane % 4) and the next.
__device__ __forceinline__ void weigh_values(Block& block, const Item& item, const uint32_t (&p)[TILE_RUNS],
                                             float (&out)[HEAD_DIM_TILES][4]) {
    const int t = block.lane() % 4;
    const int first = item.tile_begin(block.warp()), positions = item.tile_positions(block.warp());
    const uint8_t* slot = nullptr;
#pragma unroll
    for (int run = 0; run < TILE_RUNS; ++run) {
        const int in_slot = run * KV_RUN % KV_SLOT;
        if (run * KV_RUN / KV_SLOT * KV_SLOT >= positions) break;
        if (in_slot == 0) slot = block.stream.wait();
        const int position = first + run * KV_RUN + 2 * t;
        const uint32_t seen =
            seen_pair(2 * t < KV_RUN && position >= item.begin && position < item.end,
                      2 * t + 1 < KV_RUN && position + 1 >= item.begin && position + 1 < item.end);
        const int half = block.lane() / 8 % 2;  // lanes 8 to 15 give the other half of a load's rows
        const int own = first + run * KV_RUN + block.lane() % KV_RUN;
        const uint8_t* value =
            vector_at(item, slot, first + run * KV_RUN - in_slot, block.attention()->value_vector, own);
        float scales[2];
        Vectors::value_scales(value, scales);
        const uint32_t weights = Vectors::weigh(p[run], seen, scales);
        uint32_t loaded[VALUE_LOADS][2];
#pragma unroll
        for (int i = 0; i < VALUE_LOADS; ++i) {
            load_transposed(loaded[i], Vectors::value_piece(value, 2 * i + half, own));
        }
#pragma unroll
        for (int m = 0; m < HEAD_DIM_TILES; ++m) {
            uint32_t a[2];
            Vectors::value_tile(loaded[m / Vectors::LOAD_TILES], m % Vectors::LOAD_TILES, seen, a);
            mma_16x8x8(out[m], a, weights);
        }
        if (in_slot + KV_RUN == KV_SLOT || run + 1 == TILE_RUNS) block.stream.release(sum_of(out));
    }
}

// Adds up the warps' shares in ascending order of positions: s.out[head][dimension] and s.sum[head], complete
// when it returns. A warp takes 32 dimensions of a head. Tiles that nothing is seen of hold zeros.
__device__ __forceinline__ void add_tiles(Block& block, const Item& item,
                                          const float (&out)[HEAD_DIM_TILES][4]) {
    constexpr int CHUNKS = ceil_div(SWEEP_DIMS, 32);
    AttentionScratch& s = *block.attention();
    const int first_head = 2 * (block.lane() % 4), heads = item.heads();
    float* own = s.partial + opaque((block.warp() * ITEM_HEADS + first_head) * SWEEP_DIMS +
                                    Vectors::first_dimension(block.lane()));
#pragma unroll
    for (int sweep = 0; sweep < HEAD_DIM_TILES; sweep += SWEEP_TILES) {
        if (sweep > 0) sync_threads<THREADS>();
#pragma unroll
        for (int m = sweep; m < min_of(sweep + SWEEP_TILES, HEAD_DIM_TILES); ++m) {
            for (int i = 0; i < 4; ++i) {
                const int at = i % 2 * SWEEP_DIMS + 16 * (m - sweep) + i / 2 * Vectors::HALF_STEP;
                if (first_head + i % 2 < heads) own[at] = out[m][i];
            }
        }
        sync_threads<THREADS>();
        for (int job = block.warp(); job < heads * CHUNKS; job += WARPS) {
            const int head = job / CHUNKS, i = job % CHUNKS * 32 + block.lane();
            if (i >= SWEEP_DIMS || sweep * TILE_ROWS + i >= HEAD_DIM) continue;
            const int at = opaque(head * SWEEP_DIMS + i);  // that of the first tile, known once for all
            float sum = 0.0f;
#pragma unroll
            for (int tile = 0; tile < WARPS; ++tile) sum += s.partial[tile * ITEM_HEADS * SWEEP_DIMS + at];
            s.out[head * HEAD_DIM + sweep * TILE_ROWS + i] = sum;
        }
    }
    const int head = WARPS - 1 - block.warp();  // the last warps have the fewest dimensions
    if (head < heads && block.lane() == 0) {
        float sum = 0.0f;
#pragma unroll
        for (int tile = 0; tile < WARPS; ++tile) sum += s.tile_sum[head * WARPS + tile];
        s.sum[head] = sum;
    }
    sync_threads<THREADS>();
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

// Publishes what add_tiles() left: the heads' shares of partial softmaxes or, if the item is the `whole`,
// attention's finished output.
__device__ __forceinline__ void publish_item(const Block& block, const Item& item,
                                             const LayerPackets& packets, bool whole, uint32_t tag) {
    const AttentionScratch& s = *block.attention();
    const int row_head = item.row * NUM_HEADS + item.first_head;
    if (whole) {
        for (int i = block.thread; i < item.heads() * HEAD_PACKETS; i += THREADS) {
            const int head = i / HEAD_PACKETS;
            publish_head(s.out + head * HEAD_DIM, divide_approx(1.0f, s.sum[head]), i % HEAD_PACKETS,
                         packets.attention() + (row_head + head) * HEAD_PACKETS, tag);
        }
        return;
    }
    for (int i = block.thread; i < item.heads() * PARTIAL_PACKETS; i += THREADS) {
        const int head = i / PARTIAL_PACKETS;
        uint4* partials =
            partial_packets(block.args.exchange) +
            (static_cast<uint64_t>(row_head + head) * MAX_SPLITS + item.split) * PARTIAL_PACKETS;
        publish_partial(s, head, i % PARTIAL_PACKETS, partials, tag);
    }
}

// Works on one item from its vectors to what it publishes.
__device__ __forceinline__ bool attend(Block& block, const Item& item, int layer, const LayerPackets& packets,
                                       bool whole, uint32_t tag, int where) {
    if (!load_item(block, item, layer, packets.qkv(), tag, where)) return false;
    float score[TILE_RUNS][2], out[HEAD_DIM_TILES][4] = {};
    uint32_t p[TILE_RUNS];
    score_tile(block, item, score);
    block.stream.refill();
    block.locate();
    softmax_tile(block, item, score, p);
    weigh_values(block, item, p, out);
    add_tiles(block, item, out);
    block.locate();
    publish_item(block, item, packets, whole, tag);
    append_to_cache(block, item, layer);
    block.stream.refill();
    sync_threads<THREADS>();
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
    bool arrived = receive<MAX_SPLITS>(
        block, splits, tag, where, [&](int split) { return partials + split * PARTIAL_PACKETS; },
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
