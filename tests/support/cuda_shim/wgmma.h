// What stands for Hopper's products of warpgroups (warpgroup.cuh): fragments and descriptors as PTX ISA has them under
// "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions".
//
// A product runs when its warpgroup waits for it, no sooner: until then its accumulators are NaN, what is written to
// them is lost, and what it reads, registers as well as shared memory, must stay. It sees what was in shared memory at the
// last barrier before which all threads had fenced: to start with other numbers there is a mistake, and so is a missing
// fence before the first product.
#pragma once
#include "shim.h"

namespace sim {

// A product of a warpgroup's 128 threads that has been started, as `run` finds it: sums[i] is for c[i].
struct Product {
    float* c[128];
    const unsigned* a[128];
    uint64_t b;
    bool add;
    int numbers;  // of a thread's c
    void (*run)(const Product&, float* const (&sums)[128]);
    int group;
};

void start_product(const Product& product);
void commit_products();
void wait_for_products(int pending);
void fence_registers();  // by this thread
void fence_shared();
void check_registers();
void check_visible(unsigned address);  // of a number
const unsigned char* shared_byte(unsigned address);

// The address of number (k, column) of the right operand, which the descriptor b tells of.
inline unsigned operand_address(uint64_t b, bool by_rows, int k, int column) {
    const unsigned start = (b & 0x3fff) << 4, leading = (b >> 16 & 0x3fff) << 4, stride = (b >> 32 & 0x3fff) << 4;
    check(b >> 62 == 1 && (b >> 46 & 0xffff) == 0, "only 128-byte swizzles from whole atoms on are simulated");
    check(start % 1024 < 128, "an operand begins within an atom of eight rows");
    const unsigned offset = by_rows ? column % 64 * 2 + column / 64 * leading + k % 8 * 128 + k / 8 * stride
                                    : column % 8 * 128 + column / 8 * stride + k * 2;
    const unsigned linear = start + offset;
    return linear ^ (linear >> 3 & 0x70);  // bits 4 to 6 with bits 7 to 9
}

template <class T, int n, bool by_rows>
void run_product(const Product& product, float* const (&sums)[128]) {
    static float A[64][16], B[16][n];
    for (int i = 0; i < 128; i++)
        for (int k = 0; k < 8; k++)
            A[i / 32 * 16 + i % 32 / 4 + k / 2 % 2 * 8][i % 4 * 2 + k % 2 + k / 4 * 8] =
                half_of(product.a[i][k / 2], k % 2, T{});
    for (int k = 0; k < 16; k++)
        for (int column = 0; column < n; column++) {
            uint16_t bits;
            memcpy(&bits, shared_byte(operand_address(product.b, by_rows, k, column)), 2);
            B[k][column] = half_of(bits, 0, T{});
        }
    for (int i = 0; i < 128; i++)
        for (int e = 0; e < n / 2; e++) {
            const int row = i / 32 * 16 + i % 32 / 4 + e / 2 % 2 * 8, column = e / 4 * 8 + i % 4 * 2 + e % 2;
            float sum = product.add ? sums[i][e] : 0.0f;
            for (int k = 0; k < 16; k++) sum += A[row][k] * B[k][column];
            sums[i][e] = sum;
        }
}

}  // namespace sim

inline void pin(float& x) { asm volatile("" : "+m"(x)); }
inline void pin(unsigned& x) { asm volatile("" : "+m"(x)); }

inline void wgmma_fence() { sim::fence_registers(); }
inline void fence_for_wgmma() { sim::fence_shared(); }

inline void wgmma_commit() {
    int nothing;
    sim::warpgroup_operation(&nothing, [](int**) { sim::commit_products(); });
}

template <int pending>
void wgmma_wait() {
    int nothing;
    sim::warpgroup_operation(&nothing, [](int**) { sim::wait_for_products(pending); });
}

template <class T, int n, bool by_rows>
struct Wgmma {
    static_assert(n % 8 == 0 && n <= 256, "no such instruction");

    static void run(float* c, const unsigned* a, unsigned long long b, int add) {
        struct Lane {
            float* c;
            const unsigned* a;
            unsigned long long b;
            int add;
        };
        Lane lane = {c, a, b, add};
        sim::check_registers();
        sim::warpgroup_operation(&lane, [](Lane** lanes) {
            sim::Product product = {{}, {}, lanes[0]->b, lanes[0]->add != 0, n / 2, sim::run_product<T, n, by_rows>, 0};
            for (int i = 0; i < 128; i++) {
                sim::check(lanes[i]->b == product.b && (lanes[i]->add != 0) == product.add,
                           "the lanes of a warpgroup differ in a product's operand");
                product.c[i] = lanes[i]->c;
                product.a[i] = lanes[i]->a;
            }
            for (int k = 0; k < 16; k++)
                for (int column = 0; column < n; column++)
                    sim::check_visible(sim::operand_address(product.b, by_rows, k, column));
            sim::start_product(product);
        });
    }
};
