// What all kernels share: PTX instructions, scalars, 16-byte vectors and sums over threads.
//
// SCALAR (float, f16 or bf16) and further constants of a kernel are defined on the compiler's command line. Every PTX
// instruction stands in a function of its own, which the tests' CPU shim replaces.
#pragma once

#ifdef TINYVIT_CPU
#include "shim.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

// 2^x and log2(x): one instruction each, relative (absolute near log2(1)) error about 2^-22.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ unsigned pack_f16(float low, float high) {
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// 16 or 8 bytes of global memory through registers, in one instruction: left to itself the compiler sometimes takes a
// vector apart. Loads may move past stores, so a kernel must not load what it has stored.
__device__ __forceinline__ void load_16(void* to, const void* from) {
    uint4 v;
    asm("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    memcpy(to, &v, 16);
}

__device__ __forceinline__ void load_8(void* to, const void* from) {
    uint2 v;
    asm("ld.global.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
    memcpy(to, &v, 8);
}

__device__ __forceinline__ void store_16(void* to, const void* from) {
    uint4 v;
    memcpy(&v, from, 16);
    asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

__device__ __forceinline__ void store_8(void* to, const void* from) {
    uint2 v;
    memcpy(&v, from, 8);
    asm volatile("st.global.v2.u32 [%0], {%1,%2};" ::"l"(to), "r"(v.x), "r"(v.y) : "memory");
}

// d (16 x 8) += a (16 x 16) b (16 x 8), fp32 sums.
__device__ __forceinline__ void mma_bf16(float* d, const unsigned* a, const unsigned* b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_f16(float* d, const unsigned* a, const unsigned* b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d (16 x 8) += a (16 x 8) b (8 x 8); the first 19 bits of each operand count.
__device__ __forceinline__ void mma_tf32(float* d, const float* a, const float* b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_int(a[0])), "r"(__float_as_int(a[1])), "r"(__float_as_int(a[2])), "r"(__float_as_int(a[3])),
          "r"(__float_as_int(b[0])), "r"(__float_as_int(b[1])));
}

// The nearest number of tf32's 10 bits.
__device__ __forceinline__ float round_tf32(float x) {
    unsigned y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return __int_as_float(y);
}

__device__ __forceinline__ unsigned shared_address(const void* p) {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// Four 8 x 8 matrices of 16-bit numbers; lane i names row i % 8 of matrix i / 8.
__device__ __forceinline__ void ldmatrix(unsigned* r, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_transposed(unsigned* r, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// 16 bytes from global to shared memory, past the registers and the first-level cache; zeros where not `inside`.
__device__ __forceinline__ void cp_async(void* to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(inside ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of this thread's committed groups of copies are still under way.
template <int pending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}
#endif

#define DEVICE __device__ __forceinline__

using bf16 = __nv_bfloat16;
using f16 = __half;

DEVICE float minus_infinity() { return __int_as_float(0xff800000); }

// --- scalars and vectors -------------------------------------------------------------------------------------------

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(f16 x) { return __half2float(x); }
DEVICE float to_float(bf16 x) { return __bfloat162float(x); }

template <class T>
struct Scalar;

template <>
struct Scalar<float> {
    static constexpr bool wide = true;  // needs fp32's precision throughout
    static DEVICE float from(float x) { return x; }
};

template <>
struct Scalar<f16> {
    static constexpr bool wide = false;
    static DEVICE f16 from(float x) { return __float2half_rn(x); }
    static DEVICE unsigned pack(float low, float high) { return pack_f16(low, high); }
    static DEVICE void mma(float* d, const unsigned* a, const unsigned* b) { mma_f16(d, a, b); }
};

template <>
struct Scalar<bf16> {
    static constexpr bool wide = false;
    static DEVICE bf16 from(float x) { return __float2bfloat16_rn(x); }
    static DEVICE unsigned pack(float low, float high) { return pack_bf16(low, high); }
    static DEVICE void mma(float* d, const unsigned* a, const unsigned* b) { mma_bf16(d, a, b); }
};

// N numbers that one instruction reads from global memory, or writes to it: 16 bytes where N is 16 / sizeof(T).
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
    T x[N];

    DEVICE float operator[](int i) const { return to_float(x[i]); }
    DEVICE void set(int i, float value) { x[i] = Scalar<T>::from(value); }
};

template <int N, class T>
DEVICE Vector<T, N> load(const T* from) {
    Vector<T, N> v;
    if constexpr (sizeof(v) == 16)
        load_16(&v, from);
    else if constexpr (sizeof(v) == 8)
        load_8(&v, from);
    else
        v = *reinterpret_cast<const Vector<T, N>*>(from);
    return v;
}

template <class T, int N>
DEVICE void store(T* to, const Vector<T, N>& v) {
    if constexpr (sizeof(v) == 16)
        store_16(to, &v);
    else if constexpr (sizeof(v) == 8)
        store_8(to, &v);
    else
        *reinterpret_cast<Vector<T, N>*>(to) = v;
}

// Two neighbours, as the accumulators of a tile hold them, into any memory.
DEVICE void store_pair(float* to, float low, float high) { *reinterpret_cast<float2*>(to) = float2{low, high}; }
template <class T>
DEVICE void store_pair(T* to, float low, float high) {
    *reinterpret_cast<unsigned*>(to) = Scalar<T>::pack(low, high);
}

// --- sums over threads: in a fixed order, so that results repeat bit for bit ---------------------------------------

// Over groups of `lanes` neighbouring lanes (a power of two).
template <int lanes = 32>
DEVICE float warp_sum(float x) {
#pragma unroll
    for (int i = lanes / 2; i > 0; i /= 2) x += __shfl_xor_sync(0xffffffffu, x, i);
    return x;
}

template <int lanes = 32>
DEVICE float warp_max(float x) {
#pragma unroll
    for (int i = lanes / 2; i > 0; i /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, i));
    return x;
}

// The sums of `count` numbers over all threads of the block, in place; `scratch` holds count floats a warp, and a
// barrier must pass before it is used again.
template <int count>
DEVICE void block_sums(float (&x)[count], float* scratch) {
    const int warps = blockDim.x / 32;
#pragma unroll
    for (int i = 0; i < count; i++) x[i] = warp_sum(x[i]);
    if (warps == 1) return;
    if (threadIdx.x % 32 == 0)
#pragma unroll
        for (int i = 0; i < count; i++) scratch[threadIdx.x / 32 * count + i] = x[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < count; i++) x[i] = 0.0f;
    for (int warp = 0; warp < warps; warp++)
#pragma unroll
        for (int i = 0; i < count; i++) x[i] += scratch[warp * count + i];
}
