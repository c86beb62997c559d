// Matrix times the activation rows in shared memory, in the canonical order: per segment of 256 k a sum that
// starts from zero, the segments then added in ascending order. Weights are mma's A operand (16 outputs),
// activations its B operand (columns), so a row's bits do not depend on how many others there are.
#pragma once

#include "activations.cuh"
#include "codes.cuh"

// ---- one slot ----
// The lane's part of a slot in registers: 16 bytes of each line and, of each group, the scales of outputs
// lane / 4 and 8 more. load<K>() reads a slot that is K wide; `slot` is the lane's 16 bytes of its first
// line. seen() is a number that needs every read. (Zeros at first: what has a value on some paths only is
// spilled.)

template <class M, bool INTEGER = M::BITS != 16>
struct SlotPart;

template <class M>
struct SlotPart<M, false> {
    uint4 line[LINES_PER_SLOT] = {};

    template <int K>
    __device__ void load(const Block&, const uint8_t* slot) {
#pragma unroll
        for (int i = 0; i < K / 16; ++i) line[i] = load_line(slot, i);
    }
    __device__ float seen() const { return __uint_as_float(line[0].x ^ line[1].x ^ line[2].x ^ line[3].x); }
};

template <class M>
struct SlotPart<M, true> {
    static constexpr int GROUPS = ceil_div(M::SLOT_K, M::GROUP);
    uint4 line[LINES_PER_SLOT] = {};
    typename Codes<M>::Scale scale[GROUPS][2] = {};

    template <int K>
    __device__ void load(const Block& block, const uint8_t* slot) {
#pragma unroll
        for (int i = 0; i < K / 64 * Codes<M>::LINES; ++i) line[i] = load_line(slot, i);
        const uint8_t* scales = slot - 16 * block.lane() + K * M::BITS / 8 * TILE_ROWS;
#pragma unroll
        for (int group = 0; group < ceil_div(K, M::GROUP); ++group) {
            for (int half = 0; half < 2; ++half) {
                scale[group][half] =
                    load_scale<M>(scales + group * TILE_ROWS * M::SCALE_BYTES, block.lane() / 4 + 8 * half);
            }
        }
    }
    __device__ float seen() const {
        uint32_t all = line[0].x ^ line[1].x ^ line[2].x ^ line[3].x;
        for (int group = 0; group < GROUPS; ++group) all ^= scale[group][0] ^ scale[group][1];
        return __uint_as_float(all);
    }
};

// ---- one unit: 16 outputs, one segment ----
// What a warp makes of a unit. Its Input is the lane's part of a segment of the activations: input_of() says
// where it begins in the first segment. add<K>() takes the unit's slots in their order, each K wide, from
// `in_segment` on; finish() hands each of the lane's sums to take(): its place in [row][output of the tile],
// counted from place_of(), and the sum. seen() is a number made of everything that was added. What depends on
// the lane alone is worked out before the input comes.

template <class M, bool INTEGER = M::BITS != 16>
class Unit;

// bf16: a segment goes in m16n8k16 steps, a column is a row.
template <class M>
class Unit<M, false> {
  public:
    struct Input {
        const uint8_t* activations;

        __device__ void load(const Block& block, int input, int segment) {
            activations = block.memory + input + 2 * segment * SEGMENT;
        }
    };

    static __device__ int input_of(const Block& block) {
        const int row = min_of(block.lane() / 4, num_rows(block.args) - 1);  // columns without one repeat it
        return 2 * (row * ACTIVATION_STRIDE + 8 * (block.lane() % 4));
    }
    static __device__ int place_of(const Block& block) {
        return block.lane() % 4 * 2 * TILE_ROWS + block.lane() / 4;
    }

    template <int K>
    __device__ void add(const SlotPart<M>& slot, const Input& input, int in_segment) {
        const uint8_t* activations = input.activations + 2 * in_segment;
#pragma unroll
        for (int j = 0; j < K / 32; ++j) {
            const uint4 b = *reinterpret_cast<const uint4*>(activations + 64 * j);
            step(slot.line[2 * j], b.x, b.y);
            step(slot.line[2 * j + 1], b.z, b.w);
        }
    }

    __device__ float seen() const { return sum_[0] + sum_[2]; }

    template <class Take>
    __device__ void finish(const Block& block, const Input&, Take take) const {
        for (int c = 0; c < min_of(ROWS, 2); ++c) {
            if (ROWS < MAX_ROWS && block.lane() % 4 * 2 + c >= ROWS) continue;
            take(c * TILE_ROWS, sum_[c]);
            take(c * TILE_ROWS + 8, sum_[2 + c]);
        }
    }

  private:
    __device__ void step(const uint4& line, uint32_t b0, uint32_t b1) {
        const uint32_t a[4] = {line.x, line.y, line.z, line.w};
        mma_16x8x16(sum_, a, b0, b1);
    }

    float sum_[4] = {};
};

// int8 and int4: a group goes in m16n8k32 steps of integers, two columns are a row's planes. With t = lane %
// 4 a lane has rows t and, of more than four, t + 4; outputs lane / 4 and 8 more.
template <class M>
class Unit<M, true> {
  public:
    static constexpr int SETS = ceil_div(ROWS, 4);

    // In registers: several units may share it.
    struct Input {
        static constexpr int GROUPS = SEGMENT / M::GROUP;
        uint4 b[SEGMENT / 64][SETS];  // of a block of 64 k: {x, y} and {z, w} are the operands of two steps
        float group_sum[GROUPS][SETS];
        float worth[SETS];  // of one, see ActivationScales

        __device__ void load(const Block& block, int input, int segment) {
            const int at = 2 * segment * SEGMENT;
            const uint8_t* planes[2] = {block.memory + input + at, block.memory + (input ^ 64) + at};
            const ActivationScales& scales = *block.scales();
#pragma unroll
            for (int set = 0; set < SETS; ++set) {
                const int row = min_of(block.lane() % 4 + 4 * set, ROWS - 1);
#pragma unroll
                for (int i = 0; i < SEGMENT / 64; ++i) {
                    const int offset = 64 * (i - i % 2) + 8 * set * ACTIVATION_STRIDE;
                    b[i][set] = make_uint4(0, 0, 0, 0);
                    if (has_column(block)) {
                        b[i][set] = *reinterpret_cast<const uint4*>(planes[i % 2] + offset);
                    }
                }
#pragma unroll
                for (int i = 0; i < GROUPS && M::BITS == 4 && !OWN_INPUT<M>; ++i) {
                    group_sum[i][set] = scales.group_sum[row * GROUP_STRIDE + segment * GROUPS + i];
                }
                worth[set] = scales.segment[row * SEGMENT_STRIDE + segment];
            }
            if constexpr (M::BITS == 4 && OWN_INPUT<M>) add_groups();
        }

        // A product with ones gives the columns' sums to the lanes that want them.
        __device__ void add_groups() {
            const uint32_t ones[4] = {0x01010101, 0x01010101, 0x01010101, 0x01010101};
#pragma unroll
            for (int set = 0; set < SETS; ++set) {
                int sums[GROUPS][4] = {};
#pragma unroll
                for (int i = 0; i < SEGMENT / 64; ++i) {
                    mma_16x8x32_signed(sums[64 * i / M::GROUP], ones, b[i][set].x, b[i][set].y);
                    mma_16x8x32_signed(sums[(64 * i + 32) / M::GROUP], ones, b[i][set].z, b[i][set].w);
                }
#pragma unroll
                for (int i = 0; i < GROUPS; ++i) {
                    group_sum[i][set] = static_cast<float>(256 * sums[i][0] + sums[i][1]);
                }
            }
        }
    };

    // Whether the lane's column is of a row that the build has. The others are zeros: products with zeros
    // cost less power, and a card at its limit lowers its clock.
    static __device__ bool has_column(const Block& block) { return ROWS >= 4 || block.lane() / 4 < 2 * ROWS; }

    // Of the first set. Columns whose row the pass does not have multiply what happens to lie there.
    static __device__ int input_of(const Block& block) {
        const int column = block.lane() / 4;
        const int row = min_of(column / 2, ROWS - 1);
        return 2 * row * ACTIVATION_STRIDE + plane_offset(column % 2, 0, block.lane() % 4);
    }
    static __device__ int place_of(const Block& block) {
        return block.lane() % 4 * TILE_ROWS + block.lane() / 4;
    }

    template <int K>
    __device__ void add(const SlotPart<M>& slot, const Input& input, int in_segment) {
        int products[SETS][4] = {};
#pragma unroll
        for (int block64 = 0; block64 < K / 64; ++block64) {
            uint32_t a[2][4];
            Codes<M>::fragments(slot.line + block64 * Codes<M>::LINES, a);
            const uint4(&b)[SETS] = input.b[in_segment / 64 + block64];
#pragma unroll
            for (int step = 0; step < 2; ++step) {
                for (int set = 0; set < SETS; ++set) {
                    Codes<M>::multiply(products[set], a[step], step == 0 ? b[set].x : b[set].z,
                                       step == 0 ? b[set].y : b[set].w);
                }
                const int k = 64 * block64 + 32 * step, group = k / M::GROUP;
                if ((k + 32) % M::GROUP == 0 || k + 32 == K) {
                    add_group(products, slot.scale[group], input.group_sum[in_segment / M::GROUP + group]);
                }
            }
        }
    }

    __device__ float seen() const { return sum_[0][0] + sum_[0][1]; }

    template <class Take>
    __device__ void finish(const Block& block, const Input& input, Take take) const {
        for (int set = 0; set < SETS; ++set) {
            if (ROWS % 4 != 0 && block.lane() % 4 + 4 * set >= ROWS) continue;
            take(4 * set * TILE_ROWS, sum_[set][0] * input.worth[set]);
            take(4 * set * TILE_ROWS + 8, sum_[set][1] * input.worth[set]);
        }
    }

  private:
    // Adds the finished products of a group and begins the next.
    __device__ void add_group(int (&products)[SETS][4], const typename Codes<M>::Scale (&scale)[2],
                              const float (&group_sum)[SETS]) {
        for (int set = 0; set < SETS; ++set) {
            for (int half = 0; half < 2; ++half) {
                sum_[set][half] = Codes<M>::scaled(Codes<M>::exact(products[set], half), group_sum[set],
                                                   scale[half], sum_[set][half]);
            }
            for (int i = 0; i < 4; ++i) products[set][i] = 0;
        }
    }

    float sum_[SETS][2] = {};
};

// ---- all units of a stage ----

// How many slots of its next unit a warp takes from the ring before it needs them, into registers: so much
// more is fetched while it waits for its input. Two of bf16, and of int8 where registers are not short and a
// slot has no more than four groups. None of int4, by which small models lose and large ones win next to
// nothing.
constexpr bool SPARE_REGISTERS = ROWS == 1 && (!BULK_COPIES || HANDS_ON_REGISTERS);
template <class M>
constexpr int TAKEN_SLOTS = M::BITS == 16                                                  ? 2
                            : M::BITS == 8 && SPARE_REGISTERS && M::SLOT_K <= 4 * M::GROUP ? 2
                                                                                           : 0;

// The block's share of M, the matrix of `stage`, times its activations. When it is made it waits for the
// first weights. Then, for each part() of the input: receive_input(), run(), and next_part(). All threads do
// so. A warp takes units in the stream's order, see Cursor.
template <class M>
class Products {
  public:
    __device__ Products(Block& block, Stage stage)
        : partition_(block.shared()->partition[stage]),
          tiles_(partition_.tiles()),
          line_(opaque(block.lane() * 16)),
          input_(opaque(Unit<M>::input_of(block))),
          place_(opaque(Unit<M>::place_of(block))) {
        begin(block, M::SPLIT ? partition_.first_part() : 0);
    }

    __device__ int part() const { return part_; }

    // Goes on to the block's next part; false if there is none.
    __device__ bool next_part(Block& block) {
        if (!M::SPLIT || part_ + partition_.part_step() >= M::PARTS) return false;
        begin(block, part_ + partition_.part_step());
        return true;
    }

    // `arrived` is what receive_input() said; false, in all threads, if anything of the input did not come.
    // The activations may be gone when it returns, and nobody uses their memory. Rounds take turns with two
    // buffers: whoever adds up a round is done with it before anyone begins the next but one. start,
    // epilogue: see add_segments().
    template <class Start, class Epilogue>
    __device__ bool run(Block& block, bool arrived, Start start, Epilogue epilogue) {
        if (!OWN_INPUT<M> && !arrived) return false;
        const int units = tiles_ * segments();
        if constexpr (M::SPLIT) run_whole_tiles(block, start, epilogue);
        typename Unit<M>::Input input;
        if constexpr (SAME_SEGMENT<M>) {
            input.load(block, input_, M::turn(block.warp()) % M::HELD_SEGMENTS);
            if (!OWN_INPUT<M>) sync_threads<THREADS>();  // all have theirs
        }
        int parity = 0, unit = whole_tiles() * segments() + M::turn(block.warp());
        for (int first = whole_tiles() * segments(); first < units; first += ROUND<M>) {
            const int last = min_of(first + ROUND<M>, units);
            while (unit < last) {
                const int segment =
                    SAME_SEGMENT<M> ? M::turn(block.warp()) % M::HELD_SEGMENTS : unit % segments();
                if (!SAME_SEGMENT<M>) input.load(block, input_, held_at(block, segment));
                float* of_unit = sums_of(block, parity, unit - first) + place_;
                multiply(block, input, segment, [&](int place, float sum) { of_unit[place] = sum; });
                unit = next_unit(block, unit);
                leave_unit(block, unit < units, SAME_SEGMENT<M> ? segment : unit % segments());
            }
            if (OWN_INPUT<M> && first == 0) {
                if (sync_threads_or<THREADS>(!arrived)) return false;
            } else {
                sync_threads<THREADS>();
            }
            add_segments(block, first, last, parity, start, epilogue);
            parity ^= 1;
        }
        // All have added up: the next product's input may come without another barrier.
        if constexpr (SAME_SEGMENT<M> || (ANY_OWN_INPUT && !M::SPLIT)) sync_threads<THREADS>();
        return true;
    }

  private:
    // Floats from a unit's sums to those of the tile's next segment.
    static constexpr int SUMS_STEP = OWN_SUMS<M> ? SEGMENT / 2 : UNIT_SUMS;

    // Where a segment that the warp multiplies lies among the activations, counted in segments.
    static __device__ int held_at(const Block& block, int segment) {
        constexpr int WHOLE = OwnSegments<M>::WHOLE * WARPS;
        return OWN_INPUT<M> && segment >= WHOLE ? WHOLE + M::turn(block.warp()) : segment;
    }

    // The warp's next unit, see UnitPlace.
    static __device__ int next_unit(const Block& block, int unit) {
        if (M::HELD_SEGMENTS < WARPS || M::HELD_SEGMENTS % WARPS == 0) return unit + WARPS;
        UnitPlace place = {unit / M::HELD_SEGMENTS, unit % M::HELD_SEGMENTS};
        place.advance(M::turn(block.warp()), M::HELD_SEGMENTS);
        return place.tile * M::HELD_SEGMENTS + place.segment;
    }

    // Where the sums of unit `in_round` lie, [row][output].
    static __device__ float* sums_of(const Block& block, int parity, int in_round) {
        if constexpr (OWN_SUMS<M>) {
            const int piece =
                ROWS * (OWN_TURNS * parity + in_round / WARPS);  // of 16 sums, 8 of them in a row
            return reinterpret_cast<float*>(block.memory) + piece / 8 * (ACTIVATION_STRIDE / 2) +
                   in_round % WARPS * SUMS_STEP + piece % 8 * TILE_ROWS;
        }
        float* buffers = SAME_SEGMENT<M> ? reinterpret_cast<float*>(block.memory) : block.shared()->part;
        return buffers + (parity * ROUND<M> + in_round) * UNIT_SUMS;
    }

    static_assert(EVEN_ROUNDS<M> || !OWN_SUMS<M>, "what is carried on is read as if sums lay side by side");
    static_assert(M::HELD_SEGMENTS <= WARPS || !M::SPLIT, "the last part's units have an order of their own");

    static constexpr int HELD_PARTS = M::SPLIT ? 1 : M::PARTS;  // of a tile that the block adds up

    // Waits for the warp's first slot, which does not depend on the input: that may arrive meanwhile.
    __device__ void begin(Block& block, int part) {
        part_ = part;
        const bool whole = block.warp() < whole_tiles();
        if (whole || has_units(block)) await_unit(block, whole ? 0 : first_segment(block));
    }

    __device__ int whole_tiles() const { return M::SPLIT ? partition_.whole_tiles() : 0; }

    // Besides whole tiles.
    __device__ bool has_units(const Block& block) const {
        return M::turn(block.warp()) < (tiles_ - whole_tiles()) * segments();
    }

    // Of the first of these.
    __device__ int first_segment(const Block& block) const { return M::turn(block.warp()) % segments(); }

    // Waits for the first slot of the warp's next unit, of `segment`, and takes what is taken ahead.
    __device__ void await_unit(Block& block, int segment) {
        block.stream.wait();
#pragma unroll
        for (int i = 0; i < TAKEN_SLOTS<M>; ++i) {
            if (i > 0 && i >= slots_of(segment)) break;
            if (i > 0) block.stream.wait();
            load_slot(block, taken_[i], segment, i);
            block.stream.release(taken_[i].seen());
        }
    }

    __device__ void load_slot(const Block& block, SlotPart<M>& slot, int segment, int i) const {
        const uint8_t* line = block.stream.slot() + line_;
        if (is_tail(segment, i)) {
            slot.template load<M::TAIL_K>(block, line);
        } else {
            slot.template load<M::SLOT_K>(block, line);
        }
    }

    // Waits for the first slot of the warp's next unit, if it has `more`, and fetches over borders.
    __device__ void leave_unit(Block& block, bool more, int segment) {
        if (more) await_unit(block, segment);
        block.stream.refill();
    }

    // Of a tile's slots that of slot i of a segment, counted in what the block holds.
    __device__ int slot_of(int segment, int i) const {
        return ((M::SPLIT ? part_ * M::IN_PART : 0) + segment) * M::SLOTS_PER_SEGMENT + i;
    }
    __device__ int slots_of(int segment) const {
        constexpr bool EVEN = M::SLOTS % M::SLOTS_PER_SEGMENT == 0;
        return EVEN ? M::SLOTS_PER_SEGMENT : min_of(M::SLOTS_PER_SEGMENT, M::SLOTS - slot_of(segment, 0));
    }
    __device__ bool is_tail(int segment, int i) const {
        return M::TAIL_K != M::SLOT_K && slot_of(segment, i) + 1 == M::SLOTS;
    }

    // A warp adds up a tile's segments as they come, in its part of the second round's buffer, where half
    // warps find them. They have read the sums when the next tile's come: the warp meets before it gives a
    // slot back.
    template <class Start, class Epilogue>
    __device__ void run_whole_tiles(Block& block, Start start, Epilogue epilogue) {
        float* sums = block.shared()->part + (ROUND<M> + block.warp()) * UNIT_SUMS;
        typename Unit<M>::Input input;
        for (int tile = block.warp(); tile < whole_tiles(); tile += WARPS) {
            for (int segment = 0; segment < segments(); ++segment) {
                const bool last = segment + 1 == segments();
                float* own = sums + place_;
                input.load(block, input_, segment);
                multiply(block, input, segment,
                         [&](int place, float sum) { own[place] = segment == 0 ? sum : own[place] + sum; });
                const bool more = tile + WARPS < whole_tiles();
                leave_unit(block, !last || more || has_units(block),
                           !last ? segment + 1 : (more ? 0 : first_segment(block)));
            }
            __syncwarp();
            const int thread = block.thread;
            block.thread = opaque(thread);
            for (int first = 0; first < num_rows(block.args); first += 2) {
                const bool valid = first + block.lane() / 16 < num_rows(block.args);
                const int row = valid ? first + block.lane() / 16 : first;
                const float sum = sums[row * TILE_ROWS + block.lane() % TILE_ROWS];
                epilogue(tile, tile_of(tile), row, start(tile, row, valid) + sum, valid);
            }
            block.thread = thread;
        }
        if (whole_tiles() == tiles_) sync_threads<THREADS>();
    }

    // Of what the block holds.
    __device__ int segments() const {
        constexpr bool EVEN = !M::SPLIT || M::SEGMENTS == M::PARTS * M::IN_PART;
        return EVEN ? M::HELD_SEGMENTS : min_of(M::IN_PART, M::SEGMENTS - part_ * M::IN_PART);
    }

    __device__ int tile_of(int own_tile) const {
        return M::SPLIT ? partition_.first_tile() + own_tile * partition_.tile_step()
                        : blockIdx.x + own_tile * gridDim.x;
    }

    // Multiplies a unit, for whose first slot await_unit() has waited, by the input of its segment, which
    // counts in what the block holds. take: see Unit::finish().
    template <class Take>
    __device__ void multiply(Block& block, const typename Unit<M>::Input& input, int segment, Take take) {
        Unit<M> unit;
        const auto add = [&](const SlotPart<M>& slot, int i) {
            if (is_tail(segment, i)) {
                unit.template add<M::TAIL_K>(slot, input, i * M::SLOT_K);
            } else {
                unit.template add<M::SLOT_K>(slot, input, i * M::SLOT_K);
            }
        };
#pragma unroll
        for (int i = 0; i < TAKEN_SLOTS<M>; ++i) {
            if (i > 0 && i >= slots_of(segment)) break;
            add(taken_[i], i);
        }
#pragma unroll(M::BITS == 16 ? 1 : M::SLOTS_PER_SEGMENT)  // integers have their input in registers
        for (int i = TAKEN_SLOTS<M>; i < M::SLOTS_PER_SEGMENT; ++i) {
            if (i > 0 && i >= slots_of(segment)) break;
            if (i > 0) block.stream.wait();
            SlotPart<M> slot;
            load_slot(block, slot, segment, i);
            add(slot, i);
            block.stream.release(unit.seen());
        }
        unit.finish(block, input, take);
    }

    // Adds the segments of units [first, last) in ascending order, those of a part from zero, and the parts,
    // in ascending order too, to start(own tile, row, valid). A tile that is complete goes to epilogue(own
    // tile, tile, row, value, valid) in half warps, lane % 16 being the output, as for_rows_of_tiles() says.
    // Of the one tile that goes on in the next round both sums are carried.
    template <class Start, class Epilogue>
    __device__ void add_segments(Block& block, int first, int last, int parity, Start start,
                                 Epilogue epilogue) const {
        const int first_tile = first / segments(), thread = block.thread;
        const int tiles = ceil_div(last, segments()) - first_tile;
        block.thread = opaque(thread);  // what follows from it is not computed ahead, by warps without a job
        const int output = block.thread % TILE_ROWS;
        for_rows_of_tiles(block, tiles, [&](int in_round, int row, bool valid) {
            const int tile = first_tile + in_round;
            const int tile_begin = tile * segments(), tile_end = tile_begin + segments();
            if constexpr (EVEN_ROUNDS<M>) {
                float x = start(tile, row, valid);
                const float* sums = sums_of(block, parity, tile_begin - first) + row * TILE_ROWS + output;
#pragma unroll
                for (int part = 0; part < HELD_PARTS; ++part) {
                    float sum = 0.0f;
#pragma unroll
                    for (int i = 0; i < M::IN_PART; ++i) sum += sums[(part * M::IN_PART + i) * SUMS_STEP];
                    x += sum;
                }
                epilogue(tile, tile_of(tile), row, x, valid);
                return;
            }
            const float* sums = sums_of(block, parity, 0) + row * TILE_ROWS + output;
            float sum = 0.0f;
            constexpr int ROUND_CARRY = 2 * UNIT_SUMS;
            float* carry = block.shared()->carry + row * TILE_ROWS + output;
            const int begin = max_of(first, tile_begin), end = min_of(last, tile_end);
            float before = start(tile, row, valid);  // the parts that are complete
            if (begin > tile_begin) {
                sum = carry[parity * ROUND_CARRY];
                before = carry[parity * ROUND_CARRY + UNIT_SUMS];
            }
            for (int unit = begin; unit < end;) {
                const int in_tile = unit - tile_begin, part = HELD_PARTS == 1 ? 0 : in_tile / M::IN_PART;
                if (HELD_PARTS > 1 && in_tile > 0 && in_tile == part * M::IN_PART) before += sum, sum = 0.0f;
                const int part_end =
                    HELD_PARTS == 1 ? end : min_of(end, tile_begin + (part + 1) * M::IN_PART);
#pragma unroll 8
                for (; unit < part_end; ++unit) sum += sums[(unit - first) * UNIT_SUMS];
            }
            if (valid && end < tile_end) {
                carry[(parity ^ 1) * ROUND_CARRY] = sum;
                carry[(parity ^ 1) * ROUND_CARRY + UNIT_SUMS] = before;
            }
            epilogue(tile, tile_of(tile), row, before + sum, valid && end == tile_end);
        });
        block.thread = thread;
    }

    const Partition& partition_;
    const int tiles_;                 // the block's of a part
    const int line_, input_, place_;  // the lane's in a line, in the activations and among a unit's sums
    int part_;                        // that the block is at
    SlotPart<M> taken_[max_of(1, TAKEN_SLOTS<M>)];  // of the warp's next unit
};
