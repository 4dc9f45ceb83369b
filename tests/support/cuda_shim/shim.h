// CUDA C++ on a CPU, for tests: a kernel's own source runs here, one block at a time, each thread as a fibre.
//
// Fibres only change places at barriers and warp operations, in an order that a seed shuffles, and each warp runs as
// far ahead of the others as barriers let it. Dynamic shared memory is filled with NaN before each block, and the
// target of an asynchronous copy is NaN until its thread waits for the copy; so a missing barrier or wait shows in
// the results. Instructions that CUDA reaches through PTX are at the end.
//
// What this cannot see: races between blocks, the cost of anything, and the last bits of approximate instructions.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define DYNAMIC_SHARED(name) unsigned char* name = sim::shared  // from a multiple of 1024 bytes on

struct Index {
    unsigned x, y, z;
};

struct alignas(8) float2 {
    float x, y;
};

struct alignas(16) float4 {
    float x, y, z, w;
};

namespace sim {

// The thread that runs, and its block.
extern Index thread_index, block_index, block_size, grid_size;
extern int lane;
extern unsigned char* shared;
constexpr unsigned first_shared_address = 1024;  // what is before it is the system's

[[noreturn]] void fail(const char* message);  // ends the launch
inline void check(bool good, const char* message) {
    if (!good) fail(message);
}
inline void check_aligned(const void* p, size_t bytes) {
    check(reinterpret_cast<uintptr_t>(p) % bytes == 0, "misaligned access");
}

void barrier();

// Brings `mine` to an operation of the warp or warpgroup, of `count` lanes; the operation is named by an address. The last
// lane gets true and finds what all brought in `lanes`; it does the work, then calls leave_group. The others get false
// once that is done.
bool enter_group(int count, const void* operation, void* mine, void** lanes);
void leave_group(int count);

// Runs `operation(lanes)` once, when all lanes have arrived with their `mine`.
template <int count, class Lane, class Operation>
void group_operation(Lane* mine, Operation operation) {
    static const char tag = 0;
    void* all[count];
    if (!enter_group(count, &tag, mine, all)) return;
    Lane* lanes[count];
    for (int i = 0; i < count; i++) lanes[i] = static_cast<Lane*>(all[i]);
    operation(lanes);
    leave_group(count);
}

template <class Lane, class Operation>
void warp_operation(Lane* mine, Operation operation) {
    group_operation<32>(mine, operation);
}

template <class Lane, class Operation>
void warpgroup_operation(Lane* mine, Operation operation) {
    group_operation<128>(mine, operation);
}

void copy_async(void* to, const void* from, size_t bytes);  // from nullptr: zeros
void commit_copies();
void wait_for_copies(int pending);

const char* run_blocks(const unsigned* grid, const unsigned* block, size_t shared_bytes, uint64_t seed,
                       void (*body)(void*), void* data);

template <class... Parameters>
struct Call {
    void (*kernel)(Parameters...);
    void** arguments;

    template <size_t... I>
    void run(std::index_sequence<I...>) {
        kernel(*static_cast<Parameters*>(arguments[I])...);
    }
};

// Runs a kernel; the message says what went wrong, empty if nothing did. A seed of 0 runs threads in their order.
template <class... Parameters>
const char* launch(void (*kernel)(Parameters...), const unsigned* grid, const unsigned* block, size_t shared_bytes,
                   void** arguments, uint64_t seed) {
    using ThisCall = Call<Parameters...>;
    ThisCall call = {kernel, arguments};
    auto body = [](void* data) { static_cast<ThisCall*>(data)->run(std::index_sequence_for<Parameters...>{}); };
    return run_blocks(grid, block, shared_bytes, seed, body, &call);
}

}  // namespace sim

#define threadIdx (sim::thread_index)
#define blockIdx (sim::block_index)
#define blockDim (sim::block_size)
#define gridDim (sim::grid_size)

inline void __syncthreads() { sim::barrier(); }

inline void __syncwarp() {
    int nothing;
    sim::warp_operation(&nothing, [](int**) {});
}

// The value of the lane `from` of the warp.
template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
    struct Lane {
        T value, result;
        int from;
    };
    sim::check(mask == 0xffffffffu, "only whole warps can shuffle here");
    Lane lane = {value, value, from};
    sim::warp_operation(&lane, [](Lane** lanes) {
        for (int i = 0; i < 32; i++) lanes[i]->result = lanes[lanes[i]->from]->value;
    });
    return lane.result;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
    return __shfl_sync(mask, value, sim::lane ^ other);
}

inline float __int_as_float(int bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

inline int __float_as_int(float x) {
    int bits;
    memcpy(&bits, &x, 4);
    return bits;
}

inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }

// --- 16-bit numbers, rounded to nearest even -----------------------------------------------------------------------

struct __nv_bfloat16 {
    uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return __int_as_float(int(uint32_t(x.bits) << 16)); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    uint32_t bits = uint32_t(__float_as_int(x));
    if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

using __half = _Float16;
inline float __half2float(__half x) { return float(x); }
inline __half __float2half_rn(float x) { return __half(x); }

// --- what stands for PTX instructions ------------------------------------------------------------------------------

inline void copy_vector(void* to, const void* from, const void* in_memory, size_t bytes) {
    sim::check_aligned(in_memory, bytes);
    memcpy(to, from, bytes);
}

inline void load_16(void* to, const void* from) { copy_vector(to, from, from, 16); }
inline void load_8(void* to, const void* from) { copy_vector(to, from, from, 8); }
inline void store_16(void* to, const void* from) { copy_vector(to, from, to, 16); }
inline void store_8(void* to, const void* from) { copy_vector(to, from, to, 8); }

inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }

template <class T>
unsigned pack(T low, T high) {
    uint16_t bits[2];
    memcpy(&bits[0], &low, 2);
    memcpy(&bits[1], &high, 2);
    return unsigned(bits[0]) | unsigned(bits[1]) << 16;
}

inline unsigned pack_bf16(float low, float high) { return pack(__float2bfloat16_rn(low), __float2bfloat16_rn(high)); }
inline unsigned pack_f16(float low, float high) { return pack(__float2half_rn(low), __float2half_rn(high)); }

inline float half_of(unsigned pair, int high, __nv_bfloat16) {
    return __bfloat162float({uint16_t(high ? pair >> 16 : pair)});
}

inline float half_of(unsigned pair, int high, __half) {
    uint16_t bits = uint16_t(high ? pair >> 16 : pair);
    __half x;
    memcpy(&x, &bits, 2);
    return float(x);
}

// D (16 x 8) += A (16 x 16) B (16 x 8), operands of type T; which lane holds what: PTX ISA, "mma.m16n8k16".
template <class T>
void mma_16x8x16(float* d, const unsigned* a, const unsigned* b) {
    struct Lane {
        float* d;
        const unsigned *a, *b;
    };
    Lane lane = {d, a, b};
    sim::warp_operation(&lane, [](Lane** lanes) {
        float A[16][16], B[16][8];
        for (int i = 0; i < 32; i++)
            for (int k = 0; k < 8; k++) {
                int column = i % 4 * 2 + (k & 1) + (k >= 4) * 8;
                A[i / 4 + (k >> 1 & 1) * 8][column] = half_of(lanes[i]->a[k >> 1], k & 1, T{});
                if (k < 4) B[i % 4 * 2 + (k & 1) + (k >= 2) * 8][i / 4] = half_of(lanes[i]->b[k >> 1], k & 1, T{});
            }
        for (int i = 0; i < 32; i++)
            for (int e = 0; e < 4; e++)
                for (int k = 0; k < 16; k++) lanes[i]->d[e] += A[i / 4 + e / 2 * 8][k] * B[k][i % 4 * 2 + e % 2];
    });
}

inline void mma_bf16(float* d, const unsigned* a, const unsigned* b) { mma_16x8x16<__nv_bfloat16>(d, a, b); }
inline void mma_f16(float* d, const unsigned* a, const unsigned* b) { mma_16x8x16<__half>(d, a, b); }

inline float round_tf32(float x) { return __int_as_float((__float_as_int(x) + 0x1000) & ~0x1fff); }

// D (16 x 8) += A (16 x 8) B (8 x 8) in tf32: the instruction passes over the last 13 bits of its operands.
inline void mma_tf32(float* d, const float* a, const float* b) {
    struct Lane {
        float* d;
        const float *a, *b;
    };
    Lane lane = {d, a, b};
    sim::warp_operation(&lane, [](Lane** lanes) {
        auto tf32 = [](float x) { return __int_as_float(__float_as_int(x) & ~0x1fff); };
        float A[16][8], B[8][8];
        for (int i = 0; i < 32; i++) {
            for (int k = 0; k < 4; k++) A[i / 4 + k % 2 * 8][i % 4 + k / 2 * 4] = tf32(lanes[i]->a[k]);
            for (int k = 0; k < 2; k++) B[i % 4 + k * 4][i / 4] = tf32(lanes[i]->b[k]);
        }
        for (int i = 0; i < 32; i++)
            for (int e = 0; e < 4; e++)
                for (int k = 0; k < 8; k++) lanes[i]->d[e] += A[i / 4 + e / 2 * 8][k] * B[k][i % 4 * 2 + e % 2];
    });
}

// Four 8 x 8 matrices of 16-bit numbers from shared memory; lane i names row i % 8 of matrix i / 8.
template <bool transposed>
void load_matrices(unsigned* r, const void* row) {
    struct Lane {
        unsigned* r;
        const char* row;
    };
    sim::check_aligned(row, 16);
    Lane lane = {r, static_cast<const char*>(row)};
    sim::warp_operation(&lane, [](Lane** lanes) {
        for (int i = 0; i < 32; i++)
            for (int m = 0; m < 4; m++)
                for (int half = 0; half < 2; half++) {
                    int y = i / 4, x = i % 4 * 2 + half;
                    if (transposed) std::swap(y, x);
                    memcpy(reinterpret_cast<char*>(&lanes[i]->r[m]) + 2 * half, lanes[m * 8 + y]->row + 2 * x, 2);
                }
    });
}

// What the device's instructions call this place of the block's shared memory.
inline unsigned shared_address(const void* p) {
    return sim::first_shared_address + unsigned(static_cast<const unsigned char*>(p) - sim::shared);
}

inline void ldmatrix(unsigned* r, const void* row) { load_matrices<false>(r, row); }
inline void ldmatrix_transposed(unsigned* r, const void* row) { load_matrices<true>(r, row); }

inline void cp_async(void* to, const void* from, bool inside) {
    sim::check_aligned(to, 16);
    sim::check_aligned(from, 16);
    sim::copy_async(to, inside ? from : nullptr, 16);
}

inline void cp_async_commit() { sim::commit_copies(); }

template <int pending>
void cp_async_wait() {
    sim::wait_for_copies(pending);
}
