// Attention of one pass: items of (row, up to 8 query heads of one KV head, block of 256 positions), spread
// over the grid. A row sees the cache as earlier passes left it, and the pass's own rows from their packets,
// rounded as the cache holds them.
#pragma once

#include "exchange.cuh"

#define MASKED __int_as_float(0xff800000)  // minus infinity

constexpr int ONLY_SPLIT = -1;

// What a row of the pass attends to.
struct Span {
    int first_row;    // of the pass's rows in this slot
    int fresh_from;   // its position: from here on K and V are in this pass's packets
    int first, last;  // visible positions, both included

    __device__ Span(const PassArgs& args, int row, int window) {
        first_row = row;
        while (first_row > 0 && args.rows[first_row - 1].slot == args.rows[row].slot) --first_row;
        fresh_from = args.rows[first_row].position;
        last = args.rows[row].position;
        first = window > 0 ? max_of(0, last - window + 1) : 0;
    }
    __device__ int first_split() const { return first / KV_BLOCK; }
    __device__ int splits() const { return last / KV_BLOCK - first / KV_BLOCK + 1; }
};

// Receives elements [first, first + count) of a row's q, k and v into `target`.
__device__ __forceinline__ bool receive_qkv(const Block& block, const uint4* packets, int first, int count,
                                            uint32_t tag, int where, float* target) {
    const int begin = first / TILE_ROWS * FLOAT_PACKETS + first % TILE_ROWS / 3;
    const int last = first + count - 1;
    const int end = last / TILE_ROWS * FLOAT_PACKETS + last % TILE_ROWS / 3 + 1;
    return receive(block, packets, begin + block.thread, end, THREADS, tag, where,
                   [&](int index, const uint4& packet) {
                       const int in_tile = index % FLOAT_PACKETS * 3;
                       const int element = index / FLOAT_PACKETS * TILE_ROWS + in_tile - first;
                       const uint32_t words[3] = {packet.x, packet.y, packet.z};
                       for (int i = 0; i < 3; ++i) {
                           if (in_tile + i < TILE_ROWS && element + i >= 0 && element + i < count) {
                               target[element + i] = __uint_as_float(words[i]);
                           }
                       }
                   });
}

// One warp norms (if the model does), rotates and rounds one head's vector.
__device__ __forceinline__ void norm_and_rotate(const Block& block, const float* vector, const float* weight,
                                                int position, uint16_t* target) {
    float scale = 1.0f;
    if (QK_NORM) {
        float squares = 0.0f;
        for (int d = block.lane; d < HEAD_DIM; d += 32) squares = fmaf(vector[d], vector[d], squares);
        scale = 1.0f / sqrtf(block.warp_sum(squares) / HEAD_DIM + RMS_NORM_EPS);
    }
    const float* cosines = block.args.rope_cos + static_cast<uint64_t>(position) * (HEAD_DIM / 2);
    const float* sines = block.args.rope_sin + static_cast<uint64_t>(position) * (HEAD_DIM / 2);
    for (int d = block.lane; d < HEAD_DIM / 2; d += 32) {
        float low = vector[d], high = vector[d + HEAD_DIM / 2];
        if (QK_NORM) {
            low = low * scale * weight[d];
            high = high * scale * weight[d + HEAD_DIM / 2];
        }
        const float c = cosines[d], s = sines[d];
        const uint32_t pair = pack_bf16x2(fmaf(low, c, -(high * s)), fmaf(high, c, low * s));
        target[d] = static_cast<uint16_t>(pair);
        target[d + HEAD_DIM / 2] = static_cast<uint16_t>(pair >> 16);
    }
}

// One (row, group of query heads, split) of a layer. Few members: they stay in registers beside the
// weights' cursor, so what follows from them is computed.
struct AttentionItem {
    const PassArgs& args;
    int layer, row;
    int first_head;  // of up to ITEM_HEADS query heads of one KV head
    int begin, end;  // positions of the split that the row sees: begin <= p < end
    int fresh;       // the first of them whose K and V are in this pass's packets; end if none
    int fresh_row;   // the row of the pass at position `fresh`

    // `group` counts the groups of heads of all KV heads; `split` is the block of positions.
    __device__ AttentionItem(const PassArgs& pass_args, int layer_, int row_, int group, int split,
                             const Span& span)
        : args(pass_args),
          layer(layer_),
          row(row_),
          first_head(group / HEAD_GROUPS * HEADS_PER_KV + group % HEAD_GROUPS * ITEM_HEADS),
          begin(max_of(split * KV_BLOCK, span.first)),
          end(min_of((split + 1) * KV_BLOCK, span.last + 1)),
          fresh(min_of(end, max_of(begin, span.fresh_from))),
          fresh_row(span.first_row + fresh - span.fresh_from) {}

    __device__ int kv_head() const { return first_head / HEADS_PER_KV; }
    __device__ int heads() const { return min_of(ITEM_HEADS, (kv_head() + 1) * HEADS_PER_KV - first_head); }
    __device__ int origin() const { return begin / KV_BLOCK * KV_BLOCK; }
    __device__ int position() const { return args.rows[row].position; }
    __device__ const float* vectors() const {
        return args.vectors + static_cast<uint64_t>(layer) * VECTORS_SIZE;
    }
    // In the cache: the vector [HEAD_DIM] of position `p`.
    __device__ uint64_t cache_offset(int p) const {
        const uint64_t slot = static_cast<uint64_t>(layer) * args.num_slots + args.rows[row].slot;
        return ((slot * NUM_KV_HEADS + kv_head()) * MAX_SEQ_LEN + p) * HEAD_DIM;
    }
};

// Fills query_bf16, key_bf16 and value_bf16 of the item, and appends the row's own K and V to the cache.
__device__ __forceinline__ bool load_item(Block& block, const AttentionItem& item, const uint4* qkv,
                                          uint32_t tag, int where) {
    AttentionScratch& s = *block.attention;
    for (int i = block.thread; i < 8 * QUERY_STRIDE; i += THREADS) s.query_bf16[i] = 0;
    bool arrived = receive_qkv(block, qkv + item.row * QKV_PACKETS, item.first_head * HEAD_DIM,
                               item.heads() * HEAD_DIM, tag, where, s.query);
    for (int i = 0; arrived && i < item.end - item.fresh; ++i) {
        const uint4* packets = qkv + (item.fresh_row + i) * QKV_PACKETS;
        const int key = ATTENTION_SIZE + item.kv_head() * HEAD_DIM;
        arrived = receive_qkv(block, packets, key, HEAD_DIM, tag, where, s.key + i * HEAD_DIM) &&
                  receive_qkv(block, packets, key + KV_SIZE, HEAD_DIM, tag, where, s.value + i * HEAD_DIM);
    }
    if (__syncthreads_or(!arrived)) return false;
    for (int v = block.warp; v < item.heads() + item.end - item.fresh; v += WARPS) {
        const int i = v - item.heads();
        if (i < 0) {
            norm_and_rotate(block, s.query + v * HEAD_DIM, item.vectors() + Q_NORM_OFFSET, item.position(),
                            s.query_bf16 + v * QUERY_STRIDE);
            continue;
        }
        norm_and_rotate(block, s.key + i * HEAD_DIM, item.vectors() + K_NORM_OFFSET, item.fresh + i,
                        s.key_bf16 + i * HEAD_DIM);
        for (int d = block.lane; d < HEAD_DIM; d += 32) {
            s.value_bf16[i * HEAD_DIM + d] =
                static_cast<uint16_t>(pack_bf16x2(s.value[i * HEAD_DIM + d], 0.0f));
        }
    }
    __syncthreads();
    if (item.end == item.position() + 1 && item.first_head == item.kv_head() * HEADS_PER_KV) {
        const uint64_t at = item.cache_offset(item.position());
        const int own = (item.position() - item.fresh) * HEAD_DIM;
        for (int d = block.thread; d < HEAD_DIM; d += THREADS) {
            block.args.key_cache[at + d] = s.key_bf16[own + d];
            block.args.value_cache[at + d] = s.value_bf16[own + d];
        }
    }
    return true;
}

// Eight elements of K at `position` from dimension d on, zeros where there are none.
__device__ __forceinline__ uint4 load_key(const Block& block, const AttentionItem& item,
                                          const uint16_t* cache, int position, int d) {
    if (position < item.begin || position >= item.end || d >= HEAD_DIM) return make_uint4(0, 0, 0, 0);
    const uint16_t* key = position >= item.fresh
                              ? block.attention->key_bf16 + (position - item.fresh) * HEAD_DIM
                              : cache + (position - item.begin) * HEAD_DIM;
    return *reinterpret_cast<const uint4*>(key + d);
}

// score[position][head] = q . k / sqrt(HEAD_DIM) * log2(e), or MASKED. Warp w has positions 16 w to 16 w
// + 15.
__device__ __forceinline__ void score_positions(Block& block, const AttentionItem& item) {
    const int t = block.lane % 4, g = block.lane / 4;
    const int local = TILE_ROWS * block.warp + g;
    const int position = item.origin() + local;
    const uint16_t* cache = block.args.key_cache + item.cache_offset(item.begin);
    float dots[4] = {};
#pragma unroll 1  // more in flight would spill on sm_100 and newer
    for (int j = 0; j < HEAD_DIM_PAD / 32; ++j) {
        const uint4 top = load_key(block, item, cache, position, 32 * j + 8 * t);
        const uint4 bottom = load_key(block, item, cache, position + 8, 32 * j + 8 * t);
        const uint32_t a[2][4] = {{top.x, bottom.x, top.y, bottom.y}, {top.z, bottom.z, top.w, bottom.w}};
        const uint16_t* query = block.attention->query_bf16 + g * QUERY_STRIDE + 32 * j + 8 * t;
        const uint4 b = *reinterpret_cast<const uint4*>(query);
        mma_16x8x16(dots, a[0], b.x, b.y);
        mma_16x8x16(dots, a[1], b.z, b.w);
    }
    for (int i = 0; i < 4; ++i) {
        const int head = 2 * t + i % 2, row = i / 2 * 8;
        if (head >= item.heads()) continue;
        const bool visible = position + row >= item.begin && position + row < item.end;
        block.attention->score[(local + row) * SCORE_STRIDE + head] =
            visible ? dots[i] * SCORE_SCALE : MASKED;
    }
}

// Turns scores into probabilities relative to the block's maximum, rounded to bf16; one warp per head.
__device__ __forceinline__ void softmax_block(Block& block, int heads) {
    AttentionScratch& s = *block.attention;
    for (int head = block.warp; head < heads; head += WARPS) {
        float scores[KV_BLOCK / 32], top = MASKED;
        for (int i = 0; i < KV_BLOCK / 32; ++i) {
            scores[i] = s.score[(32 * i + block.lane) * SCORE_STRIDE + head];
            top = fmaxf(top, scores[i]);
        }
        top = block.warp_max(top);
        float sum = 0.0f;
        for (int i = 0; i < KV_BLOCK / 32; ++i) {
            const uint32_t bits = pack_bf16x2(0.0f, exp2_approx(scores[i] - top)) & 0xffff0000;
            s.score[(32 * i + block.lane) * SCORE_STRIDE + head] = __uint_as_float(bits);
            sum += __uint_as_float(bits);
        }
        sum = block.warp_sum(sum);
        if (block.lane == 0) s.max[head] = top, s.sum[head] = sum;
    }
}

// out[head][d] = sum over the block's positions of probability * value: VALUE_GROUPS runs of positions, each
// in ascending order, then the runs in ascending order.
__device__ __forceinline__ void weigh_values(Block& block, const AttentionItem& item) {
    AttentionScratch& s = *block.attention;
    const int pair = block.thread % VALUE_PAIRS, group = block.thread / VALUE_PAIRS;
    const int origin = item.origin();
    const int begin = max_of(item.begin, origin + group * VALUE_RUN);
    const int end = min_of(item.end, origin + (group + 1) * VALUE_RUN);
    const uint16_t* cache = block.args.value_cache + item.cache_offset(item.begin);
    for (int chunk = 0; chunk < item.heads(); chunk += HEAD_CHUNK) {
        float low[HEAD_CHUNK] = {}, high[HEAD_CHUNK] = {};
        for (int position = begin; position < end && pair < HEAD_DIM / 2; ++position) {
            const uint16_t* value = position >= item.fresh ? s.value_bf16 + (position - item.fresh) * HEAD_DIM
                                                           : cache + (position - item.begin) * HEAD_DIM;
            const uint32_t v = *reinterpret_cast<const uint32_t*>(value + 2 * pair);
            const float* p = s.score + (position - origin) * SCORE_STRIDE + chunk;
#pragma unroll
            for (int h = 0; h < HEAD_CHUNK; ++h) {
                if (chunk + h >= item.heads()) break;
                low[h] = fmaf(p[h], __uint_as_float(v << 16), low[h]);
                high[h] = fmaf(p[h], __uint_as_float(v & 0xffff0000), high[h]);
            }
        }
        for (int h = 0; h < HEAD_CHUNK && pair < HEAD_DIM / 2; ++h) {
            float* partial = s.partial + (group * HEAD_CHUNK + h) * HEAD_DIM + 2 * pair;
            partial[0] = low[h], partial[1] = high[h];
        }
        __syncthreads();
        for (int i = block.thread; i < HEAD_CHUNK * HEAD_DIM; i += THREADS) {
            if (chunk + i / HEAD_DIM >= item.heads()) break;
            float sum = 0.0f;
            for (int run = 0; run < VALUE_GROUPS; ++run) sum += s.partial[run * HEAD_CHUNK * HEAD_DIM + i];
            s.out[chunk * HEAD_DIM + i] = sum;
        }
        __syncthreads();
    }
}

// Publishes one head's finished vector, out / sum, six bf16 to a packet.
__device__ __forceinline__ void publish_head(const float* out, float sum, int packet_index, uint4* packets,
                                             uint32_t tag) {
    uint32_t words[3];
    for (int w = 0; w < 3; ++w) {
        const int d = 6 * packet_index + 2 * w;
        words[w] = d < HEAD_DIM ? pack_bf16x2(out[d] / sum, out[d + 1] / sum) : 0;
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

// Publishes the item's share as partial number `split` of its row, or, if that is ONLY_SPLIT, as attention's
// finished output.
__device__ __forceinline__ bool attend(Block& block, const AttentionItem& item, const LayerPackets& packets,
                                       uint4* partials, int split, uint32_t tag, int where) {
    if (!load_item(block, item, packets.qkv(), tag, where)) return false;
    score_positions(block, item);
    __syncthreads();
    softmax_block(block, item.heads());
    __syncthreads();
    weigh_values(block, item);
    const bool whole = split == ONLY_SPLIT;
    const int count = whole ? HEAD_PACKETS : PARTIAL_PACKETS;
    for (int i = block.thread; i < item.heads() * count; i += THREADS) {
        const int head = i / count, index = i % count;
        const int row_head = item.row * NUM_HEADS + item.first_head + head;
        if (whole) {
            publish_head(block.attention->out + head * HEAD_DIM, block.attention->sum[head], index,
                         packets.attention() + row_head * HEAD_PACKETS, tag);
        } else {
            publish_partial(
                *block.attention, head, index,
                partials + (static_cast<uint64_t>(row_head) * MAX_SPLITS + split) * PARTIAL_PACKETS, tag);
        }
    }
    __syncthreads();
    return true;
}

// Merges the partial softmaxes of one (row, head) in ascending order of position.
__device__ __forceinline__ bool merge_splits(Block& block, int row_head, int splits, const uint4* partials,
                                             uint4* target, uint32_t tag, int where) {
    MergeScratch& s = *block.merge;
    partials += static_cast<uint64_t>(row_head) * MAX_SPLITS * PARTIAL_PACKETS;
    bool arrived = true;
    for (int split = block.thread; arrived && split < splits; split += THREADS) {
        arrived = receive(block, partials + split * PARTIAL_PACKETS, 0, 1, 1, tag, where,
                          [&](int, const uint4& packet) {
                              s.max[split] = __uint_as_float(packet.x);
                              s.sum[split] = __uint_as_float(packet.y);
                          });
    }
    if (__syncthreads_or(!arrived)) return false;
    float top = MASKED, sum = 0.0f;
    for (int split = 0; split < splits; ++split) top = fmaxf(top, s.max[split]);
    for (int split = 0; split < splits; ++split)
        sum = fmaf(exp2_approx(s.max[split] - top), s.sum[split], sum);
    for (int i = block.thread; arrived && i < PARTIAL_PACKETS; i += THREADS) {
        float x[3] = {};
        arrived = receive(block, partials, i, splits * PARTIAL_PACKETS, PARTIAL_PACKETS, tag, where,
                          [&](int index, const uint4& packet) {
                              const float weight = exp2_approx(s.max[index / PARTIAL_PACKETS] - top);
                              x[0] = fmaf(weight, __uint_as_float(packet.x), x[0]);
                              x[1] = fmaf(weight, __uint_as_float(packet.y), x[1]);
                              x[2] = fmaf(weight, __uint_as_float(packet.z), x[2]);
                          });
        for (int w = 0; w < 3; ++w) {
            const int d = 3 * i + w - 2;
            if (d >= 0 && d < HEAD_DIM) s.out[d] = x[w];
        }
    }
    if (__syncthreads_or(!arrived)) return false;
    for (int i = block.thread; i < HEAD_PACKETS; i += THREADS) {
        publish_head(s.out, sum, i, target + row_head * HEAD_PACKETS, tag);
    }
    __syncthreads();
    return true;
}
