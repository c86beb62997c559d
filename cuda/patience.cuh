// How long a block waits for others, and how it is known afterwards which wait was in vain.
#pragma once

#include "config.cuh"

enum Stage {
    STAGE_QKV,
    STAGE_ATTENTION,
    STAGE_O,
    STAGE_GATE_UP,
    STAGE_DOWN,
    STAGE_LM_HEAD,
    NUM_STAGES,
    STAGE_HOST = NUM_STAGES,  // what the host sends or gets: the token, the candidates
    STAGE_MERGE
};

// Where a wait stands, for the report when it gives up.
__device__ __forceinline__ int where_of(int layer, int stage) {
    return 8 * layer + stage;
}

// Called while what a block waits for is not there yet. False once the wait is hopeless: this or another
// block has waited longer than the bound. All blocks then leave.
class Patience {
  public:
    __device__ Patience(const ModelArgs& args, int where) : args_(args), where_(where) {}

    __device__ bool more() {
        if (++polls_ % 256 != 0) return true;
        if (load_relaxed_32(args_.gave_up) == args_.pass) return false;
        const uint64_t now = global_timer_ns();
        if (deadline_ == 0) deadline_ = now + args_.spin_limit_ns;
        if (now < deadline_) return true;
        store_relaxed_system_128(reinterpret_cast<uint4*>(args_.status),
                                 make_uint4(static_cast<uint32_t>(where_), blockIdx.x, 0, args_.pass));
        store_relaxed_32(args_.gave_up, args_.pass);
        return false;
    }

  private:
    const ModelArgs& args_;
    uint64_t deadline_ = 0;
    uint32_t polls_ = 0;
    int where_;
};

constexpr uint32_t MOST_POLLS = 1u << 26;

// A copy always lands, and what was copied is always read: a phase that does not within so many polls, each
// of which may sleep, is a fault.
__device__ __forceinline__ void await_copy(uint64_t* barrier, uint32_t parity) {
    for (uint32_t polls = 0; !mbarrier_try_wait(barrier, parity); trap_if(++polls == MOST_POLLS)) {
    }
}
