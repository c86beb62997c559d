// A chunk of a prompt in one cooperative launch: up to CHUNK_ROWS tokens of one sequence, from their ids to
// the residual stream after the last layer and their keys and values in the cache. The stages are those of
// ffmini.cu, in the same arithmetic and order of sums, so a row has the same bits here and there. Blocks
// share every stage out in panels (panels.cuh) or units of warps and meet between two stages; what a stage
// leaves lies in the scratch memory.

#include "chunk_attention.cuh"
#include "panels.cuh"
#include "patience.cuh"

#if !defined(CHUNK_ROWS)
#error "a -D constant of the chunk is missing"
#endif
static_assert(CHUNK_ROWS % PANEL_COLUMNS == 0, "a chunk has whole panels");

// The kernel's one argument; ffmini/kernel.py holds the same struct as a NumPy dtype, a test compares them.
struct ChunkArgs : ModelArgs {
    uint8_t* scratch;   // [SCRATCH_BYTES], zeroed once
    uint32_t* arrived;  // at meetings of the grid, of all blocks; zeroed before each launch
    int slot;
    int start;     // the position of the first row
    int num_rows;  // 1 .. CHUNK_ROWS
    int tokens[CHUNK_ROWS];
};

// ---- what lies in the scratch memory ----

constexpr int QKV_SIZE = QkvProj::TILES * TILE_ROWS;

// bf16 operands of M or, if they are to become integers first, bf16 [CHUNK_ROWS][whole segments].
template <class M>
constexpr int PLAIN_STRIDE = M::SEGMENTS * SEGMENT;
template <class M>
constexpr uint64_t INPUT_BYTES =
    INTEGERS ? static_cast<uint64_t>(CHUNK_ROWS) * PLAIN_STRIDE<M> * 2
             : static_cast<uint64_t>(CHUNK_ROWS / PANEL_ROWS) * PANEL_OPERANDS<M>;
template <class M>
constexpr uint64_t PLANES_BYTES =
    INTEGERS ? static_cast<uint64_t>(CHUNK_ROWS / PANEL_ROWS) * PANEL_OPERANDS<M> : 0;

constexpr int CHUNK_SEGMENTS = max_of(max_of(QkvProj::SEGMENTS, OProj::SEGMENTS), DownProj::SEGMENTS);
constexpr int CHUNK_GROUPS = CHUNK_SEGMENTS * SEGMENT / (WEIGHT_BITS == 4 ? GROUP_SIZE : SEGMENT);

constexpr uint64_t after(uint64_t at, uint64_t bytes) {
    return (at + bytes + 127) / 128 * 128;
}
constexpr uint64_t RESIDUAL_AT = 0;  // fp32 [CHUNK_ROWS][RESIDUAL_SIZE]: the host finds it here
constexpr uint64_t QKV_AT =
    after(RESIDUAL_AT, 4ull * CHUNK_ROWS * RESIDUAL_SIZE);                    // fp32 [CHUNK_ROWS][QKV_SIZE]
constexpr uint64_t QUERIES_AT = after(QKV_AT, 4ull * CHUNK_ROWS * QKV_SIZE);  // see Sequence
constexpr uint64_t SQUARES_AT = after(QUERIES_AT, 2ull * CHUNK_ROWS * ATTENTION_SIZE);
constexpr uint64_t NORM_SCALE_AT = after(SQUARES_AT, 4ull * CHUNK_ROWS * HIDDEN_TILES);
constexpr uint64_t HIDDEN_AT = after(NORM_SCALE_AT, 4ull * CHUNK_ROWS);
constexpr uint64_t ATTENTION_AT = after(HIDDEN_AT, INPUT_BYTES<QkvProj>);
constexpr uint64_t ACTIVATION_AT = after(ATTENTION_AT, INPUT_BYTES<OProj>);
constexpr uint64_t PLANES_AT = after(ACTIVATION_AT, INPUT_BYTES<DownProj>);
constexpr uint64_t WORTH_AT =
    after(PLANES_AT, max_of(max_of(PLANES_BYTES<QkvProj>, PLANES_BYTES<OProj>), PLANES_BYTES<DownProj>));
constexpr uint64_t GROUP_SUM_AT = after(WORTH_AT, 4ull * CHUNK_SEGMENTS * CHUNK_ROWS);
constexpr uint64_t SCRATCH_BYTES = after(GROUP_SUM_AT, 4ull * CHUNK_GROUPS * CHUNK_ROWS);

// Warps of a block that attend: as many as have room for what they keep.
constexpr int UNIT_BYTES = sizeof(UnitScratch);
constexpr int UNIT_WARPS = min_of(PANEL_WARPS, SHARED_LIMIT / UNIT_BYTES);
static_assert(UNIT_WARPS >= 1, "shared memory is too small for a chunk's attention");
constexpr int CHUNK_SHARED_BYTES = max_of(PANEL_STAGES * STAGE_CAPACITY, UNIT_WARPS* UNIT_BYTES);

// ---- a block's view of the chunk ----

struct Chunk {
    const ChunkArgs& args;
    uint8_t* shared;
    uint32_t met = 0;  // arrivals that the last meeting had to see

    __device__ float* residual() const { return reinterpret_cast<float*>(args.scratch + RESIDUAL_AT); }
    __device__ float* qkv() const { return reinterpret_cast<float*>(args.scratch + QKV_AT); }
    __device__ uint16_t* queries() const { return reinterpret_cast<uint16_t*>(args.scratch + QUERIES_AT); }
    __device__ float* squares() const { return reinterpret_cast<float*>(args.scratch + SQUARES_AT); }
    __device__ float* norm_scale() const { return reinterpret_cast<float*>(args.scratch + NORM_SCALE_AT); }
    __device__ uint8_t* hidden() const { return args.scratch + HIDDEN_AT; }
    __device__ uint8_t* attention() const { return args.scratch + ATTENTION_AT; }
    __device__ uint8_t* activation() const { return args.scratch + ACTIVATION_AT; }
    __device__ uint8_t* planes() const { return args.scratch + PLANES_AT; }
    __device__ float* worth() const { return reinterpret_cast<float*>(args.scratch + WORTH_AT); }
    __device__ float* group_sum() const { return reinterpret_cast<float*>(args.scratch + GROUP_SUM_AT); }

    // Of the layer and the chunk's slot in a cache: [NUM_KV_HEADS][MAX_SEQ_LEN][HEAD_DIM].
    __device__ uint16_t* cached(uint16_t* cache, int layer) const {
        const uint64_t slot = static_cast<uint64_t>(layer) * args.num_slots + args.slot;
        return cache + slot * NUM_KV_HEADS * MAX_SEQ_LEN * HEAD_DIM;
    }

    // What every block did before is done for every block after. False if one did not come.
    __device__ bool meet(int where) {
        __syncthreads();
        met += gridDim.x;
        bool came = true;
        if (threadIdx.x == 0) {
            add_release_32(args.arrived, 1);
            Patience patience(args, where);
            while (came && load_acquire_32(args.arrived) < met) came = patience.more();
        }
        return !sync_threads_or<PANEL_THREADS>(!came);
    }
};

// Shares `units` out among the first COUNT warps of each block, neighbours to the warps of a block.
template <int COUNT = PANEL_WARPS, class Body>
__device__ __forceinline__ void for_warps(int units, Body body) {
    const int warp = threadIdx.x / 32;
    if (warp >= COUNT) return;
    for (int unit = blockIdx.x * COUNT + warp; unit < units; unit += gridDim.x * COUNT) body(unit);
}

// Stores elements k and k + 1 of a row of M's input, k even.
template <class M>
__device__ __forceinline__ void store_pair(uint8_t* input, int row, int k, uint32_t pair) {
    uint64_t at = 2 * (static_cast<uint64_t>(row) * PLAIN_STRIDE<M> + k);
    if (!INTEGERS) {
        at = static_cast<uint64_t>(row / PANEL_ROWS) * PANEL_OPERANDS<M> + k / PIECE_K * PIECE_BYTES +
             k % 8 / 2 * CORE_BYTES + row % PANEL_ROWS * 16 + k % 32 / 8 * 4;
    }
    *reinterpret_cast<uint32_t*>(input + at) = pair;
}

// Stores 32 elements of a row from k on, a multiple of 32: of four lanes t each elements 8 i + 2 t and the
// next in word i.
template <class M>
__device__ __forceinline__ void store_32(uint8_t* input, int row, int k, const uint32_t (&words)[4]) {
    const int t = threadIdx.x % 4;
    if (INTEGERS) {
        for (int i = 0; i < 4; ++i) store_pair<M>(input, row, k + 8 * i + 2 * t, words[i]);
        return;
    }
    const uint64_t at = static_cast<uint64_t>(row / PANEL_ROWS) * PANEL_OPERANDS<M> +
                        k / PIECE_K * PIECE_BYTES + t * CORE_BYTES + row % PANEL_ROWS * 16;
    *reinterpret_cast<uint4*>(input + at) = make_uint4(words[0], words[1], words[2], words[3]);
}

// Turns one segment of a row of M's input into integers: the warp's lanes have eight elements each.
template <class M>
__device__ __forceinline__ void align_segment(const Chunk& chunk, const uint8_t* input, int row,
                                              int segment) {
    const int lane = threadIdx.x % 32, k = segment * SEGMENT + 8 * lane;
    const uint64_t from = 2 * (static_cast<uint64_t>(row) * PLAIN_STRIDE<M> + k);
    const uint4 pairs = *reinterpret_cast<const uint4*>(input + from);
    const uint32_t largest = warp_max(largest_bits(pairs));
    const AlignedEight eight(pairs, largest);
    if (k < round_up(M::K_PAD, STAGE_K)) {
        uint8_t* target = chunk.planes() + static_cast<uint64_t>(row / PANEL_ROWS) * PANEL_OPERANDS<M> +
                          k / PIECE_K * PIECE_BYTES + k % 64 / 32 * 2 * CORE_BYTES + row % PANEL_ROWS * 32 +
                          lane % 4 * 4;
        *reinterpret_cast<uint32_t*>(target) = eight.high.x;
        *reinterpret_cast<uint32_t*>(target + CORE_BYTES) = eight.high.y;
        *reinterpret_cast<uint32_t*>(target + 16) = eight.low.x;
        *reinterpret_cast<uint32_t*>(target + CORE_BYTES + 16) = eight.low.y;
    }
    if (lane == 0) chunk.worth()[segment * CHUNK_ROWS + row] = worth_of(largest);
    if constexpr (M::BITS == 4) {
        constexpr int LANES = M::GROUP / 8;
        uint32_t sum = eight.sum;
        for (int offset = 1; offset < LANES; offset *= 2) sum += __shfl_xor_sync(0xffffffff, sum, offset);
        if (lane % LANES == 0) {
            const int group = segment * (SEGMENT / M::GROUP) + lane / LANES;
            chunk.group_sum()[group * CHUNK_ROWS + row] = static_cast<float>(static_cast<int>(sum));
        }
    }
}

// ---- the stages: the blocks have met before each, which returns when this block's share is done ----

// reads: the token ids. writes: residual, hidden, squares.
__device__ __forceinline__ void embed(const Chunk& chunk) {
    const ChunkArgs& args = chunk.args;
    const float* norm = layer_vectors(args, 0) + INPUT_LAYERNORM_OFFSET;
    for_warps(args.num_rows * ceil_div(HIDDEN_TILES, 2), [&](int unit) {
        const int row = unit / ceil_div(HIDDEN_TILES, 2), lane = threadIdx.x % 32;
        const int tile = unit % ceil_div(HIDDEN_TILES, 2) * 2 + lane / 16, k = tile * TILE_ROWS + lane % 16;
        const bool inside = k < HIDDEN_SIZE;
        const float x = inside ? embedding(args, args.tokens[row], k) : 0.0f;
        float squares = x * x;
        for (int offset = 8; offset > 0; offset /= 2) squares += __shfl_xor_sync(0xffffffff, squares, offset);
        const float weighed = x * (inside ? norm[k] : 0.0f);
        const float next = __shfl_xor_sync(0xffffffff, weighed, 1);
        if (tile >= HIDDEN_TILES) return;
        chunk.residual()[row * RESIDUAL_SIZE + k] = x;
        if (lane % 16 == 0) chunk.squares()[row * HIDDEN_TILES + tile] = squares;
        if (lane % 2 == 0) store_pair<QkvProj>(chunk.hidden(), row, k, pack_bf16x2(weighed, next));
    });
}

// reads: M's input and, if it comes from a norm, squares. writes: what M's product wants: of the norm the
// rows' scales; planes.
template <class M>
__device__ __forceinline__ void prepare(const Chunk& chunk, const uint8_t* input, bool normed) {
    const int rows = chunk.args.num_rows, norms = normed ? rows : 0;
    for_warps(norms + (INTEGERS ? rows * M::SEGMENTS : 0), [&](int unit) {
        if (unit < norms) {
            const float scale = inverse_rms(chunk.squares() + unit * HIDDEN_TILES);
            if (threadIdx.x % 32 == 0) chunk.norm_scale()[unit] = scale;
        } else if constexpr (INTEGERS) {
            align_segment<M>(chunk, input, (unit - norms) / M::SEGMENTS, (unit - norms) % M::SEGMENTS);
        }
    });
}

// Multiplies M, which lies at `offset` in its layer, by its input, of which prepare() has been made.
template <class M, class Epilogue>
__device__ __forceinline__ void multiply(const Chunk& chunk, int layer, uint64_t offset, const uint8_t* input,
                                         Epilogue epilogue) {
    const uint8_t* matrix = chunk.args.layers + static_cast<uint64_t>(layer) * LAYER_BYTES + offset;
    const OperandScales scales = {chunk.worth(), chunk.group_sum(), CHUNK_ROWS};
    multiply_panels<M>(matrix, INTEGERS ? chunk.planes() : input, scales, chunk.args.num_rows, chunk.shared,
                       epilogue);
}

// reads: hidden, prepared. writes: qkv.
__device__ __forceinline__ void norm_qkv(const Chunk& chunk, int layer) {
    const float* bias = layer_vectors(chunk.args, layer) + QKV_BIAS_OFFSET;
    const int g = threadIdx.x % 32 / 4;
    multiply<QkvProj>(chunk, layer, 0, chunk.hidden(), [&](const auto& share, int first_tile, int first_row) {
#pragma unroll
        for (int octet = 0; octet < OCTETS; ++octet) {
            for (int which = 0; which < 2; ++which) {
                const int row = first_row + row_in_share(octet, which);
                const float scale = chunk.norm_scale()[row];
#pragma unroll
                for (int tile = 0; tile < WARP_TILES; ++tile) {
                    for (int half = 0; half < 2; ++half) {
                        const int element = (first_tile + tile) * TILE_ROWS + g + 8 * half;
                        float sum = share.sum(tile, octet, half, which) * scale;
                        if (element >= QKV_SIZE) continue;
                        if (QKV_BIAS && element < ATTENTION_SIZE + 2 * KV_SIZE) sum += bias[element];
                        chunk.qkv()[row * QKV_SIZE + element] = sum;
                    }
                }
            }
        }
    });
}

// reads: qkv. writes: queries, the rows' keys and values into the cache.
__device__ __forceinline__ void rotate(const Chunk& chunk, int layer) {
    constexpr int VECTORS = NUM_HEADS + 2 * NUM_KV_HEADS;
    const ChunkArgs& args = chunk.args;
    const float* vectors = layer_vectors(args, layer);
    for_warps(args.num_rows * VECTORS, [&](int unit) {
        const int row = unit / VECTORS, v = unit % VECTORS, position = args.start + row;
        const float* vector = chunk.qkv() + row * QKV_SIZE + v * HEAD_DIM;
        const uint64_t at = static_cast<uint64_t>(position) * (HEAD_DIM / 2);
        const Angles angles = {args.rope_cos + at, args.rope_sin + at};
        if (v < NUM_HEADS) {
            norm_and_rotate(vector, vectors + Q_NORM_OFFSET, angles,
                            chunk.queries() + (row * NUM_HEADS + v) * HEAD_DIM, [](int d) { return d; });
            return;
        }
        const int head = (v - NUM_HEADS) % NUM_KV_HEADS;
        const uint64_t in_slot = (static_cast<uint64_t>(head) * MAX_SEQ_LEN + position) * HEAD_DIM;
        if (v < NUM_HEADS + NUM_KV_HEADS) {
            norm_and_rotate(vector, vectors + K_NORM_OFFSET, angles,
                            chunk.cached(args.key_cache, layer) + in_slot,
                            [&](int d) { return rotated(d, position, KEY_ROTATION); });
            return;
        }
        uint16_t* value = chunk.cached(args.value_cache, layer) + in_slot;
        for (int d = threadIdx.x % 32; d < HEAD_DIM; d += 32) {
            value[rotated(d, position, VALUE_ROTATION)] = static_cast<uint16_t>(pack_bf16x2(vector[d], 0.0f));
        }
    });
}

// reads: queries, the cache. writes: attention.
__device__ __forceinline__ void attend(const Chunk& chunk, int layer) {
    const ChunkArgs& args = chunk.args;
    const Sequence sequence = {chunk.queries(),
                               chunk.cached(args.key_cache, layer),
                               chunk.cached(args.value_cache, layer),
                               args.start,
                               args.num_rows,
                               WINDOWS[layer]};
    UnitScratch& scratch = reinterpret_cast<UnitScratch*>(chunk.shared)[threadIdx.x / 32];
    for_warps<UNIT_WARPS>(sequence.units(), [&](int unit) {
        AttentionUnit(sequence, unit, scratch).run([&](int row, int k, uint32_t pair) {
            store_pair<OProj>(chunk.attention(), row, k, pair);
        });
        __syncwarp();
    });
}

// Adds M's product and a bias to the residual, for the norm with weights `norm` that comes next.
template <class M>
__device__ __forceinline__ void multiply_into_residual(const Chunk& chunk, int layer, uint64_t offset,
                                                       const uint8_t* input, const float* bias,
                                                       const float* norm) {
    const int g = threadIdx.x % 32 / 4;
    multiply<M>(chunk, layer, offset, input, [&](const auto& share, int first_tile, int first_row) {
#pragma unroll
        for (int octet = 0; octet < OCTETS; ++octet) {
            const int transposed_row = first_row + transposed_row_in_share(octet);
            uint32_t words[4];
#pragma unroll
            for (int tile = 0; tile < WARP_TILES; ++tile) {
                const int m = first_tile + tile, k = m * TILE_ROWS + g;
                float weighed[2][2];  // [half][which]
                for (int which = 0; which < 2; ++which) {
                    const int row = first_row + row_in_share(octet, which);
                    float squares[2];
                    for (int half = 0; half < 2; ++half) {
                        const bool inside = k + 8 * half < HIDDEN_SIZE;
                        float sum = share.sum(tile, octet, half, which), x = sum;
                        if (inside) {
                            if (bias != nullptr) sum += bias[k + 8 * half];
                            float* residual = chunk.residual() + row * RESIDUAL_SIZE + k + 8 * half;
                            x = *residual + sum;
                            *residual = x;
                        }
                        squares[half] = inside ? x * x : 0.0f;
                        weighed[half][which] = inside ? x * norm[k + 8 * half] : 0.0f;
                    }
                    float sum = squares[0] + squares[1];
                    for (int offset = 16; offset > 2; offset /= 2) {
                        sum += __shfl_xor_sync(0xffffffff, sum, offset);
                    }
                    if (g == 0 && m < HIDDEN_TILES) chunk.squares()[row * HIDDEN_TILES + m] = sum;
                }
                for (int half = 0; half < 2; ++half) {
                    words[tile % 2 * 2 + half] = transpose(pack_bf16x2(weighed[half][0], weighed[half][1]));
                }
                if (tile % 2 == 1 && m - 1 < HIDDEN_TILES) {
                    store_32<QkvProj>(chunk.hidden(), transposed_row, (m - 1) * TILE_ROWS, words);
                }
            }
        }
    });
}

// reads: attention, prepared; residual. writes: residual, hidden, squares.
__device__ __forceinline__ void o_proj(const Chunk& chunk, int layer) {
    const float* vectors = layer_vectors(chunk.args, layer);
    multiply_into_residual<OProj>(chunk, layer, QkvProj::BYTES, chunk.attention(),
                                  O_BIAS ? vectors + O_BIAS_OFFSET : nullptr,
                                  vectors + POST_ATTENTION_LAYERNORM_OFFSET);
}

// reads: hidden, prepared. writes: activation.
__device__ __forceinline__ void norm_gate_up(const Chunk& chunk, int layer) {
    const float* bias = layer_vectors(chunk.args, layer) + GATE_UP_BIAS_OFFSET;
    const int g = threadIdx.x % 32 / 4;
    constexpr uint64_t OFFSET = QkvProj::BYTES + OProj::BYTES;
    const auto epilogue = [&](const auto& share, int first_tile, int first_row) {
#pragma unroll
        for (int octet = 0; octet < OCTETS; ++octet) {
            uint32_t words[4];
#pragma unroll
            for (int tile = 0; tile < WARP_TILES; ++tile) {
                float x[2];
                for (int which = 0; which < 2; ++which) {
                    const float scale = chunk.norm_scale()[first_row + row_in_share(octet, which)];
                    float gate = share.sum(tile, octet, 0, which) * scale;
                    float up = share.sum(tile, octet, 1, which) * scale;
                    if (MLP_BIAS && first_tile + tile < GateUpProj::TILES) {
                        gate += bias[(first_tile + tile) * TILE_ROWS + g];
                        up += bias[(first_tile + tile) * TILE_ROWS + g + 8];
                    }
                    x[which] = first_tile + tile < GateUpProj::TILES ? silu(gate) * up : 0.0f;
                }
                words[tile] = transpose(pack_bf16x2(x[0], x[1]));
            }
            const int row = first_row + transposed_row_in_share(octet);
            if (first_tile < GateUpProj::TILES) {
                store_32<DownProj>(chunk.activation(), row, first_tile * 8, words);
            }
        }
    };
    multiply<GateUpProj>(chunk, layer, OFFSET, chunk.hidden(), epilogue);
}

// reads: activation, prepared; residual. writes: residual, hidden and squares for the next layer.
__device__ __forceinline__ void down_proj(const Chunk& chunk, int layer) {
    const float* vectors = layer_vectors(chunk.args, layer);
    const bool last = layer + 1 == NUM_LAYERS;
    multiply_into_residual<DownProj>(
        chunk, layer, QkvProj::BYTES + OProj::BYTES + GateUpProj::BYTES, chunk.activation(),
        MLP_BIAS ? vectors + DOWN_BIAS_OFFSET : nullptr,
        last ? chunk.args.norm : vectors + VECTORS_SIZE + INPUT_LAYERNORM_OFFSET);
}

// ---- the chunk ----

// False if a meeting gave up.
__device__ __forceinline__ bool run_layer(Chunk& chunk, int layer) {
    prepare<QkvProj>(chunk, chunk.hidden(), true);
    if (!chunk.meet(where_of(layer, STAGE_QKV))) return false;
    norm_qkv(chunk, layer);
    if (!chunk.meet(where_of(layer, STAGE_ATTENTION))) return false;
    rotate(chunk, layer);
    if (!chunk.meet(where_of(layer, STAGE_ATTENTION))) return false;
    attend(chunk, layer);
    if (!chunk.meet(where_of(layer, STAGE_O))) return false;
    if (INTEGERS) {
        prepare<OProj>(chunk, chunk.attention(), false);
        if (!chunk.meet(where_of(layer, STAGE_O))) return false;
    }
    o_proj(chunk, layer);
    if (!chunk.meet(where_of(layer, STAGE_GATE_UP))) return false;
    prepare<GateUpProj>(chunk, chunk.hidden(), true);
    if (!chunk.meet(where_of(layer, STAGE_GATE_UP))) return false;
    norm_gate_up(chunk, layer);
    if (!chunk.meet(where_of(layer, STAGE_DOWN))) return false;
    if (INTEGERS) {
        prepare<DownProj>(chunk, chunk.activation(), false);
        if (!chunk.meet(where_of(layer, STAGE_DOWN))) return false;
    }
    down_proj(chunk, layer);
    return chunk.meet(where_of(layer + 1, STAGE_QKV));
}

// Grid: cooperative, any number of blocks that are resident together. Block: PANEL_THREADS threads and
// CHUNK_SHARED_BYTES of dynamic shared memory.
extern "C" __global__ void __launch_bounds__(PANEL_THREADS, 1)
    ffmini_chunk(const __grid_constant__ ChunkArgs args) {
    extern __shared__ __align__(128) uint8_t shared_memory[];
    Chunk chunk{args, shared_memory};
    embed(chunk);
    if (!chunk.meet(where_of(0, STAGE_QKV))) return;
#pragma unroll 1
    for (int layer = 0; layer < NUM_LAYERS; ++layer) {
        if (!run_layer(chunk, opaque(layer))) return;
    }
}

// ---- what the host must know of a build: read from the loaded module ----

struct ChunkInfo {
    uint64_t scratch_bytes;
    uint32_t shared_bytes;
    uint32_t threads;
    uint32_t ring_slots;
    uint32_t args_bytes;
    uint32_t residual_size;
};
extern "C" {
__constant__ ChunkInfo ffmini_chunk_info = {SCRATCH_BYTES, CHUNK_SHARED_BYTES, PANEL_THREADS,
                                            PANEL_STAGES,  sizeof(ChunkArgs),  RESIDUAL_SIZE};
}
