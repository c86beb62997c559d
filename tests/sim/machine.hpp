// The simulated device: a cooperative grid whose lanes are fibers of one OS thread. A seed chooses who runs
// next, when a relaxed store becomes visible and when an asynchronous copy lands; one seed, one run.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "fiber.hpp"

// Default arguments by which a primitive learns the line that calls it.
#define SIM_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// The running block's dynamic shared memory (see cuda.hpp).
extern uint8_t (*sim_shared_memory)[];

namespace sim {

constexpr int WARP_LANES = 32;
constexpr uint32_t ALL_LANES = 0xffffffff;

struct Site {
    const char* op;
    const char* file;
    int line;

    bool operator==(const Site& other) const {
        return line == other.line && op == other.op && file == other.file;
    }
};

// What a run is asked to do; driver.py has the same struct as a NumPy dtype.
struct Options {
    uint64_t seed;         // 0: lanes in turn, stores visible at once, copies as late as allowed
    const void* lost;      // stores to this address never become visible
    uint64_t before_lost;  // ... but for the first ones, so many
    uint32_t blocks;
    bool give_up;         // when nothing can go on, time passes until waits give up; else that is an error
    const uint8_t* kept;  // stores to the kept_bytes bytes from here on go to `sent` instead; null: none
    size_t kept_bytes;
    uint8_t* sent;
};

struct Words {  // a value of 4, 8 or 16 bytes
    uint32_t word[4];
};

// What a seed decides. Any 81 seeds in a row go through all combinations of order, victim, stores and copies.
struct Policy {
    enum Order { IN_TURN, NEWEST_FIRST, ANY_ORDER } order = IN_TURN;
    int starved_block = -1, starved_warp = -1;  // runs only when no other lane can
    int of_block = -1;                          // if not -1: the starved warp is of this block alone
    uint32_t yield = 0;                         // of 256 chances to let others run where a lane need not wait
    uint32_t store_delay = 0;                   // one step of so many shows a pending store to some block
    bool stores_last = false;                   // ... only when no lane can run
    uint32_t copies_late = 256;                 // of 256 copies that land at the wait, not at once
};

// What the policies did in a run, for tests of them; driver.py names them in this order.
enum Event {
    STARVED_BLOCK_RAN,  // a lane of the starved block, as nobody else could
    STARVED_WARP_RAN,   // the same of the starved warp
    COPY_LANDED_LATE,   // at the wait that covers it
    COPY_LANDED_AT_ONCE,
    STORE_HELD,       // shown to a block only when no lane could run
    STORE_OVERTAKEN,  // shown to a block after a younger one to another address
    NUM_EVENTS
};

class Random {  // xorshift64*
  public:
    explicit Random(uint64_t seed) : state_((seed + 1) * 0x9e3779b97f4a7c15ull) {}
    uint32_t next() {
        state_ ^= state_ >> 12, state_ ^= state_ << 25, state_ ^= state_ >> 27;
        return static_cast<uint32_t>((state_ * 0x2545f4914f6cdd1dull) >> 32);
    }
    uint32_t below(uint32_t n) { return static_cast<uint32_t>((uint64_t{next()} * n) >> 32); }
    bool chance(uint32_t of_256) { return next() >> 24 < of_256; }

  private:
    uint64_t state_;
};

struct Copy {
    uint8_t* to;
    const uint8_t* from;
};

// A copy that a barrier in shared memory counts.
struct BulkCopy {
    uint8_t* to;
    const uint8_t* from;
    uint32_t bytes;
    const void* barrier;
    int block;
};

// An arrival at a barrier in shared memory that waits for copies to land.
struct CopyArrival {
    std::vector<Copy> copies;
    const void* barrier;
};

// A barrier in shared memory: its phase ends when `left` is 0 and no announced byte is missing.
struct CountingBarrier {
    uint32_t count, left;
    int64_t missing_bytes;
    uint32_t parity;
};

// The barriers of a block, by the number that they have on the device.
enum BarrierNumber { SYNC_THREADS, SYNC_FIRST_THREADS, SYNC_OR, FIRST_TURN, NUM_BARRIERS = FIRST_TURN + 2 };

struct Warp;
struct Block;

struct Lane {
    Block* block;
    Warp* warp;
    int thread;  // in its block
    int index;   // in its warp
    Fiber fiber;
    bool starved;
    enum { RUNS, READY, WAITS, POLLS, DONE } state;
    Site site;             // where it waits
    uint32_t mask;         // of the warp's lanes that it waits for; 0: at a barrier or polling
    uint32_t operand[10];  // what it brings to a meeting of its warp,
    uint32_t result[4];    // and what it takes away
    uintptr_t polled;      // the 16 bytes of its last relaxed load
    std::map<uintptr_t, Words>
        found;  // what it found there and at others before, since it last found anything new
    int looks;  // how often in a row it looked at shared memory in vain
    int polls;  // how often in a row it found nothing new
    std::deque<std::vector<Copy>> copies;  // closed groups, oldest first; the last one is still open
    std::vector<Copy> landed;              // that no other lane may rely on yet
    std::deque<CopyArrival> arrivals;      // that are still to come, oldest first
    bool specialised;                      // it does something else than the block's other warps
    bool fenced;                           // its registers are ready for products
    uint64_t came[NUM_BARRIERS];           // to which meeting at each of its block's barriers, the last time
};

// Registers of a warp times columns in shared memory.
struct Product {
    uint32_t a[WARP_LANES][4];
    void* d[WARP_LANES];  // where each lane's part of the result is
    uint64_t columns;
    bool add;
    void (*multiply)(const Product&);
};

// Lanes of a warp that wait for each other.
struct Meeting {
    uint32_t mask, arrived;
    Site site;
};

struct Warp {
    Lane* lanes[WARP_LANES];
    std::vector<Meeting> meetings;
    std::deque<std::vector<Product>> products;  // under way: closed groups, oldest first, and the open one

    bool multiplies() const {
        for (const auto& group : products) {
            if (!group.empty()) return true;
        }
        return false;
    }
};

// Where threads of a block wait for each other, or come without waiting.
struct BlockBarrier {
    std::vector<Lane*> waiting;
    int came = 0, count = 0;  // of the threads, of which so many make a meeting
    uint64_t meeting = 1;     // the number of the next one
    bool any = false;         // the or of what they brought
    bool result = false;      // of the last complete meeting
    Site sites[2] = {};       // where they wait: [specialised]
};

struct Block {
    Block(int place, size_t shared_bytes, int threads)
        : index(place), shared(shared_bytes), warps(threads / WARP_LANES), lanes(threads) {}

    int index;
    GuardedMemory shared;
    std::vector<Warp> warps;
    std::vector<Lane> lanes;
    int lanes_left = 0;  // in the kernel
    BlockBarrier barriers[NUM_BARRIERS];
};

struct PendingStore {
    Words value;
    uint32_t words;
    Lane* lane;
};

// The stores to one address that not all blocks see yet, oldest first. Memory holds what all blocks see.
struct PendingStores {
    std::deque<PendingStore> stores;
    std::vector<uint32_t> seen;  // by each block: how many of them
};

struct Sight {  // that a block will see one more of the stores to an address
    uintptr_t address;
    uint32_t block;
    uint64_t age;  // counts the stores of the run
};

class Machine {
  public:
    // `shared_bytes` and `threads` belong to a block; `kernel` runs one lane.
    void run(const Options& options, size_t shared_bytes, int threads, void (*kernel)());
    // Frees the grid's shared memory and stacks, which are kept from run to run.
    void close() { grid_.clear(); }
    // Empty after a good run.
    const std::string& error() const { return error_; }
    // Of the last run, [NUM_EVENTS].
    const uint64_t* events() const { return events_; }

    // ---- what the primitives are made of; each is called by the running lane ----

    Lane& lane() { return *current_; }
    uint32_t blocks() const { return options_.blocks; }
    uint64_t now_ns() const { return now_ns_; }
    // Ends the run with a message.
    [[noreturn]] void fail(const Site& site, const char* format, ...) __attribute__((format(printf, 3, 4)));
    // The lane lets others run, perhaps.
    void yield(bool always);
    // All lanes of `mask` arrive here; the last one runs combine(warp), which turns operands into results.
    template <class Combine>
    void meet(uint32_t mask, const Site& site, Combine combine);
    // The first `count` threads of the block come to this barrier, all of them if it is 0; whether any
    // brought `value`.
    bool barrier(int number, int count, bool value, const Site& site);
    // The lane comes, but does not wait for the others.
    void barrier_pass(int number, int count, const Site& site);
    // The lane's warp starts a product; all lanes of it call this together.
    void start_product(Warp& warp, const Product& product);
    // Products of all groups but the `pending` youngest are done.
    void finish_products(Warp& warp, size_t pending);
    Words load(const void* p, uint32_t words, const Site& site);
    void store(void* p, const Words& value, uint32_t words);
    // Adds to a word, of which every block sees the sum later than what this block stored before.
    void add(uint32_t* p, uint32_t addend);
    void copy_async(uint8_t* to, const uint8_t* from);
    void copy_commit() { current_->copies.emplace_back(); }
    void copy_wait(size_t pending);
    void barrier_init(const void* barrier, uint32_t count) { barriers_[barrier] = {count, count, 0, 0}; }
    void barrier_arrive(const void* barrier, uint32_t bytes, const Site& site);
    // An arrival once all copies that the lane has started have landed; no copy_wait covers them any more.
    void copy_arrive(const void* barrier, const Site& site);
    void copy_bulk(const BulkCopy& copy, const Site& site);
    // Whether the barrier's phase of this parity has ended.
    bool barrier_test(const void* barrier, uint32_t parity, const Site& site);
    // The same; the lane rests once if it has not.
    bool barrier_try_wait(const void* barrier, uint32_t parity, const Site& site);
    // A word of shared memory, which lanes may poll.
    uint32_t load_shared(const uint32_t* p, const Site& site);
    void store_shared(uint32_t* p, uint32_t value);
    // Other lanes may rely on the lane's landed copies once they meet it here.
    void release_copies() { current_->landed.clear(); }

  private:
    static void lane_main();
    void check_copies_landed();
    Words read(const void* p, uint32_t words) const;
    void choose_policy(int warps);
    void add_block(size_t shared_bytes, int threads);
    void start(Block& block, size_t shared_bytes);
    void make_ready(Lane& lane);
    void leave(int state);
    void enter(Lane& lane, Fiber& from);
    Lane* choose_lane();
    bool idle();
    void show_some_store();
    void show(const Sight& sight);
    void show_sight(size_t i);
    void show_own_stores();
    void wake(uint64_t line);
    CountingBarrier& counting(const void* barrier, const Site& site);
    void end_phase(CountingBarrier& state, const void* barrier, int block);
    void rest_in_vain(bool in_vain, const Site& site);
    BlockBarrier& come(int number, int& count, const Site& site);
    void end_meeting(BlockBarrier& barrier);
    size_t copies_under_way() const { return bulk_copies_.size() + late_arrivals_.size(); }
    void land(const BulkCopy& copy);
    void land_arrival(Lane& lane);
    void land_some_copy();
    std::string who_waits() const;

    Options options_{};
    Policy policy_;
    Random random_{0};
    void (*kernel_)() = nullptr;
    Fiber scheduler_;
    Lane* current_ = nullptr;
    std::string error_;
    uint64_t now_ns_ = 0;
    int lanes_left_ = 0;
    int idle_rounds_ = 0;  // since a lane last did anything but poll, alone or as one of a warp
    std::vector<std::unique_ptr<Block>> grid_;  // the largest so far; a run uses the first blocks of it
    std::deque<Lane*> ready_[2];                // the second one: starved lanes
    std::unordered_map<uintptr_t, PendingStores> pending_;
    std::vector<Sight> sights_;            // that are still to come
    uint64_t stores_ = 0;                  // of the run so far
    uint64_t before_lost_ = 0;             // still to come
    std::vector<uint64_t> youngest_seen_;  // store, by block
    uint64_t events_[NUM_EVENTS] = {};
    std::vector<BulkCopy> bulk_copies_;  // under way
    std::vector<Lane*> late_arrivals_;   // a lane stands here once for each of its own
    std::unordered_map<const void*, CountingBarrier> barriers_;
    std::unordered_map<uint64_t, std::vector<Lane*>> pollers_;  // by block and 16 bytes of memory
};

extern Machine machine;

template <class Combine>
void Machine::meet(uint32_t mask, const Site& site, Combine combine) {
    Lane& lane = *current_;
    const uint32_t bit = 1u << lane.index;
    if (!(mask & bit)) fail(site, "mask %08x leaves the calling lane out", mask);
    std::vector<Meeting>& meetings = lane.warp->meetings;
    size_t i = 0;
    while (i < meetings.size() && meetings[i].mask != mask) ++i;
    if (i == meetings.size()) meetings.push_back({mask, 0, site});
    if (!(meetings[i].site == site)) {
        fail(site, "lanes %08x of the same warp are in %s of line %d", meetings[i].arrived,
             meetings[i].site.op, meetings[i].site.line);
    }
    meetings[i].arrived |= bit;
    if (meetings[i].arrived != mask) {
        lane.site = site;
        lane.mask = mask;
        leave(Lane::WAITS);
        return;
    }
    meetings.erase(meetings.begin() + i);
    combine(*lane.warp);
    for (int other = 0; other < WARP_LANES; ++other) {
        if ((mask & ~bit) >> other & 1) make_ready(*lane.warp->lanes[other]);
    }
    yield(false);
}

}  // namespace sim
