// Matrix times many rows, in the canonical order of matvec.cuh: each segment of 256 k from zero, the segments
// added in ascending order. Weights are mma's A operand here too, so a row's bits are those of a pass of few
// rows.
//
// A block works on one panel at a time: 128 outputs by 128 columns, a column being a row of the chunk or, if
// the model is quantised, one of a row's two planes. Weights and operands come in stages through a ring in
// shared memory. How they come and what multiplies them is in panels_wgmma.cuh for sm_90, in panels_mma.cuh
// for all others; the bits are the same (tests/test_gpu.py).
#pragma once

#include "arithmetic.cuh"
#include "codes.cuh"
#include "patience.cuh"

#if !defined(WGMMA)
#error "a -D constant of the panels is missing"
#endif

constexpr int PANEL_WARPS = 8;
constexpr int PANEL_THREADS = 32 * PANEL_WARPS;
constexpr int PANEL_TILES = 8;  // of 16 outputs
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

// Of a part of a matrix's input, all but the last.
template <class M>
constexpr int PART_K = M::IN_PART * SEGMENT;

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
constexpr int RING_STATE_BYTES = 128;  // before the ring
constexpr int PANEL_STAGES = min_of(6, (SHARED_LIMIT - RING_STATE_BYTES) / STAGE_CAPACITY);
static_assert(PANEL_STAGES >= 2, "shared memory is too small for a ring of stages");

// A warp starts copying a tile's share of the stage from `k` on to its place as number `in_panel` of the
// panel.
template <class M>
__device__ __forceinline__ void copy_weights(uint8_t* stage, int in_panel, const uint8_t* tile, int k) {
    using Weights = StageWeights<M>;
    const int lane = threadIdx.x % 32, slot = k / M::SLOT_K, in_slot = k % M::SLOT_K;
    uint8_t* target = stage + STAGE_OPERANDS + in_panel * Weights::BYTES;
    const uint8_t* source = tile + static_cast<uint64_t>(slot) * M::SLOT_BYTES;
    const int lines = min_of(Weights::LINES, (M::K_PAD - k) * M::BITS / 256);
#pragma unroll
    for (int line = 0; line < Weights::LINES; ++line) {
        const int at = line * LINE_BYTES + lane * 16;
        if (M::TAIL_K % STAGE_K == 0 || line < lines) {
            copy_async_16(target + at, source + in_slot * M::BITS / 256 * LINE_BYTES + at);
        }
    }
    if constexpr (Weights::SCALES > 0) {
        const int slot_k = slot + 1 == M::SLOTS ? M::TAIL_K : M::SLOT_K;
        const int groups = min_of(STAGE_K / M::GROUP, ceil_div(M::K_PAD - k, M::GROUP));
        const int bytes = groups * TILE_ROWS * M::SCALE_BYTES;
        source += slot_k * M::BITS / 256 * LINE_BYTES + in_slot / M::GROUP * TILE_ROWS * M::SCALE_BYTES;
        if (lane * 16 < bytes) {
            copy_async_16(target + Weights::LINES * LINE_BYTES + lane * 16, source + lane * 16);
        }
    }
}

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

// ---- a warp's share of a panel ----

constexpr int WARP_TILES = WGMMA ? 1 : 4;  // of 16 outputs
constexpr int WARP_SETS = WGMMA ? 16 : 4;  // of 8 columns
constexpr int WARP_COLUMNS = 8 * WARP_SETS;
constexpr int WARPS_ACROSS = PANEL_COLUMNS / WARP_COLUMNS;

struct WarpPlace {
    int tile, column;  // the first of the panel's that the warp has

    __device__ WarpPlace() {
        const int warp = threadIdx.x / 32;
        tile = warp / WARPS_ACROSS * WARP_TILES, column = warp % WARPS_ACROSS * WARP_COLUMNS;
    }
};

// A share's rows, as epilogues see them: OCTETS of eight, of which a lane has two.
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
        uint4 line[Codes<M>::LINES];
        for (int i = 0; i < Codes<M>::LINES; ++i) line[i] = load_line(lines, piece * Codes<M>::LINES + i);
        Codes<M>::fragments(line, a);
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

// The sums of the integers in a group of int4's scales, of the rows that a lane has.
template <class M>
struct GroupSums {
    float of[M::BITS == 4 ? WARP_SETS : 1];

    __device__ void load(const OperandScales& operands, int group, int first_row) {
        if constexpr (M::BITS == 4) {
            const float* sums = operands.group_sum + group * operands.stride + first_row + threadIdx.x % 4;
#pragma unroll
            for (int set = 0; set < WARP_SETS; ++set) of[set] = sums[4 * set];
        }
    }
    __device__ float operator[](int set) const { return M::BITS == 4 ? of[set] : 0.0f; }
};

// A warp's share of a panel while it grows: products are added to products(tile) and taken from there when a
// group of scales or a segment ends. Then sum(tile, octet, half, which) is the result for output lane / 4 + 8
// half of the tile and row row_in_share(octet, which).
template <class M, bool INTEGER = M::BITS != 16>
class Share;

template <class M>
class Share<M, false> {
  public:
    __device__ auto& products(int tile) { return products_[tile]; }

    // Made of all that was read in a stage but weights, whose products have been waited for.
    __device__ float seen() const { return 0.0f; }

    // Products begin with a segment.
    static __device__ bool ends_group(int) { return false; }
    static __device__ bool begins(int k) { return k % SEGMENT == 0; }
    __device__ void add_group(int, const uint8_t*, const GroupSums<M>&) {}

    // Adds the finished segment; the next begins from zero.
    __device__ void end_segment(int, const OperandScales&, int) {
#pragma unroll
        for (int tile = 0; tile < WARP_TILES; ++tile) {
#pragma unroll
            for (int set = 0; set < WARP_SETS; ++set) {
                for (int i = 0; i < 4; ++i) {
                    sum_[tile][set][i] += products_[tile][set][i];
                    if (!WGMMA) products_[tile][set][i] = 0.0f;
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
    __device__ auto& products(int tile) { return products_[tile]; }

    __device__ float seen() const { return segment_[0][0][0] + segment_[0][0][1]; }

    // Products begin with a group of scales; step `k` .. k + 31 may end one.
    static __device__ bool ends_group(int k) { return (k + 32) % M::GROUP == 0 || k + 32 == M::K_PAD; }
    static __device__ bool begins(int k) { return k % M::GROUP == 0; }

    // Adds the finished products of a group to the segment; the next begins from zero.
    __device__ void add_group(int tile, const uint8_t* scales, const GroupSums<M>& group_sums) {
        const int g = threadIdx.x % 32 / 4;
#pragma unroll
        for (int set = 0; set < WARP_SETS; ++set) {
            int (&products)[4] = products_[tile][set];
            for (int half = 0; half < 2; ++half) {
                float& sum = segment_[tile][set][half];
                sum = Codes<M>::scaled(Codes<M>::exact(products, half), group_sums[set],
                                       load_scale<M>(scales, g + 8 * half), sum);
            }
            for (int i = 0; !WGMMA && i < 4; ++i) products[i] = 0;  // wgmma begins from zero itself
        }
    }

    __device__ void end_segment(int segment, const OperandScales& operands, int first_row) {
#pragma unroll
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
    int products_[WARP_TILES][WARP_SETS][4] = {};
    float segment_[WARP_TILES][WARP_SETS][2] = {};
    float sum_[WARP_TILES][WARP_SETS][2] = {};
};

// The scales of the group in which k, counted in its stage, lies.
template <class M>
__device__ __forceinline__ const uint8_t* scales_in_stage(const uint8_t* lines, int k) {
    const int group = M::BITS == 16 ? 0 : k / M::GROUP;
    return lines + StageWeights<M>::LINES * LINE_BYTES + group * TILE_ROWS * M::SCALE_BYTES;
}
