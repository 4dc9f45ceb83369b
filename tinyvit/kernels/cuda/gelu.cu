// GELU of any array, forward and backward: reads one (two) arrays and writes one; up to 40 FLOPs a number, bound by
// memory. A thread takes 16 bytes, the last one what is left.
//
// Compile with SCALAR and APPROXIMATE (see gelu.cuh).
#include "gelu.cuh"

using T = SCALAR;

constexpr int WIDTH = 16 / sizeof(T);
using V = Vector<T, WIDTH>;

extern "C" __global__ void __launch_bounds__(256)
    gelu_forward(const T* __restrict__ x, T* __restrict__ y, long long n) {
    const long long at = (1LL * blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    if (at + WIDTH <= n) {
        V v = load<WIDTH>(x + at);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) v.set(i, gelu<T>(v[i]));
        store(y + at, v);
    } else {
        for (long long i = at; i < n; i++) y[i] = Scalar<T>::from(gelu<T>(to_float(x[i])));
    }
}

extern "C" __global__ void __launch_bounds__(256)
    gelu_backward(const T* __restrict__ x, const T* __restrict__ dy, T* __restrict__ dx, long long n) {
    const long long at = (1LL * blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    if (at + WIDTH <= n) {
        const V v = load<WIDTH>(x + at);
        V g = load<WIDTH>(dy + at);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) g.set(i, g[i] * gelu_slope<T>(v[i]));
        store(dx + at, g);
    } else {
        for (long long i = at; i < n; i++) dx[i] = Scalar<T>::from(to_float(dy[i]) * gelu_slope<T>(to_float(x[i])));
    }
}
