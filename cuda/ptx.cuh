// The device's own instructions. Every line of PTX in ffmini is in this header, each behind a function
// with its contract; nothing else in cuda/ knows about it.
#pragma once

typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;

// The same value, but the compiler can't know: what is computed from it stays where it is used, instead of
// being computed ahead for a whole loop and held in registers.
__device__ __forceinline__ int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// d += a * b for one 16 x 16 by 16 x 8 step of bf16 operands, accumulated in fp32. With g = lane / 4 and
// t = lane % 4: a holds rows {g, g+8} at k {2t, 2t+1} in a[0], a[1] and at k {2t+8, 2t+9} in a[2], a[3];
// b0 holds column g at k {2t, 2t+1}, b1 at k {2t+8, 2t+9}; d[0], d[1] are row g at columns {2t, 2t+1},
// d[2], d[3] row g + 8. All 32 lanes take part.
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// a * b + c in each bf16 half, rounded once.
__device__ __forceinline__ uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// Two floats rounded to bf16, to nearest even; `low` lands in the low half.
__device__ __forceinline__ uint32_t pack_bf16x2(float low, float high) {
    uint32_t d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

// The float value of an fp16 bit pattern; exact.
__device__ __forceinline__ float half_to_float(uint16_t bits) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
    return f;
}

// 2^x to about 2 ulp; 2^-inf = 0.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Starts copying 16 bytes from global to shared memory (both 16-byte aligned), past the L1. They may land
// at any time until the wait that covers them.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}

// Closes this thread's current group of copies (an empty one counts too).
__device__ __forceinline__ void copy_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most PENDING of this thread's groups, the youngest, are still under way. The other lanes'
// copies become visible at the next __syncwarp after they too have waited.
template <int PENDING>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// One 16-byte access, whole or not at all, not ordered against any other.
__device__ __forceinline__ uint4 load_relaxed_128(const uint4* p) {
    uint64_t low, high;
    asm volatile("{ .reg .b128 v; ld.relaxed.gpu.global.b128 v, [%2]; mov.b128 {%0, %1}, v; }"
                 : "=l"(low), "=l"(high)
                 : "l"(p)
                 : "memory");
    return make_uint4(static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32),
                      static_cast<uint32_t>(high), static_cast<uint32_t>(high >> 32));
}

__device__ __forceinline__ void store_relaxed_128(uint4* p, uint4 v) {
    const uint64_t low = v.x | static_cast<uint64_t>(v.y) << 32;
    const uint64_t high = v.z | static_cast<uint64_t>(v.w) << 32;
    asm volatile("{ .reg .b128 v; mov.b128 v, {%1, %2}; st.relaxed.gpu.global.b128 [%0], v; }" ::"l"(p),
                 "l"(low), "l"(high)
                 : "memory");
}

__device__ __forceinline__ uint32_t load_relaxed_32(const uint32_t* p) {
    uint32_t v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ void store_relaxed_32(uint32_t* p, uint32_t v) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// Nanoseconds of the device's global timer; it moves in steps of up to about a microsecond.
__device__ __forceinline__ uint64_t global_timer_ns() {
    uint64_t t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}
