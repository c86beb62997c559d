// A kernel on the simulated device as a shared library, the pass or, with SIM_CHUNK, the chunk: what
// tests/sim/driver.py calls.

#include "cuda.hpp"
#include "fault.hpp"

#if defined(SIM_CHUNK)
#include "chunk.cu"
#else
#include "ffmini.cu"
#endif

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace {

// Denormals are zero while it lives, as the kernel's build option -ftz=true says.
class FlushToZero {
  public:
#if defined(__x86_64__)
    FlushToZero() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
    ~FlushToZero() { _mm_setcsr(saved_); }

  private:
    unsigned saved_;
#else
    FlushToZero() : saved_(get()) { set(saved_ | 1ull << 24); }
    ~FlushToZero() { set(saved_); }

  private:
    static uint64_t get() {
        uint64_t fpcr;
        asm volatile("mrs %0, fpcr" : "=r"(fpcr));
        return fpcr;
    }
    static void set(uint64_t fpcr) { asm volatile("msr fpcr, %0" ::"r"(fpcr)); }
    uint64_t saved_;
#endif
};

#if defined(SIM_CHUNK)
using Args = ChunkArgs;
constexpr int LAUNCH_BYTES = CHUNK_SHARED_BYTES, LAUNCH_THREADS = CHUNK_THREADS;
constexpr auto KERNEL = ffmini_chunk;
#else
using Args = PassArgs;
constexpr int LAUNCH_BYTES = SHARED_BYTES, LAUNCH_THREADS = BLOCK_THREADS;
constexpr auto KERNEL = ffmini_pass;
#endif

const Args* kernel_args;

}  // namespace

// One launch. Null after a good one, else a line that says what went wrong.
extern "C" const char* sim_run(const Args* args, const sim::Options* options) {
    const FlushToZero flush;
    const sim::FaultGuard guard;
    kernel_args = args;
    sim::machine.run(*options, LAUNCH_BYTES, LAUNCH_THREADS, [] { KERNEL(*kernel_args); });
    return sim::machine.error().empty() ? nullptr : sim::machine.error().c_str();
}

// What the policies did in the last launch; see sim::Event.
extern "C" const uint64_t* sim_events() {
    return sim::machine.events();
}

#if defined(SIM_COVERAGE)
extern "C" void __gcov_dump();

// Writes how often each line has run so far beside the library.
extern "C" void sim_write_coverage() {
    __gcov_dump();
}
#endif

// Gives the grid's memory back; the next launch takes it again.
extern "C" void sim_close() {
    sim::machine.close();
}
