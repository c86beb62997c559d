// Fibers: stacks of their own between which one OS thread switches in a few nanoseconds.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the callee-saved registers on the running stack and its pointer in *from, then goes on at `to`.
extern "C" void sim_switch(void** from, void* to);

namespace sim {

// `bytes` bytes, a multiple of the alignment that they need, which end at an inaccessible page and start,
// but for the rounding to pages, behind another.
class GuardedMemory {
  public:
    explicit GuardedMemory(size_t bytes)
        : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))), inner_((bytes + page_ - 1) / page_ * page_) {
        void* base = mmap(nullptr, inner_ + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base == MAP_FAILED) fail("mmap");
        base_ = static_cast<uint8_t*>(base);
        if (mprotect(base_ + page_, inner_, PROT_READ | PROT_WRITE) != 0) fail("mprotect");
        data = base_ + page_ + inner_ - bytes;
    }
    GuardedMemory(const GuardedMemory&) = delete;
    ~GuardedMemory() {
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(base_, inner_ + 2 * page_);  // of frames that never returned
#endif
        munmap(base_, inner_ + 2 * page_);
    }

    uint8_t* data;

  private:
    [[noreturn]] static void fail(const char* call) {
        perror(call);
        abort();
    }

    size_t page_, inner_;
    uint8_t* base_;
};

// A default Fiber stands for the OS thread's own stack; prepare() gives it one of its own.
class Fiber {
  public:
#if defined(__SANITIZE_ADDRESS__)
    static constexpr size_t STACK_BYTES = 256 << 10;
#else
    static constexpr size_t STACK_BYTES = 64 << 10;
#endif

    Fiber() = default;
    Fiber(const Fiber&) = delete;

    // The next resume() calls `entry`, which begins with entered() and never returns. Frames of different
    // `color` fall into different sets of the caches.
    void prepare(void (*entry)(), int color) {
        if (stack_ == nullptr) stack_ = std::make_unique<GuardedMemory>(STACK_BYTES);
        bottom_ = stack_->data;
        bytes_ = STACK_BYTES;
        fake_stack_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(stack_->data, STACK_BYTES);  // an aborted run left its frames there
#endif
        uint8_t* top = stack_->data + STACK_BYTES - color % COLORS * COLOR_BYTES;
        void** frame = reinterpret_cast<void**>(top) - FRAME_WORDS;
        for (int i = 0; i < FRAME_WORDS; ++i) frame[i] = nullptr;
        frame[RETURN_WORD] = reinterpret_cast<void*>(entry);
        stack_pointer_ = frame;
    }

    // Leaves `from`, which is running, for this fiber; returns when something resumes `from`.
    void resume(Fiber& from) {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(&from.fake_stack_, bottom_, bytes_);
#endif
        sim_switch(&from.stack_pointer_, stack_pointer_);
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(from.fake_stack_, nullptr, nullptr);
#endif
    }

    // The first thing on a new stack; `first` is the OS thread's fiber, which resumed the very first one.
    static void entered([[maybe_unused]] Fiber& first) {
#if defined(__SANITIZE_ADDRESS__)
        const void* bottom;
        size_t bytes;
        __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
        if (first.bottom_ == nullptr) first.bottom_ = bottom, first.bytes_ = bytes;
#endif
    }

  private:
    static constexpr int COLORS = 16, COLOR_BYTES = 448;
#if defined(__x86_64__)
    static constexpr int FRAME_WORDS = 8, RETURN_WORD = 6;  // six registers, where `ret` goes, alignment
#else
    static constexpr int FRAME_WORDS = 20, RETURN_WORD = 1;  // x30
#endif
    void* stack_pointer_ = nullptr;
    std::unique_ptr<GuardedMemory> stack_;
    void* fake_stack_ = nullptr;
    const void* bottom_ = nullptr;  // of the stack, for the sanitizer
    size_t bytes_ = 0;
};

}  // namespace sim
