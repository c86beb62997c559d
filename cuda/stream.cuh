// What a pass reads of weights and earlier keys and values, as one endless stream per warp. None of it
// changes during the pass, so a warp's stream runs ahead over every stage and layer border; only its ring's
// depth limits it, never an activation that is still missing.
//
// Two rings with one interface: BulkRing with bulk copies (sm_90 and newer) and CopyRing with copies of 16
// bytes. Every call is made by the whole warp.
#pragma once

#include "items.cuh"
#include "patience.cuh"

// Matrix, at run time.
struct MatrixShape {
    int tiles, segments, held_segments, held_parts, first_warp, slots, slots_per_segment, slot_bytes,
        tail_bytes, tile_bytes;
    uint64_t offset;  // in its layer
};

template <class M>
constexpr MatrixShape shape_of(uint64_t offset) {
    return {M::TILES, M::SEGMENTS,          M::HELD_SEGMENTS, M::SPLIT ? M::PARTS : 1, M::FIRST_WARP,
            M::SLOTS, M::SLOTS_PER_SEGMENT, M::SLOT_BYTES,    M::TAIL_BYTES,           M::TILE_BYTES,
            offset};
}

__constant__ MatrixShape SHAPES[NUM_STAGES] = {
    shape_of<QkvProj>(0),
    {},
    shape_of<OProj>(QkvProj::BYTES),
    shape_of<GateUpProj>(QkvProj::BYTES + OProj::BYTES),
    shape_of<DownProj>(QkvProj::BYTES + OProj::BYTES + GateUpProj::BYTES),
    shape_of<LmHead>(0),
};

constexpr int SLOT_CAPACITY = round_up(max_of(max_of(max_of(QkvProj::SLOT_BYTES, OProj::SLOT_BYTES),
                                                     max_of(GateUpProj::SLOT_BYTES, DownProj::SLOT_BYTES)),
                                              max_of(LmHead::SLOT_BYTES, KV_SLOT_BYTES)),
                                       16);

constexpr int MAX_RING_SLOTS = 8;

// How many of this block, block + gridDim.x, ... are below `count`.
__device__ __forceinline__ int own_share(int count) {
    const int block = blockIdx.x, blocks = gridDim.x;
    return (count - block + blocks - 1) / blocks;
}

// How the grid shares out a matrix: block, block + gridDim.x, ... of the tiles are a block's. If blocks hold
// only a part of the input, groups of them take different ones, and the blocks of a group different tiles.
// Of a part, whose tiles are short, the block's warps take one each as long as (nearly) all of them get one:
// they need not wait for each other then. What is left, and long tiles, they share out by segments: else too
// few rings would be busy at the end.
class Partition {
  public:
    __device__ void start(const MatrixShape& shape) {
        const int block = blockIdx.x, blocks = gridDim.x, parts = shape.held_parts;
        first_part_ = 0, part_step_ = 1, first_tile_ = block, tile_step_ = blocks;
        if (parts > 1) {
            part_step_ = min_of(parts, blocks);
            first_tile_ = block / part_step_;
            first_part_ = block - first_tile_ * part_step_;
            tile_step_ = (blocks - first_part_ + part_step_ - 1) / part_step_;
        }
        tiles_ = (shape.tiles - first_tile() + tile_step() - 1) / tile_step();
        const int left = tiles_ % WARPS;
        whole_tiles_ = parts > 1 ? (left < WARPS * 3 / 4 ? tiles_ - left : tiles_) : 0;
    }
    __device__ int first_part() const { return SPLITS ? first_part_ : 0; }
    __device__ int part_step() const { return SPLITS ? part_step_ : 1; }
    __device__ int first_tile() const { return SPLITS ? first_tile_ : static_cast<int>(blockIdx.x); }
    __device__ int tile_step() const { return SPLITS ? tile_step_ : static_cast<int>(gridDim.x); }

    __device__ int tiles() const { return tiles_; }
    __device__ int whole_tiles() const { return SPLITS ? whole_tiles_ : 0; }

  private:
    static constexpr bool SPLITS = OProj::SPLIT || DownProj::SPLIT;
    int first_part_, part_step_, first_tile_, tile_step_, tiles_, whole_tiles_;
};

// ---- the order of a warp's stream ----

// Among the units that warps take in turns the place of the warp whose turn is number `turn`: the tile,
// counted from 0, and the segment. Of WARPS segments it has the same ones of every tile. What is left of the
// tiles is counted through all of them, and it takes the units turn, turn + WARPS, ... of that.
struct UnitPlace {
    int tile, segment;

    __device__ void advance(int turn, int segments) {
        const int in_turns = segments / WARPS * WARPS, rest = segments - in_turns;
        if (in_turns == 0) {
            for (segment += WARPS; segment >= segments; segment -= segments) ++tile;
            return;
        }
        const int in_rest = (turn - tile * rest) & (WARPS - 1);
        if (segment + WARPS < in_turns) {
            segment += WARPS;
        } else if (segment < in_turns && in_rest < rest) {
            segment = in_turns + in_rest;
        } else {
            ++tile, segment = turn;
        }
    }
};

// Walks over the slots that one warp consumes in a pass. In a stage with a matrix a block's work is, for each
// part of the input that it holds, a list of units, one per (own tile, segment of k), segments innermost;
// warp w takes all those of whole tiles w, w + WARPS, ..., then its turns of what is left, see UnitPlace. In
// attention the units are the keys and then the values of the warp's tile of each of the block's items.
class Cursor {
  public:
    __device__ void start(const PassArgs& args, const ItemTable& items, int warp) {
        items_ = &items;
        warp_ = warp, layer_ = first_layer(args);
        stage_ = layer_ == NUM_LAYERS ? STAGE_LM_HEAD : STAGE_QKV;
        if (!enter_stage(args)) cross(args);
    }

    // Whether a slot is known. If not, cross() goes on to the next stage or layer, or the stream is at its
    // end.
    __device__ bool has_slot() const { return slots_left_ > 0; }
    __device__ const uint8_t* source() const { return next_; }
    __device__ int bytes() const { return slots_left_ == 1 ? last_bytes_ : slot_bytes_; }

    __device__ void advance() {
        next_ += slot_bytes_;
        if (--slots_left_ == 0 && stage_ != STAGE_ATTENTION) next_segment();
    }

    // Moves to the next unit, which is not of the same matrix. It takes time and registers: computing warps
    // call it between units only.
    __device__ void cross(const PassArgs& args) {
        if (stage_ == STAGE_ATTENTION && next_keys_or_values(args)) return;
        do {
            if (stage_ == STAGE_LM_HEAD) return;
            if (++stage_ == STAGE_LM_HEAD) {
                if (++layer_ < NUM_LAYERS) {
                    stage_ = STAGE_QKV;
                } else if (args.logits_rows == 0) {
                    return;
                }
            }
        } while (!enter_stage(args));
    }

    __device__ void stop() { slots_left_ = 0; }

  private:
    // Moves to the warp's first unit of the stage; false if it has none.
    __device__ bool enter_stage(const PassArgs& args) {
        slots_left_ = 0;
        if (stage_ == STAGE_ATTENTION) {
            unit_ = -1;
            return next_keys_or_values(args);
        }
        const MatrixShape& shape = SHAPES[stage_];
        matrix_ = stage_ == STAGE_LM_HEAD
                      ? args.lm_head
                      : args.layers + static_cast<uint64_t>(layer_) * LAYER_BYTES + shape.offset;
        partition_.start(shape);
        turn_ = (warp_ - shape.first_warp) & (WARPS - 1);
        part_begin_ = partition_.first_part() * shape.held_segments;
        enter_part();
        return next_segment();
    }

    __device__ void enter_part() {
        unit_ = warp_, segment_ = -1;
        leave_whole_tiles();
    }

    // Goes on with what is left if it is beyond the whole tiles.
    __device__ void leave_whole_tiles() {
        if (unit_ >= partition_.whole_tiles()) unit_ = partition_.whole_tiles(), segment_ = turn_ - WARPS;
    }

    // Here unit_ is the tile, counted among the block's, segment_ the segment, counted in the part that
    // begins with segment part_begin_.
    __device__ bool next_segment() {
        const MatrixShape& shape = SHAPES[stage_];
        for (;;) {
            const int segments = min_of(shape.held_segments, shape.segments - part_begin_);
            if (unit_ < partition_.whole_tiles()) {
                if (++segment_ < segments) break;
                unit_ += WARPS, segment_ = -1;
                leave_whole_tiles();
                continue;
            }
            UnitPlace place = {unit_ - partition_.whole_tiles(), segment_};
            place.advance(turn_, segments);
            unit_ = partition_.whole_tiles() + place.tile, segment_ = place.segment;
            if (unit_ < partition_.tiles()) break;
            part_begin_ += partition_.part_step() * shape.held_segments;
            if (part_begin_ >= shape.segments) return false;
            enter_part();
        }
        const int segment = part_begin_ + segment_;
        const bool ends_tile = segment + 1 == shape.segments;
        const int slot = segment * shape.slots_per_segment;
        const int tile = partition_.first_tile() + unit_ * partition_.tile_step();
        next_ = matrix_ + static_cast<uint64_t>(tile) * shape.tile_bytes + slot * shape.slot_bytes;
        slot_bytes_ = shape.slot_bytes;
        last_bytes_ = ends_tile ? shape.tail_bytes : shape.slot_bytes;
        slots_left_ = ends_tile ? shape.slots - slot : shape.slots_per_segment;
        return true;
    }

    // Here unit_ counts the block's items twice: keys, values.
    __device__ bool next_keys_or_values(const PassArgs& args) {
        const ItemList items(*items_, layer_);
        for (;;) {
            ++unit_;
            const int index = items.first() + unit_ / 2 * static_cast<int>(gridDim.x);
            if (index >= items.count()) return false;
            const Item item = items[index];
            const int positions = item.tile_positions(warp_);
            if (positions == 0) continue;
            const uint8_t* cache = unit_ % 2 == 0 ? args.key_cache : args.value_cache;
            next_ = cache + item.cache_offset(args, layer_, item.tile_begin(warp_));
            slots_left_ = ceil_div(positions, KV_SLOT);
            slot_bytes_ = KV_SLOT_BYTES;
            last_bytes_ = (positions - (slots_left_ - 1) * KV_SLOT) * VECTOR_BYTES;
            return true;
        }
    }

    const ItemTable* items_;
    const uint8_t* next_;
    int slots_left_;  // of the unit; 0 where cross() must be called, and at the end of the stream
    int slot_bytes_, last_bytes_;
    int warp_, layer_, stage_, unit_, segment_, part_begin_, turn_;
    Partition partition_;
    const uint8_t* matrix_;
};

// ---- the rings: one for each warp, of SLOTS slots in shared memory ----

// What CopyRing keeps in shared memory besides its slots: the pass's items; a cursor, because it is looked at
// once per slot, and the registers of a computing warp are short.
struct CopyState {
    ItemTable items;
    Cursor cursor[WARPS];
};

// All lanes of the warp itself fetch, 16 bytes each.
template <int SLOTS>
class CopyRing {
  public:
    // Starts the first SLOTS fetches.
    __device__ CopyRing(const PassArgs& args, CopyState& state, uint8_t* slots)
        : args_(args),
          cursor_(state.cursor[threadIdx.x / 32]),
          slots_(slots + threadIdx.x / 32 * SLOTS * SLOT_CAPACITY) {
        if (threadIdx.x % 32 == 0) cursor_.start(args_, state.items, threadIdx.x / 32);
        refill();
    }

    // The oldest fetched slot, once it has landed.
    __device__ const uint8_t* wait() {
        copy_async_wait<SLOTS - 1>();  // as many groups were closed since: release(), refill()
        __syncwarp();
        return slot();
    }

    // What wait() returned, until it is given back.
    __device__ const uint8_t* slot() const { return slots_ + head_ * SLOT_CAPACITY; }

    // Gives the slot of the last wait() back; the next of the stream, if it is of the same matrix, is fetched
    // into it. A group of copies is closed for every slot given back, be it empty. `result` is what became of
    // the slot: made of everything that the lane has read there.
    __device__ void release(float result) {
        if (!all_have(result)) return;
        __syncwarp();
        head_ = next(head_);
        if (++empty_ == 1 && cursor_.has_slot()) {
            fetch();
        } else {
            copy_async_commit();
        }
    }

    // Fetches over the border of a stage too. To be called between units.
    __device__ void refill() {
        while (empty_ > 0) {
            __syncwarp();
            if (!cursor_.has_slot()) {
                __syncwarp();
                if (threadIdx.x % 32 == 0) cursor_.cross(args_);
                __syncwarp();
                if (!cursor_.has_slot()) break;
            }
            fetch();
        }
        for (int slot = 0; slot < empty_; ++slot) copy_async_commit();  // at the end of the stream
    }

    // Before the block leaves early: no copy may land in the shared memory of another.
    __device__ void abandon() { copy_async_wait<0>(); }

  private:
    static __device__ int next(int slot) { return slot + 1 == SLOTS ? 0 : slot + 1; }

    __device__ void fetch() {
        const uint8_t* source = cursor_.source();
        const int bytes = cursor_.bytes();
        __syncwarp();
        if (threadIdx.x % 32 == 0) cursor_.advance();
        for (int at = threadIdx.x % 32 * 16; at < bytes; at += LINE_BYTES) {
            copy_async_16(slots_ + tail_ * SLOT_CAPACITY + at, source + at);
        }
        copy_async_commit();
        tail_ = next(tail_);
        --empty_;
    }

    const PassArgs& args_;
    Cursor& cursor_;
    uint8_t* slots_;
    int head_ = 0, tail_ = 0;  // the oldest slot, the next to be filled
    int empty_ = SLOTS;        // given back and not filled
};

// A slot's phases: when it is full and when it is empty again.
struct SlotBarriers {
    uint64_t full, empty;
};

// What BulkRing keeps in shared memory besides its slots: the pass's items, the slots' barriers.
struct BulkState {
    ItemTable items;
    SlotBarriers barriers[WARPS][MAX_RING_SLOTS];
    uint32_t abandoned;  // the block leaves the pass early

    // By one thread; the block's next barrier shows it to the others.
    __device__ void initialize() {
#pragma unroll 1
        for (SlotBarriers(&ring)[MAX_RING_SLOTS] : barriers) {
            for (SlotBarriers& slot : ring) {
                mbarrier_init(&slot.full, 1);
                mbarrier_init(&slot.empty, 1);
            }
        }
        abandoned = 0;
        mbarrier_init_fence();
    }
};

// A warp's end of the ring that fill_rings() fills for it.
template <int SLOTS>
class BulkRing {
  public:
    __device__ BulkRing(const PassArgs&, BulkState& state, uint8_t* slots)
        : state_(state),
          oldest_(state.barriers[threadIdx.x / 32]),
          slot_(slots + threadIdx.x / 32 * SLOTS * SLOT_CAPACITY) {}

    __device__ const uint8_t* wait() {
        await_copy(&oldest_->full, parity_);
        return slot_;
    }

    __device__ const uint8_t* slot() const { return slot_; }

    __device__ void release(float result) {
        const bool served = all_have(result);
        __syncwarp();
        if (served && threadIdx.x % 32 == 0) mbarrier_arrive(&oldest_->empty);
        ++head_, ++oldest_, slot_ += SLOT_CAPACITY;
        if (head_ == SLOTS) head_ = 0, oldest_ -= SLOTS, slot_ -= SLOTS * SLOT_CAPACITY, parity_ ^= 1;
    }

    __device__ void refill() {}

    __device__ void abandon() { store_relaxed_shared(&state_.abandoned, 1); }

  private:
    BulkState& state_;
    int head_ = 0;          // the oldest slot,
    uint32_t parity_ = 0;   // of the phase in which it gets full,
    SlotBarriers* oldest_;  // its barriers
    const uint8_t* slot_;   // and where it is
};

// What the fetching warps do: one lane per ring fills it until the end of the stream, or until the block
// leaves the pass. When it returns nothing is under way: no copy may land in the shared memory of another
// block.
template <int SLOTS>
__device__ __forceinline__ void fill_rings(const PassArgs& args, BulkState& state, uint8_t* slots) {
    constexpr int RINGS = WARPS / FETCH_WARPS;  // of a fetching warp
    if (threadIdx.x % 32 >= RINGS) return;
    const int warp = (threadIdx.x - THREADS) / 32 * RINGS + threadIdx.x % 32;
    const uint64_t policy = evict_first_policy();
    Cursor cursor;
    cursor.start(args, state.items, warp);
    SlotBarriers* barriers = state.barriers[warp];
    uint8_t* ring = slots + warp * SLOTS * SLOT_CAPACITY;
    int tail = 0, oldest = 0, under_way = 0;      // slots: the next to be filled, the oldest under way
    uint32_t tail_parity = 1, oldest_parity = 0;  // before its first phase a slot counts as empty
    for (uint32_t polls = 0; cursor.has_slot() || under_way > 0; ++polls) {
        if (under_way > 0 && mbarrier_test(&barriers[oldest].full, oldest_parity)) {
            --under_way;
            if (++oldest == SLOTS) oldest = 0, oldest_parity ^= 1;
        }
        if (cursor.has_slot() && under_way < min_of(COPIES_IN_FLIGHT, SLOTS) &&
            mbarrier_test(&barriers[tail].empty, tail_parity)) {
            uint64_t* full = &barriers[tail].full;
            mbarrier_arrive_expect(full, cursor.bytes());
            copy_bulk(ring + tail * SLOT_CAPACITY, cursor.source(), cursor.bytes(), full, policy);
            cursor.advance();
            if (!cursor.has_slot()) cursor.cross(args);
            ++under_way;
            if (++tail == SLOTS) tail = 0, tail_parity ^= 1;
        } else if (polls % 64 == 0 && load_relaxed_shared(&state.abandoned) != 0) {
            cursor.stop();
        }
    }
}
