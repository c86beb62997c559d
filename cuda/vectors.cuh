// What a key or a value is, in the cache and among a pass's own rows, and how it becomes an operand of the
// tensor cores: one place per format. A vector takes VECTOR_BYTES. With g = lane / 4 and t = lane % 4, what
// a format has is:
//
// put_key(), put_value(): a warp writes the vector of `position`;
// load_query(), load_key(): the lane's operands for dimensions 32 j .. 32 j + 31, in two steps of 16 (x and
//   y, z and w), in an order of k of the format's own; load_key() takes the vector of position g, and t from
//   where registers are short: what follows from threadIdx itself is kept over a whole layer;
// order_of(): of dimension d, where it stands among all that the lanes t = 0, 1, ... give for j = 0, 1, ...;
//   passes lay their queries out by it, chunks read them with load_query();
// key_scale(): what a product of the two is worth; of_columns(): of what the lanes have for positions g, that
//   for positions 2 t and 2 t + 1;
// value_piece(): where 16 bytes of a value are that the lane gives to load_transposed();
// value_tile(): A operand of 16 dimensions by 8 positions, of LOAD_TILES that one load brings; row g of half
//   h is dimension first_dimension(lane) + h HALF_STEP of the tile;
// value_scales(), weigh(): B operand for it, from the probabilities of positions 2 t and 2 t + 1. Lane i has
//   given the value of position i % 8;
// order_pairs(): of a tile's two halves, transposed (rows 2 t and 2 t + 1 of query g), pairs of neighbouring
//   dimensions, which begin with pair_dimension(i).
//
// `seen` masks positions 2 t and 2 t + 1, 16 bits each: what nobody sees may be anything, and 0 times
// anything is not 0. `turn` stands for the position where a vector is rotated.
#pragma once

#include "arithmetic.cuh"

template <int BITS>
struct VectorFormat;

// bf16. Pieces of eight elements are rotated by the position, so that those of neighbouring positions, which
// a warp reads together, lie in different banks of shared memory.
template <>
struct VectorFormat<16> {
    static constexpr int KEY_ROTATION = 4, VALUE_ROTATION = 1;  // pieces per position
    static constexpr int LOAD_TILES = 1;

    static __device__ void put_key(const HeadVector& vector, uint8_t* target, int position) {
        vector.round(reinterpret_cast<uint16_t*>(target),
                     [=](int d) { return rotated(d / 8, position, KEY_ROTATION) * 8 + d % 8; });
    }
    static __device__ void put_value(const HeadVector& vector, uint8_t* target, int position) {
        vector.round(reinterpret_cast<uint16_t*>(target),
                     [=](int d) { return rotated(d / 8, position, VALUE_ROTATION) * 8 + d % 8; });
    }

    static __device__ int order_of(int d) { return d; }
    static __device__ uint4 load_query(const uint16_t* query, int j) {
        const int d = 32 * j + 8 * (threadIdx.x % 4);
        if (HEAD_DIM % 32 != 0 && d >= HEAD_DIM) return make_uint4(0, 0, 0, 0);
        return *reinterpret_cast<const uint4*>(query + d);
    }
    static __device__ uint4 load_key(const uint8_t* key, int t, int j, int turn) {
        const int piece = 4 * j + t;
        if (HEAD_DIM % 32 != 0 && piece >= HEAD_DIM / 8) return make_uint4(0, 0, 0, 0);
        return *reinterpret_cast<const uint4*>(key + 16 * rotated(piece, turn, KEY_ROTATION));
    }
    static __device__ float key_scale(const uint8_t*) { return SCORE_SCALE; }
    static __device__ void of_columns(float, float (&scales)[2]) { scales[0] = scales[1] = SCORE_SCALE; }

    static __device__ const uint8_t* value_piece(const uint8_t* value, int i, int turn) {
        return value +
               16 * rotated(HEAD_DIM % 16 == 0 ? i : min_of(i, HEAD_DIM / 8 - 1), turn, VALUE_ROTATION);
    }
    static __device__ void value_tile(const uint32_t (&loaded)[2], int, uint32_t seen, uint32_t (&a)[2]) {
        a[0] = loaded[0] & seen, a[1] = loaded[1] & seen;
    }
    static constexpr int HALF_STEP = 8;
    static __device__ int first_dimension(int lane) { return lane / 4; }
    static __device__ void value_scales(const uint8_t*, float (&scales)[2]) { scales[0] = scales[1] = 1.0f; }
    static __device__ uint32_t weigh(uint32_t p, uint32_t, const float (&)[2]) { return p; }

    static __device__ void order_pairs(uint32_t (&)[2]) {}
    static __device__ int pair_dimension(int i) { return 8 * i + 2 * (threadIdx.x % 4); }

  private:
    // Where piece `piece` lies among all.
    static __device__ uint32_t rotated(uint32_t piece, uint32_t position, uint32_t rotation) {
        return (piece + rotation * position) % (HEAD_DIM / 8);
    }
};

// int8 codes in their order, then their scale, fp32. Codes become bf16 exactly, four at a time: those of even
// and of odd dimensions, so a tile's halves hold these. A key's scale comes after the product; a value's is
// multiplied into the probabilities, which are rounded once more.
template <>
struct VectorFormat<8> {
    static constexpr int KEY_ROTATION = 0, VALUE_ROTATION = 0;  // their scales keep neighbours apart
    static constexpr int LOAD_TILES = 2;

    static __device__ void put_key(const HeadVector& vector, uint8_t* target, int) {
        vector.quantize(target, reinterpret_cast<float*>(target + HEAD_DIM));
    }
    static __device__ void put_value(const HeadVector& vector, uint8_t* target, int) {
        vector.quantize(target, reinterpret_cast<float*>(target + HEAD_DIM));
    }

    static __device__ int order_of(int d) {
        return d / 32 * 32 + d % 16 / 4 * 8 + d % 32 / 16 * 4 + d % 2 * 2 + d % 4 / 2;
    }
    static __device__ uint4 load_query(const uint16_t* query, int j) {
        uint4 q = make_uint4(0, 0, 0, 0);
        const int d = 32 * j + 4 * (threadIdx.x % 4);
        if (HEAD_DIM % 16 == 0 || d < HEAD_DIM) {
            const uint2 four = *reinterpret_cast<const uint2*>(query + d);
            q.x = __byte_perm(four.x, four.y, EVEN_HALVES), q.y = __byte_perm(four.x, four.y, ODD_HALVES);
        }
        if (32 * j + 16 < HEAD_DIM) {
            const uint2 four = *reinterpret_cast<const uint2*>(query + d + 16);
            q.z = __byte_perm(four.x, four.y, EVEN_HALVES), q.w = __byte_perm(four.x, four.y, ODD_HALVES);
        }
        return q;
    }
    // Where HEAD_DIM ends in the middle of a step it reads on: any byte is a finite number.
    static __device__ uint4 load_key(const uint8_t* key, int t, int j, int) {
        uint4 k = make_uint4(0, 0, 0, 0);
        const uint8_t* four = key + 32 * j + 4 * t;
        widen(*reinterpret_cast<const uint32_t*>(four), k.x, k.y);
        if (32 * j + 16 < HEAD_DIM) widen(*reinterpret_cast<const uint32_t*>(four + 16), k.z, k.w);
        return k;
    }
    static __device__ float key_scale(const uint8_t* key) { return scale(key) * SCORE_SCALE; }
    static __device__ void of_columns(float own, float (&scales)[2]) {
        for (int c = 0; c < 2; ++c) scales[c] = __shfl_sync(0xffffffff, own, 4 * column(c));
    }

    static __device__ const uint8_t* value_piece(const uint8_t* value, int i, int) {
        return value + 16 * min_of(i, HEAD_DIM_TILES - 1);
    }
    static __device__ void value_tile(const uint32_t (&loaded)[2], int tile, uint32_t, uint32_t (&a)[2]) {
        widen(loaded[tile], a[0], a[1]);
    }
    static constexpr int HALF_STEP = 1;
    static __device__ int first_dimension(int lane) { return lane / 4 * 2; }
    static __device__ void value_scales(const uint8_t* value, float (&scales)[2]) {
        const float own = scale(value);
        for (int c = 0; c < 2; ++c) scales[c] = __shfl_sync(0xffffffff, own, column(c));
    }
    static __device__ uint32_t weigh(uint32_t p, uint32_t seen, const float (&scales)[2]) {
        const float low = __uint_as_float(p << 16) * scales[0];
        const float high = __uint_as_float(p & 0xffff0000) * scales[1];
        return pack_bf16x2(low, high) & seen;
    }

    static __device__ void order_pairs(uint32_t (&halves)[2]) {
        const uint32_t even = halves[0], odd = halves[1];
        halves[0] = __byte_perm(even, odd, EVEN_HALVES), halves[1] = __byte_perm(even, odd, ODD_HALVES);
    }
    static __device__ int pair_dimension(int i) { return 4 * (threadIdx.x % 4) + 2 * i; }

  private:
    static constexpr uint32_t EVEN_HALVES = 0x5410, ODD_HALVES = 0x7632;

    // Of the lane's two positions.
    static __device__ int column(int c) { return 2 * (threadIdx.x % 4) + c; }
    static __device__ float scale(const uint8_t* vector) {
        return *reinterpret_cast<const float*>(vector + HEAD_DIM);
    }
    // Four codes as bf16, bytes 0 and 2 in `even`, 1 and 3 in `odd`. The lower seven bits of a code, added to
    // the bits of 128, and its sign's weight, added to those of -128, are numbers whose sum is the code.
    static __device__ void widen(uint32_t codes, uint32_t& even, uint32_t& odd) {
        const auto two = [](uint32_t bytes) {
            return add_bf16x2((bytes & 0x007f007f) | 0x43004300, (bytes & 0x00800080) | 0xc300c300);
        };
        even = two(codes), odd = two(codes >> 8);
    }
};

using Vectors = VectorFormat<KV_BITS>;
constexpr int VALUE_LOADS = ceil_div(HEAD_DIM_TILES, Vectors::LOAD_TILES);  // of a value, 32 bytes each

// The mask of two positions.
__device__ __forceinline__ uint32_t seen_pair(bool first, bool second) {
    return (first ? 0xffff : 0) | (second ? 0xffff0000 : 0);
}
