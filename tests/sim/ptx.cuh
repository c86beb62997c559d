// The host twin of cuda/ptx.cuh: the same functions with the same contracts, on the simulated device.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cuda.hpp"

inline int opaque(int x) {
    return x;
}

inline uint8_t* opaque_shared(void* shared) {
    return static_cast<uint8_t*>(shared);
}

// The device's sum is exact but for the alignment of its addends, which is not documented. Here: the 16
// products and the accumulator are added in double in ascending k and rounded to float once. The two differ
// by at most 2^-21 of the largest addend.
inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIM_SITE) {
    sim::Lane& lane = sim::machine.lane();
    const uint32_t b[2] = {b0, b1};
    memcpy(lane.operand, d, 16);
    memcpy(lane.operand + 4, a, 16);
    memcpy(lane.operand + 8, b, 8);
    sim::machine.meet(sim::ALL_LANES, {"mma_16x8x16", file, line}, [](sim::Warp& warp) {
        float rows[16][16], columns[8][16];  // [row][k], [column][k]
        for (int l = 0; l < sim::WARP_LANES; ++l) {
            const uint32_t* words = warp.lanes[l]->operand + 4;
            const int g = l / 4, t = l % 4;
            for (int half = 0; half < 2; ++half) {
                const int k = 2 * t + 8 * half;
                for (int hi = 0; hi < 2; ++hi) {
                    rows[g + 8 * hi][k] = __uint_as_float(words[2 * half + hi] << 16);
                    rows[g + 8 * hi][k + 1] = __uint_as_float(words[2 * half + hi] & 0xffff0000);
                }
                columns[g][k] = __uint_as_float(words[4 + half] << 16);
                columns[g][k + 1] = __uint_as_float(words[4 + half] & 0xffff0000);
            }
        }
        for (int l = 0; l < sim::WARP_LANES; ++l) {
            for (int i = 0; i < 4; ++i) {
                const float *row = rows[l / 4 + i / 2 * 8], *column = columns[2 * (l % 4) + i % 2];
                double sum = 0;
                for (int k = 0; k < 16; ++k) sum += static_cast<double>(row[k]) * column[k];
                sum += __uint_as_float(warp.lanes[l]->operand[i]);
                warp.lanes[l]->result[i] = __float_as_uint(static_cast<float>(sum));
            }
        }
    });
    memcpy(d, lane.result, 16);
}

// Exact. Of a, bytes are signed or not.
template <class A>
inline void mma_16x8x32(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const char* name,
                        const char* file, int line) {
    sim::Lane& lane = sim::machine.lane();
    const uint32_t b[2] = {b0, b1};
    memcpy(lane.operand, d, 16);
    memcpy(lane.operand + 4, a, 16);
    memcpy(lane.operand + 8, b, 8);
    sim::machine.meet(sim::ALL_LANES, {name, file, line}, [](sim::Warp& warp) {
        A rows[16][32];
        int8_t columns[8][32];  // [row][k], [column][k]
        for (int l = 0; l < sim::WARP_LANES; ++l) {
            const uint32_t* words = warp.lanes[l]->operand + 4;
            const int g = l / 4, t = l % 4;
            for (int half = 0; half < 2; ++half) {
                for (int hi = 0; hi < 2; ++hi)
                    memcpy(&rows[g + 8 * hi][16 * half + 4 * t], words + 2 * half + hi, 4);
                memcpy(&columns[g][16 * half + 4 * t], words + 4 + half, 4);
            }
        }
        for (int l = 0; l < sim::WARP_LANES; ++l) {
            for (int i = 0; i < 4; ++i) {
                const A* row = rows[l / 4 + i / 2 * 8];
                const int8_t* column = columns[2 * (l % 4) + i % 2];
                int32_t sum = static_cast<int32_t>(warp.lanes[l]->operand[i]);
                for (int k = 0; k < 32; ++k) sum += row[k] * column[k];
                warp.lanes[l]->result[i] = static_cast<uint32_t>(sum);
            }
        }
    });
    memcpy(d, lane.result, 16);
}

inline void mma_16x8x32_signed(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIM_SITE) {
    mma_16x8x32<int8_t>(d, a, b0, b1, "mma_16x8x32_signed", file, line);
}

inline void mma_16x8x32_unsigned(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIM_SITE) {
    mma_16x8x32<uint8_t>(d, a, b0, b1, "mma_16x8x32_unsigned", file, line);
}

inline void mma_16x8x8(float (&d)[4], const uint32_t (&a)[2], uint32_t b, SIM_SITE) {
    const uint32_t wide[4] = {a[0], a[1], 0, 0};
    mma_16x8x16(d, wide, b, 0, file, line);
}

template <int MATRICES>
inline void load_transposed(uint32_t (&d)[MATRICES], const void* shared, SIM_SITE) {
    sim::Lane& lane = sim::machine.lane();
    memcpy(lane.operand, &shared, sizeof shared);
    sim::machine.meet(sim::ALL_LANES, {"load_transposed", file, line}, [](sim::Warp& warp) {
        uint16_t rows[MATRICES][8][8];  // [matrix][row][column]
        for (int l = 0; l < 8 * MATRICES; ++l) {
            const void* row;
            memcpy(&row, warp.lanes[l]->operand, sizeof row);
            memcpy(rows[l / 8][l % 8], row, 16);
        }
        for (int l = 0; l < sim::WARP_LANES; ++l) {
            for (int m = 0; m < MATRICES; ++m) {
                const int row = 2 * (l % 4), column = l / 4;
                warp.lanes[l]->result[m] =
                    rows[m][row][column] | static_cast<uint32_t>(rows[m][row + 1][column]) << 16;
            }
        }
    });
    memcpy(d, lane.result, 4 * MATRICES);
}

inline void load_matrices(uint32_t (&d)[4], const void* shared, SIM_SITE) {
    sim::Lane& lane = sim::machine.lane();
    memcpy(lane.operand, &shared, sizeof shared);
    sim::machine.meet(sim::ALL_LANES, {"load_matrices", file, line}, [](sim::Warp& warp) {
        uint32_t rows[4][8][4];  // [matrix][row][pair of columns]
        for (int l = 0; l < sim::WARP_LANES; ++l) {
            const void* row;
            memcpy(&row, warp.lanes[l]->operand, sizeof row);
            memcpy(rows[l / 8][l % 8], row, 16);
        }
        for (int l = 0; l < sim::WARP_LANES; ++l) {
            for (int m = 0; m < 4; ++m) warp.lanes[l]->result[m] = rows[m][l / 4][l % 4];
        }
    });
    memcpy(d, lane.result, 16);
}

inline uint32_t transpose(uint32_t pair, SIM_SITE) {
    sim::Lane& lane = sim::machine.lane();
    lane.operand[0] = pair;
    sim::machine.meet(sim::ALL_LANES, {"transpose", file, line}, [](sim::Warp& warp) {
        for (int l = 0; l < sim::WARP_LANES; ++l) {
            const int row = 2 * (l % 4), column = l / 4;
            const auto element = [&](int r) {
                return warp.lanes[4 * r + column / 2]->operand[0] >> column % 2 * 16 & 0xffff;
            };
            warp.lanes[l]->result[0] = element(row) | element(row + 1) << 16;
        }
    });
    return lane.result[0];
}

// Here a load is served when it is made. No lane waits for others: a vote makes them meet, but orders no
// memory.
inline bool all_have(float) {
    return true;
}

inline uint32_t pack_bf16x2(float low, float high) {
    const auto round = [](float f) {
        const uint32_t bits = __float_as_uint(f);
        if (f != f) return 0x7fffu;
        return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    };
    return round(low) | round(high) << 16;
}

inline uint32_t add_bf16x2(uint32_t a, uint32_t b) {
    return pack_bf16x2(__uint_as_float(a << 16) + __uint_as_float(b << 16),
                       __uint_as_float(a & 0xffff0000) + __uint_as_float(b & 0xffff0000));
}

inline float half_to_float(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits >> 15) << 31, exponent = bits >> 10 & 31;
    const uint32_t mantissa = bits & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | mantissa << 13);
    if (exponent != 0) return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
}

inline float exp2_approx(float x) {
    return exp2f(x);
}

inline float rsqrt_approx(float x) {
    return 1.0f / sqrtf(x);
}

inline float divide_approx(float x, float y) {
    return x / y;
}

inline uint32_t warp_max(uint32_t x, SIM_SITE) {
    sim::Lane& lane = sim::machine.lane();
    lane.operand[0] = x;
    sim::machine.meet(sim::ALL_LANES, {"warp_max", file, line}, [](sim::Warp& warp) {
        uint32_t greatest = 0;
        for (const sim::Lane* one : warp.lanes) greatest = std::max(greatest, one->operand[0]);
        for (sim::Lane* one : warp.lanes) one->result[0] = greatest;
    });
    return lane.result[0];
}

inline uint32_t warp_min(uint32_t x, SIM_SITE) {
    return ~warp_max(~x, file, line);
}

inline void copy_async_16(void* shared, const void* global) {
    sim::machine.copy_async(static_cast<uint8_t*>(shared), static_cast<const uint8_t*>(global));
}

inline void copy_async_commit() {
    sim::machine.copy_commit();
}

template <int PENDING>
inline void copy_async_wait() {
    sim::machine.copy_wait(PENDING);
}

inline void mbarrier_init(uint64_t* barrier, uint32_t count) {
    sim::machine.barrier_init(barrier, count);
}

inline void mbarrier_init_fence() {}

inline void mbarrier_arrive(uint64_t* barrier, SIM_SITE) {
    sim::machine.barrier_arrive(barrier, 0, {"mbarrier_arrive", file, line});
}

inline bool mbarrier_test(uint64_t* barrier, uint32_t parity, SIM_SITE) {
    return sim::machine.barrier_test(barrier, parity, {"mbarrier_test", file, line});
}

inline void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes, SIM_SITE) {
    sim::machine.barrier_arrive(barrier, bytes, {"mbarrier_arrive_expect", file, line});
}

inline void copy_async_arrive(uint64_t* barrier, SIM_SITE) {
    sim::machine.copy_arrive(barrier, {"copy_async_arrive", file, line});
}

inline bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity, SIM_SITE) {
    return sim::machine.barrier_try_wait(barrier, parity, {"mbarrier_try_wait", file, line});
}

inline uint64_t evict_first_policy() {
    return 0;
}

inline void copy_bulk(void* shared, const void* global, uint32_t bytes, uint64_t* barrier, SIM_SITE) {
    sim::machine.copy_bulk({static_cast<uint8_t*>(shared), static_cast<const uint8_t*>(global), bytes,
                            barrier, sim::machine.lane().block->index},
                           {"copy_bulk", file, line});
}

inline void copy_bulk(void* shared, const void* global, uint32_t bytes, uint64_t* barrier, uint64_t,
                      SIM_SITE) {
    copy_bulk(shared, global, bytes, barrier, file, line);
}

// Which proxy sees what is not simulated.
inline void fence_async_proxy() {}

inline void wait_turn(int group, SIM_SITE) {
    sim::machine.barrier(sim::FIRST_TURN + group, 256, false, {"wait_turn", file, line});
}

inline void pass_turn(int group, SIM_SITE) {
    sim::machine.barrier_pass(sim::FIRST_TURN + group, 256, {"pass_turn", file, line});
}

constexpr bool HANDS_ON_REGISTERS = true;

// Registers are not simulated, but whoever gives some up does something else than the other warps.
template <int COUNT>
inline void give_up_registers() {
    sim::machine.lane().specialised = true;
}

template <int COUNT>
inline void take_registers() {}

// Here bits 0 to 43 are the address, in units of 16 bytes as the two distances are.
inline uint64_t operand_descriptor(const void* shared, int half_bytes, int octet_bytes) {
    return reinterpret_cast<uintptr_t>(shared) >> 4 | static_cast<uint64_t>(half_bytes >> 4) << 44 |
           static_cast<uint64_t>(octet_bytes >> 4) << 54;
}

// Where the descriptor has the 16 bytes of a column's half.
inline const void* described(uint64_t columns, int column, int half) {
    const uint64_t half_bytes = (columns >> 44 & 1023) * 16, octet_bytes = (columns >> 54) * 16;
    return reinterpret_cast<const uint8_t*>((columns & (1ull << 44) - 1) << 4) + half * half_bytes +
           column / 8 * octet_bytes + column % 8 * 16;
}

// After a wait d may be read and a and d be written, so the next product wants a fence.
inline void wgmma_fence() {
    sim::machine.lane().fenced = true;
}

inline void wgmma_commit(SIM_SITE) {
    sim::machine.meet(sim::ALL_LANES, {"wgmma_commit", file, line},
                      [](sim::Warp& warp) { warp.products.emplace_back(); });
}

template <int PENDING>
inline void wgmma_wait(SIM_SITE) {
    sim::machine.lane().fenced = false;
    sim::machine.meet(sim::ALL_LANES, {"wgmma_wait", file, line},
                      [](sim::Warp& warp) { sim::machine.finish_products(warp, PENDING); });
}

// A warp's part of a product, with the arithmetic of mma_16x8x16.
inline void multiply_floats(const sim::Product& product) {
    float rows[16][16];  // [row][k]
    for (int l = 0; l < sim::WARP_LANES; ++l) {
        for (int i = 0; i < 4; ++i) {
            float* row = rows[l / 4 + i % 2 * 8] + i / 2 * 8 + l % 4 * 2;
            row[0] = __uint_as_float(product.a[l][i] << 16);
            row[1] = __uint_as_float(product.a[l][i] & 0xffff0000);
        }
    }
    for (int column = 0; column < 128; ++column) {
        float values[16];
        for (int half = 0; half < 2; ++half) {
            uint16_t bits[8];
            memcpy(bits, described(product.columns, column, half), 16);
            for (int k = 0; k < 8; ++k) {
                values[8 * half + k] = __uint_as_float(static_cast<uint32_t>(bits[k]) << 16);
            }
        }
        for (int row = 0; row < 16; ++row) {
            double sum = 0;
            for (int k = 0; k < 16; ++k) sum += static_cast<double>(rows[row][k]) * values[k];
            const auto d = static_cast<float (*)[4]>(product.d[row % 8 * 4 + column % 8 / 2]);
            float& target = d[column / 8][row / 8 * 2 + column % 2];
            target = static_cast<float>(product.add ? sum + target : sum);
        }
    }
}

// The same with that of mma_16x8x32.
template <class A>
inline void multiply_integers(const sim::Product& product) {
    A rows[16][32];  // [row][k]
    for (int l = 0; l < sim::WARP_LANES; ++l) {
        for (int i = 0; i < 4; ++i) {
            memcpy(rows[l / 4 + i % 2 * 8] + i / 2 * 16 + l % 4 * 4, &product.a[l][i], 4);
        }
    }
    for (int column = 0; column < 128; ++column) {
        int8_t values[32];
        for (int half = 0; half < 2; ++half) {
            memcpy(values + 16 * half, described(product.columns, column, half), 16);
        }
        for (int row = 0; row < 16; ++row) {
            int sum = 0;
            for (int k = 0; k < 32; ++k) sum += rows[row][k] * values[k];
            const auto d = static_cast<int (*)[4]>(product.d[row % 8 * 4 + column % 8 / 2]);
            int& target = d[column / 8][row / 8 * 2 + column % 2];
            target = product.add ? target + sum : sum;
        }
    }
}

// What a warp does depends on no other of its group, so only its own lanes meet here. Registers are read at
// once, columns at once or at the wait.
inline void start_product(void* d, const uint32_t (&a)[4], uint64_t columns, bool add,
                          void (*multiply)(const sim::Product&), const sim::Site& site) {
    struct Operands {
        void* d;
        uint64_t columns;
        bool add;
    } own = {d, columns, add};
    sim::Lane& lane = sim::machine.lane();
    if (!lane.fenced) sim::machine.fail(site, "registers are in use since a wait");
    static_assert(sizeof own + sizeof a <= sizeof lane.operand);
    memcpy(lane.operand, a, sizeof a);
    memcpy(lane.operand + 4, &own, sizeof own);
    sim::machine.meet(sim::ALL_LANES, site, [&](sim::Warp& warp) {
        sim::Product product;
        product.columns = columns, product.add = add, product.multiply = multiply;
        for (int l = 0; l < sim::WARP_LANES; ++l) {
            Operands brought;
            memcpy(product.a[l], warp.lanes[l]->operand, sizeof a);
            memcpy(&brought, warp.lanes[l]->operand + 4, sizeof brought);
            if (brought.columns != columns || brought.add != add) {
                sim::machine.fail(site, "lanes of the warp want different products");
            }
            product.d[l] = brought.d;
        }
        sim::machine.start_product(warp, product);
    });
}

inline void wgmma_64x128x16(float (&d)[16][4], const uint32_t (&a)[4], uint64_t columns, bool add, SIM_SITE) {
    start_product(d, a, columns, add, multiply_floats, {"wgmma_64x128x16", file, line});
}

inline void wgmma_64x128x32_signed(int (&d)[16][4], const uint32_t (&a)[4], uint64_t columns, bool add,
                                   SIM_SITE) {
    start_product(d, a, columns, add, multiply_integers<int8_t>, {"wgmma_64x128x32_signed", file, line});
}

inline void wgmma_64x128x32_unsigned(int (&d)[16][4], const uint32_t (&a)[4], uint64_t columns, bool add,
                                     SIM_SITE) {
    start_product(d, a, columns, add, multiply_integers<uint8_t>, {"wgmma_64x128x32_unsigned", file, line});
}

template <int COUNT>
inline void sync_threads(SIM_SITE) {
    sim::machine.barrier(sim::SYNC_FIRST_THREADS, COUNT, false, {"sync_threads", file, line});
}

template <int COUNT>
inline bool sync_threads_or(bool value, SIM_SITE) {
    return sim::machine.barrier(sim::SYNC_OR, COUNT, value, {"sync_threads_or", file, line});
}

inline uint32_t load_relaxed_shared(const uint32_t* p, SIM_SITE) {
    return sim::machine.load_shared(p, {"load_relaxed_shared", file, line});
}

inline void store_relaxed_shared(uint32_t* p, uint32_t v) {
    sim::machine.store_shared(p, v);
}

inline void set_bits_shared(uint32_t* p, uint32_t bits) {
    sim::machine.store_shared(p, *p | bits);
}

inline uint32_t fetch_add_shared(uint32_t* p, uint32_t addend) {
    const uint32_t old = *p;
    sim::machine.store_shared(p, old + addend);
    return old;
}

inline void trap_if(bool hopeless, SIM_SITE) {
    if (hopeless) sim::machine.fail({"trap_if", file, line}, "the kernel ended itself");
}

inline uint4 load_relaxed_128(const uint4* p, SIM_SITE) {
    const sim::Words v = sim::machine.load(p, 4, {"load_relaxed_128", file, line});
    return {v.word[0], v.word[1], v.word[2], v.word[3]};
}

inline void store_relaxed_128(uint4* p, uint4 v) {
    sim::machine.store(p, {{v.x, v.y, v.z, v.w}}, 4);
}

inline uint32_t load_relaxed_32(const uint32_t* p, SIM_SITE) {
    return sim::machine.load(p, 1, {"load_relaxed_32", file, line}).word[0];
}

inline void store_relaxed_32(uint32_t* p, uint32_t v) {
    sim::machine.store(p, {{v}}, 1);
}

inline void add_release_32(uint32_t* p, uint32_t addend) {
    sim::machine.add(p, addend);
}

inline uint32_t load_acquire_32(const uint32_t* p, SIM_SITE) {
    return sim::machine.load(p, 1, {"load_acquire_32", file, line}).word[0];
}

inline uint64_t load_relaxed_system_64(const uint64_t* p, SIM_SITE) {
    const sim::Words v = sim::machine.load(p, 2, {"load_relaxed_system_64", file, line});
    return v.word[0] | static_cast<uint64_t>(v.word[1]) << 32;
}

inline void store_relaxed_system_128(uint4* p, uint4 v) {
    store_relaxed_128(p, v);
}

inline void store_relaxed_system_32(uint32_t* p, uint32_t v) {
    store_relaxed_32(p, v);
}

// Moves in steps of 1.024 microseconds, as the device's does.
inline uint64_t global_timer_ns() {
    sim::machine.yield(true);
    return sim::machine.now_ns() >> 10 << 10;
}
