// Products of a warpgroup (four warps, 128 threads) on Hopper's tensor cores: wgmma, which only sm_90a has.
//
// c (64 x n) += a (64 x 16) b (16 x n), n a multiple of 8 up to 64 (hardware has up to 256). Warp w of the four holds rows
// 16 w ... 16 w + 15 of c and a, each 8 columns of c and each 16 of a as in mma.sync's m16n8k16 (attention.cuh). b lies in
// shared memory, as a panel of rows of 128 bytes, that is of 64 numbers, whose 16-byte chunks are permuted: chunk c of row
// r lies at place c ^ (r % 8), so that neither reading rows nor reading columns meets one bank twice. A panel begins at a
// multiple of 1024 bytes.
// Rows of b are either its columns (`by_rows` = false: c = a b^T, 16 numbers of each row) or its k (`by_rows` = true).
//
// In doubt: `by_rows` with n < 64 (heads of 16, 32, 48; the second panel of 80, 96, 112) reads the first n columns of atoms
// of 64 x 8 numbers. PTX ISA describes b by rows as whole atoms ("Canonical Layouts": ((T,8,m),(8,k)), 64 m columns) and
// does not say what fewer columns read; CUTLASS takes narrower swizzles for them. Triton reads 32 columns of such atoms,
// where two warpgroups share 64, which speaks for it. It is the first suspect if such heads are wrong on a GPU and heads
// of 64 and 128 right.
//
// The products run by themselves. wgmma_fence comes before the first one of several, after registers of theirs were
// written; wgmma_commit closes a group; until wgmma_wait has waited for it, its registers c and a belong to it.
#pragma once
#include "common.cuh"

#ifdef TINYVIT_CPU
#include "wgmma.h"
#else
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most `pending` of the committed groups are still under way.
template <int pending>
DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// What this thread wrote to shared memory, also by copies that it waited for, is there for wgmma, which reads by another
// way. A barrier follows.
DEVICE void fence_for_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Keeps registers in place until here, so that the compiler reuses none while a product may still need it.
DEVICE void pin(float& x) { asm volatile("" : "+f"(x)::"memory"); }
DEVICE void pin(unsigned& x) { asm volatile("" : "+r"(x)::"memory"); }

// One instruction for each n: its registers are written out here, since asm knows no arrays.
template <class T, int n, bool by_rows>
struct Wgmma;

#define PLACES_8 "%0,%1,%2,%3"
#define REGISTERS_8 "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
#define PLACES_16 PLACES_8 "," "%4,%5,%6,%7"
#define REGISTERS_16 REGISTERS_8, "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7])
#define PLACES_24 PLACES_16 "," "%8,%9,%10,%11"
#define REGISTERS_24 REGISTERS_16, "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11])
#define PLACES_32 PLACES_24 "," "%12,%13,%14,%15"
#define REGISTERS_32 REGISTERS_24, "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15])
#define PLACES_40 PLACES_32 "," "%16,%17,%18,%19"
#define REGISTERS_40 REGISTERS_32, "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19])
#define PLACES_48 PLACES_40 "," "%20,%21,%22,%23"
#define REGISTERS_48 REGISTERS_40, "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23])
#define PLACES_56 PLACES_48 "," "%24,%25,%26,%27"
#define REGISTERS_56 REGISTERS_48, "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27])
#define PLACES_64 PLACES_56 "," "%28,%29,%30,%31"
#define REGISTERS_64 REGISTERS_56, "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31])

#define WGMMA_TYPE(scalar, type, n, a0, a1, a2, a3, b, sum, order)                                                     \
    template <bool by_rows>                                                                                            \
    struct Wgmma<scalar, n, by_rows> {                                                                                 \
        static DEVICE void run(float* c, const unsigned* a, unsigned long long b_panel, int add) {                     \
            asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #sum ", 0;"                                                \
                         "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" PLACES_##n "}, "         \
                         "{%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #b ", p, 1, 1, %" #order "; }"                     \
                         : REGISTERS_##n                                                                               \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_panel), "r"(add), "n"(int(by_rows)));     \
        }                                                                                                              \
    };
#define WGMMA(...) WGMMA_TYPE(bf16, "bf16", __VA_ARGS__) WGMMA_TYPE(f16, "f16", __VA_ARGS__)

WGMMA(8, 4, 5, 6, 7, 8, 9, 10)
WGMMA(16, 8, 9, 10, 11, 12, 13, 14)
WGMMA(24, 12, 13, 14, 15, 16, 17, 18)
WGMMA(32, 16, 17, 18, 19, 20, 21, 22)
WGMMA(40, 20, 21, 22, 23, 24, 25, 26)
WGMMA(48, 24, 25, 26, 27, 28, 29, 30)
WGMMA(56, 28, 29, 30, 31, 32, 33, 34)
WGMMA(64, 32, 33, 34, 35, 36, 37, 38)
#endif

// c = a b, plus c if `add`: a in this thread's four registers, b from `panel` on, whose next 8 rows lie 1024 bytes on.
template <class T, int n, bool by_rows>
DEVICE void wgmma(float* c, const unsigned* a, const void* panel, bool add) {
    const unsigned long long address = (shared_address(panel) & 0x3ffff) >> 4, eight_rows = 1024 >> 4, swizzle_128 = 1;
    Wgmma<T, n, by_rows>::run(c, a, address | eight_rows << 32 | swizzle_128 << 62, add);
}

// Where 16-byte chunk `chunk` of a row lies, in panels of `rows` rows.
DEVICE int place(int rows, int row, int chunk) { return chunk / 8 * rows * 128 + row * 128 + (chunk ^ row) % 8 * 16; }

// A row of a product to memory, if `inside`: the lane's upper (half = 0) or lower one, times `factor`. Of two
// neighbouring lanes and two blocks of 8 columns each takes one block, so that it stores 8 bytes.
template <class T, int columns>
DEVICE void store_row(T* to, const float (&c)[columns / 2], int half, float factor, bool inside) {
    const int pair = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < columns / 8; j += 2) {
        unsigned words[2];
#pragma unroll
        for (int block = 0; block < 2; block++) {
            const float* x = c + 4 * (j + block) + 2 * half;
            words[block] = Scalar<T>::pack(x[0] * factor, x[1] * factor);
        }
        const unsigned other = __shfl_xor_sync(0xffffffffu, pair % 2 ? words[0] : words[1], 1);
        const unsigned mine[2] = {pair % 2 ? other : words[0], pair % 2 ? words[1] : other};
        if (inside) store_8(to + 8 * (j + pair % 2) + pair / 2 * 4, mine);
    }
}

// A row as `store_row` writes it: words[j] are the lane's two of columns 8 j ... 8 j + 7; zeros if not `inside`.
template <class T, int columns>
DEVICE void load_row(unsigned (&words)[columns / 8], const T* from, bool inside) {
    const int pair = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < columns / 8; j += 2) {
        unsigned mine[2] = {};
        if (inside) load_8(mine, from + 8 * (j + pair % 2) + pair / 2 * 4);
        const unsigned other = __shfl_xor_sync(0xffffffffu, pair % 2 ? mine[0] : mine[1], 1);
        words[j] = pair % 2 ? other : mine[0];
        words[j + 1] = pair % 2 ? mine[1] : other;
    }
}

// The lower (i = 0) or upper number of two.
template <class T>
DEVICE float half_of_word(unsigned word, int i) {
    T pair[2];
    memcpy(pair, &word, 4);
    return to_float(pair[i]);
}

// A number that the compiler knows, as an argument.
template <int n>
struct Number {
    static constexpr int value = n;
};
