#include "machine.hpp"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>

uint8_t (*sim_shared_memory)[];

namespace sim {

Machine machine;

namespace {

std::string describe(const Site& site) {
    const char* name = strrchr(site.file, '/');
    return std::string(site.op) + " at " + (name ? name + 1 : site.file) + ":" + std::to_string(site.line);
}

// All of a block's shared memory that lanes look at without waiting for it.
uint64_t shared_of(int block) {
    return 1ull << 63 | static_cast<uint64_t>(block);
}

// A block and the 16 bytes round an address that its lanes may poll.
uint64_t line_of(const void* p, int block) {
    return (reinterpret_cast<uintptr_t>(p) / 16) << 8 | static_cast<uint64_t>(block);
}

}  // namespace

// ---- one run ----

void Machine::run(const Options& options, size_t shared_bytes, int threads, void (*kernel)()) {
    options_ = options;
    kernel_ = kernel;
    random_ = Random(options.seed);
    error_.clear();
    idle_rounds_ = 0;
    for (auto& list : ready_) list.clear();
    pending_.clear();
    sights_.clear();
    pollers_.clear();
    bulk_copies_.clear();
    late_arrivals_.clear();
    barriers_.clear();
    stores_ = 0;
    before_lost_ = options.before_lost;
    youngest_seen_.assign(options.blocks, 0);
    std::fill_n(events_, NUM_EVENTS, 0);
    choose_policy(threads / WARP_LANES);
    while (grid_.size() < options.blocks) add_block(shared_bytes, threads);
    for (uint32_t i = 0; i < options.blocks; ++i) start(*grid_[i], shared_bytes);
    lanes_left_ = static_cast<int>(options.blocks) * threads;
    while (lanes_left_ > 0 && error_.empty()) {
        if (Lane* lane = choose_lane()) {
            enter(*lane, scheduler_);
        } else if (!idle()) {
            break;
        }
    }
    while (!sights_.empty()) show_some_store();  // the end of a launch shows everything
    current_ = nullptr;
}

void Machine::choose_policy(int warps) {
    policy_ = Policy();
    if (options_.seed == 0) return;
    const uint32_t delays[] = {1, 4, 64};
    const uint64_t seed = options_.seed;
    policy_.order = static_cast<Policy::Order>(seed % 3);
    const uint64_t victim = seed / 3 % 3;
    if (victim == 1) policy_.starved_block = static_cast<int>(random_.below(options_.blocks));
    if (victim == 2) {
        policy_.starved_warp = static_cast<int>(random_.below(static_cast<uint32_t>(warps)));
        if (random_.below(2) == 1) policy_.of_block = static_cast<int>(random_.below(options_.blocks));
    }
    policy_.yield = random_.below(3) * 64;
    policy_.stores_last = seed / 9 % 3 == 0;
    policy_.store_delay = delays[random_.below(3)];
    policy_.copies_late = static_cast<uint32_t>(seed / 27 % 3) * 128;
}

void Machine::add_block(size_t shared_bytes, int threads) {
    grid_.push_back(std::make_unique<Block>(static_cast<int>(grid_.size()), shared_bytes, threads));
    Block& block = *grid_.back();
    for (int thread = 0; thread < threads; ++thread) {
        Lane& lane = block.lanes[thread];
        lane.block = &block;
        lane.warp = &block.warps[thread / WARP_LANES];
        lane.thread = thread;
        lane.index = thread % WARP_LANES;
        lane.warp->lanes[lane.index] = &lane;
    }
}

void Machine::start(Block& block, size_t shared_bytes) {
    memset(block.shared.data, 0xff, shared_bytes);  // NaN as a float and as two bf16
    for (BlockBarrier& barrier : block.barriers) barrier = {};
    block.lanes_left = static_cast<int>(block.lanes.size());
    for (Warp& warp : block.warps) {
        warp.meetings.clear();
        warp.products.assign(1, {});
    }
    for (Lane& lane : block.lanes) {
        const bool may_starve = policy_.of_block < 0 || policy_.of_block == block.index;
        lane.starved = block.index == policy_.starved_block ||
                       (may_starve && lane.thread / WARP_LANES == policy_.starved_warp);
        lane.polled = 0;
        lane.found.clear();
        lane.polls = lane.looks = 0;
        lane.copies.assign(1, {});
        lane.landed.clear();
        lane.arrivals.clear();
        lane.specialised = lane.fenced = false;
        std::fill_n(lane.came, NUM_BARRIERS, 0);
        lane.fiber.prepare(lane_main, lane.thread + block.index);
        make_ready(lane);
    }
}

void Machine::lane_main() {
    Fiber::entered(machine.scheduler_);
    machine.kernel_();
    machine.check_copies_landed();
    --machine.lanes_left_;
    machine.idle_rounds_ = 0;
    machine.leave(Lane::DONE);
}

// No copy may be under way when its lane, or the block that it writes to, has left the kernel.
void Machine::check_copies_landed() {
    Lane& lane = *current_;
    size_t under_way = lane.arrivals.size();
    for (const auto& group : lane.copies) under_way += group.size();
    if (--lane.block->lanes_left == 0) {
        for (const BulkCopy& copy : bulk_copies_) under_way += copy.block == lane.block->index;
    }
    if (under_way > 0) fail({"return", __FILE__, __LINE__}, "%zu copies are under way", under_way);
}

// ---- who runs ----

void Machine::make_ready(Lane& lane) {
    lane.state = Lane::READY;
    ready_[lane.starved].push_back(&lane);
}

// The lane that goes on next; null if none can. Each choice is a tick of the machine's clock.
Lane* Machine::choose_lane() {
    ++now_ns_;
    if (!policy_.stores_last && !sights_.empty() && random_.below(policy_.store_delay) == 0) {
        show_some_store();
    }
    if (copies_under_way() > 0 && policy_.copies_late < 256 && random_.below(16) == 0) land_some_copy();
    std::deque<Lane*>& list = ready_[0].empty() ? ready_[1] : ready_[0];
    if (list.empty()) return nullptr;
    if (policy_.order == Policy::ANY_ORDER) {
        std::swap(list.back(), list[random_.below(static_cast<uint32_t>(list.size()))]);
    }
    const bool in_turn = policy_.order == Policy::IN_TURN;
    Lane* lane = in_turn ? list.front() : list.back();
    in_turn ? list.pop_front() : list.pop_back();
    if (lane->starved) ++events_[policy_.starved_block >= 0 ? STARVED_BLOCK_RAN : STARVED_WARP_RAN];
    return lane;
}

void Machine::enter(Lane& lane, Fiber& from) {
    current_ = &lane;
    lane.state = Lane::RUNS;
    sim_shared_memory = reinterpret_cast<uint8_t (*)[]>(lane.block->shared.data);
    lane.fiber.resume(from);
}

// The running lane stops here until it is made ready and chosen.
void Machine::leave(int state) {
    Lane& lane = *current_;
    for (const Copy& copy : lane.landed) memset(copy.to, 0xff, 16);  // others do not see them yet
    lane.state = static_cast<decltype(lane.state)>(state);
    Lane* next = lanes_left_ > 0 && error_.empty() ? choose_lane() : nullptr;
    if (next == &lane) {
        lane.state = Lane::RUNS;
    } else if (next != nullptr) {
        enter(*next, lane.fiber);
    } else {
        scheduler_.resume(lane.fiber);
    }
    for (const Copy& copy : lane.landed) memcpy(copy.to, copy.from, 16);
}

void Machine::yield(bool always) {
    if (!always && (policy_.yield == 0 || !random_.chance(policy_.yield))) return;
    Lane& lane = *current_;
    make_ready(lane);
    if (policy_.order == Policy::NEWEST_FIRST) {  // else it would be the next again
        std::deque<Lane*>& list = ready_[lane.starved];
        list.pop_back();
        list.push_front(&lane);
    }
    leave(Lane::READY);
}

void Machine::fail(const Site& site, const char* format, ...) {
    char text[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    error_ = describe(site) + ": block " + std::to_string(current_->block->index) + " thread " +
             std::to_string(current_->thread) + ": " + text;
    for (;;) leave(Lane::WAITS);
}

// Nothing can run: lands a copy or shows a store, or lets all polls be made once more, or ends the run. False
// at the end.
bool Machine::idle() {
    if (copies_under_way() > 0 && (sights_.empty() || random_.chance(128))) {
        land_some_copy();
        return true;
    }
    if (!sights_.empty()) {
        events_[STORE_HELD] += policy_.stores_last;
        show_some_store();
        return true;
    }
    // A fetching lane looks whether its block leaves in every 64th poll, and makes four in a round.
    if (pollers_.empty() || ++idle_rounds_ > (options_.give_up ? 10000 : 32)) {
        error_ = "deadlock: " + who_waits();
        return false;
    }
    if (options_.give_up) now_ns_ += 1000000;
    while (!pollers_.empty()) wake(pollers_.begin()->first);
    return true;
}

// One line: how many lanes of which block wait where, and for whom or, the first of them, for what address.
std::string Machine::who_waits() const {
    std::string text;
    for (uint32_t i = 0; i < options_.blocks; ++i) {
        std::map<std::string, std::pair<int, const Lane*>> groups;
        for (const Lane& lane : grid_[i]->lanes) {
            const bool done = lane.state == Lane::DONE;
            auto& [count, first] = groups[done ? "have left the kernel" : "wait in " + describe(lane.site)];
            if (count++ == 0) first = &lane;
        }
        text += "block " + std::to_string(i) + ":";
        for (const auto& [what, group] : groups) {
            const auto& [count, first] = group;
            char target[64] = "";
            if (first->state == Lane::POLLS) {
                snprintf(target, sizeof target, " for %p", reinterpret_cast<const void*>(first->polled));
            }
            if (first->state == Lane::WAITS && first->mask != 0) {
                snprintf(target, sizeof target, " for lanes %08x", first->mask);
            }
            text += " " + std::to_string(count) + " threads " + what + target + ";";
        }
        text += " ";
    }
    return text;
}

// ---- barriers ----

// The lane comes to a barrier of its block.
BlockBarrier& Machine::come(int number, int& count, const Site& site) {
    Lane& lane = *current_;
    BlockBarrier& barrier = lane.block->barriers[number];
    if (count == 0) count = static_cast<int>(lane.block->lanes.size());
    idle_rounds_ = 0;
    release_copies();
    if (lane.thread >= count) fail(site, "only the first %d threads meet here", count);
    if (barrier.came > 0 && barrier.count != count) {
        fail(site, "others of the block are in a meeting of %d threads", barrier.count);
    }
    if (lane.came[number] == barrier.meeting) fail(site, "the thread has come to this meeting before");
    lane.came[number] = barrier.meeting;
    barrier.count = count;
    ++barrier.came;
    return barrier;
}

void Machine::end_meeting(BlockBarrier& barrier) {
    barrier.result = barrier.any;
    barrier.any = false;
    barrier.came = 0;
    ++barrier.meeting;
    for (Site& where : barrier.sites) where = {};
    for (Lane* other : barrier.waiting) make_ready(*other);
    barrier.waiting.clear();
}

bool Machine::barrier(int number, int count, bool value, const Site& site) {
    Lane& lane = *current_;
    // Nobody waits for them any more where the block does something else.
    if (number < FIRST_TURN && lane.warp->multiplies()) fail(site, "products are under way");
    BlockBarrier& barrier = come(number, count, site);
    // Warps that do something else are in a line of their own.
    Site& where = barrier.sites[lane.specialised];
    if (where.op != nullptr && !(where == site)) {
        fail(site, "%zu threads of the block are in %s of line %d", barrier.waiting.size(), where.op,
             where.line);
    }
    where = site;
    barrier.any |= value;
    if (barrier.came < count) {
        barrier.waiting.push_back(&lane);
        lane.site = site;
        lane.mask = 0;
        leave(Lane::WAITS);
        return barrier.result;
    }
    end_meeting(barrier);
    const bool result = barrier.result;
    yield(false);
    return result;
}

void Machine::barrier_pass(int number, int count, const Site& site) {
    BlockBarrier& barrier = come(number, count, site);
    if (barrier.came == count) end_meeting(barrier);
    yield(false);
}

// ---- products of a warp ----

void Machine::start_product(Warp& warp, const Product& product) {
    if (warp.multiplies() || random_.chance(policy_.copies_late)) {
        warp.products.back().push_back(product);  // they are made one after the other
    } else {
        product.multiply(product);
    }
}

void Machine::finish_products(Warp& warp, size_t pending) {
    while (warp.products.size() > pending + 1) {
        for (const Product& product : warp.products.front()) product.multiply(product);
        warp.products.pop_front();
    }
}

// ---- relaxed loads and stores ----

Words Machine::read(const void* p, uint32_t words) const {
    Words value{};
    memcpy(value.word, p, 4 * words);
    const auto found = pending_.find(reinterpret_cast<uintptr_t>(p));
    if (found == pending_.end()) return value;
    const PendingStores& pending = found->second;
    const uint32_t seen = pending.seen[current_->block->index];
    for (size_t i = 0; i < pending.stores.size(); ++i) {
        const PendingStore& store = pending.stores[i];
        const bool visible = i < seen || store.lane == current_;  // a lane sees its own stores
        if (visible) memcpy(value.word, store.value.word, 4 * std::min(words, store.words));
    }
    return value;
}

Words Machine::load(const void* p, uint32_t words, const Site& site) {
    yield(false);
    Lane& lane = *current_;
    Words value = read(p, words);
    const uintptr_t address = reinterpret_cast<uintptr_t>(p);
    lane.polled = address / 16 * 16;
    if (lane.found.size() > 64) lane.found.clear();
    const bool looked = lane.found.count(lane.polled) > 0;
    uint32_t* known = lane.found[lane.polled].word + address % 16 / 4;  // a packet may be read in parts
    const bool same = looked && memcmp(known, value.word, 4 * words) == 0;
    lane.polls = same ? lane.polls + 1 : 0;
    if (lane.polls >
        2 * static_cast<int>(lane.found.size())) {  // it polls: let it rest until a store there is visible
        lane.site = site;
        lane.mask = 0;
        for (const auto& [packet, _] : lane.found) {
            pollers_[line_of(reinterpret_cast<const void*>(packet), lane.block->index)].push_back(&lane);
        }
        leave(Lane::POLLS);
        value = read(p, words);
        lane.polls = 0;
        lane.found.clear();
        known = lane.found[lane.polled].word + address % 16 / 4;
    }
    memcpy(known, value.word, 4 * words);
    return value;
}

void Machine::store(void* p, const Words& value, uint32_t words) {
    if (p == options_.lost) {
        if (before_lost_ == 0) return;
        --before_lost_;
    }
    *static_cast<volatile uint8_t*>(p);  // a fault is the storing lane's, not that of who shows the store
    idle_rounds_ = 0;
    const size_t offset = static_cast<uint8_t*>(p) - options_.kept;
    if (options_.kept != nullptr && offset < options_.kept_bytes) {
        memcpy(options_.sent + offset, value.word, 4 * words);
        return;
    }
    const uintptr_t address = reinterpret_cast<uintptr_t>(p);
    PendingStores& pending = pending_[address];
    pending.stores.push_back({value, words, current_});
    pending.seen.resize(options_.blocks);
    ++stores_;
    for (uint32_t block = 0; block < options_.blocks; ++block) {
        if (policy_.store_delay == 0) {
            show({address, block, stores_});
        } else {
            sights_.push_back({address, block, stores_});
        }
    }
}

void Machine::add(uint32_t* p, uint32_t addend) {
    yield(false);
    show_own_stores();
    const auto found = pending_.find(reinterpret_cast<uintptr_t>(p));
    const uint32_t newest = found == pending_.end() ? *p : found->second.stores.back().value.word[0];
    store(p, {{newest + addend}}, 1);
}

void Machine::show_some_store() {
    show_sight(random_.below(static_cast<uint32_t>(sights_.size())));
}

// All blocks see what the running lane's block has stored so far.
void Machine::show_own_stores() {
    for (size_t i = 0; i < sights_.size();) {
        const PendingStores& pending = pending_.at(sights_[i].address);
        const auto unseen = pending.stores.begin() + pending.seen[sights_[i].block];
        const bool own = std::any_of(unseen, pending.stores.end(), [this](const PendingStore& store) {
            return store.lane->block == current_->block;
        });
        own ? show_sight(i) : void(++i);  // another takes its place
    }
}

void Machine::show_sight(size_t i) {
    const Sight sight = sights_[i];
    sights_[i] = sights_.back();
    sights_.pop_back();
    show(sight);
}

// The block sees the next of the stores to the address: those to one address keep their order.
void Machine::show(const Sight& sight) {
    const auto found = pending_.find(sight.address);
    PendingStores& pending = found->second;
    ++pending.seen[sight.block];
    uint64_t& youngest = youngest_seen_[sight.block];
    if (sight.age < youngest) ++events_[STORE_OVERTAKEN];
    youngest = std::max(youngest, sight.age);
    if (*std::min_element(pending.seen.begin(), pending.seen.end()) > 0) {
        const PendingStore& store = pending.stores.front();
        memcpy(reinterpret_cast<void*>(sight.address), store.value.word, 4 * store.words);
        for (uint32_t& seen : pending.seen) --seen;
        pending.stores.pop_front();
        // Others may have waited for all of a packet that was stored in parts.
        for (uint32_t block = 0; block < options_.blocks; ++block)
            wake(line_of(reinterpret_cast<void*>(sight.address), block));
        if (pending.stores.empty()) pending_.erase(found);
    }
    wake(line_of(reinterpret_cast<void*>(sight.address), sight.block));
}

void Machine::wake(uint64_t line) {
    const auto found = pollers_.find(line);
    if (found == pollers_.end()) return;
    for (Lane* lane : found->second) {
        if (lane->state == Lane::POLLS) make_ready(*lane);  // it may have been woken from elsewhere
    }
    pollers_.erase(found);
}

// ---- asynchronous copies ----

void Machine::copy_async(uint8_t* to, const uint8_t* from) {
    if (random_.chance(policy_.copies_late)) {
        memset(to, 0xff, 16);  // neither the old bytes nor the new ones may be relied on until the wait
        current_->copies.back().push_back({to, from});
    } else {
        memcpy(to, from, 16);
        ++events_[COPY_LANDED_AT_ONCE];
    }
}

void Machine::copy_wait(size_t pending) {
    auto& groups = current_->copies;
    while (groups.size() > pending + 1) {
        for (const Copy& copy : groups.front()) {
            memcpy(copy.to, copy.from, 16);
            current_->landed.push_back(copy);
        }
        events_[COPY_LANDED_LATE] += groups.front().size();
        groups.pop_front();
    }
    yield(false);
}

// ---- copies that barriers in shared memory count ----

CountingBarrier& Machine::counting(const void* barrier, const Site& site) {
    const auto found = barriers_.find(barrier);
    if (found == barriers_.end()) fail(site, "the barrier at %p was never initialised", barrier);
    return found->second;
}

void Machine::end_phase(CountingBarrier& state, const void* barrier, int block) {
    if (state.left > 0 || state.missing_bytes != 0) return;
    state.left = state.count;
    state.parity ^= 1;
    wake(line_of(barrier, block));
    wake(shared_of(block));
}

void Machine::barrier_arrive(const void* barrier, uint32_t bytes, const Site& site) {
    CountingBarrier& state = counting(barrier, site);
    if (state.left == 0) fail(site, "more arrivals than the barrier counts");
    idle_rounds_ = 0;
    --state.left;
    state.missing_bytes += bytes;
    end_phase(state, barrier, current_->block->index);
}

void Machine::copy_arrive(const void* barrier, const Site& site) {
    counting(barrier, site);
    Lane& lane = *current_;
    lane.arrivals.push_back({{}, barrier});
    for (auto& group : lane.copies) {
        auto& copies = lane.arrivals.back().copies;
        copies.insert(copies.end(), group.begin(), group.end());
        group.clear();
    }
    if (lane.arrivals.size() > 1 || random_.chance(policy_.copies_late)) {
        late_arrivals_.push_back(&lane);  // those of a lane keep their order
    } else {
        land_arrival(lane);
        ++events_[COPY_LANDED_AT_ONCE];
    }
    yield(false);
}

void Machine::land_arrival(Lane& lane) {
    idle_rounds_ = 0;
    const CopyArrival arrival = std::move(lane.arrivals.front());
    lane.arrivals.pop_front();
    for (const Copy& copy : arrival.copies) memcpy(copy.to, copy.from, 16);
    CountingBarrier& state = barriers_[arrival.barrier];
    if (state.left == 0) {
        error_ = "copy_async_arrive: block " + std::to_string(lane.block->index) + " thread " +
                 std::to_string(lane.thread) + ": more arrivals than the barrier counts";
        return;
    }
    --state.left;
    end_phase(state, arrival.barrier, lane.block->index);
}

void Machine::copy_bulk(const BulkCopy& copy, const Site& site) {
    const uintptr_t places = reinterpret_cast<uintptr_t>(copy.to) | reinterpret_cast<uintptr_t>(copy.from);
    if (copy.bytes == 0 || (places | copy.bytes) % 16 != 0) {
        fail(site, "%u bytes from %p to %p: multiples of 16 expected", copy.bytes,
             static_cast<const void*>(copy.from), static_cast<const void*>(copy.to));
    }
    counting(copy.barrier, site);
    // A fault is the copying lane's, not that of who lands the copy.
    static_cast<volatile uint8_t*>(copy.to)[copy.bytes - 1];
    static_cast<const volatile uint8_t*>(copy.from)[copy.bytes - 1];
    if (random_.chance(policy_.copies_late)) {
        memset(copy.to, 0xff, copy.bytes);
        bulk_copies_.push_back(copy);
    } else {
        land(copy);
        ++events_[COPY_LANDED_AT_ONCE];
    }
    yield(false);
}

void Machine::land(const BulkCopy& copy) {
    idle_rounds_ = 0;
    memcpy(copy.to, copy.from, copy.bytes);
    CountingBarrier& state = barriers_[copy.barrier];
    state.missing_bytes -= copy.bytes;
    end_phase(state, copy.barrier, copy.block);
}

void Machine::land_some_copy() {
    size_t i = random_.below(static_cast<uint32_t>(copies_under_way()));
    ++events_[COPY_LANDED_LATE];
    if (i < bulk_copies_.size()) {
        std::swap(bulk_copies_[i], bulk_copies_.back());
        const BulkCopy copy = bulk_copies_.back();
        bulk_copies_.pop_back();
        land(copy);
    } else {
        i -= bulk_copies_.size();
        std::swap(late_arrivals_[i], late_arrivals_.back());
        Lane& lane = *late_arrivals_.back();
        late_arrivals_.pop_back();
        land_arrival(lane);
    }
}

// A lane that keeps looking at shared memory in vain rests until something there has changed.
void Machine::rest_in_vain(bool in_vain, const Site& site) {
    Lane& lane = *current_;
    lane.looks = in_vain ? lane.looks + 1 : 0;
    if (lane.looks < 4) return yield(in_vain);
    lane.looks = 0;
    lane.site = site;
    lane.mask = 0;
    lane.polled = 0;
    pollers_[shared_of(lane.block->index)].push_back(&lane);
    leave(Lane::POLLS);
}

bool Machine::barrier_test(const void* barrier, uint32_t parity, const Site& site) {
    const bool ended = counting(barrier, site).parity != parity;
    rest_in_vain(!ended, site);
    return ended;
}

uint32_t Machine::load_shared(const uint32_t* p, const Site& site) {
    rest_in_vain(true, site);
    return *p;
}

void Machine::store_shared(uint32_t* p, uint32_t value) {
    *p = value;
    idle_rounds_ = 0;
    wake(shared_of(current_->block->index));
}

bool Machine::barrier_try_wait(const void* barrier, uint32_t parity, const Site& site) {
    yield(false);
    if (counting(barrier, site).parity != parity) return true;
    Lane& lane = *current_;
    lane.site = site;
    lane.mask = 0;
    lane.polled = reinterpret_cast<uintptr_t>(barrier);
    lane.polls = 0;
    pollers_[line_of(barrier, lane.block->index)].push_back(&lane);
    leave(Lane::POLLS);
    return counting(barrier, site).parity != parity;
}

}  // namespace sim
