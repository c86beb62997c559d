// What the kernels compute with besides their matrix products: functions of values, which know nothing of
// blocks, packets or shared memory. Every kernel that does a step of the model calls the same one, so that a
// token's bits do not depend on which kernel ran it.
#pragma once

#include "config.cuh"

#define MASKED __int_as_float(0xff800000)  // minus infinity
constexpr uint32_t INFINITE = 0x7f800000;
constexpr uint32_t NAN_BITS =
    0x7fffffff;                         // what integers are worth that stand for a number that is not finite
constexpr float ROUNDER = 12582912.0f;  // 1.5 * 2^23: a sum with it has the nearest integer in its low bits
constexpr uint32_t LEAST_LARGEST = (127 - 118) << 23;  // 2^-118: of a vector, so that its scale is normal

// The sum over the warp, the same bits in every lane.
__device__ __forceinline__ float warp_sum(float x) {
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
    return x;
}

__device__ __forceinline__ const float* layer_vectors(const ModelArgs& args, int layer) {
    return args.vectors + static_cast<uint64_t>(layer) * VECTORS_SIZE;
}

__device__ __forceinline__ float silu(float x) {
    return divide_approx(x, 1.0f + exp2_approx(-LOG2_E * x));
}

// One element of a token's embedding.
__device__ __forceinline__ float embedding(const ModelArgs& args, int token, int k) {
    if (!TIE_WORD_EMBEDDINGS) {
        const uint32_t bits = args.embed_tokens[static_cast<uint64_t>(token) * HIDDEN_SIZE + k];
        return __uint_as_float(bits << 16);
    }
    // Tied: the same storage as the lm_head; layout.py says where element (r, k) of a tile lies.
    const int r = token % TILE_ROWS, step = k % 8 / 4, half = k % 4 / 2;
    const int lane = r % 8 * 4 + k % 32 / 8, in_slot = k % LmHead::SLOT_K, slot = k / LmHead::SLOT_K;
    const uint8_t* bytes = args.lm_head + static_cast<uint64_t>(token / TILE_ROWS) * LmHead::TILE_BYTES +
                           static_cast<uint64_t>(slot) * LmHead::SLOT_BYTES;
    if (LM_HEAD_BITS == 16) {
        const int at =
            (in_slot / 32 * 2 + step) * LINE_BYTES + lane * 16 + (2 * half + r / 8) * 4 + k % 2 * 2;
        return __uint_as_float(static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(bytes + at)) << 16);
    }
    const int at = in_slot / 32 * LINE_BYTES + lane * 16 + (2 * step + r / 8) * 4 + k % 4;
    const int slot_k = slot + 1 == LmHead::SLOTS ? LmHead::TAIL_K : LmHead::SLOT_K;
    const uint8_t* scales = bytes + slot_k / 32 * LINE_BYTES;
    const int group = in_slot / LM_HEAD_GROUP_SIZE;
    const float scale = half_to_float(reinterpret_cast<const uint16_t*>(scales)[group * TILE_ROWS + r]);
    return scale * static_cast<float>(static_cast<signed char>(bytes[at]));
}

// One over the root mean square of a row's residual stream from its tiles' sums of squares, in each of the
// LANES lanes (32, or the 16 of a half warp) that work it out: 32 sums of every 32nd tile, then these in a
// fixed tree. The whole warp calls it.
template <int LANES>
__device__ __forceinline__ float inverse_rms(const float* tile_squares) {
    const int lane = threadIdx.x % LANES;
    float sums[32 / LANES] = {};
#pragma unroll
    for (int tile = 0; tile < HIDDEN_TILES; tile += LANES) {
        if (tile + lane < HIDDEN_TILES) sums[tile / LANES % (32 / LANES)] += tile_squares[tile + lane];
    }
    float squares =
        LANES == 32 ? sums[0] + __shfl_xor_sync(0xffffffff, sums[0], 16) : sums[0] + sums[32 / LANES - 1];
    for (int offset = 8; offset > 0; offset /= 2) squares += __shfl_xor_sync(0xffffffff, squares, offset);
    return rsqrt_approx(squares * (1.0f / HIDDEN_SIZE) + RMS_NORM_EPS);
}

// ---- heads ----

// Of a position's rotation, [HEAD_DIM / 2] each.
struct Angles {
    const float* cosines;
    const float* sines;
};

// One head's vector, shared out among a warp's lanes, from what a product gave to what is kept of it.
class HeadVector {
  public:
    __device__ void load(const float* vector) {
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) {
            const int d = threadIdx.x % 32 + 32 * i;
            if (d < HEAD_DIM / 2) low_[i] = vector[d], high_[i] = vector[d + HEAD_DIM / 2];
        }
#pragma unroll
        for (int i = 0; i < NORMED; ++i) {
            const int d = threadIdx.x % 32 + 32 * i;
            normed_[i] = d < HEAD_DIM ? vector[d] : 0.0f;
        }
    }

    // Norms (if the model does) and rotates it.
    __device__ void norm_and_rotate(const float* weight, const Angles& angles) {
        const float scale = QK_NORM ? norm_scale() : 1.0f;
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) {
            const int d = threadIdx.x % 32 + 32 * i;
            if (d >= HEAD_DIM / 2) continue;
            float low = low_[i], high = high_[i];
            if (QK_NORM) {
                low = low * scale * weight[d];
                high = high * scale * weight[d + HEAD_DIM / 2];
            }
            const float c = angles.cosines[d], s = angles.sines[d];
            low_[i] = fmaf(low, c, -(high * s)), high_[i] = fmaf(high, c, low * s);
        }
    }

    // Rounds it to bf16, into target[place(d)].
    template <class Place>
    __device__ void round(uint16_t* target, Place place) const {
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) {
            const int d = threadIdx.x % 32 + 32 * i;
            if (d >= HEAD_DIM / 2) continue;
            const uint32_t pair = pack_bf16x2(low_[i], high_[i]);
            target[place(d)] = static_cast<uint16_t>(pair);
            target[place(d + HEAD_DIM / 2)] = static_cast<uint16_t>(pair >> 16);
        }
    }

    // As int8 codes, the largest magnitude being 127 of `scale`. The scale is NaN if an element is not
    // finite. ffmini/numerics.py has the same arithmetic (quantize_vectors).
    __device__ void quantize(uint8_t* codes, float* scale) const {
        uint32_t largest = LEAST_LARGEST;
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) {
            if (threadIdx.x % 32 + 32 * i >= HEAD_DIM / 2) continue;
            largest = max_of(largest, __float_as_uint(low_[i]) & 0x7fffffff);
            largest = max_of(largest, __float_as_uint(high_[i]) & 0x7fffffff);
        }
        largest = warp_max(largest);  // as bits: infinity is above all numbers, NaN above infinity
        const float inverse = 127.0f / __uint_as_float(largest);
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) {
            const int d = threadIdx.x % 32 + 32 * i;
            if (d >= HEAD_DIM / 2) continue;
            codes[d] = static_cast<uint8_t>(__float_as_uint(low_[i] * inverse + ROUNDER));
            codes[d + HEAD_DIM / 2] = static_cast<uint8_t>(__float_as_uint(high_[i] * inverse + ROUNDER));
        }
        const uint32_t bits = __float_as_uint(__uint_as_float(largest) * (1.0f / 127));
        if (threadIdx.x % 32 == 0) *scale = __uint_as_float(largest < INFINITE ? bits : NAN_BITS);
    }

  private:
    static constexpr int PAIRS = ceil_div(HEAD_DIM / 2, 32), NORMED = QK_NORM ? ceil_div(HEAD_DIM, 32) : 1;

    // One over the root mean square: each lane adds every 32nd element, then the lanes add in a fixed tree.
    __device__ float norm_scale() const {
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < NORMED; ++i) squares = fmaf(normed_[i], normed_[i], squares);
        return rsqrt_approx(warp_sum(squares) * (1.0f / HEAD_DIM) + RMS_NORM_EPS);
    }

    float low_[PAIRS], high_[PAIRS];
    float normed_[NORMED];  // every 32nd element, if there is a norm
};

// ---- activations of a quantised model ----
// Each segment of 256 k of a row becomes integers that share one power of two, so that the products with the
// weights' codes are exact. 16 bits hold all that bf16 has of every element within 2^-7 of the segment's
// largest. They go in two planes of bytes, q = 256 high + low. ffmini/numerics.py has the same arithmetic
// (align).

constexpr uint32_t ALIGNED_EXPONENT = 127 + 14;  // biased: where the largest element's goes, so |q| < 2^15
constexpr uint32_t LEAST_EXPONENT = 27;  // of a largest element: below, powers of two would leave their range
constexpr uint32_t INFINITE_BF16 = 0x7f80;
constexpr uint32_t ROUNDER_BITS = 0x4b400000;

// The largest magnitude among eight bf16, as its bits.
__device__ __forceinline__ uint32_t largest_bits(const uint4& pairs) {
    constexpr uint32_t MAGNITUDES = 0x7fff7fff;
    const uint32_t largest = __vmaxu2(__vmaxu2(pairs.x & MAGNITUDES, pairs.y & MAGNITUDES),
                                      __vmaxu2(pairs.z & MAGNITUDES, pairs.w & MAGNITUDES));
    return max_of(largest & 0xffff, largest >> 16);
}

// The exponent that a segment's largest element, given by its bits, has when it is rounded up.
__device__ __forceinline__ uint32_t exponent_of(uint32_t largest) {
    return max_of((largest + 1) >> 7, LEAST_EXPONENT);
}

// What one is worth in a segment with that largest element.
__device__ __forceinline__ float worth_of(uint32_t largest) {
    const uint32_t bits = (exponent_of(largest) + 127 - ALIGNED_EXPONENT) << 23;
    return __uint_as_float(largest < INFINITE_BF16 ? bits : NAN_BITS);
}

// Eight elements, `pairs` of bf16, of a segment whose largest one is `largest`.
struct AlignedEight {
    uint2 high, low;  // a byte of each
    uint32_t sum;     // of the integers

    // Of q + 128 the second byte is q's high one, and the first is 128 more than the low one, whose sign bit
    // that turns over.
    __device__ AlignedEight(const uint4& pairs, uint32_t largest) : sum(0u - 8 * (ROUNDER_BITS + 128)) {
        const float factor = __uint_as_float((127 + ALIGNED_EXPONENT - exponent_of(largest)) << 23);
        const uint32_t words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
        uint32_t shifted[4];  // q + 128 of two elements
        for (int i = 0; i < 4; ++i) {
            const float even = __uint_as_float(words[i] << 16), odd = __uint_as_float(words[i] & 0xffff0000);
            const uint32_t first = __float_as_uint(fmaf(even, factor, ROUNDER + 128));
            const uint32_t second = __float_as_uint(fmaf(odd, factor, ROUNDER + 128));
            sum += first + second;
            shifted[i] = __byte_perm(first, second, 0x5410);
        }
        high = make_uint2(__byte_perm(shifted[0], shifted[1], 0x7531),
                          __byte_perm(shifted[2], shifted[3], 0x7531));
        low = make_uint2(__byte_perm(shifted[0], shifted[1], 0x6420) ^ 0x80808080,
                         __byte_perm(shifted[2], shifted[3], 0x6420) ^ 0x80808080);
    }
};
