// Panels on every GPU since sm_80: mma.sync, and copies of 16 bytes that the computing warps start
// themselves.
#pragma once

#include "panels.cuh"

constexpr int FETCHING_THREADS = 0;  // besides those that multiply

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
        copy_weights<M>(stage, threadIdx.x / 32, tile_, k_);
    }

    const uint8_t *matrix_, *operands_;
    const PanelList& panels_;
    uint8_t* ring_;
    const uint8_t *tile_, *columns_;  // of the panel: the warp's weights, the operands
    int panel_, k_, place_ = 0;
};

// Multiplies one step of a tile by the columns' operands.
template <class M>
__device__ __forceinline__ void multiply_step(Share<M>& share, int tile, const uint32_t (&a)[4],
                                              const uint32_t (&b)[WARP_SETS][4], int step) {
#pragma unroll
    for (int set = 0; set < WARP_SETS; ++set) {
        auto& products = share.products(tile)[set];
        if constexpr (M::BITS == 16) {
            mma_16x8x16(products, a, b[set][2 * step], b[set][2 * step + 1]);
        } else {
            Codes<M>::multiply(products, a, b[set][2 * step], b[set][2 * step + 1]);
        }
    }
}

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
                multiply_step<M>(share, tile, a[step], b, step);
                if (Share<M>::ends_group(k + in_stage)) {
                    GroupSums<M> sums;
                    sums.load(operands, (k + in_stage) / M::GROUP, first_row);
                    share.add_group(tile, scales_in_stage<M>(lines, in_stage), sums);
                }
            }
        }
    }
}

// All threads of the block multiply its panels of M by `rows` rows of operands. For each panel and part of
// M's input, in their order, the epilogue gets the warp's share, the number of its first tile of outputs in
// M, its first row and the part.
class PanelRing {
  public:
    // `memory`: PANEL_STAGES * STAGE_CAPACITY bytes of shared memory, free again after each call.
    __device__ PanelRing(uint8_t*, uint8_t* memory) : memory_(memory) {}

    template <class M, bool FETCHES, class Epilogue>
    __device__ void multiply(const uint8_t* matrix, const uint8_t* operands, const OperandScales& scales,
                             int rows, Epilogue epilogue) {
        const PanelList panels(M::TILES, rows);
        PanelFetcher<M> fetcher(matrix, operands, panels, memory_);
        for (int i = 0; i < PANEL_STAGES - 1; ++i) fetcher.fetch();
        const WarpPlace warp;
        int place = 0;
#pragma unroll 1
        for (int panel = blockIdx.x; panel < panels.count(); panel += gridDim.x) {
            const int first_row = panels.column_panel(panel) * PANEL_ROWS + warp.column / PLANES;
#pragma unroll 1
            for (int part = 0; part < M::PARTS; ++part) {
                Share<M> share;
                const int end = min_of((part + 1) * PART_K<M>, M::K_PAD);
#pragma unroll 1
                for (int k = part * PART_K<M>; k < end; k += STAGE_K) {
                    copy_async_wait<PANEL_STAGES - 2>();
                    __syncthreads();  // the stage is whole, and nobody is at the place that is filled next
                    fetcher.fetch();
                    multiply_stage(share, memory_ + place * STAGE_CAPACITY, k, warp, scales, first_row);
                    if (++place == PANEL_STAGES) place = 0;
                    if ((k + STAGE_K) % SEGMENT == 0 || k + STAGE_K >= end) {
                        share.end_segment(k / SEGMENT, scales, first_row);
                    }
                }
                epilogue(share, panels.first_tile(panel) + warp.tile, first_row, part);
            }
        }
        copy_async_wait<0>();
        __syncthreads();
    }

  private:
    uint8_t* memory_;
};
