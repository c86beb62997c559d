// The weights as one endless stream per warp. They never change, so a warp fetches ahead over every stage
// and layer border; only its ring's depth limits it, never an activation that is still missing.
#pragma once

#include "config.cuh"

enum Stage {
    STAGE_QKV,
    STAGE_O,
    STAGE_GATE_UP,
    STAGE_DOWN,
    STAGE_LM_HEAD,
    NUM_STAGES,
    STAGE_ATTENTION,
    STAGE_MERGE
};

// Matrix, at run time.
struct MatrixShape {
    int tiles, segments, slots, slots_per_segment, slot_bytes, tail_bytes, tile_bytes;
    uint64_t offset;  // in its layer
};

template <class M>
constexpr MatrixShape shape_of(uint64_t offset) {
    return {M::TILES,      M::SEGMENTS,   M::SLOTS,      M::SLOTS_PER_SEGMENT,
            M::SLOT_BYTES, M::TAIL_BYTES, M::TILE_BYTES, offset};
}

__constant__ MatrixShape SHAPES[NUM_STAGES] = {
    shape_of<QkvProj>(0),
    shape_of<OProj>(QkvProj::BYTES),
    shape_of<GateUpProj>(QkvProj::BYTES + OProj::BYTES),
    shape_of<DownProj>(QkvProj::BYTES + OProj::BYTES + GateUpProj::BYTES),
    shape_of<LmHead>(0),
};

constexpr int SLOT_CAPACITY = max_of(max_of(max_of(QkvProj::SLOT_BYTES, OProj::SLOT_BYTES),
                                            max_of(GateUpProj::SLOT_BYTES, DownProj::SLOT_BYTES)),
                                     LmHead::SLOT_BYTES);

// How many tiles of a matrix this block multiplies: block, block + gridDim.x, ...
__device__ __forceinline__ int own_tiles(int tiles) {
    return (tiles - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) - 1) /
           static_cast<int>(gridDim.x);
}

// One warp's ring of SLOTS slots in shared memory and the cursor that fills it. A block's work in a stage
// is a list of units, one per (own tile, segment of k), segments innermost; warp w takes units w, w + WARPS,
// ... Every call is made by the whole warp.
template <int SLOTS>
class WeightStream {
  public:
    // Starts the first SLOTS fetches.
    __device__ WeightStream(const PassArgs& args, uint8_t* ring) : args_(args), ring_(ring) {
        unit_ = warp();
        seek();
        for (int slot = 0; slot < SLOTS; ++slot) fetch(slot);
    }

    // The oldest fetched slot, once it has landed.
    __device__ const uint8_t* wait() {
        copy_async_wait<SLOTS - 1>();
        __syncwarp();
        return ring_ + head_ * SLOT_CAPACITY;
    }

    // Gives the slot of the last wait() back; the next of the stream is fetched into it.
    __device__ void release() {
        __syncwarp();
        fetch(head_);
        head_ = head_ + 1 == SLOTS ? 0 : head_ + 1;
    }

  private:
    __device__ void fetch(int slot) {
        if (slots_left_ > 0) {
            const MatrixShape& shape = SHAPES[stage_];
            const bool tail = ends_tile_ && slots_left_ == 1;
            const int bytes = tail ? shape.tail_bytes : shape.slot_bytes;
            for (int at = lane() * 16; at < bytes; at += LINE_BYTES) {
                copy_async_16(ring_ + slot * SLOT_CAPACITY + at, next_ + at);
            }
            next_ += bytes;
            if (--slots_left_ == 0) {
                unit_ += WARPS;
                seek();
            }
        }
        copy_async_commit();
    }

    // Moves to the next stage in which this warp has a unit, and to that unit's first slot. At the end of
    // the stream slots_left_ stays 0.
    __device__ void seek() {
        slots_left_ = 0;
        while (unit_ >= own_tiles(SHAPES[stage_].tiles) * SHAPES[stage_].segments) {
            unit_ = warp();
            if (stage_ == STAGE_LM_HEAD) return;
            if (++stage_ == STAGE_LM_HEAD) {
                if (++layer_ < NUM_LAYERS) {
                    stage_ = STAGE_QKV;
                } else if (args_.logits_rows == 0) {
                    return;
                }
            }
        }
        const MatrixShape& shape = SHAPES[stage_];
        const int tile = unit_ / shape.segments, segment = unit_ % shape.segments;
        const uint8_t* matrix =
            stage_ == STAGE_LM_HEAD
                ? args_.lm_head
                : args_.layers + static_cast<uint64_t>(layer_) * LAYER_BYTES + shape.offset;
        const uint64_t row = blockIdx.x + static_cast<uint64_t>(tile) * gridDim.x;
        const int slot = segment * shape.slots_per_segment;
        next_ = matrix + row * shape.tile_bytes + slot * shape.slot_bytes;
        ends_tile_ = segment + 1 == shape.segments;
        slots_left_ = ends_tile_ ? shape.slots - slot : shape.slots_per_segment;
    }

    __device__ int warp() const { return threadIdx.x / 32; }
    __device__ int lane() const { return threadIdx.x % 32; }

    const PassArgs& args_;
    uint8_t* ring_;
    const uint8_t* next_ = nullptr;
    int head_ = 0;                              // the oldest slot
    int layer_ = 0, stage_ = STAGE_QKV, unit_;  // what the cursor fetches next
    int slots_left_ = 0;                        // of its unit; 0 only at the end of the stream
    bool ends_tile_ = false;
};
