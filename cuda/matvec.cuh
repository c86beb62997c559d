// Matrix times the activation rows in shared memory, in the canonical order: per segment of 256 k a sum that
// starts from zero, the segments then added in ascending order. Weights are mma's A operand (16 outputs),
// activations its B operand (columns), so a row's bits do not depend on how many others there are.
#pragma once

#include "activations.cuh"
#include "codes.cuh"

// ---- one unit: 16 outputs, one segment ----
// What a warp makes of a unit: add<K>() takes the slots in their order, each K wide, at `in_segment`;
// finish() leaves part[row][output of the tile]; seen() is a number made of everything that was read in the
// slots. Where a lane reads is known before the input comes: a slot's address is that of the lane's 16 bytes
// in its first line, input_of() the offset among the activations at which each of the lane's SETS begins.

template <class M, bool INTEGER = M::BITS != 16>
class Unit;

// bf16: a segment goes in m16n8k16 steps, a column is a row.
template <class M>
class Unit<M, false> {
  public:
    static constexpr int SETS = 1;

    static __device__ int input_of(const Block& block, int) {
        const int row = min_of(block.lane() / 4, num_rows(block.args) - 1);  // columns without one repeat it
        return 2 * (row * ACTIVATION_STRIDE + 8 * (block.lane() % 4));
    }

    template <int K>
    __device__ void add(const Block& block, const uint8_t* slot, const int (&input)[SETS], int segment,
                        int in_segment) {
        const uint8_t* activations = block.memory + input[0] + 2 * (segment * SEGMENT + in_segment);
#pragma unroll
        for (int j = 0; j < K / 32; ++j) {
            const uint4 b = *reinterpret_cast<const uint4*>(activations + 64 * j);
            step(load_line(slot, 2 * j), b.x, b.y);
            step(load_line(slot, 2 * j + 1), b.z, b.w);
        }
    }

    __device__ float seen() const { return sum_[0] + sum_[2]; }

    __device__ void finish(const Block& block, int, float* part) const {
        const int column = 2 * (block.lane() % 4), output = block.lane() / 4;
        for (int c = 0; c < min_of(ROWS, 2); ++c) {
            if (column + c < ROWS) {
                part[(column + c) * TILE_ROWS + output] = sum_[c];
                part[(column + c) * TILE_ROWS + output + 8] = sum_[2 + c];
            }
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

    static __device__ int input_of(const Block& block, int set) {
        const int column = block.lane() / 4;
        const int row =
            min_of(column / 2 + 4 * set, num_rows(block.args) - 1);  // columns without one repeat it
        return 2 * row * ACTIVATION_STRIDE + plane_offset(column % 2, 0, block.lane() % 4);
    }

    template <int K>
    __device__ void add(const Block& block, const uint8_t* slot, const int (&input)[SETS], int segment,
                        int in_segment) {
        const uint8_t* scales = slot - block.lane() * 16 + K * M::BITS / 8 * TILE_ROWS;
        int products[SETS][4] = {};
#pragma unroll(SETS == 1 ? 4 : 2)  // registers are short
        for (int block64 = 0; block64 < K / 64; ++block64) {
            uint32_t a[2][4];
            Codes<M>::load(slot, block64, a);
            uint4 b[SETS];
            for (int set = 0; set < SETS; ++set) {
                b[set] = load_planes(block, input[set], segment, in_segment / 64 + block64);
            }
#pragma unroll
            for (int step = 0; step < 2; ++step) {
                for (int set = 0; set < SETS; ++set) {
                    Codes<M>::multiply(products[set], a[step], step == 0 ? b[set].x : b[set].z,
                                       step == 0 ? b[set].y : b[set].w);
                }
                const int k = 64 * block64 + 32 * step, group = k / M::GROUP;
                if ((k + 32) % M::GROUP == 0 || k + 32 == K) {
                    add_group(block, products, scales + group * TILE_ROWS * M::SCALE_BYTES,
                              (segment * SEGMENT + in_segment) / M::GROUP + group);
                }
            }
        }
    }

    __device__ float seen() const { return sum_[0][0] + sum_[0][1]; }

    __device__ void finish(const Block& block, int segment, float* part) const {
        const int output = block.lane() / 4;
        for (int set = 0; set < SETS; ++set) {
            const int row = block.lane() % 4 + 4 * set;
            if (row >= ROWS) continue;
            const float scale = block.scales()->segment[row * MAX_SEGMENTS + segment];
            part[row * TILE_ROWS + output] = sum_[set][0] * scale;
            part[row * TILE_ROWS + output + 8] = sum_[set][1] * scale;
        }
    }

  private:
    // Of two steps the B fragments: {x, y} and {z, w}.
    static __device__ uint4 load_planes(const Block& block, int input, int segment, int block64) {
        const int at = (block64 % 2 == 0 ? input : input ^ 64) + block64 / 2 * 128;  // as plane_offset()
        return *reinterpret_cast<const uint4*>(block.memory + at + 2 * segment * SEGMENT);
    }

    // Adds the finished products of a group and begins the next.
    __device__ void add_group(const Block& block, int (&products)[SETS][4], const uint8_t* scales,
                              int group) {
        for (int set = 0; set < SETS; ++set) {
            const int row = min_of(block.lane() % 4 + 4 * set, ROWS - 1);
            float group_sum = 0.0f;
            if constexpr (M::BITS == 4) group_sum = block.scales()->group_sum[row * MAX_GROUPS + group];
            for (int half = 0; half < 2; ++half) {
                sum_[set][half] = Codes<M>::scaled(Codes<M>::exact(products[set], half), group_sum, scales,
                                                   block.lane() / 4 + 8 * half, sum_[set][half]);
            }
            for (int i = 0; i < 4; ++i) products[set][i] = 0;
        }
    }

    float sum_[SETS][2] = {};
};

// ---- all units of a stage ----

// Units of a round: of whole tiles, unless that makes it much shorter.
template <class M>
constexpr int ROUND =
    ROUND_UNITS % M::HELD_SEGMENTS < WARPS / 2 ? ROUND_UNITS / M::HELD_SEGMENTS * M::HELD_SEGMENTS
                                               : ROUND_UNITS;

// The block's share of M, the matrix of `stage`, times its activations. When it is made it waits for the
// first weights. Then, for each part() of the input: the activations in place and a barrier, run(), and
// next_part(). All threads do so. Unit u of a part is warp u % WARPS's, in the stream's order too.
template <class M>
class Products {
  public:
    __device__ Products(Block& block, Stage stage)
        : partition_(block.shared()->partition[stage]),
          tiles_(block.own_tiles(stage)),
          line_(opaque(block.lane() * 16)) {
        for (int set = 0; set < Unit<M>::SETS; ++set) input_[set] = opaque(Unit<M>::input_of(block, set));
        begin(block, M::SPLIT ? partition_.first_part() : 0);
    }

    __device__ int part() const { return part_; }

    // Goes on to the block's next part; false if there is none.
    __device__ bool next_part(Block& block) {
        if (!M::SPLIT || part_ + partition_.part_step() >= M::PARTS) return false;
        begin(block, part_ + partition_.part_step());
        return true;
    }

    // Rounds take turns with two buffers: whoever adds up a round is done with it before anyone begins the
    // next but one. start, epilogue: see add_segments().
    template <class Start, class Epilogue>
    __device__ void run(Block& block, Start start, Epilogue epilogue) {
        const int units = tiles_ * segments();
        int parity = 0;
        for (int first = 0; first < units; first += ROUND<M>) {
            const int last = min_of(first + ROUND<M>, units);
            float* sums = block.shared()->part + parity * ROUND_UNITS * ROWS * TILE_ROWS;
            for (int unit = first + (block.warp() - first & (WARPS - 1)); unit < last; unit += WARPS) {
                multiply(block, unit % segments(), sums + (unit - first) * ROWS * TILE_ROWS);
                if (unit + WARPS < units) slot_ = block.stream.wait() + line_;
                block.stream.refill();
            }
            sync_threads<THREADS>();
            add_segments(block, sums, first, last, parity, start, epilogue);
            parity ^= 1;
        }
    }

  private:
    static constexpr int HELD_PARTS = M::SPLIT ? 1 : M::PARTS;  // of a tile that the block adds up

    // Waits for the warp's first slot, which does not depend on the input: that may arrive meanwhile.
    __device__ void begin(Block& block, int part) {
        part_ = part;
        if (block.warp() < tiles_ * segments()) slot_ = block.stream.wait() + line_;
    }

    // Of what the block holds.
    __device__ int segments() const {
        return M::SPLIT ? min_of(M::IN_PART, M::SEGMENTS - part_ * M::IN_PART) : M::SEGMENTS;
    }

    __device__ int tile_of(int own_tile) const {
        return M::SPLIT ? partition_.first_tile() + own_tile * partition_.tile_step()
                        : blockIdx.x + own_tile * gridDim.x;
    }

    // Multiplies a unit, whose first slot is there, into sums[row][output of the tile]. `segment` counts in
    // what the block holds.
    __device__ void multiply(Block& block, int segment, float* sums) {
        Unit<M> unit;
        const int first = ((M::SPLIT ? part_ * M::IN_PART : 0) + segment) * M::SLOTS_PER_SEGMENT;
        const int last = min_of(first + M::SLOTS_PER_SEGMENT, M::SLOTS);
#pragma unroll 1
        for (int slot = first; slot < last; ++slot) {
            const int in_segment = (slot - first) * M::SLOT_K;
            if (M::TAIL_K == M::SLOT_K || slot + 1 < M::SLOTS) {
                unit.template add<M::SLOT_K>(block, slot_, input_, segment, in_segment);
            } else {
                unit.template add<M::TAIL_K>(block, slot_, input_, segment, in_segment);
            }
            block.stream.release(unit.seen());
            if (slot + 1 < last) slot_ = block.stream.wait() + line_;
        }
        unit.finish(block, segment, sums);
    }

    // Adds the segments of units [first, last) in ascending order, those of a part from zero, and the parts,
    // in ascending order too, to start(own tile, row). A tile that is complete goes to epilogue(own tile,
    // tile, row, value, valid) in half warps, lane % 16 being the output, as for_half_warps() says. Of the
    // one tile that goes on in the next round both sums are carried.
    template <class Start, class Epilogue>
    __device__ void add_segments(Block& block, const float* sums, int first, int last, int parity,
                                 Start start, Epilogue epilogue) const {
        const int first_tile = first / segments(), thread = block.thread;
        const int jobs = (ceil_div(last, segments()) - first_tile) * num_rows(block.args);
        block.thread = opaque(thread);  // what follows from it is not computed ahead, by warps without a job
        const int output = block.thread % TILE_ROWS;
        for_half_warps(block, jobs, [&](int job, bool valid) {
            const int tile = first_tile + job / num_rows(block.args), row = job % num_rows(block.args);
            const int tile_begin = tile * segments(), tile_end = tile_begin + segments();
            const auto segment = [&](int unit) {
                return sums[((unit - first) * ROWS + row) * TILE_ROWS + output];
            };
            float sum = 0.0f;
            if constexpr (HELD_PARTS == 1 && M::SEGMENTS % M::HELD_SEGMENTS == 0 &&
                          ROUND<M> % M::HELD_SEGMENTS == 0) {
#pragma unroll
                for (int i = 0; i < M::HELD_SEGMENTS; ++i) sum += segment(tile_begin + i);
                epilogue(tile, tile_of(tile), row, start(tile, row) + sum, valid);
                return;
            }
            constexpr int ROUND_CARRY = 2 * ROWS * TILE_ROWS;
            float* carry = block.shared()->carry + row * TILE_ROWS + output;
            const int begin = max_of(first, tile_begin), end = min_of(last, tile_end);
            float before = start(tile, row);  // the parts that are complete
            if (begin > tile_begin) {
                sum = carry[parity * ROUND_CARRY];
                before = carry[parity * ROUND_CARRY + ROWS * TILE_ROWS];
            }
            for (int unit = begin; unit < end;) {
                const int in_tile = unit - tile_begin, part = HELD_PARTS == 1 ? 0 : in_tile / M::IN_PART;
                if (HELD_PARTS > 1 && in_tile > 0 && in_tile == part * M::IN_PART) before += sum, sum = 0.0f;
                const int part_end =
                    HELD_PARTS == 1 ? end : min_of(end, tile_begin + (part + 1) * M::IN_PART);
#pragma unroll 8
                for (; unit < part_end; ++unit) sum += segment(unit);
            }
            if (valid && end < tile_end) {
                carry[(parity ^ 1) * ROUND_CARRY] = sum;
                carry[(parity ^ 1) * ROUND_CARRY + ROWS * TILE_ROWS] = before;
            }
            epilogue(tile, tile_of(tile), row, before + sum, valid && end == tile_end);
        });
        block.thread = thread;
    }

    const Partition& partition_;
    const int tiles_, line_;  // the block's of a part; where in a line the lane's 16 bytes are
    int input_[Unit<M>::SETS];
    int part_;             // that the block is at
    const uint8_t* slot_;  // that waits to be multiplied
};
