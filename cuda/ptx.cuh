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

// The address of shared memory as PTX wants it.
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// The same place in shared memory, but the compiler can't know: it keeps the address in a register, where
// else it makes it anew from special registers for every access.
__device__ __forceinline__ uint8_t* opaque_shared(void* shared) {
    uint32_t address = shared_address(shared);
    asm volatile("" : "+r"(address));
    return static_cast<uint8_t*>(__cvta_shared_to_generic(address));
}

// d += a * b for one 16 x 16 by 16 x 8 step of bf16 operands, accumulated in fp32. With g = lane / 4 and
// t = lane % 4: a holds rows {g, g+8} at k {2t, 2t+1} in a[0], a[1] and at k {2t+8, 2t+9} in a[2], a[3];
// b0 holds column g at k {2t, 2t+1}, b1 at k {2t+8, 2t+9}; d[0], d[1] are row g at columns {2t, 2t+1},
// d[2], d[3] row g + 8. All 32 lanes take part.
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same for a 16 x 32 by 32 x 8 step of integers: a of 8 bits, signed or not, b signed, d of 32. a holds
// rows {g, g+8} at k 4t .. 4t+3 in a[0], a[1] and at k 16 more in a[2], a[3], a byte each; b0 holds column g
// at k 4t .. 4t+3, b1 at 16 more.
#define MMA_16X8X32(TYPE)                                 \
    asm("mma.sync.aligned.m16n8k32.row.col.s32." TYPE     \
        ".s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, " \
        "{%0,%1,%2,%3};"                                  \
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])  \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

__device__ __forceinline__ void mma_16x8x32_signed(int (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                   uint32_t b1) {
    MMA_16X8X32("s8");
}

__device__ __forceinline__ void mma_16x8x32_unsigned(int (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                     uint32_t b1) {
    MMA_16X8X32("u8");
}

// The same for a 16 x 8 by 8 x 8 step of bf16: a[0], a[1] hold rows {g, g+8} at k {2t, 2t+1}, b column g at
// the same.
__device__ __forceinline__ void mma_16x8x8(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
}

// Two 8 x 8 matrices of 16-bit elements, transposed: lane i < 16 gives the address (16-byte aligned) of row
// i % 8 of matrix i / 8; lane 4g + t receives of each the elements of column g in rows 2t (low) and 2t + 1.
__device__ __forceinline__ void load_transposed(uint32_t (&d)[2], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(d[0]), "=r"(d[1])
                 : "r"(shared_address(shared))
                 : "memory");
}

// Four of them: lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_transposed(uint32_t (&d)[4], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(shared_address(shared))
                 : "memory");
}

// Four 8 x 8 matrices of 16-bit elements: lane i gives the address (16-byte aligned) of row i % 8 of matrix i
// / 8; lane 4g + t receives of each the elements of row g in columns 2t (low) and 2t + 1.
__device__ __forceinline__ void load_matrices(uint32_t (&d)[4], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(shared_address(shared))
                 : "memory");
}

// An 8 x 8 matrix of 16-bit elements transposed: lane 4g + t gives those of row g in columns 2t (low) and 2t
// + 1 and receives those of column g in rows 2t and 2t + 1.
__device__ __forceinline__ uint32_t transpose(uint32_t pair) {
    uint32_t d;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(pair));
    return d;
}

// Two floats rounded to bf16, to nearest even; `low` lands in the low half.
__device__ __forceinline__ uint32_t pack_bf16x2(float low, float high) {
    uint32_t d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

// The sums of two pairs of bf16, to nearest even. By the fused operation, which all devices have.
__device__ __forceinline__ uint32_t add_bf16x2(uint32_t a, uint32_t b) {
    constexpr uint32_t ONES = 0x3f803f80;
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(ONES), "r"(b));
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

// 1 / sqrt(x) and x / y, to about 2 ulp.
__device__ __forceinline__ float rsqrt_approx(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float divide_approx(float x, float y) {
    float quotient;
    asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(quotient) : "f"(x), "f"(y));
    return quotient;
}

// The least of the 32 lanes' values, in all lanes.
__device__ __forceinline__ uint32_t warp_min(uint32_t x) {
    uint32_t least;
    asm volatile("redux.sync.min.u32 %0, %1, 0xffffffff;" : "=r"(least) : "r"(x));
    return least;
}

// The greatest.
__device__ __forceinline__ uint32_t warp_max(uint32_t x) {
    uint32_t greatest;
    asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(greatest) : "r"(x));
    return greatest;
}

// Starts copying 16 bytes from global to shared memory (both 16-byte aligned), past the L1. They may land
// at any time until the wait that covers them.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global)
                 : "memory");
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

// True, in all lanes, once every lane has its `value`: instructions that depend on it, in a way that the
// assembler can't see through (the number of threads is never 0). Loads that the value was made of have then
// been served. Without it an arrival can overtake a load that was asked for before it (seen on an H100 with
// ldmatrix), and what follows from the arrival overwrite what the load was to read.
__device__ __forceinline__ bool all_have(float value) {
    uint32_t all;
    asm volatile(
        "{ .reg .pred p; .reg .b32 t; mov.u32 t, %%ntid.x; or.b32 t, t, %1; setp.ne.u32 p, t, 0; "
        "vote.sync.all.pred p, p, 0xffffffff; selp.u32 %0, 1, 0, p; }"
        : "=r"(all)
        : "r"(__float_as_uint(value))
        : "memory");
    return all != 0;
}

// Two groups of 128 threads take turns: the first's wait_turn(0) meets the second's pass_turn(0), which does
// not wait; the second's wait_turn(1) the first's pass_turn(1).
__device__ __forceinline__ void wait_turn(int group) {
    asm volatile("barrier.sync.aligned %0, 256;" ::"r"(3 + group) : "memory");
}
__device__ __forceinline__ void pass_turn(int group) {
    asm volatile("barrier.arrive.aligned %0, 256;" ::"r"(3 + group) : "memory");
}

// ---- bulk copies and the barriers in shared memory that count them (sm_90 and newer) ----
// A barrier is 8 bytes, in a phase of parity 0 at first. A phase ends when `count` arrivals were made and all
// announced bytes have landed; the next one begins.

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

// Makes this thread's mbarrier_init visible to copies; other threads see it after they have met this one.
__device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// One arrival; what this thread did before it is visible to whoever sees the phase end.
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// One arrival that announces `bytes` bytes of copies, which end the phase when they have landed.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}

// One arrival once all copies that this thread has started by copy_async_16 have landed.
__device__ __forceinline__ void copy_async_arrive(uint64_t* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Whether the phase of this parity has ended (the current one has the other parity).
__device__ __forceinline__ bool mbarrier_test(uint64_t* barrier, uint32_t parity) {
    uint32_t done;
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
    return done != 0;
}

// The same; may put the thread to sleep for a while first.
__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
    uint32_t done;
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
    return done != 0;
}

// For copy_bulk: what is read once makes room in the L2 before anything else.
__device__ __forceinline__ uint64_t evict_first_policy() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Starts copying `bytes` (a multiple of 16, as both addresses) to shared memory; they count for `barrier`.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, uint32_t bytes, uint64_t* barrier,
                                          uint64_t policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
        "[%3], "
        "%4;" ::"r"(shared_address(shared)),
        "l"(global), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
        : "memory");
}

// The same, without a hint for the L2.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, uint32_t bytes,
                                          uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(shared)),
        "l"(global), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}

// Copies and wgmma see what this thread, and those that it has met, did to memory before.
__device__ __forceinline__ void fence_async_proxy() {
    asm volatile("fence.proxy.async;" ::: "memory");
}

// ---- registers of a group of four warps (sm_90 to sm_110: ptxas ignores it in a kernel for sm_120) ----

// Whether warps can hand registers on to others.
#if __CUDA_ARCH__ < 1200
constexpr bool HANDS_ON_REGISTERS = true;
#else
constexpr bool HANDS_ON_REGISTERS = false;
#endif

// The warps of a group, which begin with a multiple of four, have COUNT registers each from here on: fewer
// than before, or more, once others have given them up.
template <int COUNT>
__device__ __forceinline__ void give_up_registers() {
    if constexpr (HANDS_ON_REGISTERS) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void take_registers() {
    if constexpr (HANDS_ON_REGISTERS) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// ---- products of a group of four warps (sm_90 alone) ----

// The warps begin with a multiple of four and do all of this together. Warp w of the group has rows 16 w ..
// 16 w + 15 of a 64-row A in its registers, as mma_16x8x16 has them, and the same rows of d: d[j] is what
// that has of columns 8 j .. 8 j + 7. Columns lie in shared memory; see operand_descriptor.

// Columns of 16 bytes, at `shared` those of the first half of a step's k, `half_bytes` further on those of
// the second; eight columns stand together, the next eight are `octet_bytes` further on.
__device__ __forceinline__ uint64_t operand_descriptor(const void* shared, int half_bytes, int octet_bytes) {
    return (shared_address(shared) >> 4 & 0x3fff) | static_cast<uint64_t>(half_bytes >> 4) << 16 |
           static_cast<uint64_t>(octet_bytes >> 4) << 32;
}

// Before the first product after registers of a or d were written.
__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Closes the group of products started since the last one.
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most PENDING groups, the youngest, are under way; a and d of the others may be used again.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// clang-format off
#define FOUR(C, j) C(d[j][0]), C(d[j][1]), C(d[j][2]), C(d[j][3])
#define SIXTEEN(C, j) FOUR(C, j), FOUR(C, j + 1), FOUR(C, j + 2), FOUR(C, j + 3)
#define WGMMA_64X128(SHAPE, CONSTRAINT, SCALES)                                                         \
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %69, 0; wgmma.mma_async.sync.aligned." SHAPE           \
                 " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "             \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "     \
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "     \
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "    \
                 "{%64, %65, %66, %67}, %68, p" SCALES "; }"                                            \
                 : SIXTEEN(CONSTRAINT, 0), SIXTEEN(CONSTRAINT, 4), SIXTEEN(CONSTRAINT, 8),              \
                   SIXTEEN(CONSTRAINT, 12)                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(columns),                            \
                   "r"(static_cast<uint32_t>(add)))
// clang-format on

// Starts d = a * columns, or with `add` d += that, for a 64 x 16 by 16 x 128 step of bf16, accumulated in
// fp32.
__device__ __forceinline__ void wgmma_64x128x16(float (&d)[16][4], const uint32_t (&a)[4], uint64_t columns,
                                                bool add) {
    WGMMA_64X128("m64n128k16.f32.bf16.bf16", "+f", ", 1, 1, 0");
}

// The same for a 64 x 32 by 32 x 128 step of integers: a of 8 bits, signed or not, columns signed, d of 32.
__device__ __forceinline__ void wgmma_64x128x32_signed(int (&d)[16][4], const uint32_t (&a)[4],
                                                       uint64_t columns, bool add) {
    WGMMA_64X128("m64n128k32.s32.s8.s8", "+r", "");
}

__device__ __forceinline__ void wgmma_64x128x32_unsigned(int (&d)[16][4], const uint32_t (&a)[4],
                                                         uint64_t columns, bool add) {
    WGMMA_64X128("m64n128k32.s32.u8.s8", "+r", "");
}

// ---- meeting of a part of the block ----

// The first COUNT threads of the block, whole warps, wait for each other.
template <int COUNT>
__device__ __forceinline__ void sync_threads() {
    asm volatile("barrier.sync.aligned 1, %0;" ::"n"(COUNT) : "memory");
}

// The same at a meeting of another kind; whether any of them brought true.
template <int COUNT>
__device__ __forceinline__ bool sync_threads_or(bool value) {
    uint32_t any;
    asm volatile(
        "{ .reg .pred p, q; setp.ne.u32 p, %1, 0; barrier.red.aligned.or.pred q, 2, %2, p; selp.u32 %0, 1, "
        "0, q; }"
        : "=r"(any)
        : "r"(static_cast<uint32_t>(value)), "n"(COUNT)
        : "memory");
    return any != 0;
}

// One access to a word of shared memory, not ordered against any other.
__device__ __forceinline__ uint32_t load_relaxed_shared(const uint32_t* p) {
    uint32_t v;
    asm volatile("ld.relaxed.cta.shared.u32 %0, [%1];" : "=r"(v) : "r"(shared_address(p)) : "memory");
    return v;
}

__device__ __forceinline__ void store_relaxed_shared(uint32_t* p, uint32_t v) {
    asm volatile("st.relaxed.cta.shared.u32 [%0], %1;" ::"r"(shared_address(p)), "r"(v) : "memory");
}

// Sets `bits` in a word of shared memory, whole, not ordered against any other access.
__device__ __forceinline__ void set_bits_shared(uint32_t* p, uint32_t bits) {
    asm volatile("red.relaxed.cta.shared.or.b32 [%0], %1;" ::"r"(shared_address(p)), "r"(bits) : "memory");
}

// Adds to a word of shared memory, whole, not ordered against any other access; what was there before.
__device__ __forceinline__ uint32_t fetch_add_shared(uint32_t* p, uint32_t addend) {
    uint32_t old;
    asm volatile("atom.relaxed.cta.shared.add.u32 %0, [%1], %2;"
                 : "=r"(old)
                 : "r"(shared_address(p)), "r"(addend)
                 : "memory");
    return old;
}

// If it is `hopeless`, ends the kernel with an error of the device.
__device__ __forceinline__ void trap_if(bool hopeless) {
    if (hopeless) asm volatile("trap;");
}

// ---- memory that blocks share ----

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

// Adds to a word. What this thread did before, and what it has seen others do, is done for whoever reads the
// sum by load_acquire_32.
__device__ __forceinline__ void add_release_32(uint32_t* p, uint32_t addend) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(addend) : "memory");
}

__device__ __forceinline__ uint32_t load_acquire_32(const uint32_t* p) {
    uint32_t v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

// ---- memory of the host ----

// One access, whole or not at all, not ordered against any other.
__device__ __forceinline__ uint64_t load_relaxed_system_64(const uint64_t* p) {
    uint64_t v;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ void store_relaxed_system_128(uint4* p, uint4 v) {
    const uint64_t low = v.x | static_cast<uint64_t>(v.y) << 32;
    const uint64_t high = v.z | static_cast<uint64_t>(v.w) << 32;
    asm volatile("{ .reg .b128 v; mov.b128 v, {%1, %2}; st.relaxed.sys.global.b128 [%0], v; }" ::"l"(p),
                 "l"(low), "l"(high)
                 : "memory");
}

__device__ __forceinline__ void store_relaxed_system_32(uint32_t* p, uint32_t v) {
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// Nanoseconds of the device's global timer; it moves in steps of up to about a microsecond.
__device__ __forceinline__ uint64_t global_timer_ns() {
    uint64_t t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}
