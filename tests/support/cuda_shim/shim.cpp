// The fibres behind shim.h.
//
// A fibre starts through setcontext; after that it changes places by setjmp and longjmp, which make no system call.
#undef _FORTIFY_SOURCE  // its longjmp refuses to go to another stack
#include "shim.h"

#include <algorithm>
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

enum class State { ready, at_barrier, in_warp, finished };

struct Fibre {
    ucontext_t beginning;
    bool started;
    jmp_buf position;
    std::vector<char> stack;
    Index index;
    int number;
    State state;
    const void* operation;  // of the warp that it takes part in, and what it brought
    void* brought;
    std::vector<Copy> copies;
    int groups;  // of copies that were committed
};

std::vector<Fibre> fibres;
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
}

// Runs the lanes of a warp until all wait at a barrier or have ended; false if some wait for the others.
bool run_warp(int warp, const std::vector<int>& lanes) {
    for (bool moved = true; moved;) {
        moved = false;
        for (int i : lanes) {
            Fibre& fibre = fibres[warp * 32 + i];
            if (fibre.state != State::ready) continue;
            resume(fibre);
            moved = true;
            if (!failure.empty()) return true;
        }
    }
    return std::none_of(&fibres[warp * 32], &fibres[warp * 32] + 32,
                        [](const Fibre& f) { return f.state == State::in_warp; });
}

// One warp after the other goes from barrier to barrier, as far ahead of the others as it can get. `random` is null
// if threads shall take turns in their order.
void run_block(std::mt19937_64* random) {
    std::vector<int> lanes(32), warps(fibres.size() / 32);
    std::iota(lanes.begin(), lanes.end(), 0);
    std::iota(warps.begin(), warps.end(), 0);
    for (size_t i = 0; i < fibres.size(); i++) start(fibres[i], int(i));
    for (;;) {
        if (random) {
            std::shuffle(lanes.begin(), lanes.end(), *random);
            std::shuffle(warps.begin(), warps.end(), *random);
        }
        for (int warp : warps) {
            if (!run_warp(warp, lanes)) failure = "deadlock: not all lanes of a warp take part in an operation";
            if (!failure.empty()) return;
        }
        const auto finished =
            std::count_if(fibres.begin(), fibres.end(), [](const Fibre& f) { return f.state == State::finished; });
        if (finished == long(fibres.size())) return;
        if (finished > 0) failure = "deadlock: " + std::to_string(finished) + " threads ended before a barrier";
        if (!failure.empty()) return;
        for (Fibre& f : fibres) f.state = State::ready;
    }
}

}  // namespace

void fail(const char* message) {
    failure = std::string(message) + " (block " + std::to_string(block_index.x) + " " + std::to_string(block_index.y) +
              ", thread " + std::to_string(thread_index.x) + " " + std::to_string(thread_index.y) + ")";
    for (;;) park(State::finished);
}

void barrier() { park(State::at_barrier); }

bool enter_warp(const void* operation, void* mine, void** lanes) {
    current->operation = operation;
    current->brought = mine;
    Fibre* warp = &fibres[current->number / 32 * 32];
    for (int i = 0; i < 32; i++) {
        if (&warp[i] == current || warp[i].state == State::in_warp) continue;
        park(State::in_warp);
        return false;
    }
    for (int i = 0; i < 32; i++) {
        check(warp[i].operation == operation, "the lanes of a warp meet in different operations");
        lanes[i] = warp[i].brought;
    }
    return true;
}

void leave_warp() {
    Fibre* warp = &fibres[current->number / 32 * 32];
    for (int i = 0; i < 32; i++) warp[i].state = State::ready;
}

void copy_async(void* to, const void* from, size_t bytes) {
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
    kernel_body = body;
    kernel_data = data;
    std::mt19937_64 random(seed);
    std::vector<unsigned char> memory(shared_bytes + 256);
    shared = memory.data() + (128 - reinterpret_cast<uintptr_t>(memory.data()) % 128);
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
