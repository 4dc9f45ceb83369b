// The fibres behind shim.h.
//
// A fibre starts through setcontext; after that it changes places by setjmp and longjmp, which make no system call.
#undef _FORTIFY_SOURCE  // its longjmp refuses to go to another stack
#include "wgmma.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include <setjmp.h>
#include <ucontext.h>

namespace sim {

Index thread_index, block_index, block_size, grid_size;
int lane;
unsigned char* shared;

namespace {

struct Copy {
    void* to;
    const void* from;
    size_t bytes;
    int group;
};

enum class State { ready, at_barrier, in_group, finished };

struct Fibre {
    ucontext_t beginning;
    bool started;
    jmp_buf position;
    std::vector<char> stack;
    Index index;
    int number;
    State state;
    const void* operation;  // of the warp or warpgroup that it takes part in, and what it brought
    void* brought;
    std::vector<Copy> copies;
    int groups;          // of copies that were committed
    bool has_fenced;     // shared memory, since the last barrier and the last copy
    bool is_fenced;      // its registers, for products that follow
};

// What a warpgroup has started.
struct Products {
    std::vector<Product> started;
    std::map<float*, std::vector<float>> sums;  // of a thread's accumulators
    int groups;                                 // that were committed
};

std::vector<Fibre> fibres;
std::vector<Products> products;
std::vector<unsigned char> visible;  // shared memory as products see it
size_t shared_size;
Fibre* current;
jmp_buf scheduler;
void (*kernel_body)(void*);
void* kernel_data;
std::string failure;

// Gives the processor back; returns when this fibre may go on.
void park(State state) {
    Fibre* self = current;
    self->state = state;
    if (_setjmp(self->position) == 0) _longjmp(scheduler, 1);
}

void resume(Fibre& fibre) {
    current = &fibre;
    thread_index = fibre.index;
    lane = fibre.number % 32;
    if (_setjmp(scheduler) != 0) return;
    if (fibre.started) _longjmp(fibre.position, 1);
    fibre.started = true;
    setcontext(&fibre.beginning);
}

void run_fibre() {
    kernel_body(kernel_data);
    check(current->copies.empty(), "a thread ended without waiting for its asynchronous copies");
    check(products[current->number / 128].started.empty(), "a thread ended without waiting for its products");
    for (;;) park(State::finished);
}

void start(Fibre& fibre, int number) {
    fibre.stack.resize(128 << 10);
    getcontext(&fibre.beginning);
    fibre.beginning.uc_stack.ss_sp = fibre.stack.data();
    fibre.beginning.uc_stack.ss_size = fibre.stack.size();
    fibre.beginning.uc_link = nullptr;
    makecontext(&fibre.beginning, run_fibre, 0);
    fibre.started = false;
    fibre.index = {number % block_size.x, number / block_size.x % block_size.y, number / block_size.x / block_size.y};
    fibre.number = number;
    fibre.state = State::ready;
    fibre.copies.clear();
    fibre.groups = 0;
    fibre.has_fenced = fibre.is_fenced = false;
}

// Runs the lanes of a warp until all wait or have ended; false if they did before.
bool run_warp(int warp, const std::vector<int>& lanes) {
    bool any = false;
    for (bool moved = true; moved;) {
        moved = false;
        for (int i : lanes) {
            Fibre& fibre = fibres[warp * 32 + i];
            if (fibre.state != State::ready) continue;
            resume(fibre);
            any = moved = true;
            if (!failure.empty()) return true;
        }
    }
    return any;
}

// One warpgroup after the other, and of it one warp after the other, goes from barrier to barrier, as far ahead of the
// others as it can get. `random` is null if threads shall take turns in their order.
void run_block(std::mt19937_64* random) {
    std::vector<int> lanes(32), warps(fibres.size() / 32);
    std::iota(lanes.begin(), lanes.end(), 0);
    std::iota(warps.begin(), warps.end(), 0);
    for (size_t i = 0; i < fibres.size(); i++) start(fibres[i], int(i));
    visible.assign(shared, shared + shared_size);
    for (;;) {
        if (random) {
            std::shuffle(lanes.begin(), lanes.end(), *random);
            std::shuffle(warps.begin(), warps.end(), *random);
        }
        for (int first : warps)
            for (bool moved = true; moved;) {
                moved = false;
                for (int warp : warps) {
                    if (warp / 4 == first / 4 && run_warp(warp, lanes)) moved = true;
                    if (!failure.empty()) return;
                }
            }
        if (std::any_of(fibres.begin(), fibres.end(), [](const Fibre& f) { return f.state == State::in_group; }))
            failure = "deadlock: not all lanes of a warp or warpgroup take part in an operation";
        const auto finished =
            std::count_if(fibres.begin(), fibres.end(), [](const Fibre& f) { return f.state == State::finished; });
        if (finished == long(fibres.size())) return;
        if (finished > 0) failure = "deadlock: " + std::to_string(finished) + " threads ended before a barrier";
        if (!failure.empty()) return;
        if (std::all_of(fibres.begin(), fibres.end(), [](const Fibre& f) { return f.has_fenced; }))
            visible.assign(shared, shared + shared_size);
        for (Fibre& f : fibres) {
            f.state = State::ready;
            f.has_fenced = false;
        }
    }
}

}  // namespace

void fail(const char* message) {
    failure = std::string(message) + " (block " + std::to_string(block_index.x) + " " + std::to_string(block_index.y) +
              ", thread " + std::to_string(thread_index.x) + " " + std::to_string(thread_index.y) + ")";
    for (;;) park(State::finished);
}

void barrier() { park(State::at_barrier); }

bool enter_group(int count, const void* operation, void* mine, void** lanes) {
    current->operation = operation;
    current->brought = mine;
    const size_t first = current->number / count * count;
    check(first + count <= fibres.size(), "a block has whole warpgroups where they take part in an operation");
    Fibre* group = &fibres[first];
    for (int i = 0; i < count; i++) {
        if (&group[i] == current || group[i].state == State::in_group) continue;
        park(State::in_group);
        return false;
    }
    for (int i = 0; i < count; i++) {
        check(group[i].operation == operation, "the lanes of a warp meet in different operations");
        lanes[i] = group[i].brought;
    }
    return true;
}

void leave_group(int count) {
    Fibre* group = &fibres[current->number / count * count];
    for (int i = 0; i < count; i++) group[i].state = State::ready;
}

void fence_registers() { current->is_fenced = true; }
void fence_shared() { current->has_fenced = true; }
void check_registers() { check(current->is_fenced, "a product without a fence for its registers"); }

void check_visible(unsigned address) {
    const unsigned char* byte = shared_byte(address);
    check(memcmp(byte, &visible[byte - shared], 2) == 0, "a product reads what no fence and barrier made visible to it");
}

void start_product(const Product& product) {
    Products& mine = products[current->number / 128];
    mine.started.push_back(product);
    mine.started.back().group = mine.groups;
    for (float* c : product.c) {
        if (!mine.sums.count(c)) mine.sums[c].assign(c, c + product.numbers);
        memset(c, 0xFF, sizeof(float) * product.numbers);
    }
}

void commit_products() { products[current->number / 128].groups++; }

// Until at most `pending` of the committed groups are still under way.
void wait_for_products(int pending) {
    Products& mine = products[current->number / 128];
    std::vector<Product> left;
    for (const Product& product : mine.started) {
        if (product.group >= mine.groups - pending) {
            left.push_back(product);
            continue;
        }
        float* sums[128];
        for (int i = 0; i < 128; i++) sums[i] = mine.sums.at(product.c[i]).data();
        product.run(product, sums);
    }
    mine.started = left;
    for (auto it = mine.sums.begin(); it != mine.sums.end();) {
        const bool busy = std::any_of(left.begin(), left.end(), [&](const Product& product) {
            return std::count(std::begin(product.c), std::end(product.c), it->first) > 0;
        });
        if (busy) {
            ++it;
            continue;
        }
        memcpy(it->first, it->second.data(), it->second.size() * sizeof(float));
        it = mine.sums.erase(it);
    }
    for (Fibre& f : fibres)
        if (f.number / 128 == current->number / 128) f.is_fenced = false;
}

const unsigned char* shared_byte(unsigned address) {
    check(address >= first_shared_address && address < first_shared_address + shared_size,
          "an operand outside the shared memory");
    return shared + (address - first_shared_address);
}

void copy_async(void* to, const void* from, size_t bytes) {
    const auto offset = static_cast<unsigned char*>(to) - shared;
    check(offset >= 0 && offset + bytes <= shared_size, "a copy beyond the shared memory");
    memset(to, 0xFF, bytes);  // whoever still reads what was here, or already what will be, gets NaN
    current->copies.push_back({to, from, bytes, current->groups});
}

void commit_copies() { current->groups++; }

// Until at most `pending` of the committed groups are still under way.
void wait_for_copies(int pending) {
    std::vector<Copy> left;
    for (const Copy& copy : current->copies) {
        if (copy.group >= current->groups - pending)
            left.push_back(copy);
        else if (copy.from)
            memcpy(copy.to, copy.from, copy.bytes);
        else
            memset(copy.to, 0, copy.bytes);
    }
    if (left.size() < current->copies.size()) current->has_fenced = false;
    current->copies = left;
}

const char* run_blocks(const unsigned* grid, const unsigned* block, size_t shared_bytes, uint64_t seed,
                       void (*body)(void*), void* data) {
    failure.clear();
    grid_size = {grid[0], grid[1], grid[2]};
    block_size = {block[0], block[1], block[2]};
    const size_t threads = size_t(block[0]) * block[1] * block[2];
    if (threads == 0 || threads % 32 || threads > 1024) return "a block must have 32 ... 1024 threads, in whole warps";
    fibres.resize(threads);
    products.assign((threads + 127) / 128, {});
    kernel_body = body;
    kernel_data = data;
    std::mt19937_64 random(seed);
    std::vector<unsigned char> memory(shared_bytes + 2048);
    shared = memory.data() + (1024 - reinterpret_cast<uintptr_t>(memory.data()) % 1024);
    shared_size = shared_bytes;
    for (unsigned z = 0; z < grid[2]; z++)
        for (unsigned y = 0; y < grid[1]; y++)
            for (unsigned x = 0; x < grid[0]; x++) {
                block_index = {x, y, z};
                memset(memory.data(), 0xFF, memory.size());  // NaN in every floating type
                run_block(seed ? &random : nullptr);
                auto untouched = [](unsigned char byte) { return byte == 0xFF; };
                if (!std::all_of(memory.data(), shared, untouched) ||
                    !std::all_of(shared + shared_bytes, memory.data() + memory.size(), untouched))
                    failure = "a write beyond the shared memory";
                if (!failure.empty()) return failure.c_str();
            }
    return "";
}

}  // namespace sim
