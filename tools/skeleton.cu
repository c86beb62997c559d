// The kernel without its arithmetic: the same streams through the same rings, the same packets between the
// stages, nothing computed. What it takes is what a design of this form can't go below. Built with the
// kernel's own constants, on its own headers; tools/skeleton.py times it.

#include "exchange.cuh"

#if !defined(EXCHANGES)
#error "a -D constant is missing"
#endif

// A layer's exchanges by what sends them, in the order in which a build has them: the first EXCHANGES.
enum Exchange { FROM_DOWN, FROM_O, FROM_GATE_UP, FROM_ATTENTION, FROM_QKV, NUM_EXCHANGES };

static_assert(EXCHANGES >= 0 && EXCHANGES <= NUM_EXCHANGES, "a layer has five exchanges");
static_assert(max_of(max_of(HIDDEN_PACKETS, QKV_PACKETS), max_of(ATTENTION_PACKETS, ACTIVATION_PACKETS)) <=
                  SCRATCH_BYTES / 4,
              "a word of every packet must fit where activations lie");

// Takes the warp's next slot of the stream, reads a word of it in each lane, as little as makes it consumed,
// and gives it back.
__device__ __forceinline__ float touch_slot(Block& block) {
    const float word = reinterpret_cast<const float*>(block.stream.wait())[block.lane()];
    block.stream.release(word);
    return word;
}

// Takes the warp's share of the block's tiles of M, in the order of the stream. Returns something made of all
// of it.
template <class M>
__device__ __forceinline__ float consume(Block& block, Stage stage) {
    const int tiles = block.own_tiles(stage), turn = M::turn(block.warp());
    float touched = 0.0f;
    UnitPlace unit = {0, turn - WARPS};
    for (unit.advance(turn, M::SEGMENTS); unit.tile < tiles; unit.advance(turn, M::SEGMENTS)) {
        const int first = unit.segment * M::SLOTS_PER_SEGMENT;
        const int last = min_of(first + M::SLOTS_PER_SEGMENT, M::SLOTS);
#pragma unroll 1
        for (int slot = first; slot < last; ++slot) touched += touch_slot(block);
        block.stream.refill();
    }
    return touched;
}

// The same for the warp's keys and values of the block's items.
__device__ __forceinline__ float consume_cache(Block& block, int layer) {
    const ItemList items(block.shared()->ring.items, layer);
    float touched = 0.0f;
    for (int i = items.first(); i < items.count(); i += static_cast<int>(gridDim.x)) {
        const int slots = ceil_div(items[i].tile_positions(block.warp()), KV_SLOT);
#pragma unroll 1
        for (int slot = 0; slot < 2 * slots; ++slot) {
            touched += touch_slot(block);
            if (slot + 1 == slots) block.stream.refill();
        }
        block.stream.refill();
    }
    return touched;
}

// Publishes the block's share of an exchange, PER_TILE packets for each of its own tiles, once all its warps
// are there: an output needs every segment of k.
template <Exchange KIND, int PER_TILE>
__device__ __forceinline__ void send(const Block& block, uint4* packets, int own_tiles, uint32_t tag,
                                     float payload) {
    if (KIND >= EXCHANGES) return;
    sync_threads<THREADS>();
    for (int i = block.thread; i < own_tiles * PER_TILE; i += THREADS) {
        const int tile = blockIdx.x + i / PER_TILE * gridDim.x;
        publish(packets + tile * PER_TILE + i % PER_TILE, __float_as_uint(payload), 0, 0, tag);
    }
}

// Receives all COUNT packets of an exchange and leaves a word of each in shared memory. False, in all
// threads, if a wait gave up. Where a thread has several, its warp waits for the first alone, as in the
// kernel.
template <Exchange KIND, int COUNT>
__device__ __forceinline__ bool gather(const Block& block, const uint4* packets, uint32_t tag, int where) {
    if (KIND >= EXCHANGES) return true;
    uint32_t* words = reinterpret_cast<uint32_t*>(block.memory);
    constexpr int SHARE = ceil_div(COUNT, THREADS), BATCH = ceil_div(SHARE, ceil_div(SHARE, RECEIVE_BATCH));
    const int first = block.warp() * 32;
    const bool begins = BATCH == 1 || first >= COUNT || await_packet(block, packets + first, tag, where);
    const bool arrived = begins && receive_some<BATCH>(
                                       block.args, block.thread, THREADS, COUNT, tag, where,
                                       [&](int index) { return packets + index; },
                                       [&](int index, const uint4& packet) { words[index] = packet.x; });
    return !sync_threads_or<THREADS>(!arrived);
}

// A stage with a matrix: waits for IN, takes the block's tiles of M, sends OUT under `out_tag`. A block
// without a tile waits for nothing, as in the kernel.
template <class M, Exchange IN, int IN_PACKETS, Exchange OUT, int PER_TILE>
__device__ __forceinline__ bool matrix_stage(Block& block, const uint4* in, uint32_t in_tag, uint4* out,
                                             uint32_t out_tag, int layer, Stage stage) {
    const int own_tiles = block.own_tiles(stage);
    if (own_tiles == 0) return true;
    if (!gather<IN, IN_PACKETS>(block, in, in_tag, 8 * layer + stage)) return false;
    send<OUT, PER_TILE>(block, out, own_tiles, out_tag, consume<M>(block, stage));
    return true;
}

static_assert(!OProj::SPLIT && !DownProj::SPLIT, "every block streams whole tiles");

// Attention: every block waits for all of q, k and v and sends its share of the heads, where the kernel's
// blocks with an item wait for the item's and send its heads.
__device__ __forceinline__ bool attention(Block& block, int layer, const LayerPackets& packets, uint32_t tag,
                                          int where) {
    if (!gather<FROM_QKV, QKV_PACKETS>(block, packets.qkv(), tag, where)) return false;
    const float touched = consume_cache(block, layer);
    send<FROM_ATTENTION, HEAD_PACKETS>(block, packets.attention(), own_share(NUM_HEADS), tag, touched);
    return true;
}

// False if a wait gave up.
__device__ __forceinline__ bool run_layer(Block& block, int layer) {
    const LayerPackets packets(block.args.exchange, layer);
    const uint32_t tag = tag_of(block.args, layer), next_tag = tag_of(block.args, layer + 1);
    return matrix_stage<QkvProj, FROM_DOWN, HIDDEN_PACKETS, FROM_QKV, FLOAT_PACKETS>(
               block, packets.hidden(), tag, packets.qkv(), tag, layer, STAGE_QKV) &&
           attention(block, layer, packets, tag, 8 * layer + STAGE_ATTENTION) &&
           matrix_stage<OProj, FROM_ATTENTION, ATTENTION_PACKETS, FROM_O, NORM_PACKETS>(
               block, packets.attention(), tag, packets.mid_hidden(), tag, layer, STAGE_O) &&
           matrix_stage<GateUpProj, FROM_O, HIDDEN_PACKETS, FROM_GATE_UP, BF16_PACKETS>(
               block, packets.mid_hidden(), tag, packets.activation(), tag, layer, STAGE_GATE_UP) &&
           matrix_stage<DownProj, FROM_GATE_UP, ACTIVATION_PACKETS, FROM_DOWN, NORM_PACKETS>(
               block, packets.activation(), tag, packets.next_hidden(), next_tag, layer, STAGE_DOWN);
}

// False if a wait gave up.
__device__ __forceinline__ bool run_pass(Block& block) {
    send<FROM_DOWN, NORM_PACKETS>(block, LayerPackets(block.args.exchange, 0).hidden(),
                                  block.own_tiles(STAGE_O), tag_of(block.args, 0), 0.0f);
#pragma unroll 1
    for (int layer = 0; layer < NUM_LAYERS; ++layer) {
        block.locate();
        if (!run_layer(block, opaque(layer))) return false;
    }
    if (block.own_tiles(STAGE_LM_HEAD) == 0) return true;
    const LayerPackets last(block.args.exchange, NUM_LAYERS);
    if (!gather<FROM_DOWN, HIDDEN_PACKETS>(block, last.hidden(), tag_of(block.args, NUM_LAYERS),
                                           8 * NUM_LAYERS + STAGE_LM_HEAD)) {
        return false;
    }
    consume<LmHead>(block, STAGE_LM_HEAD);
    return true;
}

// Grid and block as ffmini_pass has them.
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1)
    skeleton_pass(const __grid_constant__ PassArgs args) {
    extern __shared__ __align__(128) uint8_t shared_memory[];
    prepare_shared(args, shared_memory);
#if BULK_COPIES
    if (threadIdx.x >= THREADS) {
        fill_rings<RING_SLOTS>(args, Block::tail(shared_memory)->ring, shared_memory + FIXED_BYTES);
        return;
    }
#endif
    Block block(args, shared_memory);
    if (!run_pass(block)) block.stream.abandon();
}
