// The whole model in one cooperative launch: token ids in, logits out. Read it from the bottom up to see the
// pass, from here down to see each stage. Blocks own tiles of 16 outputs; they meet only in packets
// (exchange.cuh), and every warp streams its weights ahead of them (stream.cuh).

#include "attention.cuh"
#include "candidates.cuh"
#include "exchange.cuh"
#include "input.cuh"
#include "matvec.cuh"

// ---- helpers of the stages ----

// Publishes 16 floats, which lie in the lanes of a half warp, as the packets of tile `tile`. The whole warp
// calls it, as all that share out work among half warps; a half that is not `valid` publishes nothing.
__device__ __forceinline__ void publish_floats(const Block& block, uint4* packets, int tile, float value,
                                               uint32_t tag, bool valid) {
    const int base = block.lane() & 16, output = block.lane() & 15;
    uint32_t words[3];
    for (int w = 0; w < 3; ++w) {
        const int source = base + min_of(3 * output + w - (output > 2), 15);  // 3, 3, 2, 3, 3, 2 of them
        words[w] = __shfl_sync(0xffffffff, __float_as_uint(value), source);
    }
    if (valid && output < FLOAT_PACKETS) {
        publish(packets + tile * FLOAT_PACKETS + output, words[0], words[1], words[2], tag);
    }
}

// `x` of this lane and its neighbour as two bf16: of lanes 2i and 2i + 1, the same word in both.
__device__ __forceinline__ uint32_t pack_with_neighbour(const Block& block, float x) {
    const float other = __shfl_xor_sync(0xffffffff, x, 1);
    return block.lane() % 2 == 0 ? pack_bf16x2(x, other) : pack_bf16x2(other, x);
}

// Publishes a tile of the residual stream, in the lanes of a half warp, for the norm that comes next: the
// elements times the norm's weights as bf16, and the sum of their squares. One over the root mean square
// comes in after the product, which is linear.
__device__ __forceinline__ void publish_residual(const Block& block, uint4* packets, int tile, float x,
                                                 float weight, uint32_t tag, bool valid) {
    const int base = block.lane() & 16, output = block.lane() & 15;
    const uint32_t pair = pack_with_neighbour(block, x * weight);
    uint32_t words[3];
    for (int w = 0; w < 3; ++w) {
        words[w] = __shfl_sync(0xffffffff, pair, base + 2 * min_of(3 * output + w, 7));
    }
    float squares = x * x;
    for (int offset = 8; offset > 0; offset /= 2) squares += __shfl_xor_sync(0xffffffff, squares, offset);
    if (output == NORM_PACKETS - 1) words[2] = __float_as_uint(squares);
    if (valid && output < NORM_PACKETS) {
        publish(packets + tile * NORM_PACKETS + output, words[0], words[1], words[2], tag);
    }
}

// The angles of the rows' rotations, by their positions: asked for when the object is made, in shared memory
// after keep() and the block's next barrier.
class RowAngles {
  public:
    __device__ explicit RowAngles(const Block& block) {
#pragma unroll
        for (int i = 0; i < PER_THREAD; ++i) {
            const int own = block.thread + i * THREADS;
            if (own >= num_rows(block.args) * HALF) break;
            const uint64_t at =
                static_cast<uint64_t>(block.args.rows[own / HALF].position) * HALF + own % HALF;
            cosine_[i] = block.args.rope_cos[at], sine_[i] = block.args.rope_sin[at];
        }
    }
    __device__ void keep(const Block& block) const {
#pragma unroll
        for (int i = 0; i < PER_THREAD; ++i) {
            const int own = block.thread + i * THREADS;
            if (own >= num_rows(block.args) * HALF) break;
            block.shared()->rope_cos[own] = cosine_[i], block.shared()->rope_sin[own] = sine_[i];
        }
    }

  private:
    static constexpr int HALF = HEAD_DIM / 2, PER_THREAD = ceil_div(ROWS * HALF, THREADS);
    float cosine_[PER_THREAD] = {}, sine_[PER_THREAD] = {};
};

// Works out one over the root mean square of each row's residual stream from its tiles' sums of squares, for
// all: warp w from the last takes row w (the last warps have the fewest units).
__device__ __forceinline__ void scale_rows(const Block& block) {
    const int row = WARPS - 1 - block.warp();
    if (row >= num_rows(block.args)) return;
    const float scale = inverse_rms<32>(block.shared()->tile_squares() + row * HIDDEN_TILES);
    if (block.lane() == 0) block.shared()->norm_scale[row] = scale;
}

// The same of the one row that all of a half warp's jobs are of, see for_rows_of_tiles(). If warps receive
// M's input each by itself nobody has all squares before the first sums are added: half warps work it out
// then.
template <class M>
class RowScale {
  public:
    __device__ float get(const Block& block, int row) {
        if (!OWN_INPUT<M>) return block.shared()->norm_scale[row];
        if (value_ < 0.0f) {  // jobs without a row of the pass have another's
            const int own = min_of((2 * block.warp() + block.lane() / 16) % ROWS, num_rows(block.args) - 1);
            value_ = inverse_rms<16>(block.shared()->tile_squares() + own * HIDDEN_TILES);
        }
        return value_;
    }

  private:
    float value_ = -1.0f;
};

// What a product is added to where nothing comes before it: see Products.
__device__ __forceinline__ float no_sum(int, int, bool) {
    return 0.0f;
}

// Receives the residual stream as publish_residual sends it, and its tiles' squares.
template <class M>
__device__ __forceinline__ bool receive_residual(Block& block, const uint4* packets, uint32_t tag,
                                                 int where) {
    const auto keep_squares = [&](int row, int tile, const uint4& packet) {
        block.shared()->tile_squares()[row * HIDDEN_TILES + tile] = __uint_as_float(packet.z);
    };
    return receive_input<M, HiddenRuns>(block, packets, tag, where, 0, keep_squares, [&] {
        if (!OWN_INPUT<M>) scale_rows(block);
    });
}

// The weights of the norm that comes next at the block's own tiles of the residual stream: asked for before M
// waits for its input, kept after it. (Where M's parts are split who adds them up asks for them.)
template <class M>
class NextNorm {
  public:
    __device__ NextNorm(const Block& block, const float* weight) {
        for (int i = 0; i < PER_THREAD && !M::SPLIT; ++i) {
            const int own = block.thread + i * THREADS, k = k_of(own);
            if (own < OWN_TILES * TILE_ROWS && k < HIDDEN_SIZE) weight_[i] = weight[k];
        }
    }
    __device__ void keep(const Block& block) const {
        for (int i = 0; i < PER_THREAD && !M::SPLIT; ++i) {
            const int own = block.thread + i * THREADS;
            if (own < OWN_TILES * TILE_ROWS) block.shared()->next_norm[own] = weight_[i];
        }
    }

  private:
    static constexpr int PER_THREAD = ceil_div(OWN_TILES * TILE_ROWS, THREADS);
    static __device__ int k_of(int own) {
        return (blockIdx.x + own / TILE_ROWS * gridDim.x) * TILE_ROWS + own % TILE_ROWS;
    }
    float weight_[PER_THREAD] = {};
};

// The residual stream in this block's tiles while a stage adds to it, and where it goes.
struct ResidualUpdate {
    const float* bias;       // or null
    const float* next_norm;  // weights of the norm that comes next,
    uint4* packets;          // and its packets
    uint32_t tag;

    // What the parts of a matrix's product are added to. (Who is not valid must not read what others write.)
    __device__ float before(const Block& block, int own_tile, int row, bool valid) const {
        if (!valid) return 0.0f;
        const int k = k_of(block, own_tile);
        const float x = *place(block, own_tile, row);
        return bias != nullptr && k < HIDDEN_SIZE ? x + bias[k] : x;
    }

    // The next norm's weight.
    __device__ float weight(const Block& block, int own_tile) const {
        const int k = k_of(block, own_tile);
        return k < HIDDEN_SIZE ? next_norm[k] : 0.0f;
    }

    // By a whole warp, half a warp for a tile of a row.
    __device__ void finish(const Block& block, int own_tile, int row, float x, float weight,
                           bool valid) const {
        if (valid) *place(block, own_tile, row) = x;
        publish_residual(block, packets + row * HIDDEN_PACKETS, blockIdx.x + own_tile * gridDim.x, x, weight,
                         tag, valid);
    }

  private:
    static __device__ int k_of(const Block& block, int own_tile) {
        return (blockIdx.x + own_tile * gridDim.x) * TILE_ROWS + block.thread % TILE_ROWS;
    }
    static __device__ float* place(const Block& block, int own_tile, int row) {
        return block.shared()->residual + (own_tile * ROWS + row) * TILE_ROWS + block.thread % TILE_ROWS;
    }
};

// Adds what blocks with different parts of M's input have published of this block's tiles, part by part, to
// the residual. `products`: [ROWS][PARTS][tiles], FLOAT_PACKETS each. A half warp takes a tile of a row, the
// packets of two parts at once.
template <class M>
__device__ __forceinline__ bool add_parts(Block& block, const ResidualUpdate& update, const uint4* products,
                                          uint32_t tag, int where) {
    constexpr int PAIRS = ceil_div(M::PARTS, 2);
    bool arrived = true;
    for_rows_of_tiles(block, block.residual_tiles(), [&](int own_tile, int row, bool valid) {
        const int base = block.lane() & 16, output = block.lane() & 15;
        const uint4* of_row = products + row * M::PARTS * M::TILES * FLOAT_PACKETS;
        const uint4* of_tile = of_row + (blockIdx.x + own_tile * gridDim.x) * FLOAT_PACKETS;
        // Lanes 0 to 5 ask for the packets of the one part, lanes 8 to 13 for those of the other.
        const int in_tile = min_of(output % 8, FLOAT_PACKETS - 1);
        uint4 packet[PAIRS];
        Patience patience(block.args, where);
        const auto at = [&](int pair) {
            const int part = min_of(2 * pair + output / 8, M::PARTS - 1);
            return of_tile + part * M::TILES * FLOAT_PACKETS + in_tile;
        };
        const float weight = update.weight(block, own_tile);
        if (__any_sync(0xffffffff, !await_packets(patience, tag, at, packet))) arrived = false;
        float x = update.before(block, own_tile, row, valid);
        const int holder = output < 8 ? output / 3 : 3 + (output - 8) / 3;
        const int word = output < 8 ? output % 3 : (output - 8) % 3;
#pragma unroll
        for (int part = 0; part < M::PARTS; ++part) {
            const int source = base + part % 2 * 8 + holder;
            const uint4& from = packet[part / 2];
            const uint32_t words[3] = {__shfl_sync(0xffffffff, from.x, source),
                                       __shfl_sync(0xffffffff, from.y, source),
                                       __shfl_sync(0xffffffff, from.z, source)};
            x += __uint_as_float(word == 0 ? words[0] : (word == 1 ? words[1] : words[2]));
        }
        if (arrived) update.finish(block, own_tile, row, x, weight, valid);
    });
    return !sync_threads_or<THREADS>(!arrived);  // also: nobody adds up M's units any more
}

// Adds M's product of the block's activations, which receive(part) brings, to the residual, or publishes its
// share of it for those whose tiles it concerns, among the packets `partial`, [ROWS][PARTS][tiles].
// update() gives the ResidualUpdate, when it is needed.
template <class M, class Update, class Receive>
__device__ __forceinline__ bool multiply_into_residual(Block& block, Products<M>& products, Update update,
                                                       uint4* partial, uint32_t tag, int where,
                                                       Receive receive) {
    if constexpr (!M::SPLIT) {
        const bool arrived = receive(0);
        return products.run(
            block, arrived,
            [&](int own_tile, int row, bool valid) { return update().before(block, own_tile, row, valid); },
            [&](int own_tile, int, int row, float x, bool valid) {
                const int own = own_tile * TILE_ROWS + block.thread % TILE_ROWS;
                update().finish(block, own_tile, row, x, block.shared()->next_norm[own], valid);
            });
    } else {
        do {
            const bool arrived = receive(products.part());
            uint4* of_part = partial + products.part() * M::TILES * FLOAT_PACKETS;
            const auto publish_product = [&](int, int tile, int row, float sum, bool valid) {
                publish_floats(block, of_part + row * M::PARTS * M::TILES * FLOAT_PACKETS, tile, sum, tag,
                               valid);
            };
            if (!products.run(block, arrived, no_sum, publish_product)) return false;
        } while (products.next_part(block));
        return add_parts<M>(block, update(), partial, tag, opaque(where));
    }
}

// ---- the stages: each returns false when a wait gave up, and the block leaves ----

// reads: the token ids or, if the rows have been through the layers already, what these left. writes: hidden
// of the pass's first layer, this block's part of the residual. waits for: the token, if it is awaited.
__device__ __forceinline__ bool embed(Block& block) {
    const PassArgs& args = block.args;
    if (awaits_token(args) && !receive_token(block, where_of(0, STAGE_HOST))) return false;
    const int layer = first_layer(args);
    const LayerPackets packets(args.exchange, layer);
    const uint32_t tag = tag_of(args, layer);
    const float* norm = layer == 0 ? layer_vectors(args, 0) + INPUT_LAYERNORM_OFFSET : args.norm;
    const int output = block.thread % TILE_ROWS;
    for_rows_of_tiles(block, block.residual_tiles(), [&](int own_tile, int row, bool valid) {
        const int tile = blockIdx.x + own_tile * gridDim.x, k = tile * TILE_ROWS + output;
        float x = 0.0f;
        if (k < HIDDEN_SIZE) {
            x = layer == 0 ? embedding(args, token_of(block, row), k)
                           : args.residual[row * RESIDUAL_SIZE + k];
        }
        if (valid) block.shared()->residual[(own_tile * ROWS + row) * TILE_ROWS + output] = x;
        publish_residual(block, packets.hidden() + row * HIDDEN_PACKETS, tile, x,
                         k < HIDDEN_SIZE ? norm[k] : 0.0f, tag, valid);
    });
    return true;
}

// reads and waits for: hidden. writes: qkv.
__device__ __forceinline__ bool norm_qkv(Block& block, int layer) {
    const LayerPackets packets(block.args.exchange, layer);
    const uint32_t tag = tag_of(block.args, layer);
    if (block.own_tiles(STAGE_QKV) == 0) return true;
    const float* vectors = layer_vectors(block.args, layer);
    Products<QkvProj> products(block, STAGE_QKV);
    const bool arrived = receive_residual<QkvProj>(block, packets.hidden(), tag, where_of(layer, STAGE_QKV));
    mark(block, layer, MARK_QKV_IN);
    RowScale<QkvProj> scale;
    const bool all_arrived =
        products.run(block, arrived, no_sum, [&](int, int tile, int row, float sum, bool valid) {
            const int element = tile * TILE_ROWS + block.thread % TILE_ROWS;
            const int here = opaque(layer);  // what follows from it is not kept while units are multiplied
            uint4* qkv = LayerPackets(block.args.exchange, here).qkv();
            sum *= scale.get(block, row);
            if (QKV_BIAS && element < ATTENTION_SIZE + 2 * KV_SIZE) sum += vectors[QKV_BIAS_OFFSET + element];
            publish_floats(block, qkv + row * QKV_PACKETS, tile, sum, tag_of(block.args, here), valid);
        });
    mark(block, layer, MARK_QKV);
    return all_arrived;
}

// reads: qkv, the cache. writes: attention, the rows' own K and V into the cache; of rows that see more than
// one block of positions first the partial softmaxes, which it then merges. waits for: qkv, the partials.
__device__ __forceinline__ bool attention(Block& block, int layer) {
    const LayerPackets packets(block.args.exchange, layer);
    const uint32_t tag = tag_of(block.args, layer);
    const ItemList items(block.shared()->ring.items, layer);
    const int blocks = static_cast<int>(gridDim.x);
    for (int i = items.first(); i < items.count(); i += blocks) {
        const Item item = items[i];
        if (item.begin >= item.end) continue;
        const bool whole = items.splits(item.row) == 1;
        if (!attend(block, item, layer, packets, whole, tag, where_of(layer, STAGE_ATTENTION))) return false;
    }
    for (int i = items.first(); i < num_rows(block.args) * NUM_HEADS; i += blocks) {
        const int row = row_of(i, NUM_HEADS);
        if (items.splits(row) == 1) continue;
        if (!merge_splits(block, i, items.first_split(row), items.splits(row), packets.attention(), tag,
                          where_of(layer, STAGE_MERGE))) {
            return false;
        }
    }
    mark(block, layer, MARK_ATTENTION);
    return true;
}

// reads and waits for: attention. writes: mid_hidden.
__device__ __forceinline__ bool o_proj(Block& block, int layer) {
    if (!OProj::SPLIT && block.residual_tiles() == 0) return true;
    const LayerPackets packets(block.args.exchange, layer);
    const uint32_t tag = tag_of(block.args, layer);
    const int where = where_of(layer, STAGE_O);
    const float* vectors = layer_vectors(block.args, layer);
    const NextNorm<OProj> next(block, vectors + POST_ATTENTION_LAYERNORM_OFFSET);
    Products<OProj> products(block, STAGE_O);
    const auto receive = [&](int part) {
        const bool arrived = receive_input<OProj, HeadRuns>(block, packets.attention(), tag, where, part,
                                                            no_rest, [&] { next.keep(block); });
        mark(block, layer, MARK_O_IN);
        return arrived;
    };
    const auto update = [&] {
        const int here = opaque(layer);  // what follows from it is not kept while units are multiplied
        const float* own = layer_vectors(block.args, here);
        return ResidualUpdate{O_BIAS ? own + O_BIAS_OFFSET : nullptr, own + POST_ATTENTION_LAYERNORM_OFFSET,
                              LayerPackets(block.args.exchange, here).mid_hidden(), tag};
    };
    if (!multiply_into_residual(block, products, update, o_product_packets(block.args.exchange), tag, where,
                                receive)) {
        return false;
    }
    mark(block, layer, MARK_O);
    return true;
}

// reads and waits for: mid_hidden. writes: activation.
__device__ __forceinline__ bool norm_gate_up(Block& block, int layer) {
    const LayerPackets packets(block.args.exchange, layer);
    const uint32_t tag = tag_of(block.args, layer);
    if (block.own_tiles(STAGE_GATE_UP) == 0) return true;
    const float* vectors = layer_vectors(block.args, layer);
    Products<GateUpProj> products(block, STAGE_GATE_UP);
    const bool arrived =
        receive_residual<GateUpProj>(block, packets.mid_hidden(), tag, where_of(layer, STAGE_GATE_UP));
    mark(block, layer, MARK_GATE_UP_IN);
    RowScale<GateUpProj> scale;
    const bool all_arrived =
        products.run(block, arrived, no_sum, [&](int, int tile, int row, float sum, bool valid) {
            const int output = block.thread % TILE_ROWS;
            const int base = block.lane() & 16;
            sum *= scale.get(block, row);
            if (MLP_BIAS) sum += vectors[GATE_UP_BIAS_OFFSET + tile * TILE_ROWS + output];
            const float up = __shfl_xor_sync(0xffffffff, sum, 8);
            const int here = opaque(layer);  // what follows from it is not kept while units are multiplied
            uint4* activation = LayerPackets(block.args.exchange, here).activation();
            // silu(gate) * up in outputs 0 to 7
            const float x = silu(sum) * up;
            const uint32_t pair = pack_with_neighbour(block, x);
            uint32_t words[2];
            for (int w = 0; w < 2; ++w) {
                words[w] = __shfl_sync(0xffffffff, pair, base + 4 * (output % BF16_PACKETS) + 2 * w);
            }
            if (valid && output < BF16_PACKETS) {
                publish(activation + row * ACTIVATION_PACKETS + tile * BF16_PACKETS + output, words[0],
                        words[1], 0, tag_of(block.args, here));
            }
        });
    mark(block, layer, MARK_GATE_UP);
    return all_arrived;
}

// Weights of the norm behind layer `layer`.
__device__ __forceinline__ const float* next_input_norm(const PassArgs& args, int layer) {
    return layer + 1 == NUM_LAYERS ? args.norm : layer_vectors(args, layer + 1) + INPUT_LAYERNORM_OFFSET;
}

// reads and waits for: activation. writes: hidden of the next layer.
__device__ __forceinline__ bool down_proj(Block& block, int layer) {
    if (!DownProj::SPLIT && block.residual_tiles() == 0) return true;
    const LayerPackets packets(block.args.exchange, layer);
    const uint32_t tag = tag_of(block.args, layer);
    const int where = opaque(where_of(layer, STAGE_DOWN));  // registers are short
    const NextNorm<DownProj> next(block, next_input_norm(block.args, layer));
    Products<DownProj> products(block, STAGE_DOWN);
    const auto receive = [&](int part) {
        const bool arrived = receive_input<DownProj, GateUpRuns>(block, packets.activation(), tag, where,
                                                                 part, no_rest, [&] { next.keep(block); });
        mark(block, layer, MARK_DOWN_IN);
        return arrived;
    };
    const auto update = [&] {
        const int here = opaque(layer);  // as in o_proj()
        return ResidualUpdate{MLP_BIAS ? layer_vectors(block.args, here) + DOWN_BIAS_OFFSET : nullptr,
                              next_input_norm(block.args, here),
                              LayerPackets(block.args.exchange, here).next_hidden(),
                              tag_of(block.args, here + 1)};
    };
    if (!multiply_into_residual(block, products, update, down_product_packets(block.args.exchange), tag,
                                where, receive)) {
        return false;
    }
    mark(block, layer, MARK_DOWN);
    return true;
}

// reads and waits for: the last hidden. writes: the wanted rows of the logits.
__device__ __forceinline__ bool norm_lm_head(Block& block) {
    const LayerPackets packets(block.args.exchange, NUM_LAYERS);
    const uint32_t tag = tag_of(block.args, NUM_LAYERS);
    if (block.own_tiles(STAGE_LM_HEAD) == 0) return true;
    const PassArgs& args = block.args;
    if (args.candidates != nullptr) mark_queried(block);
    Products<LmHead> products(block, STAGE_LM_HEAD);
    const bool arrived =
        receive_residual<LmHead>(block, packets.hidden(), tag, where_of(NUM_LAYERS, STAGE_LM_HEAD));
    mark(block, NUM_LAYERS, MARK_QKV_IN);
    RowScale<LmHead> scale;
    const bool all_arrived =
        products.run(block, arrived, no_sum, [&](int, int tile, int row, float sum, bool valid) {
            const int token = tile * TILE_ROWS + block.thread % TILE_ROWS;
            sum *= scale.get(block, row);
            if (!valid || token >= VOCAB_SIZE || !(args.logits_rows >> row & 1)) return;
            args.logits[static_cast<uint64_t>(row) * VOCAB_SIZE + token] = sum;
            if (!(fabsf(sum) < -MASKED)) store_relaxed_system_32(&args.status->non_finite, args.pass);
        });
    mark(block, NUM_LAYERS, MARK_QKV);
    return all_arrived;
}

// ---- the pass ----

// False if a wait gave up.
__device__ __forceinline__ bool run_pass(Block& block) {
    const PassArgs& args = block.args;
    const RowAngles angles(block);  // they come while embed() waits for a token and its embedding
    if (!embed(block)) return false;
    angles.keep(block);
    sync_threads<THREADS>();
#pragma unroll 1
    for (int layer = first_layer(args); layer < NUM_LAYERS; ++layer) {
        block.locate();
        if (!norm_qkv(block, opaque(layer))) return false;
        if (!attention(block, opaque(layer))) return false;
        if (!o_proj(block, opaque(layer))) return false;
        if (!norm_gate_up(block, opaque(layer))) return false;
        if (!down_proj(block, opaque(layer))) return false;
    }
    if (args.logits_rows == 0) return true;
    if (!norm_lm_head(block)) return false;
    return args.candidates == nullptr || leave_candidates(block, where_of(NUM_LAYERS, STAGE_HOST));
}

// Grid: cooperative, any number of blocks that are resident together. Block: BLOCK_THREADS threads and
// SHARED_BYTES of dynamic shared memory.
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1)
    ffmini_pass(const __grid_constant__ PassArgs args) {
    extern __shared__ __align__(128) uint8_t shared_memory[];
    prepare_shared(args, shared_memory);
#if BULK_COPIES
    if (threadIdx.x >= THREADS) {
        give_up_registers<FETCH_REGISTERS>();
        fill_rings<RING_SLOTS>(args, Block::tail(shared_memory)->ring, shared_memory + FIXED_BYTES);
        return;
    }
    take_registers<COMPUTE_REGISTERS>();
#endif
    Block block(args, shared_memory);
    if (!run_pass(block)) block.stream.abandon();
}
