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
    stores_ = 0;
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
    if (victim == 2) policy_.starved_warp = static_cast<int>(random_.below(static_cast<uint32_t>(warps)));
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
    block.arrived = 0;
    block.any = false;
    for (Warp& warp : block.warps) warp.meetings.clear();
    for (Lane& lane : block.lanes) {
        lane.starved =
            block.index == policy_.starved_block || lane.thread / WARP_LANES == policy_.starved_warp;
        lane.polled = 0;
        lane.polls = 0;
        lane.copies.assign(1, {});
        lane.landed.clear();
        lane.fiber.prepare(lane_main, lane.thread + block.index);
        make_ready(lane);
    }
}

void Machine::lane_main() {
    Fiber::entered(machine.scheduler_);
    machine.kernel_();
    --machine.lanes_left_;
    machine.idle_rounds_ = 0;
    machine.leave(Lane::DONE);
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

// Nothing can run: shows a store, or lets all polls be made once more, or ends the run. False at the end.
bool Machine::idle() {
    if (!sights_.empty()) {
        events_[STORE_HELD] += policy_.stores_last;
        show_some_store();
        return true;
    }
    if (pollers_.empty() || ++idle_rounds_ > (options_.give_up ? 10000 : 8)) {
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

bool Machine::barrier(bool value, const Site& site) {
    Lane& lane = *current_;
    Block& block = *lane.block;
    idle_rounds_ = 0;
    release_copies();
    if (block.arrived > 0 && !(block.site == site)) {
        fail(site, "%d threads of the block are in %s of line %d", block.arrived, block.site.op,
             block.site.line);
    }
    block.site = site;
    block.any |= value;
    if (++block.arrived < static_cast<int>(block.warps.size()) * WARP_LANES) {
        lane.site = site;
        lane.mask = 0;
        leave(Lane::WAITS);
        return block.result;
    }
    block.arrived = 0;
    block.result = block.any;
    block.any = false;
    for (Warp& warp : block.warps) {
        for (Lane* other : warp.lanes) {
            if (other != &lane) make_ready(*other);
        }
    }
    const bool result = block.result;
    yield(false);
    return result;
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
    const uintptr_t address = reinterpret_cast<uintptr_t>(p), packet = address / 16 * 16;
    if (lane.polled != packet) lane.polled_value = {};
    uint32_t* known = lane.polled_value.word + address % 16 / 4;  // a packet may be read in parts
    const bool same = lane.polled == packet && memcmp(known, value.word, 4 * words) == 0;
    lane.polls = same ? lane.polls + 1 : 0;
    if (lane.polls >= 2) {  // it polls: let it rest until a store to this address is visible
        lane.polls = 0;
        lane.site = site;
        lane.mask = 0;
        pollers_[line_of(p, lane.block->index)].push_back(&lane);
        leave(Lane::POLLS);
        value = read(p, words);
    }
    lane.polled = packet;
    memcpy(known, value.word, 4 * words);
    return value;
}

void Machine::store(void* p, const Words& value, uint32_t words) {
    if (p == options_.lost_packet) return;
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

void Machine::show_some_store() {
    const size_t i = random_.below(static_cast<uint32_t>(sights_.size()));
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
    for (Lane* lane : found->second) make_ready(*lane);
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

}  // namespace sim
