// The kernel on the simulated device as a shared library: what tests/sim/driver.py calls.

#include "cuda.hpp"
#include "fault.hpp"
#include "ffmini.cu"

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

const PassArgs* pass_args;

}  // namespace

// One launch; see sim::Options. If `sent` is not null, the first sent_packets packets of the exchange keep
// what they hold, and what the kernel stores there goes to `sent`. Null after a good launch, else a line that
// says what went wrong.
extern "C" const char* sim_run(const PassArgs* args, uint64_t seed, const void* lost_packet, uint32_t blocks,
                               bool give_up, uint8_t* sent, uint64_t sent_packets) {
    const FlushToZero flush;
    const sim::FaultGuard guard;
    pass_args = args;
    const auto* kept = sent == nullptr ? nullptr : reinterpret_cast<const uint8_t*>(args->exchange);
    sim::machine.run({seed, lost_packet, blocks, give_up, kept, sent_packets * sizeof(uint4), sent},
                     SHARED_BYTES, BLOCK_THREADS, [] { ffmini_pass(*pass_args); });
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
