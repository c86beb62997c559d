// How a product's input comes to those who multiply it: packets are received, their elements put where they
// belong, integers made of them if the weights are. Either all warps of a block do it together, or each does
// it for itself (OwnSegments in block.cuh).
#pragma once

#include "activations.cuh"
#include "exchange.cuh"

// Nothing, where packets bring elements only.
__device__ __forceinline__ void no_rest(int, int, const uint4&) {}

// How the packets of M's input are shared out: ROW_WARPS to each row, whose packets they read in turns. A
// lane comes to the same place in a run again after PERIOD packets, SHIFT runs further on.
template <class M, class Runs>
struct InputPackets {
    static constexpr int STEP = 32 * ROW_WARPS;
    static constexpr int PERIOD = Runs::PACKETS / common_divisor(Runs::PACKETS, STEP);
    static constexpr int SHIFT = PERIOD * STEP / Runs::PACKETS;
    // Where parts are split, the runs of one; in general the first begins before it, the last ends behind it.
    static constexpr int PART_RUNS = ceil_div(M::HELD_K, Runs::LENGTH);
    static constexpr bool EVEN = !M::SPLIT || (M::HELD_K % Runs::LENGTH == 0 && Runs::COUNT % PART_RUNS == 0);
    static constexpr int MOST =
        M::SPLIT ? (EVEN ? PART_RUNS : PART_RUNS + 1) * Runs::PACKETS : Runs::ROW_PACKETS;
    static constexpr int SHARE = ceil_div(MOST, STEP);  // of a lane
    static constexpr int BATCH = ceil_div(SHARE, ceil_div(SHARE, RECEIVE_BATCH));
    static constexpr bool WHOLE = EVEN && MOST % (BATCH * STEP) == 0;  // batches
};

// Keeps what the block holds of a packet's elements, the first of which is k of that, among a row's
// activations. It is packet `in_run` of its run.
template <class M, class Runs>
__device__ __forceinline__ void keep_elements(uint16_t* activations, const uint4& packet, int in_run, int k) {
    const uint32_t words[3] = {packet.x, packet.y, packet.z};
    for (int w = 0; w < Runs::PER_PACKET / 2; ++w) {
        const bool exists = in_run * Runs::PER_PACKET + 2 * w < Runs::LENGTH;
        const bool held = InputPackets<M, Runs>::EVEN || (k + 2 * w >= 0 && k + 2 * w < M::HELD_K);
        if (exists && held) *reinterpret_cast<uint32_t*>(activations + k + 2 * w) = words[w];
    }
}

// Receives M's input, all of it or part `part` if a block holds one at a time, as bf16 among the activations.
// `packets`: [ROWS][runs]; rest(row, run, packet) takes what the last packet of a run brings besides. False,
// in this lane alone, if one did not come.
template <class M, class Runs, class Rest>
__device__ __forceinline__ bool receive_bf16(Block& block, const uint4* packets, uint32_t tag, int where,
                                             int part, Rest rest) {
    using P = InputPackets<M, Runs>;
    const int begin = M::SPLIT ? part * M::HELD_K : 0, first_run = begin / Runs::LENGTH;
    const int end = min_of(begin + M::HELD_K, Runs::COUNT * Runs::LENGTH);
    const int count = P::EVEN ? P::MOST : (ceil_div(end, Runs::LENGTH) - first_run) * Runs::PACKETS;
    const int row = block.warp() / ROW_WARPS;
    if (row >= num_rows(block.args)) return true;
    const int first = block.warp() % ROW_WARPS * 32;
    packets += row * Runs::ROW_PACKETS + first_run * Runs::PACKETS;
    // One row's input comes late and at once: a grid that asks for all of it again and again would keep the
    // L2 too busy to deliver it. Of many rows the first have long come when the last do.
    const bool await = ROWS == 1 && P::BATCH > 1 && first < count;
    if (await && !await_packet(block, packets + first, tag, where)) return false;
    uint16_t* activations = block.activations() + row * ACTIVATION_STRIDE;
    Patience patience(block.args, where);
    for (int batch = first + block.lane(); batch < count;) {
        uint4 packet[P::BATCH];
        const auto at = [&](int i) {
            const int index = batch + i * P::STEP;
            return packets + (P::WHOLE ? index : min_of(index, count - 1));
        };
        if (!ask_packets(tag, at, packet)) {
            if (!patience.more()) return false;
            continue;
        }
#pragma unroll
        for (int i = 0; i < P::BATCH; ++i) {
            if (!P::WHOLE && batch + i * P::STEP >= count) break;
            const int like = batch + i % P::PERIOD * P::STEP, run = like / Runs::PACKETS;
            const int in_run = like - run * Runs::PACKETS, later = i / P::PERIOD * P::SHIFT;
            const int k = (run + later) * Runs::LENGTH + in_run * Runs::PER_PACKET +
                          (P::EVEN ? 0 : first_run * Runs::LENGTH - begin);
            keep_elements<M, Runs>(activations, packet[i], in_run, k);
            if (in_run + 1 == Runs::PACKETS) rest(row, run + later, packet[i]);
        }
        batch += P::BATCH * P::STEP;
    }
    return true;
}

// How a warp's lanes share out the packets of its own segments, PIECES of them: one of each row, or several
// of the one row. A lane comes to the same place in a piece again after PERIOD packets, SHIFT pieces further
// on.
template <class M, class Runs>
struct OwnPackets {
    using Own = OwnSegments<M>;
    static constexpr int PIECES = ROWS * Own::MOST;
    static_assert(SEGMENT % Runs::LENGTH == 0 && (ROWS == 1 || PIECES == ROWS),
                  "a piece is not of whole runs");
    static constexpr int RUNS = SEGMENT / Runs::LENGTH, PACKETS = RUNS * Runs::PACKETS;  // of a piece
    static constexpr int PERIOD = PACKETS / common_divisor(PACKETS, 32), SHIFT = PERIOD * 32 / PACKETS;
    static constexpr int SHARE = ceil_div(PIECES * PACKETS, 32);  // of a lane
    static constexpr int SOME = ceil_div(SHARE, ceil_div(SHARE, RECEIVE_BATCH));
    static constexpr int BATCH = SOME % PERIOD == 0 ? SOME : SHARE;
    static constexpr int BATCH_PIECES = BATCH == SHARE ? PIECES : BATCH / PERIOD * SHIFT;
    static constexpr int STEP = ROWS == 1 ? WARPS * SEGMENT : ACTIVATION_STRIDE;  // elements, piece to piece

    // Of the lane's packet `i` in a batch that begins with piece `first`.
    __device__ OwnPackets(const Block& block, int pieces, int first, int i) {
        const int turn = M::turn(block.warp()), like = block.lane() + i % PERIOD * 32;
        piece = first + like / PACKETS + i / PERIOD * SHIFT, index = like % PACKETS;
        row = ROWS == 1 ? 0 : piece, segment = Own::segment(turn, ROWS == 1 ? piece : 0);
        exists = piece < pieces &&
                 (Runs::ROW_PACKETS % PACKETS == 0 || segment * PACKETS + index < Runs::ROW_PACKETS);
    }

    int piece, row, segment, index;  // in the segment
    bool exists;
};

// Receives the segments of M's input that are the warp's own, as receive_bf16() does.
template <class M, class Runs, class Rest>
__device__ __forceinline__ bool receive_own_bf16(Block& block, const uint4* packets, uint32_t tag, int where,
                                                 Rest rest) {
    using P = OwnPackets<M, Runs>;
    const int turn = M::turn(block.warp()), pieces = OwnSegments<M>::pieces(block);
    if (pieces == 0) return true;
    const uint4* any = packets + OwnSegments<M>::segment(turn, 0) * P::PACKETS;
    if (ROWS == 1 && P::BATCH > 1 && !await_packet(block, any, tag, where)) return false;
    uint16_t* activations = block.activations() + OwnSegments<M>::place(turn, 0) * SEGMENT;
    Patience patience(block.args, where);
#pragma unroll 1
    for (int first = 0; first < pieces;) {
        uint4 packet[P::BATCH];
        const auto at = [&](int i) {
            const P p(block, pieces, first, i);
            return p.exists ? packets + p.row * Runs::ROW_PACKETS + p.segment * P::PACKETS + p.index : any;
        };
        if (!ask_packets(tag, at, packet)) {
            if (!patience.more()) return false;
            continue;
        }
#pragma unroll
        for (int i = 0; i < P::BATCH; ++i) {
            const P p(block, pieces, first, i);
            if (!p.exists) continue;
            const int run = p.index / Runs::PACKETS, in_run = p.index % Runs::PACKETS;
            keep_elements<M, Runs>(activations + p.piece * P::STEP, packet[i], in_run,
                                   run * Runs::LENGTH + in_run * Runs::PER_PACKET);
            if (in_run + 1 == Runs::PACKETS) rest(p.row, p.segment * P::RUNS + run, packet[i]);
        }
        first += P::BATCH_PIECES;
    }
    return true;
}

// Zeros where no packet brings anything to one row's last segment, if the warp has it.
template <class M, int END>
__device__ __forceinline__ void zero_own_tail(const Block& block) {
    constexpr int BEGIN = (M::HELD_SEGMENTS - 1) * SEGMENT;
    const int turn = M::turn(block.warp());
    for (int i = 0; i < OwnSegments<M>::MOST; ++i) {
        if (OwnSegments<M>::segment(turn, i) != M::HELD_SEGMENTS - 1) continue;
        uint16_t* own = block.activations() + OwnSegments<M>::place(turn, i) * SEGMENT;
        for (int k = END - BEGIN + block.lane(); k < M::HELD_K - BEGIN; k += 32) own[k] = 0;
    }
}

// receive_input() of a warp that waits for no other.
template <class M, class Runs, class Rest, class Complete>
__device__ __forceinline__ bool receive_own(Block& block, const uint4* packets, uint32_t tag, int where,
                                            Rest rest, Complete complete) {
    constexpr int END = Runs::COUNT * Runs::LENGTH;
    const bool arrived = receive_own_bf16<M, Runs>(block, packets, tag, where, rest);
    complete();
    if constexpr (!INTEGERS && END < M::HELD_K) zero_own_tail<M, END>(block);
    __syncwarp();
    if constexpr (INTEGERS) {
        align_own<M, END % SEGMENT == 0>(block, END);
        __syncwarp();
    }
    return arrived;
}

// receive_input() where all warps receive all of it together.
template <class M, class Runs, class Rest, class Complete>
__device__ __forceinline__ bool receive_together(Block& block, const uint4* packets, uint32_t tag, int where,
                                                 int part, Rest rest, Complete complete) {
    const bool arrived = receive_bf16<M, Runs>(block, packets, tag, where, part, rest);
    const int end = min_of(M::HELD_K, Runs::COUNT * Runs::LENGTH - (M::SPLIT ? part * M::HELD_K : 0));
    if constexpr (!INTEGERS) {  // zeros where no packet brings anything; integers take them for granted
        for (int row = 0; row < num_rows(block.args); ++row) {
            for (int k = end + block.thread; k < M::HELD_K; k += THREADS) {
                block.activations()[row * ACTIVATION_STRIDE + k] = 0;
            }
        }
    }
    if (sync_threads_or<THREADS>(!arrived)) return false;
    complete();
    if constexpr (INTEGERS) {
        constexpr bool WHOLE = Runs::COUNT * Runs::LENGTH % (M::HELD_SEGMENTS * SEGMENT) == 0;
        align_activations<M, WHOLE>(block, end);
        sync_threads<THREADS>();
    }
    return true;
}

// Receives M's input and leaves it among the activations, as M's product wants it. Whether it came: all of
// it, or, if warps have their OWN_INPUT, what this lane asked for; Products::run() makes one answer of that.
// complete() is called when this lane's is there, or a wait gave up; what it leaves is seen when run() first
// adds up a round.
template <class M, class Runs, class Rest, class Complete>
__device__ __forceinline__ bool receive_input(Block& block, const uint4* packets, uint32_t tag, int where,
                                              int part, Rest rest, Complete complete) {
    block.locate();  // registers are short
    if constexpr (OWN_INPUT<M>) return receive_own<M, Runs>(block, packets, tag, where, rest, complete);
    return receive_together<M, Runs>(block, packets, tag, where, part, rest, complete);
}
