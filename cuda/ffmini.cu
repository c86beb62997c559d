// The whole model in one cooperative launch: token ids in, logits out. Read it from the bottom up to see the
// pass, from here down to see each stage. Blocks own tiles of 16 outputs; they meet only in packets
// (exchange.cuh), and every warp streams its weights ahead of them (stream.cuh).

#include "attention.cuh"
#include "exchange.cuh"
#include "matvec.cuh"

// ---- helpers of the stages ----

// Where a wait stands, for the report when it gives up.
__device__ __forceinline__ int where_of(int layer, int stage) {
    return 8 * layer + stage;
}

__device__ __forceinline__ const float* layer_vectors(const Block& block, int layer) {
    return block.args.vectors + static_cast<uint64_t>(layer) * VECTORS_SIZE;
}

// Publishes 16 floats that lie in lanes 0 to 15 of a half warp as the packets of tile `tile`.
__device__ __forceinline__ void publish_tile(const Block& block, uint4* packets, int tile, float value,
                                             uint32_t tag) {
    const int base = block.lane & 16, output = block.lane & 15;
    uint32_t words[3];
    for (int w = 0; w < 3; ++w) {
        const int source = base + min_of(3 * output + w, 15);
        words[w] = __shfl_sync(0xffffu << base, __float_as_uint(value), source);
    }
    if (output < FLOAT_PACKETS) {
        publish(packets + tile * FLOAT_PACKETS + output, words[0], words[1], words[2], tag);
    }
}

// Fills the columns of the activations that no packet carries with zeros, up to M's padded width.
template <class M>
__device__ __forceinline__ void zero_activation_tail(Block& block, int from) {
    for (int row = 0; row < block.num_rows; ++row) {
        for (int k = from + block.thread; k < M::K_PAD; k += THREADS) {
            block.activations[row * ACTIVATION_STRIDE + k] = 0;
        }
    }
}

// Receives the residual stream, norms it and leaves it as bf16 activations. The sum of squares of a row is
// taken per thread over its packets, then over the warp, then over the warps in ascending order.
template <class M>
__device__ __forceinline__ bool receive_normed(Block& block, const uint4* packets, const float* weight,
                                               uint32_t tag, int where) {
    constexpr int PER_THREAD = ceil_div(HIDDEN_PACKETS, THREADS);
    for (int row = 0; row < block.num_rows; ++row) {
        float x[3 * PER_THREAD] = {};
        float squares = 0.0f;
        const bool arrived =
            receive(block, packets + row * HIDDEN_PACKETS, block.thread, HIDDEN_PACKETS, THREADS, tag, where,
                    [&](int index, const uint4& packet) {
#pragma unroll
                        for (int i = 0; i < PER_THREAD; ++i) {  // a constant index keeps x in registers
                            if (index != block.thread + i * THREADS) continue;
                            x[3 * i] = __uint_as_float(packet.x);
                            x[3 * i + 1] = __uint_as_float(packet.y);
                            x[3 * i + 2] = __uint_as_float(packet.z);
                            if (index % FLOAT_PACKETS == FLOAT_PACKETS - 1)
                                x[3 * i + 1] = x[3 * i + 2] = 0.0f;
                        }
                    });
        for (int i = 0; i < 3 * PER_THREAD; ++i) squares = fmaf(x[i], x[i], squares);
        squares = block.warp_sum(squares);
        float* warp_sum = block.shared->warp_sum + row % 2 * WARPS;
        if (block.lane == 0) warp_sum[block.warp] = squares;
        if (__syncthreads_or(!arrived)) return false;
        float sum = 0.0f;
        for (int w = 0; w < WARPS; ++w) sum += warp_sum[w];
        const float scale = 1.0f / sqrtf(sum / HIDDEN_SIZE + RMS_NORM_EPS);
#pragma unroll
        for (int i = 0; i < 3 * PER_THREAD; ++i) {
            const int index = block.thread + i / 3 * THREADS, in_tile = index % FLOAT_PACKETS * 3 + i % 3;
            const int k = index / FLOAT_PACKETS * TILE_ROWS + in_tile;
            if (in_tile < TILE_ROWS && k < HIDDEN_SIZE) {
                block.activations[row * ACTIVATION_STRIDE + k] =
                    static_cast<uint16_t>(pack_bf16x2(x[i] * scale * weight[k], 0.0f));
            }
        }
    }
    zero_activation_tail<M>(block, HIDDEN_SIZE);
    __syncthreads();
    sum_groups<M>(block);
    return true;
}

// Receives bf16 activations: PER_PACKET to a packet, packets in runs of RUN that hold LENGTH elements.
template <class M, int PER_PACKET, int RUN, int LENGTH>
__device__ __forceinline__ bool receive_bf16(Block& block, const uint4* packets, int count, uint32_t tag,
                                             int where) {
    bool arrived = true;
    for (int row = 0; arrived && row < block.num_rows; ++row) {
        uint16_t* target = block.activations + row * ACTIVATION_STRIDE;
        arrived = receive(block, packets + row * count, block.thread, count, THREADS, tag, where,
                          [&](int index, const uint4& packet) {
                              const int in_run = index % RUN * PER_PACKET;
                              const int k = index / RUN * LENGTH + in_run;
                              const uint32_t words[3] = {packet.x, packet.y, packet.z};
                              for (int i = 0; i < PER_PACKET; i += 2) {
                                  if (in_run + i < LENGTH && k + i < M::K_PAD) {
                                      *reinterpret_cast<uint32_t*>(target + k + i) = words[i / 2];
                                  }
                              }
                          });
    }
    zero_activation_tail<M>(block, count / RUN * LENGTH);
    if (__syncthreads_or(!arrived)) return false;
    sum_groups<M>(block);
    return true;
}

// One element of a token's embedding.
__device__ __forceinline__ float embedding(const PassArgs& args, int token, int k) {
    if (!TIE_WORD_EMBEDDINGS) {
        const uint32_t bits = args.embed_tokens[static_cast<uint64_t>(token) * HIDDEN_SIZE + k];
        return __uint_as_float(bits << 16);
    }
    // Tied: the same storage as the lm_head; layout.py says where element (r, k) of a tile lies.
    const int r = token % TILE_ROWS, step = k % 8 / 4, half = k % 4 / 2;
    const int lane = r % 8 * 4 + k % 32 / 8, in_slot = k % LmHead::SLOT_K, slot = k / LmHead::SLOT_K;
    const uint8_t* bytes = args.lm_head + static_cast<uint64_t>(token / TILE_ROWS) * LmHead::TILE_BYTES +
                           static_cast<uint64_t>(slot) * LmHead::SLOT_BYTES;
    if (LM_HEAD_BITS == 16) {
        const int at =
            (in_slot / 32 * 2 + step) * LINE_BYTES + lane * 16 + (2 * half + r / 8) * 4 + k % 2 * 2;
        return __uint_as_float(static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(bytes + at)) << 16);
    }
    const int at = in_slot / 32 * LINE_BYTES + lane * 16 + (2 * step + half) * 4 + k % 2 * 2 + r / 8;
    const int slot_k = slot + 1 == LmHead::SLOTS ? LmHead::TAIL_K : LmHead::SLOT_K;
    const uint8_t* scales = bytes + slot_k / 32 * LINE_BYTES;
    const int group = in_slot / LM_HEAD_GROUP_SIZE;
    const float scale = half_to_float(reinterpret_cast<const uint16_t*>(scales)[group * TILE_ROWS + r]);
    return scale * static_cast<float>(static_cast<signed char>(bytes[at]));
}

// Adds a matrix's outputs (and its bias) to the residual of this block's tiles and publishes the result.
template <class M>
__device__ __forceinline__ void multiply_into_residual(Block& block, const float* bias, uint4* packets,
                                                       uint32_t tag) {
    multiply<M>(block, [&](int own_tile, int row, float sum) {
        const int tile = blockIdx.x + own_tile * gridDim.x, output = block.thread % TILE_ROWS;
        if (bias != nullptr && tile * TILE_ROWS + output < HIDDEN_SIZE)
            sum += bias[tile * TILE_ROWS + output];
        float* residual = block.shared->residual + (own_tile * ROWS + row) * TILE_ROWS + output;
        *residual += sum;
        publish_tile(block, packets + row * HIDDEN_PACKETS, tile, *residual, tag);
    });
}

// ---- the stages: each returns false when a wait gave up, and the block leaves ----

// reads: the token ids. writes: hidden of layer 0, this block's part of the residual. waits for: nothing.
__device__ __forceinline__ void embed(Block& block, const LayerPackets& packets, uint32_t tag) {
    const int jobs = own_tiles(HIDDEN_TILES) * block.num_rows, output = block.thread % TILE_ROWS;
    for (int job = block.thread / TILE_ROWS; job < jobs; job += THREADS / TILE_ROWS) {
        const int own_tile = job / block.num_rows, row = job % block.num_rows;
        const int tile = blockIdx.x + own_tile * gridDim.x, k = tile * TILE_ROWS + output;
        const float x = k < HIDDEN_SIZE ? embedding(block.args, block.args.rows[row].token, k) : 0.0f;
        block.shared->residual[(own_tile * ROWS + row) * TILE_ROWS + output] = x;
        publish_tile(block, packets.hidden() + row * HIDDEN_PACKETS, tile, x, tag);
    }
}

// reads and waits for: hidden. writes: qkv.
__device__ __forceinline__ bool norm_qkv(Block& block, const LayerPackets& packets, int layer, uint32_t tag) {
    if (own_tiles(QkvProj::TILES) == 0) return true;
    const float* vectors = layer_vectors(block, layer);
    if (!receive_normed<QkvProj>(block, packets.hidden(), vectors + INPUT_LAYERNORM_OFFSET, tag,
                                 where_of(layer, STAGE_QKV))) {
        return false;
    }
    multiply<QkvProj>(block, [&](int own_tile, int row, float sum) {
        const int tile = blockIdx.x + own_tile * gridDim.x;
        const int element = tile * TILE_ROWS + block.thread % TILE_ROWS;
        if (QKV_BIAS && element < ATTENTION_SIZE + 2 * KV_SIZE) sum += vectors[QKV_BIAS_OFFSET + element];
        publish_tile(block, packets.qkv() + row * QKV_PACKETS, tile, sum, tag);
    });
    return true;
}

// reads: qkv, the cache. writes: attention, the rows' own K and V into the cache; for contexts of more than
// one block of positions first the partial softmaxes, which it then merges. waits for: qkv, the partials.
__device__ __forceinline__ bool attention(Block& block, const LayerPackets& packets, int layer,
                                          uint32_t tag) {
    const PassArgs& args = block.args;
    const int window = args.layer_windows[layer];
    uint4* partials = partial_packets(args.exchange);
    int most_splits = 0;
    for (int row = 0; row < block.num_rows; ++row) {
        most_splits = max_of(most_splits, Span(args, row, window).splits());
    }
    constexpr int GROUPS = NUM_KV_HEADS * HEAD_GROUPS;
    const int items = most_splits * block.num_rows * GROUPS;
    for (int i = blockIdx.x; i < items; i += gridDim.x) {
        const int group = i % GROUPS, row = i / GROUPS % block.num_rows, split = i / GROUPS / block.num_rows;
        const Span span(args, row, window);
        if (split >= span.splits()) continue;
        const AttentionItem item(args, layer, row, group, span.first_split() + split, span);
        if (!attend(block, item, packets, partials, most_splits == 1 ? ONLY_SPLIT : split, tag,
                    where_of(layer, STAGE_ATTENTION))) {
            return false;
        }
    }
    if (most_splits == 1) return true;
    for (int i = blockIdx.x; i < block.num_rows * NUM_HEADS; i += gridDim.x) {
        const int splits = Span(args, i / NUM_HEADS, window).splits();
        if (!merge_splits(block, i, splits, partials, packets.attention(), tag,
                          where_of(layer, STAGE_MERGE))) {
            return false;
        }
    }
    return true;
}

// reads and waits for: attention. writes: mid_hidden.
__device__ __forceinline__ bool o_proj(Block& block, const LayerPackets& packets, int layer, uint32_t tag) {
    if (own_tiles(OProj::TILES) == 0) return true;
    if (!receive_bf16<OProj, 6, HEAD_PACKETS, HEAD_DIM>(block, packets.attention(), ATTENTION_PACKETS, tag,
                                                        where_of(layer, STAGE_O))) {
        return false;
    }
    const float* bias = O_BIAS ? layer_vectors(block, layer) + O_BIAS_OFFSET : nullptr;
    multiply_into_residual<OProj>(block, bias, packets.mid_hidden(), tag);
    return true;
}

// reads and waits for: mid_hidden. writes: activation.
__device__ __forceinline__ bool norm_gate_up(Block& block, const LayerPackets& packets, int layer,
                                             uint32_t tag) {
    if (own_tiles(GateUpProj::TILES) == 0) return true;
    const float* vectors = layer_vectors(block, layer);
    if (!receive_normed<GateUpProj>(block, packets.mid_hidden(), vectors + POST_ATTENTION_LAYERNORM_OFFSET,
                                    tag, where_of(layer, STAGE_GATE_UP))) {
        return false;
    }
    multiply<GateUpProj>(block, [&](int own_tile, int row, float sum) {
        const int tile = blockIdx.x + own_tile * gridDim.x, output = block.thread % TILE_ROWS;
        const int base = block.lane & 16;
        const uint32_t half_warp = 0xffffu << base;
        if (MLP_BIAS) sum += vectors[GATE_UP_BIAS_OFFSET + tile * TILE_ROWS + output];
        const float up = __shfl_sync(half_warp, sum, base + (output + 8) % 16);
        const float x = sum / (1.0f + exp2_approx(-LOG2_E * sum)) * up;  // silu(gate) * up in outputs 0 to 7
        float x4[4];
        for (int i = 0; i < 4; ++i) x4[i] = __shfl_sync(half_warp, x, base + 4 * (output % BF16_PACKETS) + i);
        if (output < BF16_PACKETS) {
            publish(packets.activation() + row * ACTIVATION_PACKETS + tile * BF16_PACKETS + output,
                    pack_bf16x2(x4[0], x4[1]), pack_bf16x2(x4[2], x4[3]), 0, tag);
        }
    });
    return true;
}

// reads and waits for: activation. writes: hidden of the next layer.
__device__ __forceinline__ bool down_proj(Block& block, const LayerPackets& packets, int layer,
                                          uint32_t tag) {
    if (own_tiles(DownProj::TILES) == 0) return true;
    if (!receive_bf16<DownProj, 4, BF16_PACKETS, 8>(block, packets.activation(), ACTIVATION_PACKETS, tag,
                                                    where_of(layer, STAGE_DOWN))) {
        return false;
    }
    const float* bias = MLP_BIAS ? layer_vectors(block, layer) + DOWN_BIAS_OFFSET : nullptr;
    multiply_into_residual<DownProj>(block, bias, packets.next_hidden(), tag_of(block.args, layer + 1));
    return true;
}

// reads and waits for: the last hidden. writes: the wanted rows of the logits.
__device__ __forceinline__ bool norm_lm_head(Block& block, const LayerPackets& packets, uint32_t tag) {
    if (own_tiles(LmHead::TILES) == 0) return true;
    const PassArgs& args = block.args;
    if (!receive_normed<LmHead>(block, packets.hidden(), args.norm, tag,
                                where_of(NUM_LAYERS, STAGE_LM_HEAD))) {
        return false;
    }
    multiply<LmHead>(block, [&](int own_tile, int row, float sum) {
        const int token = (blockIdx.x + own_tile * gridDim.x) * TILE_ROWS + block.thread % TILE_ROWS;
        if (token >= VOCAB_SIZE || !(args.logits_rows >> row & 1)) return;
        args.logits[static_cast<uint64_t>(row) * VOCAB_SIZE + token] = sum;
        if (!(fabsf(sum) < -MASKED)) store_relaxed_32(&args.status->non_finite, args.pass);
    });
    return true;
}

// ---- the pass ----

// Grid: cooperative, any number of blocks that are resident together. Block: THREADS threads and
// SHARED_BYTES of dynamic shared memory.
extern "C" __global__ void __launch_bounds__(THREADS, 1) ffmini_pass(const __grid_constant__ PassArgs args) {
    extern __shared__ __align__(128) uint8_t shared_memory[];
    Block block(args, shared_memory);

    embed(block, LayerPackets(args.exchange, 0), tag_of(args, 0));
#pragma unroll 1
    for (int layer = 0; layer < NUM_LAYERS; ++layer) {
        block.locate();
        const LayerPackets packets(args.exchange, layer);
        const uint32_t tag = tag_of(args, layer);
        if (!norm_qkv(block, packets, layer, tag)) return;
        if (!attention(block, packets, layer, tag)) return;
        if (!o_proj(block, packets, layer, tag)) return;
        if (!norm_gate_up(block, packets, layer, tag)) return;
        if (!down_proj(block, packets, layer, tag)) return;
    }
    if (args.logits_rows == 0) return;
    norm_lm_head(block, LayerPackets(args.exchange, NUM_LAYERS), tag_of(args, NUM_LAYERS));
}

// What the host must know of this build, read from the loaded module.
struct BuildInfo {
    uint64_t exchange_packets;
    uint32_t shared_bytes;
    uint32_t threads;
    uint32_t ring_slots;
    uint32_t args_bytes;
};
extern "C" {
__constant__ BuildInfo ffmini_build_info = {EXCHANGE_PACKETS, SHARED_BYTES, THREADS, RING_SLOTS,
                                            sizeof(PassArgs)};
}
