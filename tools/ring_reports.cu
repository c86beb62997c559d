// The smallest ring of bulk copies of the form that BulkRing has (cuda/stream.cuh): for compute-sanitizer,
// and for tools/ring_reports.py, which says why.

#include "ptx.cuh"

#if !defined(WITH_RACE)
#error "a -D constant is missing"
#endif

constexpr int CONSUMERS = 2;  // warps
constexpr int THREADS = 32 * CONSUMERS;
constexpr int SLOTS = 2;
constexpr int SLOT_WORDS = 512;

struct Ring {
    alignas(128) uint32_t words[SLOTS][SLOT_WORDS];
    uint64_t full[SLOTS], empty[SLOTS];
};

// A phase always ends: one that does not within so many polls, each of which may sleep, is a fault.
__device__ __forceinline__ void await(uint64_t* barrier, uint32_t parity) {
    for (uint32_t polls = 0; !mbarrier_try_wait(barrier, parity); ++polls) {
        trap_if(polls == 1u << 26);
    }
}

// By one lane: copies `chunks` slots' worth of `source` through the ring, and leaves when all have landed.
__device__ __forceinline__ void produce(Ring& ring, const uint32_t* source, int chunks) {
    const uint64_t policy = evict_first_policy();
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const int slot = chunk % SLOTS, use = chunk / SLOTS;
        // Before its first phase has ended, the phase before it counts as ended.
        await(ring.empty + slot, (use & 1) ^ 1);
        mbarrier_arrive_expect(ring.full + slot, sizeof(ring.words[slot]));
        copy_bulk(ring.words[slot], source + chunk * SLOT_WORDS, sizeof(ring.words[slot]), ring.full + slot,
                  policy);
    }
    for (int chunk = chunks < SLOTS ? 0 : chunks - SLOTS; chunk < chunks; ++chunk) {
        await(ring.full + chunk % SLOTS, chunk / SLOTS & 1);
    }
}

// By the warps that consume: the sum of the thread's words, each times an odd number of its own.
__device__ __forceinline__ uint32_t consume(Ring& ring, int chunks) {
    uint32_t sum = 0;
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const int slot = chunk % SLOTS;
        const uint32_t parity = chunk / SLOTS & 1;
        if (!WITH_RACE) await(ring.full + slot, parity);
        for (int word = threadIdx.x; word < SLOT_WORDS; word += THREADS) {
            sum += ring.words[slot][word] * static_cast<uint32_t>(2 * (chunk * SLOT_WORDS + word) + 1);
        }
        if (WITH_RACE) await(ring.full + slot, parity);
        const bool served = all_have(__uint_as_float(sum));
        __syncwarp();
        if (served && threadIdx.x % 32 == 0) mbarrier_arrive(ring.empty + slot);
    }
    return sum;
}

// One block of 32 threads more than THREADS, the last warp of which copies `source` [chunks][SLOT_WORDS].
// `sums` [THREADS].
extern "C" __global__ void __launch_bounds__(THREADS + 32)
    ring_reports(const uint32_t* source, int chunks, uint32_t* sums) {
    __shared__ Ring ring;
    if (threadIdx.x == 0) {
        for (int slot = 0; slot < SLOTS; ++slot) {
            mbarrier_init(ring.full + slot, 1);
            mbarrier_init(ring.empty + slot, CONSUMERS);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x >= THREADS) {
        if (threadIdx.x == THREADS) produce(ring, source, chunks);
        return;
    }
    const uint32_t sum = consume(ring, chunks);
    sync_threads<THREADS>();  // as the kernel's computing warps meet, without those that fetch
    sums[threadIdx.x] = sum;
}
