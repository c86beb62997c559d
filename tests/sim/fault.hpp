// An access to an inaccessible page ends a run with a message, not the process.
#pragma once

#include <csignal>
#include <cstdint>

#include "machine.hpp"

namespace sim {

// Takes the faults of the running lane while it lives. Under AddressSanitizer it does nothing: that reports
// faults itself, with the stack.
class FaultGuard {
  public:
#if defined(__SANITIZE_ADDRESS__)
    FaultGuard() {}
#else
    FaultGuard() {
        stack_t stack = {};
        stack.ss_sp = memory_;
        stack.ss_size = sizeof memory_;
        sigaltstack(&stack, &old_stack_);
        struct sigaction action = {};
        action.sa_sigaction = handle;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler leaves by switching fibers
        sigaction(SIGSEGV, &action, &old_action_);
    }
    ~FaultGuard() {
        sigaction(SIGSEGV, &old_action_, nullptr);
        sigaltstack(&old_stack_, nullptr);
    }

  private:
    static void handle(int, siginfo_t* info, void*) {
        machine.fail({"a load or store", "cuda", 0}, "%p is in no array and not in shared memory",
                     info->si_addr);
    }

    alignas(16) char memory_[64 << 10];
    stack_t old_stack_;
    struct sigaction old_action_;
#endif
};

}  // namespace sim
