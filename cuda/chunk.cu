// A chunk of a prompt in one cooperative launch: up to CHUNK_ROWS tokens of one sequence, from their ids to
// the residual stream after the last layer and their keys and values in the cache. The stages are those of
// ffmini.cu, in the same arithmetic and order of sums, so a row has the same bits here and there. Blocks
// share every stage out in panels (panels.cuh) or units of warps and meet between two stages; what a stage
// leaves lies in the scratch memory.

#include "chunk_attention.cuh"
#include "patience.cuh"
#if WGMMA
#include "panels_wgmma.cuh"
#else
#include "panels_mma.cuh"
#endif

#if !defined(CHUNK_ROWS)
#error "a -D constant of the chunk is missing"
#endif
static_assert(CHUNK_ROWS % PANEL_COLUMNS == 0, "a chunk has whole panels");

// The kernel's one argument; ffmini/kernel.py holds the same struct as a NumPy dtype, a test compares them.
struct ChunkArgs : ModelArgs {
    uint8_t* scratch;       // [SCRATCH_BYTES], zeroed once
    uint64_t* stage_times;  // [MEETINGS][blocks] in nanoseconds: when a block came; only if STAGE_TIMES
    uint32_t* arrived;      // at meetings of the grid, of all blocks; zeroed before each launch
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
constexpr uint64_t TOPS_AT = after(GROUP_SUM_AT, 4ull * CHUNK_GROUPS * CHUNK_ROWS);  // see Sequence
constexpr uint64_t OUTPUTS_AT = after(TOPS_AT, 4ull * CHUNK_ROWS * NUM_HEADS * MAX_SPLITS);
constexpr uint64_t SCRATCH_BYTES = after(OUTPUTS_AT, output_bytes(CHUNK_ROWS));

constexpr int LAYER_MEETINGS = INTEGERS ? 10 : 8;
constexpr int MEETINGS = 1 + NUM_LAYERS * LAYER_MEETINGS;

constexpr int CHUNK_THREADS = PANEL_THREADS + FETCHING_THREADS;
constexpr int CHUNK_SHARED_BYTES =
    RING_STATE_BYTES + max_of(PANEL_STAGES * STAGE_CAPACITY, static_cast<int>(sizeof(AttentionMemory)));
static_assert(CHUNK_SHARED_BYTES <= SHARED_LIMIT, "shared memory is too small for a chunk's attention");

// ---- a block's view of the chunk ----

// Where a block finds what it works on.
struct Place {
    const ChunkArgs& args;
    uint8_t* shared;  // what the ring and attention take turns with

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
    __device__ float* outputs() const { return reinterpret_cast<float*>(args.scratch + OUTPUTS_AT); }
    __device__ float* tops() const { return reinterpret_cast<float*>(args.scratch + TOPS_AT); }
    __device__ float* group_sum() const { return reinterpret_cast<float*>(args.scratch + GROUP_SUM_AT); }

    // Of the layer and the chunk's slot in a cache: [NUM_KV_HEADS][MAX_SEQ_LEN][VECTOR_BYTES].
    __device__ uint8_t* cached(uint8_t* cache, int layer) const {
        const uint64_t slot = static_cast<uint64_t>(layer) * args.num_slots + args.slot;
        return cache + slot * NUM_KV_HEADS * MAX_SEQ_LEN * VECTOR_BYTES;
    }
};

// What a thread knows of the chunk; whether it FETCHES for those that compute, which do all stages but their
// copies. Both go through the stages in the same order.
template <bool FETCHES>
struct Chunk : Place {
    PanelRing ring;
    uint32_t met = 0;  // arrivals that the last meeting had to see

    __device__ Chunk(const ChunkArgs& args, uint8_t* memory)
        : Place{args, memory + RING_STATE_BYTES}, ring(memory, memory + RING_STATE_BYTES) {}

    // What every block did before is done for every block after. False if one did not come.
    __device__ bool meet(int where) {
#if WGMMA
        if constexpr (FETCHES) return hear_of_meeting();
        fence_async_proxy();
#endif
        sync_threads<PANEL_THREADS>();
#if STAGE_TIMES
        if (threadIdx.x == 0) args.stage_times[met + blockIdx.x] = global_timer_ns();
#endif
        met += gridDim.x;
        bool came = true;
        if (threadIdx.x == 0) {
            add_release_32(args.arrived, 1);
            Patience patience(args, where);
            while (came && load_acquire_32(args.arrived) < met) came = patience.more();
        }
        return !sync_threads_or<CHUNK_THREADS>(!came);
    }
};

// Shares `units` out among the grid's warps, neighbours to the warps of a block.
template <class Body>
__device__ __forceinline__ void for_warps(int units, Body body) {
    const int warp = threadIdx.x / 32;
    for (int unit = blockIdx.x * PANEL_WARPS + warp; unit < units; unit += gridDim.x * PANEL_WARPS)
        body(unit);
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

// Stores neighbouring elements of a row from k on, a multiple of eight: of four lanes t each elements 8 i + 2
// t and the next in word i of COUNT, which do not cross a multiple of 32.
template <class M, int COUNT>
__device__ __forceinline__ void store_words(uint8_t* input, int row, int k, const uint32_t (&words)[COUNT]) {
    const int t = threadIdx.x % 4;
    if (INTEGERS || COUNT == 1) {
        for (int i = 0; i < COUNT; ++i) store_pair<M>(input, row, k + 8 * i + 2 * t, words[i]);
        return;
    }
    uint8_t* target = input + static_cast<uint64_t>(row / PANEL_ROWS) * PANEL_OPERANDS<M> +
                      k / PIECE_K * PIECE_BYTES + t * CORE_BYTES + row % PANEL_ROWS * 16 + k % 32 / 8 * 4;
    if constexpr (COUNT == 4) {
        *reinterpret_cast<uint4*>(target) = make_uint4(words[0], words[1], words[2], words[3]);
    } else if constexpr (COUNT == 2) {
        *reinterpret_cast<uint2*>(target) = make_uint2(words[0], words[1]);
    }
}

// Of a segment of a row of M's input the lane's eight elements, bf16.
template <class M>
__device__ __forceinline__ uint4 load_eight(const uint8_t* input, int row, int segment) {
    const int k = segment * SEGMENT + 8 * (threadIdx.x % 32);
    return *reinterpret_cast<const uint4*>(input + 2 * (static_cast<uint64_t>(row) * PLAIN_STRIDE<M> + k));
}

// Turns a segment into integers, of which the warp's lanes have eight elements each.
template <class M>
__device__ __forceinline__ void align_segment(const Place& chunk, const uint4& pairs, int row, int segment) {
    const int lane = threadIdx.x % 32, k = segment * SEGMENT + 8 * lane;
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

// Turns all of M's input into integers, segments of a row by the same warp: they are asked for together.
template <class M>
__device__ __forceinline__ void align_input(const Place& chunk, const uint8_t* input) {
    constexpr int BATCH = min_of(4, M::SEGMENTS), BATCHES = ceil_div(M::SEGMENTS, BATCH);
    for_warps(chunk.args.num_rows * BATCHES, [&](int unit) {
        const int row = unit / BATCHES, first = unit % BATCHES * BATCH;
        uint4 pairs[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i)
            pairs[i] = load_eight<M>(input, row, min_of(first + i, M::SEGMENTS - 1));
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            if (first + i < M::SEGMENTS) align_segment<M>(chunk, pairs[i], row, first + i);
        }
    });
}

// ---- the stages: the blocks have met before each, which returns when this block's share is done ----

// reads: the token ids. writes: residual, hidden, squares.
__device__ __forceinline__ void embed(const Place& chunk) {
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
__device__ __forceinline__ void prepare(const Place& chunk, const uint8_t* input, bool normed) {
    if (normed) {
        for_warps(chunk.args.num_rows, [&](int row) {
            const float scale = inverse_rms<32>(chunk.squares() + row * HIDDEN_TILES);
            if (threadIdx.x % 32 == 0) chunk.norm_scale()[row] = scale;
        });
    }
    if constexpr (INTEGERS) align_input<M>(chunk, input);
}

// Multiplies M, which lies at `offset` in its layer, by its input, of which prepare() has been made.
template <class M, bool FETCHES, class Epilogue>
__device__ __forceinline__ void multiply(Chunk<FETCHES>& chunk, int layer, uint64_t offset,
                                         const uint8_t* input, Epilogue epilogue) {
    const uint8_t* matrix = chunk.args.layers + static_cast<uint64_t>(layer) * LAYER_BYTES + offset;
    const OperandScales scales = {chunk.worth(), chunk.group_sum(), CHUNK_ROWS};
    chunk.ring.template multiply<M, FETCHES>(matrix, INTEGERS ? chunk.planes() : input, scales,
                                             chunk.args.num_rows, epilogue);
}

// A place in a panel, so that what follows from it is computed in the epilogue, not kept over the stages:
// without wgmma registers are short.
__device__ __forceinline__ int anew(int place) {
    return WGMMA ? place : opaque(place);
}

// What the norm scales the rows of a warp's share by.
struct RowScales {
    float of[OCTETS][2];  // [octet][which]

    __device__ RowScales(const float* norm_scale, int first_row) {
#pragma unroll
        for (int octet = 0; octet < OCTETS; ++octet) {
            for (int which = 0; which < 2; ++which) {
                of[octet][which] = norm_scale[first_row + row_in_share(octet, which)];
            }
        }
    }
};

// reads: hidden, prepared. writes: qkv.
template <bool FETCHES>
__device__ __forceinline__ void norm_qkv(Chunk<FETCHES>& chunk, int layer) {
    const float* bias = layer_vectors(chunk.args, layer) + QKV_BIAS_OFFSET;
    multiply<QkvProj>(
        chunk, layer, 0, chunk.hidden(), [&](const auto& share, int first_tile, int first_row, int) {
            first_tile = anew(first_tile), first_row = anew(first_row);
            const RowScales scales(chunk.norm_scale(), first_row);
#pragma unroll
            for (int tile = 0; tile < WARP_TILES; ++tile) {
                for (int half = 0; half < 2; ++half) {
                    const int element = (first_tile + tile) * TILE_ROWS + threadIdx.x % 32 / 4 + 8 * half;
                    if (element >= QKV_SIZE) continue;
                    const bool biased = QKV_BIAS && element < ATTENTION_SIZE + 2 * KV_SIZE;
                    const float addend = biased ? bias[element] : 0.0f;
#pragma unroll
                    for (int octet = 0; octet < OCTETS; ++octet) {
                        for (int which = 0; which < 2; ++which) {
                            float sum = share.sum(tile, octet, half, which) * scales.of[octet][which];
                            if (biased) sum += addend;
                            const int row = first_row + row_in_share(octet, which);
                            chunk.qkv()[row * QKV_SIZE + element] = sum;
                        }
                    }
                }
            }
        });
}

// Norms and rotates a row's vector `v`, of q, k and v one after the other, as they want it, and puts it in
// its place.
__device__ __forceinline__ void place_vector(const Place& chunk, int layer, HeadVector& vector, int row,
                                             int v) {
    const ChunkArgs& args = chunk.args;
    const float* vectors = layer_vectors(args, layer);
    const int position = args.start + row;
    const uint64_t at = static_cast<uint64_t>(position) * (HEAD_DIM / 2);
    const Angles angles = {args.rope_cos + at, args.rope_sin + at};
    if (v < NUM_HEADS) {
        vector.norm_and_rotate(vectors + Q_NORM_OFFSET, angles);
        vector.round(chunk.queries() + (row * NUM_HEADS + v) * HEAD_DIM, [](int d) { return d; });
        return;
    }
    const int head = (v - NUM_HEADS) % NUM_KV_HEADS;
    const uint64_t in_slot = (static_cast<uint64_t>(head) * MAX_SEQ_LEN + position) * VECTOR_BYTES;
    if (v < NUM_HEADS + NUM_KV_HEADS) {
        vector.norm_and_rotate(vectors + K_NORM_OFFSET, angles);
        Vectors::put_key(vector, chunk.cached(args.key_cache, layer) + in_slot, position);
    } else {
        Vectors::put_value(vector, chunk.cached(args.value_cache, layer) + in_slot, position);
    }
}

// reads: qkv. writes: queries, the rows' keys and values into the cache.
__device__ __forceinline__ void rotate(const Place& chunk, int layer) {
    constexpr int VECTORS = NUM_HEADS + 2 * NUM_KV_HEADS, BATCH = 4;
    const ChunkArgs& args = chunk.args;
    const int units = args.num_rows * VECTORS;
    for_warps(ceil_div(units, BATCH), [&](int batch) {
        HeadVector vectors[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int unit = min_of(batch * BATCH + i, units - 1);
            vectors[i].load(chunk.qkv() + unit / VECTORS * QKV_SIZE + unit % VECTORS * HEAD_DIM);
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int unit = min_of(batch * BATCH + i, units - 1);
            place_vector(chunk, layer, vectors[i], unit / VECTORS, unit % VECTORS);
        }
    });
}

// reads: queries, the cache. writes: attention.
__device__ __forceinline__ void attend(const Place& chunk, int layer) {
    const ChunkArgs& args = chunk.args;
    const Sequence sequence = {chunk.queries(),
                               chunk.cached(args.key_cache, layer),
                               chunk.cached(args.value_cache, layer),
                               chunk.outputs(),
                               chunk.tops(),
                               args.start,
                               args.num_rows,
                               WINDOWS[layer]};
    AttentionMemory& memory = *reinterpret_cast<AttentionMemory*>(chunk.shared);
    for (int unit = blockIdx.x; unit < sequence.units(); unit += gridDim.x) {
        AttentionUnit(sequence, unit, memory).run([&](int row, int k, uint32_t pair) {
            store_pair<OProj>(chunk.attention(), row, k, pair);
        });
    }
}

// Adds some octets of a tile's products to the residual, for the norm that comes next. `k`: the lane's first
// output there. Outputs behind HIDDEN_SIZE are zero, as the residual is there.
class ResidualPart {
  public:
    static constexpr int PART_OCTETS = min_of(OCTETS, 8);

    // Asks for all that comes from memory, before any of it is written.
    __device__ ResidualPart(const Place& chunk, int k, int first_row, const float* bias, const float* norm)
        : chunk_(chunk), k_(k), first_row_(first_row) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const bool inside = k + 8 * half < HIDDEN_SIZE;
            norm_[half] = inside ? norm[k + 8 * half] : 0.0f;
            bias_[half] = inside ? bias[k + 8 * half] : 0.0f;
#pragma unroll
            for (int octet = 0; octet < PART_OCTETS; ++octet) {
                for (int which = 0; which < 2; ++which)
                    x_[octet][half][which] = *residual(octet, half, which);
            }
        }
    }

    // Adds an octet's products of a part, sums[half][which], and before them, if BIASED, the bias.
    template <bool BIASED>
    __device__ void add(const float (&sums)[2][2], int octet) {
        for (int half = 0; half < 2; ++half) {
            for (int which = 0; which < 2; ++which) {
                float& x = x_[octet][half][which];
                if (BIASED) x += bias_[half];
                x += sums[half][which];
                *residual(octet, half, which) = x;
            }
        }
    }

    // Leaves the squares of an octet that is complete; what the norm gets of it as bf16 in words[half],
    // transposed.
    __device__ void finish(int octet, uint32_t (&words)[2]) {
        float weighed[2][2];  // [half][which]
        for (int which = 0; which < 2; ++which) {
            float squares[2];
            for (int half = 0; half < 2; ++half) {
                const float x = x_[octet][half][which];
                squares[half] = x * x;
                weighed[half][which] = x * norm_[half];
            }
            float sum = squares[0] + squares[1];
            for (int offset = 16; offset > 2; offset /= 2) sum += __shfl_xor_sync(0xffffffff, sum, offset);
            const int row = first_row_ + row_in_share(octet, which);
            if (threadIdx.x % 32 < 4) chunk_.squares()[row * HIDDEN_TILES + k_ / TILE_ROWS] = sum;
        }
        for (int half = 0; half < 2; ++half) {
            words[half] = transpose(pack_bf16x2(weighed[half][0], weighed[half][1]));
        }
    }

  private:
    __device__ float* residual(int octet, int half, int which) const {
        const int row = first_row_ + row_in_share(octet, which);
        return chunk_.residual() + row * RESIDUAL_SIZE + k_ + 8 * half;
    }

    const Place& chunk_;
    int k_, first_row_;
    float norm_[2], bias_[2];
    float x_[PART_OCTETS][2][2];  // [octet][half][which]
};

// Adds a bias and M's product, part by part, to the residual, for the norm with weights `norm` that comes
// next.
template <class M, bool BIASED, bool FETCHES>
__device__ __forceinline__ void multiply_into_residual(Chunk<FETCHES>& chunk, int layer, uint64_t offset,
                                                       const uint8_t* input, const float* bias,
                                                       const float* norm) {
    multiply<M>(chunk, layer, offset, input, [&](const auto& share, int first_tile, int first_row, int part) {
        first_tile = anew(first_tile), first_row = anew(first_row);
#pragma unroll
        for (int tile = 0; tile < WARP_TILES; ++tile) {
            const int k = (first_tile + tile) * TILE_ROWS;
            if (k >= RESIDUAL_SIZE) break;
            constexpr int PART = ResidualPart::PART_OCTETS;
#pragma unroll
            for (int first = 0; first < OCTETS; first += PART) {
                ResidualPart residual(chunk, k + threadIdx.x % 32 / 4, first_row + 8 * first, bias, norm);
#pragma unroll
                for (int octet = first; octet < first + PART; ++octet) {
                    float sums[2][2];
                    for (int i = 0; i < 4; ++i) sums[i / 2][i % 2] = share.sum(tile, octet, i / 2, i % 2);
                    if (BIASED && part == 0) {
                        residual.template add<true>(sums, octet - first);
                    } else {
                        residual.template add<false>(sums, octet - first);
                    }
                    if (part + 1 < M::PARTS) continue;
                    uint32_t words[2];
                    residual.finish(octet - first, words);
                    const int row = first_row + transposed_row_in_share(octet);
                    store_words<QkvProj>(chunk.hidden(), row, k, words);
                }
            }
        }
    });
}

// reads: attention, prepared; residual. writes: residual, hidden, squares.
template <bool FETCHES>
__device__ __forceinline__ void o_proj(Chunk<FETCHES>& chunk, int layer) {
    const float* vectors = layer_vectors(chunk.args, layer);
    multiply_into_residual<OProj, O_BIAS>(chunk, layer, QkvProj::BYTES, chunk.attention(),
                                          vectors + O_BIAS_OFFSET, vectors + POST_ATTENTION_LAYERNORM_OFFSET);
}

// reads: hidden, prepared. writes: activation.
template <bool FETCHES>
__device__ __forceinline__ void norm_gate_up(Chunk<FETCHES>& chunk, int layer) {
    const float* bias = layer_vectors(chunk.args, layer) + GATE_UP_BIAS_OFFSET;
    constexpr uint64_t OFFSET = QkvProj::BYTES + OProj::BYTES;
    const auto epilogue = [&](const auto& share, int first_tile, int first_row, int) {
        first_tile = anew(first_tile), first_row = anew(first_row);
        if (first_tile >= GateUpProj::TILES) return;
        const RowScales scales(chunk.norm_scale(), first_row);
        float addend[WARP_TILES][2] = {};
        for (int tile = 0; MLP_BIAS && tile < WARP_TILES; ++tile) {
            const int output =
                min_of(first_tile + tile, GateUpProj::TILES - 1) * TILE_ROWS + threadIdx.x % 32 / 4;
            addend[tile][0] = bias[output], addend[tile][1] = bias[output + 8];
        }
#pragma unroll
        for (int octet = 0; octet < OCTETS; ++octet) {
            uint32_t words[WARP_TILES];
#pragma unroll
            for (int tile = 0; tile < WARP_TILES; ++tile) {
                float x[2];
                for (int which = 0; which < 2; ++which) {
                    float gate = share.sum(tile, octet, 0, which) * scales.of[octet][which];
                    float up = share.sum(tile, octet, 1, which) * scales.of[octet][which];
                    if (MLP_BIAS) gate += addend[tile][0], up += addend[tile][1];
                    x[which] = first_tile + tile < GateUpProj::TILES ? silu(gate) * up : 0.0f;
                }
                words[tile] = transpose(pack_bf16x2(x[0], x[1]));
            }
            const int row = first_row + transposed_row_in_share(octet);
            store_words<DownProj>(chunk.activation(), row, first_tile * 8, words);
        }
    };
    multiply<GateUpProj>(chunk, layer, OFFSET, chunk.hidden(), epilogue);
}

// reads: activation, prepared; residual. writes: residual, hidden and squares for the next layer.
template <bool FETCHES>
__device__ __forceinline__ void down_proj(Chunk<FETCHES>& chunk, int layer) {
    const float* vectors = layer_vectors(chunk.args, layer);
    const bool last = layer + 1 == NUM_LAYERS;
    multiply_into_residual<DownProj, MLP_BIAS>(
        chunk, layer, QkvProj::BYTES + OProj::BYTES + GateUpProj::BYTES, chunk.activation(),
        vectors + DOWN_BIAS_OFFSET, last ? chunk.args.norm : vectors + VECTORS_SIZE + INPUT_LAYERNORM_OFFSET);
}

// ---- the chunk ----

// False if a meeting gave up.
template <bool FETCHES>
__device__ __forceinline__ bool run_layer(Chunk<FETCHES>& chunk, int layer) {
    if constexpr (!FETCHES) prepare<QkvProj>(chunk, chunk.hidden(), true);
    if (!chunk.meet(where_of(layer, STAGE_QKV))) return false;
    norm_qkv(chunk, layer);
    if (!chunk.meet(where_of(layer, STAGE_ATTENTION))) return false;
    if constexpr (!FETCHES) rotate(chunk, layer);
    if (!chunk.meet(where_of(layer, STAGE_ATTENTION))) return false;
    if constexpr (!FETCHES) attend(chunk, layer);
    if (!chunk.meet(where_of(layer, STAGE_O))) return false;
    if (INTEGERS) {
        if constexpr (!FETCHES) prepare<OProj>(chunk, chunk.attention(), false);
        if (!chunk.meet(where_of(layer, STAGE_O))) return false;
    }
    o_proj(chunk, layer);
    if (!chunk.meet(where_of(layer, STAGE_GATE_UP))) return false;
    if constexpr (!FETCHES) prepare<GateUpProj>(chunk, chunk.hidden(), true);
    if (!chunk.meet(where_of(layer, STAGE_GATE_UP))) return false;
    norm_gate_up(chunk, layer);
    if (!chunk.meet(where_of(layer, STAGE_DOWN))) return false;
    if (INTEGERS) {
        if constexpr (!FETCHES) prepare<DownProj>(chunk, chunk.activation(), false);
        if (!chunk.meet(where_of(layer, STAGE_DOWN))) return false;
    }
    down_proj(chunk, layer);
    return chunk.meet(where_of(layer + 1, STAGE_QKV));
}

template <bool FETCHES>
__device__ __forceinline__ void run_chunk(const ChunkArgs& args, uint8_t* memory) {
    Chunk<FETCHES> chunk(args, memory);
    if constexpr (!FETCHES) embed(chunk);
    if (!chunk.meet(where_of(0, STAGE_QKV))) return;
#pragma unroll 1
    for (int layer = 0; layer < NUM_LAYERS; ++layer) {
        if (!run_layer(chunk, opaque(layer))) return;
    }
}

// Grid: cooperative, any number of blocks that are resident together. Block: CHUNK_THREADS threads and
// CHUNK_SHARED_BYTES of dynamic shared memory.
extern "C" __global__ void __launch_bounds__(CHUNK_THREADS, 1)
    ffmini_chunk(const __grid_constant__ ChunkArgs args) {
    extern __shared__ __align__(128) uint8_t shared_memory[];
#if WGMMA
    if (threadIdx.x >= PANEL_THREADS) {
        give_up_registers<FETCHING_REGISTERS>();
        run_chunk<true>(args, shared_memory);
        return;
    }
    take_registers<MULTIPLYING_REGISTERS>();
#endif
    run_chunk<false>(args, shared_memory);
}

// ---- what the host must know of a build: read from the loaded module ----

struct ChunkInfo {
    uint64_t scratch_bytes;
    uint32_t shared_bytes;
    uint32_t threads;
    uint32_t ring_slots;
    uint32_t args_bytes;
    uint32_t residual_size;
    uint32_t meetings;
};
extern "C" {
__constant__ ChunkInfo ffmini_chunk_info = {SCRATCH_BYTES, CHUNK_SHARED_BYTES, CHUNK_THREADS,
                                            PANEL_STAGES,  sizeof(ChunkArgs),  RESIDUAL_SIZE,
                                            MEETINGS};
}
