// Matrix times many rows, in the canonical order of matvec.cuh: each segment of 256 k from zero, the segments
// added in ascending order. Weights are mma's A operand here too, so a row's bits are those of a pass of few
// rows.
//
// A block works on one panel at a time: 128 outputs by 128 columns, a column being a row of the chunk or, if
// the model is quantised, one of a row's two planes. Weights and operands come in stages through a ring in
// shared memory, by copies of 16 bytes that every GPU since sm_80 has.
#pragma once

#include "arithmetic.cuh"
#include "codes.cuh"

constexpr int PANEL_WARPS = 8;
constexpr int PANEL_THREADS = 32 * PANEL_WARPS;
constexpr int PANEL_TILES = 8;  // of 16 outputs; as many as warps: each copies one
constexpr int PANEL_COLUMNS = 128;
constexpr int PLANES = INTEGERS ? 2 : 1;
constexpr int PANEL_ROWS = PANEL_COLUMNS / PLANES;

// ---- operands: activations as ldmatrix wants them ----
// [panel of columns][piece of k][core][PANEL_COLUMNS][16 bytes]. A piece is 64 bytes of each column: 32 bf16
// or 64 integers. Core 2 s + h has what lane / 4 = column holds in mma step s as operand b_h: the word of
// lane % 4 = t is, of the k with k / 8 % 4 = t, those of bf16 with k % 8 / 2 = 2 s + h; of integers those
// with k / 32 % 2 = s and k % 8 / 4 = h.
constexpr int CORES = 4;
constexpr int CORE_BYTES = PANEL_COLUMNS * 16;
constexpr int PIECE_BYTES = CORES * CORE_BYTES;
constexpr int PIECE_K = INTEGERS ? 64 : 32;
constexpr int STAGE_PIECES = 2;
constexpr int STAGE_K = STAGE_PIECES * PIECE_K;
constexpr int STAGE_OPERANDS = STAGE_PIECES * PIECE_BYTES;

// Bytes of a matrix's operands for one panel of columns; the last stage is whole.
template <class M>
constexpr int PANEL_OPERANDS = ceil_div(M::K_PAD, STAGE_K) * STAGE_OPERANDS;

// ---- a matrix's share of a stage, for one tile ----
template <class M>
struct StageWeights {
    static constexpr int LINES = STAGE_K * M::BITS / 256;
    static constexpr int SCALES = M::BITS == 16 ? 0 : STAGE_K / M::GROUP * TILE_ROWS * M::SCALE_BYTES;
    static constexpr int BYTES = LINES * LINE_BYTES + SCALES;
    static_assert(M::BITS == 16 || STAGE_K % M::GROUP == 0, "a stage ends with a group");
    static_assert(M::SLOT_K % STAGE_K == 0 || STAGE_K == M::SLOT_K, "a slot is cut into whole stages");
};

template <class M>
constexpr int STAGE_BYTES = STAGE_OPERANDS + PANEL_TILES * StageWeights<M>::BYTES;
constexpr int STAGE_CAPACITY = max_of(max_of(STAGE_BYTES<QkvProj>, STAGE_BYTES<OProj>),
                                      max_of(STAGE_BYTES<GateUpProj>, STAGE_BYTES<DownProj>));
constexpr int PANEL_STAGES = min_of(6, SHARED_LIMIT / STAGE_CAPACITY);
static_assert(PANEL_STAGES >= 2, "shared memory is too small for a ring of stages");

// What of a quantised matrix's operands stands beside them.
struct OperandScales {
    const float* worth;      // [segment][rows]: what one is worth
    const float* group_sum;  // [group of int4's scales][rows]
    int stride;              // rows
};

// The panels of one matrix that a block takes: block, block + gridDim.x, ... of them, those of the same
// outputs next to each other, so that their weights come from memory once.
class PanelList {
  public:
    __device__ PanelList(int tiles, int rows)
        : columns_(ceil_div(rows, PANEL_ROWS)), count_(ceil_div(tiles, PANEL_TILES) * columns_) {}
    __device__ int count() const { return count_; }
    __device__ int first_tile(int panel) const { return panel / columns_ * PANEL_TILES; }
    __device__ int column_panel(int panel) const { return panel % columns_; }

  private:
    int columns_, count_;
};

// Copies the stages of a block's panels, one after the other, into the ring.
template <class M>
class PanelFetcher {
  public:
    __device__ PanelFetcher(const uint8_t* matrix, const uint8_t* operands, const PanelList& panels,
                            uint8_t* ring)
        : matrix_(matrix), operands_(operands), panels_(panels), ring_(ring), panel_(blockIdx.x) {
        enter();
    }

    // The next stage into the next place of the ring; a group of copies is closed for it, be it empty.
    __device__ void fetch() {
        if (panel_ < panels_.count()) {
            copy();
            if ((k_ += STAGE_K) >= M::K_PAD) panel_ += gridDim.x, enter();
        }
        copy_async_commit();
        if (++place_ == PANEL_STAGES) place_ = 0;
    }

  private:
    __device__ void enter() {
        k_ = 0;
        if (panel_ >= panels_.count()) return;
        // A panel may have fewer tiles than warps; what the others copy is not used.
        const int tile =
            min_of(panels_.first_tile(panel_) + static_cast<int>(threadIdx.x) / 32, M::TILES - 1);
        tile_ = matrix_ + static_cast<uint64_t>(tile) * M::TILE_BYTES;
        columns_ = operands_ + static_cast<uint64_t>(panels_.column_panel(panel_)) * PANEL_OPERANDS<M>;
    }

    __device__ void copy() const {
        uint8_t* stage = ring_ + place_ * STAGE_CAPACITY;
        const uint8_t* columns = columns_ + k_ / STAGE_K * STAGE_OPERANDS;
#pragma unroll
        for (int at = 16 * threadIdx.x; at < STAGE_OPERANDS; at += 16 * PANEL_THREADS) {
            copy_async_16(stage + at, columns + at);
        }
        using Weights = StageWeights<M>;
        const int lane = threadIdx.x % 32, slot = k_ / M::SLOT_K, in_slot = k_ % M::SLOT_K;
        uint8_t* target = stage + STAGE_OPERANDS + threadIdx.x / 32 * Weights::BYTES;
        const uint8_t* source = tile_ + static_cast<uint64_t>(slot) * M::SLOT_BYTES;
        const int lines = min_of(Weights::LINES, (M::K_PAD - k_) * M::BITS / 256);
#pragma unroll
        for (int line = 0; line < Weights::LINES; ++line) {
            const int at = line * LINE_BYTES + lane * 16;
            if (M::TAIL_K % STAGE_K == 0 || line < lines) {
                copy_async_16(target + at, source + in_slot * M::BITS / 256 * LINE_BYTES + at);
            }
        }
        if constexpr (Weights::SCALES > 0) {
            const int slot_k = slot + 1 == M::SLOTS ? M::TAIL_K : M::SLOT_K;
            const int groups = min_of(STAGE_K / M::GROUP, ceil_div(M::K_PAD - k_, M::GROUP));
            const int bytes = groups * TILE_ROWS * M::SCALE_BYTES;
            source += slot_k * M::BITS / 256 * LINE_BYTES + in_slot / M::GROUP * TILE_ROWS * M::SCALE_BYTES;
            if (lane * 16 < bytes) {
                copy_async_16(target + Weights::LINES * LINE_BYTES + lane * 16, source + lane * 16);
            }
        }
    }

    const uint8_t *matrix_, *operands_;
    const PanelList& panels_;
    uint8_t* ring_;
    const uint8_t *tile_, *columns_;  // of the panel: the warp's weights, the operands
    int panel_, k_, place_ = 0;
};

// ---- a warp's share of a panel: 64 outputs by 32 columns ----
constexpr int WARP_TILES = 4;  // of 16 outputs
constexpr int WARP_SETS = 4;   // of 8 columns
constexpr int WARP_COLUMNS = 8 * WARP_SETS;
constexpr int WARPS_ACROSS = PANEL_COLUMNS / WARP_COLUMNS;

struct WarpPlace {
    int tile, column;  // the first of the panel's that the warp has

    __device__ WarpPlace() {
        const int warp = threadIdx.x / 32;
        tile = warp / WARPS_ACROSS * WARP_TILES, column = warp % WARPS_ACROSS * WARP_COLUMNS;
    }
};

// A pair of octets of rows, as epilogues see it: OCTETS of eight rows each, of which a lane has two.
constexpr int OCTETS = WARP_COLUMNS / PLANES / 8;

// The row, counted in the warp's share, that lane % 4 = t has as number `which` of an octet.
__device__ __forceinline__ int row_in_share(int octet, int which) {
    const int t = threadIdx.x % 4;
    return 8 * octet + (INTEGERS ? 4 * which + t : 2 * t + which);
}

// The one that a lane gets when the octet's pairs are transposed.
__device__ __forceinline__ int transposed_row_in_share(int octet) {
    const int g = threadIdx.x % 32 / 4;
    return 8 * octet + (INTEGERS ? g % 2 * 4 + g / 2 : g);
}

// Of a tile and a stage of weights in shared memory the A fragments of a piece's two steps.
template <class M, int BITS = M::BITS>
struct PieceWeights {
    static __device__ void load(const uint8_t* lines, int piece, uint32_t (&a)[2][4]) {
        Codes<M>::load(lines, piece, a);
    }
};
template <class M>
struct PieceWeights<M, 16> {
    static __device__ void load(const uint8_t* lines, int piece, uint32_t (&a)[2][4]) {
        for (int step = 0; step < 2; ++step) {
            const uint4 line = load_line(lines, 2 * piece + step);
            a[step][0] = line.x, a[step][1] = line.y, a[step][2] = line.z, a[step][3] = line.w;
        }
    }
};

// Multiplies a warp's share of a panel, stage by stage. sum(tile, octet, half, which) is the result for
// output lane / 4 + 8 half of the tile and row row_in_share(octet, which).
template <class M, bool INTEGER = M::BITS != 16>
class Share;

template <class M>
class Share<M, false> {
  public:
    __device__ void add_step(int tile, const uint32_t (&a)[4], const uint32_t (&b)[WARP_SETS][4], int step,
                             int, int, const uint8_t*, const OperandScales&, int) {
#pragma unroll
        for (int set = 0; set < WARP_SETS; ++set) {
            mma_16x8x16(products_[tile][set], a, b[set][2 * step], b[set][2 * step + 1]);
        }
    }

    // Adds the finished segment and begins the next.
    __device__ void end_segment(int, const OperandScales&, int) {
#pragma unroll
        for (int tile = 0; tile < WARP_TILES; ++tile) {
#pragma unroll
            for (int set = 0; set < WARP_SETS; ++set) {
                for (int i = 0; i < 4; ++i) {
                    sum_[tile][set][i] += products_[tile][set][i];
                    products_[tile][set][i] = 0.0f;
                }
            }
        }
    }

    __device__ float sum(int tile, int octet, int half, int which) const {
        return sum_[tile][octet][2 * half + which];
    }

  private:
    float products_[WARP_TILES][WARP_SETS][4] = {};
    float sum_[WARP_TILES][WARP_SETS][4] = {};
};

template <class M>
class Share<M, true> {
  public:
    __device__ void add_step(int tile, const uint32_t (&a)[4], const uint32_t (&b)[WARP_SETS][4], int step,
                             int k, int group, const uint8_t* scales, const OperandScales& operands,
                             int first_row) {
#pragma unroll
        for (int set = 0; set < WARP_SETS; ++set) {
            Codes<M>::multiply(products_[tile][set], a, b[set][2 * step], b[set][2 * step + 1]);
        }
        if ((k + 32) % M::GROUP == 0 || k + 32 == M::K_PAD) {
            add_group(tile, group, scales, operands, first_row);
        }
    }

    __device__ void end_segment(int segment, const OperandScales& operands, int first_row) {
        for (int set = 0; set < WARP_SETS; ++set) {
            const int row = first_row + 4 * set + threadIdx.x % 4;
            const float worth = operands.worth[segment * operands.stride + row];
#pragma unroll
            for (int tile = 0; tile < WARP_TILES; ++tile) {
                for (int half = 0; half < 2; ++half) {
                    sum_[tile][set][half] += segment_[tile][set][half] * worth;
                    segment_[tile][set][half] = 0.0f;
                }
            }
        }
    }

    __device__ float sum(int tile, int octet, int half, int which) const {
        return sum_[tile][2 * octet + which][half];
    }

  private:
    // Adds the finished products of a group and begins the next.
    __device__ void add_group(int tile, int group, const uint8_t* scales, const OperandScales& operands,
                              int first_row) {
        const int g = threadIdx.x % 32 / 4;
        for (int set = 0; set < WARP_SETS; ++set) {
            int (&products)[4] = products_[tile][set];
            float group_sum = 0.0f;
            if constexpr (M::BITS == 4) {
                const int row = first_row + 4 * set + threadIdx.x % 4;
                group_sum = operands.group_sum[group * operands.stride + row];
            }
            for (int half = 0; half < 2; ++half) {
                float& sum = segment_[tile][set][half];
                sum = Codes<M>::scaled(Codes<M>::exact(products, half), group_sum, scales, g + 8 * half, sum);
            }
            for (int i = 0; i < 4; ++i) products[i] = 0;
        }
    }

    int products_[WARP_TILES][WARP_SETS][4] = {};
    float segment_[WARP_TILES][WARP_SETS][2] = {};
    float sum_[WARP_TILES][WARP_SETS][2] = {};
};

// Multiplies one stage, which is in shared memory; `k` is its first.
template <class M>
__device__ __forceinline__ void multiply_stage(Share<M>& share, const uint8_t* stage, int k,
                                               const WarpPlace& place, const OperandScales& operands,
                                               int first_row) {
    using Weights = StageWeights<M>;
    const int lane = threadIdx.x % 32;
    const uint8_t* columns = stage + lane / 8 * CORE_BYTES + (place.column + lane % 8) * 16;
    const uint8_t* tiles = stage + STAGE_OPERANDS + place.tile * Weights::BYTES;
#pragma unroll
    for (int piece = 0; piece < STAGE_PIECES; ++piece) {
        const int piece_k = k + piece * PIECE_K;
        if (M::K_PAD % STAGE_K != 0 && piece_k >= M::K_PAD) break;
        uint32_t b[WARP_SETS][4];
#pragma unroll
        for (int set = 0; set < WARP_SETS; ++set) {
            load_matrices(b[set], columns + piece * PIECE_BYTES + set * 128);
        }
#pragma unroll
        for (int tile = 0; tile < WARP_TILES; ++tile) {
            const uint8_t* lines = tiles + tile * Weights::BYTES;
            uint32_t a[2][4];
            PieceWeights<M>::load(lines + lane * 16, piece, a);
#pragma unroll
            for (int step = 0; step < 2; ++step) {
                const int in_stage = piece * PIECE_K + step * PIECE_K / 2;
                const uint8_t* scales = lines + Weights::LINES * LINE_BYTES;
                if constexpr (M::BITS != 16) scales += in_stage / M::GROUP * TILE_ROWS * M::SCALE_BYTES;
                share.add_step(tile, a[step], b, step, k + in_stage, (k + in_stage) / M::GROUP, scales,
                               operands, first_row);
            }
        }
    }
}

// All threads of the block multiply its panels of M by `rows` rows of operands. For each panel the epilogue
// gets the warp's share, the number of its first tile of outputs in M and its first row. `ring`:
// PANEL_STAGES * STAGE_CAPACITY bytes of shared memory, free again when it returns.
template <class M, class Epilogue>
__device__ __forceinline__ void multiply_panels(const uint8_t* matrix, const uint8_t* operands,
                                                const OperandScales& scales, int rows, uint8_t* ring,
                                                Epilogue epilogue) {
    const PanelList panels(M::TILES, rows);
    PanelFetcher<M> fetcher(matrix, operands, panels, ring);
    for (int i = 0; i < PANEL_STAGES - 1; ++i) fetcher.fetch();
    const WarpPlace warp;
    int place = 0;
#pragma unroll 1
    for (int panel = blockIdx.x; panel < panels.count(); panel += gridDim.x) {
        const int first_row = panels.column_panel(panel) * PANEL_ROWS + warp.column / PLANES;
        Share<M> share;
#pragma unroll 1
        for (int k = 0; k < M::K_PAD; k += STAGE_K) {
            copy_async_wait<PANEL_STAGES - 2>();
            __syncthreads();  // the stage is whole, and nobody is at the place that is filled next
            fetcher.fetch();
            multiply_stage(share, ring + place * STAGE_CAPACITY, k, warp, scales, first_row);
            if (++place == PANEL_STAGES) place = 0;
            if ((k + STAGE_K) % SEGMENT == 0 || k + STAGE_K >= M::K_PAD) {
                share.end_segment(k / SEGMENT, scales, first_row);
            }
        }
        epilogue(share, panels.first_tile(panel) + warp.tile, first_row);
    }
    copy_async_wait<0>();
    __syncthreads();
}
