// How blocks hand activations to each other: packets of 16 bytes, three words of payload and a tag, each
// written and read by one relaxed 128-bit access. A packet whose tag is the awaited one is whole and new,
// so nothing else is ordered and no fence stands on the path.
//
// Reuse is safe by construction. Every exchange of every layer has packets of its own, and a tag holds the
// pass number: only the launch of the next pass, after every block has left this one, writes them again. The
// partial softmaxes alone are reused from layer to layer, under a tag of (pass, layer): a block writes those
// of layer l + 1 after it has received queries of layer l + 1, which depend on every attention output of
// layer l, and so on every read of the partials of layer l. So are the partial products of a split matrix: a
// block writes those of layer l + 1 after it has received what depends on the whole residual stream, and so
// on every read of those of layer l.
#pragma once

#include "block.cuh"

// ---- where the packets lie ----

constexpr int FLOAT_PACKETS = 6;                            // 16 floats of a tile: 3, 3, 2, 3, 3, 2
constexpr int NORM_PACKETS = 3;                             // 16 bf16 of a tile and a float: nine words
constexpr int BF16_PACKETS = 2;                             // 8 bf16 of a gate/up tile: 4, 4
constexpr int HEAD_PACKETS = ceil_div(HEAD_DIM, 6);         // bf16 of a head: 6 each
constexpr int VECTOR_PACKETS = HEAD_DIM / 8 * 3;            // floats of a head in FLOAT_PACKETS
constexpr int PARTIAL_PACKETS = ceil_div(HEAD_DIM + 2, 3);  // max, sum, then the vector, as floats

// How the bf16 elements of a row's input lie in its packets: COUNT runs of LENGTH elements, of which a packet
// has PER_PACKET and the last of the run what is left.
template <int LENGTH_, int PER_PACKET_, int COUNT_>
struct RunsOf {
    static constexpr int LENGTH = LENGTH_, PER_PACKET = PER_PACKET_, COUNT = COUNT_;
    static constexpr int PACKETS = ceil_div(LENGTH, PER_PACKET);  // of a run
    static constexpr int ROW_PACKETS = COUNT * PACKETS;
};
using HiddenRuns = RunsOf<TILE_ROWS, 6, HIDDEN_TILES>;  // the last of a tile brings the sum of squares too
using HeadRuns = RunsOf<HEAD_DIM, 6, NUM_HEADS>;
using GateUpRuns = RunsOf<8, 4, INTERMEDIATE_TILES>;
static_assert(HiddenRuns::PACKETS == NORM_PACKETS && HeadRuns::PACKETS == HEAD_PACKETS &&
                  GateUpRuns::PACKETS == BF16_PACKETS,
              "packets are read as they are written");

constexpr int HIDDEN_PACKETS = HIDDEN_TILES * NORM_PACKETS;  // for one row, as all of these
constexpr int QKV_PACKETS = QkvProj::TILES * FLOAT_PACKETS;
constexpr int ATTENTION_PACKETS = NUM_HEADS * HEAD_PACKETS;
constexpr int ACTIVATION_PACKETS = INTERMEDIATE_TILES * BF16_PACKETS;
constexpr int PARTIAL_ROW_PACKETS = NUM_HEADS * MAX_SPLITS * PARTIAL_PACKETS;

// Of a split matrix the products of each part, as floats: [ROWS][PARTS][tiles][FLOAT_PACKETS].
template <class M>
constexpr uint64_t PRODUCT_PACKETS = M::SPLIT ? ROWS * M::PARTS * M::TILES * FLOAT_PACKETS : 0;

constexpr int LAYER_PACKETS =
    ROWS * (2 * HIDDEN_PACKETS + QKV_PACKETS + ATTENTION_PACKETS + ACTIVATION_PACKETS);
constexpr uint64_t PARTIALS_AT = static_cast<uint64_t>(NUM_LAYERS) * LAYER_PACKETS + ROWS * HIDDEN_PACKETS;
constexpr uint64_t O_PRODUCTS_AT = PARTIALS_AT + ROWS * PARTIAL_ROW_PACKETS;
constexpr uint64_t DOWN_PRODUCTS_AT = O_PRODUCTS_AT + PRODUCT_PACKETS<OProj>;
constexpr uint64_t MAIL_AT = DOWN_PRODUCTS_AT + PRODUCT_PACKETS<DownProj>;
constexpr uint64_t EXCHANGE_PACKETS = MAIL_AT + 1;
constexpr int BLOCK_PACKETS = ROWS * LISTED;  // more for each block of the grid

// The packets of one layer; each kind is [ROWS][its packets for a row]. The residual stream that leaves the
// last layer lies where layer NUM_LAYERS would begin.
struct LayerPackets {
    uint4* begin;

    __device__ LayerPackets(uint4* exchange, int layer)
        : begin(exchange + static_cast<uint64_t>(layer) * LAYER_PACKETS) {}
    // The residual stream that enters the layer, times the weight of the norm there, and its squares' sum: a
    // tile of 16 bf16 and a float.
    __device__ uint4* hidden() const { return begin; }
    // q, k and v before norm and rope, fp32.
    __device__ uint4* qkv() const { return begin + ROWS * HIDDEN_PACKETS; }
    // Attention's output, bf16.
    __device__ uint4* attention() const { return qkv() + ROWS * QKV_PACKETS; }
    // The residual stream after attention, as hidden.
    __device__ uint4* mid_hidden() const { return attention() + ROWS * ATTENTION_PACKETS; }
    // silu(gate) * up, bf16.
    __device__ uint4* activation() const { return mid_hidden() + ROWS * HIDDEN_PACKETS; }
    // The residual stream that enters the next layer.
    __device__ uint4* next_hidden() const { return begin + LAYER_PACKETS; }
};

// [ROWS][NUM_HEADS][MAX_SPLITS][PARTIAL_PACKETS]
__device__ __forceinline__ uint4* partial_packets(uint4* exchange) {
    return exchange + PARTIALS_AT;
}

__device__ __forceinline__ uint4* o_product_packets(uint4* exchange) {
    return exchange + O_PRODUCTS_AT;
}
__device__ __forceinline__ uint4* down_product_packets(uint4* exchange) {
    return exchange + DOWN_PRODUCTS_AT;
}

// The mail of a pass whose token was awaited: one packet.
__device__ __forceinline__ uint4* mail_packet(uint4* exchange) {
    return exchange + MAIL_AT;
}

// The blocks' lists of one row's candidates, [blocks][LISTED]: an entry, and the block's sum in all of them.
__device__ __forceinline__ uint4* list_packets(uint4* exchange, int row) {
    return exchange + EXCHANGE_PACKETS + row * static_cast<int>(gridDim.x) * LISTED;
}

// ---- tags ----

// No other (pass, layer) has this tag while `pass` stays within its bound, and none has 0.
__device__ __forceinline__ uint32_t tag_of(const PassArgs& args, int layer) {
    return args.pass * (NUM_LAYERS + 1) + static_cast<uint32_t>(layer);
}

// ---- sending ----

__device__ __forceinline__ void publish(uint4* packet, uint32_t x, uint32_t y, uint32_t z, uint32_t tag) {
#if TEST_PAUSES
    // A test build holds every packet back for 0 to 4 microseconds, differently in every pass and place.
    const uint32_t place = static_cast<uint32_t>(reinterpret_cast<uint64_t>(packet) >> 4);
    const uint32_t hash = (place ^ tag * 2654435761u) * 2246822519u;
    const uint64_t until = global_timer_ns() + (hash >> 20);
    while (global_timer_ns() < until) {
    }
#endif
    store_relaxed_128(packet, make_uint4(x, y, z, tag));
}

// ---- receiving ----

constexpr int RECEIVE_BATCH = 8;  // packets that a thread asks for at once, if they can be shared out so

// Asks for COUNT packets together: packets that wait for each other's turn would cost a round trip each.
// at(i) is where one lies. Whether all of them are there.
template <int COUNT, class At>
__device__ __forceinline__ bool ask_packets(uint32_t tag, At at, uint4 (&packet)[COUNT]) {
    bool missing = false;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) packet[i] = load_relaxed_128(at(i));
#pragma unroll
    for (int i = 0; i < COUNT; ++i) missing |= packet[i].w != tag;
    return !missing;
}

// The same again and again until they are; false if one did not come.
template <int COUNT, class At>
__device__ __forceinline__ bool await_packets(Patience& patience, uint32_t tag, At at,
                                              uint4 (&packet)[COUNT]) {
    while (!ask_packets(tag, at, packet)) {
        if (!patience.more()) return false;
    }
    return true;
}

// Hands the packets first, first + step, ... below `count` to take(index, packet), BATCH at a time; at(index)
// is where one lies. False if one did not come.
template <int BATCH, class At, class Take>
__device__ __forceinline__ bool receive_some(const PassArgs& args, int first, int step, int count,
                                             uint32_t tag, int where, At at, Take take) {
    Patience patience(args, where);
    for (int begin = first; begin < count;) {
        uint4 packet[BATCH];
        const auto place = [&](int i) { return at(min_of(begin + i * step, count - 1)); };
        if (!ask_packets(tag, place, packet)) {  // a loop of its own would keep all places in registers
            if (!patience.more()) return false;
            continue;
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int index = begin + i * step;
            if (index < count) take(index, packet[i]);
        }
        begin += BATCH * step;
    }
    return true;
}

// Waits for one packet on behalf of the warp; false in all lanes if it did not come.
__device__ __forceinline__ bool await_packet(const Block& block, const uint4* packet, uint32_t tag,
                                             int where) {
    Patience patience(block.args, where);
    for (;;) {
        const bool missing = block.lane() == 0 && load_relaxed_128(packet).w != tag;
        if (!__any_sync(0xffffffff, missing)) return true;
        if (__any_sync(0xffffffff, missing && !patience.more())) return false;
    }
}

// ---- what the host must know of a build ----

// Read from the loaded module.
struct BuildInfo {
    uint64_t exchange_packets;
    uint32_t block_packets;
    uint32_t shared_bytes;
    uint32_t threads;
    uint32_t ring_slots;
    uint32_t args_bytes;
    uint32_t marks;
};
extern "C" {
__constant__ BuildInfo ffmini_build_info = {EXCHANGE_PACKETS, BLOCK_PACKETS,    SHARED_BYTES, BLOCK_THREADS,
                                            RING_SLOTS,       sizeof(PassArgs), MARKS};
}
