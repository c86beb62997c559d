// What a pass leaves for the host besides the logits, which few tokens need all of: the most likely tokens
// of each block, the sum of all exponentials, and the logits of the tokens that the host asked for. And how
// a pass that was launched ahead gets its token.
//
// Results are packets as those of exchange.cuh, in the host's memory, with the pass number as their tag. The
// host polls them; it has everything when all tags are there, and no fence stands on the path.
#pragma once

#include "exchange.cuh"

// ---- the awaited token ----

// The mail of this pass; MAIL_LEAVE if none comes in time, or if another block got none.
__device__ __forceinline__ uint32_t await_mail(const PassArgs& args) {
    const uint64_t deadline = global_timer_ns() + args.token_limit_ns;
    for (;;) {
        const uint64_t mail = load_relaxed_system_64(args.mailbox);
        if (static_cast<uint32_t>(mail) == args.pass) return static_cast<uint32_t>(mail >> 32);
        if (load_relaxed_32(args.gave_up) == args.pass) return MAIL_LEAVE;
        if (global_timer_ns() < deadline) continue;
        store_relaxed_system_32(&args.status->no_token, args.pass);
        store_relaxed_32(args.gave_up, args.pass);
        return MAIL_LEAVE;
    }
}

// Leaves the mail in shared memory, which every thread may read when it returns. False if the block is to
// leave the pass.
__device__ __forceinline__ bool receive_token(const Block& block) {
    bool leaves = false;
    if (block.thread == 0) {
        const uint32_t mail = await_mail(block.args);
        block.shared()->mail = mail;
        leaves = mail == MAIL_LEAVE;
    }
    return !sync_threads_or<THREADS>(leaves);
}

__device__ __forceinline__ bool awaits_token(const PassArgs& args) {
    return args.rows[0].token == AWAITED;
}

__device__ __forceinline__ int token_of(const Block& block, int row) {
    if (!awaits_token(block.args)) return block.args.rows[row].token;
    return static_cast<int>(block.shared()->mail & MAIL_TOKEN);
}

// ---- the queried tokens ----

// Whether the last row's token is one of them, behind those of queried_ids.
__device__ __forceinline__ bool appends(const Block& block) {
    return awaits_token(block.args) ? (block.shared()->mail & MAIL_APPEND) != 0 : block.args.append != 0;
}

// Calls visit(index, token, place among the block's own tokens) for each queried token of this block's tiles.
template <class Visit>
__device__ __forceinline__ void for_own_queried(const Block& block, Visit visit) {
    const int known = block.args.num_queried, count = known + appends(block);
    for (int i = block.thread; i < count; i += THREADS) {
        const int token = i < known ? block.args.queried_ids[i] : token_of(block, num_rows(block.args) - 1);
        const int tile = token / TILE_ROWS, blocks = static_cast<int>(gridDim.x);
        if (tile % blocks == static_cast<int>(blockIdx.x)) {
            visit(i, token, tile / blocks * TILE_ROWS + token % TILE_ROWS);
        }
    }
}

// Marks the block's own tokens that are queried; complete after the block's next barrier. Block 0 also
// appends the last row's token for later passes: this one does not read that place.
__device__ __forceinline__ void mark_queried(const Block& block) {
    uint32_t* marks = block.shared()->queried;
    for (int i = block.thread; i < ceil_div(block.own_tiles(STAGE_LM_HEAD) * TILE_ROWS, 32); i += THREADS) {
        marks[i] = 0;
    }
    sync_threads<THREADS>();
    for_own_queried(block, [&](int, int, int own) { set_bits_shared(marks + own / 32, 1u << own % 32); });
    if (blockIdx.x == 0 && block.thread == 0 && appends(block)) {
        block.args.queried_ids[block.args.num_queried] = token_of(block, num_rows(block.args) - 1);
    }
}

// ---- entries: a logit and its token as one number, which is less if the logit is greater or, of equal
// logits, the token is lower ----

constexpr uint64_t NO_ENTRY = ~0ull;

// Turns a float's bits into a number that is less if the float is greater, and back.
__device__ __forceinline__ uint32_t rank_of(uint32_t bits) {
    return bits >> 31 ? bits : bits ^ 0x7fffffff;
}

__device__ __forceinline__ uint64_t entry_of(float logit, int token) {
    const uint32_t bits = __float_as_uint(logit + 0.0f);  // -0 becomes 0: they are equal
    return static_cast<uint64_t>(rank_of(bits)) << 32 | static_cast<uint32_t>(token);
}

__device__ __forceinline__ float logit_of(uint64_t entry) {
    return __uint_as_float(rank_of(static_cast<uint32_t>(entry >> 32)));
}

// The least entry of the warp, in all lanes.
__device__ __forceinline__ uint64_t first_entry(uint64_t entry) {
    const uint32_t rank = static_cast<uint32_t>(entry >> 32), least = warp_min(rank);
    const uint32_t token = warp_min(rank == least ? static_cast<uint32_t>(entry) : 0xffffffff);
    return static_cast<uint64_t>(least) << 32 | token;
}

// Makes a lane's entries ascend.
template <int N>
__device__ __forceinline__ void sort_entries(uint64_t (&entries)[N]) {
#pragma unroll
    for (int end = N - 1; end > 0; --end) {
#pragma unroll
        for (int i = 0; i < end; ++i) {
            const uint64_t low = entries[i], high = entries[i + 1];
            entries[i] = low < high ? low : high;
            entries[i + 1] = low < high ? high : low;
        }
    }
}

// Of the N entries of each lane of the warp, which ascend, the LISTED least: in lane i the i-th of them, or
// NO_ENTRY.
template <int N>
__device__ __forceinline__ uint64_t first_entries(const Block& block, uint64_t (&entries)[N]) {
    uint64_t listed = NO_ENTRY;
#pragma unroll 1
    for (int place = 0; place < LISTED; ++place) {
        const uint64_t first = first_entry(entries[0]);
        if (block.lane() == place) listed = first;
        const bool taken = entries[0] == first;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const uint64_t next = i + 1 < N ? entries[i + 1] : NO_ENTRY;
            entries[i] = taken ? next : entries[i];
        }
    }
    return listed;
}

// ---- a row's candidates ----

constexpr int SHARE = 4;  // tokens that a lane looks at together

// The entry of the block's own token `own`; NO_ENTRY if it is queried or beyond the vocabulary.
__device__ __forceinline__ uint64_t own_entry(const Block& block, const float* logits, int own) {
    if (own >= block.own_tiles(STAGE_LM_HEAD) * TILE_ROWS) return NO_ENTRY;
    const int token = (blockIdx.x + own / TILE_ROWS * gridDim.x) * TILE_ROWS + own % TILE_ROWS;
    if (token >= VOCAB_SIZE || (block.shared()->queried[own / 32] >> own % 32 & 1) != 0) return NO_ENTRY;
    return entry_of(logits[token], token);
}

// What exponentials relative to the logit of entry `from` are worth relative to that of `to`.
__device__ __forceinline__ float rescale(uint64_t from, uint64_t to, float inverse_temperature) {
    return exp2_approx((logit_of(from) - logit_of(to)) * (inverse_temperature * LOG2_E));
}

// A warp lists its share of the block's tokens, every 16th run of 32, and adds up their exponentials relative
// to its first one: each lane its own in ascending order, then the lanes in a fixed tree. The sum is NaN if
// one is not finite.
__device__ __forceinline__ void list_share(const Block& block, int row) {
    const float* logits = block.args.logits + static_cast<uint64_t>(row) * VOCAB_SIZE;
    const float inverse_temperature = block.args.inverse_temperature[row];
    const int tokens = block.own_tiles(STAGE_LM_HEAD) * TILE_ROWS;
    uint64_t listed = NO_ENTRY;
    for (int begin = 0; begin < tokens; begin += SHARE * THREADS) {
        uint64_t entries[SHARE + 1];
        for (int i = 0; i < SHARE; ++i) {
            entries[i] = own_entry(block, logits, begin + i * THREADS + block.thread);
        }
        entries[SHARE] = listed;
        sort_entries(entries);
        listed = first_entries(block, entries);
    }
    const uint64_t first = first_entry(listed);
    float sum = 0.0f;
    for (int own = block.thread; own < tokens; own += THREADS) {
        const uint64_t entry = own_entry(block, logits, own);
        const float logit = logit_of(entry);
        if (entry != NO_ENTRY) sum += rescale(entry, first, inverse_temperature) + (logit - logit);
    }
    sum = block.warp_sum(sum);
    WarpCandidates& share = block.candidates()->of[row][block.warp()];
    if (block.lane() < LISTED) share.entry[block.lane()] = listed;
    if (block.lane() == 0) share.sum = sum;
}

// One warp merges the warps' lists of a row, their sums in a fixed tree, and publishes what the block has:
// in each of LISTED packets an entry and the sum relative to the first one.
__device__ __forceinline__ void publish_candidates(const Block& block, int row, uint4* packets) {
    const WarpCandidates* shares = block.candidates()->of[row];
    constexpr int TAKEN = WARPS * LISTED / 32;  // by a lane, of one warp's list
    uint64_t entries[TAKEN];
    for (int i = 0; i < TAKEN; ++i) {
        const int at = block.lane() * TAKEN + i;
        entries[i] = shares[at / LISTED].entry[at % LISTED];
    }
    const uint64_t listed = first_entries(block, entries), first = first_entry(listed);
    const WarpCandidates& share = shares[block.lane() % WARPS];
    const bool counts = block.lane() < WARPS && share.entry[0] != NO_ENTRY;
    const float scale = rescale(share.entry[0], first, block.args.inverse_temperature[row]);
    const float sum = block.warp_sum(counts ? share.sum * scale : 0.0f);
    if (block.lane() < LISTED) {
        store_relaxed_system_128(packets + block.lane(), make_uint4(static_cast<uint32_t>(listed),
                                                                    static_cast<uint32_t>(listed >> 32),
                                                                    __float_as_uint(sum), block.args.pass));
    }
}

// What the block says of the wanted rows. Its logits, in global memory, are complete after the block's next
// barrier, which is here.
__device__ __forceinline__ void leave_candidates(const Block& block) {
    const PassArgs& args = block.args;
    const int listed = static_cast<int>(gridDim.x) * LISTED;  // packets of a row, before the queried tokens
    const auto wanted = [&](int row) { return row < num_rows(args) && (args.logits_rows >> row & 1) != 0; };
    const auto packets = [&](int row) {
        return args.candidates + static_cast<uint64_t>(row) * (listed + MAX_QUERIED);
    };
    sync_threads<THREADS>();
#pragma unroll 1
    for (int row = 0; row < num_rows(args); ++row) {
        if (!wanted(row)) continue;
        for_own_queried(block, [&](int i, int token, int) {
            const float logit = args.logits[static_cast<uint64_t>(row) * VOCAB_SIZE + token];
            store_relaxed_system_128(packets(row) + listed + i,
                                     make_uint4(0, 0, __float_as_uint(logit), args.pass));
        });
        list_share(block, row);
    }
    sync_threads<THREADS>();
    const int row = block.warp();
    if (wanted(row)) publish_candidates(block, row, packets(row) + blockIdx.x * LISTED);
}
