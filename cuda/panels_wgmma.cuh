// Panels on sm_90: wgmma by two groups of four warps, 64 outputs by all columns each. Weights multiply from
// registers, columns from shared memory, where they are read once for four warps. A third group fetches:
// operands, which lie together, by one bulk copy for a stage, weights 16 bytes by 16 bytes, since small bulk
// copies wait for each other (tools/PERFORMANCE.md).
#pragma once

#include "panels.cuh"

constexpr int PANEL_FETCH_WARPS = 4;
constexpr int FETCHING_THREADS = 32 * PANEL_FETCH_WARPS;  // besides those that multiply
// Of a thread, by what it does; together what a multiprocessor has.
constexpr int FETCHING_REGISTERS = 40, MULTIPLYING_REGISTERS = 232;

struct PanelRingState {
    uint64_t full[PANEL_STAGES], empty[PANEL_STAGES];
};
static_assert(sizeof(PanelRingState) <= RING_STATE_BYTES, "the ring's state has its place");

// ---- multiplying ----

template <class M>
__device__ __forceinline__ void multiply_step_async(Share<M>& share, const uint32_t (&a)[4], uint64_t columns,
                                                    bool add) {
    if constexpr (M::BITS == 16) wgmma_64x128x16(share.products(0), a, columns, add);
    if constexpr (M::BITS == 8) wgmma_64x128x32_signed(share.products(0), a, columns, add);
    if constexpr (M::BITS == 4) wgmma_64x128x32_unsigned(share.products(0), a, columns, add);
}

// The two groups' products of integers take turns, so that one adds while the other multiplies.
__device__ __forceinline__ void wait_for_turn() {
    wait_turn(threadIdx.x / 128);
}
__device__ __forceinline__ void end_turn() {
    pass_turn(1 - threadIdx.x / 128);
}

// Multiplies one stage, which is in shared memory; `k` is its first. Nothing of it is needed any more when it
// returns.
template <class M>
__device__ __forceinline__ void multiply_stage(Share<M>& share, const uint8_t* stage, int k,
                                               const WarpPlace& place, const OperandScales& operands,
                                               int first_row) {
    const uint8_t* lines = stage + STAGE_OPERANDS + place.tile * StageWeights<M>::BYTES;
    const uint64_t columns = operand_descriptor(stage, CORE_BYTES, 128);
    uint32_t a[STAGE_PIECES][2][4];
#pragma unroll
    for (int piece = 0; piece < STAGE_PIECES; ++piece) {
        PieceWeights<M>::load(lines + threadIdx.x % 32 * 16, piece, a[piece]);
    }
    GroupSums<M> sums;
    if (INTEGERS) wait_for_turn();
    wgmma_fence();
#pragma unroll
    for (int piece = 0; piece < STAGE_PIECES; ++piece) {
        if (M::K_PAD % STAGE_K != 0 && k + piece * PIECE_K >= M::K_PAD) break;
#pragma unroll
        for (int step = 0; step < 2; ++step) {
            const int in_stage = piece * PIECE_K + step * PIECE_K / 2;
            const int offset = piece * PIECE_BYTES + 2 * step * CORE_BYTES;
            if (M::BITS != 16 && Share<M>::begins(k + in_stage)) {
                sums.load(operands, (k + in_stage) / M::GROUP, first_row);  // early: it takes a while
            }
            multiply_step_async(share, a[piece][step], columns + offset / 16,
                                !Share<M>::begins(k + in_stage));
            if (Share<M>::ends_group(k + in_stage)) {
                const bool last = piece + 1 == STAGE_PIECES && step == 1;
                wgmma_commit();
                if (last) end_turn();
                wgmma_wait<0>();
                share.add_group(0, scales_in_stage<M>(lines, in_stage), sums);
                if (last) return;
                wgmma_fence();
            }
        }
    }
    wgmma_commit();
    if (INTEGERS) end_turn();  // the matrix ends in the middle of the stage
    wgmma_wait<0>();
}

// What the fetching threads do at a meeting of the blocks: they wait for its end. False if it gave up.
__device__ __forceinline__ bool hear_of_meeting() {
    return !sync_threads_or<PANEL_THREADS + FETCHING_THREADS>(false);
}

// The ring of stages, which goes on from one matrix to the next.
class PanelRing {
  public:
    // All threads of the block make it. `state`: RING_STATE_BYTES, `memory`: PANEL_STAGES * STAGE_CAPACITY
    // bytes of shared memory, of which the latter is free again after each call.
    __device__ PanelRing(uint8_t* state, uint8_t* memory)
        : state_(*reinterpret_cast<PanelRingState*>(state)), memory_(memory) {
        if (threadIdx.x == 0) {
            for (int i = 0; i < PANEL_STAGES; ++i) {
                mbarrier_init(state_.full + i, FETCHING_THREADS + 1);
                mbarrier_init(state_.empty + i, PANEL_WARPS);
            }
            mbarrier_init_fence();
        }
        __syncthreads();
    }

    // As in panels_mma.cuh; called with FETCHES by the fetching threads, which the epilogue does not concern.
    template <class M, bool FETCHES, class Epilogue>
    __device__ void multiply(const uint8_t* matrix, const uint8_t* operands, const OperandScales& scales,
                             int rows, Epilogue epilogue) {
        const PanelList panels(M::TILES, rows);
        if constexpr (FETCHES) {
            fetch<M>(matrix, operands, panels);
            return;
        }
        const WarpPlace warp;
        if (INTEGERS && threadIdx.x >= 128) end_turn();  // the first group begins
#pragma unroll 1
        for (int panel = blockIdx.x; panel < panels.count(); panel += gridDim.x) {
            const int first_row = panels.column_panel(panel) * PANEL_ROWS + warp.column / PLANES;
#pragma unroll 1
            for (int part = 0; part < M::PARTS; ++part) {
                Share<M> share;
                const int end = min_of((part + 1) * PART_K<M>, M::K_PAD);
#pragma unroll 1
                for (int k = part * PART_K<M>; k < end; k += STAGE_K) {
                    await_copy(state_.full + place_, parity_);
                    multiply_stage(share, memory_ + place_ * STAGE_CAPACITY, k, warp, scales, first_row);
                    const bool served = all_have(share.seen());
                    __syncwarp();  // all lanes have read the scales
                    if (served && threadIdx.x % 32 == 0) mbarrier_arrive(state_.empty + place_);
                    advance();
                    if ((k + STAGE_K) % SEGMENT == 0 || k + STAGE_K >= end) {
                        share.end_segment(k / SEGMENT, scales, first_row);
                    }
                }
                epilogue(share, panels.first_tile(panel) + warp.tile, first_row, part);
            }
        }
        if (INTEGERS && threadIdx.x < 128) wait_for_turn();  // the second has passed it on
    }

  private:
    template <class M>
    __device__ void fetch(const uint8_t* matrix, const uint8_t* operands, const PanelList& panels) {
        fence_async_proxy();                                    // what other blocks stored is seen by copies
        constexpr int TILES = PANEL_TILES / PANEL_FETCH_WARPS;  // of a warp
        const int first = (threadIdx.x - PANEL_THREADS) / 32 * TILES;
#pragma unroll 1
        for (int panel = blockIdx.x; panel < panels.count(); panel += gridDim.x) {
            const uint8_t* columns =
                operands + static_cast<uint64_t>(panels.column_panel(panel)) * PANEL_OPERANDS<M>;
#pragma unroll 1
            for (int k = 0; k < M::K_PAD; k += STAGE_K) {
                await_copy(state_.empty + place_, parity_ ^ 1);
                uint8_t* stage = memory_ + place_ * STAGE_CAPACITY;
                if (threadIdx.x == PANEL_THREADS) {
                    mbarrier_arrive_expect(state_.full + place_, STAGE_OPERANDS);
                    copy_bulk(stage, columns + k / STAGE_K * STAGE_OPERANDS, STAGE_OPERANDS,
                              state_.full + place_);
                }
                __syncwarp();
#pragma unroll
                for (int i = first; i < first + TILES; ++i) {
                    // A panel may have fewer tiles; what is fetched for the others is not used.
                    const int tile = min_of(panels.first_tile(panel) + i, M::TILES - 1);
                    copy_weights<M>(stage, i, matrix + static_cast<uint64_t>(tile) * M::TILE_BYTES, k);
                }
                copy_async_arrive(state_.full + place_);
                advance();
            }
        }
    }

    __device__ void advance() {
        if (++place_ == PANEL_STAGES) place_ = 0, parity_ ^= 1;
    }

    PanelRingState& state_;
    uint8_t* memory_;
    int place_ = 0;
    uint32_t parity_ = 0;
};
