// What a pass leaves for the host besides the logits, which few tokens need all of: the most likely tokens,
// the sum of all exponentials, and the logits of the tokens that the host asked for. And how a pass that was
// launched ahead gets its token: the one before has drawn it, or the host sends it.
//
// Each block lists its own most likely tokens; one block merges the lists of a row. Results are packets as
// those of exchange.cuh, in the host's memory, with the pass number as their tag. The host polls the header,
// then what it announces; it has everything when all tags are there, and no fence stands on the path.
//
// Loops of a few turns that index no registers are not unrolled: they took 24 KB of instructions, and no
// less time.
#pragma once

#include "exchange.cuh"

// ---- the awaited token ----

// The mail of this pass; MAIL_LEAVE if none comes in time. Of one thread of the grid: every look at the
// host's memory is a round trip over PCIe.
__device__ __forceinline__ uint32_t read_mailbox(const PassArgs& args) {
    const uint64_t deadline = global_timer_ns() + args.token_limit_ns;
    for (;;) {
        const uint64_t mail = load_relaxed_system_64(args.mailbox);
        if (static_cast<uint32_t>(mail) == args.pass) return static_cast<uint32_t>(mail >> 32);
        if (global_timer_ns() < deadline) continue;
        store_relaxed_system_32(&args.status->no_token, args.pass);
        return MAIL_LEAVE;
    }
}

// The mail: what the pass before has drawn, which is there when this one begins, or what the host sends,
// which block 0 hands on to the others; MAIL_LEAVE too where it does not come. Those wait for it as for any
// packet, which must be longer than token_limit_ns: block 0 may begin a little after them.
__device__ __forceinline__ uint32_t await_mail(const PassArgs& args, int where) {
    const uint64_t drawn = args.drawn[args.pass & 1];
    if (static_cast<uint32_t>(drawn) == args.pass) return static_cast<uint32_t>(drawn >> 32);
    uint4* packet = mail_packet(args.exchange);
    const uint32_t tag = tag_of(args, 0);
    uint32_t mail = MAIL_LEAVE;
    if (blockIdx.x == 0) {
        mail = read_mailbox(args);
        publish(packet, mail, 0, 0, tag);
    } else {
        receive_some<1>(
            args, 0, 1, 1, tag, where, [&](int) { return packet; },
            [&](int, const uint4& received) { mail = received.x; });
    }
    return mail;
}

// Leaves the mail in shared memory, which every thread may read when it returns. False if the block is to
// leave the pass.
__device__ __forceinline__ bool receive_token(const Block& block, int where) {
    bool leaves = false;
    if (block.thread == 0) {
        const uint32_t mail = await_mail(block.args, where);
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

// Whether the host wants to know what the row says.
__device__ __forceinline__ bool is_wanted(const PassArgs& args, int row) {
    return row < num_rows(args) && (args.logits_rows >> row & 1) != 0;
}

// [MAX_QUERIED]: the tokens that a wanted row is asked for. The first wanted row has the first list,
// whichever row it is: a list stays where it is when a prompt has ended and its tokens come one by one.
__device__ __forceinline__ int* queried_list(const PassArgs& args, int row) {
    const int list = ROWS == 1 ? 0 : __popc(args.logits_rows & ((1u << row) - 1));
    return args.queried_ids + list * MAX_QUERIED;
}

// Whether the row's own token is one of them, behind those of its list.
__device__ __forceinline__ bool appends(const Block& block, int row) {
    return awaits_token(block.args) ? (block.shared()->mail & MAIL_APPEND) != 0
                                    : (block.args.append >> row & 1) != 0;
}

__device__ __forceinline__ int num_queried(const Block& block, int row) {
    return block.args.num_queried[row] + appends(block, row);
}

// Calls visit(index, token, place among the block's own tokens) for each token of this block's tiles that the
// row is asked for.
template <class Visit>
__device__ __forceinline__ void for_own_queried(const Block& block, int row, Visit visit) {
    const int known = block.args.num_queried[row], count = num_queried(block, row);
    const int* list = queried_list(block.args, row);
#pragma unroll 1
    for (int i = block.thread; i < count; i += THREADS) {
        const int token = i < known ? list[i] : token_of(block, row);
        const int tile = token / TILE_ROWS, blocks = static_cast<int>(gridDim.x);
        if (tile % blocks == static_cast<int>(blockIdx.x)) {
            visit(i, token, tile / blocks * TILE_ROWS + token % TILE_ROWS);
        }
    }
}

// Bit `own` of them: the row is asked for the block's own token `own`.
__device__ __forceinline__ uint32_t* marks_of(const Block& block, int row) {
    return block.shared()->queried + row * MARK_WORDS;
}

// Marks the block's own tokens that the wanted rows are asked for; complete after the block's next barrier.
// Block 0 also appends tokens to the lists, for later passes: this one does not read those places.
__device__ __forceinline__ void mark_queried(const Block& block) {
    const PassArgs& args = block.args;
#pragma unroll 1
    for (int i = block.thread; i < num_rows(args) * MARK_WORDS; i += THREADS) marks_of(block, 0)[i] = 0;
    sync_threads<THREADS>();
#pragma unroll 1
    for (int row = 0; row < num_rows(args); ++row) {
        if (!is_wanted(args, row)) continue;
        uint32_t* marks = marks_of(block, row);
        for_own_queried(block, row,
                        [&](int, int, int own) { set_bits_shared(marks + own / 32, 1u << own % 32); });
        if (blockIdx.x == 0 && block.thread == 0 && appends(block, row)) {
            queried_list(args, row)[args.num_queried[row]] = token_of(block, row);
        }
    }
}

// ---- entries: a logit and its token as one number, which is less if the logit is greater or, of equal
// logits, the token is lower ----

constexpr uint64_t NO_ENTRY = ~0ull;

__device__ __forceinline__ uint64_t joined(uint32_t low, uint32_t high) {
    return static_cast<uint64_t>(high) << 32 | low;
}

// Turns a float's bits into a number that is less if the float is greater, and back.
__device__ __forceinline__ uint32_t rank_of(uint32_t bits) {
    return bits >> 31 ? bits : bits ^ 0x7fffffff;
}

__device__ __forceinline__ uint64_t entry_of(float logit, int token) {
    const uint32_t bits = __float_as_uint(logit + 0.0f);  // -0 becomes 0: they are equal
    return joined(static_cast<uint32_t>(token), rank_of(bits));
}

__device__ __forceinline__ float logit_of(uint64_t entry) {
    return __uint_as_float(rank_of(static_cast<uint32_t>(entry >> 32)));
}

// The least entry of the warp, in all lanes.
__device__ __forceinline__ uint64_t first_entry(uint64_t entry) {
    const uint32_t rank = static_cast<uint32_t>(entry >> 32), least = warp_min(rank);
    const uint32_t token = warp_min(rank == least ? static_cast<uint32_t>(entry) : 0xffffffff);
    return joined(token, least);
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

// The entry of the block's own token `own` among a row's logits; NO_ENTRY if it has a mark, which stands for
// a queried one, or is beyond the vocabulary.
__device__ __forceinline__ uint64_t own_entry(const Block& block, const float* logits, const uint32_t* marks,
                                              int own) {
    if (own >= block.own_tiles(STAGE_LM_HEAD) * TILE_ROWS) return NO_ENTRY;
    const int token = (blockIdx.x + own / TILE_ROWS * gridDim.x) * TILE_ROWS + own % TILE_ROWS;
    if (token >= VOCAB_SIZE || (marks[own / 32] >> own % 32 & 1) != 0) return NO_ENTRY;
    return entry_of(logits[token], token);
}

// What exponentials relative to the logit of entry `from` are worth relative to that of `to`.
__device__ __forceinline__ float rescale(uint64_t from, uint64_t to, float inverse_temperature) {
    return exp2_approx((logit_of(from) - logit_of(to)) * (inverse_temperature * LOG2_E));
}

// A warp lists its share of the block's tokens, every 16th run of 32, and adds up their exponentials relative
// to its first one so far: each lane its own in ascending order, then the lanes in a fixed tree. The sum is
// NaN if one is not finite.
__device__ __forceinline__ void list_share(const Block& block, int row) {
    const float* logits = block.args.logits + static_cast<uint64_t>(row) * VOCAB_SIZE;
    const uint32_t* marks = marks_of(block, row);
    const float inverse_temperature = block.args.inverse_temperature[row];
    const int tokens = block.own_tiles(STAGE_LM_HEAD) * TILE_ROWS;
    uint64_t listed = NO_ENTRY, first = NO_ENTRY;
    float sum = 0.0f;
    for (int begin = 0; begin < tokens; begin += SHARE * THREADS) {
        uint64_t entries[SHARE + 1], least = first;
        for (int i = 0; i < SHARE; ++i) {
            entries[i] = own_entry(block, logits, marks, begin + i * THREADS + block.thread);
        }
        for (int i = 0; i < SHARE; ++i) least = entries[i] < least ? entries[i] : least;
        least = first_entry(least);
        if (first != NO_ENTRY) sum *= rescale(first, least, inverse_temperature);
        first = least;
        for (int i = 0; i < SHARE; ++i) {
            if (entries[i] == NO_ENTRY) continue;
            const float logit = logit_of(entries[i]);
            sum += rescale(entries[i], first, inverse_temperature) + (logit - logit);
        }
        entries[SHARE] = listed;
        sort_entries(entries);
        listed = first_entries(block, entries);
    }
    sum = warp_sum(sum);
    WarpCandidates& share = block.candidates()->of[row][block.warp()];
    if (block.lane() < LISTED) share.entry[block.lane()] = listed;
    if (block.lane() == 0) share.sum = sum;
}

// One warp merges the warps' lists of a row, their sums in a fixed tree, and publishes what the block has:
// in each of LISTED packets an entry and the sum relative to the first one.
__device__ __forceinline__ void publish_list(const Block& block, int row) {
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
    const float sum = warp_sum(counts ? share.sum * scale : 0.0f);
    if (block.lane() < LISTED) {
        publish(list_packets(block.args.exchange, row) + blockIdx.x * LISTED + block.lane(),
                static_cast<uint32_t>(listed), static_cast<uint32_t>(listed >> 32), __float_as_uint(sum),
                tag_of(block.args, NUM_LAYERS));
    }
}

// ---- the grid's candidates of a row, in one block ----

constexpr int GATHERED = ceil_div(MAX_BLOCKS * LISTED, THREADS);  // entries of a thread, at most

// What is known of the whole row once all lists are there.
struct RowSummary {
    uint64_t first;  // entry of all
    uint64_t bound;  // the last entry whose place is certain: entries up to this one are exact
    bool complete;   // every token that is not queried is in a list
    float buckets;   // for each unit of logits

    __device__ bool has(uint64_t entry) const { return entry <= bound && entry != NO_ENTRY; }

    // The bucket of an exact entry, which is not less if the entry is greater. The first if all are the same,
    // if all tokens are in the lists or if a logit is not finite.
    __device__ int bucket_of(uint64_t entry) const {
        const float bucket = (logit_of(first) - logit_of(entry)) * buckets;
        return static_cast<int>(fminf(fmaxf(bucket, 0.0f), BUCKETS - 1));
    }
};

// Leaves the lists in shared memory, and what each warp's share of them says; each thread keeps its own
// entries. False if a list did not come.
__device__ __forceinline__ bool receive_lists(const Block& block, int row, uint64_t (&entries)[GATHERED],
                                              int where) {
    GatheredCandidates& s = block.candidates()->gathered;
    const uint4* packets = list_packets(block.args.exchange, row);
    const int count = static_cast<int>(gridDim.x) * LISTED;
    const bool arrived = receive_some<GATHERED>(
        block.args, block.thread, THREADS, count, tag_of(block.args, NUM_LAYERS), where,
        [&](int index) { return packets + index; },
        [&](int index, const uint4& packet) {
            s.entry[index] = joined(packet.x, packet.y);
            if (index % LISTED == 0) s.sum[index / LISTED] = __uint_as_float(packet.z);
        });
    uint64_t first = NO_ENTRY, bound = NO_ENTRY;
    float listed = 0.0f;
#pragma unroll
    for (int i = 0; i < GATHERED; ++i) {
        const int index = block.thread + i * THREADS;
        const uint64_t entry = index < count ? s.entry[index] : NO_ENTRY;
        first = entry < first ? entry : first;
        if (index % LISTED == LISTED - 1) bound = entry < bound ? entry : bound;
        listed += entry != NO_ENTRY ? 1.0f : 0.0f;
        entries[i] = entry;
    }
    first = first_entry(first), bound = first_entry(bound), listed = warp_sum(listed);
    if (block.lane() == 0) {
        s.first[block.warp()] = first, s.bound[block.warp()] = bound, s.listed[block.warp()] = listed;
    }
    s.held[block.thread] = 0;
    return !sync_threads_or<THREADS>(!arrived);
}

// Nothing that is not listed comes before the last entry of its own, full list: up to the first of these last
// ones the merged order is exact.
__device__ __forceinline__ RowSummary summarise(const Block& block, int num_queried) {
    const GatheredCandidates& s = block.candidates()->gathered;
    const bool holds = block.lane() < WARPS;
    const int warp = block.lane() % WARPS;
    RowSummary row;
    row.first = first_entry(holds ? s.first[warp] : NO_ENTRY);
    row.bound = first_entry(holds ? s.bound[warp] : NO_ENTRY);
    const float listed = warp_sum(holds ? s.listed[warp] : 0.0f);
    row.complete = listed == static_cast<float>(VOCAB_SIZE - num_queried);
    if (row.complete) row.bound = NO_ENTRY;
    row.buckets = divide_approx(BUCKETS, logit_of(row.first) - logit_of(row.bound));
    return row;
}

// Adds up the blocks' sums relative to the row's first entry: each thread its own in ascending order, then
// the lanes in a fixed tree. The warps' sums are complete after the block's next barrier.
__device__ __forceinline__ void add_sums(const Block& block, const uint64_t (&entries)[GATHERED],
                                         const RowSummary& row, float inverse_temperature) {
    GatheredCandidates& s = block.candidates()->gathered;
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < GATHERED; ++i) {
        const int index = block.thread + i * THREADS;
        if (entries[i] == NO_ENTRY || index % LISTED != 0) continue;
        total += s.sum[index / LISTED] * rescale(entries[i], row.first, inverse_temperature);
    }
    total = warp_sum(total);
    if (block.lane() == 0) s.total[block.warp()] = total;
}

// The sum over the lanes up to this one.
template <class T>
__device__ __forceinline__ T prefix_sum(const Block& block, T sum) {
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const T before = __shfl_sync(0xffffffff, sum, max_of(block.lane() - offset, 0));
        if (block.lane() >= offset) sum += before;
    }
    return sum;
}

// Works out where each bucket's entries begin: a thread for a bucket.
__device__ __forceinline__ void place_buckets(const Block& block) {
    GatheredCandidates& s = block.candidates()->gathered;
    const int lane = block.lane(), warp = block.warp();
    const uint32_t held = s.held[block.thread];
    uint32_t end = prefix_sum(block, held);
    if (lane == 31) s.in_warp[warp] = end;
    sync_threads<THREADS>();
#pragma unroll 1
    for (int other = 0; other < warp; ++other) end += s.in_warp[other];
    s.begin[block.thread] = end - held;
    if (block.thread == THREADS - 1) s.count = end;
}

// Sorts the exact entries, the first MOST_LISTED of them: in the order of their buckets, few of which hold
// many, and in each by counting those before. All is there after the block's next barrier.
__device__ __forceinline__ void sort_exact(const Block& block, const uint64_t (&entries)[GATHERED],
                                           const RowSummary& row) {
    GatheredCandidates& s = block.candidates()->gathered;
    static_assert(MAX_BLOCKS * LISTED <= 1 << 16 && BUCKETS <= 1 << 16,
                  "a bucket and a place in it take 32 bits");
    uint32_t place[GATHERED];  // 65,536 times that in the bucket, and the bucket: registers are short
#pragma unroll
    for (int i = 0; i < GATHERED; ++i) {
        place[i] = row.bucket_of(entries[i]);
        if (row.has(entries[i])) place[i] += fetch_add_shared(s.held + place[i], 1) << 16;
    }
    const auto bucket = [&](int i) { return place[i] & 0xffff; };
    sync_threads<THREADS>();
    place_buckets(block);
    sync_threads<THREADS>();
#pragma unroll
    for (int i = 0; i < GATHERED; ++i) {
        if (row.has(entries[i])) s.entry[s.begin[bucket(i)] + (place[i] >> 16)] = entries[i];
    }
    sync_threads<THREADS>();
#pragma unroll
    for (int i = 0; i < GATHERED; ++i) {
        if (!row.has(entries[i])) continue;
        const uint32_t begin = s.begin[bucket(i)], end = begin + s.held[bucket(i)];
        uint32_t before = begin;
#pragma unroll 1
        for (uint32_t other = begin; other < end; ++other) before += s.entry[other] < entries[i];
        if (before < MOST_LISTED) s.sorted[before] = entries[i];
    }
}

// ---- the row's token, as the host is going to draw it ----

constexpr int PLACES = MOST_LISTED / 32;  // of the candidates, for each lane of a warp

// The candidates' weights relative to the first one: those of a lane, and the sums up to each.
struct Weights {
    float of[PLACES];
    float reached[PLACES];
    int count;  // of candidates that have one

    // For how many of the first `end` candidates hold(i) is true, i counting those of the lane.
    template <class Holds>
    __device__ int count_among(const Block& block, int end, Holds holds) const {
        float found = 0.0f;
#pragma unroll
        for (int i = 0; i < PLACES; ++i) found += block.lane() * PLACES + i < end && holds(i) ? 1.0f : 0.0f;
        return static_cast<int>(warp_sum(found));
    }

    // The sum of the first `end`.
    __device__ float sum(const Block& block, int end) const {
        float found = 0.0f;
#pragma unroll
        for (int i = 0; i < PLACES; ++i) found += block.lane() * PLACES + i == end - 1 ? reached[i] : 0.0f;
        return warp_sum(found);
    }
};

// Those of the first `count` candidates. The whole warp calls it, as all that follows.
__device__ __forceinline__ Weights weigh(const Block& block, int count, float inverse_temperature) {
    const GatheredCandidates& s = block.candidates()->gathered;
    Weights weights;
    weights.count = count;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PLACES; ++i) {
        const int place = block.lane() * PLACES + i;
        weights.of[i] = place < count ? rescale(s.sorted[place], s.sorted[0], inverse_temperature) : 0.0f;
        weights.reached[i] = sum += weights.of[i];
    }
    const float before = __shfl_sync(0xffffffff, prefix_sum(block, sum), max_of(block.lane() - 1, 0));
#pragma unroll
    for (int i = 0; i < PLACES; ++i) weights.reached[i] += block.lane() > 0 ? before : 0.0f;
    return weights;
}

// How many of the candidates top_k, top_p and min_p leave; 0 if there are not enough to tell. `total` is the
// sum over the whole vocabulary. The same rules as survivors() in ffmini/sampler.py.
__device__ __forceinline__ int survivors(const Block& block, const Weights& weights, bool complete,
                                         float total) {
    const Draw& draw = block.args.draw;
    bool decided = complete || (draw.top_k > 0 && draw.top_k == weights.count);
    int left = weights.count;
    if (draw.top_p < 1.0f) {
        if (draw.top_k > 0 && !decided) return 0;
        const float target = draw.top_p * (draw.top_k > 0 ? weights.sum(block, left) : total);
        const int below =
            weights.count_among(block, left, [&](int i) { return weights.reached[i] < target; });
        decided = decided || below < left;
        left = min_of(below + 1, left);
    }
    const int likely = weights.count_among(block, left, [&](int i) { return weights.of[i] >= draw.min_p; });
    return decided || likely < left ? likely : 0;
}

// The place among the `listed` candidates of the token that the host is going to draw, but for the rounding
// of its sums; -1 if they do not decide.
__device__ __forceinline__ int draw_place(const Block& block, int listed, bool complete, float total,
                                          float inverse_temperature) {
    const Draw& draw = block.args.draw;
    if (draw.top_k == NO_DRAW || !(total < -MASKED)) return -1;
    const int count = draw.top_k > 0 ? min_of(draw.top_k, listed) : listed;
    const Weights weights = weigh(block, count, inverse_temperature);
    const int left = survivors(block, weights, complete && count == listed, total);
    const float point = draw.uniform * weights.sum(block, left);
    const int place = weights.count_among(block, left, [&](int i) { return weights.reached[i] <= point; });
    return min_of(place, left - 1);
}

// Whether a pass behind this token can be wanted.
__device__ __forceinline__ bool goes_on(const Draw& draw, int token) {
    bool ends = false;
#pragma unroll
    for (int i = 0; i < MAX_ENDS; ++i) ends = ends || token == draw.ends[i];
    return !ends;
}

// Leaves the header of a row for the host: the number of candidates; whether they are all and, twice, the
// place of the token that the pass behind gets, from 1 on; the sum relative to the first one. And that token,
// where one is drawn and does not end the text: else that pass waits for the host's. By one warp.
__device__ __forceinline__ void leave_header(const Block& block, int row, int num_queried, int listed,
                                             bool complete, uint4* packet) {
    const PassArgs& args = block.args;
    const GatheredCandidates& s = block.candidates()->gathered;
    const float total = warp_sum(block.lane() < WARPS ? s.total[block.lane()] : 0.0f);
    int place = -1;
    if (num_queried == 0) {
        place = draw_place(block, listed, complete, total, args.inverse_temperature[row]);
    }
    if (block.lane() != 0) return;
    const int token = place < 0 ? -1 : static_cast<int>(s.sorted[place]);
    const bool is_given = place >= 0 && goes_on(args.draw, token);
    const uint32_t about = (complete ? 1u : 0u) + (is_given ? 2u * (place + 1) : 0u);
    store_relaxed_system_128(packet, make_uint4(listed, about, __float_as_uint(total), args.pass));
    if (is_given) args.drawn[(args.pass + 1) & 1] = joined(args.pass + 1, static_cast<uint32_t>(token));
}

// Merges the lists of a row and leaves the result for the host: the header; behind the `num_queried` queried
// logits the candidates by descending logit, each a token and its logit. False if a list did not come.
__device__ __forceinline__ bool merge_lists(const Block& block, int row, int num_queried, uint4* packets,
                                            int where) {
    const GatheredCandidates& s = block.candidates()->gathered;
    uint64_t entries[GATHERED];
    if (!receive_lists(block, row, entries, where)) return false;
    const RowSummary summary = summarise(block, num_queried);
    add_sums(block, entries, summary, block.args.inverse_temperature[row]);
    sort_exact(block, entries, summary);
    sync_threads<THREADS>();
    const int count = static_cast<int>(s.count), listed = min_of(count, MOST_LISTED);
    if (block.warp() == WARPS - 1) {
        leave_header(block, row, num_queried, listed, summary.complete && listed == count, packets);
    }
#pragma unroll 1
    for (int i = block.thread; i < listed; i += THREADS) {
        const uint64_t entry = s.sorted[i];
        store_relaxed_system_128(
            packets + 1 + num_queried + i,
            make_uint4(static_cast<uint32_t>(entry), 0, __float_as_uint(logit_of(entry)), block.args.pass));
    }
    return true;
}

// What the pass says of the wanted rows. The block's logits, in global memory, are complete after its next
// barrier, which is here. False if a wait gave up.
__device__ __forceinline__ bool leave_candidates(const Block& block, int where) {
    const PassArgs& args = block.args;
    const auto packets = [&](int row) { return args.candidates + row * RESULT_PACKETS; };
    sync_threads<THREADS>();
#pragma unroll 1
    for (int row = 0; row < num_rows(args); ++row) {
        if (!is_wanted(args, row)) continue;
        for_own_queried(block, row, [&](int i, int token, int) {
            const float logit = args.logits[static_cast<uint64_t>(row) * VOCAB_SIZE + token];
            store_relaxed_system_128(packets(row) + 1 + i,
                                     make_uint4(0, 0, __float_as_uint(logit), args.pass));
        });
        list_share(block, row);
    }
    sync_threads<THREADS>();
    if (is_wanted(args, block.warp())) publish_list(block, block.warp());
    // The last blocks have the fewest tiles: each takes every gridDim.x-th row.
    const int blocks = static_cast<int>(gridDim.x);
#pragma unroll 1
    for (int row = blocks - 1 - static_cast<int>(blockIdx.x); row < num_rows(args); row += blocks) {
        if (!is_wanted(args, row)) continue;
        if (!merge_lists(block, row, num_queried(block, row), packets(row), where)) return false;
    }
    return true;
}
